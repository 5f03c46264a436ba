"""`ptfix report RUN_DIR`: a run as a picture and a table: length, tokens, loss, KL and agreement over the steps."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptfix import pictures
from ptfix.cli import UsageError

STATE = "trainer_state.json"
PICTURE = "ptfix-report.svg"


@dataclass(frozen=True)
class Quantity:
    """Something the Trainer's log may hold."""

    label: str
    keys: tuple[str, ...]  #: names in the log; of each entry the first that is there
    floor: float | None = None


QUANTITIES = (
    Quantity("sequence length", ("sequence_length",), 0),
    Quantity("tokens used", ("sequence_length_tokens", "num_input_tokens_seen"), 0),
    Quantity("loss", ("loss",)),
    Quantity("loss on the evaluation set", ("eval_loss",)),
    Quantity("KL from the base, nats/token", ("retention_kl",), 0),
    Quantity("agreement with the base", ("retention_agreement",)),
    Quantity("NLL of the base's answers", ("retention_nll",)),
)

Series = tuple[list[float], list[float]]  #: steps, values


def add_parser(subparsers: Any) -> None:
    """Offer the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "report", help="draw length, tokens, loss, KL and agreement of a training run over its steps"
    )
    parser.add_argument(
        "runs", metavar="RUN_DIR", type=Path, nargs="+", help="output_dir of a Trainer; several are drawn together"
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help=f"default: {PICTURE} in the first RUN_DIR; .svg, .png or .pdf"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the series as one JSON object; a picture only where --picture asks"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table and draw; 1 where a loss or a KL is no number at the end, else 0."""
    picture = args.picture or args.runs[0] / PICTURE
    problem = pictures.problem(picture)
    if args.picture and problem:
        raise UsageError(problem)
    names = _names(args.runs)
    runs = {name: series(_log(folder)) for name, folder in zip(names, args.runs, strict=True)}
    print(json.dumps(_plain(runs)) if args.json else _text(runs))
    if problem and not args.json:
        print(f"no picture: {problem}", file=sys.stderr)
    elif args.picture or not args.json:
        try:
            pictures.draw(panels(runs), picture, "optimizer step", names[0] if len(names) == 1 else "")
        except OSError as error:
            raise UsageError(f"cannot write {picture}: {error.strerror or error}") from error
        print(f"drawn: {picture}", file=sys.stderr)
    broken = any(not math.isfinite(values[-1]) for found in runs.values() for _, values in found.values())
    return 1 if broken else 0


def series(log: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """What a log history holds of `QUANTITIES`, by their labels. Of a step that was logged twice, the last counts."""
    found = {}
    for quantity in QUANTITIES:
        points: dict[float, float] = {}
        for entry in log:
            value = next((entry[key] for key in quantity.keys if key in entry), None)
            if isinstance(value, int | float) and isinstance(entry.get("step"), int | float):
                points[entry["step"]] = float(value)
        if points:
            steps = sorted(points)
            found[quantity.label] = steps, [points[step] for step in steps]
    return found


def panels(runs: Mapping[str, Mapping[str, Series]]) -> list[pictures.Panel]:
    """One panel for each quantity that a run has."""
    return [
        pictures.Panel(
            quantity.label,
            {name: found[quantity.label] for name, found in runs.items() if quantity.label in found},
            floor=quantity.floor,
        )
        for quantity in QUANTITIES
        if any(quantity.label in found for found in runs.values())
    ]


def _log(folder: Path) -> list[dict[str, Any]]:
    """The log history of the state that went furthest: the run's own, or that of a checkpoint in it."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.")
    states = [
        _state(path) for path in [folder / STATE, *sorted(folder.glob(f"checkpoint-*/{STATE}"))] if path.is_file()
    ]
    if not states:
        raise UsageError(
            f"{folder} holds no {STATE}: name the output_dir of a Trainer that has saved a checkpoint, "
            "or call trainer.save_state() after training."
        )
    log: list[dict[str, Any]] = max(states, key=lambda state: state["global_step"])["log_history"]
    if not series(log):
        raise UsageError(f"{folder}: nothing was logged that could be drawn; train with logging_steps set.")
    return log


def _state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(entry, dict) for entry in state["log_history"]):
            raise TypeError("log_history is no list of entries")
        return {"global_step": int(state["global_step"]), "log_history": state["log_history"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is not the state of a Trainer ({type(error).__name__}: {error}).") from error


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or all of their paths where names are the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _plain(runs: Mapping[str, Mapping[str, Series]]) -> dict[str, Any]:
    """As JSON has it, which knows no NaN."""
    return {
        name: {
            label: [steps, [value if math.isfinite(value) else None for value in values]]
            for label, (steps, values) in found.items()
        }
        for name, found in runs.items()
    }


def _text(runs: Mapping[str, Mapping[str, Series]]) -> str:
    lines = []
    for name, found in runs.items():
        lines += ["", f"{name}", f"  {'':30} {'first':>10} {'last':>10} {'least':>10} {'most':>10}   steps"]
        for label, (steps, values) in found.items():
            known = [value for value in values if math.isfinite(value)] or [math.nan]
            numbers = (values[0], values[-1], min(known), max(known))
            shown = "".join(f" {number:10.0f}" if number.is_integer() else f" {number:10.4g}" for number in numbers)
            lines.append(f"  {label:30}{shown}   {steps[0]:g} to {steps[-1]:g}")
    return "\n".join(lines[1:])
