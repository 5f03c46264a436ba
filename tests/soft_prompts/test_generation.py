"""What generate() does with what it is given or left: a cache, token types, and what an earlier call hung on the base
model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

import ptfix
from ptfix.soft_prompts import caches
from tests.matrix import modes
from tests.matrix.models import VIRTUAL_TOKENS, VOCAB, NotInThisPair


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


def test_a_compiled_call_outlives_the_view_of_one_call(method: str) -> None:
    CompileConfig = getattr(transformers, "CompileConfig", None)
    if not hasattr(CompileConfig, "_compile_all_devices"):
        pytest.skip("this release compiles for an accelerator only")
    bench = made("llama", method)
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    options = {"attention_mask": modes.ones(bench.ids), "cache_implementation": "static", "compile_config": config}
    calls = []
    for _ in range(2):
        assert torch.equal(bench.generate(bench.ids, **options), bench.truth(bench.ids)[0])
        calls.append(bench.base._compiled_call)
    assert calls[0] is calls[1]


@pytest.mark.parametrize("room", [-1, 0])
def test_what_a_padded_row_does_not_see_of_its_prefix_is_said_once(
    method: str, room: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 4.42 a prefix stands in front of the padding, and a sliding window counts places."""
    monkeypatch.setenv("PTFIX_CHECK", "0")  # which says, in its own words, that the row differs
    bench = made("mistral", method)
    ids, mask, _ = modes.left_padded(bench)
    whole = VIRTUAL_TOKENS + ids.shape[1]
    bench.base.config.sliding_window = whole + room

    def said(new_tokens: int, ids: torch.Tensor = ids, **options: Any) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ptfix"):
            bench.generate(input_ids=ids, rows=2, max_new_tokens=new_tokens, **options)
        return [record.message for record in caplog.records if record.name == "ptfix"]

    hidden = method == "prefix_tuning" and not caches.can_put_when_fed(bench.base)
    assert len(said(1, attention_mask=mask)) == (hidden and room < 0)
    warnings = said(3, attention_mask=mask)
    assert len(warnings) == hidden
    assert all(f"longer than the model's sliding window ({whole + room})" in warning for warning in warnings)
    assert not said(3, attention_mask=modes.ones(mask))
    assert not said(3, bench.ids.repeat(2, 1))


def test_a_second_turn_may_pass_only_what_is_new(method: str) -> None:
    """The mask covers all of the text, and says how much of it stands in the cache alone."""
    bench = made("llama", method)
    first = bench.generate(bench.ids, attention_mask=modes.ones(bench.ids), return_dict_in_generate=True)
    whole = torch.cat((first.sequences, modes.new_tokens(1, 3)), 1)
    new = whole[:, first.sequences.shape[1] - 1 :]  # generate() has not read its own last token
    out = bench.generate(new, attention_mask=modes.ones(whole), **modes.on_the_cache(bench, first))
    assert torch.equal(out, bench.truth(whole)[0][:, -new.shape[1] - modes.NEW :])
