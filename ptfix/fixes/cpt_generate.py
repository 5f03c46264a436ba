"""generate() takes the batch of CPT's collator: `input_type_mask` weighs labels, of which generate() has none."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts.adapter import active_config

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if active_config(self).peft_type == "CPT":
            kwargs.pop("input_type_mask", None)
        return original(self, *args, **kwargs)

    return generate


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.cpt_generate_fault()


FIX = Fix(
    id="cpt-generate",
    why="generate() of CPT raises on input_type_mask, which its collator puts into each batch",
    link="https://github.com/huggingface/peft/pull/2168",
    affects={"peft": ">=0.14"},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModelForCausalLM.generate", _wrap, ("self", "kwargs")),),
    retire_when="peft's generate() drops input_type_mask (0.21.2 does not)",
)
