"""Task heads with a soft prompt: each row of a batch gets what it gets alone, each token one output."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import ptfix
from ptfix import cli
from ptfix.soft_prompts.proof import check
from tests import runs

VIRTUAL, VOCAB = 5, 64
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": ("Llama", _SIZES),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0},
    ),
    "mistral": ("Mistral", {**_SIZES, "num_key_value_heads": 2, "sliding_window": 8}),
    "bloom": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0}),
    "bert": ("Bert", _SIZES),
    "roberta": ("Roberta", {**_SIZES, "pad_token_id": 1}),
}
#: task type -> the end of the host's class name, what is compared
TASKS = {
    "SEQ_CLS": ("ForSequenceClassification", ("logits",)),
    "TOKEN_CLS": ("ForTokenClassification", ("logits",)),
    "QUESTION_ANS": ("ForQuestionAnswering", ("start_logits", "end_logits")),
    "FEATURE_EXTRACTION": ("Model", ("last_hidden_state",)),
}
METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning")
CASES = list(itertools.product(ARCHITECTURES, TASKS, METHODS))


@pytest.fixture(scope="module", autouse=True)
def stock() -> Iterator[dict[tuple[str, str, str], Any]]:
    """What the hosts alone say of an unpadded row, as outputs and as a tuple; the error where they raise. ptfix is
    applied afterwards."""
    ptfix.revert()
    found: dict[tuple[str, str, str], Any] = {}
    for case in CASES:
        if not is_made(*case[:2]):
            continue
        try:
            model = prompted(*case)
            found[case] = [said(model, rows()[0]), said(model, rows()[0], return_dict=False)]
        except Exception as error:
            found[case] = error
    ptfix.apply()
    yield found
    ptfix.revert()


def is_made(architecture: str, task: str) -> bool:
    """Has the installed transformers this class?"""
    return hasattr(transformers, f"{ARCHITECTURES[architecture][0]}{TASKS[task][0]}")


def config(method: str, task: str) -> Any:
    common = {"task_type": task, "num_virtual_tokens": VIRTUAL}
    if method == "prompt_tuning":
        return peft.PromptTuningConfig(**common)
    if method == "p_tuning":
        return peft.PromptEncoderConfig(encoder_hidden_size=16, **common)
    if method == "prefix_tuning":
        return peft.PrefixTuningConfig(**common)
    return peft.MultitaskPromptTuningConfig(num_tasks=2, num_ranks=1, **common)


def prompted(architecture: str, task: str, method: str) -> Any:
    """A tiny model with a strong soft prompt."""
    family, sizes = ARCHITECTURES[architecture]
    if not is_made(architecture, task):
        pytest.skip(f"this transformers has no {family}{TASKS[task][0]}")
    made = getattr(transformers, f"{family}{TASKS[task][0]}")
    settings = getattr(transformers, f"{family}Config")(**sizes)
    settings.num_labels = 2 if task == "QUESTION_ANS" else 3
    base, generator = made(settings), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=generator)
        model = peft.get_peft_model(base, config(method, task))
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 1.0 if parameter.dim() > 1 else 0.1, generator=generator)
    return model.eval()


def said(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Any:
    if model.peft_config["default"].peft_type == "MULTITASK_PROMPT_TUNING":
        options["task_ids"] = torch.ones(len(ids), dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(2, VOCAB, (1, length), generator=generator) for length in (9, 5, 7)]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows as one batch: padded on the left, on the right, or a part on either side."""
    width = max(row.shape[1] for row in rows())

    def pad(row: torch.Tensor) -> torch.Tensor:
        missing = width - row.shape[1]
        left = {"left": missing, "right": 0, "both": missing // 2}[side]
        return torch.nn.functional.pad(row, (left, missing - left), value=-1)

    batch = torch.cat([pad(row) for row in rows()])
    return batch.clamp(min=0), (batch >= 0).long()


def can(model: Any) -> bool:
    """Can it read an unpadded row? Where stock raises for that too, another fault is in the way."""
    try:
        said(model, rows()[0])
    except Exception:
        return False
    return True


@pytest.mark.parametrize(("architecture", "task", "method"), CASES)
def test_a_padded_row_gets_what_the_row_gets_alone(
    architecture: str, task: str, method: str, stock: dict[tuple[str, str, str], Any]
) -> None:
    model = prompted(architecture, task, method)
    if isinstance(stock[architecture, task, method], Exception) and not can(model):
        pytest.skip("stock raises for an unpadded row")
    for side in ("left", "right", "both"):
        ids, mask = padded(side)
        batch = said(model, ids, mask)
        for number, row in enumerate(rows()):
            alone = said(model, row)
            for name in TASKS[task][1]:
                got = batch[name][number]
                if task != "SEQ_CLS":
                    assert got.shape[0] == ids.shape[1], "one output for each token"
                    got = got[mask[number].bool()]
                torch.testing.assert_close(got, alone[name][0], rtol=1e-4, atol=1e-4, msg=f"{side} {number}")


@pytest.mark.parametrize(("architecture", "task", "method"), CASES)
def test_an_unpadded_row_stays_bit_for_bit_what_stock_says(
    architecture: str, task: str, method: str, stock: dict[tuple[str, str, str], Any]
) -> None:
    model, ids, theirs = prompted(architecture, task, method), rows()[0], stock[architecture, task, method]
    if isinstance(theirs, Exception):
        pytest.skip(f"stock raises {type(theirs).__name__}")
    outputs, as_tuple = said(model, ids), said(model, ids, return_dict=False)
    for name in TASKS[task][1]:
        expected = theirs[0][name]
        assert torch.equal(outputs[name], expected if task == "SEQ_CLS" else expected[:, -ids.shape[1] :])
    first = TASKS[task][1][0]
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], outputs[first])
    # The soft prompt acts: the base model alone says something else.
    with torch.no_grad():
        plain = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert not torch.allclose(plain[first], outputs[first], atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_losses_are_those_of_the_outputs(architecture: str, method: str, side: str) -> None:
    loss = torch.nn.functional.cross_entropy
    ids, mask = padded(side)
    model = prompted(architecture, "SEQ_CLS", method)
    if not can(model):
        pytest.skip("stock raises for an unpadded row")
    classes = torch.tensor([0, 2, 1])
    out = said(model, ids, mask, labels=classes)
    alone = torch.cat([said(model, row).logits for row in rows()])
    torch.testing.assert_close(out.loss, loss(alone, classes), rtol=1e-4, atol=1e-4)

    if is_made(architecture, "TOKEN_CLS"):
        model = prompted(architecture, "TOKEN_CLS", method)
        labels = (ids % 3).masked_fill(mask == 0, -100)
        out = said(model, ids, mask, labels=labels)
        each = torch.cat([said(model, row).logits[0] for row in rows()])
        torch.testing.assert_close(
            out.loss, loss(each, torch.cat([row[0] % 3 for row in rows()])), rtol=1e-4, atol=1e-4
        )

    if is_made(architecture, "QUESTION_ANS"):
        model = prompted(architecture, "QUESTION_ANS", method)
        first = mask.argmax(-1)
        start, end = first + 1, first + 3
        out = said(model, ids, mask, start_positions=start, end_positions=end)
        rowwise = (loss(out.start_logits, start) + loss(out.end_logits, end)) / 2
        torch.testing.assert_close(out.loss, rowwise, rtol=1e-4, atol=1e-4)


def test_a_class_is_read_through_what_accelerate_hangs_on_the_base() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = prompted("llama", "SEQ_CLS", "prompt_tuning")
    ids, mask = padded("right")
    expected = said(model, ids, mask).logits
    hooks.add_hook_to_module(model.base_model, hooks.AlignDevicesHook(execution_device="cpu"))
    assert torch.equal(said(model, ids, mask).logits, expected)


def test_a_trainer_with_the_default_collator_trains_rows_as_they_are_alone(tmp_path: Path) -> None:
    """Two right-padded rows of different length: the step is the mean of the steps of each row alone."""
    model = prompted("llama", "SEQ_CLS", "prompt_tuning")
    data = [{"input_ids": row[0].tolist(), "labels": number} for number, row in enumerate(rows()[:2])]
    weight = model.prompt_encoder["default"].embedding.weight
    gradients = []
    for each in data:
        model.zero_grad()
        ids = torch.tensor([each["input_ids"]])
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([each["labels"]])).loss.backward()
        gradients.append(weight.grad.clone())
    before, rate = weight.detach().clone(), 0.125
    transformers.Trainer(
        model=model,
        args=runs.arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=2,
            learning_rate=rate,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            save_strategy="no",
        ),
        train_dataset=data,
        data_collator=transformers.DataCollatorWithPadding(word_tokenizer()),
    ).train()
    expected = before - rate * (gradients[0] + gradients[1]) / 2
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_the_check_covers_task_heads(architecture: str, task: str) -> None:
    if not is_made(architecture, task):
        pytest.skip(f"this transformers has no {architecture} for {task}")
    model = prompted(architecture, task, "prompt_tuning").train()
    assert check.check(model).sentence == "the soft prompt acts, and a padded row gets what it gets alone"
    assert model.training
    ptfix.revert()
    try:
        found = check.check(model)
    finally:
        ptfix.apply()
    assert found.acts
    assert not found.exact
    assert "padded on the" in found.sentence


