"""`ptfix doctor`: what is broken in this pair of hosts, what ptfix does about it, what was measured, what helps."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping
from typing import Any

from packaging.specifiers import SpecifierSet

import ptfix
from ptfix import evidence, fixes, hosts
from ptfix.patching import Fix
from ptfix.report import Row, Status


def add_parser(subparsers: Any) -> None:
    """Offer the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "doctor", help="what is broken in this pair, and what helps"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 where something needed cannot work, else 0."""
    findings = examine()
    print(json.dumps(findings, indent=2) if args.json else _text(findings))
    return 1 if findings["problems"] else 0


def examine() -> dict[str, Any]:
    """Everything the doctor knows, ready for json. Each fix is tried, since one may not mend; none stays."""
    report = ptfix._patcher().trial()
    problems = [problem for problem in map(hosts.problem, hosts.FLOORS) if problem]
    advice = [evidence.remedy()] if problems else []
    rows = {row.fix: row for row in report.rows}
    problems += [
        f"{row.fix} is needed but unsupported: {row.reason}"
        for row in report.rows
        if row.status is Status.UNSUPPORTED and row.reason not in problems
    ]
    return {
        "ptfix": ptfix.__version__,
        "python": platform.python_version(),
        "hosts": dict(report.hosts),
        "fixes": [_finding(fix, rows[fix.id]) for fix in fixes.ALL],
        "matrix": _measured(report.hosts),
        "problems": problems,
        "advice": advice,
    }


def _finding(fix: Fix, row: Row) -> dict[str, Any]:
    needed = row.waiting or row.status in (Status.APPLIED, Status.UNSUPPORTED)
    return {
        "id": fix.id,
        "status": row.status.value,
        "reason": row.reason,
        "why": fix.why,
        "link": fix.link,
        "upgrade": _upgrades(fix.affects) if needed else [],
        "retire_when": fix.retire_when,
    }


def _upgrades(affects: Mapping[str, str]) -> list[str]:
    """The releases, any one of which leaves the window: beyond the upper bound of one of its hosts."""
    beyond = {"<": ">=", "<=": ">"}
    return [
        f"{name}{beyond[part.operator]}{part.version}"
        for name, specifier in affects.items()
        for part in SpecifierSet(specifier)
        if part.operator in beyond
    ]


def _measured(versions: Mapping[str, str]) -> dict[str, Any] | None:
    cell = evidence.nearest(versions)
    if cell is None:
        return None
    faults = {runner: {kind: cell.modes(runner, kind) for kind in ("wrong", "raises")} for runner in ("stock", "ptfix")}
    return {
        "id": cell.id,
        "exact": cell.is_pair(versions),
        "pins": dict(cell.pins),
        "imports": cell.imports,
        "reason": cell.measured.get("reason"),
        "counts": cell.measured.get("counts", {}),
        "modes": faults,
    }


def _text(findings: Mapping[str, Any]) -> str:
    installed = findings["hosts"]
    versions = [f"{name} {installed.get(name, 'not installed')}" for name in (*hosts.FLOORS, "torch")]
    lines = [f"ptfix {findings['ptfix']}, python {findings['python']}, {', '.join(versions)}", "", "Fixes"]
    for fix in findings["fixes"]:
        lines += [f"  {fix['status']:12} {fix['id']}: {fix['reason']}"]
        if fix["status"] != Status.NOT_NEEDED:
            upgrade = " or ".join(fix["upgrade"])
            retire = (
                f"not needed from {upgrade} on" if upgrade else f"needed in every release until {fix['retire_when']}"
            )
            lines += [f"{'':15}{fix['why']} ({fix['link']})", f"{'':15}{retire}"]
    lines += [] if findings["fixes"] else ["  none in this release"]
    lines += ["", "Measured", *_matrix_lines(findings["matrix"])]
    if findings["problems"]:
        lines += ["", "Problems", *(f"  {line}" for line in findings["problems"] + findings["advice"])]
    return "\n".join(lines)


def _matrix_lines(matrix: Mapping[str, Any] | None) -> list[str]:
    if matrix is None:
        return ["  nothing yet: this pair is probed, not looked up"]
    pins = ", ".join(f"{name} {matrix['pins'][name]}" for name in hosts.FLOORS)
    lines = [f"  {'this very pair' if matrix['exact'] else 'not this pair; the nearest measured one'}: {pins}"]
    if not matrix["imports"]:
        return [*lines, f"  does not import: {matrix['reason']}"]
    for runner, counts in matrix["counts"].items():
        judged = sum(counts.get(kind, 0) for kind in ("exact", "wrong", "raises"))
        lines += [f"  {runner:5}  {counts.get('exact', 0)} of {judged} cases equal the training forward"]
        lines += [
            f"         {word} in some: {', '.join(modes)}"
            for word, modes in zip(("silently wrong", "raises"), matrix["modes"][runner].values(), strict=True)
            if modes
        ]
    return lines
