"""forward() with a KV cache continues the text whose soft prompt stands in the cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import loops, training
    from ptfix.soft_prompts.adapter import has_soft_prompt

    by_name = training.by_name(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if training.is_traced() or not has_soft_prompt(self):
            return original(self, *args, **kwargs)
        return loops.forward(original, self, by_name(args, kwargs))

    return forward


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.cached_forward_fault()


FIX = Fix(
    id="cached-forward",
    why="in a hand-written decode loop forward() injects the soft prompt again at each step, or drops the text",
    link="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py#L2131-L2171",
    affects={},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModelForCausalLM.forward", _wrap, ("self", "attention_mask", "kwargs")),),
    retire_when="peft's forward() reads whether a cache holds the soft prompt (0.21.2 does not)",
)
