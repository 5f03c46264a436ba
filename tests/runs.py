"""Training arguments of the small runs that tests make: on the CPU, seeded, silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
