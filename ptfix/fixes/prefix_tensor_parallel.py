"""Prefix tuning of a tensor parallel model: each process reads the prefix of the heads that it computes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import adapter, caches, tensor_parallel

    @functools.wraps(original)
    def get_prompt(self: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        prompt = original(self, batch_size, *args, **kwargs)
        if not adapter.has_prefix(self) or not tensor_parallel.is_split(self.base_model):
            return prompt
        return caches.changed(prompt, functools.partial(tensor_parallel.share, base_model=self.base_model))

    return get_prompt


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    # transformers imports it where it has tensor parallel models. It costs seconds.
    return probes.split_prefix_fault() if "torch.distributed.tensor" in sys.modules else None


FIX = Fix(
    id="prefix-tensor-parallel",
    why="prefix tuning of a tensor parallel model (tp_plan) raises: the prefix has all heads, a process only some",
    link="https://github.com/huggingface/peft/issues/2344",
    affects={},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModel.get_prompt", _wrap, ("self", "batch_size")),),
    retire_when="peft splits a prefix as the model's attention is split (0.21.2 does not)",
)
