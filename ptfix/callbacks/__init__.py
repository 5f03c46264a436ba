"""Thin TrainerCallbacks over the other rooms. The room can be called: `Trainer(..., callbacks=ptfix.callbacks())`.

Python sets `ptfix.callbacks` to this module as soon as anything imports it, so a function of that name in the door
would vanish. A module that can be called is both at once.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

#: Loaded on first use: a callback's class cannot be made without importing transformers.
_LAZY = {
    "ChatTemplateCallback": "chat_template",
    "ChatTemplateError": "chat_template",
    "InstructionRetentionCallback": "instruction_retention",
    "SequenceLengthError": "sequence_length_guard",
    "SequenceLengthGuardCallback": "sequence_length_guard",
    "SequenceLengthWarmupCallback": "sequence_length_warmup",
    "SoftPromptCallback": "soft_prompt",
    "SoftPromptError": "soft_prompt",
}


def default() -> list[Any]:
    """The sensible default set, new objects at each call."""
    from ptfix.callbacks.chat_template import ChatTemplateCallback
    from ptfix.callbacks.sequence_length_guard import SequenceLengthGuardCallback
    from ptfix.callbacks.soft_prompt import SoftPromptCallback

    return [ChatTemplateCallback(), SequenceLengthGuardCallback(), SoftPromptCallback()]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


class _Room(ModuleType):
    def __call__(self) -> list[Any]:
        return default()


sys.modules[__name__].__class__ = _Room
