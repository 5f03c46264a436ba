"""What an unpadded training forward says under ptfix is bit for bit what it says without: architectures x methods.

Two questions are asked: what a training step says (`TRAINING`), and what the matrix judges every mode by (`TRUTH`),
since its runner makes that with ptfix on.

Where a pair of hosts does not hold a prefix as its models read it, ptfix makes the prefix (fix prefix-forward). There
alone two other outcomes are right: `rounding`, and `stock misreads`, where a prefix made of a hard prompt's keys and
values answers as the hard prompt does under ptfix and does not without.

python -m tests.matrix.forward_unchanged                      # all of the installed pair, as a table in Markdown
python -m tests.matrix.forward_unchanged llama paligemma      # some
python -m tests.matrix.forward_unchanged --truth              # the matrix's own truth, of all its cells
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import ptfix
from ptfix.report import Status
from tests.matrix import modes, zoo
from tests.matrix.models import ARCHITECTURES, METHODS, VOCAB, NotInThisPair, base_model, task_ids, wrap

#: What is compared, by name.
Said = dict[str, torch.Tensor]

#: Asks again under ptfix: the model, and what it says.
Again = Callable[[], tuple[Any, Said]]

SAME, DIFFERS, CANNOT, NO_MODEL = "same", "differs", "cannot", "no model"
ROUNDING, STOCK_MISREADS = "rounding", "stock misreads"
TEXT = 20  #: longer than the windows of the zoo
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Question:
    base_model: Callable[[str], Any]
    ask: Callable[[Any, str, str], tuple[Said, Again]]  #: (base, architecture, method) -> what stock says, and again


def _training(base: Any, architecture: str, method: str) -> tuple[Said, Again]:
    """Train an adapter; again, its twin, which stock made too.

    A twin, since some models round otherwise from their second call on.
    """
    model, twin = (wrap(base, method, **zoo.adapter_sizes(architecture, method)) for _ in range(2))
    return _train(twin, method), lambda: (model, _train(model, method))


def _truth(base: Any, architecture: str, method: str) -> tuple[Said, Again]:
    """The truth of a cell of the matrix; again, of one made anew, as the matrix makes its own under ptfix."""

    def made() -> tuple[Any, Said]:
        bench = modes.bench(architecture, method)
        ids, scores = bench.truth(bench.ids)
        return bench.model, {"ids": ids, "scores": scores}

    return made()[1], made


TRAINING = Question(zoo.base_model, _training)
TRUTH = Question(base_model, _truth)


def judge(
    architectures: Iterable[str],
    methods: Iterable[str],
    progress: Callable[[], object] = lambda: None,
    question: Question = TRAINING,
) -> dict[str, dict[str, str]]:
    """``{architecture: {method: outcome}}``. Leaves ptfix reverted."""
    methods = list(methods)
    ptfix.revert()
    table: dict[str, dict[str, str]] = {}
    stock: dict[tuple[str, str], tuple[Said, Again]] = {}
    for architecture in architectures:
        progress()
        table[architecture] = {}
        try:
            base = question.base_model(architecture)
            base(input_ids=_ids(), labels=_ids())
        except Exception as error:  # the host trains no such model without an adapter either
            table[architecture] = dict.fromkeys(methods, f"{NO_MODEL}: {_in_words(error)}")
            continue
        for method in methods:
            said = _stock(question, base, architecture, method)
            if isinstance(said, str):
                table[architecture][method] = said
            else:
                stock[architecture, method] = said
    report = ptfix.apply()
    rebuilt = any(row.fix == "prefix-forward" and row.status is Status.APPLIED for row in report.rows)
    try:
        for (architecture, method), (expected, again) in stock.items():
            progress()
            model, outcome = _outcome(again, expected, exact=not rebuilt or not method.startswith("prefix"))
            misread = model is not None and rebuilt and method == "prefix_tuning" and outcome.startswith(DIFFERS)
            if misread and _stock_misreads(model):
                outcome = STOCK_MISREADS
            if outcome.startswith(DIFFERS) and table[architecture].get("prefix_tuning") == STOCK_MISREADS:
                outcome = STOCK_MISREADS  # a projection gives the same kind of prefix
            table[architecture][method] = outcome
    finally:
        ptfix.revert()
    return {architecture: {method: row[method] for method in methods} for architecture, row in table.items()}


def _ids() -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, TEXT), generator=torch.Generator().manual_seed(7))


def _stock(question: Question, base: Any, architecture: str, method: str) -> tuple[Said, Again] | str:
    """What stock says, or why there is nothing."""
    try:
        return question.ask(base, architecture, method)
    except NotInThisPair as reason:
        return f"{NO_MODEL}: {reason}"
    except Exception as error:  # whatever stock raises is the outcome
        return f"{CANNOT}: {_in_words(error)}"


def _train(model: Any, method: str) -> Said:
    """Logits, loss and gradient of one step with dropout on, with a mask of ones and without one."""
    said: Said = {}
    ids = _ids()
    model.train()
    trained = {name: p for name, p in model.prompt_encoder.named_parameters() if p.requires_grad}
    for label, mask in (("", {}), (", mask of ones", {"attention_mask": torch.ones_like(ids)})):
        torch.manual_seed(3)
        model.zero_grad()
        output = model(input_ids=ids, labels=ids, **mask, **task_ids(method, len(ids)))
        output.loss.backward()
        said["logits" + label], said["loss" + label] = output.logits.detach(), output.loss.detach()
        for name, parameter in trained.items():
            if parameter.grad is not None:
                said[f"gradient of {name}{label}"] = parameter.grad.clone()
        if not any(p.grad is not None and torch.isfinite(p.grad).all() and p.grad.any() for p in trained.values()):
            raise ValueError(f"the soft prompt has no finite gradient{label}")
    return said


def _outcome(again: Again, expected: Said, exact: bool) -> tuple[Any, str]:
    """Ask again under ptfix: the model, and how it answers. Unless `exact`, a rounding is right too."""
    try:
        model, got = again()
    except Exception as error:
        return None, f"{DIFFERS}: raises {_in_words(error)}"
    if expected.keys() != got.keys():
        return model, f"{DIFFERS}: other outputs {sorted(expected.keys() ^ got.keys())}"
    outcome = SAME
    for name, tensor in expected.items():
        if torch.equal(tensor, got[name]) or torch.equal(tensor.nan_to_num(), got[name].nan_to_num()):
            continue
        if exact or not torch.allclose(tensor, got[name], rtol=TOLERANCE, atol=TOLERANCE):
            return model, f"{DIFFERS}: {name} by {float((tensor - got[name]).abs().max()):.3g}"
        outcome = ROUNDING
    return model, outcome


def _stock_misreads(model: Any) -> bool:
    """Does a hard prompt's prefix answer as the hard prompt does under ptfix, and not without? Leaves ptfix applied."""
    prompt, ids = modes.hard_tokens(), _ids()[:1]
    base, weight = model.get_base_model(), model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        both = torch.cat((prompt, ids), 1)
        truth = base(input_ids=both, attention_mask=torch.ones_like(both)).logits[:, -1]
        weight.copy_(modes.prefix_weight(modes.keys_and_values(base, prompt)))
    return [_answers(model, ids, truth, switch) for switch in (ptfix.revert, ptfix.apply)] == [False, True]


