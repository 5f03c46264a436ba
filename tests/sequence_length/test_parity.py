"""The probes on the real positions of the installed release, as tiny models, and on the double of Qwen v1."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
import transformers

from ptfix.sequence_length import parity
from tests.matrix.models import NotInThisPair, base_model
from tests.sequence_length.doubles import NATIVE, VOCAB, llama, qwen_v1, tiny, with_table

MODES, COMPANY, CACHE, SHORT = (
    "otherwise in training",
    "gets other logits",
    "KV cache says otherwise",
    "short prompts too",
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": NATIVE}


def found(model: Any, boundary: int | None = NATIVE, **options: Any) -> set[str]:
    """Which probes speak."""
    findings = parity.probe(model, boundary, seconds=300.0, **options)
    assert findings.skipped == []
    return {words for words in (MODES, COMPANY, CACHE, SHORT) for one in findings.problems if words in one}


def ids(length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(5))


def moves_with_its_batch(model: Any) -> bool:
    """A short row's logits alone and padded beside a long one, straight from the host."""
    short, long = ids(8), ids(NATIVE + 1)
    batch = torch.cat([torch.nn.functional.pad(short, (0, NATIVE + 1 - 8)), long])
    mask = torch.ones_like(batch)
    mask[0, 8:] = 0
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        alone = twin(input_ids=short).logits[0]
        beside = twin(input_ids=batch, attention_mask=mask).logits[0, :8]
    return not torch.allclose(alone, beside, atol=1e-2)


def test_the_double_of_qwen_v1() -> None:
    assert found(qwen_v1()) == {MODES, COMPANY}
    assert found(qwen_v1(use_dynamic_ntk=False)) == {MODES}
    assert found(qwen_v1(use_logn_attn=False)) == {MODES, COMPANY}
    assert found(qwen_v1(use_logn_attn=False, use_dynamic_ntk=False)) == set()


def test_up_to_its_length_the_double_is_the_same_in_both_modes() -> None:
    assert found(qwen_v1(), NATIVE - 1) == set()
    assert found(qwen_v1(seq_length=NATIVE + 1), NATIVE) == set()


def test_llama_is_the_same_however_it_is_fed() -> None:
    assert found(llama()) == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_difference_but_a_trick_still_is(dtype: torch.dtype) -> None:
    assert found(llama().to(dtype)) == set()
    assert MODES in found(qwen_v1(use_logn_attn=False).to(dtype))


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "gpt_neox", "bloom", "falcon"])
def test_architectures_without_a_fault_are_found_without_one(architecture: str) -> None:
    try:
        model = base_model(architecture)
    except NotInThisPair as reason:
        pytest.skip(f"{reason}: pip install a newer one")
    assert found(model) == set()
    assert found(model.to(torch.bfloat16)) == set()


def test_static_scaling_is_the_same_however_it_is_fed() -> None:
    assert found(llama({"rope_type": "linear", "factor": 4.0})) == set()
    if hasattr(transformers, "modeling_rope_utils"):  # older releases know no yarn
        assert found(llama(YARN)) == set()


