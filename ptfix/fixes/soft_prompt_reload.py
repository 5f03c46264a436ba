"""A checkpoint of a soft prompt is what training goes on from, and what is loaded is what acts.

peft saves what a prompt encoder puts out, and loads it into what the encoder takes in.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix

#: Where peft and those who call it look its two functions up. Not all releases have all of them.
_MODULES = ("peft.peft_model", "peft.utils.save_and_load", "peft.utils", "peft", "peft.functional")


def _wrap_get(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import saving

    @functools.wraps(original)
    def get_peft_model_state_dict(
        model: Any, state_dict: Any = None, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        def get(model: Any) -> Any:
            return original(model, state_dict, adapter_name, *args, **kwargs)

        return saving.state_dict_to_save(get, model, state_dict, adapter_name)

    return get_peft_model_state_dict


def _wrap_set(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import reloading

    @functools.wraps(original)
    def set_peft_model_state_dict(
        model: Any, peft_model_state_dict: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> Any:
        def put(state_dict: Any) -> Any:
            return original(model, state_dict, adapter_name, *args, **kwargs)

        return reloading.set_state_dict(put, model, peft_model_state_dict, adapter_name)

    return set_peft_model_state_dict


def _wrap_load_adapter(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import reloading

    @functools.wraps(original)
    def load_adapter(
        self: Any, model_id: Any, adapter_name: str, is_trainable: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_trainable and adapter_name not in self.peft_config:
            reloading.add_to_train(self, model_id, adapter_name, **kwargs)
        with reloading.loading(for_inference=not is_trainable):
            return original(self, model_id, adapter_name, is_trainable, *args, **kwargs)

    return load_adapter


def _wrap_from_pretrained(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import reloading

    signature = inspect.signature(original)

    @functools.wraps(original)
    def from_pretrained(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        if given.get("is_trainable"):
            options = given.pop("kwargs", {})
            config = given.get("config") or reloading.config_of(given["model_id"], options)
            if config.is_prompt_learning:
                return reloading.model_to_train(**{"adapter_name": "default", **given, "config": config}, **options)
        return original(*args, **kwargs)

    return from_pretrained


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.reload_fault()


FIX = Fix(
    id="soft-prompt-reload",
    why="p-tuning, prefix projection and CPT cannot be trained on from a checkpoint: it holds what the encoder put out",
    link="https://github.com/huggingface/peft/issues/2256",
    affects={},
    probe=_probe,
    edits=(
        *(
            Edit(
                f"{module}:get_peft_model_state_dict",
                _wrap_get,
                ("model", "state_dict", "adapter_name"),
                optional=module != _MODULES[0],
            )
            for module in _MODULES
        ),
        *(
            Edit(
                f"{module}:set_peft_model_state_dict",
                _wrap_set,
                ("model", "peft_model_state_dict", "adapter_name"),
                optional=module != _MODULES[0],
            )
            for module in _MODULES
        ),
        Edit(
            "peft.peft_model:PeftModel.load_adapter",
            _wrap_load_adapter,
            ("self", "model_id", "adapter_name", "is_trainable"),
        ),
        Edit(
            "peft.peft_model:PeftModel.from_pretrained",
            _wrap_from_pretrained,
            ("model", "model_id", "adapter_name", "is_trainable", "config"),
        ),
    ),
    retire_when="peft saves what is trained, and loads it to train on (0.21.2 does not)",
)
