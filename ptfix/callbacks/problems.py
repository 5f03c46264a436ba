"""What a callback does with a problem: a warning, once in a run, or an error where it was asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeAlias

from ptfix import errors

logger = logging.getLogger("ptfix")

OnProblem: TypeAlias = Literal["warn", "raise"]


class Problems:
    """Told through ``logging.getLogger("ptfix")``, or raised as `error`.

    Args:
        warn: says a sentence once. None: `begin` says when it may be said again.

    Raises:
        ValueError: `on_problem` is neither ``"warn"`` nor ``"raise"``.
    """

    def __init__(
        self, on_problem: OnProblem, error: type[RuntimeError], warn: Callable[[str], None] | None = None
    ) -> None:
        if on_problem not in ("warn", "raise"):
            raise ValueError(f"on_problem is {on_problem!r}; it must be 'warn' or 'raise'.")
        self.error = error
        self.raises = on_problem == "raise"
        self._told: set[str] = set()
        self._warn = warn or self._warn_once

    def begin(self) -> None:
        """A new run: what was told may be told again."""
        self._told.clear()

    @contextmanager
    def guarded(self, fault: str) -> Iterator[None]:
        """An error inside is a problem, too, and ends no run: `fault` says in a few words what did not happen."""
        try:
            yield
        except self.error:
            raise
        except Exception as error:
            self.tell(f"{fault}: {errors.one_line(error)}")

    def tell(self, *sentences: str) -> None:
        """All of them, each in a warning of its own, or in one error."""
        if self.raises and sentences:
            raise self.error("; ".join(sentences))
        for sentence in sentences:
            self._warn(sentence)

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            logger.warning("%s", sentence)
