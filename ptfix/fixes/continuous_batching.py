"""Continuous batching of a soft prompt is refused: it would answer as the base model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    from ptfix.soft_prompts import refusals
    from ptfix.soft_prompts.adapter import has_soft_prompt

    @functools.wraps(original)
    def getattr_(self: Any, name: str) -> Any:
        found = original(self, name)
        if name in refusals.CONTINUOUS_BATCHING and has_soft_prompt(self):
            return refusals.continuous_batching
        return found

    return getattr_


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.continuous_batching_fault()


FIX = Fix(
    id="continuous-batching",
    why="generate_batch() of a soft prompt answers as the base model",
    link="https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/generation/continuous_batching/",
    affects={},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModel.__getattr__", _wrap, ("self", "name")),),
    retire_when="continuous batching of transformers calls PeftModel's forward (5.24.0 does not)",
)
