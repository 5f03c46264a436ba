"""Encoder-decoders: generate() and the training forward of every method, in every mode."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import ptfix
from ptfix.soft_prompts.proof import check, probes
from tests.matrix import seq2seq
from tests.matrix.seq2seq import METHODS, MODES, Bench


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()
    torch.set_num_threads(1)
    yield
    ptfix.revert()


CASES = [(architecture, method, None) for architecture in ("t5", "bart") for method in METHODS]
CASES += [("mt5", "prompt_tuning", None), ("t5", "prefix_tuning", 1), ("bart", "multitask_prompt_tuning", 1)]


@pytest.mark.parametrize(("architecture", "method", "submodules"), CASES)
def test_every_mode_is_the_training_forward(architecture: str, method: str, submodules: int | None) -> None:
    bench, bare = seq2seq.bench(architecture, method, submodules), seq2seq.bare(architecture)
    outcomes = {mode: seq2seq.judge(mode, bench) for mode in MODES}
    wrong = {mode: said for mode, said in outcomes.items() if said != "exact"}
    assert not {mode: said for mode, said in wrong.items() if seq2seq.host_can(mode, bare)}
    assert len(wrong) <= 2, wrong  # a static cache and prompt lookup, where the base model cannot


def test_stock_is_found_wrong() -> None:
    """Or the modes above could not fail."""
    ptfix.revert()
    bench = seq2seq.bench("t5", "prompt_tuning")
    for mode in ("by_position", "left_padded", "padded_forward", "disabled"):
        assert seq2seq.judge(mode, bench) != "exact", mode
    bench = seq2seq.bench("bart", "multitask_prompt_tuning")
    for mode in ("greedy", "decoder_ids_forward"):
        assert seq2seq.judge(mode, bench) != "exact", mode


@pytest.mark.parametrize("architecture", ["t5", "bart"])
@pytest.mark.parametrize("method", METHODS)
def test_what_stock_trains_right_stays_bit_for_bit(architecture: str, method: str) -> None:
    bench = seq2seq.bench(architecture, method)
    answer = torch.randint(3, 64, (2, 3), generator=torch.Generator().manual_seed(8))
    ids = torch.cat((bench.ids, bench.ids.flip(1)))

    def logits() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = bench.model(input_ids=ids, labels=answer, **bench.task_ids(2)).logits
        return found

    ours = logits()
    ptfix.revert()
    if method == "prefix_tuning" and probes.seq2seq_prefix_fault(submodules=2):
        pytest.skip("stock does not train it right")
    assert torch.equal(logits(), ours)


@pytest.mark.parametrize("submodules", [1, 2])
def test_the_prefix_is_trained(submodules: int) -> None:
    bench = seq2seq.bench("bart", "prefix_tuning", submodules)
    bench.model.train()
    bench.model(input_ids=bench.ids, labels=bench.ids[:, :3]).loss.backward()
    gradient = next(bench.model.prompt_encoder.parameters()).grad
    assert gradient is not None
    assert bool(gradient.any())


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("t5", {"d_kv": 16}),  # flan-t5-small, mt5-small: heads are not d_model / num_heads wide
        ("t5", {"num_heads": 6}),
        ("t5", {"num_decoder_layers": 3}),
        ("bart", {"decoder_attention_heads": 2}),
        ("bart", {"decoder_layers": 3}),
        ("bart", {"encoder_layers": 3}),  # distilbart: fewer layers in the decoder
    ],
)
def test_a_prefix_is_sized_by_the_decoder(architecture: str, sizes: dict[str, int]) -> None:
    bench = seq2seq.bench(architecture, "prefix_tuning", **sizes)
    bare = Bench(bench.base, bench.base)  # 5.24 alone cannot generate with a t5 of more layers in the decoder
    for mode in ("greedy", "left_padded", "causal_forward"):
        assert seq2seq.judge(mode, bench) == "exact" or seq2seq.judge(mode, bare).startswith("raises")


def test_encoder_outputs_alone_are_refused() -> None:
    bench = seq2seq.bench("t5", "prompt_tuning")
    with torch.no_grad():
        read = bench.base.get_encoder()(input_ids=bench.ids, return_dict=True)
    with pytest.raises(ValueError, match="pass input_ids"):
        bench.generate(encoder_outputs=read)


def test_what_reads_no_text_is_refused_when_the_adapter_is_made() -> None:
    config = transformers.WhisperConfig(
        vocab_size=64,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    for method in ("prompt_tuning", "prefix_tuning"):
        with pytest.raises(ValueError, match="reads input_features, not text"):
            peft.get_peft_model(model, seq2seq.adapter_config(method, None))
    lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj"])
    peft.get_peft_model(model, lora)


def test_lora_stays_stock() -> None:
    base = seq2seq.base_model("t5")
    lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(base, lora).eval()
    ids = Bench(base, model).ids

    def said() -> torch.Tensor:
        return torch.cat(
            model.generate(input_ids=ids, max_new_tokens=3, output_scores=True, return_dict_in_generate=True).scores
        )

    ours = said()
    ptfix.revert()
    assert torch.equal(said(), ours)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_use_check_is_silent(method: str, caplog: pytest.LogCaptureFixture) -> None:
    bench = seq2seq.bench("t5", method)
    logging.getLogger("ptfix").addHandler(caplog.handler)
    try:
        for mode in ("greedy", "no_cache", "left_padded", "right_padded", "disabled"):
            assert seq2seq.judge(mode, bench) == "exact"
    finally:
        logging.getLogger("ptfix").removeHandler(caplog.handler)
    assert not [record.message for record in caplog.records if "training forward" in record.message]


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
def test_a_trainer_that_predicts_with_generate(method: str, tmp_path: Path) -> None:
    """In a batch padded by the collator, each answer is that of the row alone, by the training forward."""
    bench = seq2seq.bench("t5", method)
    texts = [bench.ids[0].tolist(), bench.ids[0, 4:].tolist()]
    rows = [{"input_ids": text, "attention_mask": [1] * len(text), "labels": [5, 6, 7]} for text in texts]
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        predict_with_generate=True,
        generation_max_length=5,
        per_device_eval_batch_size=2,
        report_to="none",
        use_cpu=True,
    )

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        return {
            name: torch.tensor([row[name] + [0] * (longest - len(row[name])) for row in batch])
            if name != "labels"
            else torch.tensor([row[name] for row in batch])
            for name in batch[0]
        }

    trainer = transformers.Seq2SeqTrainer(model=bench.model, args=arguments, data_collator=collate)
    said = torch.from_numpy(trainer.predict(rows).predictions)[:, 1:5]  # which Trainer fills with padding
    for text, answer in zip(texts, said, strict=True):
        assert torch.equal(bench.truth(torch.tensor([text]), answer).argmax(-1), answer)


@pytest.mark.parametrize("architecture", ["t5", "bart"])
@pytest.mark.parametrize("method", METHODS)
def test_the_check_after_training(architecture: str, method: str) -> None:
    bench = seq2seq.bench(architecture, method)
    assert check.check(bench.model).good
    bench.model.generate = lambda *args, task_ids=None, **kwargs: bench.base.generate(*args, **kwargs)
    found = check.check(bench.model)
    assert (found.acts, found.exact) == (True, False)
    assert "ignores the soft prompt" in found.sentence


def test_the_probes_find_stock_wrong_and_cost_little() -> None:
    assert probes.seq2seq_generate_fault() is None
    assert probes.seq2seq_prefix_fault(submodules=1) is None
    ptfix.revert()
    assert probes.seq2seq_generate_fault() is not None
    assert probes.seq2seq_prefix_fault(submodules=1) is not None


def test_applying_loads_no_encoder_decoder() -> None:
    code = "import sys, ptfix; ptfix.apply(); print([name for name in sys.modules if 'modeling_t5' in name])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
