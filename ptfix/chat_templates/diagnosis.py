"""Is a chat template right for inference? Judged by what it renders, never by the words in it.

Right is the prefix property: a conversation rendered with the generation prompt must be how the same conversation
renders with the answer, up to the answer. Then a model is asked in the very text it was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ptfix.chat_templates import headers, repair
from ptfix.chat_templates.agreement import disagreement
from ptfix.chat_templates.headers import QUESTION_TURNS, Undecided
from ptfix.chat_templates.probes import (
    ANSWERS,
    EARLIER_ANSWER,
    PLAUSIBLE_SPECIAL_TOKENS,
    QUESTIONS,
    THOUGHT,
    Observed,
    Turn,
    observe,
)
from ptfix.chat_templates.rendering import NotRenderedError, strip_generation_tags
from ptfix.chat_templates.texts import common_end, difference, hidden, names

__all__ = ["Diagnosis", "diagnose", "disagreement", "judge"]

#: A verdict stands on these; what is odd in the others is said in the reasons.
_PLAIN_TURNS = ("first", "other", "second")

Verdict = Literal["ok", "missing_generation_prompt", "unconditional_generation_prompt", "unrenderable", "unknown"]


@dataclass(frozen=True)
class Diagnosis:
    """What is known about a chat template."""

    verdict: Verdict
    #: What asks the model for an answer ("" where the template needs nothing for it); None where it is not known.
    generation_prompt: str | None = None
    #: The template to use for inference; None where there is nothing to repair, or it is not safe to.
    repaired: str | None = None
    #: Sentences: why this verdict, what was repaired or why not, what else is odd.
    reasons: list[str] = field(default_factory=list)
    #: False where nobody could look, so that another attempt may find more: see the reason.
    judged: bool = True


def diagnose(template: str, special_tokens: Mapping[str, str] | None = None) -> Diagnosis:
    """Whether a template asks for an answer in the text it trains on, and the repaired template where it does not.

    The template is rendered, in a child process with bounds on time and memory. Never raises for what a template does.
    Where it could not be rendered at all, the verdict is ``"unknown"`` and `judged` is False.

    Args:
        special_tokens: `bos_token`, `eos_token` and so on of the tokenizer; None: plausible ones.
    """
    try:
        return judge(template, special_tokens)
    except NotRenderedError as error:
        return not_judged(error)


def not_judged(error: NotRenderedError) -> Diagnosis:
    """The answer where there is none."""
    return Diagnosis("unknown", reasons=[str(error)], judged=False)


def judge(template: str, special_tokens: Mapping[str, str] | None = None) -> Diagnosis:
    """As `diagnose`, for callers that keep the answer.

    Raises:
        NotRenderedError: the template could not be rendered, so there is no answer to keep.
    """
    tokens = PLAUSIBLE_SPECIAL_TOKENS if special_tokens is None else special_tokens
    observed = observe(template, tokens)
    if not observed.turns:
        if observed.refusal is not None:
            return Diagnosis("unrenderable", reasons=[str(observed.refusal), *_hidden(template, observed)])
        return Diagnosis("unknown", reasons=["It does not write the words of a user and of an answer as they are."])
    found = _judge(observed, tokens)
    repaired, repairs = _repair(template, found, observed, tokens)
    tools = ["It renders only where tools are given."] if observed.needs_tools else []
    reasons = [*found.reasons, *repairs, *tools, *_gated(observed), *_hidden(template, observed)]
    return Diagnosis(found.verdict, found.generation_prompt, repaired, reasons)


@dataclass(frozen=True)
class _Finding:
    verdict: Verdict
    generation_prompt: str | None
    reasons: list[str]


def _judge(observed: Observed, special_tokens: Mapping[str, str]) -> _Finding:
    thought = observed.gap("thought", THOUGHT)
    standings = {name: _standing(observed.turns[name], thought) for name in QUESTION_TURNS if name in observed.turns}
    kinds = {kind for kind, _ in standings.values()}
    first = observed.turns["first"]
    note = standings["first"][1]
    if kinds <= {"ok", "missing"} and _unconditional(observed):
        return _Finding(
            "unconditional_generation_prompt",
            _generation_prompt_after_answer(observed, special_tokens),
            [
                "The generation prompt is written after every text, an answer included, whatever add_generation_prompt "
                "says. Callers may count on that, so it is left as it is."
            ],
        )
    if kinds == {"missing"} or (kinds == {"ok"} and _writes_too_little(observed)):
        try:
            header = headers.infer(observed)
        except Undecided as error:
            return _Finding("missing_generation_prompt", None, [note, f"Not repaired: {error}"])
        rest = (first.gap or "").removeprefix(header)
        thought_left = f"After it the training text has {rest!r}, which the model is to write itself."
        return _Finding("missing_generation_prompt", header, [note, *([thought_left] if rest.strip() else [])])
    different = [(name, note) for name, (kind, note) in standings.items() if kind == "different"]
    elsewhere = []
    if different:
        where = ", ".join(repr(name) for name, _ in different)
        elsewhere.append(f"In {where} (probe conversations) prompt and training text differ: {different[0][1]}")
    if any(standings[name][0] != "ok" for name in _PLAIN_TURNS if name in standings) or "missing" in kinds:
        missing = [
            f"In the probe conversation {name!r}: {text}"
            for name, (kind, text) in standings.items()
            if kind == "missing"
        ]
        return _Finding("unknown", None, [*elsewhere, *missing[:1]])
    return _Finding("ok", _generation_prompt(first, special_tokens), [*([note] if note else []), *elsewhere])


def _standing(turn: Turn, thought: str | None) -> tuple[Literal["ok", "missing", "different"], str]:
    """Whether the prefix property holds for a turn, and what is to be said of it ("" for nothing).

    Args:
        thought: what is written between the first question and a thought, where thoughts are written.
    """
    head, prompted = turn.head, turn.prompted
    tells = turn.gap is None or bool(turn.gap.strip())  # the training text has a header before an answer
    added = prompted[len(turn.asked) :] if prompted.startswith(turn.asked) else ""
    if head.startswith(prompted):
        rest = head[len(prompted) :]
        if not rest.strip():
            return "ok", f"The training text has the white space {rest!r} after the generation prompt." if rest else ""
        if prompted == turn.asked:
            return "missing", f"Asked for an answer it does not write {rest!r}, which stands before answers."
        return "ok", f"After the generation prompt the training text has {rest!r}, which the model is to write itself."
    if prompted.startswith(head) and prompted != turn.asked and (tells or not prompted[len(head) :].strip()):
        rest = prompted[len(head) :]
        if not rest.strip():
            return "ok", f"The generation prompt ends with the white space {rest!r}, which the training text has not."
        return "ok", f"The generation prompt goes on with {rest!r}, which the training text of an answer has not."
    if prompted.startswith(head) and not prompted[len(head) :].strip():
        return "ok", ""
    if added.strip() and thought is not None and thought.startswith(added):
        return (
            "ok",
            f"The generation prompt {added!r} begins a thought, as the training text of an answer with one does.",
        )
    return "different", "the training text has {!r} where the prompt has {!r}.".format(*difference(head, prompted))


def _writes_too_little(observed: Observed) -> bool:
    """Whether a prompt that is asked for is a part of the header only, such as a line break before it."""
    first = observed.turns["first"]
    added = first.prompted.removeprefix(first.asked)
    if first.gap is None or first.prompted == first.asked or not first.head.startswith(first.prompted):
        return False
    try:
        header = headers.infer(observed)
    except Undecided:
        return not added.strip() and bool(first.gap.strip())
    return header.startswith(added) and bool(header[len(added) :].strip())


def _unconditional(observed: Observed) -> bool:
    """Whether what a template writes after a question, to be answered, it writes after an answer too."""
    first = observed.turns["first"]
    after_answer, before_user = _after(first.answered[0], ANSWERS[0]), _before_user(observed)
    if first.prompted != first.asked or before_user is None or before_user.startswith(after_answer.rstrip()):
        return False  # what stays behind an answer when the conversation goes on is its end
    return bool(common_end(after_answer, _after(first.asked, QUESTIONS[0])).strip())


def _generation_prompt_after_answer(observed: Observed, special_tokens: Mapping[str, str]) -> str | None:
    """What stands behind an answer but for the end of the answer; None where the two cannot be told apart."""
    asked, before_user = observed.turns["first"].asked, _before_user(observed) or ""
    user = asked[: asked.index(QUESTIONS[0])].removeprefix(special_tokens.get("bos_token", ""))
    after_answer, end = _after(observed.turns["first"].answered[0], ANSWERS[0]), before_user.removesuffix(user)
    return after_answer.removeprefix(end) if user and end != before_user and after_answer.startswith(end) else None


def _before_user(observed: Observed) -> str | None:
    return observed.between("second asked", EARLIER_ANSWER, QUESTIONS[1])


def _after(text: str, part: str) -> str:
    return text[text.rindex(part) + len(part) :]


def _generation_prompt(turn: Turn, special_tokens: Mapping[str, str]) -> str | None:
    body = turn.asked
    if not turn.prompted.startswith(body):  # some end the text with an EOS where they write no generation prompt
        body = body.removesuffix(special_tokens.get("eos_token", ""))
    return turn.prompted.removeprefix(body) if turn.prompted.startswith(body) else None


def _repair(
    template: str, found: _Finding, observed: Observed, special_tokens: Mapping[str, str]
) -> tuple[str | None, list[str]]:
    stripped = strip_generation_tags(template)
    header, reasons = "", []
    text = stripped
    if found.verdict == "missing_generation_prompt":
        if found.generation_prompt is None:
            return None, []
        first, tool = observed.turns["first"], observed.turns.get("tool result")
        after_tools = tool is None or (tool.gap or "").startswith(found.generation_prompt)
        header = found.generation_prompt.removeprefix(first.prompted[len(first.asked) :])
        text = repair.append_generation_prompt(stripped, header, after_tools=after_tools)
        reasons.append(f"Repaired: it writes {header!r} where a generation prompt is asked for.")
        if not after_tools:
            reasons.append("After the result of a tool it writes none: the training text has none there.")
    elif found.verdict not in ("ok", "unconditional_generation_prompt"):
        return None, []
    if stripped != template:
        reasons.append("The {% generation %} tags are taken out of the repaired copy: not every reader can parse them.")
    if text == template:
        return None, []
    if (name := repair.changed(observed, text, special_tokens, header)) is not None:
        return None, [f"Not repaired: the repaired copy would render otherwise ({name})."]
    return text, reasons


def _gated(observed: Observed) -> list[str]:
    first, other = observed.turns["first"], observed.turns.get("other")
    if other is None or first.asked.replace(QUESTIONS[0], QUESTIONS[1]) == other.asked:
        return []
    mine, theirs = difference(first.asked, other.asked)
    return [f"What it writes depends on the words of the question: {mine!r} for one, {theirs!r} for another."]


def _hidden(template: str, observed: Observed) -> list[str]:
    rendered = "".join(text for text in observed.renders.values() if isinstance(text, str))
    found = hidden(template) | hidden(rendered)
    return [f"It has characters that a reader cannot see: {names(found)}."] if found else []
