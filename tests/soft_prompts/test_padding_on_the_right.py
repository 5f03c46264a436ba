"""forward() of a left-padded batch: every output of a row is the row's alone, in the caller's order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ptfix
from ptfix.soft_prompts import caches, padding
from tests.matrix import modes
from tests.matrix.models import VIRTUAL_TOKENS

PADS = 4


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()
    torch.set_num_threads(1)
    yield
    ptfix.revert()


@pytest.fixture(params=["prompt_tuning", "prefix_tuning"])
def bench(request: pytest.FixtureRequest) -> modes.Bench:
    bench = modes.bench("llama", request.param)
    bench.base.config._attn_implementation = "eager"  # the one that returns attentions
    return bench


def forward(bench: modes.Bench, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return bench.model(*args, **kwargs)


def test_rolling_each_row_by_its_own_shift_and_back() -> None:
    rows = torch.arange(24).view(2, 4, 3)
    shifts = torch.tensor([1, 3])
    rolled = padding.roll(rows, shifts)
    assert torch.equal(rolled[0], rows[0].roll(1, 0))
    assert torch.equal(rolled[1], rows[1].roll(3, 0))
    assert torch.equal(padding.roll(rolled, -shifts), rows)
    assert torch.equal(padding.roll(rows, shifts, -1)[1], rows[1].roll(3, -1))


def test_logits_hidden_states_and_attentions_are_those_of_the_row_alone(bench: modes.Bench) -> None:
    ids, mask, rows = modes.left_padded(bench)
    options = {"output_hidden_states": True, "output_attentions": True}
    batch, alone = forward(bench, input_ids=ids, attention_mask=mask, **options), forward(bench, rows[1], **options)
    assert torch.allclose(batch.logits[1, -5:], alone.logits[0, -5:], atol=1e-4)
    for padded, row in zip(batch.hidden_states, alone.hidden_states, strict=True):
        assert torch.allclose(padded[1, -5:], row[0, -5:], atol=1e-4)
    for padded, row in zip(batch.attentions, alone.attentions, strict=True):
        assert torch.allclose(padded[1, :, -5:, -5:], row[0, :, -5:, -5:], atol=1e-4)
        # to the virtual tokens, which stand in front
        assert torch.allclose(padded[1, :, -5:, :VIRTUAL_TOKENS], row[0, :, -5:, :VIRTUAL_TOKENS], atol=1e-4)


def test_arguments_by_position_and_a_tuple_in_return(bench: modes.Bench) -> None:
    ids, mask, _ = modes.left_padded(bench)
    named = forward(bench, input_ids=ids, attention_mask=mask, labels=ids)
    loss, logits = forward(bench, ids, mask, labels=ids, return_dict=False)[:2]
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)


def test_the_logits_that_are_kept_are_the_callers_last(bench: modes.Bench) -> None:
    ids, mask, _ = modes.left_padded(bench)
    whole = forward(bench, input_ids=ids, attention_mask=mask).logits
    kept = forward(bench, input_ids=ids, attention_mask=mask, logits_to_keep=2).logits
    assert torch.equal(kept, whole[:, -2:])


def test_the_cache_in_the_outputs_can_be_continued_by_generate(bench: modes.Bench) -> None:
    ids, mask, rows = modes.left_padded(bench)
    held = caches.of(forward(bench, input_ids=ids, attention_mask=mask, use_cache=True))
    if not caches.is_cache(held):
        pytest.skip("this release returns tuples, which forward() does not keep for padded rows")
    more = torch.full((2, 3), 7)
    longer, wider = torch.cat((ids, more), 1), torch.cat((mask, torch.ones_like(more)), 1)
    out = bench.generate(input_ids=longer, attention_mask=wider, rows=2, **{caches.keyword(): held})
    for row, answer in zip(rows, out, strict=True):
        text = torch.cat((row, more[:1]), 1)
        assert torch.equal(answer[longer.shape[1] :], bench.truth(text)[0][0, text.shape[1] :])


def test_a_batch_without_left_padding_goes_to_peft_as_it_is(bench: modes.Bench) -> None:
    ids = torch.cat((bench.ids, bench.ids.flip(1)))
    right = modes.ones(ids)
    right[1, -PADS:] = 0
    for mask in (None, modes.ones(ids), right):
        with_ptfix = forward(bench, input_ids=ids, attention_mask=mask).logits
        ptfix.revert()
        try:
            stock = forward(bench, input_ids=ids, attention_mask=mask).logits
        except Exception:
            pytest.skip("this pair cannot run a prefix")
        finally:
            ptfix.apply()
        assert torch.equal(with_ptfix, stock)


def test_tensors_of_the_batch_are_not_changed(bench: modes.Bench) -> None:
    ids, mask, _ = modes.left_padded(bench)
    before = ids.clone(), mask.clone()
    forward(bench, input_ids=ids, attention_mask=mask, labels=ids)
    assert torch.equal(ids, before[0])
    assert torch.equal(mask, before[1])
