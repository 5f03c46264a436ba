"""What an unpadded training forward says under ptfix is bit for bit what it says without: architectures x methods.

python -m tests.matrix.forward_unchanged                      # all of the installed pair, as a table in Markdown
python -m tests.matrix.forward_unchanged llama paligemma      # some
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

import ptfix
from tests.matrix import zoo
from tests.matrix.models import METHODS, VOCAB, NotInThisPair, task_ids, wrap

#: What is compared, by name.
Said = dict[str, torch.Tensor]

SAME, DIFFERS, CANNOT, NO_MODEL = "same", "differs", "cannot", "no model"
TEXT = 20  #: longer than the windows of the zoo


def judge(
    architectures: Iterable[str], methods: Iterable[str], progress: Callable[[], object] = lambda: None
) -> dict[str, dict[str, str]]:
    """``{architecture: {method: outcome}}``. Leaves ptfix reverted."""
    methods = list(methods)
    ptfix.revert()
    bases: dict[str, Any] = {}
    table: dict[str, dict[str, str]] = {}
    stock: dict[tuple[str, str], Said] = {}
    for architecture in architectures:
        progress()
        table[architecture] = {}
        try:
            base = zoo.base_model(architecture)
            _bare(base)
        except Exception as error:  # nothing that could change
            table[architecture] = dict.fromkeys(methods, f"{NO_MODEL}: {_in_words(error)}")
            continue
        bases[architecture] = base
        for method in methods:
            outcome = _attempt(base, architecture, method)
            if isinstance(outcome, str):
                table[architecture][method] = outcome
            else:
                stock[architecture, method] = outcome
    ptfix.apply()
    try:
        for (architecture, method), expected in stock.items():
            progress()
            got = _attempt(bases[architecture], architecture, method)
            difference = f"raises {got}" if isinstance(got, str) else _difference(expected, got)
            table[architecture][method] = f"{DIFFERS}: {difference}" if difference else SAME
    finally:
        ptfix.revert()
    return {architecture: {method: row[method] for method in methods} for architecture, row in table.items()}


def _ids() -> torch.Tensor:
    return torch.randint(2, VOCAB, (2, TEXT), generator=torch.Generator().manual_seed(7))


def _bare(base: Any) -> None:
    """Raises where the host has no training forward without an adapter either."""
    base(input_ids=_ids(), labels=_ids())


def _attempt(base: Any, architecture: str, method: str) -> Said | str:
    """What training said, or why it did not."""
    try:
        return _train(base, method, zoo.adapter_sizes(architecture, method))
    except NotInThisPair as reason:
        return f"{NO_MODEL}: {reason}"
    except Exception as error:  # whatever the host raises is the outcome
        return f"{CANNOT}: {_in_words(error)}"


def _train(base: Any, method: str, sizes: dict[str, int]) -> Said:
    """Logits, loss and gradient of one step with dropout on, with a mask of ones and without one."""
    said: Said = {}
    ids = _ids()
    model = wrap(base, method, **sizes).train()
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


def _difference(expected: Said, got: Said) -> str:
    """In words; empty where all bits are the same."""
    if expected.keys() != got.keys():
        return f"other outputs: {sorted(expected.keys() ^ got.keys())}"
    for name, tensor in expected.items():
        if tensor.shape != got[name].shape:
            return f"{name} of shape {tuple(got[name].shape)} instead of {tuple(tensor.shape)}"
        if not torch.equal(tensor, got[name]) and not torch.equal(tensor.nan_to_num(), got[name].nan_to_num()):
            return f"{name} by {float((tensor - got[name]).abs().max()):.3g}"
    return ""


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
    table = judge(arguments or zoo.architectures(), METHODS, bar.update)
    bar.close()
    print(markdown(table))
    return int(any(outcome.startswith(DIFFERS) for row in table.values() for outcome in row.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
