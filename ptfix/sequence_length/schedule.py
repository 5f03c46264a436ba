"""How long a row may be at an optimizer step. Pure: the step alone says it, so a resumed run needs no state.

The three shapes are those that the field knows as fixed_linear, fixed_root and fixed_discrete.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

#: Lengths are multiples of this, so that tensor cores stay in use.
MULTIPLE = 8


class Schedule(Protocol):
    """Anything that knows a length for each optimizer step."""

    def length(self, step: int) -> int:
        """The longest row allowed at optimizer step `step`, counted from 0."""


@dataclass(frozen=True)
class Growth:
    """From `start` to `end` in `steps` optimizer steps, as the `degree`-th root of the progress; then `end`."""

    start: int
    end: int
    steps: int
    degree: float = 1.0
    multiple: int = MULTIPLE

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"the warmup takes {self.steps} steps; it must take at least 1.")
        if self.multiple < 1:
            raise ValueError(f"lengths are to be multiples of {self.multiple}; that must be at least 1.")
        least = max(2, self.multiple)  # a single token predicts nothing
        if not least <= self.start <= self.end:
            raise ValueError(
                f"the length is to grow from {self.start} to {self.end}; "
                f"start must be at least {least} (2, and the multiple), and end no less than start."
            )
        if not self.degree >= 1:
            raise ValueError(f"the root's degree is {self.degree}; it must be at least 1 (1 is linear).")

    def length(self, step: int) -> int:
        """The longest row allowed at optimizer step `step`, counted from 0."""
        if step >= self.steps:
            return self.end
        grown = self.start + (self.end - self.start) * math.pow(step / self.steps, 1 / self.degree)
        return math.floor(grown) // self.multiple * self.multiple


@dataclass(frozen=True)
class Stairs:
    """A length from each of some steps on: ``((0, 512), (200, 1024))``."""

    stairs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        starts = [step for step, _ in self.stairs]
        if not starts or starts[0] != 0 or any(late <= early for early, late in itertools.pairwise(starts)):
            raise ValueError(
                f"the stairs begin at the steps {starts}; the first must be 0 and each later than the last."
            )
        if min(length for _, length in self.stairs) < 2:
            raise ValueError(f"the stairs {list(self.stairs)} hold a length below 2; a single token predicts nothing.")

    def length(self, step: int) -> int:
        """The longest row allowed at optimizer step `step`, counted from 0."""
        return [length for start, length in self.stairs if start <= max(step, 0)][-1]


def linear(start: int, end: int, steps: int, multiple: int = MULTIPLE) -> Growth:
    """Grow evenly from `start` to `end` tokens within `steps` optimizer steps, by multiples of `multiple`.

    Raises:
        ValueError: what cannot be a schedule, with what to change.
    """
    return Growth(start, end, steps, 1.0, multiple)


def root(start: int, end: int, steps: int, degree: float = 2.0, multiple: int = MULTIPLE) -> Growth:
    """Grow fast at first, slowly later: as the `degree`-th root of the progress.

    Raises:
        ValueError: what cannot be a schedule, with what to change.
    """
    return Growth(start, end, steps, degree, multiple)


def steps(stairs: Sequence[tuple[int, int]]) -> Stairs:
    """Jump: ``steps([(0, 512), (200, 1024), (400, 2048)])`` allows 1024 tokens from optimizer step 200 on.

    Raises:
        ValueError: what cannot be a schedule, with what to change.
    """
    return Stairs(tuple((int(step), int(length)) for step, length in stairs))
