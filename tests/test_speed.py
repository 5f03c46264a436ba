"""The ways to generate, raced on a tiny model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ptfix
from ptfix import speed
from tests.matrix.models import base_model

PROMPT_IDS, INPUT_IDS = torch.tensor([3, 1, 4]), torch.tensor([[5, 9, 2, 6]])
IDS = torch.zeros(1, 3, dtype=torch.long)


@pytest.fixture(autouse=True)
def _stock_again() -> Iterator[None]:
    yield
    ptfix.revert()


def lap(*times: float) -> speed.Lap:
    return speed.Lap(times, times[-1], IDS)


def ways(new_tokens: int) -> dict[str, Any]:
    base = base_model("llama")
    model = speed.untrained(base, PROMPT_IDS)
    truths = [
        speed.truth(base, speed.with_virtual(PROMPT_IDS, INPUT_IDS), new_tokens),
        speed.truth(model, INPUT_IDS, new_tokens),
    ]
    return {way.name: way for way in speed.ways(base, model, PROMPT_IDS, INPUT_IDS, *truths)}


def test_the_untrained_soft_prompt_says_what_its_tokens_say() -> None:
    racing = [way for way in ways(6).values() if way.fixed or way.name in (speed.LIMIT, speed.LIMIT_UNCACHED)]
    laps, errors = speed.race(racing, 6, 1)
    assert not errors
    said = [found.ids for (found,) in laps.values()]
    assert len(said) == 4
    assert all(ids.equal(said[0]) for ids in said)
    for (found,) in laps.values():
        assert found.agreement is not None
        assert found.agreement.agrees
        assert found.agreement.diverges_at is None
        assert found.agreement.dlogit < 1e-3
        assert len(found.times) == 6
        assert sorted(found.times) == list(found.times)
        assert 0 < found.prefill < found.times[-1] <= found.total


def test_another_text_is_seen_where_it_begins_and_by_how_much() -> None:
    way = ways(6)[speed.FIXED]
    assert way.truth is not None
    for changed in range(6):
        ids, logits = way.truth.ids.clone(), way.truth.logits.clone()
        ids[0, changed] += 1
        logits[0, changed:] += 2.0
        laps, _ = speed.race([dataclasses.replace(way, truth=speed.Truth(ids, logits))], 6, 1)
        found = laps[speed.FIXED][0].agreement
        assert found is not None
        assert found.diverges_at == changed + 1
        assert found.dlogit == pytest.approx(2.0, abs=1e-3)
        assert not found.agrees


def test_other_logits_are_no_agreement_though_the_tokens_are_the_same() -> None:
    way = ways(4)[speed.FIXED]
    assert way.truth is not None
    way = dataclasses.replace(way, truth=speed.Truth(way.truth.ids, way.truth.logits + 0.1))
    (found,) = speed.race([way], 4, 1)[0][speed.FIXED]
    assert found.agreement is not None
    assert (found.agreement.diverges_at, found.agreement.agrees) == (None, False)


def test_other_tokens_are_no_agreement_though_the_logits_are_the_same() -> None:
    way = ways(4)[speed.FIXED]
    assert way.truth is not None
    ids = way.truth.ids.clone()
    ids[0, -1] += 1
    way = dataclasses.replace(way, truth=speed.Truth(ids, way.truth.logits))
    (found,) = speed.race([way], 4, 1)[0][speed.FIXED]
    assert found.agreement is not None
    assert (found.agreement.diverges_at, found.agreement.agrees) == (4, False)
    assert found.agreement.dlogit < 1e-3


def test_a_text_that_ends_early_is_no_agreement() -> None:
    way = ways(6)[speed.FIXED]
    assert way.truth is not None
    end = int(way.truth.ids[0, 1])
    way = dataclasses.replace(way, options={"eos_token_id": end})
    (found,) = speed.race([way], 6, 1)[0][speed.FIXED]
    assert found.agreement is not None
    assert not found.agreement.agrees


def test_a_way_that_raises_is_an_outcome_and_the_others_go_on() -> None:
    racing = ways(4)
    broken = dataclasses.replace(racing[speed.STOCK], name="broken", options={"no_such_option": 1})
    told: list[str] = []
    laps, errors = speed.race([broken, racing[speed.FIXED]], 4, 2, progress=told.append)
    assert "no_such_option" in errors["broken"]
    assert len(laps[speed.FIXED]) == 2
    assert "broken" not in laps
    assert told == ["broken", speed.FIXED] * 3


def test_ratios_are_taken_round_by_round() -> None:
    laps = {"fast": [lap(1, 2, 3), lap(2, 3, 6)], "slow": [lap(2, 4, 9), lap(4, 6, 6)]}
    assert speed.ratios(laps, "fast", "slow", lambda one: one.tokens_per_second) == [3, 1]
    assert speed.speedup(laps, "fast", "slow") == [(2, 2, 2), (2, 2, 2), (2, 1, 3)]
