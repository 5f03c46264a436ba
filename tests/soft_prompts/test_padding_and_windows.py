"""Left-padded batches longer than a sliding window, in the ways of generating that meet both: every row as alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ptfix
from tests.matrix import modes
from tests.matrix.models import NotInThisPair


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()
    torch.set_num_threads(1)
    yield
    ptfix.revert()


@pytest.fixture(params=["prefix_tuning", "prompt_tuning"])
def bench(request: pytest.FixtureRequest) -> modes.Bench:
    try:
        if modes.judge("output_scores", modes.bare("gemma2")) != "exact":
            pytest.skip("this release's own gemma2 is not exact with a cache")
        return modes.bench("gemma2", request.param)
    except NotInThisPair as reason:
        pytest.skip(str(reason))


def rows_as_alone(bench: modes.Bench, ids: torch.Tensor, rows: list[torch.Tensor], out: Any) -> None:
    for row, sequence in zip(rows, out, strict=True):
        assert sequence[ids.shape[1] :].tolist() == bench.truth(row)[0][0, row.shape[1] :].tolist()


@pytest.mark.parametrize(
    "options",
    [{"use_cache": False}, {"prefill_chunk_size": 2}, {"prefill_chunk_size": 7}],
    ids=lambda options: "-".join(map(str, *options.items())),
)
def test_a_padded_row_beyond_the_window_is_as_alone(bench: modes.Bench, options: dict[str, Any]) -> None:
    if "prefill_chunk_size" in options and modes.judge("chunked_prefill", modes.bare("gemma2")) != "exact":
        pytest.skip("this release cannot prefill gemma2 in chunks")
    ids, mask, rows = modes.left_padded(bench, torch.cat((bench.ids, bench.ids.flip(1)), 1))
    rows = [rows[0], rows[1][:, -3:]]  # alone, its prefix stands within the window; behind this padding's it would not
    ids[1, :-3] = mask[1, :-3] = 0
    rows_as_alone(bench, ids, rows, bench.generate(input_ids=ids, attention_mask=mask, rows=2, **options))


def test_positions_given_by_the_user_go_with_their_tokens(bench: modes.Bench) -> None:
    ids, mask, rows = modes.left_padded(bench)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    out = bench.generate(input_ids=ids, attention_mask=mask, position_ids=position_ids, rows=2, max_new_tokens=1)
    for row, sequence in zip(rows, out, strict=True):
        assert sequence[-1] == bench.logits(row).argmax()


def test_a_second_turn_reads_the_prefix_that_the_first_put_behind_padding(bench: modes.Bench) -> None:
    if modes.judge("multi_turn", modes.bare("gemma2")) != "exact":
        pytest.skip("this release cannot continue gemma2's cache")
    ids, mask, rows = modes.left_padded(bench)
    first = bench.generate(input_ids=ids, attention_mask=mask, rows=2, return_dict_in_generate=True)
    more = torch.full((2, 2), 7)
    ids = torch.cat((first.sequences, more), 1)
    rows = [
        torch.cat((row, said[None, -modes.NEW :], more[:1]), 1) for row, said in zip(rows, first.sequences, strict=True)
    ]
    mask = torch.cat((mask, mask.new_ones(2, modes.NEW + 2)), 1)
    out = bench.generate(input_ids=ids, attention_mask=mask, rows=2, past_key_values=first.past_key_values)
    rows_as_alone(bench, ids, rows, out)


def test_the_cache_is_its_own_class_again(bench: modes.Bench) -> None:
    ids, mask, _ = modes.left_padded(bench)
    options: dict[str, Any] = {"return_dict_in_generate": True, "rows": 2, "attention_mask": mask}
    kinds = {type(bench.generate(input_ids=ids, **options).past_key_values) for _ in range(2)}
    assert len(kinds) == 1
    kind = kinds.pop()
    assert not any("update" in vars(base) and "<locals>" in base.update.__qualname__ for base in kind.__mro__)
