"""What a callback does with a problem: a warning, once in a run, or an error where the user asked for it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias, TypeVar

from ptfix import errors

logger = logging.getLogger("ptfix")

OnProblem: TypeAlias = Literal["warn", "raise"]

Callback = TypeVar("Callback", bound=type)


class Problems:
    """Says problems through ``logging.getLogger("ptfix")``, or raises them as `error`.

    Args:
        warn: says a sentence once. None: `begin` says when it may be said again.

    Raises:
        ValueError: `on_problem` is neither ``"warn"`` nor ``"raise"``.
    """

    def __init__(
        self,
        on_problem: OnProblem = "warn",
        error: type[RuntimeError] | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        if on_problem not in ("warn", "raise"):
            raise ValueError(f"on_problem is {on_problem!r}; it must be 'warn' or 'raise'.")
        self.error = error
        self.raises = on_problem == "raise"
        self._told: set[str] = set()
        self._warn = warn

    def begin(self) -> None:
        """A new run: what was said may be said again."""
        self._told.clear()

    def tell(self, *sentences: str) -> None:
        """All of them, each in a warning of its own, or in one error."""
        if self.raises and self.error is not None and sentences:
            raise self.error("; ".join(sentences))
        for sentence in sentences:
            self.say(sentence)

    @contextmanager
    def guarded(self, fault: str) -> Iterator[None]:
        """An exception inside is a problem and no more: the run goes on, and `fault` says what did not happen.

        What the callback itself has to say (`error`), KeyboardInterrupt and SystemExit pass.
        """
        try:
            yield
        except Exception as error:
            if self.error is not None and isinstance(error, self.error):
                raise
            sentence = f"{fault}: {errors.one_line(error)}"
            if self.raises and self.error is not None:
                raise self.error(sentence) from error
            logger.debug(sentence, exc_info=True)
            # Once for each kind: the numbers in the message of an out-of-memory error are others each time.
            self.say(sentence, f"{fault}: {type(error).__name__}")

    def say(self, sentence: str, kind: str = "") -> None:
        """A warning where nothing is wrong with the run, also where problems are raised; once for each `kind`."""
        if self._warn is not None:
            self._warn(sentence)
        elif (kind or sentence) not in self._told:
            self._told.add(kind or sentence)
            logger.warning(sentence)


def never_ends_a_run(fault: str) -> Callable[[Callback], Callback]:
    """For the class of a callback with `_problems`: an exception in one of its own ``on_...`` is a problem and no more.

    Args:
        fault: says in a few words what does not happen then.
    """

    def guard(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            with self._problems.guarded(fault):
                return hook(self, *args, **kwargs)

        return guarded

    def decorate(callback: Callback) -> Callback:
        for name, hook in list(vars(callback).items()):
            if name.startswith("on_"):
                setattr(callback, name, guard(hook))
        return callback

    return decorate