def test_dynamic_scaling_follows_the_batch() -> None:
    model = llama({"rope_type": "dynamic", "factor": 4.0})
    assert moves_with_its_batch(model)
    assert {COMPANY, CACHE} <= found(model)
    assert MODES not in found(model)
    assert found(model, NATIVE // 2) == set()


def test_phi3_longrope_follows_the_batch() -> None:
    factors = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    if not hasattr(transformers, "Phi3Config"):
        pytest.skip("this release has no Phi-3: pip install 'transformers>=4.41'")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    limits = {"max_position_embeddings": 4 * NATIVE, "original_max_position_embeddings": NATIVE}

    def made(scheme: str) -> Any:
        return tiny("Phi3Config", {**sizes, **limits, "rope_scaling": {**factors, "type": scheme}})

    try:
        model = made("longrope")
    except ValueError:  # before 4.44 the same scheme had another name
        model = made("su")
    assert moves_with_its_batch(model) == (COMPANY in found(model))
    assert MODES not in found(model)


def test_dropout_is_no_difference() -> None:
    """gpt2 drops embeddings, attention weights and outputs; opt calls dropout as a function."""
    for family in ("gpt2", "opt"):
        assert found(with_table(family), 20) == set()
    with parity.deterministic(model := with_table("gpt2")):
        model.train()
        train = model(input_ids=ids(9)).logits
        model.eval()
        assert torch.equal(train, model(input_ids=ids(9)).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_inside_attention_is_no_difference(implementation: str) -> None:
    model = llama(attention_dropout=0.5)
    if implementation == "sdpa" and not getattr(model, "_supports_sdpa", False):
        implementation = "eager"
    model.config._attn_implementation = implementation
    assert found(model) == set()


def test_a_changed_rope_is_seen_on_short_prompts() -> None:
    """Linear scaling moves every position; dynamic scaling and none at all move no short one."""
    own = llama().config
    linear = parity.probe(llama({"rope_type": "linear", "factor": 4.0}), None, own, seconds=300.0)
    dynamic = parity.probe(llama({"rope_type": "dynamic", "factor": 4.0}), None, own, seconds=300.0)
    if linear.skipped:  # a release whose rope is not made from a config says so, and finds nothing
        assert "cannot build its rope from a config" in linear.skipped[0]
        assert linear.problems == dynamic.problems == []
        return
    assert SHORT in linear.problems[0]
    assert dynamic.problems == []
    assert found(llama(), None, own_config=own) == set()


def test_the_size_of_the_change_is_right() -> None:
    """The KL that is told is that of two whole models, of which one has the checkpoint's rope."""
    live, own = llama({"rope_type": "linear", "factor": 4.0}), llama()
    findings = parity.probe(live, None, own.config, ids=ids(NATIVE)[0].tolist(), seconds=300.0)
    if findings.skipped:
        pytest.skip("this release does not build its rope from a config, and the probe says so")
    with torch.no_grad():
        before, now = (one(input_ids=ids(NATIVE)).logits[0].log_softmax(-1) for one in (own, live))
    divergence = float((before.exp() * (before - now)).sum(-1).mean())
    assert f"KL {divergence:.3f} nats" in findings.problems[0]


@pytest.mark.parametrize("scheme", [None, "dynamic"])
def test_the_model_comes_back_as_it_was(scheme: str | None) -> None:
    model = (llama({"rope_type": scheme, "factor": 4.0}) if scheme else qwen_v1()).train()
    next(model.children()).eval()
    before = copy.deepcopy(model)
    attributes = [set(vars(module)) for module in model.modules()]
    state = torch.get_rng_state(), random.getstate()
    parity.probe(model, NATIVE, llama().config if scheme else None, seconds=300.0)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert [set(vars(module)) for module in model.modules()] == attributes
    for mine, old in zip(model.modules(), before.modules(), strict=True):
        assert mine.training == old.training
        for name, value in vars(old).items():
            if isinstance(value, int | float | str | list | type(None)):
                assert vars(mine)[name] == value, name
        assert mine._buffers.keys() == old._buffers.keys()
        for name, buffer in old._buffers.items():
            assert (buffer is None) == (mine._buffers[name] is None)
            assert buffer is None or torch.equal(buffer, mine._buffers[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_costs_too_much_is_not_begun() -> None:
    findings = parity.probe(qwen_v1(), NATIVE, seconds=0.0)
    assert findings.problems == []
    (sentence,) = findings.skipped
    assert sentence.startswith("not probed: training mode against evaluation mode; a row alone")
    assert "0 s allowed (probe_seconds)" in sentence


def test_a_model_that_cannot_be_asked_is_told() -> None:
    model = qwen_v1()
    model.transformer.forward = None
    findings = parity.probe(model, NATIVE)
    assert findings.problems == []
    (sentence,) = findings.skipped
    assert sentence.startswith("the sequence length was not probed: TypeError")


def test_a_probe_that_fails_is_told_and_leaves_the_model_as_it_was() -> None:
    model = with_table("gpt2").train()
    findings = parity.probe(model, model.config.n_positions, seconds=300.0)  # one more is an error here
    assert findings.problems == []
    assert len(findings.skipped) == 3
    assert model.training
