"""Thin TrainerCallbacks over the other rooms. The room can be called: `Trainer(..., callbacks=ptfix.callbacks())`.

Python sets `ptfix.callbacks` to this module as soon as anything imports it, so a function of that name in the door
would vanish. A module that can be called is both at once.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


def default() -> list[Any]:
    """The sensible default set, new objects at each call."""
    return []


class _Room(ModuleType):
    def __call__(self) -> list[Any]:
        return default()


sys.modules[__name__].__class__ = _Room
