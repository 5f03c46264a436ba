"""Prefix tuning trains on every pair: the prefix comes in the cache this release reads, and reaches every layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _has_prefix(peft_model: Any) -> bool:
    from ptfix.soft_prompts.adapter import SoftPrompt, has_soft_prompt

    return has_soft_prompt(peft_model) and SoftPrompt(peft_model).is_prefix


def _wrap_get_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import caches, training
    from ptfix.soft_prompts.adapter import SoftPrompt

    @functools.wraps(original)
    def get_prompt(self: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        if not _has_prefix(self):
            return original(self, batch_size, *args, **kwargs)
        return caches.fill(None, SoftPrompt(self).key_values(batch_size), training.origin(self.base_model))

    return get_prompt


def _wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import training
    from ptfix.soft_prompts.adapter import SoftPrompt

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_prefix(self):
            return original(self, *args, **kwargs)
        read = functools.partial(training.prefix_is_read, prompt=SoftPrompt(self))
        return original(training.with_base_call(self, read), *args, **kwargs)

    return forward


def _probe() -> str | None:
    from ptfix.soft_prompts import probes

    return probes.prefix_forward_fault()


FIX = Fix(
    id="prefix-forward",
    why="prefix tuning raises where the cache format moved on, and is not trained under gradient checkpointing",
    link="https://github.com/huggingface/peft/issues/869",
    affects={},
    probe=_probe,
    edits=(
        Edit("peft.peft_model:PeftModel.get_prompt", _wrap_get_prompt, ("self", "batch_size")),
        Edit("peft.peft_model:PeftModelForCausalLM.forward", _wrap_forward, ("self", "kwargs")),
    ),
    retire_when="peft trains a prefix under gradient checkpointing (0.21.2 refuses or gives a zero gradient)",
)
