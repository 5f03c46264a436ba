"""Two ranks train without ptfix and with it, where an odd file lies in each checkpoint's folder.

torchrun --nproc_per_node 2 -m tests.callbacks.ranks BASE OUT    # the environment says whether the model is sharded
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers

import ptfix
from tests.chat_templates import stories
from tests.chat_templates.stale import STALE
from tests.ranks.run import allow_sharding_on_cpu


def main(base: Path, out: Path) -> None:
    logging.getLogger("ptfix").addHandler(logging.StreamHandler())
    for who in ("stock", "ptfix"):
        of = transformers.AutoTokenizer.from_pretrained(base)
        of.chat_template = stories.TRAINING
        callbacks: list[Any] = []
        if who == "ptfix":
            ptfix.apply()
            callbacks = [ptfix.ChatTemplateCallback(smoke_tokens=2)]
        trainer = stories.trainer(
            base,
            out / who,
            of,
            callbacks,
            per_device_train_batch_size=1,
            ddp_backend="gloo",
            prepare=allow_sharding_on_cpu if "FSDP_VERSION" in os.environ else lambda args: None,
            **_on_cpu(),
        )
        if trainer.is_world_process_zero():
            for step in (1, 2):
                STALE["broken processor_config.json"][0](out / who / f"checkpoint-{step}")
        dist.barrier()
        trainer.train()
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if trainer.is_world_process_zero():
            torch.save({name: tensor.detach().cpu() for name, tensor in state.items()}, out / f"{who}.pt")
        dist.barrier()


def _on_cpu() -> dict[str, bool]:
    known = transformers.TrainingArguments.__dataclass_fields__
    return {"use_cpu" if "use_cpu" in known else "no_cuda": True}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
