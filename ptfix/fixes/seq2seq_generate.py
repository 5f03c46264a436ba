"""generate() of an encoder-decoder with a soft prompt equals the adapter's training forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import adapter, seq2seq, sharding

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if adapter.has_soft_prompt(self):
            return sharding.as_forward(self, functools.partial(seq2seq.generate, self, *args, **kwargs))
        if adapter.active_config(self).is_prompt_learning and adapter.is_switched_off(self):
            kwargs.pop("task_ids", None)
            return self.base_model.generate(*args, **kwargs)  # peft's own would lay the soft prompt in front
        return original(self, *args, **kwargs)

    return generate


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.seq2seq_generate_fault()


FIX = Fix(
    id="seq2seq-generate",
    why="generate() of an encoder-decoder leaves the soft prompt out, misplaces it, raises, or keeps it when disabled",
    link="https://github.com/huggingface/peft/issues/386",
    affects={},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModelForSeq2SeqLM.generate", _wrap, ("self", "kwargs")),),
    retire_when="peft's generate() of encoder-decoders gives the view of one call to the base model (0.21.2 does not)",
)
