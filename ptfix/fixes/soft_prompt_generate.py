"""generate() with a soft prompt equals the adapter's training forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fallback, Fix


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import generation

    return _generating(original, generation.generate)


def _wrap_by_contract(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts.proof import trials

    return _generating(original, trials.generate)


def _generating(original: Callable[..., Any], with_soft_prompt: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import caches, loops, sharding
    from ptfix.soft_prompts.adapter import has_soft_prompt

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_soft_prompt(self):
            return original(self, *args, **kwargs)
        outputs = sharding.as_forward(self, functools.partial(with_soft_prompt, self, *args, **kwargs))
        loops.note(self, outputs, caches.of(kwargs))
        return outputs

    return generate


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.generation_fault()


def _drift() -> str | None:
    from ptfix.soft_prompts import generation

    return generation.drift()


def _contract_proof() -> tuple[str | None, str]:
    from ptfix.soft_prompts.proof import trials

    return trials.proof()


_TARGET, _PARAMETERS = "peft.peft_model:PeftModelForCausalLM.generate", ("self", "kwargs")

FIX = Fix(
    id="soft-prompt-generate",
    why="generate() ignores the soft prompt, raises, or continues another text than the one the adapter was trained on",
    link="https://github.com/QwenLM/Qwen3/issues/882",
    affects={},
    probe=_probe,
    edits=(Edit(_TARGET, _wrap, _PARAMETERS),),
    retire_when="peft translates between real and virtual lengths itself (0.21.2 does not)",
    drift=_drift,
    fallbacks=(Fallback("by the public contract", (Edit(_TARGET, _wrap_by_contract, _PARAMETERS),), _contract_proof),),
)
