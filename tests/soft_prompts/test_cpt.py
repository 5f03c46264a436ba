"""CPT as its notebook uses it: its collator's batch, adapters of any name, the same batch in each epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ptfix
from ptfix.soft_prompts.proof import reference
from tests.matrix import models
from tests.matrix.models import NotInThisPair


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()
    yield
    ptfix.revert()


def made(name: str = "default") -> Any:
    try:
        return models.wrap(models.base_model("llama"), "cpt", name=name)
    except NotInThisPair as reason:
        pytest.skip(str(reason))


def batch() -> dict[str, torch.Tensor]:
    """What the collator makes of a short and a long row, padded on the left."""
    ids = torch.tensor([[0, 0, 0, 5, 9, 3], [17, 23, 11, 42, 7, 8]])
    mask = (ids != 0).long()
    types = torch.tensor([[0, 0, 0, 1, 2, 4], [1, 2, 2, 3, 4, 4]])
    return {"input_ids": ids, "attention_mask": mask, "input_type_mask": types}


@pytest.mark.parametrize("name", ["default", "mine"])
def test_generate_takes_the_collators_batch(name: str) -> None:
    model, given = made(name), batch()
    new = model.generate(**given, max_new_tokens=3, do_sample=False, pad_token_id=0)[:, 6:]
    for row, mask, got in zip(given["input_ids"], given["attention_mask"], new, strict=True):
        true, _ = reference.greedy(model, row[mask != 0][None], 3)
        assert got.tolist() == true[0, -3:].tolist()


def test_the_loss_is_the_same_by_any_name_and_leaves_the_batch_as_it_is() -> None:
    losses = []
    for name in ("default", "mine"):
        model, given = made(name), batch()
        kept = given["input_type_mask"].clone()
        for _ in range(2):
            losses.append(model(**given, labels=given["input_ids"]).loss.item())
            assert torch.equal(given["input_type_mask"], kept)
    assert len(set(losses)) == 1


def test_the_loss_of_the_default_adapter_is_the_hosts_own() -> None:
    model, given = made(), batch()
    given["attention_mask"] = torch.ones_like(given["input_ids"])  # stock moves the text of a padded row
    ours = model(**given, labels=given["input_ids"]).loss
    ptfix.revert()
    assert torch.equal(ours, model(**given, labels=given["input_ids"]).loss)


def test_the_settings_are_those_of_the_active_adapter() -> None:
    """Stock reads those of whichever adapter is called 'default'."""
    model, given = made(), batch()
    given["input_type_mask"][1] = torch.tensor([1, 4, 2, 8, 3, 12])  # answers of three examples
    config = models.adapter_config("cpt")
    config.opt_loss_decay_factor = 0.1
    model.add_adapter("mine", config)
    model.set_adapter("mine")
    with torch.no_grad():
        for mine, default in zip(
            model.prompt_encoder["mine"].parameters(), model.prompt_encoder["default"].parameters(), strict=True
        ):
            mine.copy_(default)
    losses = {}
    for name in ("default", "mine"):
        model.set_adapter(name)
        losses[name] = model(**given, labels=given["input_ids"]).loss.item()
    assert losses["mine"] != pytest.approx(losses["default"])
