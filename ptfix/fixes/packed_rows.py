"""Packed rows are refused: all of them would share one soft prompt, at positions that peft makes up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import caches, refusals, training
    from ptfix.soft_prompts.adapter import has_soft_prompt

    by_name = training.by_name(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not training.is_traced() and has_soft_prompt(self):
            given = by_name(args, kwargs)
            # Behind a cache positions begin where the text before ends.
            problem = refusals.unreadable(given) if not caches.length(caches.of(given)) else None
            if problem is not None:
                raise ValueError(problem)
        return original(self, *args, **kwargs)

    return forward


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.packed_rows_fault()


FIX = Fix(
    id="packed-rows",
    why="packed rows share one soft prompt, since forward() drops position_ids and never reads where rows end",
    link="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py#L1672-L1674",
    affects={},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModelForCausalLM.forward", _wrap, ("self", "attention_mask", "kwargs")),),
    retire_when="peft gives each packed row its own soft prompt, or refuses (0.21.2 does neither)",
)
