"""Two ranks train, then save into one folder at once.

torchrun --nproc_per_node 2 -m tests.chat_templates.ranks DIR    # which holds the base model
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
import transformers

import ptfix
from tests.chat_templates import stories

ROUNDS = 20


def main(folder: Path) -> None:
    ptfix.apply()
    of = transformers.AutoTokenizer.from_pretrained(folder / "base")
    of.chat_template = stories.TRAINING
    on_cpu = "use_cpu" if "use_cpu" in transformers.TrainingArguments.__dataclass_fields__ else "no_cuda"
    trainer = stories.trainer(
        folder / "base",
        folder / "out",
        of,
        ptfix.callbacks(),
        per_device_train_batch_size=1,
        ddp_backend="gloo",
        **{on_cpu: True},
    )
    trainer.train()
    for _ in range(ROUNDS):
        dist.barrier()
        of.save_pretrained(folder / "shared")
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
