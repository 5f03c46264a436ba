"""Do two templates write the same conversation? Asked of a base model's template and the one that was trained with."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ptfix.chat_templates.probes import ANSWERS, EARLIER_ANSWER, QUESTIONS, THOUGHT, TOOL_RESULT, Observed, observe_all
from ptfix.chat_templates.texts import common_end, difference, units

_WORDS = re.compile("|".join(re.escape(words) for words in (*QUESTIONS, EARLIER_ANSWER, ANSWERS[0], TOOL_RESULT)))


def disagreement(inference: str, training: str, special_tokens: Mapping[str, str]) -> str | None:
    """Where the text that `training` trains on differs from what `inference` makes of the same conversation.

    Compared are probe conversations that end with an answer. A thought block without a thought in one of them alone is
    no difference: thinking models drop thoughts from a history, or write empty ones. Nor is white space at the end, or
    a generation prompt that `inference` writes there unconditionally.

    Returns:
        One sentence with the first difference, or None where `inference` asks in the text that `training` trained on.

    Raises:
        NotRenderedError: they could not be compared.
    """
    taught, asked = observe_all([training, inference], special_tokens)
    for template, observed in (("training", taught), ("inference", asked)):
        if not observed.turns:
            return f"The {template} template cannot be compared. {observed.refusal or 'It hides the conversation.'}"
    knows_tools = taught.renders["tools asked"] != taught.renders["first asked"]
    for name, turn in taught.turns.items():
        if name.startswith("tool") and not knows_tools:
            continue  # nothing was trained on there that could be contradicted
        other = asked.turns.get(name)
        if other is None:
            answer = asked.renders[f"{name} answered"]
            why = f" {answer}" if isinstance(answer, Exception) else ""
            return f"Only the training template writes the probe conversation {name!r}.{why}"
        if not _same(turn.answered[0], other.answered[0], other.asked, (taught, asked)):
            mine, theirs = difference(turn.answered[0], other.answered[0])
            return (
                f"In the probe conversation {name!r} training has {mine!r} where the inference template has {theirs!r}."
            )
    return None


def _same(trained: str, text: str, asked: str, templates: tuple[Observed, Observed]) -> bool:
    if _WORDS.findall(trained) != _WORDS.findall(text):
        return False
    *befores, (mine, theirs) = zip(_WORDS.split(trained), _WORDS.split(text), strict=True)
    for words, (one, other) in zip(_WORDS.findall(trained), befores, strict=True):
        by_assistant = words in (EARLIER_ANSWER, ANSWERS[0], TOOL_RESULT)  # before a result stands the call
        if one != other and not (by_assistant and _same_but_for_thought(one, other, templates)):
            return False
    follows = templates[1].between("second asked", EARLIER_ANSWER, QUESTIONS[1]) or ""
    stops = all(follows.startswith(end.rstrip()) for end in (mine, theirs))  # GLM stops at the header of the user
    return (
        mine.rstrip() == theirs.rstrip() or stops or (theirs.startswith(mine) and asked.endswith(theirs[len(mine) :]))
    )


def _same_but_for_thought(mine: str, theirs: str, templates: tuple[Observed, Observed]) -> bool:
    """Whether two texts before an answer differ in a thought block without a thought alone."""
    header = ""
    for one, other in zip(units(mine), units(theirs), strict=False):
        if one != other:
            break
        header += one
    rests = [text[len(header) :] for text in (mine, theirs)]
    end = common_end(*rests)
    blocks = {"".join(rest.removesuffix(end).split()) for rest in rests}
    for observed in templates:
        opening = observed.between("thought", QUESTIONS[0], THOUGHT)
        closing = observed.between("thought", THOUGHT, ANSWERS[0])
        if header.strip() and opening is not None and closing is not None and opening.startswith(header):
            begins, ends = "".join(opening[len(header) :].split()), "".join(closing.split())
            if begins + ends and blocks <= {"", ends, begins + ends}:
                return True
    return False
