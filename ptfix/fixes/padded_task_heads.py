"""A task head says of a padded row what it says of the row alone, be it padded on the left or on the right.

This changes the numbers that an adapter trained on padded batches was trained with: switch it off by its id to keep the
old ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix

_CLASSES = (
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftModelForQuestionAnswering",
    "PeftModelForFeatureExtraction",
)


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import heads

    return heads.around(original, heads.as_alone)


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.padded_class_fault()


FIX = Fix(
    id="padded-task-heads",
    why="a classifier with a soft prompt answers a padded row otherwise than the row alone",
    link="https://github.com/huggingface/peft/issues/2642",
    affects={},
    probe=_probe,
    edits=tuple(Edit(f"peft.peft_model:{name}.forward", _wrap, ("self", "attention_mask")) for name in _CLASSES),
    retire_when="peft's task heads keep padding out of the way of the soft prompt (0.21.2 does not)",
)
