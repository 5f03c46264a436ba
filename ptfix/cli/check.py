"""`ptfix check PATH`: which chat template would each reader load from a saved folder, and is it right?

Where a model is there, also the four lengths that its config speaks of.
"""

from __future__ import annotations

import argparse
import difflib
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ptfix
from ptfix.chat_templates import inspection
from ptfix.chat_templates.files import Change, ReadError
from ptfix.chat_templates.inspection import Inspection
from ptfix.cli import UsageError
from ptfix.sequence_length import context
from ptfix.sequence_length.context import Context


def add_parser(subparsers: Any) -> None:
    """Offer the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "check",
        help="which chat template would each reader load from a saved folder, is it right; how long may rows be",
    )
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `check` and `repair` have in common."""
    parser.add_argument("path", metavar="PATH", type=Path, help="a saved tokenizer, processor, adapter or checkpoint")
    parser.add_argument("--base", metavar="MODEL", help="the base model; default: as the folder says")
    parser.add_argument(
        "--template", metavar="FILE", type=Path, help="the chat template to use, instead of a found one"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 where something is wrong, else 0."""
    found = examine(args)
    lengths = [_lengths(one) for one in found]
    folders = [
        {**described(one), "sequence_length": None if read is None else read.to_dict()}
        for one, read in zip(found, lengths, strict=True)
    ]
    findings = {"ptfix": ptfix.__version__, "path": str(args.path), "folders": folders}
    texts = ["\n".join([_text(one), *length_lines(read)]) for one, read in zip(found, lengths, strict=True)]
    show(json.dumps(findings, indent=2) if args.json else "\n\n".join(texts))
    return 1 if any(one.problems for one in found) else 0


def examine(args: argparse.Namespace) -> list[Inspection]:
    """Inspect every saved folder under the path.

    Raises:
        UsageError: there is none, or one of them cannot be read.
    """
    if not args.path.is_dir():
        raise UsageError(f"{args.path} is not a folder")
    folders = inspection.folders(args.path)
    if not folders:
        raise UsageError(f"{args.path} holds no tokenizer, processor, adapter or checkpoint")
    return [look(folder, args) for folder in folders]


def look(folder: Path, args: argparse.Namespace) -> Inspection:
    """Inspect one folder.

    Raises:
        UsageError: it cannot be read, or the template that was asked for cannot.
    """
    try:
        template = None if args.template is None else inspection.read_template(args.template)
        return inspection.inspect(folder, args.base, template)
    except ReadError as error:
        raise UsageError(str(error)) from error


def described(found: Inspection) -> dict[str, Any]:
    """Plain data, ready for json."""
    return {
        "folder": str(found.folder),
        "kind": found.kind,
        "base": found.base,
        "base_folder": None if found.base_folder is None else str(found.base_folder),
        "readers": [
            {
                "id": one.reader,
                "template": one.digest,
                "source": one.templates.source,
                "named": sorted(one.templates.named),
                "verdict": found.verdict(one),
            }
            for one in found.loaded
        ],
        "problems": found.problems,
        "notes": found.notes,
        "source": found.choice.source or None,
        "reasons": found.choice.reasons,
        "diff": diff(found.changes, found.folder),
    }


def show(text: str) -> None:
    """Print, also where the terminal's encoding has no room for a template's characters."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    print(text)


def heading(found: Inspection) -> str:
    """One line about the folder."""
    base = f", on {found.base}" if found.base else ""
    place = f" ({found.base_folder})" if found.base_folder and str(found.base_folder) != found.base else ""
    return visible(f"{found.folder}: {found.kind}{base}{place}")


def problem_lines(found: Inspection) -> list[str]:
    """Problems and notes, for people."""
    lines = ["", "  Problems", *indented(found.problems)] if found.problems else []
    return lines + (["", "  Notes", *indented(found.notes)] if found.notes else [])


def length_lines(read: Context | None) -> list[str]:
    """The four lengths of a model, for people; nothing where there is no model."""
    if read is None:
        return []
    numbers = [
        ("hard limit", read.hard_limit, "none known"),
        ("pretrained context", read.pretrained_context, "not said"),
        ("train-mode context", read.train_mode_context, "not said"),
        ("declared context", read.declared_context, "not said"),
    ]
    lines = [f"    {name:18}  {number or otherwise}" for name, number, otherwise in numbers]
    return ["", "  Length in tokens", *lines, f"    {'rope':18}  {read.rope}", *indented((*read.faults, *read.doubts))]


def _lengths(found: Inspection) -> Context | None:
    """Of the folder's own model, else of the base model's.

    Raises:
        UsageError: its config.json cannot be read.
    """
    try:
        own = context.read_folder(found.folder)
        return own if own is not None or found.base_folder is None else context.read_folder(found.base_folder)
    except ValueError as error:
        raise UsageError(str(error)) from error


def indented(sentences: Iterable[str]) -> list[str]:
    """Each as a line of its own under a heading."""
    return [f"    {visible(sentence)}" for sentence in sentences]


def diff(changes: Iterable[Change], folder: Path) -> str:
    """What would change, as a unified diff. Templates are strangers' text: what cannot be seen is spelled out."""
    lines = [line for change in changes for line in _diff(change, folder.resolve())]
    return visible("\n".join(lines))


def visible(text: str) -> str:
    """`text` with each character that a terminal hides or obeys as an escape."""
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def _diff(change: Change, root: Path) -> list[str]:
    name = change.path.relative_to(root).as_posix() if change.path.is_relative_to(root) else str(change.path)
    old, new = map(_lines, (change.old, change.new))
    labels = [
        "/dev/null" if data is None else f"{side}/{name}" for side, data in (("a", change.old), ("b", change.new))
    ]
    return list(difflib.unified_diff(old, new, labels[0], labels[1], lineterm=""))


def _lines(data: bytes | None) -> list[str]:
    *lines, last = (data or b"").decode("utf-8", "replace").split("\n")
    return [*lines, f"{last}\n\\ No newline at end of file"] if last else lines


def _text(found: Inspection) -> str:
    rows = [
        (one.reader, one.digest or "-", one.templates.source or "-", found.verdict(one) + _also(one.templates.named))
        for one in found.loaded
    ]
    table = [("reader", "template", "from", "verdict"), *rows]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = [heading(found), ""]
    lines += [
        "  " + "  ".join([*(f"{cell:{w}}" for cell, w in zip(row, widths, strict=False)), row[3]]) for row in table
    ]
    return "\n".join([*lines, *problem_lines(found), "", *_remedy(found)])


def _also(named: Iterable[str]) -> str:
    return f" (and {', '.join(map(visible, sorted(named)))})" if named else ""


def _remedy(found: Inspection) -> list[str]:
    if not found.problems:
        return ["  good: every reader loads the right chat template"]
    if not found.changes:
        why = found.choice.reasons if found.choice.templates is None else []
        return ["  `ptfix repair` would leave the chat templates as they are", *indented(why)]
    told = [*found.choice.reasons, *diff(found.changes, found.folder).split("\n")]
    return [f"  `ptfix repair` would write {found.choice.source}:", *indented(told)]
