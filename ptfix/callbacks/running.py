"""What a TrainerCallback needs and is not given: the Trainer that is calling it."""

from __future__ import annotations

import sys
from typing import Any


def trainer_of(callback: Any) -> Any:
    """The Trainer that has this callback and is calling it now, found among the callers.

    Batches and logs pass through the Trainer's methods only, and a callback is not given the Trainer. With the object
    in hand, nothing has to be changed for other Trainers of the process.

    Raises:
        RuntimeError: no Trainer is calling.
    """
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and any(known is callback for known in caller.callback_handler.callbacks):
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError(
        f"{type(callback).__name__} works inside a transformers.Trainer only: Trainer(..., callbacks=[...])."
    )
