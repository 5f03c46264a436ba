"""What a soft prompt costs with ptfix, on SmolLM2-135M-Instruct: see README.md beside this file.

    python benchmarks/generate.py [--repeats 5] [--quick | --start-up]

Writes results/<pair>.json, and results/<pair>.svg where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tqdm import tqdm

import ptfix
from ptfix import hosts, speed
from ptfix.demo import smollm2
from ptfix.speed import FIXED, FIXED_UNCACHED, LIMIT, STOCK, Lap, Laps

RESULTS = Path(__file__).parent / "results"
NEW_TOKENS, LONGER = 96, 256

#: With one thread on a CPU this is the time a quiet machine would take, whatever else runs on this one.
CLOCK = time.process_time

#: What one lap says; for each, more is better.
MEASURES: dict[str, Callable[[Lap], float]] = {
    "prefill": lambda lap: 1 / lap.prefill,
    "decode": lambda lap: lap.decode_tokens_per_second,
    "total": lambda lap: lap.tokens_per_second,
}
#: (virtual tokens, batch, new tokens, rounds without cache): these are slow, and steady because they are long. A batch
#: of 8 without cache would take a quarter of an hour a round; what the cache saves shows in a batch of 1.
CELLS = (
    (20, 1, NEW_TOKENS, 1),
    (100, 1, NEW_TOKENS, 1),
    (20, 8, NEW_TOKENS, 0),
    (100, 8, NEW_TOKENS, 0),
    (20, 1, LONGER, 1),
)

SYSTEM = (
    "You are a patient teacher. You explain things to young people who are curious about the world, in plain words, "
    "with examples from daily life. You never use a long word where a short one will do, you never talk down to "
    "anybody, and when you do not know something you say so. You begin with the answer, and only then say why it is "
    "so. You like the sea, old maps, good bread, the sound of rain on a roof, and questions nobody has asked before. "
)
QUESTION = "Tell me, as a long story, how a river begins in the mountains and finds its way to the sea."


def main() -> None:
    """Measure the start-up and every cell, write the results, print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="rounds with cache (5)")
    parser.add_argument(
        "--quick", action="store_true", help="first cell only, 16 new tokens, 1 round: to see that it runs"
    )
    parser.add_argument("--start-up", action="store_true", help="only import and apply(); what is in the file stays")
    args = parser.parse_args()
    if args.start_up:
        file = RESULTS / f"{_pair()}.json"
        known = {**json.loads(file.read_text()), "milliseconds": _start_up()}
        file.write_text(json.dumps(known, indent=1) + "\n")
        print(_table(known))
        return
    model_file = smollm2.find()
    if model_file is None:
        raise SystemExit(smollm2.MISSING)
    torch.set_num_threads(1)
    cells = ((20, 1, 16, 1),) if args.quick else CELLS
    start_up = _start_up()
    base, tokenizer = smollm2.load(model_file)
    speed.without_end(base)
    results: dict[str, Any] = {
        "hosts": hosts.versions(),
        "ptfix": ptfix.__version__,
        "machine": {"cpu": _cpu(), "python": platform.python_version(), "threads": 1, "clock": "processor time"},
        "model": f"{model_file.name}, float32",
        "repeats": 1 if args.quick else args.repeats,
        "milliseconds": start_up,
        "cells": [],
    }
    name = _pair()
    RESULTS.mkdir(exist_ok=True)
    for cell in tqdm(cells, desc="cells"):
        results["cells"].append(_cell(base, tokenizer, 1 if args.quick else args.repeats, *cell))
        # After each, since all of them take long: what was measured is kept.
        (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        _draw(results, RESULTS / f"{name}.svg")
        print(_table(results), flush=True)


def _pair() -> str:
    versions = hosts.versions()
    return f"{versions['transformers']}+{versions['peft']}"


def _cell(
    base: Any, tokenizer: Any, repeats: int, virtual: int, batch: int, new_tokens: int, uncached_rounds: int
) -> dict[str, Any]:
    """One setting: a soft prompt made of ordinary tokens, so that the base model with these says the truth."""
    words = tokenizer(f"<|im_start|>system\n{SYSTEM * 2}")["input_ids"]
    prompt_ids = torch.tensor(words[:virtual])
    chat = f"<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    input_ids = torch.tensor([tokenizer(chat)["input_ids"]]).expand(batch, -1)
    ways = {way.name: way for way in speed.ways(base, speed.untrained(base, prompt_ids), prompt_ids, input_ids)}

    laps, errors = speed.race([ways[name] for name in (LIMIT, STOCK, FIXED)], new_tokens, repeats, CLOCK)
    if FIXED in errors:
        raise SystemExit(f"with ptfix, generate() raises {errors[FIXED]}")
    truth = laps[LIMIT][0].ids
    pairs = {f"{FIXED} / {LIMIT}": _ratios(laps, LIMIT)}
    if STOCK in laps and _says(laps[STOCK], truth):
        pairs[f"{FIXED} / {STOCK}"] = _ratios(laps, STOCK)
    every = dict(laps)
    if uncached_rounds:
        slow, _ = speed.race([ways[name] for name in (FIXED_UNCACHED, FIXED)], new_tokens, uncached_rounds, CLOCK)
        pairs[f"{FIXED} / {FIXED_UNCACHED}"] = _ratios(slow, FIXED_UNCACHED)
        every[FIXED_UNCACHED] = slow[FIXED_UNCACHED]
    return {
        "virtual_tokens": virtual,
        "batch": batch,
        "prompt_tokens": input_ids.shape[1],
        "new_tokens": new_tokens,
        "ways": {name: {**_speeds(found), "says_the_truth": _says(found, truth)} for name, found in every.items()},
        "errors": errors,
        "ratios": pairs,
    }


def _says(laps: Iterable[Lap], truth: torch.Tensor) -> bool:
    return all(lap.ids.equal(truth) for lap in laps)


def _speeds(laps: list[Lap]) -> dict[str, Any]:
    return {
        "first_token_ms": _spread([lap.prefill * 1000 for lap in laps]),
        "decode_tokens_per_second": _spread([lap.decode_tokens_per_second for lap in laps]),
        "tokens_per_second": _spread([lap.tokens_per_second for lap in laps]),
    }


def _ratios(laps: Laps, other: str) -> dict[str, Any]:
    return {name: _spread(speed.ratios(laps, FIXED, other, of)) for name, of in MEASURES.items()}


def _spread(values: Iterable[float]) -> dict[str, float]:
    values = sorted(values)
    return {
        "median": round(statistics.median(values), 4),
        "min": round(values[0], 4),
        "max": round(values[-1], 4),
    }


def _milliseconds(before: str, measured: str, after: str = "", repeats: int = 10) -> list[float]:
    """Processor time of a statement in a new process, its modules compiled as in any second run."""
    timed = f"t = time.process_time()\n{measured}\nprint((time.process_time() - t) * 1000)"
    code = f"import sys, time\n{before}\n{timed}\n{after}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    outputs = [subprocess.run(command, env=environment, capture_output=True, check=True) for _ in range(repeats + 1)]
    return [float(output.stdout) for output in outputs[1:]]


def _start_up() -> dict[str, Any]:
    host_imports = "import torch, peft, ptfix\nfrom transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer"
    return {
        "import ptfix": _spread(_milliseconds("", "import ptfix", "assert 'torch' not in sys.modules")),
        "apply() after the hosts' imports": _spread(_milliseconds(host_imports, "ptfix.apply()", repeats=5)),
    }


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _table(results: Mapping[str, Any]) -> str:
    lines = ["| virtual | batch | new | ratio | prefill | decode | total |", "|---|---|---|---|---|---|---|"]
    for cell in results["cells"]:
        for name, ratio in cell["ratios"].items():
            setting = f"| {cell['virtual_tokens']} | {cell['batch']} | {cell['new_tokens']} | {name} |"
            spreads = (ratio[measure] for measure in MEASURES)
            lines.append(setting + "".join(f" {s['median']:.2f} ({s['min']:.2f}-{s['max']:.2f}) |" for s in spreads))
    lines += ["", *(f"{what}: {ms['median']:.1f} ms" for what, ms in results["milliseconds"].items())]
    return "\n".join(lines)


def _draw(results: Mapping[str, Any], path: Path) -> None:
    """Tokens/s of every way, one group of bars for each cell."""
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "ptfix", "svg.fonttype": "none"})  # small, and the same each time
    from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]

    colours = {LIMIT: "#9aa0a6", STOCK: "#f0b03a", FIXED: "#1f77b4", FIXED_UNCACHED: "#c44e52"}
    figure, axes = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    for position, (name, colour) in enumerate(colours.items()):
        places, heights, errors = [], [], []
        for place, cell in enumerate(results["cells"]):
            if name in cell["ways"]:
                spread = cell["ways"][name]["tokens_per_second"]
                places.append(place + (position - 1.5) * 0.2)
                heights.append(spread["median"])
                errors.append((spread["median"] - spread["min"], spread["max"] - spread["median"]))
        label = name if name != FIXED_UNCACHED else "use_cache=False"
        axes.bar(places, heights, 0.2, label=label, color=colour, yerr=list(zip(*errors, strict=True)), ecolor="#444")
    labels = [f"{c['virtual_tokens']} virtual\nbatch {c['batch']}\n{c['new_tokens']} new" for c in results["cells"]]
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("tokens/s")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
