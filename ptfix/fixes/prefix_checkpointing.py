"""Prefix tuning is trained under gradient checkpointing: the layers keep the KV cache that the prefix comes in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import training
    from ptfix.soft_prompts.adapter import has_prefix

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not training.is_checkpointed(self.base_model) or not has_prefix(self):
            return original(self, *args, **kwargs)
        return original(training.with_base_call(self, training.checkpointed), *args, **kwargs)

    return forward


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.prefix_checkpointing_fault()


FIX = Fix(
    id="prefix-checkpointing",
    why="with gradient checkpointing prefix tuning raises or is not trained",
    link="https://github.com/huggingface/peft/issues/869",
    affects={},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModelForCausalLM.forward", _wrap, ("self", "kwargs")),),
    retire_when="peft trains a prefix under gradient checkpointing (0.21.2 refuses or gives a zero gradient)",
)
