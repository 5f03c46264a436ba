"""The soft prompt tutorial, unchanged in every pair of hosts: train, save, reload, generate, and be right.

Nothing here looks at a version. The model is real but tiny, made on the spot, so that no hub is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import ptfix
from ptfix.soft_prompts.proof import reference

REVIEWS = {
    "the film was good": "positive : a good film",
    "the song was bad": "negative : a bad song",
    "a very bright book": "positive : a bright book",
    "it was a dull play": "negative : a dull play",
}
INIT_TEXT = "text label : positive negative"
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
MAX_LENGTH = 24


@pytest.fixture(autouse=True, scope="module")
def _applied() -> Iterator[None]:
    ptfix.apply(strict=True)
    yield
    ptfix.revert()


@pytest.fixture(params=["llama", "bloom"], scope="module")
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model and its tokenizer, as from_pretrained() reads it."""
    folder = str(tmp_path_factory.mktemp(request.param))
    words = [*SPECIAL.values(), *dict.fromkeys(" ".join([INIT_TEXT, *REVIEWS]).split())]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    inputs = ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **SPECIAL).save_pretrained(folder)

    config = AutoConfig.for_model(
        request.param,
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **{f"{name}_id": vocabulary[token] for name, token in SPECIAL.items() if name != "unk_token"},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:  # the default 0.02 makes a model that says the same whatever it reads
            torch.nn.init.normal_(weight, std=0.25)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Run:
    """What is left of the tutorial's first half."""

    model: Any
    trainer: Any
    initial_prompt: torch.Tensor
    checkpoint: Path


def tutorial(pretrained: str, output: Path) -> Trainer:
    """The tutorial's lines up to train()."""
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=INIT_TEXT,
        num_virtual_tokens=8,
        tokenizer_name_or_path=pretrained,
        tokenizer_kwargs={"padding_side": "left"},
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(pretrained), config)

    rows = []
    for review, verdict in REVIEWS.items():
        prompt = tokenizer(f"text : {review} label :")["input_ids"]
        answer = [*tokenizer(verdict)["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})

    return Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            learning_rate=0.1,
            max_steps=20,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_steps=10,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=rows,
        tokenizer=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100),
    )


@pytest.fixture(scope="module")
def run(pretrained: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train as the tutorial does."""
    output = tmp_path_factory.mktemp("output")
    trainer = tutorial(pretrained, output)
    initial_prompt = trainer.model.get_prompt_embedding_to_save("default").clone()
    trainer.train()
    return Run(trainer.model, trainer, initial_prompt, output / "checkpoint-20")


def test_text_init_starts_from_the_embeddings_of_the_text(run: Run, pretrained: str) -> None:
    ids = AutoTokenizer.from_pretrained(pretrained)(INIT_TEXT)["input_ids"]
    embeddings = run.model.get_input_embeddings().weight
    assert torch.equal(run.initial_prompt, embeddings[(ids * 2)[:8]])


def test_training_lowers_the_loss_and_moves_only_the_prompt(run: Run, pretrained: str) -> None:
    losses = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-4:]) < 0.75 * sum(losses[:4])
    assert not torch.equal(run.model.get_prompt_embedding_to_save("default"), run.initial_prompt)
    for name, weight in AutoModelForCausalLM.from_pretrained(pretrained).named_parameters():
        assert torch.equal(weight, run.model.base_model.get_parameter(name)), name


def test_the_trainer_keeps_and_saves_the_tokenizer(run: Run, pretrained: str) -> None:
    saved = AutoTokenizer.from_pretrained(str(run.checkpoint))
    assert (
        saved.get_vocab() == run.trainer.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(pretrained).get_vocab()
    )


def test_a_resumed_run_ends_where_the_whole_run_ended(
    run: Run, pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch 2.6 refuses the random states that transformers saved before 4.47
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trainer = tutorial(pretrained, tmp_path)
    trainer.train(resume_from_checkpoint=str(run.checkpoint.with_name("checkpoint-10")))
    assert trainer.state.global_step == 20
    resumed, whole = (each.get_prompt_embedding_to_save("default") for each in (trainer.model, run.model))
    assert torch.equal(resumed, whole)


def test_the_reloaded_checkpoint_generates_what_was_trained(run: Run, pretrained: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pretrained)
    inputs = tokenizer("text : a dull film label :", return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(pretrained)
    plain = base.generate(**inputs, max_length=MAX_LENGTH)
    model = PeftModel.from_pretrained(base, str(run.checkpoint))

    trained, reloaded = (each.get_prompt_embedding_to_save("default") for each in (run.model, model))
    assert torch.equal(trained, reloaded)

    generated = model.generate(**inputs, max_length=MAX_LENGTH)

    length = inputs["input_ids"].shape[1]
    truth, _ = reference.greedy(model, inputs["input_ids"], MAX_LENGTH - length)
    assert generated[0].tolist() == up_to_eos(truth[0].tolist(), tokenizer.eos_token_id)
    assert generated.shape[1] >= length + 4  # a cache that lost the prompt shows only from the second token on
    assert generated.tolist() != plain.tolist()
    assert run.model.generate(**inputs, max_length=MAX_LENGTH).tolist() == generated.tolist()


def up_to_eos(ids: list[int], eos: int) -> list[int]:
    """generate() stops at the first eos; the reference does not."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids
