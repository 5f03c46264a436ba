"""Prefix tuning of a classifier runs where the hosts call the KV cache by another name than peft does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import heads, training

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not heads.has_soft_prompt(self) or training.is_traced():
            return original(self, *args, **kwargs)
        return original(heads.takes_old_name(self), *args, **kwargs)

    return forward


def _probe() -> str | None:
    from ptfix.soft_prompts import caches

    if caches.keyword() == "past_key_values":
        return None
    return f"peft looks for past_key_values in a classifier's forward(), and finds {caches.keyword()}"


def _proof() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.prefix_class_fault()


FIX = Fix(
    id="prefix-task-heads",
    why="prefix tuning of a classifier raises: Model does not support past key values",
    link="https://github.com/huggingface/transformers/releases/tag/v5.24.0",
    affects={},
    probe=_probe,
    edits=tuple(
        Edit(f"peft.peft_model:{name}._prefix_tuning_forward", _wrap, ("self", "kwargs"))
        for name in (
            "PeftModelForSequenceClassification",
            "PeftModelForTokenClassification",
            "PeftModelForQuestionAnswering",
        )
    ),
    proof=_proof,
    retire_when="peft knows the name by which transformers calls its KV cache (0.21.2 does not know 5.24's)",
)
