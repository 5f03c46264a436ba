"""Decode loops of the users' own: forward() with a KV cache equals the training forward of the whole text."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

import ptfix
from ptfix.soft_prompts import caches
from ptfix.soft_prompts.proof import reference
from tests.matrix import models
from tests.matrix.models import VIRTUAL_TOKENS, NotInThisPair

STEPS = 3
MORE_ARCHITECTURES = ("gpt2", "gemma3_text", "bloom", "opt", "mistral_window")


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()
    torch.set_num_threads(1)
    yield
    ptfix.revert()


def made(architecture: str, method: str) -> Any:
    try:
        base = windowed() if architecture == "mistral_window" else models.base_model(architecture)
        return models.wrap(base, method)
    except NotInThisPair as reason:
        pytest.skip(str(reason))


def windowed() -> Any:
    """Its text is longer than what its layers look back."""
    sizes = {**models._LLAMA_LIKE, "sliding_window": 6, "vocab_size": models.VOCAB}
    base = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes, pad_token_id=0, eos_token_id=None))
    return models.sharpen(base, 0).eval()


def text(rows: int = 1, tokens: int = 9, seed: int = 7) -> torch.Tensor:
    return torch.randint(2, models.VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def padded() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Ids, mask, and the rows alone: the second has four pads on its left."""
    ids, mask = text(2), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4] = mask[1, :4] = 0
    return ids, mask, [ids[:1], ids[1:, 4:]]


def positions_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def step(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any, **more: Any) -> Any:
    given = {} if cache is None else {caches.keyword(): cache}
    if mask is not None:
        given["attention_mask"] = mask
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **given, **more)


