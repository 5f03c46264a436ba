"""InstructionRetentionCallback in a real Trainer, and the numbers behind it against numbers made another way."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

import ptfix
from ptfix import models
from ptfix.callbacks.instruction_retention import ANSWERS, InstructionRetentionCallback
from ptfix.sequence_length import retention
from tests.matrix.models import VOCAB, base_model, wrap
from tests.runs import arguments as arguments_of

PROMPTS = [[5, 9, 23], [40, 17, 8, 3, 21, 33], [7, 7]]
KEYS = {"retention_kl", "retention_agreement", "retention_nll"}


def lora(seed: int = 0) -> Any:
    model = base_model("llama")
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))


def moved(model: Any, by: float) -> Any:
    """The model with other weights; the same direction whatever the distance."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)
    return model


def train(folder: Path, model: Any, callbacks: list[Any], resume: Any = None, **arguments: Any) -> Any:
    defaults: dict[str, Any] = {"max_steps": 4, "save_steps": 100, "learning_rate": 1e-2, "logging_steps": 1}
    args = arguments_of(
        folder,
        remove_unused_columns=False,
        **{**defaults, **arguments},
    )
    rows = torch.randint(2, VOCAB, (16, 10), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:2], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Any) -> dict[int, dict[str, float]]:
    return {
        entry["step"]: {name: entry[name] for name in KEYS}
        for entry in trainer.state.log_history
        if entry.keys() >= KEYS
    }


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == "ptfix" and record.levelno >= logging.WARNING]
    return [record.getMessage() for record in records]


@pytest.mark.parametrize("top", [VOCAB, 5])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bloom"])
def test_the_numbers_are_those_of_each_row_alone(architecture: str, top: int) -> None:
    """The truth: one row at a time, token by token, and the terms of the sum written out."""
    memories = retention.remember(base_model(architecture), PROMPTS, 6, top)
    now = moved(base_model(architecture), 0.02)
    divergences, same, surprises = [], [], []
    with torch.no_grad():
        for prompt, memory in zip(PROMPTS, memories, strict=True):
            assert memory.prompt == prompt
            row = list(prompt)
            for token in memory.answer:
                base = base_model(architecture)(torch.tensor([row])).logits[0, -1].double().softmax(0)
                other = now(torch.tensor([row])).logits[0, -1].double().softmax(0)
                assert int(base.argmax()) == token
                order = base.argsort(descending=True)
                terms = [base[at] * (base[at] / other[at]).log() for at in order[:top]]
                if top < VOCAB:
                    rest, others = base[order[top:]].sum(), other[order[top:]].sum()
                    terms.append(rest * (rest / others).log())
                divergences.append(float(sum(terms)))
                same.append(int(other.argmax()) == token)
                surprises.append(-float(other[token].log()))
                row.append(token)
    found = retention.compare(now, memories)
    assert len(divergences) == 6 * len(PROMPTS)
    assert found.kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert found.agreement == pytest.approx(sum(same) / len(same))
    assert found.nll == pytest.approx(sum(surprises) / len(surprises), rel=1e-4)


def test_an_unchanged_model_has_moved_by_exactly_nothing() -> None:
    model = base_model("llama")
    found = retention.compare(model, retention.remember(model, PROMPTS, 6, 8))
    assert (found.kl, found.agreement) == (0.0, 1.0)


def test_the_further_the_weights_the_larger_the_kl() -> None:
    memories = retention.remember(base_model("llama"), PROMPTS, 6, 8)
    found = [retention.compare(moved(base_model("llama"), by), memories).kl for by in (0.003, 0.01, 0.03)]
    assert found == sorted(found)
    assert found[0] > 0


def test_an_answer_ends_with_its_stop() -> None:
    model = base_model("llama")
    (whole,) = retention.remember(model, PROMPTS[:1], 6, 8)
    stop = whole.answer[2]
    (short,) = retention.remember(model, PROMPTS[:1], 6, 8, [stop])
    assert short.answer == whole.answer[: whole.answer.index(stop) + 1]
    assert len(short.tokens) == len(short.answer)


def test_answers_are_greedy_whatever_the_generation_config_says() -> None:
    plain = retention.remember(base_model("llama"), PROMPTS, 6, 8)
    model = base_model("llama")
    odd = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "num_beams": 3}
    for name, value in odd.items():
        setattr(model.generation_config, name, value)
    model.config.use_cache = False
    assert retention.remember(model, PROMPTS, 6, 8) == plain


def test_memories_come_back_from_disk_as_they_were(tmp_path: Path) -> None:
    memories = retention.remember(base_model("llama"), PROMPTS, 3, 4)
    retention.save(memories, tmp_path / "new" / ANSWERS)
    assert retention.load(tmp_path / "new" / ANSWERS) == memories
    assert [path.name for path in (tmp_path / "new").iterdir()] == [ANSWERS]


@pytest.mark.parametrize("text", ["", "[1]", '[{"prompt": []}]'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / ANSWERS).write_text(text)
    with pytest.raises(ValueError, match="does not hold remembered answers"):
        retention.load(tmp_path / ANSWERS)


def test_asking_leaves_the_model_and_the_random_state_as_they_were() -> None:
    model = lora().train()
    model.base_model.model.get_input_embeddings().eval()
    frozen = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    frozen.requires_grad = False
    before = [parameter.requires_grad for parameter in model.parameters()], [m.training for m in model.modules()]
    state = torch.get_rng_state()
    tracked = []
    model.register_forward_hook(lambda module, inputs, output: tracked.append(output.logits.requires_grad))
    with models.undisturbed(model), model.disable_adapter():
        memories = retention.remember(model, PROMPTS, 3, 4)
    retention.compare(model, memories)
    assert before == (
        [parameter.requires_grad for parameter in model.parameters()],
        [m.training for m in model.modules()],
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert tracked == [False] * len(tracked) != []


def test_the_last_comparison_and_the_last_loss_are_in_the_last_checkpoint(tmp_path: Path) -> None:
    train(tmp_path, base_model("llama"), [InstructionRetentionCallback(PROMPTS, new_tokens=4)], save_steps=4)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in state["log_history"] if entry.keys() >= KEYS] == [0, 4]
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3, 4]


@pytest.mark.parametrize("adapted", [True, False])
def test_training_is_logged_from_step_0_at_each_evaluation_and_the_end_and_not_changed(
    adapted: bool, tmp_path: Path
) -> None:
    def make() -> Any:
        return lora() if adapted else base_model("llama")

    class Evaluate(TrainerCallback):  # type: ignore[misc]  # the argument for it has two names
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_evaluate = state.global_step == 2

    callback = InstructionRetentionCallback(PROMPTS, alert_kl=None)
    watched = train(tmp_path / "a", make(), [Evaluate(), callback])
    plain = train(tmp_path / "b", make(), [Evaluate()])
    found = logged(watched)
    assert list(found) == [0, 2, 4]
    assert (found[0]["retention_kl"], found[0]["retention_agreement"]) == (0.0, 1.0)
    assert 0 < found[2]["retention_kl"] < found[4]["retention_kl"]
    for (name, one), other in zip(watched.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    # The last line, made again from the model that came out and the base that went in.
    memories = retention.remember(base_model("llama"), PROMPTS, callback.new_tokens, callback.top)
    assert found[4]["retention_kl"] == pytest.approx(retention.compare(watched.model, memories).kl, rel=1e-5)


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_the_base_of_a_soft_prompt_is_the_model_without_it(method: str, tmp_path: Path) -> None:
    model = wrap(base_model("llama"), method)
    trainer = train(tmp_path, model, [InstructionRetentionCallback(PROMPTS, alert_kl=None)], max_steps=1)
    found = logged(trainer)
    memories = retention.remember(base_model("llama"), PROMPTS, 16, 20)
    assert found[1]["retention_kl"] == pytest.approx(retention.compare(trainer.model, memories).kl, rel=1e-5)
    assert found[0]["retention_kl"] > 0.01  # an untrained soft prompt changes the answers at once


@pytest.mark.parametrize("adapted", [True, False])
def test_a_resumed_run_compares_with_the_same_base(
    adapted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers before 4.47 cannot read its own random state with torch >= 2.6
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    def make() -> Any:
        return lora() if adapted else base_model("llama")

    def watching() -> list[Any]:
        return [InstructionRetentionCallback(PROMPTS, alert_kl=None)]

    whole = train(tmp_path, make(), watching(), save_steps=2)
    assert (tmp_path / ANSWERS).is_file() is not adapted
    resumed = train(tmp_path, make(), watching(), resume=str(tmp_path / "checkpoint-2"))
    assert logged(resumed)[4] == logged(whole)[4]


def test_without_the_kept_answers_a_resumed_run_says_what_it_compares_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    train(tmp_path / "a", base_model("llama"), [], save_steps=2)
    callback = InstructionRetentionCallback(PROMPTS, alert_kl=None)
    train(tmp_path / "b", base_model("llama"), [callback], resume=str(tmp_path / "a" / "checkpoint-2"))
    (message,) = warned(caplog)
    assert "compares with the model as it is resumed" in message


def stretched(factor: float) -> Any:
    """A model read at positions divided by a factor, as linear rope scaling reads them."""
    model = base_model("llama")
    rotary = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]
    assert rotary
    for module in rotary:
        module.inv_freq /= factor
        for name in ("cos_cached", "sin_cached"):  # of releases that make a table once
            if hasattr(module, name):
                module._set_cos_sin_cache(module.max_seq_len_cached, module.inv_freq.device, torch.float32)
    return model


@pytest.mark.parametrize(("factor", "alarms"), [(1, 0), (4, 1)])
def test_a_changed_rope_is_seen_from_step_0_with_the_base_that_was_given(
    factor: float, alarms: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    callback = InstructionRetentionCallback(PROMPTS, base=base_model("llama"), alert_kl=0.05)
    trainer = train(tmp_path, stretched(factor), [callback], learning_rate=1e-6)
    found = logged(trainer)
    assert len(warned(caplog)) == alarms  # once, though it stays above
    assert callback.base is None
    if alarms:
        assert min(found[0]["retention_kl"], found[4]["retention_kl"]) > 0.05
        assert "not a proof" in warned(caplog)[0]
    else:
        assert (found[0]["retention_kl"], found[4]["retention_kl"] < 1e-4) == (0.0, True)


def test_texts_without_a_tokenizer_are_no_end_of_the_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = train(tmp_path, base_model("llama"), [InstructionRetentionCallback()])
    (message,) = warned(caplog)
    assert "instruction retention is not measured" in message
    assert "processing_class" in message
    assert trainer.state.global_step == 4
    assert logged(trainer) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"instructions": "Say hello."}, "a list of texts"),
        ({"instructions": []}, "none of them empty"),
        ({"instructions": [[]]}, "none of them empty"),
        ({"new_tokens": 0}, "at least 1"),
        ({"top": 0}, "at least 1"),
    ],
)
def test_a_wrong_choice_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InstructionRetentionCallback(**arguments)


def test_the_door_has_it() -> None:
    assert ptfix.InstructionRetentionCallback is InstructionRetentionCallback
