"""A soft prompt on a PeftModel that is LoRA already: both act, in training and in generate()."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch

import ptfix
from ptfix.soft_prompts import caches
from ptfix.soft_prompts.proof import reference
from tests.matrix import models

METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning")
NEW = 3


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()
    torch.set_num_threads(1)
    yield
    ptfix.revert()


def lora(base: Any) -> Any:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.5, generator=generator)
    return model.eval()


def stacked(method: str) -> Any:
    model = models.wrap(lora(models.base_model("llama")), method)
    with torch.no_grad():
        try:
            model(input_ids=text(), **models.task_ids(method, 1))
        except Exception as error:
            ptfix.revert()
            with pytest.raises(type(error)):
                model(input_ids=text(), **models.task_ids(method, 1))
            pytest.skip(f"stock cannot train it: {type(error).__name__}")
    return model


def text() -> torch.Tensor:
    return torch.randint(2, models.VOCAB, (1, 9), generator=torch.Generator().manual_seed(7))


def padded() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    ids = torch.cat((text(), text().flip(1)))
    mask = torch.ones_like(ids)
    ids[1, :4] = mask[1, :4] = 0
    return ids, mask, [ids[:1], ids[1:, 4:]]


def scores(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """Scores ``[rows, NEW, vocab]`` of generate()."""
    more.setdefault("attention_mask", torch.ones_like(ids))
    out = model.generate(
        input_ids=ids,
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **more,
    )
    return torch.stack(out.scores, 1)


def truth(model: Any, row: torch.Tensor, method: str) -> torch.Tensor:
    return reference.greedy(model, row, NEW, **models.task_ids(method, 1))[1]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_both_act_in_generate(method: str) -> None:
    model, (ids, mask, rows) = stacked(method), padded()
    for got, row in zip(scores(model, ids, attention_mask=mask, **models.task_ids(method, 2)), rows, strict=True):
        assert apart(got, truth(model, row, method)) < 2e-3
    alone = scores(model.base_model, rows[0])[0]
    assert apart(scores(model, rows[0], **models.task_ids(method, 1))[0], alone) > 0.1


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_either_can_be_disabled_or_merged(method: str) -> None:
    model, row = stacked(method), text()
    both = scores(model, row)[0]
    with model.disable_adapter():
        assert torch.equal(scores(model, row)[0], scores(model.base_model, row)[0])  # LoRA alone
    inner = model.base_model
    with inner.disable_adapter():
        without_lora = scores(model, row)[0]
        assert apart(without_lora, truth(model, row, method)) < 2e-3
    assert apart(without_lora, both) > 0.1
    assert torch.equal(scores(model, row)[0], both)
    inner.merge_adapter()
    merged = scores(model, row)[0]
    assert apart(merged, truth(model, row, method)) < 2e-3
    assert apart(merged, both) < 2e-3
    inner.unmerge_adapter()
    assert apart(scores(model, row)[0], both) < 2e-3


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_loop_over_both(method: str) -> None:
    model, (ids, mask, rows) = stacked(method), padded()
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask, use_cache=True)
        new = first.logits[:, -1:].argmax(-1)
        longer = torch.cat((mask, torch.ones_like(new)), 1)
        second = model(input_ids=new, attention_mask=longer, **{caches.keyword(): caches.of(first)})
    for got, row, token in zip(second.logits[:, -1], rows, new, strict=True):
        assert apart(got, reference.last_logits(model, torch.cat((row, token[None]), 1))[0]) < 2e-3


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_the_training_forward_of_both_is_the_hosts_own(method: str) -> None:
    model, ids = stacked(method), torch.cat((text(), text().flip(1)))
    ours = model(input_ids=ids, labels=ids)
    ptfix.revert()
    try:
        stock = model(input_ids=ids, labels=ids)
    except Exception as error:
        pytest.skip(f"stock cannot train it: {type(error).__name__}")
    assert torch.equal(ours.logits, stock.logits)
    assert torch.equal(ours.loss, stock.loss)


def test_lora_on_a_soft_prompt() -> None:
    """The other way round: LoRA's layers stand inside the model that the soft prompt was put on."""
    model, row = lora(models.wrap(models.base_model("llama"), "prompt_tuning")), text()
    with torch.no_grad():
        true = model(input_ids=row).logits[0, -1]
    assert apart(scores(model, row)[0, 0], true) < 2e-3


def test_two_soft_prompts_are_refused() -> None:
    inner = models.wrap(models.base_model("llama"), "prompt_tuning")
    outer = models.wrap(inner, "prompt_tuning", seed=2)
    with pytest.raises(ValueError, match="another soft prompt"):
        scores(outer, text())
