"""Measure the installed pair: every mode x method x architecture, stock and with ptfix. Writes one cell of
compat_matrix.yaml.

python -m tests.matrix.run --record          # all of it, into the matrix
python -m tests.matrix.run --architectures llama,gpt2 --methods prompt_tuning --modes greedy,multi_turn
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # chunked prefill of 4.51 compiles for a minute, to the same numbers
warnings.filterwarnings("ignore")

LETTERS = {"exact": "=", "wrong": "x", "raises": "!", "refused": "-", "host": "h", "none": "."}
#: "contract" generates by ptfix's second line, the public contract alone.
RUNNERS = ("ptfix", "contract", "stock")
PINNED = ("transformers", "peft", "accelerate", "tokenizers", "numpy", "torch")


def pins() -> dict[str, str]:
    return {name: importlib.metadata.version(name).split("+")[0] for name in PINNED}


#: Methods beyond these share all code that an architecture can tell apart with one of them.
CENTRAL_METHODS = ("prompt_tuning", "prefix_tuning")
CENTRAL_ARCHITECTURES = ("llama", "gpt2")


def measure(
    architectures: list[str], methods: list[str], modes: list[str], runners: list[str], brief: bool = False
) -> dict[str, Any]:
    """The cell: for each runner, method and architecture one letter per mode, and the words behind what is not
    exact."""
    import torch
    from tqdm import tqdm

    import ptfix
    from tests.matrix import models
    from tests.matrix import modes as m
    from tests.matrix.contract import PublicContract

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    report = ptfix.apply()
    grid: dict[str, dict[str, dict[str, str]]] = {runner: {method: {} for method in methods} for runner in runners}
    faults: list[dict[str, str]] = []
    hosts: dict[str, str] = {}
    progress = tqdm(total=len(architectures) * len(methods) * len(modes) * len(runners), unit="mode", mininterval=5)
    for architecture in architectures:
        try:
            bare = m.bare(architecture)
        except models.NotInThisPair as reason:
            hosts[architecture] = str(reason)
            progress.update(len(methods) * len(modes) * len(runners))
            continue
        can = {mode: m.judge(mode, bare) for mode in modes}
        for mode, outcome in can.items():
            if outcome not in ("exact", "none"):
                hosts[f"{architecture} {mode}"] = outcome
        for method in methods:
            if brief and method not in CENTRAL_METHODS and architecture not in CENTRAL_ARCHITECTURES:
                progress.update(len(modes) * len(runners))
                continue
            bench = None
            # Stock last: ptfix's forward makes the truth that stock is judged by, and peft's disable_adapter() leaves
            # the forward() of that moment on the model, so a model used in stock keeps stock's.
            for runner in sorted(runners, key=RUNNERS.index):
                (ptfix.revert if runner == "stock" else ptfix.apply)()
                letters = ""
                for mode in modes:
                    progress.update()
                    try:
                        bench = bench or m.bench(architecture, method)
                        outcome = m.judge(mode, PublicContract(**vars(bench)) if runner == "contract" else bench)
                        if outcome.startswith("raises: NotSupported"):
                            outcome = outcome.replace("raises", "refused", 1)
                    except models.NotInThisPair:
                        outcome = "none"
                    except Exception as error:
                        outcome = f"raises: {type(error).__name__}: {str(error)[:160]}"
                    if outcome not in ("exact", "none") and not m.host_can(can, mode):
                        outcome = "host"
                    letters += LETTERS[outcome.split(":")[0]]
                    if runner != "stock" and outcome.split(":")[0] in ("wrong", "raises", "refused"):
                        faults.append(
                            {"mode": mode, "method": method, "architecture": architecture, "outcome": outcome}
                        )
                grid[runner][method][architecture] = letters
    progress.close()
    ptfix.apply()
    return {
        "id": "t{transformers}-p{peft}".format(**pins()),
        "pins": pins(),
        "python": platform.python_version(),
        "imports": True,
        "fixes": {row.fix: row.status.value for row in report.rows},
        "counts": {runner: counts(grid[runner]) for runner in runners},
        "faults": faults,
        "host": hosts,
        "modes": modes,
        **grid,
    }


def counts(rows: dict[str, dict[str, str]]) -> dict[str, int]:
    words = {letter: word for word, letter in LETTERS.items()}
    total = Counter(
        words[letter] for by_architecture in rows.values() for row in by_architecture.values() for letter in row
    )
    return {
        word: total[word]
        for word in ("exact", "wrong", "raises", "refused", "host")
        if word != "refused" or total[word]
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("architectures", "methods", "modes"):
        parser.add_argument(f"--{name}", type=lambda text: text.split(","), help="comma-separated; default: all")
    parser.add_argument(
        "--brief", action="store_true", help=f"methods other than {CENTRAL_METHODS} on {CENTRAL_ARCHITECTURES} only"
    )
    parser.add_argument(
        "--runners", type=lambda text: text.split(","), default=["ptfix", "stock"], help=f"of {', '.join(RUNNERS)}"
    )
    parser.add_argument("--zoo", action="store_true", help="every architecture that this transformers has")
    parser.add_argument("--record", action="store_true", help="write the cell into compat_matrix.yaml")
    parser.add_argument("--json", type=Path, help="write the cell there")
    args = parser.parse_args()
    try:
        from tests.matrix import models, modes, zoo
    except ImportError as error:
        cell = not_importable(error)
    else:
        cell = measure(
            args.architectures or list(zoo.architectures() if args.zoo else models.ARCHITECTURES),
            args.methods or list(models.METHODS),
            args.modes or list(modes.MODES),
            runners=args.runners,
            brief=args.brief,
        )
    if args.json:
        args.json.write_text(json.dumps(cell), encoding="utf-8")
    if args.record:
        from tests.matrix import record

        record.write(cell)
    print(cell["id"], json.dumps(cell.get("counts", cell.get("reason"))))
    for fault in cell.get("faults", []):
        print("  not exact:", *fault.values())
    return 1 if cell.get("faults") else 0


def not_importable(error: ImportError) -> dict[str, Any]:
    """The cell of a pair that does not import: why, and what to install instead."""
    from ptfix import evidence

    versions = pins()
    message = re.sub(r" \(/.*?\)", "", str(error).splitlines()[0])  # without this machine's paths
    return {
        "id": "t{transformers}-p{peft}".format(**versions),
        "pins": versions,
        "imports": False,
        "reason": f"{type(error).__name__}: {message}",
        "remedy": evidence.remedy(),
    }


if __name__ == "__main__":
    sys.exit(main())
