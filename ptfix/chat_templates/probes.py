"""The conversations that a template is judged by, and what it makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptfix.chat_templates.rendering import EndlessError, Job, NotRenderedError, RenderError, render_all
from ptfix.chat_templates.texts import common_prefix

#: Plain sentences that no template has, so that each is found again in a render.
QUESTIONS = ("Where does the river begin?", "Which way does the wind blow?")
EARLIER_ANSWER = "By the old mill."
#: They differ from the first letter on: what their renders have in common ends where the answer begins.
ANSWERS = ("High up in the hills.", "Under a flat stone.")
THOUGHT = "Water runs downwards."
SYSTEM = "Answer like a sailor."
TOOL = "temperature"
TOOL_RESULT = "Twelve degrees."
MARK = "[generation begins]"
LATER = "2031-11-29T08:00:00"

#: What a tokenizer would have; for a template without one.
PLAUSIBLE_SPECIAL_TOKENS = {
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "sep_token": "<sep>",
    "cls_token": "<cls>",
    "mask_token": "<mask>",
}

_PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}
_TOOL = {
    "type": "function",
    "function": {"name": TOOL, "description": "How warm a place is.", "parameters": _PARAMETERS},
}
_CALL = {"type": "function", "id": "call12345", "function": {"name": TOOL, "arguments": {"place": "Rome"}}}

Message = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """One conversation that waits for an answer, in four renders."""

    name: str
    asked: str  # without the generation prompt
    prompted: str  # with it
    answered: tuple[str, str]  # with one answer and with another

    @property
    def head(self) -> str:
        """The training text up to the answer."""
        return common_prefix(self.answered)

    @property
    def gap(self) -> str | None:
        """What the training text has between what was asked and the answer; None where an answer changes the former."""
        return self.head[len(self.asked) :] if self.head.startswith(self.asked) else None


@dataclass(frozen=True)
class Observed:
    """What a template makes of the probe conversations; a conversation that it refuses or does not show is left out."""

    renders: Mapping[str, str | RenderError]
    turns: Mapping[str, Turn]
    #: It renders only where tools are given, so they are given in every conversation.
    needs_tools: bool = False

    @property
    def refusal(self) -> RenderError | None:
        """Why it does not render the plainest conversation, where it renders none."""
        plainest = (self.renders[f"first {kind}"] for kind in ("asked", "prompted", *_answered()))
        return next((text for text in plainest if isinstance(text, RenderError)), None) if not self.turns else None

    def between(self, render: str, left: str, right: str) -> str | None:
        """The text between two others in a render; None where it does not render or has not both, in this order."""
        text = self.renders.get(render)
        if not isinstance(text, str) or left not in text:
            return None
        after = text[text.index(left) + len(left) :]
        return after[: after.index(right)] if right in after else None

    def gap(self, render: str, until: str, asked: str = "first asked") -> str | None:
        """What a render writes after all of the render `asked`, up to the text `until`; None where it has not both."""
        text, start = self.renders.get(render), self.renders.get(asked)
        if not isinstance(text, str) or not isinstance(start, str) or not text.startswith(start):
            return None
        rest = text[len(start) :]
        return rest[: rest.index(until)] if until in rest else None


def observe(template: str, special_tokens: Mapping[str, str]) -> Observed:
    """Render every probe conversation, in one child process.

    Raises:
        NotRenderedError: one of them was not tried, so that nothing is known.
    """
    return observe_all([template], special_tokens)[0]


def observe_all(templates: Sequence[str], special_tokens: Mapping[str, str]) -> list[Observed]:
    """Render every probe conversation with every template, in one child process.

    Raises:
        NotRenderedError: one of them was not tried, so that nothing is known.
    """
    observed = _observe_all(templates, special_tokens, needs_tools=False)
    silent = [
        index
        for index, one in enumerate(observed)
        if not one.turns and one.refusal and not isinstance(one.refusal, EndlessError)
    ]
    again = _observe_all([templates[index] for index in silent], special_tokens, needs_tools=True)
    for index, one in zip(silent, again, strict=True):
        if one.turns:
            observed[index] = one
    return observed


def _observe_all(templates: Sequence[str], special_tokens: Mapping[str, str], needs_tools: bool) -> list[Observed]:
    jobs = [_jobs(template, needs_tools) for template in templates]
    rendered = render_all([job for some in jobs for job in some.values()], special_tokens)
    if (untried := next((one for one in rendered if isinstance(one, NotRenderedError)), None)) is not None:
        raise untried
    renders = iter(rendered)
    return [_observed({name: next(renders) for name in some}, needs_tools) for some in jobs]


def _observed(renders: dict[str, str | RenderError], needs_tools: bool) -> Observed:
    style = "" if _turn(renders, "first", "") else "parts "
    turns = {
        name: turn for name, *_ in _conversations() if (turn := _turn(renders, name, style if name != "parts" else ""))
    }
    if "parts" in turns and any(mark in text for text in turns["parts"].answered for mark in ("'type'", '"type"')):
        del turns["parts"]  # it writes the list, not the text in it
    if style:  # under the plain names, so that nobody else needs to know
        renders = {**renders, **{name.removeprefix(style): text for name, text in renders.items() if style in name}}
    return Observed(renders, turns if "first" in turns else {}, needs_tools)


def _turn(renders: Mapping[str, str | RenderError], name: str, style: str) -> Turn | None:
    texts = [renders.get(f"{style}{name} {kind}") for kind in ("asked", "prompted", *_answered())]
    asked, prompted, one, other = texts
    if not (isinstance(asked, str) and isinstance(prompted, str) and isinstance(one, str) and isinstance(other, str)):
        return None
    turn = Turn(name, asked, prompted, (one, other))
    shown = all(text[len(turn.head) :].startswith(answer) for text, answer in zip(turn.answered, ANSWERS, strict=True))
    return turn if shown and _waits_on(name) in asked else None


def _answered() -> tuple[str, str]:
    return "answered", "answered otherwise"


def _waits_on(name: str) -> str:
    return {"other": QUESTIONS[1], "second": QUESTIONS[1], "tool result": TOOL_RESULT}.get(name, QUESTIONS[0])


def _conversations() -> Iterator[tuple[str, list[Message], list[Message] | None]]:
    """Name, messages up to where an answer is due, tools. "first" is the one every template must render."""
    first, other = (_says("user", question) for question in QUESTIONS)
    system, earlier = _says("system", SYSTEM), _says("assistant", EARLIER_ANSWER)
    result: Message = {"role": "tool", "content": TOOL_RESULT, "name": TOOL, "tool_call_id": _CALL["id"]}
    yield "first", [first], None
    yield "other", [other], None
    yield "second", [first, earlier, other], None
    yield "system", [system, first], None
    yield "system second", [system, first, earlier, first], None
    yield "parts", [_in_parts(first)], None
    yield "tools", [first], [_TOOL]
    yield "tool result", [first, _calls(), result], [_TOOL]


def _jobs(template: str, needs_tools: bool) -> dict[str, Job]:
    jobs = {}
    for style in ("", "parts "):

        def shaped(messages: Sequence[Message], style: str = style) -> list[Message]:
            return [_in_parts(message) for message in messages] if style else list(messages)

        for name, messages, tools in _conversations():
            jobs[f"{style}{name} asked"] = Job(template, shaped(messages), tools=tools)
            jobs[f"{style}{name} prompted"] = Job(template, shaped(messages), True, tools)
            for kind, text in zip(_answered(), ANSWERS, strict=True):
                answered = [*messages, _says("assistant", text)]
                if name == "parts":
                    answered = [_in_parts(message) for message in answered]
                jobs[f"{style}{name} {kind}"] = Job(template, shaped(answered), tools=tools)
        first, answer, thought = _says("user", QUESTIONS[0]), _says("assistant", ANSWERS[0]), _thought()
        for name, job in {
            "user again": Job(template, [first, _says("user", ANSWERS[0])]),
            "thought": Job(template, [first, {**answer, **thought}]),
            "call": Job(template, [first, _calls()], tools=[_TOOL]),
            "bare call": Job(template, [first, _calls_barely()], tools=[_TOOL]),
            "thoughtful call": Job(template, [first, {**_calls(), **thought}], tools=[_TOOL]),
            "marked": Job(template, [first, answer], extra={"mark_generation": MARK}),
            "later asked": Job(template, [first], now=LATER),
            "later answered": Job(template, [first, answer], now=LATER),
        }.items():
            jobs[f"{style}{name}"] = job._replace(messages=shaped(job.messages))
    if needs_tools:
        jobs = {name: job._replace(tools=[_TOOL]) for name, job in jobs.items()}
    return jobs


def _calls() -> Message:
    return {"role": "assistant", "content": "", "tool_calls": [_CALL]}


def _calls_barely() -> Message:
    """The same call as other templates want it: no content, and the arguments as text."""
    function = {"name": TOOL, "arguments": '{"place": "Rome"}'}
    return {"role": "assistant", "content": None, "tool_calls": [{**_CALL, "function": function}]}


def _thought() -> Message:
    """A thought under every name that templates read; transformers gives them all, too."""
    return {"reasoning_content": THOUGHT, "thinking": THOUGHT, "reasoning": THOUGHT}


def _says(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def _in_parts(message: Message) -> Message:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
