"""SequenceLengthGuardCallback inside a real Trainer, and the hosts it speaks of, on whatever pair is installed."""

from __future__ import annotations

import logging
import random
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback

import ptfix
from ptfix.callbacks.sequence_length_guard import SequenceLengthError, SequenceLengthGuardCallback
from tests.runs import arguments as arguments_of
from tests.runs import sft_trainer
from tests.sequence_length.doubles import HARD_LIMIT, HARD_TABLES, HEADS, NATIVE, VOCAB, llama, qwen_v1, with_table

VIRTUAL = 8


def row(length: int, masked: bool = False) -> dict[str, list[int]]:
    ids = [3 + (7 * place) % (VOCAB - 3) for place in range(length)]
    return {"input_ids": ids, "labels": [-100] * length if masked else ids}


def trainer(model: Any, rows: list[Any], folder: Path, *callbacks: Any, **arguments: Any) -> Trainer:
    options: dict[str, Any] = {"max_steps": 1, "per_device_train_batch_size": 1, "learning_rate": 1e-3, **arguments}
    args = arguments_of(
        folder,
        save_strategy="no",
        remove_unused_columns=False,
        **options,
    )
    return Trainer(model=model, args=args, train_dataset=rows, callbacks=list(callbacks))


def guarded(model: Any, rows: list[Any], folder: Path, **options: Any) -> Trainer:
    made = trainer(model, rows, folder, SequenceLengthGuardCallback(**options))
    made.train()
    return made


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == "ptfix" and record.levelno >= logging.WARNING]
    return [record.getMessage() for record in records]


def prompted(model: Any, method: str = "prompt") -> Any:
    kinds = {"prompt": "PromptTuningConfig", "prefix": "PrefixTuningConfig", "p": "PromptEncoderConfig"}
    more: dict[str, Any] = {"encoder_hidden_size": 8} if method == "p" else {}
    # peft does not find these sizes in every config.
    sizes = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL, "num_attention_heads": HEADS, "num_layers": 1}
    return peft.get_peft_model(model, getattr(peft, kinds[method])(**sizes, **more))


@pytest.mark.parametrize("virtual", [0, VIRTUAL])
@pytest.mark.parametrize("family", HARD_TABLES)
def test_a_table_of_positions_is_not_overrun(family: str, virtual: int, tmp_path: Path) -> None:
    """The host itself crashes with one token more, in step 1, and not at the limit: the guard says so before."""

    def model() -> Any:
        return prompted(with_table(family)) if virtual else with_table(family)

    room = HARD_LIMIT - virtual
    assert guarded(model(), [row(room)], tmp_path).state.global_step == 1
    made = trainer(model(), [row(room + 1)], tmp_path)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        made.train()
    rows = [row(5)] * 40 + [row(room + 1)]
    made = trainer(model(), rows, tmp_path, SequenceLengthGuardCallback(probes=False), max_steps=len(rows))
    with pytest.raises(SequenceLengthError, match=rf"table of {HARD_LIMIT} positions .*max_length={room}\b"):
        made.train()
    assert made.state.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "is_certain"),
    [
        ({"max_steps": 40}, False),
        ({"max_steps": 41}, True),
        ({"max_steps": 20, "gradient_accumulation_steps": 2}, False),
        ({"max_steps": 21, "gradient_accumulation_steps": 2}, True),
        ({"max_steps": 11, "per_device_train_batch_size": 4}, True),
        ({"max_steps": 11, "per_device_train_batch_size": 4, "dataloader_drop_last": True}, False),
        ({"max_steps": -1, "num_train_epochs": 1}, True),
        ({"max_steps": -1, "num_train_epochs": 0.9}, False),
    ],
    ids=str,
)
def test_a_run_that_may_not_come_to_the_row_that_is_too_long_is_not_refused(
    arguments: dict[str, Any], is_certain: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(5)] * 40 + [row(HARD_LIMIT + 1)]
    made = trainer(with_table("gpt2"), rows, tmp_path, SequenceLengthGuardCallback(probes=False), **arguments)

    class Stop(TrainerCallback):  # type: ignore[misc]  # what the guard says is said before the first step
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    made.add_callback(Stop())
    with pytest.raises(SequenceLengthError if is_certain else KeyboardInterrupt):
        made.train()
    assert len(warned(caplog)) == (not is_certain)


def test_a_run_that_never_comes_to_the_row_that_is_too_long_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(5)] * 40 + [row(HARD_LIMIT + 1)]

    def run(*callbacks: Any) -> Trainer:
        made = trainer(with_table("gpt2"), rows, tmp_path, *callbacks, max_steps=2)
        made._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(rows)
        made.train()
        return made

    stock, watched = run(), run(SequenceLengthGuardCallback(probes=False))
    (message,) = warned(caplog)
    assert f"2.4% of 41 rows looked at have more, the longest {HARD_LIMIT + 1}" in message
    assert all(map(torch.equal, stock.model.state_dict().values(), watched.model.state_dict().values()))