def _answers(model: Any, ids: torch.Tensor, truth: torch.Tensor, switch: Callable[[], object]) -> bool:
    switch()
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
    except Exception:  # no answer is not the right one
        return False
    return torch.allclose(logits, truth, rtol=1e-3, atol=1e-3)


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:120]}"


def markdown(table: dict[str, dict[str, str]]) -> str:
    """One line for each architecture that has a model, then why the others have none."""
    methods = list(next(iter(table.values())))
    lines = ["| architecture | " + " | ".join(methods) + " |", "|---" * (len(methods) + 1) + "|"]
    absent, notes = [], []
    for architecture, row in table.items():
        if all(outcome.startswith(NO_MODEL) for outcome in row.values()):
            absent.append(f"- {architecture}: {row[methods[0]]}")
            continue
        lines.append(f"| {architecture} | " + " | ".join(outcome.split(":")[0] for outcome in row.values()) + " |")
        notes += [f"- {architecture}, {method}: {outcome}" for method, outcome in row.items() if outcome != SAME]
    counts = Counter(outcome.split(":")[0] for row in table.values() for outcome in row.values())
    summary = ", ".join(f"{word}: {number}" for word, number in counts.most_common())
    return "\n".join([*lines, "", summary, "", *notes, "", *absent])


def main(arguments: list[str]) -> int:
    from tqdm import tqdm

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    bar = tqdm(unit="row", mininterval=5)
    question, all_of_it = (TRUTH, ARCHITECTURES) if "--truth" in arguments else (TRAINING, zoo.architectures())
    table = judge([name for name in arguments if name != "--truth"] or all_of_it, METHODS, bar.update, question)
    bar.close()
    print(markdown(table))
    return int(any(outcome.startswith(DIFFERS) for row in table.values() for outcome in row.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
