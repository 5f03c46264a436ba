"""ptfix: makes soft prompts, chat templates and sequence lengths of transformers + peft do what they say.

>>> import ptfix
>>> print(ptfix.apply())
"""

from __future__ import annotations

import functools
import importlib
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptfix.patching import Patcher, PatchError
    from ptfix.report import Report, Row, Status

    def callbacks() -> list[Any]:
        """The sensible default set of callbacks for a `transformers.Trainer`."""


__version__ = "0.1.0"
__all__ = ["PatchError", "Report", "Row", "Status", "apply", "callbacks", "revert", "status"]

#: Loaded on first use, so that `import ptfix` costs nothing. `callbacks` is a module that can be called.
_LAZY = {
    "PatchError": "ptfix.patching",
    "Report": "ptfix.report",
    "Row": "ptfix.report",
    "Status": "ptfix.report",
    "callbacks": "ptfix.callbacks",
    "chat_templates": "ptfix.chat_templates",
    "ChatTemplateCallback": "ptfix.callbacks",
    "InstructionRetentionCallback": "ptfix.callbacks",
    "SequenceLengthGuardCallback": "ptfix.callbacks",
    "SequenceLengthWarmupCallback": "ptfix.callbacks",
    "SoftPromptCallback": "ptfix.callbacks",
}


def apply(strict: bool | None = None) -> Report:
    """Apply every fix this pair of hosts needs, whether or not the hosts are imported yet. Idempotent and thread-safe.

    Args:
        strict: raise instead of warn where a needed fix cannot be applied. None: as PTFIX_STRICT says.

    Raises:
        PatchError: strict, and a needed fix could not be applied; the hosts are as they were.
    """
    if strict is None:
        from ptfix.patching import strict_by_environment

        strict = strict_by_environment()
    return _patcher().apply(strict)


def status() -> Report:
    """The report of the last `apply()`, or of what it would do. Changes nothing."""
    return _patcher().status()


def revert() -> None:
    """Make every host attribute again the very object it was; models built meanwhile obey too."""
    _patcher().revert()


_lock = threading.Lock()


def _patcher() -> Patcher:
    with _lock:  # functools.cache alone may build two, and two ledgers cannot revert each other
        return _the_patcher()


@functools.cache
def _the_patcher() -> Patcher:
    from ptfix import fixes
    from ptfix.patching import Patcher

    return Patcher(fixes.ALL, _remedy)


def _remedy() -> str:
    from ptfix import evidence  # not before: it loads yaml, and is asked only where a host cannot be used

    return evidence.remedy()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ptfix' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if module.__name__ == f"ptfix.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
