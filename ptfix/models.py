"""What every part of ptfix asks of a model."""

from __future__ import annotations

from typing import Any


def is_sharded(args: Any, model: Any) -> bool:
    """Does each process hold only a part of the weights (FSDP, ZeRO-3, tensor parallel)?

    Then a forward waits for all the other processes: one that runs it alone hangs, or ends the run.

    Args:
        args: the TrainingArguments; FSDP may also be asked for by accelerate, of which these know nothing.
    """
    if getattr(args, "fsdp", None):
        return True
    if any(_is_wrapped(module) or (getattr(module, "_tp_size", None) or 1) > 1 for module in model.modules()):
        return True
    # ZeRO-3 marks its parameters; those of FSDP2 and of tensor parallel models are DTensors, or were before a forward.
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") for parameter in model.parameters())


def _is_wrapped(module: Any) -> bool:
    """Is it inside FSDP? FSDP1 wraps a module, FSDP2 marks it."""
    return hasattr(module, "_fsdp_wrapped_module") or hasattr(module, "_is_fsdp_managed_module")
