"""The installed pair, with ptfix: every mode of generating and training equals the adapter's own training forward."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

import ptfix
from tests.matrix import modes
from tests.matrix.models import ARCHITECTURES, METHODS, NotInThisPair

PAIRS = [(architecture, method) for architecture in ARCHITECTURES for method in ("prompt_tuning", "prefix_tuning")]
PAIRS += [(architecture, method) for architecture in ("llama", "gpt2") for method in METHODS]


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()
    torch.set_num_threads(1)
    yield
    ptfix.revert()


@functools.cache
def host_outcomes(architecture: str) -> dict[str, str]:
    host = modes.bare(architecture)
    return {mode: modes.judge(mode, host) for mode in modes.MODES}


@pytest.mark.parametrize(("architecture", "method"), sorted(set(PAIRS)))
def test_every_mode_is_exact(architecture: str, method: str) -> None:
    try:
        can = host_outcomes(architecture)
        bench = modes.bench(architecture, method)
    except NotInThisPair as reason:
        pytest.skip(str(reason))
    outcomes = {mode: modes.judge(mode, bench) for mode in modes.MODES}
    faults = {
        mode: outcome
        for mode, outcome in outcomes.items()
        if outcome not in ("exact", "none") and modes.host_can(can, mode)
    }
    assert not faults
    assert "exact" in outcomes.values()
