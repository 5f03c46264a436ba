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
    from ptfix.soft_prompts.adapter import active_config, has_soft_prompt

    by_name = training.by_name(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if training.is_traced():
            # A graph cannot depend on what a mask holds, so it stays the host's own, without a break.
            if active_config(self).is_prompt_learning:
                training.say_that_graphs_keep_padding()
            return original(self, *args, **kwargs)
        given = by_name(args, kwargs)
        pads = training.is_left_padded(given) if has_soft_prompt(self) else None
        if pads is None:
            return original(self, *args, **kwargs)
        return training.padding_on_the_right(original, self, given, pads)

    return forward


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.left_padding_fault()


FIX = Fix(
    id="left-padded-forward",
    why="in a left-padded row the text stands further from its soft prompt than in the row alone",
    link="https://github.com/huggingface/peft/issues/1093",
    affects={},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModelForCausalLM.forward", _wrap, ("self", "attention_mask", "kwargs")),),
    retire_when="peft's forward() keeps padding out of the way of the soft prompt (0.21.2 does not)",
)
