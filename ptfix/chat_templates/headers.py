"""Which generation prompt a template without one should have: found in what it writes before an answer.

The prompt must begin every turn of the assistant that the template can write: an answer, a later one, one with a
thought, the call of a tool. What they all begin with is the prompt, unless it holds the first tag of a thought too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ptfix.chat_templates.probes import ANSWERS, EARLIER_ANSWER, MARK, QUESTIONS, THOUGHT, TOOL, Observed
from ptfix.chat_templates.texts import common_prefix, hidden, names, units

#: Turns where a user waits for an answer; after the result of a tool a template may go on without a header.
QUESTION_TURNS = ("first", "other", "second", "system", "system second", "parts", "tools")

#: Such as `<think></think>` at the end: a thought left out, which a model is to write, or to fill, itself.
_EMPTY_ELEMENT = re.compile(r"<([^<>/\s]+)>\s*</\1>\s*\Z")


class Undecided(Exception):
    """The generation prompt cannot be told; `str()` is one sentence that says why."""


def infer(observed: Observed) -> str:
    """The generation prompt of a template that writes none.

    Raises:
        Undecided: what stands before an answer is not surely the prompt, all of it and nothing else.
    """
    before_answer = observed.turns["first"].gap
    assert before_answer is not None, "infer() is for templates that keep what was asked as it is"
    if observed.gap("later answered", ANSWERS[0], "later asked") != before_answer:
        raise Undecided(f"What it writes before an answer, {before_answer!r}, depends on the date.")
    header = _header(before_answer, observed)
    if not header.strip():
        raise Undecided(f"What it writes before an answer, {before_answer!r}, is no header: it differs between turns.")
    again = observed.gap("user again", ANSWERS[0])
    if again == before_answer or (again is not None and header != before_answer and again.startswith(header)):
        raise Undecided(f"It writes {header!r} before the words of a user too, so that is no header of an answer.")
    turns = [turn for name, turn in observed.turns.items() if name in QUESTION_TURNS]
    if (strange := next((turn.name for turn in turns if not (turn.gap or "").startswith(header)), None)) is not None:
        raise Undecided(f"It writes {header!r} before an answer, but not in the probe conversation {strange!r}.")
    if hidden(header):
        raise Undecided(f"What it writes before an answer has characters that cannot be seen: {names(hidden(header))}.")
    # A tokenizer joins a space with the word that follows, so a prompt that ends in one is not how a model was trained.
    return header.rstrip(" ")


def _header(before_answer: str, observed: Observed) -> str:
    if (marked := observed.gap("marked", MARK)) and marked.strip() and before_answer.startswith(marked):
        # Its {% generation %} tag says where the model begins to write; a line break there belongs to the header.
        return marked if before_answer[len(marked) :].strip() else before_answer
    # How far these go is known, for their answer follows; the others go on with a name or a thought.
    answers = {
        **{f"the answer in {name!r}": observed.turns[name].gap for name in QUESTION_TURNS if name in observed.turns},
        "an earlier answer": observed.gap("second asked", EARLIER_ANSWER),
    }
    thoughts = {
        "an answer with a thought": observed.gap("thought", THOUGHT),
        "the call of a tool after a thought": observed.gap("thoughtful call", THOUGHT, "tools asked"),
    }
    calls = {
        "the call of a tool": observed.gap("call", TOOL, "tools asked"),
        "the call of a tool without content": observed.gap("bare call", TOOL, "tools asked"),
    }
    turns = {name: text for name, text in {**answers, **thoughts, **calls}.items() if text is not None}
    common = _common(list(turns.values()), complete=answers.values())
    if all(text is None or text.rstrip() != common.rstrip() for text in thoughts.values()):
        return _EMPTY_ELEMENT.sub("", common)
    # The first tag of a thought stands there in every case: the header ends where that of a user would end.
    twin = _twin(observed, before_answer)
    if twin is None or not common.startswith(twin):
        name, text = next(((name, text) for name, text in turns.items() if text != before_answer), ("", ""))
        raise Undecided(
            f"It writes {before_answer!r} before an answer and {text!r} before {name}; where in there the prompt ends "
            "and the thought begins cannot be told."
        )
    return twin


def _common(texts: Sequence[str], complete: Iterable[str | None]) -> str:
    """What all texts begin with, cut where a header can end; `complete` are those after which an answer follows."""
    whole = common_prefix(texts)
    if whole in complete:
        return whole
    header: list[str] = []
    # A call goes on with the name of the tool: a letter, which a header can no more run into than a tag.
    for one, *others in zip(*(units(text + "x") for text in texts), strict=False):
        if any(other != one for other in others):
            break
        header.append(one)
    nexts = {text[len("".join(header)) :][:1] or "x" for text in texts}
    while header and not _can_end(header[-1], nexts):
        nexts = {header.pop()[0]}
    return "".join(header)


def _can_end(unit: str, nexts: set[str]) -> bool:
    """Whether a header can end with `unit` where the texts go on with `nexts`."""
    if re.fullmatch(r"\w+", unit):
        return all(letter.isspace() or letter in "<[" for letter in nexts)
    return unit.isspace() or unit[-1] in ">]:"


def _twin(observed: Observed, before_answer: str) -> str | None:
    """The part of `before_answer` that is made like the header of a user, around another word for the role."""
    user = observed.between("second asked", EARLIER_ANSWER, QUESTIONS[1])
    if user is None:
        return None
    lengths = range(len(before_answer), 0, -1)
    opening = next((before_answer[:length] for length in lengths if before_answer[:length] in user), "")
    role_and_closing = user[user.rindex(opening) + len(opening) :] if opening else ""
    for start in range(1, len(role_and_closing)):  # the role has at least one letter
        closing = role_and_closing[start:]
        end = before_answer.find(closing, len(opening) + 1)
        if end != -1:
            return before_answer[: end + len(closing)]
    return None
