"""A soft prompt that FSDP has spread over processes is saved whole.

peft computes what it saves with the prompt encoder's parameters, which are shards outside of a forward.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap_embedding(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import sharding

    @functools.wraps(original)
    def get_prompt_embedding_to_save(self: Any, adapter_name: str) -> Any:
        return original(sharding.with_whole_prompt(self), adapter_name)

    return get_prompt_embedding_to_save


def _wrap_save(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import sharding

    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        # Trainer and accelerate gather a state dict first, and then only one process saves.
        is_written = kwargs.get("is_main_process", True)
        whole = sharding.with_whole_prompt(self, kwargs.get("state_dict"), is_written)
        return original(whole, save_directory, *args, **kwargs)

    return save_pretrained


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    # transformers imports it from 4.50 on. Without it no parameter of this process is a shard, and it costs seconds.
    if "torch.distributed.tensor" not in sys.modules:
        return None
    return probes.sharded_saving_fault()


FIX = Fix(
    id="sharded-prompt-saving",
    why="a soft prompt trained with FSDP2 cannot be saved: what peft saves is computed with shards",
    link="https://github.com/huggingface/peft/issues/2344",
    affects={},
    probe=_probe,
    edits=(
        Edit("peft.peft_model:PeftModel.get_prompt_embedding_to_save", _wrap_embedding, ("self", "adapter_name")),
        Edit("peft.peft_model:PeftModel.save_pretrained", _wrap_save, ("self", "save_directory", "kwargs")),
    ),
    retire_when="peft gathers a sharded prompt encoder before it computes what to save (0.21.2 does not)",
)
