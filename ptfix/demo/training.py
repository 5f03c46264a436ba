"""Train a soft prompt the way the tutorials do: PromptTuningConfig, a few rows, the host's own Trainer.

The rows teach a tone that SmolLM2 never uses by itself, so that a lost soft prompt is plain to see.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

VIRTUAL_TOKENS, STEPS, BATCH, LEARNING_RATE = 20, 40, 4, 0.03
INIT_TEXT = "Answer like an old sailor: one short sentence."

#: Short, for the sake of CPU time: without one the chat template writes a longer one.
_SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


@dataclass(frozen=True)
class Training:
    """What a training left behind: the folder Trainer saved, and the loss of every step."""

    checkpoint: Path
    losses: list[float]


def rows() -> list[dict[str, str]]:
    """The bundled rows, each a ``question`` and its ``answer``."""
    text = resources.files("ptfix.demo").joinpath("rows.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def ask(tokenizer: Any, question: str) -> list[int]:
    """Ids of a chat that ends where the answer begins."""
    chat = [_SYSTEM, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids


def train(model: Any, tokenizer: Any, folder: Path, callbacks: Sequence[Any] = ()) -> Training:
    """Train a soft prompt on `model`, whose weights stay as they are, and leave Trainer's checkpoint in `folder`."""
    from peft import PromptTuningConfig, TaskType, get_peft_model
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    tokenizer.save_pretrained(folder / "tokenizer")  # peft reads the words of the first prompt from a folder
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=VIRTUAL_TOKENS,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=INIT_TEXT,
        tokenizer_name_or_path=str(folder / "tokenizer"),
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        save_steps=STEPS,
        logging_steps=1,
        seed=0,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=arguments,
        train_dataset=_Examples(tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # stdout belongs to the command
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Training(Path(arguments.output_dir) / f"checkpoint-{STEPS}", losses)


class _Examples:
    """The rows as ids, made anew each time: the collator of older releases writes its padding into what it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.rows = tokenizer, rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        prompt = ask(self.tokenizer, self.rows[index]["question"])
        reply = self.tokenizer(self.rows[index]["answer"] + self.tokenizer.eos_token)["input_ids"]
        return {
            "input_ids": prompt + reply,
            "attention_mask": [1] * len(prompt + reply),
            "labels": [-100] * len(prompt) + reply,
        }