def test_verify_judges_a_saved_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = prompted("llama", "SEQ_CLS", "prompt_tuning")
    model.base_model.save_pretrained(tmp_path / "base", state_dict=plain_weights(model))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    try:
        assert cli.main(["verify", str(tmp_path / "adapter")]) == 0
        assert "padded on the right  exact" in capsys.readouterr().out
        assert cli.main(["verify", "--stock", str(tmp_path / "adapter")]) == 1
        assert "PROBLEM" in capsys.readouterr().out
    finally:
        ptfix.apply()


def plain_weights(model: Any) -> dict[str, torch.Tensor]:
    """Those of the base model, by the names they have without an adapter."""
    weights = model.base_model.state_dict()
    return {
        name.replace("original_module.", ""): value for name, value in weights.items() if "modules_to_save" not in name
    }


def test_the_callback_covers_task_heads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = prompted("llama", "SEQ_CLS", "prompt_tuning")
    data = [{"input_ids": row[0].tolist(), "labels": number} for number, row in enumerate(rows())]
    ptfix.revert()  # stock is wrong, and says nothing
    try:
        transformers.Trainer(
            model=model,
            args=runs.arguments(tmp_path, max_steps=1, per_device_train_batch_size=1, save_strategy="no"),
            train_dataset=data,
            callbacks=[ptfix.SoftPromptCallback()],
        ).train()
    finally:
        ptfix.apply()
    assert "a row padded on the" in caplog.text


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{number}": number for number in range(VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", padding_side="right")
