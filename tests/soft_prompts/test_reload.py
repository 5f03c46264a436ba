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
from peft import PeftModel, get_peft_model
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
        metric_for_best_model="loss",
        greater_is_better=True,
        **{evaluation: "steps", "load_best_model_at_end": True, **more},
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


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "cpt"])
def test_a_resume_from_what_stock_saved_is_refused_before_the_first_step(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ptfix.revert()
    trainer(wrap(method), method, tmp_path / "stock", load_best_model_at_end=False).train()
    ptfix.apply(strict=True)
    recorder = Recorder()
    run = trainer(wrap(method, seed=2), method, tmp_path / "resumed", recorder)
    before = state(run.model)
    if method in ENCODED:
        with pytest.raises(ValueError, match="training cannot go on from it"):
            run.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-2"))
        assert same(state(run.model), before)
    else:
        run.train(resume_from_checkpoint=str(tmp_path / "stock" / "checkpoint-2"))
        assert set(recorder.states) == {4}


# --- the callback -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "cpt"])
def test_a_best_model_that_stock_restores_wrongly_is_reported(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ptfix.revert()
    run = trainer(wrap(method), method, tmp_path, ptfix.SoftPromptCallback())
    try:
        run.train()
    except TypeError as error:
        pytest.skip(f"stock says it itself: {error}")
    found = [message for message in warned(caplog) if "the best model was not restored" in message]
    assert len(found) == (method in ENCODED)
    for message in found:
        assert "checkpoint-2" in message
        assert "ptfix.apply() repairs this pair" in message
        assert "soft-prompt-reload" in message


# --- files and dictionaries ---------------------------------------------------------------------------------------


def saved(model: Any, folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    model.save_pretrained(str(folder), **options)
    weights: dict[str, torch.Tensor] = load_peft_weights(str(folder), device="cpu")
    return weights


def loaded(folder: Path, **options: Any) -> Any:
    return PeftModel.from_pretrained(base_model("llama"), str(folder), **options)


@pytest.mark.parametrize("safetensors", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("method", METHODS)
def test_stock_loads_what_ptfix_saves(method: str, safetensors: bool, tmp_path: Path) -> None:
    model = wrap(method)
    ours = saved(model, tmp_path / "ours", safe_serialization=safetensors)
    assert any(name.startswith("prompt_encoder.") for name in ours) == (method in ENCODED)
    with_ptfix = logits(loaded(tmp_path / "ours"), method)
    ptfix.revert()
    stock = saved(model, tmp_path / "stock", safe_serialization=safetensors)
    assert same({name: ours[name] for name in stock}, stock)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(key|missing|unexpected|prompt_encoder).*")
        again = loaded(tmp_path / "ours")
    assert same(again.prompt_encoder["default"].embedding.weight.detach(), stock["prompt_embeddings"])
    assert torch.equal(logits(again, method), with_ptfix)
    assert torch.equal(logits(loaded(tmp_path / "stock"), method), with_ptfix)
    assert same(saved(again, tmp_path / "again"), stock)


@pytest.mark.parametrize("method", METHODS)
def test_loaded_for_inference_it_is_saved_again_as_it_was(method: str, tmp_path: Path) -> None:
    model = wrap(method)
    first = saved(model, tmp_path / "first")
    again = loaded(tmp_path / "first")
    second = saved(again, tmp_path / "second")
    assert not any(name.startswith("prompt_encoder.") for name in second)
    assert same({name: first[name] for name in second}, second)
    assert torch.equal(logits(loaded(tmp_path / "second"), method), logits(again, method))


@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("method", METHODS)
def test_by_hand_an_adapter_comes_back_from_its_state_dict(method: str, name: str) -> None:
    model, other = wrap(method, name=name), wrap(method, seed=2, name=name)
    # Looked up as accelerate and transformers do it.
    kept = peft.get_peft_model_state_dict(model, adapter_name=name)
    trained = state(model, name)
    peft.set_peft_model_state_dict(other, kept, adapter_name=name)
    assert same(state(other, name), trained)
    for parameter in model.prompt_encoder.parameters():
        parameter.data.add_(1.0)  # training goes on
    peft.set_peft_model_state_dict(other, kept, name)
    if method != "multitask_prompt_tuning":  # of which peft gives the very parameters
        assert same(state(other, name), trained)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_trained_on_where_it_carries_the_encoder(method: str, tmp_path: Path) -> None:
    model = wrap(method)
    model.save_pretrained(str(tmp_path))
    again = loaded(tmp_path, is_trainable=True)
    model.load_adapter(str(tmp_path), "third", is_trainable=True)
    for each, name in ((again, "default"), (model, "third")):
        assert not each.peft_config[name].inference_mode
        assert same(state(each, name), state(model))
    model.set_adapter("third")
    assert again.training
    assert torch.equal(logits(again, method), logits(model, method))
    assert again.peft_config["default"].to_dict() == model.peft_config["default"].to_dict()
    trained = []
    for each, name in ((again, "default"), (model, "default"), (model, "third")):
        if each is model:
            model.set_adapter(name)
        each.zero_grad()
        each(input_ids=ROW, labels=ROW, **task_ids(method, 1)).loss.backward()
        trained.append({key: one.grad for key, one in each.prompt_encoder[name].named_parameters()})
    assert any(gradient is not None for gradient in trained[1].values())
    assert same(trained[0], trained[1])
    assert same(trained[2], trained[1])


def test_a_head_is_trained_on_with_its_classifier(tmp_path: Path) -> None:
    config = base_model("llama").config.to_dict()

    def classifier() -> Any:
        torch.manual_seed(0)
        return models.sharpen(transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**config)), 0)

    torch.manual_seed(1)
    prompt = peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=VIRTUAL_TOKENS, encoder_hidden_size=16)
    model = get_peft_model(classifier(), prompt)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(classifier(), str(tmp_path), is_trainable=True)
    assert type(again) is type(model)
    trained = [{name for name, one in each.named_parameters() if one.requires_grad} for each in (model, again)]
    assert trained[0] == trained[1]
    assert any("modules_to_save" in name for name in trained[1])
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ROW).logits, model.eval()(input_ids=ROW).logits)


