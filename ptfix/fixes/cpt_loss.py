"""The loss of CPT reads the active adapter's settings and leaves the batch as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import views
    from ptfix.soft_prompts.adapter import active_config

    @functools.wraps(original)
    def cpt_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("input_type_mask") is not None:
            kwargs["input_type_mask"] = kwargs["input_type_mask"].clone()  # raised in place
        if self.active_adapter != "default":
            # The settings are looked up by this name, whatever the adapter is called.
            self = views.shallow(self, _peft_config={**self.peft_config, "default": active_config(self)})
        return original(self, *args, **kwargs)

    return cpt_forward


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    return probes.cpt_loss_fault()


FIX = Fix(
    id="cpt-loss",
    why="the loss of CPT raises for an adapter that is not called 'default', and changes the batch's input_type_mask",
    link="https://github.com/huggingface/peft/pull/2168",
    affects={"peft": ">=0.14"},
    probe=_probe,
    edits=(Edit("peft.peft_model:PeftModelForCausalLM._cpt_forward", _wrap, ("self", "kwargs"), optional=True),),
    retire_when="peft reads the active adapter's settings and copies the mask (0.21.2 does not)",
)
