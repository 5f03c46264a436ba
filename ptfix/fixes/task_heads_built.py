"""peft 0.13 can wrap a classifier: its task classes take `low_cpu_mem_usage`, which they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix

_CLASSES = (
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftModelForQuestionAnswering",
)


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def add_adapter(self: Any, adapter_name: str, peft_config: Any, low_cpu_mem_usage: bool = False) -> Any:
        # Without it the weights are made at once, which is the same but for the memory of that moment.
        return original(self, adapter_name, peft_config)

    return add_adapter


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.classifier_fault()


FIX = Fix(
    id="task-heads-built",
    why="no adapter at all can be put on a classifier: TypeError, low_cpu_mem_usage",
    link="https://github.com/huggingface/peft/issues/2110",
    affects={"peft": ">=0.13,<0.14"},
    probe=_probe,
    edits=tuple(
        Edit(f"peft.peft_model:{name}.add_adapter", _wrap, ("self", "adapter_name", "peft_config"), optional=True)
        for name in _CLASSES
    ),
    retire_when="the floor is peft 0.14",
)