def test_what_is_saved_in_training_has_no_dropout_in_it(tmp_path: Path) -> None:
    model = wrap("p_tuning_lstm", dropout=0.5)
    alone = saved(model, tmp_path / "alone")
    model.train()
    random = torch.get_rng_state()
    assert same(saved(model, tmp_path / "training"), alone)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.prompt_encoder.modules())


def test_saving_changes_nothing_of_what_is_trained(tmp_path: Path) -> None:
    model = wrap("cpt")  # whose own forward projects its weights
    with torch.no_grad():
        model.prompt_encoder["default"].delta_embedding.weight.mul_(100)
    before = state(model)
    saved(model, tmp_path)
    assert same(state(model), before)


# --- checkpoints that lack the encoder ----------------------------------------------------------------------------

encoded = pytest.mark.parametrize("method", ENCODED)


def made_by_stock(method: str, folder: Path) -> torch.Tensor:
    """A checkpoint of peft's own; returns what its model says."""
    model = wrap(method)
    ptfix.revert()
    model.save_pretrained(str(folder))
    said = logits(PeftModel.from_pretrained(base_model("llama"), str(folder)), method)
    ptfix.apply(strict=True)
    return said


@encoded
def test_training_is_refused_in_one_sentence_and_nothing_is_changed(method: str, tmp_path: Path) -> None:
    made_by_stock(method, tmp_path)
    model = wrap(method, seed=2)
    said = logits(model, method)  # first: CPT's forward projects its weights
    before = state(model)
    base = base_model("llama")
    ways = (
        lambda: model.load_adapter(str(tmp_path), "default", is_trainable=True),
        lambda: model.load_adapter(str(tmp_path), "other", is_trainable=True),
        lambda: peft.set_peft_model_state_dict(model, load_peft_weights(str(tmp_path), device="cpu")),
        lambda: PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True),
    )
    for way in ways:
        with pytest.raises(ValueError, match="training cannot go on from it") as refused:
            way()
        assert "\n" not in str(refused.value)
    assert same(state(model), before)
    assert torch.equal(logits(model, method), said)
    assert list(model.peft_config) == ["default"]
    assert all(parameter.requires_grad for parameter in base.parameters())


@encoded
def test_for_inference_it_acts_as_it_was_saved_also_in_a_model_in_training(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = made_by_stock(method, tmp_path / "stock")
    model = wrap(method, seed=2)
    model.load_adapter(str(tmp_path / "stock"), "default")
    assert torch.equal(logits(model, method), said)
    (message,) = warned(caplog)
    assert "cannot be trained on" in message
    first, second = load_peft_weights(str(tmp_path / "stock"), device="cpu"), saved(model, tmp_path / "again")
    assert same(first, second)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.train()(input_ids=ROW, labels=ROW).loss.backward()
    model.load_adapter(str(tmp_path / "stock"), "default")  # an adapter for inference now, as any
    assert torch.equal(logits(model, method), said)


def test_the_encoder_of_another_adapter_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    wrap("p_tuning").save_pretrained(str(tmp_path))
    model = wrap("p_tuning_lstm")
    before = state(model)
    with pytest.raises(ValueError, match=r"adapter_config\.json") as refused:
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert "\n" not in str(refused.value)
    assert same(state(model), before)
