"""What longer rows, another rope and progressive lengths do to short instructions: see README.md beside this file.

    python benchmarks/sequence_length.py [--jobs 2] [--quick]

Fine-tunes SmolLM2-135M-Instruct to explain topics of Python's own manual (`pydoc_data`, on every machine), with the
same number of tokens in every arm, and writes results/sequence_length.json and .svg. A run that is in the file is not
done again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

RESULTS = Path(__file__).parent / "results"
SEEDS = (0, 1, 2)
#: name -> (factor of a linear rope scaling or None, are the rows lengthened step by step)
ARMS: dict[str, tuple[float | None, bool]] = {
    "native rope": (None, False),
    "native rope, progressive": (None, True),
    "linear x4": (4.0, False),
    "linear x4, progressive": (4.0, True),
}
LENGTH, SHORTEST, WARMUP_STEPS = 1024, 128, 16
LONG = 2048  #: of the held-out rows
BUDGET, QUICK_BUDGET = 12 * LENGTH, LENGTH
EVERY = 3 * LENGTH  #: tokens between two comparisons


def main() -> None:
    """Do the runs that are missing, one process each, then draw and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="a few tokens, nothing written: to see that it runs")
    parser.add_argument("--run", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(one(args.run[0], int(args.run[1]), QUICK_BUDGET if args.quick else BUDGET)))
        return
    file = RESULTS / "sequence_length.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() and not args.quick else {}
    todo = [(arm, seed) for seed in SEEDS[: 1 if args.quick else None] for arm in ARMS]
    todo = [(arm, seed) for arm, seed in todo if f"{arm} | {seed}" not in results]

    def work(item: tuple[str, int]) -> tuple[str, Any]:
        command = [sys.executable, __file__, "--run", item[0], str(item[1]), *(["--quick"] if args.quick else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return f"{item[0]} | {item[1]}", json.loads(done.stdout.splitlines()[-1])

    from tqdm import tqdm

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for future in tqdm(
            concurrent.futures.as_completed([pool.submit(work, item) for item in todo]), total=len(todo)
        ):
            name, found = future.result()
            results[name] = found
            if not args.quick:
                file.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print(table(results))
    if not args.quick:
        draw(results, file.with_suffix(".svg"))


def one(arm: str, seed: int, budget: int) -> dict[str, Any]:
    """One run; its numbers after each `EVERY` tokens."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    import ptfix
    from ptfix.demo import smollm2
    from ptfix.sequence_length import retention, schedule

    path = smollm2.find()
    if path is None:
        raise SystemExit(smollm2.MISSING)
    factor, progressive = ARMS[arm]
    base, tokenizer = smollm2.load(path)
    model = smollm2.load(path)[0] if factor is None else with_linear_rope(smollm2.load(path)[0], factor)
    train, held_out = rows(tokenizer)
    prompts = [
        tokenized(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
        for text in retention.INSTRUCTIONS
    ]
    began = time.process_time()
    memories = retention.remember(base, prompts, 16, 20, [tokenizer.eos_token_id])
    seconds: dict[str, list[float]] = {"remember": [time.process_time() - began], "compare": [], "step": []}
    points: list[dict[str, float]] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Measure after each `EVERY` tokens, and stop when all are used."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._measure(0)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.began = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds["step"].append(time.process_time() - self.began)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            tokens = (logs or {}).get("sequence_length_tokens")
            if tokens is None:
                return
            if tokens // EVERY > points[-1]["tokens"] // EVERY or tokens >= budget:
                self._measure(tokens)
            control.should_training_stop = tokens >= budget

        def _measure(self, tokens: int) -> None:
            began = time.process_time()
            kept = retention.compare(model, memories)
            seconds["compare"].append(time.process_time() - began)
            points.append({"tokens": tokens, "kl": kept.kl, "agreement": kept.agreement, **losses(model, held_out)})

    lengths = schedule.linear(SHORTEST, LENGTH, WARMUP_STEPS) if progressive else schedule.linear(LENGTH, LENGTH, 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=1,
                learning_rate=5e-5,
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=4,
                max_steps=10_000,  # the budget of tokens ends it
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            ),
            train_dataset=train,
            processing_class=tokenizer,
            callbacks=[ptfix.SequenceLengthWarmupCallback(lengths, "truncate"), Watch()],
        )
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    steps = [entry["sequence_length"] for entry in trainer.state.log_history if "sequence_length" in entry]
    return {"points": points, "lengths": steps, "seconds": seconds}


def with_linear_rope(model: Any, factor: float) -> Any:
    """The same weights under a rope that is `factor` times slower, as trainers set it to reach further."""
    from transformers import LlamaForCausalLM

    config = model.config.to_dict()
    old = config.pop("rope_parameters", None) or {}
    theta = old.get("rope_theta", config.get("rope_theta"))
    scaling = {"rope_type": "linear", "type": "linear", "factor": factor}
    if old:
        config["rope_parameters"] = {**scaling, "rope_theta": theta}
    else:
        config["rope_scaling"] = scaling
    scaled = LlamaForCausalLM(type(model.config).from_dict(config))
    scaled.load_state_dict(model.state_dict())
    return scaled.eval()


def rows(tokenizer: Any) -> tuple[list[dict[str, list[int]]], list[list[int]]]:
    """Questions with long answers, ``LENGTH`` tokens each; and held-out rows of `LONG` tokens."""
    from pydoc_data.topics import topics

    train, held_out = [], []
    for name, text in sorted(topics.items()):
        chat = [
            {"role": "user", "content": f"Explain this topic of the Python language: {name}"},
            {"role": "assistant", "content": text.strip()},
        ]
        ids = tokenized(tokenizer, chat)
        if len(ids) >= LONG and len(held_out) < 2:
            held_out.append(ids[:LONG])
        elif len(ids) >= LENGTH:
            asked = len(tokenized(tokenizer, chat[:1], add_generation_prompt=True))
            train.append({"input_ids": ids[:LENGTH], "labels": [-100] * asked + ids[asked:LENGTH]})
    return train, held_out


def tokenized(tokenizer: Any, chat: list[dict[str, str]], **options: bool) -> list[int]:
    """The token ids of a chat."""
    text = tokenizer.apply_chat_template(chat, tokenize=False, **options)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def losses(model: Any, held_out: Sequence[Sequence[int]]) -> dict[str, float]:
    """Mean loss per token of the held-out rows: at places before 512 and from there to the end."""
    import torch

    from ptfix.sequence_length.retention import quiet

    short, long = [], []
    with quiet(model):
        for row in held_out:
            ids = torch.tensor([row])
            found = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            short.append(float(found[:511].mean()))
            long.append(float(found[LENGTH - 1 :].mean()))
    return {"loss_short": statistics.mean(short), "loss_long": statistics.mean(long)}


NUMBERS = {
    "kl": "KL from the base on short\ninstructions, nats/token",
    "loss_short": "held-out loss,\nfirst 512 places",
    "loss_long": f"held-out loss,\nplaces {LENGTH} to {LONG}",
}


def by_arm(results: dict[str, Any]) -> Iterator[tuple[str, list[list[dict[str, float]]]]]:
    """The points of each arm, run by run."""
    for arm in ARMS:
        runs = [found["points"] for name, found in results.items() if name.split(" | ")[0] == arm]
        if runs:
            yield arm, runs


def table(results: dict[str, Any]) -> str:
    """First and last points, mean of the seeds with (least-most)."""

    def shown(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):.3g} ({min(values):.3g}-{max(values):.3g})"

    lines = [
        "| arm | seeds | KL before | after | agreement after | short loss, before -> after | long loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, runs in by_arm(results):

        def at(index: int, name: str, runs: list[list[dict[str, float]]] = runs) -> str:
            return shown([run[index][name] for run in runs])

        lines.append(
            f"| {arm} | {len(runs)} | {at(0, 'kl')} | {at(-1, 'kl')} | {at(-1, 'agreement')} | "
            f"{at(0, 'loss_short')} -> {at(-1, 'loss_short')} | {at(0, 'loss_long')} -> {at(-1, 'loss_long')} |"
        )
    whole = [found["seconds"] for name, found in results.items() if "progressive" not in name]
    remember, compare, step = (
        statistics.median(second for seconds in whole for second in seconds[what])
        for what in ("remember", "compare", "step")
    )
    lines += [
        "",
        f"InstructionRetentionCallback, processor time: {remember:.1f} s at the start, {compare:.1f} s a comparison;",
        f"a step with one row of {LENGTH} tokens takes {step:.1f} s. With a comparison every 500 steps (Trainer's own",
        f"interval) that is {(remember + 2 * compare) / (500 * step):.2%} of the first 500 steps.",
    ]
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """The numbers over the tokens, means of the seeds with the spread from least to most."""
    from ptfix import pictures

    panels = []
    for name, label in NUMBERS.items():
        lines, spreads = {}, {}
        for arm, runs in by_arm(results):
            columns = list(zip(*runs, strict=False))
            tokens = [statistics.mean(point["tokens"] for point in column) for column in columns]
            values = [[point[name] for point in column] for column in columns]
            lines[arm] = tokens, [statistics.mean(column) for column in values]
            spreads[arm] = [min(column) for column in values], [max(column) for column in values]
        panels.append(pictures.Panel(label, lines, spreads))
    pictures.draw(panels, path, "tokens of training", "SmolLM2-135M-Instruct, full fine-tuning, three seeds")


if __name__ == "__main__":
    main()
