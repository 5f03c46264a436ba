"""Which KV caches hold a soft prompt: noted when one is filled, beside the cache and not on it.

An attribute on a cache would be copied, pickled and compiled with it. What is noted here lives as long as the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ptfix.soft_prompts import caches


@dataclass(frozen=True)
class Mark:
    """What stands in a cache besides text."""

    adapter: str  #: whose soft prompt it is
    virtual_tokens: int
    read: int | None = None  #: positions read, where the cache itself cannot say (recurrent states)


_marks: Any = WeakIdKeyDictionary()


def put(past_key_values: Any, mark: Mark) -> None:
    """Note what `past_key_values` holds; nothing for None."""
    key = _key(past_key_values)
    if key is not None:
        _marks[key] = mark


def of(past_key_values: Any) -> Mark | None:
    """What was noted; None for a cache of someone else's, or a copy."""
    key = _key(past_key_values)
    return None if key is None else _marks.get(key)


def _key(past_key_values: Any) -> Any:
    """A legacy tuple cannot be referred to weakly, but its first tensor, which is handed on with it, can."""
    while isinstance(past_key_values, tuple | list) and not caches.is_cache(past_key_values):
        if not past_key_values:
            return None
        past_key_values = past_key_values[0]
    return (
        past_key_values if isinstance(past_key_values, torch.Tensor) or hasattr(past_key_values, "__dict__") else None
    )
