"""Write measured cells into compat_matrix.yaml, whole and one at a time, in the order of their versions.

`python -m tests.matrix.record` writes the README's table anew from it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import yaml
from packaging.version import Version

MATRIX = Path(__file__).parents[2] / "compat_matrix.yaml"
README = MATRIX.with_name("README.md")
MARKS = ("<!-- matrix -->\n", "<!-- /matrix -->\n")
HEAD = """\
# Evidence: exact pins and what a run measured there (`nox -s matrix`). Written by tests/matrix/run.py, never by hand;
# windows live beside each fix, in code. In a cell, `stock` and `ptfix` hold for each method and architecture one
# letter per entry of `modes`:   =  equal to the training forward    x  wrong, silently    !  raises    h  the bare
# base model cannot do it either    .  not there
"""


def write(cell: dict[str, Any], path: Path = MATRIX) -> None:
    """Put `cell` in the place of the one with the same id; several runs may do so at once."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cells = {entry["id"]: entry for entry in read(path)}
        cells[cell["id"]] = {**cells.get(cell["id"], {}), **cell}
        cell = cells[cell["id"]]
        if cell.get("imports"):
            cell.pop("reason", None)
        cell.pop("pending", None)
        ordered = sorted(cells.values(), key=lambda c: (Version(c["pins"]["transformers"]), Version(c["pins"]["peft"])))
        text = HEAD + yaml.safe_dump({"cells": ordered}, sort_keys=False, width=140, allow_unicode=True)
        fresh = path.with_suffix(".tmp")
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)


def read(path: Path = MATRIX) -> list[dict[str, Any]]:
    """The cells as they stand."""
    if not path.exists():
        return []
    document = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    return list(document.get("cells") or [])


def table(cells: list[dict[str, Any]]) -> str:
    """What was measured, as the README shows it: one line a pair."""
    lines = [
        "| transformers | peft | stock: exact | silently wrong | raises | ptfix: exact | silently wrong | raises |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        names = f"| {cell['pins']['transformers']} | {cell['pins']['peft']} "
        if "imports" not in cell:
            lines.append(names + "| not measured yet | | | | | |")
        elif not cell["imports"]:
            lines.append(names + "| cannot be imported | | | | | |")
        else:
            words = [(who, word) for who in ("stock", "ptfix") for word in ("exact", "wrong", "raises")]
            numbers = [cell["counts"][who][word] for who, word in words]
            lines.append(names + "".join(f"| {number} " for number in numbers) + "|")
    return "\n".join(lines) + "\n"


def in_readme(text: str, cells: list[dict[str, Any]]) -> str:
    """`text` with the table between its two marks."""
    before, rest = text.split(MARKS[0])
    return before + MARKS[0] + table(cells) + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    README.write_text(in_readme(README.read_text(encoding="utf-8"), read()), encoding="utf-8")
