"""Take the `{% generation %}` tags out of a template: they mark what to train on, and few readers can parse them.

A tag also trims the white space around it. It goes only where the text that stays is trimmed to the same; otherwise all
of them become `{% if true %}`, which trims alike and every reader knows.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ptfix.chat_templates.texts import unix_lines

_OPEN = re.compile(r"\{#|\{%|\{\{")
_CLOSE_COMMENT = re.compile(r"([-+]?)#\}")
_CLOSE_RAW = re.compile(r"\{%[-+]?\s*endraw\s*([-+]?)%\}")
#: What can follow inside a tag: a string (which may hold anything), the end, a bracket, or any other character.
_STEP = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?P<end>[-+]?%\}|-?\}\})|[{(\[]|[})\]]|.""", re.DOTALL)
_NAME = re.compile(r"\{%([-+]?)\s*(\w+)")
_REPLACEMENTS = {"generation": "if true", "endgeneration": "endif"}


class Tag(NamedTuple):
    """`{{ }}`, `{% %}` or `{# #}` as it stands in the source; the signs say how it trims the text beside it."""

    source: str
    name: str  # of a `{% %}`, else empty
    before: str
    after: str

    @property
    def is_expression(self) -> bool:
        return self.source.startswith("{{")


def strip_generation_tags(template: str) -> str:
    """The template without `{% generation %}` and `{% endgeneration %}`, in every dash variant; it renders the same.

    A template without them, or that cannot be read, comes back as it is.
    """
    texts, tags = split(template)
    if not any(tag.name in _REPLACEMENTS for tag in tags):
        return template
    return _without(texts, tags) or "".join(
        text + (_renamed(tag) if tag else "") for text, tag in zip(texts, [*tags, None], strict=True)
    )


def _renamed(tag: Tag) -> str:
    return tag.source.replace(tag.name, _REPLACEMENTS[tag.name]) if tag.name in _REPLACEMENTS else tag.source


def _without(texts: list[str], tags: list[Tag]) -> str | None:
    """The source without the generation tags, or None where white space would come out otherwise."""
    source, previous, text = "", None, texts[0]
    for index, tag in enumerate(tags):
        following = texts[index + 1]
        if tag.name not in _REPLACEMENTS:
            source, previous, text = source + text + tag.source, tag, following
            continue
        next_tag = tags[index + 1] if index + 1 < len(tags) else None
        trimmed = trim(text, previous, tag) + trim(following, tag, next_tag)
        for joined in (_without_line(text, following), text + following, trimmed):
            if joined is not None and trim(joined, previous, next_tag) == trimmed:
                text = joined
                break
        else:
            return None
    return source + text


def _without_line(text: str, following: str) -> str | None:
    """Both texts without the line that a tag between them has for itself; None where it shares its line."""
    start, rest = text.rfind("\n") + 1, following.lstrip(" \t\r")
    if text[start:].strip() or not rest.startswith("\n"):
        return None
    return text[:start] + rest[1:]


def trim(text: str, previous: Tag | None, following: Tag | None) -> str:
    """What Jinja keeps of the text between two tags with trim_blocks and lstrip_blocks (None: start and end)."""
    text = unix_lines(text)
    if following is None:
        text = text.removesuffix("\n")
    line_starts = previous is None
    if previous is not None and previous.after == "-":
        kept = text.lstrip()
        line_starts, text = text[: len(text) - len(kept)].endswith("\n"), kept
    elif previous is not None and not previous.is_expression and not previous.after and text.startswith("\n"):
        line_starts, text = True, text[1:]
    if following is None:
        return text
    if following.before == "-":
        return text.rstrip()
    if following.before != "+" and not following.is_expression:
        start = text.rfind("\n") + 1
        if (start or line_starts) and not text[start:].strip():
            return text[:start]
    return text


def split(template: str) -> tuple[list[str], list[Tag]]:
    """The texts around the tags (one more than tags), and the tags. What is not closed counts as text."""
    texts, tags, position = [], [], 0
    while opening := _OPEN.search(template, position):
        end, after = _end(template, opening)
        if end is None:
            break
        source = template[opening.start() : end]
        named = _NAME.match(source)
        sign = source[2:3] if source[2:3] in ("-", "+") else ""
        texts.append(template[position : opening.start()])
        tags.append(Tag(source, named.group(2) if named else "", sign, after))
        position = end
    return [*texts, template[position:]], tags


def _end(template: str, opening: re.Match[str]) -> tuple[int | None, str]:
    """Where the tag that opens there ends, and the sign before its end."""
    if opening.group() == "{#":
        closing = _CLOSE_COMMENT.search(template, opening.end())
        return (closing.end(), closing.group(1)) if closing else (None, "")
    closer, depth, position = opening.group()[1].replace("{", "}") + "}", 0, opening.end()
    while step := _STEP.match(template, position):
        position, found = step.end(), step.group()
        if step.group("end") and found.endswith(closer) and not depth:
            named = _NAME.match(template, opening.start())
            if named and named.group(2) == "raw":
                closing = _CLOSE_RAW.search(template, position)
                return (closing.end(), closing.group(1)) if closing else (None, "")
            return position, found[0] if found[0] in "-+" else ""
        if step.group("end"):  # not this tag's: `}}` closes two brackets, `%}` one
            position = step.start() + 1
            found = found[0]
        if found in ("{", "(", "["):
            depth += 1
        elif found in ("}", ")", "]"):
            depth = max(depth - 1, 0)
    return None, ""
