"""Two ranks train with both callbacks, and once more, without, on rows cut by hand.

torchrun --nproc_per_node 2 -m tests.sequence_length.ranks DIR    # leaves what each rank saw and has there
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from ptfix.callbacks.instruction_retention import InstructionRetentionCallback
from ptfix.callbacks.sequence_length_warmup import SequenceLengthWarmupCallback
from tests.sequence_length.test_warmup_callback import ROWS_PER_BATCH, SCHEDULE, STEPS, cut_by_hand, train, uneven

ACCUMULATION, RANKS = 2, 2


def main(folder: Path) -> None:
    rows = uneven(ROWS_PER_BATCH * ACCUMULATION * RANKS * STEPS)
    setting = {"gradient_accumulation_steps": ACCUMULATION, "ddp_backend": "gloo"}
    callbacks = [SequenceLengthWarmupCallback(SCHEDULE, "truncate"), InstructionRetentionCallback([[5, 9, 23]])]
    whole, seen = train(folder / "whole", rows, callbacks, **setting)
    truth, _ = train(folder / "truth", cut_by_hand(rows, ACCUMULATION * RANKS), [], **setting)
    found = {
        "fed": seen.fed,
        "whole": whole.model.state_dict(),
        "truth": truth.model.state_dict(),
        "logged": [sorted(entry) for entry in whole.state.log_history],
    }
    torch.save(found, folder / f"rank-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
