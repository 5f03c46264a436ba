"""forward() with padding on the left equals the unpadded row.

This changes the numbers that an adapter trained on left-padded batches was trained with: switch it off by its id to
keep the old ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import training
    from ptfix.soft_prompts.adapter import SoftPrompt, has_soft_prompt

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_soft_prompt(self):
            return original(self, *args, **kwargs)
        prompt = SoftPrompt(self)
        aside = functools.partial(training.padding_aside, virtual_tokens=0 if prompt.is_prefix else prompt.length)
        return original(training.with_base_call(self, aside), *args, **kwargs)

    return forward


def _probe() -> str | None:
    from ptfix.soft_prompts import probes

    return probes.left_padding_fault()


FIX = Fix(
    id="left-padded-forward",
    why="in a left-padded row the text stands further from its soft prompt than in the row alone",
    link="https://github.com/huggingface/peft/issues/1093",
    affects={},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModelForCausalLM.forward", _wrap, ("self", "attention_mask", "kwargs")),),
    retire_when="peft computes position_ids from the extended mask (0.21.2 does not)",
)
