"""Chat templates: every checkpoint carries the right inference template, in every reader.

>>> import ptfix
>>> ptfix.chat_templates.diagnose(tokenizer.chat_template, tokenizer.special_tokens_map)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptfix.chat_templates.diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose", "register"]

#: Loaded on first use: the command line must answer at once, and only `saving` needs the hosts.
_LAZY = {"Diagnosis": "diagnosis", "diagnose": "diagnosis", "register": "saving"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
