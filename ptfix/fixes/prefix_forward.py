"""Prefix tuning trains on every pair: the prefix comes in a KV cache that this release reads, and reaches every layer.

peft 0.20 and later on transformers 4.56 and later do this for every architecture, layer by layer where layers differ.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix import hosts
from ptfix.patching import Edit, Fix

#: Where a prefix for layers with sliding windows may be misread, though that for full attention is not.
_SLIDING_WINDOWS = ({"peft": "<0.20"}, {"transformers": "<4.56"})


@functools.cache
def _full_attention_fails() -> bool:
    # Asked before the first commit, of the host as it is: see _probe.
    from ptfix.soft_prompts.proof import probes

    return probes.full_attention_prefix_fault() is not None


def _is_ours(peft_model: Any) -> bool:
    """Has this model a prefix that the host does not read? Where only sliding windows fail, the others stay stock's."""
    from ptfix.soft_prompts import adapter, caches, training

    if training.is_traced() or adapter.is_encoder_decoder(peft_model.base_model):
        return False  # a graph stays the host's own, without a break; encoder-decoders have a fix of their own
    if not adapter.has_prefix(peft_model):
        return False
    return _full_attention_fails() or caches.names_window_layers(peft_model.base_model)


def _wrap_get_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import caches, training
    from ptfix.soft_prompts.adapter import SoftPrompt

    @functools.wraps(original)
    def get_prompt(self: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self):
            return original(self, batch_size, *args, **kwargs)
        return caches.fill(None, SoftPrompt(self).key_values(batch_size), training.origin(self.base_model))

    return get_prompt


def _wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import training
    from ptfix.soft_prompts.adapter import SoftPrompt

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self):
            return original(self, *args, **kwargs)
        read = functools.partial(training.prefix_is_read, prompt=SoftPrompt(self))
        return original(training.with_base_call(self, read), *args, **kwargs)

    return forward


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    _full_attention_fails()  # kept, for it cannot be asked of the host any more once the fix is on
    fault = probes.full_attention_prefix_fault()
    # Asked only where it may be: to load gemma2 costs more than all other probes together.
    if fault is None and any(hosts.in_window(window) for window in _SLIDING_WINDOWS):
        fault = probes.sliding_window_prefix_fault()
    return fault


FIX = Fix(
    id="prefix-forward",
    why="prefix tuning raises, or the prefix is read wrongly, where the format of KV caches moved on",
    link="https://github.com/huggingface/peft/pull/3471",
    affects={},
    probe=_probe,
    edits=(
        Edit("peft.peft_model:PeftModel.get_prompt", _wrap_get_prompt, ("self", "batch_size")),
        Edit("peft.peft_model:PeftModelForCausalLM.forward", _wrap_forward, ("self", "kwargs")),
    ),
    retire_when="the floor is peft 0.20 with transformers 4.56",
)