class Slow(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Each row takes its time when it is looked at; 4 of them use up the guard's."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows, self.asked = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        if self.asked <= 4:
            time.sleep(1.1)
        return self.rows[index]


def test_from_a_part_of_the_rows_follows_a_warning_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(8, masked=number % 20 != 7) for number in range(1000)]
    made = trainer(llama(), Slow(rows), tmp_path, SequenceLengthGuardCallback())  # type: ignore[arg-type]
    made.train()
    assert made.state.global_step == 1
    (message,) = warned(caplog)
    assert message.startswith("100.0% of 4 rows looked at (of 1000) train nothing")


@pytest.mark.parametrize("method", ["prefix", "p"])
def test_virtual_tokens_of_each_method_take_positions(method: str, tmp_path: Path) -> None:
    with pytest.raises(SequenceLengthError, match=f"{VIRTUAL} of them taken by the adapter"):
        guarded(prompted(with_table("gpt2"), method), [row(HARD_LIMIT - VIRTUAL + 1)], tmp_path)


def test_lora_takes_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    guarded(peft.get_peft_model(with_table("gpt2"), lora), [row(HARD_LIMIT)], tmp_path)
    assert warned(caplog) == []


def test_a_promised_length_is_held_against_the_table_too(tmp_path: Path) -> None:
    with pytest.raises(SequenceLengthError, match=f"rows of {HARD_LIMIT + 1} tokens"):
        guarded(with_table("gpt2"), [row(9)], tmp_path, max_length=HARD_LIMIT + 1)
    assert guarded(with_table("gpt2"), [row(HARD_LIMIT)], tmp_path, max_length=HARD_LIMIT).state.global_step == 1


def test_qwen_v1_beyond_its_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guarded(qwen_v1(), [row(NATIVE)], tmp_path)
    assert warned(caplog) == []
    guarded(qwen_v1(), [row(NATIVE + 1)], tmp_path)
    messages = warned(caplog)
    assert any("1 rows looked at are longer than 64 tokens" in message for message in messages)
    assert any("computes otherwise in training than in inference" in message for message in messages)


