"""Task heads count tokens as the user does: one output for each, labels and spans in the text's own places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix

_CLASSES = (
    "PeftModelForTokenClassification",
    "PeftModelForQuestionAnswering",
    "PeftModelForFeatureExtraction",
)


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import heads

    return heads.around(original, heads.of_real_tokens)


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.token_outputs_fault()


FIX = Fix(
    id="task-head-outputs",
    why="token labels do not fit, a span's loss is another span's, and outputs count the virtual tokens too",
    link="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py",
    affects={},
    probe=_probe,
    edits=tuple(Edit(f"peft.peft_model:{name}.forward", _wrap, ("self", "attention_mask")) for name in _CLASSES),
    retire_when="peft's task heads give one output for each token of the text (0.21.2 does not)",
)
