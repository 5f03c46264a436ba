"""`ptfix repair PATH`: put the right chat template where every reader looks."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from typing import Any

import ptfix
from ptfix.chat_templates import files, inspection
from ptfix.chat_templates.files import Change, ReadError, WriteError
from ptfix.chat_templates.inspection import Inspection
from ptfix.cli import check


def add_parser(subparsers: Any) -> None:
    """Offer the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "repair", help="put the right chat template where every reader looks, showing the diff"
    )
    check.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="show the diff, write nothing")
    parser.add_argument("--eos", action="store_true", help="also let generation stop at the end of an answer")


def run(args: argparse.Namespace) -> int:
    """Repair and print what changed; 1 where something is left to do, else 0."""
    outcomes = [_repair(found, args) for found in check.examine(args)]
    findings = {
        "ptfix": ptfix.__version__,
        "path": str(args.path),
        "dry_run": args.dry_run,
        "folders": [
            {**check.described(one.before), "diff": one.diff, "written": one.written, "left": one.left}
            for one in outcomes
        ],
    }
    check.show(json.dumps(findings, indent=2) if args.json else "\n\n".join(map(_text, outcomes)))
    return 0 if all(one.good for one in outcomes) else 1


@dataclass(frozen=True)
class _Outcome:
    before: Inspection
    changes: list[Change]
    written: bool
    left: list[str] = field(default_factory=list)  #: what is still wrong, and why

    @property
    def diff(self) -> str:
        return check.diff(self.changes, self.before.folder)

    @property
    def good(self) -> bool:
        return not self.left and (self.written or not self.changes)


def _repair(found: Inspection, args: argparse.Namespace) -> _Outcome:
    changes = list(found.changes)
    if args.eos and found.eos and found.eos.path.parent == found.folder:
        changes.append(found.eos.change())
    if not changes:
        return _Outcome(found, [], False, _left(found))
    if args.dry_run:
        return _Outcome(found, changes, False)
    try:
        files.commit(changes)
        misread = inspection.misread(found.folder, found.choice.templates) if found.choice.templates else []
    except (WriteError, ReadError) as error:
        return _Outcome(found, changes, False, [str(error)])
    if misread:  # whatever the reason is, the folder must be no worse than it was
        files.commit([Change(change.path, change.new, change.old) for change in reversed(changes)])
        return _Outcome(found, changes, False, [f"Undone, for this would not load it: {', '.join(misread)}"])
    return _Outcome(found, changes, True, _left(check.look(found.folder, args)))


def _left(found: Inspection) -> list[str]:
    declined = found.choice.reasons if found.problems and found.choice.templates is None else []
    return [*found.problems, *declined]


def _text(outcome: _Outcome) -> str:
    found = outcome.before
    lines = [check.heading(found), *check.problem_lines(found)]
    if outcome.changes:
        what = "Written" if outcome.written else "Not written" if outcome.left else "To write"
        source = f": {found.choice.source}" if found.changes else ""
        told = [*found.choice.reasons, *outcome.diff.split("\n")] if found.changes else outcome.diff.split("\n")
        lines += ["", f"  {what}{source}", *check.indented(told)]
    if outcome.left:
        lines += ["", "  Still to do", *check.indented(outcome.left)]
    elif not outcome.changes:
        lines += ["", "  good: nothing to do"]
    return "\n".join(lines)
