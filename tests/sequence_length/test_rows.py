"""What is seen of training rows, and what is said about them: numbers alone, no model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ptfix.sequence_length import context, judgement, rows
from ptfix.sequence_length.judgement import Plan


def made(*lengths: int, **more: Any) -> list[dict[str, Any]]:
    return [{"input_ids": list(range(1, length + 1)), **more} for length in lengths]


def seen(*lengths: int, total: int | None = None) -> rows.Rows:
    looked = rows.look(made(*lengths))
    assert looked is not None
    return looked if total is None else rows.Rows(looked.seen, total)


@pytest.mark.parametrize("total", [1, 2, 255, 256, 257, 600, 1025])
def test_each_row_is_seen_once_and_early_ones_are_from_everywhere(total: int) -> None:
    class Data(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            asked.append(index)
            return super().__getitem__(index)

    asked: list[int] = []
    looked = rows.look(Data(made(*[3] * total)), seconds=60)
    assert looked is not None
    assert looked.complete
    assert sorted(asked) == list(range(total))
    assert max(asked[:256]) >= total * 0.9 - 1


def test_it_stops_in_time() -> None:
    looked = rows.look(made(*[3] * 10_000), seconds=0)
    assert looked is not None
    assert not looked.complete


def test_numbers() -> None:
    looked = seen(*range(1, 101))
    assert (looked.longest, looked.percentile(0.99), looked.percentile(0.5)) == (100, 99, 50)
    assert looked.beyond(90) == 0.1
    assert looked.beyond(100) == 0
    assert looked.cut_at(100) == 0.01


def test_padding_is_no_text_and_packed_rows_are_many() -> None:
    (padded,) = rows.look(made(6, attention_mask=[0, 0, 1, 1, 1, 1])).seen  # type: ignore[union-attr]
    assert (padded.length, padded.width, padded.ids) == (4, 6, (3, 4, 5, 6))
    (packed,) = rows.look(made(6, position_ids=[0, 1, 2, 3, 0, 1])).seen  # type: ignore[union-attr]
    assert (packed.length, packed.width) == (4, 4)


@pytest.mark.parametrize(
    "dataset",
    [None, [], iter([1]), [1, 2], [{"text": "raw"}], [torch.zeros(3)], [("a", "b")], [{"input_ids": [[1, 2]]}]],
    ids=["nothing", "empty", "stream", "numbers", "texts", "tensors", "tuples", "nested"],
)
def test_any_class_of_data_set_is_allowed(dataset: Any) -> None:
    assert rows.look(dataset) is None


def test_a_collator_that_fails_is_not_in_the_way() -> None:
    def collate(batch: list[Any]) -> Any:
        raise ValueError("needs two rows")

    looked = rows.look(made(5), collate)
    assert looked is not None
    assert looked.longest == 5


LLAMA = context.read({"model_type": "llama", "max_position_embeddings": 64})
GPT2 = context.read({"model_type": "gpt2", "n_positions": 64})


def told(**plan: Any) -> tuple[int, int]:
    """How many errors and warnings."""
    found = judgement.judge(Plan(**{"context": LLAMA, "own": None, "rows": seen(9), **plan}))
    return len(found.errors), len(found.warnings)


def test_a_length_that_no_row_has_is_no_problem_where_all_rows_were_seen() -> None:
    """A library's default of 1024 over short rows says nothing; with rows unseen, it may let a longer one through."""
    assert told(context=GPT2, rows=seen(9), max_length=64, virtual_tokens=8) == (0, 0)
    assert told(context=GPT2, rows=seen(9, total=5), max_length=64, virtual_tokens=8)[0] == 0
    found = judgement.judge(Plan(GPT2, None, seen(9, total=5), 8, 64))
    assert "not every row could be looked at" in found.warnings[0]
    assert told(context=GPT2, rows=seen(9), max_length=57, virtual_tokens=8, max_length_is_promised=True)[0] == 1
    assert told(context=GPT2, rows=seen(9), max_length=56, virtual_tokens=8, max_length_is_promised=True)[0] == 0


def test_virtual_tokens_leave_no_room() -> None:
    assert told(context=GPT2, rows=None, virtual_tokens=64)[0] == 1
    assert told(context=GPT2, rows=None, virtual_tokens=63)[0] == 0
    assert told(context=LLAMA, rows=None, virtual_tokens=640)[0] == 0


def test_all_rows_of_one_length_are_packed_unless_it_is_known_that_they_are_not() -> None:
    assert told(rows=seen(20, 20, 20), max_length=20) == (0, 0)
    assert told(rows=seen(20, 20, 20), max_length=20, packed=True) == (0, 0)
    assert told(rows=seen(20, 20, 20), max_length=20, packed=False) == (0, 1)


def test_a_pack_is_longer_than_its_rows() -> None:
    assert told(max_length=1024, packed=True, max_length_is_promised=False) == (0, 0)
    assert told(max_length=1024, packed=False) == (0, 1)


def test_doubts_are_told_only_where_they_matter() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    doubtful = context.read({"model_type": "llama", "max_position_embeddings": 64, "rope_scaling": yarn})
    assert told(context=doubtful, rows=seen(64)) == (0, 0)
    assert told(context=doubtful, rows=seen(65)) == (0, 1)
