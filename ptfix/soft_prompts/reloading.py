"""Loading a soft prompt so that what acts is what was saved, and so that training can go on from it.

An adapter in training has a prompt encoder, and takes the encoder's own weights from what `saving` has saved. Where a
checkpoint lacks them (peft saved it without ptfix) there is nothing to go on from: loading it to train is refused, and
loading it for inference leaves an adapter without an encoder, as PeftModel.from_pretrained() makes it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from ptfix.soft_prompts import saving

logger = logging.getLogger("ptfix")

#: Is load_adapter() loading for inference, and not to train?
_for_inference: ContextVar[bool] = ContextVar("ptfix_for_inference", default=False)


@contextmanager
def loading(for_inference: bool) -> Iterator[None]:
    """Inside load_adapter()."""
    token = _for_inference.set(for_inference)
    try:
        yield
    finally:
        _for_inference.reset(token)


def set_state_dict(
    put: Callable[[Mapping[str, torch.Tensor]], Any],
    peft_model: Any,
    saved: Mapping[str, torch.Tensor],
    adapter_name: str,
) -> Any:
    """Load what was saved into the prompt encoder that it came from.

    Args:
        put: peft's set_peft_model_state_dict, of what peft saves.

    Raises:
        ValueError: the adapter is in training, and what was saved lacks its encoder or has another one.
    """
    weights, rest = saving.parted(saved)
    if not saving.has_encoder(peft_model, adapter_name):
        return put(rest)
    if weights:
        encoder = peft_model.prompt_encoder[adapter_name]
        _raise_if_another(encoder, weights)
        # peft loads the soft prompt into the encoder's embedding, where the encoder's input belongs.
        result = put({**rest, "prompt_embeddings": weights["embedding.weight"]})
        encoder.load_state_dict(weights)
        return result
    config = peft_model.peft_config[adapter_name]
    if not _for_inference.get():
        raise _refusal(config)
    logger.warning("%s: the adapter %r is loaded for inference, and cannot be trained on.", _lack(config), adapter_name)
    _drop_encoder(peft_model, adapter_name)
    return put(rest)


def _refusal(config: Any) -> ValueError:
    return ValueError(
        f"{_lack(config)}: training cannot go on from it. Train from a checkpoint that was saved with ptfix, or load "
        "this one for inference with PeftModel.from_pretrained(base_model, folder)."
    )


def _lack(config: Any) -> str:
    method = str(getattr(config.peft_type, "value", config.peft_type)).replace("_", " ").lower()
    return f"the checkpoint holds the soft prompt, and not the prompt encoder ({method}) that makes it"


def _raise_if_another(encoder: Any, weights: saving.State) -> None:
    if any(hasattr(module, "_fsdp_wrapped_module") for module in encoder.modules()):
        return  # its shapes are known to FSDP1 alone
    here, there = ({name: tuple(one.shape) for name, one in each.items()} for each in (encoder.state_dict(), weights))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ValueError(
                f"the checkpoint's prompt encoder is another than the adapter's ({name}: {there.get(name)} there, "
                f"{here.get(name)} here): make the adapter with the settings of the checkpoint's adapter_config.json."
            )


def _drop_encoder(peft_model: Any, adapter_name: str) -> None:
    """Make an adapter in training one for inference. What trained it is gone, so nothing of it can be trained."""
    config, trained = peft_model.peft_config[adapter_name], peft_model.prompt_encoder[adapter_name]
    config.inference_mode = True
    kind = type(trained)
    takes_words = "word_embeddings" in inspect.signature(kind).parameters
    encoder = kind(config, peft_model.word_embeddings) if takes_words else kind(config)
    like = next(trained.parameters())
    peft_model.prompt_encoder[adapter_name] = encoder.to(like.device, like.dtype).requires_grad_(False)


# --- an adapter that is new to the model, to be trained -------------------------------------------------------------


def model_to_train(
    cls: Any,
    model: Any,
    model_id: Any,
    config: Any,
    adapter_name: str = "default",
    is_trainable: bool = True,
    **options: Any,
) -> Any:
    """PeftModel.from_pretrained(..., is_trainable=True) of a soft prompt.

    Raises:
        ValueError: the checkpoint lacks what is needed to train on.
    """
    import peft

    _raise_if_lacking(model_id, config, options)
    with _made_to_train(config):
        peft_model = peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, cls)(model, config, adapter_name)
    peft_model.load_adapter(model_id, adapter_name, is_trainable, **options)
    return peft_model


def add_to_train(peft_model: Any, model_id: Any, adapter_name: str, **options: Any) -> None:
    """Give a model a further soft prompt to train, whose weights are loaded next.

    Raises:
        ValueError: the checkpoint lacks what is needed to train on.
    """
    config = config_of(model_id, options)
    if config.is_prompt_learning:
        _raise_if_lacking(model_id, config, options)
        with _made_to_train(config):
            peft_model.add_adapter(adapter_name, config)


def config_of(model_id: Any, options: dict[str, Any]) -> Any:
    """The PeftConfig of a saved adapter."""
    from peft import PeftConfig, PeftModel

    return PeftConfig.from_pretrained(model_id, **PeftModel._split_kwargs(options)[0])


@contextmanager
def _made_to_train(config: Any) -> Iterator[None]:
    """Inside, a prompt encoder is made to train, and does not make up the start values that are loaded anyway: that
    takes a tokenizer or another adapter's file."""
    config.inference_mode = False
    init = getattr(config, "prompt_tuning_init", None)
    if init is None:
        yield
        return
    config.prompt_tuning_init = "RANDOM"
    try:
        yield
    finally:
        config.prompt_tuning_init = init


def _raise_if_lacking(model_id: Any, config: Any, options: dict[str, Any]) -> None:
    """Before anything is made of it."""
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights

    if saving.is_only_an_output(config):
        saved = load_peft_weights(model_id, device="cpu", **PeftModel._split_kwargs(options)[0])
        if not saving.parted(saved)[0]:
            raise _refusal(config)
