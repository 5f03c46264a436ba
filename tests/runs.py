"""The small runs that tests make: on the CPU, seeded, silent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    """What all these runs share, and `more`."""
    return TrainingArguments(
        output_dir=str(folder),
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        dataloader_pin_memory=False,
        **more,
    )


def sft_trainer(model: Any, rows: Sequence[Any], folder: Path, callbacks: list[Any], **more: Any) -> Any:
    """TRL's SFTTrainer on the `input_ids` of rows; skips where TRL is not installed."""
    trl = pytest.importorskip("trl", reason="pip install trl datasets brings SFTTrainer")
    datasets = pytest.importorskip("datasets", reason="pip install trl datasets brings SFTTrainer")
    from tests.chat_templates.stories import tokenizer

    args = trl.SFTConfig(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, bf16=False, **more)
    return trl.SFTTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows]),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )
