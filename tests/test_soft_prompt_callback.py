"""SoftPromptCallback inside a real Trainer, and the check behind it, on whatever pair of hosts is installed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

import ptfix
from ptfix import models
from ptfix.callbacks.soft_prompt import SoftPromptCallback, SoftPromptError
from ptfix.soft_prompts.proof import check, reference
from tests.matrix.models import VOCAB, base_model, wrap
from tests.runs import arguments as arguments_of

ROWS = [{"input_ids": [5, 9, 23, 40, 17, 8], "labels": [5, 9, 23, 40, 17, 8]} for _ in range(4)]


@pytest.fixture(autouse=True)
def _stock() -> Iterator[None]:
    """Every test starts without ptfix."""
    ptfix.revert()
    yield
    ptfix.revert()


def prompted(method: str = "prompt_tuning", architecture: str = "llama") -> Any:
    return wrap(base_model(architecture), method)


class _Ignorant:
    """A generate() that has forgotten the soft prompt, as the hosts' own has in many pairs."""

    def __init__(self, model: Any) -> None:
        self.base = model.base_model

    def __call__(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
        return self.base.generate(*args, **kwargs)


def ignorant(model: Any) -> Any:
    model.generate = _Ignorant(model)
    return model


def powerless(model: Any) -> Any:
    """A soft prompt whose own training forward has lost it."""
    forward = model.base_model.forward
    model.forward = lambda input_ids, task_ids=None, **kwargs: forward(input_ids=input_ids, **kwargs)
    return ignorant(model)


def train(model: Any, folder: Path, callbacks: list[Any], rows: list[Any] = ROWS, **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {"max_steps": 2, "save_steps": 100, "learning_rate": 1e-3}
    args = arguments_of(
        folder,
        remove_unused_columns=False,
        **{**defaults, **arguments},
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return trainer


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name == "ptfix" and record.levelno >= logging.WARNING]
    return [record.getMessage() for record in records]


def stock_is_right(model: Any) -> bool:
    """Whether this pair of hosts, alone, generates what was trained; by another way than the check's."""
    ids = torch.tensor([ROWS[0]["input_ids"]])
    model.eval()
    try:
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        out = model.generate(input_ids=ids, **options)
    except Exception:
        return False
    return torch.equal(out, reference.greedy(model, ids, 6)[0])


def test_the_tuned_model_that_answers_like_the_base_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Story 1, on stock hosts: silent nonsense becomes one warning; where this pair is right there is none."""
    model = prompted()
    train(model, tmp_path, [SoftPromptCallback()])
    messages = warned(caplog)
    assert len(messages) == (0 if stock_is_right(model) else 1)
    if messages:
        assert "generate()" in messages[0]
        assert "ptfix.apply()" in messages[0]


@pytest.mark.parametrize("arguments", [{}, {"bf16": True}, {"gradient_checkpointing": True}], ids=str)
def test_with_ptfix_the_same_training_is_silent(
    arguments: dict[str, bool], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ptfix.apply(strict=True)
    model = prompted()
    train(model, tmp_path, ptfix.callbacks(), **arguments)
    assert warned(caplog) == []
    assert stock_is_right(model)


def test_a_generate_that_ignores_the_prompt_is_reported_in_every_pair(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(ignorant(prompted()), tmp_path, [SoftPromptCallback()])
    (message,) = warned(caplog)
    assert "ignores the soft prompt" in message


def test_a_prompt_without_effect_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = train(prompted(), tmp_path, [])
    SoftPromptCallback().on_train_end(trainer.args, trainer.state, trainer.control, model=powerless(prompted()))
    (message,) = warned(caplog)
    assert "no effect" in message
    assert "ptfix.apply()" not in message  # it would not help


def test_it_raises_when_asked(tmp_path: Path) -> None:
    with pytest.raises(SoftPromptError, match="ignores the soft prompt"):
        train(ignorant(prompted()), tmp_path, [SoftPromptCallback(on_problem="raise")])


def test_it_checks_at_each_save_when_asked_and_says_a_thing_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = ignorant(prompted())
    calls = []
    forgetful = model.generate
    model.generate = lambda *args, **kwargs: calls.append(1) or forgetful(*args, **kwargs)
    train(model, tmp_path, [SoftPromptCallback(every_save=True)], save_steps=1)
    assert len(calls) == 3  # two saves and the end
    assert len(warned(caplog)) == 1


@pytest.mark.parametrize("method", ["p_tuning", "multitask_prompt_tuning", "prefix_tuning"])
def test_other_methods(method: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    ptfix.apply()
    tasks = {"task_ids": 0} if method == "multitask_prompt_tuning" else {}
    train(prompted(method, "gpt2"), tmp_path, ptfix.callbacks(), rows=[{**row, **tasks} for row in ROWS])
    assert warned(caplog) == []


def test_silent_about_models_without_a_soft_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lora = get_peft_model(base_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    for model in (lora, base_model("llama")):
        train(model, tmp_path, [SoftPromptCallback(on_problem="raise")])
    assert warned(caplog) == []


def test_what_cannot_be_checked_is_said_and_loses_no_training(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    trainer = train(prompted(), tmp_path, [SoftPromptCallback(rows=[[VOCAB + 5]])])
    (message,) = warned(caplog)
    assert "could not be checked" in message
    assert trainer.state.global_step == 2


def test_a_wrong_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="'warn' or 'raise'"):
        SoftPromptCallback(on_problem="shout")  # type: ignore[arg-type]


def test_the_check_leaves_the_model_as_it_was() -> None:
    ptfix.apply()
    model = prompted().train()
    frozen = model.base_model.get_input_embeddings().eval()
    weight = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    weight.grad = torch.full_like(weight, 0.5)
    before = {name: id(value) for name, value in vars(model.base_model).items()}
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    assert check.check(model).good
    assert {name: id(value) for name, value in vars(model.base_model).items()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not frozen.training
    assert torch.equal(weight.grad, torch.full_like(weight, 0.5))


def test_a_model_s_own_settings_are_no_fault() -> None:
    """A repetition penalty and an early eos change what generate() says, not whether it is right."""
    ptfix.apply()
    model = prompted()
    ids, _ = reference.greedy(model, models.any_row(model.base_model, seed=0), 1)
    model.base_model.generation_config.repetition_penalty = 5.0
    model.base_model.generation_config.eos_token_id = int(ids[0, -1])
    assert check.check(model).good
    assert model.base_model.generation_config.repetition_penalty == 5.0


def test_a_prompt_that_changes_logits_but_no_token_acts() -> None:
    ptfix.apply()
    model = prompted()

    def says(asked: Any, row: torch.Tensor) -> int:
        return int(reference.greedy(asked, row, 1)[0][0, -1])

    rows = (models.any_row(model.base_model, seed, tokens=24) for seed in range(200))
    row = next(row for row in rows if says(model, row) == says(model.base_model, row))
    result = check.check(model, row, new_tokens=1)
    assert result.good
    # ... and where generate() has lost the prompt, the right token does not hide it.
    result = check.check(ignorant(model), row, new_tokens=1)
    assert (result.acts, result.exact) == (True, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_fault_but_a_lost_prompt_still_is(dtype: torch.dtype) -> None:
    ptfix.apply()
    model = prompted().to(dtype)
    assert check.check(model, new_tokens=8).good
    result = check.check(ignorant(model), new_tokens=8)
    assert result.acts
    assert not result.exact


def test_equally_good_tokens_are_no_fault() -> None:
    model = prompted()
    row = torch.tensor([[5, 9, 23]])
    asked = check.Asked(model, 2)
    ids, scores = asked.truth(row)
    first = int(ids[0, 3])
    tied, other = scores.clone(), (first + 1) % VOCAB
    tied[0, other] = tied[0, first] - 1e-6
    asked._truths[tuple(row[0].tolist()), 2] = ids, tied
    assert asked.first_difference(check.Answer(row, torch.tensor([other, 3]))) is None
    asked._truths[tuple(row[0].tolist()), 2] = ids, scores
    assert asked.first_difference(check.Answer(row, torch.tensor([other, 3]))) == 0
    assert asked.first_difference(check.Answer(row, ids[0, 3:])) is None
    assert asked.first_difference(check.Answer(row, ids[0, 3:4])) == 1  # too short
    assert asked.first_difference(check.Answer(row, ids[0, 3:], scores + 1)) == 0


def test_wrapped_models_are_looked_into() -> None:
    class Wrapper(torch.nn.Module):  # what DistributedDataParallel looks like from outside
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

    ptfix.apply()
    model = prompted()
    assert models.unwrap(Wrapper(model)) is model
    assert check.check(Wrapper(model)).good


@pytest.mark.parametrize(
    ("architecture", "change", "words"),
    [
        ("llama", {"token_dim": 16}, "16 wide"),
        ("gpt2", {"num_virtual_tokens": 256}, "256 virtual tokens leave 0"),
        ("opt", {"num_virtual_tokens": 300}, "300 virtual tokens leave 0"),
        ("llama", {"num_virtual_tokens": 300}, None),  # rotary: no table to run out of
        ("gpt2", {"num_virtual_tokens": 255}, None),
    ],
)
def test_what_does_not_fit(architecture: str, change: dict[str, int], words: str | None) -> None:
    base = base_model(architecture)
    config = copy.copy(wrap(copy.deepcopy(base), "prompt_tuning").peft_config["default"])
    for name, value in change.items():
        setattr(config, name, value)
    reason = check.misfit(config, base)
    assert reason is None if words is None else words in str(reason)


def test_a_prefix_of_another_depth_does_not_fit() -> None:
    base = base_model("gpt2")
    config = copy.copy(wrap(copy.deepcopy(base), "prefix_tuning").peft_config["default"])
    config.num_layers = 7
    assert "7 layers" in str(check.misfit(config, base))
