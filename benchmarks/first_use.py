"""What the first-use check adds to the first generate() of a soft prompt, on SmolLM2-135M-Instruct: see README.md.

    python benchmarks/first_use.py [--repeats 5]

Writes results/first_use.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tqdm import tqdm

import ptfix
from ptfix import hosts, speed
from ptfix.demo import smollm2

RESULTS = Path(__file__).parent / "results" / "first_use.json"
VIRTUAL_TOKENS = 20
#: (batch, tokens of the text, new tokens)
CELLS = ((1, 32, 1), (1, 256, 1), (1, 1024, 1), (1, 32, 96), (8, 256, 96))


def main() -> None:
    """Measure every cell, write the results, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    model_file = smollm2.find()
    if model_file is None:
        raise SystemExit(smollm2.MISSING)
    torch.set_num_threads(1)
    ptfix.apply()
    base, _ = smollm2.load(model_file)
    speed.without_end(base)
    cells = [_cell(base, repeats, *cell) for cell in tqdm(CELLS)]
    results = {"hosts": hosts.versions(), "virtual_tokens": VIRTUAL_TOKENS, "repeats": repeats, "cells": cells}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print("| batch | tokens | new | later call, ms | first call, ms | ratio |", "|---|---|---|---|---|---|", sep="\n")
    for cell in cells:
        ratio = cell["ratio"]
        print(
            f"| {cell['batch']} | {cell['tokens']} | {cell['new']} | {cell['later_ms']:.0f} | {cell['first_ms']:.0f} | "
            f"{ratio[1]:.2f} ({ratio[0]:.2f}-{ratio[2]:.2f}) |"
        )


def _cell(base: Any, repeats: int, batch: int, tokens: int, new: int) -> dict[str, Any]:
    """First and later calls by turns, so that a slow moment of the machine slows both."""
    ids = torch.randint(100, 10_000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    prompt = torch.arange(100, 100 + VIRTUAL_TOKENS)
    _generate(speed.untrained(base, prompt), ids, 1)  # warms up
    first, later = [], []
    for _ in range(repeats):
        model = speed.untrained(base, prompt)  # a new model: its next call is its first
        first.append(_generate(model, ids, new))
        later.append(_generate(model, ids, new))
    ratios = sorted(one / other for one, other in zip(first, later, strict=True))
    return {
        "batch": batch,
        "tokens": tokens,
        "new": new,
        "first_ms": round(statistics.median(first) * 1000, 1),
        "later_ms": round(statistics.median(later) * 1000, 1),
        "ratio": [round(value, 3) for value in (ratios[0], statistics.median(ratios), ratios[-1])],
    }


def _generate(model: Any, ids: torch.Tensor, new: int) -> float:
    start = time.process_time()
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return time.process_time() - start


if __name__ == "__main__":
    main()
