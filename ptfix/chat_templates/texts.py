"""Compare rendered texts, and speak of what is in them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

#: What must not be cut in two: `<|im_start|>`, `[INST]`, a word; and any other single character.
_UNIT = re.compile(r"<[^<>\s]{1,80}>|\[[^\[\]\s]{1,40}\]|\w+|.", re.DOTALL)


def unix_lines(text: str) -> str:
    """The text with ``\\n`` at the end of its lines, as every reader that opens a file as text has it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def units(text: str) -> list[str]:
    """The text in pieces that stay whole in any comparison: tags, words, and single characters."""
    return _UNIT.findall(text)


def common_prefix(texts: Sequence[str]) -> str:
    """What all the texts begin with."""
    one, other = min(texts), max(texts)  # in the order of the alphabet these two have the least in common
    end = next((index for index, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), len(one))
    return one[:end]


def common_end(one: str, other: str) -> str:
    """The whole units with which both texts end."""
    shared = 0
    for left, right in zip(reversed(units(one)), reversed(units(other)), strict=False):
        if left != right:
            break
        shared += len(left)
    return one[len(one) - shared :]


def difference(one: str, other: str) -> tuple[str, str]:
    """Both texts from shortly before where they part to shortly after."""
    at = len(common_prefix([one, other]))
    return one[max(0, at - 20) : at + 40], other[max(0, at - 20) : at + 40]


def hidden(text: Iterable[str]) -> set[str]:
    """The characters that a reader cannot see and a model can: bidi overrides, zero widths, controls, private ones."""
    return {
        letter for letter in set(text) if letter not in "\t\n\r" and unicodedata.category(letter) in ("Cf", "Cc", "Co")
    }


def names(letters: Iterable[str]) -> str:
    """How to speak of characters that cannot be seen."""
    return ", ".join(f"U+{ord(letter):04X} {unicodedata.name(letter, '(no name)')}" for letter in sorted(set(letters)))
