"""Two processes train with every callback, of which something fails in one of them.

torchrun --nproc_per_node 2 -m tests.callbacks.fault_in_one_rank DIR    # rank-N.pt: which run -> (weights, warnings)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import ptfix
from ptfix.callbacks.instruction_retention import InstructionRetentionCallback
from ptfix.callbacks.sequence_length_guard import SequenceLengthGuardCallback
from ptfix.callbacks.soft_prompt import SoftPromptCallback
from ptfix.sequence_length import warmup
from tests.callbacks import test_faults as faults

#: callback -> what of it fails
BROKEN = {
    "soft prompt": (SoftPromptCallback, "_problem"),
    "guard": (SequenceLengthGuardCallback, "_plan"),
    "retention": (InstructionRetentionCallback, "_judge"),
    "truncate": (warmup, "_take"),
    "order": (warmup, "lengths"),
}


def trained(names: tuple[str, ...], rank: int) -> tuple[Any, list[str]]:
    """A run with these callbacks, which fail in one process."""
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            if int(os.environ["RANK"]) == rank:
                patch.setattr(*BROKEN[name], faults.fails(OSError("odd")))
        callbacks = [faults.callback(name) for name in names]
        trainer, said = faults.trained(faults.model("soft prompt"), faults.Rows(), callbacks)
    return trainer.model.state_dict(), said


def main() -> dict[str, Any]:
    checks = ("soft prompt", "guard", "retention")
    return {
        "stock": trained((), -1),
        "checks fail in 0": trained(checks, 0),
        "checks fail in 1": trained(checks, 1),
        "order fails in 1": trained(("order",), 1),
        "truncate fails in 1": trained(("truncate",), 1),
        "truncate": trained(("truncate",), -1),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    ptfix.apply()
    torch.save(main(), Path(sys.argv[1]) / f"rank-{os.environ['RANK']}.pt")
