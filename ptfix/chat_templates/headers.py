"""Which generation prompt a template without one should have: found in what it writes before an answer.

The training text alone has it, and for most templates exactly it, between what was asked and the answer. The exception
are thinking models: there a block for the thought, often empty, stands between the prompt and the answer.
"""

from __future__ import annotations

import os.path
import unicodedata
from collections.abc import Iterable

from ptfix.chat_templates.probes import ANSWERS, EARLIER_ANSWER, MARK, QUESTIONS, THOUGHT, Observed

#: Turns where a user waits for an answer; after the result of a tool a template may go on without a header.
QUESTION_TURNS = ("first", "other", "second", "system", "system second", "parts", "tools")


class Undecided(Exception):
    """The generation prompt cannot be told; `str()` is one sentence that says why."""


def infer(observed: Observed) -> str:
    """The generation prompt of a template that writes none.

    Raises:
        Undecided: what stands before an answer is not surely the prompt, all of it and nothing else.
    """
    gap = _gap(observed)
    if (marked := observed.gap("marked", MARK)) and marked.strip() and gap.startswith(marked):
        return _plain(marked)  # its {% generation %} tag says where the model begins to write
    thoughtful = observed.gap("thought", THOUGHT)
    earlier = observed.gap("second asked", EARLIER_ANSWER)
    common = os.path.commonprefix([text for text in (gap, thoughtful, earlier) if text is not None])
    if common in (gap, earlier) and (thoughtful is None or common != thoughtful):
        return _plain(common)
    twin = _twin(observed, gap)
    if twin is None or not common.startswith(twin):
        raise Undecided(
            f"Before an answer it writes {gap!r}, but {_other(gap, thoughtful, earlier)!r} where there is a thought or "
            "a later turn; where the generation prompt ends in there cannot be told."
        )
    return _plain(twin)


def _gap(observed: Observed) -> str:
    """What stands between a question and its answer, the same in every conversation."""
    gaps = {name: observed.turns[name].gap for name in QUESTION_TURNS if name in observed.turns}
    gap = gaps["first"]
    assert gap is not None, "an answer changes the text before it"
    for name, other in gaps.items():
        if other != gap:
            raise Undecided(f"Before an answer it writes {gap!r}, but {other!r} in the probe conversation {name!r}.")
    later = observed.gap("later", ANSWERS[0])
    if later != gap:
        raise Undecided(f"What it writes before an answer, {gap!r}, depends on the date.")
    again = observed.gap("user again", ANSWERS[0])
    if again is not None and again.startswith(gap):
        raise Undecided(f"It writes {gap!r} before the words of a user too, so that is no header of an answer.")
    return gap


def _twin(observed: Observed, gap: str) -> str | None:
    """The part of `gap` that is made like the header of a user, around another word for the role."""
    user = observed.between("second asked", EARLIER_ANSWER, QUESTIONS[1])
    if user is None:
        return None
    opening = next((gap[:length] for length in range(len(gap), 0, -1) if gap[:length] in user), "")
    role_and_closing = user[user.rindex(opening) + len(opening) :] if opening else ""
    for start in range(1, len(role_and_closing)):  # the role has at least one letter
        closing = role_and_closing[start:]
        end = gap.find(closing, len(opening) + 1)
        if end != -1:
            return gap[: end + len(closing)]
    return None


def _other(gap: str, *others: str | None) -> str:
    return next((other for other in others if other is not None and other != gap), gap)


def _plain(header: str) -> str:
    hidden = sorted({name_of(letter) for letter in invisible(header)})
    if hidden:
        raise Undecided(f"What it writes before an answer has invisible characters: {', '.join(hidden)}.")
    return header


def invisible(text: Iterable[str]) -> set[str]:
    """The characters in `text` that a reader cannot see: formats such as bidi overrides, and controls."""
    return {letter for letter in set(text) if unicodedata.category(letter) in ("Cf", "Cc", "Co") and letter not in "\t\n\r"}


def name_of(letter: str) -> str:
    """How to speak of a character that cannot be seen."""
    return f"U+{ord(letter):04X} {unicodedata.name(letter, 'without a name')}"
