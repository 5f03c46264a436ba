"""`PeftModel.active_adapters` of a soft prompt is a list, so that Trainer can resume from a checkpoint.

peft asks the base model first. With a soft prompt that is the plain transformers model, whose `active_adapters` is a
method of transformers' own adapters; Trainer (4.42 and later) takes its len().
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(original)
    def active_adapters(self: Any) -> Any:
        adapters = original(self)
        return [self.active_adapter] if callable(adapters) else adapters

    return active_adapters


def _probe() -> str | None:
    import torch
    from peft import PeftModel
    from transformers.integrations import PeftAdapterMixin

    class Base(torch.nn.Module, PeftAdapterMixin):  # type: ignore[misc]
        """What a soft prompt's base model has of its own adapters."""

    model = PeftModel.__new__(PeftModel)
    torch.nn.Module.__init__(model)
    model.base_model, model.active_adapter = Base(), "default"
    return "Trainer cannot resume a soft prompt" if callable(model.active_adapters) else None


FIX = Fix(
    id="active-adapters",
    why="Trainer's resume_from_checkpoint raises TypeError (a method has no len()) for a soft prompt",
    link="https://github.com/huggingface/transformers/pull/30790",
    affects={"peft": "<0.13"},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModel.active_adapters", _wrap, ("self",)),),
    retire_when="the floor is peft 0.13",
)
