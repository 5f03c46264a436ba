"""What the training rows ask for: their lengths, and how many of them have nothing to learn from.

Looked at from outside: by index, not through the dataloader, which would start its workers and move its sampler; and
with every random state put back, since a data set or a collator may draw.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ptfix import errors, models

#: The label of a token that is not trained on, as every loss of transformers reads it.
IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One training row as the model will be fed with it."""

    length: int  #: the tokens that attend to each other: without padding, and of packed rows the longest
    width: int  #: positions used, padding included
    masked: bool  #: it has labels, and all of them are -100
    ids: tuple[int, ...]  #: its first tokens


@dataclass(frozen=True)
class Rows:
    """The rows looked at, of `total` in the data set."""

    seen: tuple[Row, ...]
    total: int
    fault: str | None = None  #: which rows could not be read, and why

    def __str__(self) -> str:
        """``4 rows looked at (of 1000)``"""
        return f"{len(self.seen)} rows looked at" + ("" if self.complete else f" (of {self.total})")

    @property
    def complete(self) -> bool:
        """Was every row looked at?"""
        return len(self.seen) == self.total

    @property
    def longest(self) -> int:
        return max(row.length for row in self.seen)

    def percentile(self, share: float) -> int:
        """The length that a `share` of the rows does not exceed (nearest rank)."""
        lengths = sorted(row.length for row in self.seen)
        return lengths[max(0, math.ceil(share * len(lengths)) - 1)]

    def beyond(self, limit: int) -> float:
        """The share of rows that are longer."""
        return sum(row.length > limit for row in self.seen) / len(self.seen)

    def cut_at(self, max_length: int) -> float:
        """The share of rows that end exactly at `max_length`: cut there, all but a few, or packed to that length."""
        return sum(row.length == max_length for row in self.seen) / len(self.seen)

    @property
    def masked(self) -> float:
        """The share of rows that nothing is trained on."""
        return sum(row.masked for row in self.seen) / len(self.seen)


def look(dataset: Any, collate: Any = None, seconds: float = 3.0, keep: int = 64) -> Rows | None:
    """Look at rows evenly spread over a data set, at all of them if `seconds` suffice.

    Rows that cannot be read are passed over, and `Rows.fault` says so; then `seen` may be empty.

    Args:
        dataset: with a length and rows by index; of another kind, None is the answer: looking would use its rows up.
        collate: what makes batches of rows; each row is collated alone. None, or one that cannot: the row itself.
        seconds: when to stop.
        keep: how many token ids of a row to remember.

    Returns:
        None for data that are not rows with token ids.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__") or _is_stream(dataset):
        return None
    seen: list[Row] = []
    unread: list[str] = []
    try:
        total = len(dataset)
    except Exception as error:
        return Rows((), 0, f"the training data do not say how many rows they have ({errors.one_line(error)})")
    deadline = math.inf
    with models.undisturbed_randomness():
        for index in _spread(total):
            try:
                row = _row(dataset[index], collate, keep)
            except Exception as error:  # any class of data set is allowed
                unread.append(f"row {index} with {errors.one_line(error)}")
            else:
                if row is None and index == 0:
                    return None
                seen += [] if row is None else [row]
            # The first row may take its time: some data sets are made when they are first asked.
            deadline = min(deadline, time.monotonic() + seconds)
            if time.monotonic() > deadline:
                break
    if not total:
        return None
    fault = f"{len(unread)} of {total} training rows could not be read, {unread[0]}" if unread else None
    return Rows(tuple(seen), total, fault)


def _is_stream(dataset: Any) -> bool:
    """May it be read once only? torch gives its streams a ``__getitem__``, and some say how long they are."""
    from torch.utils.data import IterableDataset

    return isinstance(dataset, IterableDataset)


def _spread(total: int) -> Iterator[int]:
    """Every index, the first 256 spread over all of them: whoever stops early has seen each part."""
    step = max(1, -(-total // 256))
    for start in range(step):
        yield from range(start, total, step)


def _row(raw: Any, collate: Any, keep: int) -> Row | None:
    """A row as the model sees it; None where it holds no token ids."""
    if collate is not None:
        try:
            batch = collate([dict(raw)])
            return _measured({name: _plain(batch[name][0]) for name in _KEYS if batch.get(name) is not None}, keep)
        except Exception:  # some collators need a whole batch, or rows of a kind that only they know
            pass
    if not hasattr(raw, "keys"):
        return None
    return _measured({name: _plain(raw[name]) for name in _KEYS if name in raw}, keep)


_KEYS = ("input_ids", "attention_mask", "labels", "position_ids")


def _plain(value: Any) -> list[Any] | None:
    """What there is for each token; None where there is one for the row, such as the label of its class."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(value) if isinstance(value, list | tuple) else None


def _measured(row: dict[str, Any], keep: int) -> Row | None:
    ids = row.get("input_ids")
    if not ids or not isinstance(ids[0], int):
        return None
    mask, labels, positions = row.get("attention_mask"), row.get("labels"), row.get("position_ids")
    real = ids
    if mask is not None and len(mask) == len(ids) and all(isinstance(one, int | bool) for one in mask):
        real = [token for token, keeps in zip(ids, mask, strict=True) if keeps]
    length, width = len(real), len(ids)
    if positions is not None and len(positions) == len(ids) and all(isinstance(one, int) for one in positions):
        length = min(length, max(positions) + 1)  # packed rows: positions start anew with each
        width = max(positions) + 1
    masked = labels is not None and all(label == IGNORED for label in labels)
    return Row(length, width, masked, tuple(real[:keep]))
