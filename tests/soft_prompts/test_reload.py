"""Training goes on from a checkpoint as if it had not stopped, and what is loaded is what acts: by real Trainers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from transformers import Trainer, TrainerCallback

import ptfix
from tests.matrix import models
from tests.matrix.models import VIRTUAL_TOKENS, NotInThisPair, base_model, task_ids
from tests.runs import arguments

METHODS = (*models.METHODS, "p_tuning_lstm")
#: peft saves of these what their encoder puts out.
ENCODED = ("p_tuning", "p_tuning_lstm", "prefix_projection", "cpt")
ROW = torch.tensor([[5, 9, 23, 40, 17, 8]])


@pytest.fixture(autouse=True)
def _applied() -> Iterator[None]:
    ptfix.apply(strict=True)
    yield
    ptfix.revert()


def wrap(method: str, seed: int = 1, name: str = "default", dropout: float = 0.0) -> Any:
    """A tiny model with an adapter in training; skips where this peft lacks the method."""
    base = base_model("llama")
    if method != "p_tuning_lstm":
        try:
            return models.wrap(base, method, seed, name)
        except NotInThisPair as error:
            pytest.skip(str(error))
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=VIRTUAL_TOKENS,
        encoder_reparameterization_type="LSTM",
        encoder_hidden_size=8,
        encoder_dropout=dropout,
    )
    torch.manual_seed(seed)
    return get_peft_model(base, config, adapter_name=name).eval()


def state(model: Any, name: str = "default") -> dict[str, torch.Tensor]:
    """What is trained."""
    return {key: value.clone() for key, value in model.prompt_encoder[name].state_dict().items()}


def same(first: Any, second: Any) -> bool:
    """Bit for bit, whatever it is made of."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def logits(model: Any, method: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ROW, **task_ids(method, 1)).logits
    return found


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == "ptfix" and record.levelno >= logging.WARNING]
    return [record.getMessage() for record in records]


# --- Trainer ------------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):  # type: ignore[misc]
    """What is trained, at each save."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = kwargs["model"].prompt_encoder["default"].state_dict()
        self.states[state.global_step] = {name: weight.clone() for name, weight in weights.items()}


def trainer(model: Any, method: str, folder: Path, *callbacks: Any, **more: Any) -> Trainer:
    """Four steps with a save and an evaluation after each second. The worst model counts as the best, since it is not
    the last."""
    rows = [[5, 9, 23, 40, 17, 8], [8, 3, 29, 4, 21, 6], [33, 2, 51, 60, 61, 62], [7, 11, 13, 19, 37, 2]]
    task = {"task_ids": 1} if method == "multitask_prompt_tuning" else {}
    data = [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row), **task} for row in rows]
    evaluation = (
        "eval_strategy" if models.accepts(transformers.TrainingArguments, "eval_strategy") else "evaluation_strategy"
    )
    args = arguments(
        folder,
        max_steps=4,
        save_steps=2,
        eval_steps=2,
        save_strategy="steps",
        logging_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        remove_unused_columns=False,
        label_names=["labels"],
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
        **{evaluation: "steps"},
        **more,
    )
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def history(run: Trainer) -> list[Any]:
    """The losses so far."""
    return [entry[name] for entry in run.state.log_history for name in ("loss", "eval_loss") if name in entry]


@pytest.mark.parametrize(
    ("method", "safetensors"), [*((method, True) for method in METHODS), ("p_tuning", False), ("cpt", False)]
)
def test_trainer_resumes_as_if_it_had_not_stopped_and_hands_back_the_best(
    method: str, safetensors: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not safetensors and not models.accepts(transformers.TrainingArguments, "save_safetensors"):
        pytest.skip("this Trainer saves safetensors only")
    # Trainers before 4.47 save random states that torch 2.6 and later would not load.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    more = {} if safetensors else {"save_safetensors": False}
    straight, resumed = Recorder(), Recorder()
    run = trainer(wrap(method), method, tmp_path / "straight", straight, *ptfix.callbacks(), **more)
    run.train()
    losses = history(run)
    assert not same(straight.states[2], straight.states[4])
    best = run.state.best_model_checkpoint
    assert best == str(tmp_path / "straight" / "checkpoint-2")
    assert same(state(run.model), straight.states[2])
    assert run.evaluate()["eval_loss"] == run.state.best_metric

    again = trainer(wrap(method, seed=2), method, tmp_path / "resumed", resumed, *ptfix.callbacks(), **more)
    again.train(resume_from_checkpoint=best)
    assert same(resumed.states[4], straight.states[4])
    assert history(again) == losses
    for name in ("optimizer.pt", "scheduler.pt"):
        first, second = (torch.load(tmp_path / each / "checkpoint-4" / name) for each in ("straight", "resumed"))
        assert same(first, second)

    run.save_model(str(tmp_path / "saved"))
    assert same(load_peft_weights(str(tmp_path / "saved")), load_peft_weights(best))
    assert warned(caplog) == []
