"""ptfix leaves a training forward without padding alone: what it says is stock's to the last bit, save where stock does
not hold a prefix as its models read it (see `forward_unchanged`)."""

from __future__ import annotations

import pytest
import torch

from tests.matrix import forward_unchanged, zoo
from tests.matrix.forward_unchanged import CANNOT, DIFFERS, NO_MODEL, SAME, TRUTH
from tests.matrix.models import ARCHITECTURES, METHODS

PARTS = 4  #: so that several workers can share them


@pytest.mark.parametrize("part", range(PARTS))
def test_every_architecture_trains_as_stock_does(part: int) -> None:
    torch.set_num_threads(1)
    table = forward_unchanged.judge(zoo.architectures()[part::PARTS], METHODS)
    outcomes = {f"{name}, {method}": outcome for name, row in table.items() for method, outcome in row.items()}
    assert not {what: outcome for what, outcome in outcomes.items() if outcome.startswith(DIFFERS)}
    prompt_tuning = {name: row["prompt_tuning"] for name, row in table.items()}
    assert not {name for name in zoo.WELL_KNOWN if prompt_tuning.get(name, SAME) != SAME}
    assert sum(outcome.startswith(NO_MODEL) for outcome in prompt_tuning.values()) < len(table) / 2


def test_the_truth_of_the_matrix_is_stocks_wherever_stock_has_one() -> None:
    torch.set_num_threads(1)
    table = forward_unchanged.judge(ARCHITECTURES, METHODS, question=TRUTH)
    outcomes = {f"{name}, {method}": outcome for name, row in table.items() for method, outcome in row.items()}
    assert not {what: outcome for what, outcome in outcomes.items() if outcome.startswith(DIFFERS)}
    embedded = {what: outcome for what, outcome in outcomes.items() if "prefix" not in what}
    stocks_own = {what: outcome for what, outcome in embedded.items() if not outcome.startswith((CANNOT, NO_MODEL))}
    assert set(stocks_own.values()) == {SAME}, "an embedded prompt is never rounded otherwise"
    assert {"llama, prompt_tuning", "gpt2, prompt_tuning"} <= set(stocks_own)
