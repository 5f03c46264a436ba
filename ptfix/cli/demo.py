"""`ptfix demo`: the main job on a real pretrained model, offline: train a soft prompt, save, reload, ask.

Shows stock peft beside ptfix beside the truth.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ptfix
from ptfix import hosts
from ptfix.cli import UsageError
from ptfix.demo import smollm2

if TYPE_CHECKING:
    from ptfix.demo.modes import Outcome, Talk

#: The modes whose last answer is shown to a person, one for each question.
_SHOWN = ("one question", "batch with padding on the left", "second turn, returned cache")
_UNABLE = "not in this transformers"


def add_parser(subparsers: Any) -> None:
    """Offer the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo", help="train a soft prompt on a small real model and ask it: stock, ptfix, truth"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print what happened; 1 where nothing was learned or ptfix does not say what training said, else 0."""
    model_file = smollm2.find()
    if model_file is None:
        raise UsageError(smollm2.MISSING)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hosts are imported: nothing is downloaded
    for name in (*hosts.FLOORS, "accelerate"):
        problem = hosts.problem(name)
        if problem:
            raise UsageError(problem)
    findings = examine(model_file)
    print(json.dumps(findings, indent=2) if args.json else _text(findings))
    return 0 if findings["learned"] and findings["exact"] else 1


def examine(model_file: Path) -> dict[str, Any]:
    """Train, reload and ask, with progress bars on stderr; everything found, ready for json."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # the hosts warn about old ways in each other's code
    started = time.perf_counter()
    print("reading SmolLM2-135M-Instruct", file=sys.stderr, flush=True)
    base, tokenizer = smollm2.load(model_file)
    try:
        with tempfile.TemporaryDirectory(prefix="ptfix-demo-") as folder:
            findings = _train_and_ask(base, tokenizer, Path(folder))
    finally:
        ptfix.revert()
    return {
        "ptfix": ptfix.__version__,
        "hosts": hosts.versions(),
        "model": model_file.name,
        **findings,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _train_and_ask(base: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    from peft import PeftModel
    from tqdm import tqdm

    from ptfix.demo import modes, training

    def column(name: str) -> dict[str, modes.Outcome]:
        model = PeftModel.from_pretrained(base, checkpoint).eval()
        return {mode: modes.ask(mode, model, talk) for mode in tqdm(modes.MODES, desc=f"asking with {name}")}

    ptfix.apply()
    began = time.perf_counter()
    trained = training.train(base, tokenizer, folder, callbacks=[_progress(training.STEPS)])
    training_seconds = time.perf_counter() - began
    checkpoint = str(trained.checkpoint)

    ptfix.revert()
    # The truth is stock peft's too: its training forward on one row without padding was never in doubt.
    talk = modes.Talk(tokenizer, base, PeftModel.from_pretrained(base, checkpoint).eval())
    for row in tqdm(talk.rows(), desc="truth: the training forward for every token", total=3):
        talk.truth(row)
    stock = column("stock peft")
    ptfix.apply()
    fixed = column("ptfix")

    able = {mode: fixed[mode].exact or modes.host_can(mode, talk) for mode in modes.MODES}
    return {
        "training": {
            "seconds": round(training_seconds, 1),
            "steps": training.STEPS,
            "virtual_tokens": training.VIRTUAL_TOKENS,
            "first_loss": round(sum(trained.losses[:4]) / 4, 3),
            "last_loss": round(sum(trained.losses[-4:]) / 4, 3),
        },
        "modes": [
            {"mode": mode, "stock": stock[mode].verdict, "ptfix": fixed[mode].verdict}
            if able[mode]
            else {"mode": mode, "stock": _UNABLE, "ptfix": _UNABLE}
            for mode in modes.MODES
        ],
        "answers": [
            {
                "question": question,
                "mode": mode,
                "base": talk.text(talk.plain(row)),
                "stock": _said(stock[mode], talk),
                "ptfix": _said(fixed[mode], talk),
                "truth": talk.text(talk.truth(row)),
            }
            for question, mode, row in zip((*modes.QUESTIONS, modes.FOLLOW_UP), _SHOWN, talk.rows(), strict=True)
            if able[mode]
        ],
        # Where the adapter changes nothing, every way of losing it is exact.
        "learned": trained.losses[-1] < trained.losses[0]
        and not all(talk.truth(row).equal(talk.plain(row)) for row in talk.rows()),
        "exact": all(fixed[mode].exact for mode in modes.MODES if able[mode]),
    }


def _said(outcome: Outcome, talk: Talk) -> str:
    return talk.text(outcome.answers[-1][1]) if outcome.answers else f"{outcome.verdict}: {outcome.error}"


def _text(findings: dict[str, Any]) -> str:
    training, versions = findings["training"], findings["hosts"]
    lines = [
        f"transformers {versions['transformers']}, peft {versions['peft']}, {findings['model']}",
        f"trained {training['virtual_tokens']} virtual tokens with Trainer in {training['seconds']:.0f} s: "
        f"{training['steps']} steps, loss {training['first_loss']:.2f} -> {training['last_loss']:.2f}; saved, reloaded",
        "",
        "exact: every token is what the adapter's own training forward says (the truth)",
        "",
    ]
    table = [("mode", "stock", "ptfix"), *((row["mode"], row["stock"], row["ptfix"]) for row in findings["modes"])]
    mode_width, stock_width = (max(len(line[column]) for line in table) for column in (0, 1))
    lines += [f"  {mode:{mode_width}}  {stock:{stock_width}}  {fixed}" for mode, stock, fixed in table]
    for answer in findings["answers"]:
        lines += ["", f"{answer['question']}  ({answer['mode']})"]
        lines += [f"  {who:5}  {' '.join(answer[who].split())[:200]}" for who in ("base", "stock", "ptfix", "truth")]
    verdict = "ptfix says what training said"
    if not findings["exact"]:
        verdict = "PROBLEM: ptfix does not say what training said"
    if not findings["learned"]:
        verdict = "PROBLEM: the soft prompt learned nothing, so nothing is shown"
    return "\n".join([*lines, "", f"{verdict} ({findings['seconds']:.0f} s)"])


def _progress(steps: int) -> Any:
    """A TrainerCallback that shows one bar on stderr; Trainer's own prints its logs to stdout."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.bar = tqdm(total=steps, desc="training")

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                self.bar.set_postfix(loss=f"{logs['loss']:.2f}")
                self.bar.update()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.close()

    return Progress()
