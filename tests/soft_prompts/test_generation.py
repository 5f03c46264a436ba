"""What generate() does with what it is given or left: a cache, token types, and what an earlier call hung on the base
model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ptfix
from ptfix.soft_prompts import caches
from tests.matrix import modes
from tests.matrix.models import VOCAB, NotInThisPair


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()
    torch.set_num_threads(1)
    yield
    ptfix.revert()


@pytest.fixture(params=["prompt_tuning", "prefix_tuning"])
def method(request: pytest.FixtureRequest) -> Any:
    return request.param


def made(architecture: str, method: str) -> modes.Bench:
    try:
        return modes.bench(architecture, method)
    except NotInThisPair as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_text_that_the_cache_holds_is_answered_again_or_refused(architecture: str, method: str) -> None:
    """No host does this without an adapter, so the matrix cannot ask for it."""
    bench = made(architecture, method)
    outcome = modes.judge("regenerate", bench)
    if caches.can_put_when_fed(bench.base):
        assert outcome == "exact"
    else:  # tuples, from which nothing can be taken away
        assert "cannot be shortened to the text; generate again without it" in outcome


def test_token_types_are_not_read_as_training_does_not_read_them(method: str) -> None:
    """gpt2 adds the embedding of each token's type to that of the token; peft's forward drops the types."""
    bench = made("gpt2", method)
    types = torch.randint(2, VOCAB, bench.ids.shape, generator=torch.Generator().manual_seed(5))
    options = {"input_ids": bench.ids, "attention_mask": modes.ones(bench.ids), "token_type_ids": types}
    with torch.no_grad():
        typed = bench.base(**options).logits
        assert not torch.allclose(typed, bench.base(input_ids=bench.ids).logits, atol=1e-3)
    assert torch.equal(bench.generate(**options), bench.truth(bench.ids)[0])


def test_the_static_cache_of_the_base_model_is_left_alone(method: str) -> None:
    """Up to 5.0 the host keeps its last static cache on the model, and fills it anew for every call that it is large
    enough for."""
    bench = made("llama", method)
    if modes.judge("static_cache", modes.bare("llama")) != "exact":
        pytest.skip("this release has no static cache")
    static: dict[str, Any] = {"cache_implementation": "static", "return_dict_in_generate": True}
    first = bench.base.generate(bench.ids, max_new_tokens=4 * modes.NEW, do_sample=False, pad_token_id=0, **static)
    if caches.of(first) is None:
        pytest.skip("this release returns no static cache")

    def held() -> list[torch.Tensor]:
        return [each.clone() for pair in caches.pairs(caches.of(first)) for each in pair if each is not None]

    before = held()
    out = bench.generate(input_ids=bench.ids, attention_mask=modes.ones(bench.ids), **static)
    assert torch.equal(out.sequences, bench.truth(bench.ids)[0])
    assert before
    assert all(torch.equal(now, then) for now, then in zip(held(), before, strict=True))