@pytest.mark.parametrize("trick", ["use_dynamic_ntk", "use_logn_attn"])
def test_each_trick_alone_is_found(trick: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    others = {"use_dynamic_ntk": False, "use_logn_attn": False}
    guarded(qwen_v1(**{**others, trick: True}), [row(NATIVE + 1)], tmp_path)
    assert any("otherwise in training" in message for message in warned(caplog))
    caplog.clear()
    guarded(qwen_v1(**others), [row(NATIVE + 1)], tmp_path)
    assert not any("otherwise in training" in message for message in warned(caplog))


def test_silent_about_llama_within_its_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guarded(llama(), [row(NATIVE), row(9)], tmp_path, on_problem="raise")
    assert warned(caplog) == []


def test_llama_beyond_its_length_is_a_matter_of_training_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded(llama(), [row(9), row(9), row(9), row(NATIVE + 1)], tmp_path)
    (message,) = warned(caplog)
    assert message.startswith(f"25.0% of 4 rows looked at are longer than {NATIVE} tokens, the longest {NATIVE + 1};")


def test_it_raises_when_asked(tmp_path: Path) -> None:
    with pytest.raises(SequenceLengthError, match=r"(?s)longer than 64 tokens.*otherwise in training"):
        guarded(qwen_v1(), [row(NATIVE + 1)], tmp_path, on_problem="raise")


def test_rows_without_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guarded(llama(), [row(9), row(9), row(9), row(9, masked=True)], tmp_path)
    (message,) = warned(caplog)
    assert message.startswith("25.0% of 4 rows looked at train nothing")
    with pytest.raises(SequenceLengthError, match="nothing is trained on"):
        guarded(llama(), [row(9, masked=True)] * 3, tmp_path)


def test_a_length_far_above_the_data_and_rows_that_were_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guarded(llama(), [row(9)] * 50, tmp_path, max_length=60)
    (message,) = warned(caplog)
    assert "max_length=60 is 7 times what the data needs: 99% of 50 rows looked at have at most 9 tokens" in message
    caplog.clear()
    guarded(llama(), [row(20)] * 3 + [row(9)], tmp_path, max_length=20)
    (message,) = warned(caplog)
    assert "75.0% of 4 rows looked at end exactly at max_length=20" in message


def test_a_longer_rope_than_the_checkpoint_s_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Linear scaling, the story of the chat model that forgot its instructions: told before step 1."""
    llama().save_pretrained(tmp_path / "base")
    for factor, changed in ((4.0, True), (1.0, False)):
        caplog.clear()
        rope = {"rope_type": "linear", "factor": factor} if changed else None
        model = llama(rope)
        model.config._name_or_path = str(tmp_path / "base")
        guarded(model, [row(9)], tmp_path / "out")
        messages = warned(caplog)
        assert any("live rope (linear x4) is not the checkpoint's (unscaled" in one for one in messages) == changed
        assert bool(messages) == changed


def test_dynamic_scaling_with_a_raised_length_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What two popular trainers set: the host computes what it computed unscaled, and the guard says so."""
    llama().save_pretrained(tmp_path / "base")
    raised = llama({"rope_type": "dynamic", "factor": 4.0}, max_position_embeddings=4 * NATIVE)
    ids = torch.tensor([row(2 * NATIVE)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(raised(input_ids=ids).logits, llama()(input_ids=ids).logits)
        right = llama({"rope_type": "dynamic", "factor": 4.0})
        assert not torch.allclose(right(input_ids=ids).logits, llama()(input_ids=ids).logits, atol=1e-2)
    raised.config._name_or_path = str(tmp_path / "base")
    guarded(raised, [row(2 * NATIVE)], tmp_path / "out")
    assert any(f"Set max_position_embeddings back to {NATIVE}" in message for message in warned(caplog))


def test_a_larger_number_alone_is_no_longer_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama().save_pretrained(tmp_path / "base")
    raised = llama(max_position_embeddings=4 * NATIVE)
    raised.config._name_or_path = str(tmp_path / "base")
    guarded(raised, [row(NATIVE)], tmp_path / "out")
    assert warned(caplog) == []
    guarded(raised, [row(NATIVE + 1)], tmp_path / "out")
    (message,) = warned(caplog)
    assert "a larger number alone teaches the model no longer positions" in message


def test_training_is_the_same_with_and_without_the_guard(tmp_path: Path) -> None:
    """Dropout, shuffling and the model's buffers: nothing the guard does is seen in the weights."""

    def weights(*callbacks: Any) -> list[torch.Tensor]:
        model = qwen_v1()
        made = trainer(model, [row(NATIVE + 1 + place) for place in range(6)], tmp_path, *callbacks, max_steps=3)
        made.train()
        return [parameter.detach().clone() for parameter in model.parameters()]

    plain, checked = weights(), weights(SequenceLengthGuardCallback())
    assert all(torch.equal(one, other) for one, other in zip(plain, checked, strict=True))


def test_a_data_set_that_draws_is_put_back(tmp_path: Path) -> None:
    class Drawing(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, list[int]]:
            return row(4 + random.randrange(5) + int(torch.randint(5, ())))

    def draws(*callbacks: Any) -> tuple[float, float]:
        random.seed(1)
        made = trainer(llama(), Drawing(), tmp_path, *callbacks, max_steps=2)  # type: ignore[arg-type]
        made.train()
        return random.random(), float(torch.rand(()))

    assert draws() == draws(SequenceLengthGuardCallback())


def test_a_stream_is_not_used_up(tmp_path: Path) -> None:
    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        started = 0

        def __iter__(self) -> Any:
            Stream.started += 1
            yield from [row(NATIVE + 1)] * 3

    guarded(llama(), Stream(), tmp_path, on_problem="raise")  # type: ignore[arg-type]
    assert Stream.started == 1


def test_rows_are_seen_as_the_collator_makes_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Padding is not text, but takes positions of a table."""

    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = HARD_LIMIT + 2
        names = {"input_ids": 0, "labels": -100}
        batch = {n: [one[n] + [fill] * (width - len(one[n])) for one in rows] for n, fill in names.items()}
        batch["attention_mask"] = [[1] * len(one["input_ids"]) + [0] * (width - len(one["input_ids"])) for one in rows]
        return {name: torch.tensor(value) for name, value in batch.items()}

    made = trainer(with_table("gpt2"), [row(9)], tmp_path, SequenceLengthGuardCallback())
    made.data_collator = padded
    with pytest.raises(SequenceLengthError, match=f"rows of {HARD_LIMIT + 2} tokens"):
        made.train()
    made = trainer(llama(max_position_embeddings=HARD_LIMIT), [row(9)], tmp_path, SequenceLengthGuardCallback())
    made.data_collator = padded
    made.train()
    assert warned(caplog) == []


def test_packed_rows_count_from_where_their_positions_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed = {**row(2 * NATIVE), "position_ids": [*range(NATIVE), *range(NATIVE)]}
    guarded(llama(), [packed], tmp_path)
    assert warned(caplog) == []


@pytest.mark.parametrize("packing", [False, True])
def test_trl(packing: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """SFTTrainer checks no context: it cuts to args.max_length, and packs texts of which each is short enough."""

    def sft(model: Any, rows: list[Any], max_length: int) -> Any:
        options = {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": max_length, "packing": packing}
        return sft_trainer(model, rows, tmp_path, [SequenceLengthGuardCallback()], **options)

    sft(llama(), [row(NATIVE - 1)] * 8, NATIVE * (2 if packing else 1)).train()
    assert warned(caplog) == []
    table = prompted(with_table("gpt2"))
    made = sft(table, [row(HARD_LIMIT)] * 8, HARD_LIMIT)
    with pytest.raises(SequenceLengthError, match=f"table of {HARD_LIMIT} positions"):
        made.train()
    assert made.state.global_step == 0


def test_it_is_found_by_name() -> None:
    assert ptfix.SequenceLengthGuardCallback is SequenceLengthGuardCallback
    assert ptfix.callbacks.SequenceLengthError is SequenceLengthError  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "words"), [({"on_problem": "shout"}, "'warn' or 'raise'"), ({"max_length": 0}, "at least 1")]
)
def test_a_wrong_choice_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SequenceLengthGuardCallback(**arguments)
