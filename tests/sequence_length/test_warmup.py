"""Batches cut to a length: every per-token tensor alike, no token of a row moved against its label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ptfix.sequence_length import warmup
from tests.matrix.models import base_model

WIDTH = 12


def batch(lengths: list[int], side: str = "right", width: int = WIDTH) -> dict[str, Any]:
    """Rows of distinct tokens, so that a token tells its row and its place; the labels are the tokens."""
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(width - length, width)
        ids[row, at] = torch.arange(1, length + 1) + 100 * (row + 1)
        mask[row, at] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def texts(cut: Any) -> list[list[int]]:
    return [row[real.bool()].tolist() for row, real in zip(cut["input_ids"], cut["attention_mask"], strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncate_keeps_the_beginning_of_each_row(side: str) -> None:
    cut = warmup.truncated(batch([12, 3, 7], side), 5)
    assert cut["input_ids"].shape == (3, 5)
    assert texts(cut) == [[101, 102, 103, 104, 105], [201, 202, 203], [301, 302, 303, 304, 305]]
    assert torch.equal(cut["labels"], cut["input_ids"].masked_fill(cut["attention_mask"] == 0, -100))


@pytest.mark.parametrize("side", ["left", "right"])
@settings(deadline=None)  # a busy machine is no fault
@given(lengths=st.lists(st.integers(2, WIDTH), min_size=1, max_size=4), length=st.integers(2, WIDTH))
def test_segments_are_the_same_tokens_in_more_rows(side: str, lengths: list[int], length: int) -> None:
    whole = batch(lengths, side)
    cut = warmup.segmented(dict(whole), length)
    # A single token predicts nothing: that piece has nothing to learn from, and is dropped.
    expected = [text[at : at + length] for text in texts(whole) for at in range(0, len(text), length)]
    assert texts(cut) == [piece for piece in expected if len(piece) > 1]
    if max(lengths) > length:
        assert cut["input_ids"].shape[1] == length
    assert torch.equal(cut["labels"], cut["input_ids"].masked_fill(cut["attention_mask"] == 0, -100))


@pytest.mark.parametrize("cut", [warmup.truncated, warmup.segmented])
def test_a_batch_that_fits_is_left_alone(cut: Any) -> None:
    whole = batch([4, 6])
    assert cut(whole, WIDTH) is whole


def test_everything_per_token_is_cut_and_what_is_per_row_follows_its_row() -> None:
    whole = batch([12, 12])
    whole["labels"][0, :6] = -100  # row 0 has nothing to learn within 5 tokens
    whole |= {
        "weights": torch.arange(24.0).reshape(2, 12),
        "states": torch.arange(48.0).reshape(2, 12, 2),
        "mask_4d": torch.ones(2, 1, 12, 12).tril(),
        "position_ids": torch.arange(12).expand(3, 2, 12),
        "task_ids": torch.tensor([7, 8]),
        "names": ["a", "b"],
        "temperature": torch.tensor(0.5),
    }
    cut = warmup.truncated(dict(whole), 5)
    assert texts(cut) == [[201, 202, 203, 204, 205]]
    assert cut["weights"].tolist() == [[12, 13, 14, 15, 16]]
    assert torch.equal(cut["states"], whole["states"][1:, :5])
    assert torch.equal(cut["mask_4d"], whole["mask_4d"][1:, :, :5, :5])
    assert torch.equal(cut["position_ids"], whole["position_ids"][:, 1:, :5])
    assert (cut["task_ids"].tolist(), cut["names"], float(cut["temperature"])) == ([8], ["b"], 0.5)


@pytest.mark.parametrize(("masked", "expected"), [(10, [108, 109, 110, 111, 112]), (6, [106, 107, 108, 109, 110])])
def test_a_batch_never_loses_its_last_label(masked: int, expected: list[int]) -> None:
    whole = batch([12])
    whole["labels"][:, :masked] = -100
    assert texts(warmup.truncated(whole, 5)) == [expected]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_label_of_a_text_s_first_token_is_none_to_cut_around(side: str) -> None:
    """Only padding comes before it, which predicts nothing; the next label lies beyond the window."""
    whole = batch([10], side)
    labelled = whole["labels"].clone()
    whole["labels"].fill_(-100)
    for token in (101, 110):
        whole["labels"][labelled == token] = token
    cut = warmup.truncated(whole, 5)
    assert texts(cut) == [[106, 107, 108, 109, 110]]
    assert cut["labels"].tolist() == [[-100, -100, -100, -100, 110]]


@pytest.mark.parametrize("cut", [warmup.truncated, warmup.segmented])
@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_length_at_which_nothing_is_predicted_is_refused(cut: Any, length: int) -> None:
    with pytest.raises(warmup.CannotCut, match="no token predicts"):
        cut(batch([12, 12]), length)


@pytest.mark.parametrize("odd", [("a", "b"), torch.zeros(2, 12), None])
def test_a_batch_that_is_no_mapping_is_refused_and_not_counted(odd: Any) -> None:
    with pytest.raises(warmup.CannotCut, match=f"the batch is a {type(odd).__name__}"):
        warmup.truncated(odd, 5)
    assert warmup.tokens(odd) == (0, 0)


def test_a_row_shorter_than_the_window_keeps_its_padding_on_its_side() -> None:
    cut = warmup.truncated(batch([12, 3], "left"), 5)
    assert cut["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_of_padding_alone_stays_in_a_batch_without_labels(side: str) -> None:
    whole = batch([12, 0], side)
    del whole["labels"]
    for cut, rows in ((warmup.truncated, 2), (warmup.segmented, 4)):
        assert cut(dict(whole), 5)["attention_mask"].tolist()[-1] == [0] * 5
        assert len(cut(dict(whole), 5)["input_ids"]) == rows


def test_a_short_row_without_a_label_beside_one_that_is_cut_around_its_own() -> None:
    whole = batch([12, 3])
    whole["labels"][0, :10] = whole["labels"][1] = -100
    assert texts(warmup.truncated(whole, 5)) == [[108, 109, 110, 111, 112]]


@pytest.mark.parametrize("cut", [warmup.truncated, warmup.segmented])
def test_a_batch_without_any_label_is_cut_too(cut: Any) -> None:
    whole = batch([12, 12])
    whole["labels"][:] = -100
    assert cut(whole, 5)["labels"].shape[1] == 5


def test_labels_of_whole_rows_and_what_counts_no_rows_are_left_alone() -> None:
    whole = {**batch([12, 12]), "labels": torch.tensor([0, 1]), "names": ("a", "b"), "tags": ["x", "y", "z"]}
    cut = warmup.segmented(whole, 6)
    assert (cut["labels"].tolist(), cut["names"]) == ([0, 0, 1, 1], ["a", "a", "b", "b"])
    assert cut["tags"] == ["x", "y", "z"]


def test_an_attention_mask_of_queries_and_keys_says_nothing_of_padding() -> None:
    whole = {**batch([12, 12]), "attention_mask": torch.ones(2, 1, 12, 12).tril()}
    cut = warmup.truncated(dict(whole), 5)
    assert torch.equal(cut["attention_mask"], whole["attention_mask"][:, :, :5, :5])
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :5])
    assert warmup.tokens(whole) == (12, 24)


def test_tokens_are_counted_without_padding() -> None:
    assert warmup.tokens(batch([12, 3])) == (12, 15)
    assert warmup.tokens({"input_ids": torch.zeros(2, 7)}) == (7, 14)
    assert warmup.tokens({"labels": torch.zeros(2, 7)}) == (0, 0)


def test_packed_rows_keep_the_positions_of_each_text() -> None:
    whole = batch([12])
    del whole["attention_mask"]
    whole["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
    assert warmup.truncated(dict(whole), 9)["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1]]
    assert warmup.segmented(dict(whole), 5)["position_ids"].tolist()[:2] == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]


@pytest.mark.parametrize("kind", ["2d", "bool", "additive"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_model_reads_in_a_piece_what_it_reads_in_the_piece_alone(side: str, kind: str) -> None:
    """The truth: the logits of each piece as a row of its own, without a mask, padding or position_ids."""
    model = base_model("llama")
    if kind != "2d":
        try:
            model(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.zeros(1, 1, 3, 3))
        except ValueError:
            pytest.skip("this release takes no 4-D masks: pip install 'transformers>=4.38'")
    lengths = [12, 7]
    whole = batch(lengths, side)
    whole["input_ids"] %= 61
    positions = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    if kind != "2d":
        seen = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril() & whole["attention_mask"].bool()[:, None, None]
        seen = seen | torch.eye(WIDTH, dtype=torch.bool)  # a query that sees nothing is 0/0
        least = torch.finfo(torch.float32).min
        whole["mask_4d"] = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, least)
    cut = warmup.segmented({**whole, "position_ids": positions}, 5)
    mask = cut["mask_4d"] if "mask_4d" in cut else cut["attention_mask"]
    if kind == "bool":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert int(cut["position_ids"].max()) < 5
    with torch.no_grad():
        logits = model(cut["input_ids"], attention_mask=mask, position_ids=cut["position_ids"]).logits
        assert len(logits) == 5
        for row, real in enumerate(cut["attention_mask"].bool()):
            alone = model(cut["input_ids"][row][real][None]).logits[0]
            torch.testing.assert_close(logits[row][real], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 5, 12])}, "cu_seqlens"),
        ({"pixel_values": torch.zeros(2, 3, 4, 4)}, "images"),
        ({"chosen_input_ids": torch.zeros(2, 12)}, "preference pairs"),
        ({"strange": torch.zeros(5, 12)}, r"strange \[5, 12\] does not fit input_ids \[2, 12\]"),
    ],
)
@pytest.mark.parametrize("cut", [warmup.truncated, warmup.segmented])
def test_what_cannot_be_cut_is_refused_and_order_named(cut: Any, extra: dict[str, Any], words: str) -> None:
    with pytest.raises(warmup.CannotCut, match=f"{words}.*mode='order'"):
        cut({**batch([12, 12]), **extra}, 5)


def test_a_batch_without_rows_of_tokens_is_refused() -> None:
    with pytest.raises(warmup.CannotCut, match="no input_ids"):
        warmup.truncated({"labels": torch.zeros(2)}, 5)


def test_the_order_is_short_to_long_each_row_once_and_depends_on_the_seed_alone() -> None:
    lengths = [5, 3, 9, 3, 3, 5, 1, 3]
    order = list(warmup.ShortToLong(lengths, 0))
    assert sorted(order) == list(range(8))
    assert [lengths[row] for row in order] == sorted(lengths)
    assert order == list(warmup.ShortToLong(lengths, 0))
    assert any(order != list(warmup.ShortToLong(lengths, seed)) for seed in range(1, 9))


def test_lengths_of_rows_pairs_and_a_length_column() -> None:
    assert warmup.lengths([{"input_ids": [1, 2, 3]}, {"input_ids": [1]}]) == [3, 1]
    assert warmup.lengths([{"chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1]}]) == [3]

    class Columns(list):  # type: ignore[type-arg]  # what a datasets.Dataset offers
        column_names = ("length",)

        def __getitem__(self, key: Any) -> Any:
            return [4, 2] if key == "length" else super().__getitem__(key)

    assert warmup.lengths(Columns([{}, {}])) == [4, 2]


def test_a_dataset_that_cannot_be_sorted_is_refused() -> None:
    with pytest.raises(ValueError, match="mode='truncate'"):
        warmup.lengths(iter([]))
    with pytest.raises(ValueError, match="length_column_name"):
        warmup.lengths([{"text": "hello"}])


def test_lists_follow_their_rows_wherever_they_stand_and_others_stay() -> None:
    whole = {"names": ["a", "b"], "about": ["all of it"], "word": "ab", **batch([12, 8])}
    cut: Any = warmup.segmented(whole, 4)
    assert cut["names"] == ["a", "a", "a", "b", "b"]
    assert (cut["about"], cut["word"]) == (["all of it"], "ab")


def test_without_labels_no_piece_is_lost_and_none_is_padding_alone() -> None:
    whole = batch([12, 9, 4])
    del whole["labels"]
    assert [len(text) for text in texts(warmup.segmented(whole, 4))] == [4, 4, 4, 4, 4, 1, 4]


@pytest.mark.parametrize("start", [0, 1])
def test_positions_of_the_text_start_at_zero_whatever_those_of_its_padding_are(start: int) -> None:
    """Counted from the padding on, and, as some models do, from 1 behind padding at 0."""
    whole = batch([3, 12], "left")
    behind = (whole["attention_mask"].cumsum(-1) - 1 + start) * whole["attention_mask"]
    whole["position_ids"] = torch.arange(WIDTH).repeat(2, 1) if start == 0 else behind
    cut: Any = warmup.truncated(whole, 5)
    real = cut["attention_mask"].bool()
    positions = cut["position_ids"]
    assert [row[held].tolist() for row, held in zip(positions, real, strict=True)] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    assert positions.max() < 5
