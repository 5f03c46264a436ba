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
    from ptfix.demo.talk import Answer, Talk
    from ptfix.soft_prompts.proof.survey import Outcome

_VOICES = ("base", "stock", "ptfix", "truth")


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
    """Train, reload and ask, with progress on stderr; everything found, ready for json."""
    import transformers

    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # the hosts warn about old ways in each other's code
    started = time.perf_counter()
    _say("reading SmolLM2-135M-Instruct")
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

    from ptfix.demo import training
    from ptfix.demo.talk import WAYS, Talk, ask
    from ptfix.soft_prompts.proof.survey import survey

    def reloaded() -> Any:
        return PeftModel.from_pretrained(base, str(trained.checkpoint)).eval()

    def column(name: str) -> tuple[list[Answer | str], list[Outcome]]:
        _say(f"asking {name}, in every mode")
        model = reloaded()
        return [ask(way, model, talk) for _, _, way in WAYS], survey(model)

    ptfix.apply()
    began = time.perf_counter()
    trained = training.train(base, tokenizer, folder, callbacks=[*ptfix.callbacks(), _progress(training.STEPS)])
    training_seconds = time.perf_counter() - began

    ptfix.revert()
    talk = Talk(tokenizer, base, reloaded())
    stock_answers, stock_modes = column("stock peft")
    ptfix.apply()
    fixed_answers, fixed_modes = column("with ptfix")

    _say("the truth: the training forward for every token")
    ptfix.revert()  # stock peft's own forward, of one row without padding
    answers = [
        _compared(talk, question, how, stock, fixed)
        for (question, how, way), stock, fixed in zip(WAYS, stock_answers, fixed_answers, strict=True)
        if not isinstance(fixed, str) or not isinstance(ask(way, base, talk), str)  # else the host cannot either
    ]
    return {
        "training": {
            "seconds": round(training_seconds, 1),
            "steps": training.STEPS,
            "virtual_tokens": training.VIRTUAL_TOKENS,
            "first_loss": round(sum(trained.losses[:4]) / 4, 3),
            "last_loss": round(sum(trained.losses[-4:]) / 4, 3),
        },
        "modes": [
            {"mode": stock.mode, "stock": vars(stock), "ptfix": vars(fixed)}
            for stock, fixed in zip(stock_modes, fixed_modes, strict=True)
        ],
        "answers": answers,
        # Where the adapter changes nothing, every way of losing it looks exact.
        "learned": trained.losses[-1] < trained.losses[0] and any(said["base"] != said["truth"] for said in answers),
        "exact": all(outcome.good for outcome in fixed_modes) and all(said["exact"] for said in answers),
    }


def _compared(talk: Talk, question: str, how: str, stock: Answer | str, fixed: Answer | str) -> dict[str, Any]:
    """One question, with what everybody says to it."""
    told: dict[str, Any] = {"question": question, "how": how, "exact": False, **dict.fromkeys(_VOICES, "")}
    for voice, answer in (("stock", stock), ("ptfix", fixed)):
        told[voice] = answer if isinstance(answer, str) else talk.text(answer.ids)
    if not isinstance(fixed, str):
        truth = talk.truth(fixed.row)
        plain = talk.generate(talk.base, fixed.row).sequences[0, fixed.row.shape[1] :]
        told |= {"exact": fixed.ids.equal(truth), "truth": talk.text(truth), "base": talk.text(plain)}
    return told


def _text(findings: dict[str, Any]) -> str:
    training, versions = findings["training"], findings["hosts"]
    lines = [
        f"transformers {versions['transformers']}, peft {versions['peft']}, {findings['model']}",
        f"trained {training['virtual_tokens']} virtual tokens with Trainer in {training['seconds']:.0f} s: "
        f"{training['steps']} steps, loss {training['first_loss']:.2f} -> {training['last_loss']:.2f}; saved, reloaded",
    ]
    for said in findings["answers"]:
        lines += ["", f"{said['question']}  ({said['how']})"]
        lines += [f"  {voice:5}  {' '.join(said[voice].split())[:160]}" for voice in _VOICES]
    lines += ["", "Every mode, judged by the truth: the adapter's own training forward in full for every token", ""]
    table = [("mode", "stock", "ptfix")]
    table += [(row["mode"], _cell(row["stock"]), _cell(row["ptfix"])) for row in findings["modes"]]
    mode_width, stock_width = (max(len(line[column]) for line in table) for column in (0, 1))
    lines += [f"  {mode:{mode_width}}  {stock:{stock_width}}  {fixed}" for mode, stock, fixed in table]
    verdict = "ptfix says what training said"
    if not findings["exact"]:
        verdict = "PROBLEM: ptfix does not say what training said"
    if not findings["learned"]:
        verdict = "PROBLEM: the soft prompt learned nothing, so nothing is shown"
    return "\n".join([*lines, "", f"{verdict} ({findings['seconds']:.0f} s)"])


def _cell(outcome: dict[str, str]) -> str:
    verdict, detail = outcome["verdict"], outcome["detail"]
    return {
        "exact": "exact",
        "wrong": f"WRONG, silently, {detail}",
        "ignored": "WRONG, silently, as without adapter",
        "raises": f"raises {detail.partition(':')[0]}",
        "host": "not in this transformers",
    }[verdict]


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


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
