"""The errors that people met, by name, on the pairs where they met them (`nox -s matrix-quick` goes through those)."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import pytest
import torch

import ptfix
from tests.matrix import modes
from tests.matrix.models import NotInThisPair

PAIR = (version("transformers"), version("peft"))

#: pair -> what its stock generate() does to a prompt-tuned model
SILENT_NO_OP = [("4.42.4", "0.12.0"), ("4.45.2", "0.12.0"), ("4.57.6", "0.13.2")]
CACHE_HAS_0_LAYERS = [("4.44.2", "0.11.1")]


@pytest.fixture(autouse=True)
def reverted() -> Iterator[None]:
    ptfix.apply()
    yield
    ptfix.revert()


def prompt_tuned(architecture: str) -> modes.Bench:
    try:
        return modes.bench(architecture, "prompt_tuning")
    except NotInThisPair as reason:
        pytest.skip(str(reason))


def test_silent_no_op_qwen2() -> None:
    """QwenLM/Qwen3#882: the tuned model answers exactly like its base, without an error."""
    bench = prompt_tuned("qwen2")
    truth, base = bench.truth(bench.ids)[0], modes.plain(bench)
    assert not torch.equal(truth, base)
    if PAIR in SILENT_NO_OP:
        ptfix.revert()
        stock = bench.generate(input_ids=bench.ids, attention_mask=torch.ones_like(bench.ids))
        assert torch.equal(stock, base)
        ptfix.apply()
    fixed = bench.generate(input_ids=bench.ids, attention_mask=torch.ones_like(bench.ids))
    assert torch.equal(fixed, truth)


def test_cache_only_has_0_layers_llama() -> None:
    """huggingface/transformers#32060: KeyError in prepare_inputs_for_generation."""
    bench = prompt_tuned("llama")
    truth = bench.truth(bench.ids)[0]
    if PAIR in CACHE_HAS_0_LAYERS:
        ptfix.revert()
        with pytest.raises(KeyError, match="Cache only has 0 layers"):
            bench.generate(input_ids=bench.ids, attention_mask=torch.ones_like(bench.ids))
        ptfix.apply()
    fixed = bench.generate(input_ids=bench.ids, attention_mask=torch.ones_like(bench.ids))
    assert torch.equal(fixed, truth)


def test_a_model_built_before_revert_obeys_it() -> None:
    bench = prompt_tuned("llama")
    ids, mask, rows = modes.left_padded(bench)
    kept = bench.model.generate  # a bound method, as pipelines keep them
    options = {"attention_mask": mask, "max_new_tokens": modes.NEW, "do_sample": False, "pad_token_id": 0}
    truth = bench.truth(rows[1])[0][0, rows[1].shape[1] :]
    assert torch.equal(kept(input_ids=ids, **options)[1, ids.shape[1] :], truth)
    ptfix.revert()
    try:
        stock = kept(input_ids=ids, **options)
    except Exception:
        return  # the stock host cannot do it: not ours any more
    again = bench.model.generate(input_ids=ids, **options)
    assert torch.equal(stock, again)


def test_lora_and_bare_models_are_untouched() -> None:
    import peft

    torch.manual_seed(0)
    base = modes.base_model("llama")
    ids = torch.randint(2, 64, (2, 9), generator=torch.Generator().manual_seed(7))
    target = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}

    def answers() -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = peft.get_peft_model(modes.base_model("llama"), peft.LoraConfig(**target)).eval()
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            return [
                base.generate(input_ids=ids, **options),
                model.generate(input_ids=ids, **options),
                base(input_ids=ids).logits,
                model(input_ids=ids, labels=ids).logits,
            ]

    with_ptfix = answers()
    ptfix.revert()
    assert all(torch.equal(a, b) for a, b in zip(with_ptfix, answers(), strict=True))
