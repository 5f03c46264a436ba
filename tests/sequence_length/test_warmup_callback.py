"""SequenceLengthWarmupCallback inside a real Trainer.

The truth is a stock Trainer whose rows were cut beforehand, by hand, to the length of the step that takes them: the
weights must be the same, bit for bit. That covers lengths, the order, the count of labels and the scaling of the loss.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

import ptfix
from ptfix.callbacks.running import trainer_of
from ptfix.callbacks.sequence_length_warmup import SequenceLengthWarmupCallback
from ptfix.sequence_length import schedule
from tests.matrix.models import VOCAB, base_model
from tests.runs import arguments as arguments_of
from tests.runs import sft_trainer

LENGTH, STEPS, ROWS_PER_BATCH = 40, 6, 2
SCHEDULE = schedule.linear(8, LENGTH, 4)


def make_rows(count: int, length: int = LENGTH) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, VOCAB, (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": list(row)} for row in ids]


def uneven(count: int) -> list[dict[str, list[int]]]:
    """Rows with another number of labels each, so that a wrong count of labels is another loss."""
    rows = make_rows(count)
    for number, row in enumerate(rows):
        hidden = 2 + number % 4
        row["labels"][:hidden] = [-100] * hidden
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in padding.items()
    }


class InOrder(Trainer):  # type: ignore[misc]  # the hosts are untyped here
    """A Trainer that takes its rows as they come, so that the truth can be written down."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Seen(TrainerCallback):  # type: ignore[misc]
    """Which shapes the model is fed with, and in which optimizer step."""

    def __init__(self) -> None:
        self.fed: dict[int, list[tuple[int, ...]]] = {}
        self.first: list[int] = []
        self.told: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def look(module: Any, inputs: Any, given: dict[str, Any]) -> None:
            if not module.training:  # InstructionRetentionCallback asks
                return
            self.fed.setdefault(state.global_step, []).append(tuple(given["input_ids"].shape))
            self.first += given["input_ids"][:, 0].tolist()

        self.handle = kwargs["model"].register_forward_pre_hook(look, with_kwargs=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.told.append(dict(logs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.handle.remove()


def train(
    folder: Path,
    rows: Any,
    callbacks: list[Any],
    resume: str | None = None,
    model: Any = None,
    trainer_class: Any = InOrder,
    collator: Any = collate,
    **arguments: Any,
) -> tuple[Any, Seen]:
    defaults: dict[str, Any] = {"max_steps": STEPS, "save_steps": 100, "logging_steps": 1, "learning_rate": 1e-2}
    args = arguments_of(
        folder,
        per_device_train_batch_size=ROWS_PER_BATCH,
        **{**defaults, **arguments},
    )
    seen = Seen()
    trainer = trainer_class(
        model=model or base_model("llama"),
        args=args,
        train_dataset=rows,
        data_collator=collator,
        callbacks=[seen, *callbacks],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == "ptfix" and record.levelno >= logging.WARNING]
    return [record.getMessage() for record in records]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(one: Any, other: Any) -> None:
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def cut_by_hand(rows: list[dict[str, list[int]]], accumulation: int) -> list[dict[str, list[int]]]:
    in_a_step = ROWS_PER_BATCH * accumulation
    lengths = [8, 16, 24, 32, 40, 40]  # written out: SCHEDULE must agree
    return [
        {name: value[: lengths[number // in_a_step % STEPS]] for name, value in row.items()}
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_truncate_equals_rows_cut_by_hand_also_after_a_resume(
    workers: int, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers before 4.47 cannot read its own random state with torch >= 2.6
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    rows = uneven(ROWS_PER_BATCH * accumulation * STEPS)
    setting = {"gradient_accumulation_steps": accumulation, "dataloader_num_workers": workers}
    truth, _ = train(tmp_path / "truth", cut_by_hand(rows, accumulation), [], **setting)

    def warming() -> list[Any]:
        return [SequenceLengthWarmupCallback(SCHEDULE, "truncate")]

    whole, seen = train(tmp_path / "whole", rows, warming(), save_steps=3, **setting)
    assert_same(whole, truth)
    assert seen.fed == {
        step: [(ROWS_PER_BATCH, length)] * accumulation for step, length in enumerate([8, 16, 24, 32, 40, 40])
    }
    uncut, _ = train(tmp_path / "uncut", rows, [], **setting)
    assert any(not torch.equal(value, weights(uncut)[name]) for name, value in weights(whole).items())

    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed, seen = train(tmp_path / "resumed", rows, warming(), resume=checkpoint, **setting)
    assert list(seen.fed) == [3, 4, 5]
    assert_same(resumed, truth)


class CutIntoPieces:
    """A collator that cuts each row by hand into pieces; of a stock Trainer without workers, so that it can count."""

    def __init__(self, accumulation: int) -> None:
        self.accumulation, self.calls = accumulation, 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = [8, 16, 24, 32, 40, 40][self.calls // self.accumulation]
        self.calls += 1
        starts = range(0, LENGTH, length)
        return collate([{name: row[name][at : at + length] for name in row} for row in rows for at in starts])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_segment_equals_pieces_cut_by_hand_also_after_a_resume(
    workers: int, accumulation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    rows = uneven(ROWS_PER_BATCH * accumulation * STEPS)
    setting = {"gradient_accumulation_steps": accumulation}
    truth, _ = train(tmp_path / "truth", rows, [], collator=CutIntoPieces(accumulation), **setting)
    setting["dataloader_num_workers"] = workers

    def warming() -> list[Any]:
        return [SequenceLengthWarmupCallback(SCHEDULE, "segment")]

    whole, seen = train(tmp_path / "whole", rows, warming(), save_steps=3, **setting)
    pieces = {8: 5, 16: 3, 24: 2, 32: 2, 40: 1}
    assert seen.fed == {
        step: [(ROWS_PER_BATCH * pieces[length], length)] * accumulation
        for step, length in enumerate([8, 16, 24, 32, 40, 40])
    }
    tokens = LENGTH * ROWS_PER_BATCH * STEPS * accumulation
    assert whole.state.log_history[STEPS - 1]["sequence_length_tokens"] == tokens
    assert_same(whole, truth)

    resumed, _ = train(
        tmp_path / "resumed", rows, warming(), resume=str(tmp_path / "whole" / "checkpoint-3"), **setting
    )
    assert_same(resumed, truth)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_takes_each_row_once_an_epoch_from_short_to_long_also_after_a_resume(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    rows = [make_rows(1, length)[0] for length in (40, 9, 33, 17, 12, 25, 30, 20)]
    for number, row in enumerate(rows):
        row["input_ids"] = [number, *row["input_ids"][1:]]  # the first token tells the row
    setting = {"max_steps": 8, "dataloader_num_workers": workers, "trainer_class": Trainer}
    whole, seen = train(tmp_path / "whole", rows, [SequenceLengthWarmupCallback()], save_steps=6, **setting)
    assert seen.first == [1, 4, 3, 7, 5, 6, 2, 0] * 2
    assert [logs["sequence_length"] for logs in seen.told[:8]] == [12, 20, 30, 40] * 2
    checkpoint = str(tmp_path / "whole" / "checkpoint-6")  # in the middle of the second epoch
    resumed, again = train(tmp_path / "b", rows, [SequenceLengthWarmupCallback()], resume=checkpoint, **setting)
    assert again.first == seen.first[12:]
    assert_same(resumed, whole)


def test_length_and_tokens_are_in_the_log_before_a_reporter_reads_it_and_go_on_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    rows = make_rows(ROWS_PER_BATCH * STEPS)
    callbacks = [SequenceLengthWarmupCallback(SCHEDULE, "truncate")]
    trainer, seen = train(tmp_path / "a", rows, callbacks, save_steps=3)
    lengths = [8, 16, 24, 32, 40, 40]
    used = [ROWS_PER_BATCH * sum(lengths[: step + 1]) for step in range(STEPS)]
    # `Seen` comes before the callback, as wandb's and tensorboard's do.
    for logs in (seen.told, trainer.state.log_history):
        assert [entry["sequence_length"] for entry in logs[:STEPS]] == lengths
        assert [entry["sequence_length_tokens"] for entry in logs[:STEPS]] == used
    checkpoint = str(tmp_path / "a" / "checkpoint-3")
    callbacks = [SequenceLengthWarmupCallback(SCHEDULE, "truncate")]
    _, seen = train(tmp_path / "b", rows, callbacks, resume=checkpoint)
    assert [entry["sequence_length_tokens"] for entry in seen.told[:3]] == used[3:]


def test_lora(tmp_path: Path) -> None:
    rows = make_rows(ROWS_PER_BATCH * STEPS)

    def lora() -> Any:
        torch.manual_seed(0)
        return get_peft_model(
            base_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], lora_dropout=0.0)
        )

    truth, _ = train(tmp_path / "truth", cut_by_hand(rows, 1), [], model=lora())
    whole, _ = train(tmp_path, rows, [SequenceLengthWarmupCallback(SCHEDULE, "truncate")], model=lora())
    assert_same(whole, truth)


@pytest.mark.parametrize("mode", ["truncate", "segment"])
def test_two_ranks_have_equal_lengths_and_the_weights_of_rows_cut_by_hand(mode: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run(
        [*command, "-m", "tests.sequence_length.ranks", mode, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    zero, one = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    lengths = [8, 16, 24, 32, 40, 40]
    pieces = {8: 5, 16: 3, 24: 2, 32: 2, 40: 1} if mode == "segment" else dict.fromkeys(lengths, 1)
    assert zero["fed"] == one["fed"]
    assert zero["fed"] == {step: [(ROWS_PER_BATCH * pieces[length], length)] * 2 for step, length in enumerate(lengths)}
    for name, value in zero["whole"].items():
        for other in (zero["truth"], one["whole"], one["truth"]):
            assert torch.equal(value, other[name]), name
    # The first rank alone asks its model, and waits for nobody.
    assert any("retention_kl" in names for names in zero["logged"])
    assert not any("retention_kl" in names for names in one["logged"])


@pytest.mark.parametrize(("packing", "mode"), [(False, "truncate"), (True, "truncate"), (True, "order")])
def test_trl(packing: bool, mode: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen = Seen()
    warming = SequenceLengthWarmupCallback(schedule.linear(8, 24, 2) if mode == "truncate" else None, mode)
    trainer = sft_trainer(
        base_model("llama"),
        make_rows(ROWS_PER_BATCH * 8),
        tmp_path,
        [seen, warming],
        max_steps=4,
        logging_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=ROWS_PER_BATCH,
        max_length=LENGTH,
        packing=packing,
    )
    trainer.train()
    assert trainer.state.global_step == 4
    if packing and mode == "truncate":  # trl counts the boundaries of packed rows in cu_seq_lens
        (message,) = warned(caplog)
        assert re.search(r"keeps its full length.*packed rows.*mode='order'", message)
    elif mode == "truncate":
        widths = {step: {shape[1] for shape in shapes} for step, shapes in seen.fed.items()}
        assert widths == {0: {8}, 1: {16}, 2: {24}, 3: {24}}
        assert [entry["sequence_length"] for entry in seen.told[:4]] == [8, 16, 24, 24]


def test_other_trainers_and_this_one_afterwards_are_untouched(tmp_path: Path) -> None:
    before = {name: vars(Trainer).get(name) for name in ("log", "get_batch_samples", "training_step")}
    callback = SequenceLengthWarmupCallback(SCHEDULE, "truncate")
    trainer, _ = train(tmp_path, make_rows(4), [callback], max_steps=2)
    assert {name: vars(Trainer).get(name) for name in before} == before
    assert not {"log", "get_batch_samples", "training_step"} & vars(trainer).keys()


def test_a_run_after_one_that_failed_is_cut_once(tmp_path: Path) -> None:
    class Fails(TrainerCallback):  # type: ignore[misc]
        failed = False

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if not self.failed:
                self.failed = True
                raise KeyboardInterrupt

    args = TrainingArguments(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        max_steps=2,
        logging_steps=1,
        per_device_train_batch_size=ROWS_PER_BATCH,
    )
    trainer = InOrder(
        model=base_model("llama"),
        args=args,
        train_dataset=make_rows(ROWS_PER_BATCH * 2),
        data_collator=collate,
        callbacks=[SequenceLengthWarmupCallback(SCHEDULE, "truncate"), Fails()],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    counted = [entry["sequence_length_tokens"] for entry in trainer.state.log_history[:2]]
    assert counted == [ROWS_PER_BATCH * 8, ROWS_PER_BATCH * (8 + 16)]
    assert not {"log", "get_batch_samples", "training_step"} & vars(trainer).keys()


def test_a_run_without_the_callback_after_one_that_failed_is_stocks(tmp_path: Path) -> None:
    """Nobody tells a callback that training ended with an error, so what it has put over the Trainer is still there."""

    class Interrupts(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    warming, interrupting = SequenceLengthWarmupCallback(SCHEDULE, "truncate"), Interrupts()
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, make_rows(4), [warming, interrupting, seen := Kept()])
    trainer = seen.trainer
    for callback in (warming, interrupting):
        trainer.remove_callback(callback)
    trainer.train()
    assert not any("sequence_length" in entry for entry in trainer.state.log_history)
    assert set(seen.widths) == {8, LENGTH}


class Kept(TrainerCallback):  # type: ignore[misc]
    """The Trainer of a run that ends with an error, and how wide its batches were."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.widths: list[int] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer is None:
            self.trainer = trainer_of(self)
            look = lambda module, inputs, given: self.widths.append(given["input_ids"].shape[1])  # noqa: E731
            kwargs["model"].register_forward_pre_hook(look, with_kwargs=True)


class Odd:
    """A schedule of a user's own that has a fault."""

    def __init__(self, length: Any) -> None:
        self.wrong = length

    def length(self, step: int) -> Any:
        return 8 if step < 2 else self.wrong[step]


@pytest.mark.parametrize("wrong", [[0] * 99, [1] * 99, [-8] * 99, [12.5] * 99, [None] * 99, []], ids=repr)
def test_a_schedule_with_a_fault_leaves_rows_at_their_full_length(
    wrong: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, seen = train(tmp_path, make_rows(ROWS_PER_BATCH * STEPS), [SequenceLengthWarmupCallback(Odd(wrong), "truncate")])
    assert [shapes[0][1] for shapes in seen.fed.values()] == [8, 8, *[LENGTH] * (STEPS - 2)]
    (message,) = warned(caplog)
    assert message.startswith("a batch keeps its full length")


def test_preference_pairs_keep_their_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def pairs(rows: Any) -> dict[str, torch.Tensor]:
        return {**collate(rows), "chosen_input_ids": collate(rows)["input_ids"]}

    class First(InOrder):
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            del inputs["chosen_input_ids"]
            return super().compute_loss(model, inputs, *args, **kwargs)

    callbacks = [SequenceLengthWarmupCallback(SCHEDULE, "truncate")]
    rows, setting = make_rows(ROWS_PER_BATCH * STEPS), {"collator": pairs, "trainer_class": First}
    warmed, _ = train(tmp_path / "a", rows, callbacks, **setting)
    stock, _ = train(tmp_path / "b", rows, [], **setting)
    (message,) = warned(caplog)
    assert re.search(r"CannotCut: .*preference pairs.*mode='order'", message)
    assert_same(warmed, stock)


def test_a_stream_cannot_be_ordered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[misc]
        def __iter__(self) -> Any:
            return iter(make_rows(8))

    _, seen = train(tmp_path, Stream(), [SequenceLengthWarmupCallback()], trainer_class=Trainer, max_steps=2)
    assert [shapes[0][1] for shapes in seen.fed.values()] == [LENGTH] * 2
    (message,) = warned(caplog)
    assert re.search("rows keep their length and order.*mode='truncate'", message)
    callback = SequenceLengthWarmupCallback(SCHEDULE, "truncate")
    _, seen = train(tmp_path, Stream(), [callback], trainer_class=Trainer, max_steps=3)
    assert [shapes[0][1] for shapes in seen.fed.values()] == [8, 16, 24]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mode": "shorten"}, "one of 'order', 'truncate', 'segment'"),
        ({"mode": "order", "schedule": SCHEDULE}, "follows no schedule"),
        ({"mode": "truncate"}, "needs a schedule"),
    ],
)
def test_a_wrong_choice_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SequenceLengthWarmupCallback(**arguments)


def test_called_by_hand_it_says_where_it_belongs(caplog: pytest.LogCaptureFixture) -> None:
    SequenceLengthWarmupCallback().on_train_begin(None, TrainerState(), None)
    (message,) = warned(caplog)
    assert "Trainer(..., callbacks=[...])" in message


def test_the_door_has_it() -> None:
    assert ptfix.SequenceLengthWarmupCallback is SequenceLengthWarmupCallback
