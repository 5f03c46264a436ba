"""Task heads count tokens as the user does: one output for each, labels and spans in the text's own places."""

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
        return heads.of_real_tokens(original, self, by_name(args, kwargs), head)

    return forward


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.token_outputs_fault()


def _edits() -> tuple[Edit, ...]:
    names = (
        "PeftModelForTokenClassification",
        "PeftModelForQuestionAnswering",
        "PeftModelForFeatureExtraction",
    )
    return tuple(
        Edit(f"peft.peft_model:{name}.forward", functools.partial(_wrap, name=name), ("self", "attention_mask"))
        for name in names
    )


FIX = Fix(
    id="task-head-outputs",
    why="token labels do not fit, a span's loss is another span's, and outputs count the virtual tokens too",
    link="https://github.com/huggingface/peft/blob/v0.21.2/src/peft/peft_model.py",
    affects={},
    probe=_probe,
    edits=_edits(),
    retire_when="peft's task heads give one output for each token of the text (0.21.2 does not)",
)
