"""A task head says of a padded row what it says of the row alone, be it padded on the left or on the right.

This changes the numbers that an adapter trained on padded batches was trained with: switch it off by its id to keep the
old ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    from ptfix.soft_prompts import heads, training

    head, by_name = heads.HEADS[name], training.by_name(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not heads.has_soft_prompt(self):
            return original(self, *args, **kwargs)
        if training.is_traced():
            training.say_that_graphs_keep_padding()
            return original(self, *args, **kwargs)
        return heads.as_alone(original, self, by_name(args, kwargs), head)

    return forward


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.padded_class_fault()


def _edits() -> tuple[Edit, ...]:
    names = (
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
        "PeftModelForQuestionAnswering",
        "PeftModelForFeatureExtraction",
    )
    return tuple(
        Edit(f"peft.peft_model:{name}.forward", functools.partial(_wrap, name=name), ("self", "attention_mask"))
        for name in names
    )


FIX = Fix(
    id="padded-task-heads",
    why="a classifier with a soft prompt answers a padded row otherwise than the row alone",
    link="https://github.com/huggingface/peft/issues/2642",
    affects={},
    probe=_probe,
    edits=_edits(),
    retire_when="peft's task heads keep padding out of the way of the soft prompt (0.21.2 does not)",
)
