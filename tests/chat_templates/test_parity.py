"""One real training row against what inference will read, and the callback that looks at the first batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

import ptfix
from ptfix.callbacks import ChatTemplateError
from ptfix.chat_templates import parity
from tests.chat_templates import stories
from tests.chat_templates.stories import EOT, HEADER, TRAINING


@pytest.fixture(autouse=True)
def _applied() -> Iterator[None]:
    ptfix.apply()
    yield
    ptfix.revert()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = stories.tokenizer()
    made.chat_template = TRAINING
    return made


def row(tokenizer: Any, prompt: str, answer: str, apart: bool = True) -> tuple[list[int], list[int]]:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if apart:
        return ids(prompt) + ids(answer), [-100] * len(ids(prompt)) + ids(answer)
    whole = ids(prompt + answer)
    masked = len(ids(prompt)) - 1  # a token that begins in the prompt and ends in the answer is trained on
    return whole, [-100] * masked + whole[masked:]


def judge(tokenizer: Any, made: tuple[list[int], list[int]], prompt: str | None = HEADER, stops: Any = None) -> Any:
    return parity.judge(*made, tokenizer, prompt, [tokenizer.eos_token_id] if stops is None else stops)


PROMPT = f"{stories.BOS}{stories.START}user{stories.END}\n\nHello{EOT}{HEADER}"


def test_a_right_row_is_right(tokenizer: Any) -> None:
    found = judge(tokenizer, row(tokenizer, PROMPT, f"I am{EOT}"))
    assert found == parity.Parity((), tokenizer.eos_token_id)


def test_a_row_without_mask_is_compared_where_the_header_stands(tokenizer: Any) -> None:
    ids, _ = row(tokenizer, PROMPT, f"I am{EOT}")
    assert judge(tokenizer, (ids, ids)).problems == ()
    (problem,) = judge(tokenizer, (ids, ids), "<|im_start|>assistant\n").problems
    assert "does not contain" in problem


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ((f"{stories.BOS}{PROMPT}", f"I am{EOT}"), "twice"),
        ((PROMPT.removesuffix("\n\n"), f"\n\nI am{EOT}"), "white space"),
        ((PROMPT.removesuffix(HEADER), f"{HEADER}I am{EOT}"), "training starts an answer after"),
    ],
)
def test_a_wrong_row_is_named(tokenizer: Any, made: tuple[str, str], words: str) -> None:
    (problem,) = judge(tokenizer, row(tokenizer, *made)).problems
    assert words in problem


def test_a_token_across_the_boundary_is_named(tokenizer: Any) -> None:
    whole = tokenizer("count to three", add_special_tokens=False)["input_ids"]
    prompt = "count to th"  # which ends within a token of the whole text
    found = parity.judge(whole, whole, tokenizer, prompt, [])
    assert any("reaches across" in problem for problem in found.problems)


def test_an_end_at_which_generation_does_not_stop_is_named(tokenizer: Any) -> None:
    found = judge(tokenizer, row(tokenizer, PROMPT, f"I am{EOT}\n"), stops=[1])
    assert found.end_of_turn == tokenizer.eos_token_id
    assert "eos_token_id" in found.problems[0]


def test_all_labels_masked_is_named(tokenizer: Any) -> None:
    ids, _ = row(tokenizer, PROMPT, f"I am{EOT}")
    assert "all its labels are -100" in judge(tokenizer, (ids, [-100] * len(ids))).problems[0]


def train(tmp_path: Path, change: Any, **options: Any) -> Any:
    of = stories.publish(tmp_path / "base")
    of.chat_template = TRAINING
    trainer = stories.trainer(tmp_path / "base", tmp_path / "out", of, [ptfix.ChatTemplateCallback(**options)])
    trainer.train_dataset = [change(row) for row in trainer.train_dataset]
    trainer.train()
    return trainer


def test_the_first_batch_of_a_right_run_is_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ptfix"):
        train(tmp_path, lambda row: row, on_problem="raise")
    assert not [record for record in caplog.records if record.name == "ptfix"]


def doubled(row: dict[str, list[int]]) -> dict[str, list[int]]:
    first = {"input_ids": 1, "labels": -100, "attention_mask": 1}
    return {name: [first[name], *values] for name, values in row.items()}


def test_the_first_batch_of_a_wrong_run_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ptfix"):
        train(tmp_path, doubled)
    assert [record.message for record in caplog.records if "twice" in record.message]
    with pytest.raises(ChatTemplateError, match="twice"):
        train(tmp_path / "again", doubled, on_problem="raise")


def test_one_odd_row_beside_a_right_one_is_no_alarm(tmp_path: Path) -> None:
    seen: list[int] = []

    def doubled_once(row: dict[str, list[int]]) -> dict[str, list[int]]:
        seen.append(1)
        return doubled(row) if len(seen) == 1 else row

    train(tmp_path, doubled_once, on_problem="raise")


def test_a_tokenizer_without_a_template_is_passed_over_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    of = stories.publish(tmp_path / "base")
    of.chat_template = TRAINING
    rows = stories.rows(of)
    plain = stories.tokenizer()
    plain.save_pretrained(tmp_path / "base")
    for name in ("chat_template.jinja", "chat_template.json"):
        (tmp_path / "base" / name).unlink(missing_ok=True)
    trainer = stories.trainer(tmp_path / "base", tmp_path / "out", of, [ptfix.ChatTemplateCallback(on_problem="raise")])
    of.chat_template, of.init_kwargs["chat_template"] = None, None
    trainer.train_dataset = rows
    with caplog.at_level(logging.WARNING, logger="ptfix"):
        trainer.train()
    assert not [record for record in caplog.records if record.name == "ptfix"]


def test_the_end_of_turn_is_added_when_asked(tmp_path: Path) -> None:
    other = 3  # a special token that is not the model's eos

    def ends_otherwise(row: dict[str, list[int]]) -> dict[str, list[int]]:
        return {
            "input_ids": [*row["input_ids"][:-1], other],
            "labels": [*row["labels"][:-1], other],
            "attention_mask": row["attention_mask"],
        }

    trainer = train(tmp_path, ends_otherwise, repair_eos=True)
    assert other in trainer.model.generation_config.eos_token_id
    saved = transformers.GenerationConfig.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert other in saved.eos_token_id


def test_the_smoke_test_notices_an_empty_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of = stories.publish(tmp_path / "base")
    of.chat_template = TRAINING
    trainer = stories.trainer(tmp_path / "base", tmp_path / "out", of, [ptfix.ChatTemplateCallback(smoke_tokens=3)])
    with caplog.at_level(logging.WARNING, logger="ptfix"):
        trainer.train()
        assert not any("answers nothing" in record.message for record in caplog.records)
        trainer.model.model.norm.weight.data.zero_()  # all logits are equal: the first token, padding, wins
        callback(trainer)._smoke(trainer.model)
    assert any("answers nothing" in record.message for record in caplog.records)


def callback(trainer: Any) -> Any:
    (found,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, ptfix.ChatTemplateCallback))
    return found
