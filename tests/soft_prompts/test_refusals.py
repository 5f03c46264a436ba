"""What a soft prompt cannot do is refused in one sentence, before it costs anything; what looks like it is not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import Trainer

import ptfix
from ptfix import SequenceLengthGuardCallback
from ptfix.soft_prompts import refusals
from tests.matrix import models
from tests.runs import arguments


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()
    yield
    ptfix.revert()


def made(method: str = "prompt_tuning") -> Any:
    return models.wrap(models.base_model("llama"), method)


def text(rows: int = 1, tokens: int = 6) -> torch.Tensor:
    return torch.randint(2, models.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_continuous_batching_is_refused(method: str) -> None:
    model = made(method)
    names = [name for name in refusals.CONTINUOUS_BATCHING if hasattr(model.base_model, name)]
    if not names:
        pytest.skip("this release has no continuous batching")
    for name in names:
        assert getattr(getattr(model, name), "__self__", None) is not model.base_model  # which would start a thread
        with pytest.raises(ValueError, match="answers as the base model"):
            getattr(model, name)([[3, 4, 5]])
    with model.disable_adapter():
        assert getattr(model, names[0]).__self__ is model.base_model
    assert getattr(model.base_model, names[0]).__self__ is model.base_model


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])},
        {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "attention_mask": torch.ones(1, 6, dtype=torch.long)},
        {"position_ids": torch.tensor([[6, 7, 8, 9, 10, 11]])},
        {"cu_seq_lens_q": torch.tensor([0, 3, 6], dtype=torch.int32)},
        {"seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1]])},
    ],
    ids=["restart", "restart with a mask", "a later part", "cu_seq_lens", "seq_idx"],
)
def test_packed_rows_are_refused(given: dict[str, torch.Tensor], method: str) -> None:
    with pytest.raises(ValueError, match="rows are packed or split"):
        made(method)(input_ids=text(), labels=text(), **given)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_other_positions_stay_the_hosts_own(method: str) -> None:
    model, ids = made(method), text(2)
    right = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    calls: list[dict[str, Any]] = [
        {"position_ids": torch.arange(6)[None]},
        {"position_ids": torch.arange(1, 7).expand(2, 6)},
        {"position_ids": (right.cumsum(-1) - 1) * right, "attention_mask": right},
        {"attention_mask": right},
    ]
    ours = [model(input_ids=ids, **call).logits for call in calls]
    ptfix.revert()
    for call, logits in zip(calls, ours, strict=True):
        try:
            stock = model(input_ids=ids, **call).logits
        except Exception as error:
            pytest.skip(f"stock cannot train it: {type(error).__name__}")
        assert torch.equal(stock, logits)


def test_left_padded_positions_are_read_with_their_mask() -> None:
    model, ids = made(), text(2)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[1, -1]
        alone = model(input_ids=ids[1:, 3:]).logits[0, -1]
    torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_4d_mask_is_refused(method: str) -> None:
    with pytest.raises(ValueError, match="2D attention_mask"):
        made(method)(input_ids=text(), attention_mask=torch.ones(1, 1, 6, 6))


def flattening() -> Any:
    if not hasattr(transformers, "DataCollatorWithFlattening"):
        pytest.skip("this release does not flatten")
    return transformers.DataCollatorWithFlattening()


def trained(model: Any, folder: Path, collator: Any, *callbacks: Any) -> Trainer:
    rows = [{"input_ids": text()[0].tolist()} for _ in range(4)]
    args = arguments(folder, max_steps=1, per_device_train_batch_size=2, save_strategy="no")
    run = Trainer(model=model, args=args, train_dataset=rows, data_collator=collator, callbacks=list(callbacks))
    run.train()
    return run


def test_a_run_on_packed_rows_ends_before_its_first_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, collator = made(), flattening()
    before = model.prompt_encoder.default.embedding.weight.detach().clone()
    with pytest.raises(ValueError, match="rows are packed or split"):
        trained(model, tmp_path, collator, SequenceLengthGuardCallback())
    assert torch.equal(model.prompt_encoder.default.embedding.weight, before)
    said = [one.getMessage() for one in caplog.records if one.name == "ptfix" and one.levelno == logging.WARNING]
    assert any("rows are packed or split" in sentence for sentence in said)


def test_the_guard_is_silent_about_lora_and_padded_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    trained(made(), tmp_path, pad, SequenceLengthGuardCallback())
    if hasattr(transformers, "DataCollatorWithFlattening"):
        import peft

        lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
        trained(
            peft.get_peft_model(models.base_model("llama"), lora), tmp_path, flattening(), SequenceLengthGuardCallback()
        )
    assert not [one for one in caplog.records if "packed" in one.getMessage()]


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_guidance_is_away_from_the_base_model(method: str) -> None:
    """The conditional branch has the soft prompt; the unconditional one, here the last token, is the base alone."""
    model, ids, scale = made(method), text(), 2.0
    if not hasattr(transformers, "UnbatchedClassifierFreeGuidanceLogitsProcessor"):
        pytest.skip("this release has no guidance")
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        guidance_scale=scale,
        max_new_tokens=1,
        do_sample=False,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        conditional = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        unconditional = model.base_model(input_ids=ids[:, -1:]).logits[0, -1].log_softmax(-1)
    guided = scale * (conditional - unconditional) + unconditional
    torch.testing.assert_close(out.scores[0][0], guided, atol=2e-3, rtol=0)
