"""Change one member of a JSON object in its text: order, indent, escapes and line ends of all else stay as they are."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


class _Member(NamedTuple):
    name: str
    start: int  #: of the name's quote
    colon: str  #: what stands between name and value
    value: int
    end: int


def with_member(text: str, name: str, value: Any) -> str:
    """`text` with this member; a new one stands where sorted names put it, else last, in the style of the others.

    Raises:
        ValueError: `text` is not a JSON object.
    """
    opening, members, closing = _scan(text)
    same = [member for member in members if member.name == name]
    if len(same) > 1:  # Python reads the last one, others refuse the file: keep one
        return with_member(_without(text, members, members.index(same[0])), name, value)
    if same:
        member = same[0]
        if _is(json.loads(text[member.value : member.end]), value):
            return text
        return text[: member.value] + _written(text, opening, members, value) + text[member.end :]
    if not members:
        return text[:opening] + json.dumps({name: value}, indent=2, ensure_ascii=False)[1:] + text[closing + 1 :]
    names = [member.name for member in members]
    at = bisect.bisect(names, name) if names == sorted(names) else len(names)
    item = f"{json.dumps(name)}{members[0].colon}{_written(text, opening, members, value)}"
    between = _between(text, opening, members)
    if at == len(members):
        return text[: members[-1].end] + between + item + text[members[-1].end :]
    return text[: members[at].start] + item + between + text[members[at].start :]


def without_member(text: str, name: str) -> str:
    """`text` without this member, unchanged where there is none.

    Raises:
        ValueError: `text` is not a JSON object.
    """
    _, members, _ = _scan(text)
    for index, member in enumerate(members):
        if member.name == name:
            return without_member(_without(text, members, index), name)
    return text


def _scan(text: str) -> tuple[int, list[_Member], int]:
    """Where the object opens, its members, where it closes."""
    try:
        if not isinstance(json.loads(text), dict):
            raise ValueError("not a JSON object")
        opening = text.index("{") + 1
        members = list(_members(text, opening))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return opening, members, _skip(text, members[-1].end if members else opening)


def _members(text: str, position: int) -> Iterator[_Member]:
    position = _skip(text, position)
    while text[position] != "}":
        name, end = _DECODER.raw_decode(text, position)
        value = _skip(text, _skip(text, end) + 1)
        _, stop = _DECODER.raw_decode(text, value)
        yield _Member(name, position, text[end:value], value, stop)
        position = _skip(text, stop)
        if text[position] == ",":
            position = _skip(text, position + 1)


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _without(text: str, members: list[_Member], index: int) -> str:
    if index:
        return text[: members[index - 1].end] + text[members[index].end :]
    stop = members[1].start if len(members) > 1 else text.index("}", members[0].end)
    start = members[0].start if len(members) > 1 else text.index("{") + 1
    return text[:start] + text[stop:]


def _between(text: str, opening: int, members: list[_Member]) -> str:
    """The comma and the space between two members."""
    if len(members) > 1:
        return text[members[0].end : members[1].start]
    return "," + (text[opening : members[0].start] or members[0].colon.partition(":")[2])


def _written(text: str, opening: int, members: list[_Member], value: Any) -> str:
    """`value` as this file would write it."""
    lead = text[opening : members[0].start]
    line, _, indent = lead.rpartition("\n")
    escapes = text.isascii() and bool(re.search(r"\\u(?!00[0-7])[0-9a-fA-F]{4}", text))
    item = "," if lead.strip(" ") or not _between(text, opening, members).endswith(" ") else ", "
    style: dict[str, Any] = {"separators": (item, members[0].colon)}
    if "\n" in lead:
        style["indent"] = indent or 0
    written = json.dumps(value, ensure_ascii=escapes, **style)
    # dumps() starts at the left margin and knows only \n; inside a string a newline is escaped, so all here are layout.
    return written.replace("\n", ("\r\n" if line.endswith("\r") else "\n") + indent)


def _is(one: Any, other: Any) -> bool:
    """Equality that tells true from 1, also inside."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
