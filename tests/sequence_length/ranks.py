"""Two ranks train with both callbacks, and once more, without, on rows cut by hand.

torchrun --nproc_per_node 2 -m tests.sequence_length.ranks MODE DIR    # leaves what each rank saw and has there
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from ptfix.callbacks.instruction_retention import InstructionRetentionCallback
from ptfix.callbacks.sequence_length_warmup import SequenceLengthWarmupCallback
from tests.sequence_length.test_warmup_callback import (
    ROWS_PER_BATCH,
    SCHEDULE,
    STEPS,
    CutIntoPieces,
    cut_by_hand,
    train,
    uneven,
)

ACCUMULATION, RANKS = 2, 2


def main(mode: Any, folder: Path) -> None:
    rows = uneven(ROWS_PER_BATCH * ACCUMULATION * RANKS * STEPS)
    setting = {"gradient_accumulation_steps": ACCUMULATION, "ddp_backend": "gloo"}
    callbacks = [SequenceLengthWarmupCallback(SCHEDULE, mode), InstructionRetentionCallback([[5, 9, 23]])]
    whole, seen = train(folder / "whole", rows, callbacks, **setting)
    if mode == "segment":
        truth, _ = train(folder / "truth", rows, [], collator=CutIntoPieces(ACCUMULATION), **setting)
    else:
        truth, _ = train(folder / "truth", cut_by_hand(rows, ACCUMULATION * RANKS), [], **setting)
    found = {
        "fed": seen.fed,
        "whole": whole.model.state_dict(),
        "truth": truth.model.state_dict(),
        "logged": [sorted(entry) for entry in whole.state.log_history],
    }
    torch.save(found, folder / f"rank-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
