"""What is seen of training rows, and what is said about them: numbers alone, no model."""

from __future__ import annotations

import random
from typing import Any

import numpy
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


class Odd(list[Any]):
    """A list of rows of which some raise."""

    def __init__(self, rows: list[Any], *unreadable: int) -> None:
        super().__init__(rows)
        self.unreadable = unreadable

    def __getitem__(self, index: Any) -> Any:
        if index in self.unreadable:
            raise OSError(f"block {index} is bad")
        return super().__getitem__(index)


def test_rows_that_cannot_be_read_are_named_and_the_others_looked_at() -> None:
    looked = rows.look(Odd(made(3, 4, 5, 6), 0, 2))
    assert looked is not None
    assert looked.fault == "2 of 4 training rows could not be read, row 0 with OSError: block 0 is bad"
    assert [row.length for row in looked.seen] == [4, 6]
    assert not looked.complete
    looked = rows.look(Odd(made(3, 4), 0, 1))
    assert looked is not None
    assert looked.seen == ()
    assert rows.look(made(3)).fault is None  # type: ignore[union-attr]


def test_a_data_set_that_does_not_know_its_length_is_named() -> None:
    class Endless(list[Any]):
        def __len__(self) -> int:
            raise RuntimeError("not known yet")

    looked = rows.look(Endless(made(3)))
    assert looked is not None
    assert looked.fault is not None
    assert "RuntimeError: not known yet" in looked.fault


def test_a_stream_that_knows_its_length_is_not_used_up() -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc]
        def __len__(self) -> int:
            return 3

        def __iter__(self) -> Any:
            raise AssertionError("used up")

    assert rows.look(Stream()) is None


def test_the_label_of_a_whole_row_is_none_of_its_tokens() -> None:
    (row,) = rows.look(made(5, labels=1)).seen  # type: ignore[union-attr]
    assert (row.length, row.masked) == (5, False)
    (row,) = rows.look(made(5, labels=torch.tensor(-100))).seen  # type: ignore[union-attr]
    assert not row.masked


def test_nothing_that_draws_random_numbers_is_disturbed() -> None:
    class Draws(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            drawn.append((random.random(), numpy.random.rand(), float(torch.rand(()))))
            if len(drawn) == 3:
                raise OSError("also not by a row that cannot be read")
            return super().__getitem__(index)

    drawn: list[Any] = []
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    expected = random.random(), numpy.random.rand(), float(torch.rand(()))
    for seed in (random.seed, numpy.random.seed, torch.manual_seed):
        seed(0)
    rows.look(Draws(made(3, 4, 5, 6)))
    assert drawn[0] == expected
    assert len(set(drawn)) == 4
    assert (random.random(), numpy.random.rand(), float(torch.rand(()))) == expected


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


def test_nearly_all_rows_of_one_length_are_packed_too() -> None:
    """The last row of a packed data set is shorter; where one row in ten is, they were cut."""
    assert told(rows=seen(*[20] * 19, 9), max_length=20) == (0, 0)
    assert told(rows=seen(*[20] * 18, 9, 9), max_length=20) == (0, 1)
    assert told(rows=seen(*[20] * 19, 9), max_length=20, packed=False) == (0, 1)


def test_from_a_part_of_the_rows_no_error_follows() -> None:
    labels = {"labels": [-100] * 9}
    for total, expected in ((3, (1, 0)), (4, (0, 1))):
        looked = rows.look(made(9, 9, 9, **labels))
        assert looked is not None
        assert told(rows=rows.Rows(looked.seen, total)) == expected
        assert told(context=GPT2, rows=seen(70, 70, 70, total=total)) == expected
    assert "3 rows looked at (of 4)" in judgement.judge(Plan(GPT2, None, seen(70, 9, 9, total=4))).warnings[0]


def test_a_row_too_long_is_an_error_where_the_run_is_sure_to_come_to_it() -> None:
    assert told(context=GPT2, rows=seen(70, 9)) == (1, 0)
    assert told(context=GPT2, rows=seen(70, 9), takes_every_row=False) == (0, 1)
    assert told(context=GPT2, rows=seen(70, 65), takes_every_row=False) == (1, 0)


def test_a_pack_is_longer_than_its_rows() -> None:
    assert told(max_length=1024, packed=True, max_length_is_promised=False) == (0, 0)
    assert told(max_length=1024, packed=False) == (0, 1)


def test_doubts_are_told_only_where_they_matter() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    doubtful = context.read({"model_type": "llama", "max_position_embeddings": 64, "rope_scaling": yarn})
    assert told(context=doubtful, rows=seen(64)) == (0, 0)
    assert told(context=doubtful, rows=seen(65)) == (0, 1)
