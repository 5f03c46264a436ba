"""The first call of each kind that a soft prompt meets is compared with what was trained, and a difference is said.

Last in the order of fixes, so that it judges what all the others made of the hosts.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix, PatchError, is_strict

log = logging.getLogger("ptfix")

#: Function of peft.peft_model -> surface of `first_use`.
_SURFACES = {
    "PeftModelForCausalLM.generate": "GENERATE",
    "PeftModelForSeq2SeqLM.generate": "GENERATE",
    "PeftModelForCausalLM.forward": "LOOP",
    "PeftModelForSeq2SeqLM.forward": "LOOP",
    "PeftModelForSequenceClassification.forward": "CLASS",
    "PeftModelForTokenClassification.forward": "CLASS_OF_TOKENS",
    "PeftModelForQuestionAnswering.forward": "SPAN",
    "PeftModelForFeatureExtraction.forward": "FEATURES",
    "set_peft_model_state_dict": "LOAD",
}


def _wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    from ptfix.soft_prompts.proof import first_use

    surface: first_use.Surface = getattr(first_use, name)

    @functools.wraps(original)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        question = first_use.question(surface, args, kwargs)
        if question is None:
            return original(*args, **kwargs)
        answer = functools.partial(first_use.answer, surface, question, args[0], original)
        finding = None if surface.afterwards else answer()
        if finding is not None and finding.wrong:
            _tell(finding)
        result = original(*args, **kwargs)
        if surface.afterwards:
            finding = answer()
        if finding is not None and (surface.afterwards or not finding.wrong):
            _tell(finding)  # not before: where the call itself raises, that says it all
        return result

    return checked


def _tell(finding: Any) -> None:
    """A warning; an error where a difference was found and `strict` was asked for."""
    if finding.wrong and is_strict():
        raise PatchError(finding.sentence)
    log.warning("%s", finding.sentence)


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.first_use_fault()


FIX = Fix(
    id="first-use-check",
    why="where a soft prompt is ignored or misplaced nothing raises, and nobody compares",
    link="https://github.com/QwenLM/Qwen3/issues/882",
    affects={},
    probe=_probe,
    edits=tuple(
        Edit(f"peft.peft_model:{target}", functools.partial(_wrap, surface), optional=True)
        for target, surface in _SURFACES.items()
    ),
    retire_when="peft compares what runs with what was trained (0.21.2 does not)",
)