def loop(
    model: Any,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    cache: Any = None,
    with_positions: bool = False,
    task_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits ``[rows, STEPS, vocab]`` of a greedy loop."""
    more: dict[str, Any] = {} if task_ids is None else {"task_ids": task_ids}
    scores, new = [], ids
    for _ in range(STEPS):
        if with_positions and mask is not None:
            more["position_ids"] = positions_of(mask)[:, -new.shape[1] :]
        out = step(model, new, mask, cache, **more)
        cache = caches.of(out)
        scores.append(out.logits[:, -1])
        new = scores[-1].argmax(-1, keepdim=True)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
    return torch.stack(scores, 1)


def assert_as_trained(model: Any, scores: torch.Tensor, rows: list[torch.Tensor], method: str = "") -> None:
    for got, row in zip(scores, rows, strict=True):
        _, true = reference.greedy(model, row, STEPS, models.task_ids(method, 1).get("task_ids"))
        torch.testing.assert_close(got, true, atol=2e-3, rtol=0)
        with torch.no_grad():
            base = model.base_model(input_ids=row).logits[0, -1]
        assert (got[0] - base).abs().max() > 0.1


@pytest.mark.parametrize("method", models.METHODS)
@pytest.mark.parametrize("with_positions", [False, True])
def test_a_left_padded_loop(method: str, with_positions: bool) -> None:
    model = made("llama", method)
    ids, mask, rows = padded()
    scores = loop(model, ids, mask, None, with_positions, **models.task_ids(method, 2))
    assert_as_trained(model, scores, rows, method)


@pytest.mark.parametrize("method", models.METHODS)
def test_a_loop_without_a_mask(method: str) -> None:
    model = made("llama", method)
    assert_as_trained(model, loop(model, text(), None, **models.task_ids(method, 1)), [text()], method)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("architecture", MORE_ARCHITECTURES)
def test_loops_of_other_architectures(architecture: str, method: str) -> None:
    model = made(architecture, method)
    ids, mask, rows = padded()
    assert_as_trained(model, loop(model, text(), None), [text()])
    if method == "prefix_tuning" and not caches.can_put_when_fed(model.base_model):
        rows = rows[:1]  # tuples hold a prefix in front of the padding: refused where that matters, else the same
        ids, mask = ids[:1], mask[:1]
    assert_as_trained(model, loop(model, ids, mask), rows)


def test_it_caches_what_it_should() -> None:
    model = made("llama", "prefix_tuning")
    first = step(model, text(), None, None)
    assert caches.length(caches.of(first)) == VIRTUAL_TOKENS + 9
    second = step(model, text(1, 2), None, caches.of(first))
    assert caches.length(caches.of(second)) == VIRTUAL_TOKENS + 11
    assert second.logits.shape[:2] == (1, 2)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_cache_that_generate_returned(method: str) -> None:
    model = made("llama", method)
    ids, mask, rows = padded()
    if "return_legacy_cache" not in vars(transformers.GenerationConfig()) and not caches.can_put_when_fed(
        model.base_model
    ):
        pytest.skip("generate() of this release returns no cache")
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False, return_dict_in_generate=True
    )
    if caches.of(out) is None:
        pytest.skip("generate() of this release returns no cache")
    whole = torch.cat((mask, torch.ones(2, 2, dtype=torch.long)), 1)
    last = step(model, out.sequences[:, -1:], whole, caches.of(out)).logits[:, -1]
    for got, row, new in zip(last, rows, out.sequences[:, -2:], strict=True):
        true = reference.last_logits(model, torch.cat((row, new[None]), 1))[0]
        torch.testing.assert_close(got, true, atol=2e-3, rtol=0)


def user_caches() -> dict[str, Callable[[Any], Any]]:
    return {
        "dynamic": lambda model: transformers.DynamicCache(),
        "static": lambda model: static_cache(model, 40),
    }


def static_cache(model: Any, positions: int) -> Any:
    if not hasattr(transformers, "StaticCache") or not caches._caches_can_be_cropped():
        pytest.skip("before transformers 4.42 static caches hang on the layers")
    parameters = inspect.signature(transformers.StaticCache.__init__).parameters
    sizes = {
        "max_batch_size": 2,
        "batch_size": 2,
        "dtype": torch.float32,
        "device": "cpu",
    }
    sizes = {name: value for name, value in sizes.items() if name in parameters}
    if "batch_size" in sizes and "max_batch_size" in sizes:
        sizes.pop("batch_size")
    return transformers.StaticCache(config=model.config, max_cache_len=positions, **sizes)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("kind", user_caches())
def test_an_empty_cache_of_the_users_own_is_filled(kind: str, method: str) -> None:
    if not caches._caches_can_be_cropped():
        pytest.skip("before transformers 4.42 a model returns what it was given as tuples")
    model, (ids, mask, rows) = made("llama", method), padded()
    assert_as_trained(model, loop(model, ids, mask, user_caches()[kind](model)), rows)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_speculative_loops_crop_and_feed_several_tokens(method: str) -> None:
    model, (ids, mask, rows) = made("llama", method), padded()
    cache = caches.of(step(model, ids, mask, None))
    if not hasattr(cache, "crop"):
        pytest.skip("before transformers 4.42 nothing is cropped")
    draft, right = text(2, 3, seed=1), text(2, 3, seed=2)
    longer = torch.cat((mask, torch.ones(2, 3, dtype=torch.long)), 1)
    cache = caches.of(step(model, draft, longer, cache))
    cache = caches.crop(cache, caches.length(cache) - 3)
    logits = step(model, right, longer, cache).logits
    for got, row, new in zip(logits, rows, right, strict=True):
        true = reference.logits(model, 3, input_ids=torch.cat((row, new[None]), 1))
        torch.testing.assert_close(got, true, atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_copy_is_judged_by_its_length(method: str) -> None:
    model, ids = made("llama", method), text()
    mask = torch.ones_like(ids)
    mine = caches.of(step(model, ids, mask, None))
    copied = copy.deepcopy(mine)
    new, longer = text(1, 1, seed=3), torch.ones(1, 10, dtype=torch.long)
    with pytest.raises(ValueError, match="pass attention_mask"):
        step(model, new, None, copied)
    got = step(model, new, longer, copied).logits[0, -1]
    torch.testing.assert_close(got, reference.last_logits(model, torch.cat((ids, new), 1))[0], atol=2e-3, rtol=0)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_what_cannot_be_told_is_refused(method: str) -> None:
    model, ids = made("llama", method), text()
    with torch.no_grad():
        alien = caches.of(model.base_model(input_ids=ids, use_cache=True))
    new, longer = text(1, 1, seed=3), torch.ones(1, 10, dtype=torch.long)
    with pytest.raises(ValueError, match="filled without the soft prompt"):
        step(model, new, longer, alien)
    with pytest.raises(ValueError, match="without a cache"):
        step(model, new, longer, None)
    mine = caches.of(step(model, ids, None, None))
    with pytest.raises(ValueError, match="a mask of 10 real tokens"):
        step(model, new, torch.ones(1, 1, dtype=torch.long), mine)
    with pytest.raises(ValueError, match="token by token"):
        step(model, new, longer, mine, position_ids=torch.tensor([[3]]))
    if hasattr(mine, "crop"):
        with pytest.raises(ValueError, match="into the soft prompt"):
            step(model, new, None, caches.crop(mine, VIRTUAL_TOKENS - 1))


def test_another_adapters_cache_is_refused() -> None:
    model = made("llama", "prompt_tuning")
    cache = caches.of(step(model, text(), None, None))
    model.add_adapter("other", models.adapter_config("prompt_tuning"))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="adapter 'default'"):
        step(model, text(1, 1), None, cache)


@pytest.mark.parametrize("method", models.METHODS)
@pytest.mark.parametrize("use_cache", [None, False])
def test_the_training_forward_is_the_hosts_own(method: str, use_cache: bool | None) -> None:
    model, ids = made("llama", method), text(2)
    more = {**models.task_ids(method, 2), **({} if use_cache is None else {"use_cache": use_cache})}
    with_it = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **more)
    ptfix.revert()
    try:
        stock = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, **more)
    except Exception as error:
        pytest.skip(f"stock cannot train it: {type(error).__name__}")
    assert torch.equal(with_it.loss, stock.loss)
    assert torch.equal(with_it.logits, stock.logits)


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_embeddings_and_labels_in_a_loop(method: str) -> None:
    model, (ids, mask, rows) = made("llama", method), padded()
    words = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        first = model(inputs_embeds=words[:, :6], attention_mask=mask[:, :6], use_cache=True)
        given = {caches.keyword(): caches.of(first)}
        if caches.padded_rows_need_one_span() and method == "prompt_tuning":
            with pytest.raises(ValueError, match="one token at a time"):
                model(inputs_embeds=words[:, 6:], attention_mask=mask, **given)
            return
        second = model(inputs_embeds=words[:, 6:], attention_mask=mask, labels=ids[:, 6:], **given)
    for got, row in zip(second.logits, rows, strict=True):
        torch.testing.assert_close(got, reference.logits(model, 3, input_ids=row), atol=2e-3, rtol=0)
    true = torch.nn.functional.cross_entropy(second.logits[:, :-1].flatten(0, 1), ids[:, 7:].flatten())
    torch.testing.assert_close(second.loss, true)
