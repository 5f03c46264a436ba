"""Trainer(tokenizer=...) means `processing_class`, as it did up to transformers 4.57.

transformers renamed the argument and the attribute in 4.46, kept the old names with a warning, and dropped them in 5.0.
The callbacks' keyword, renamed in 4.46 too, is left alone: nothing broke there in 5.0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap(init: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        if tokenizer is not None:
            if kwargs.get("processing_class") is not None:
                raise ValueError(
                    f"{type(self).__name__} was given both `tokenizer` and `processing_class`, which are two names "
                    "of one argument: pass only one of them."
                )
            kwargs["processing_class"] = tokenizer
        init(self, *args, **kwargs)
        # Through __dict__, and only where there is no such name, so that a subclass's own `tokenizer` stays as it is.
        if not hasattr(type(self), "tokenizer"):
            vars(self).setdefault("tokenizer", self.processing_class)

    return __init__


def _probe() -> str | None:
    from transformers import Trainer

    try:
        # `model` is given twice, so that no host gets as far as building anything.
        Trainer.__init__(Trainer.__new__(Trainer), None, tokenizer=None, model=None)
    except TypeError as refusal:
        return str(refusal) if "'tokenizer'" in str(refusal) else None
    return None


FIX = Fix(
    id="trainer-tokenizer",
    why="Trainer(tokenizer=...) and trainer.tokenizer are gone; both mean processing_class",
    link="https://github.com/huggingface/transformers/pull/32385",
    affects={"transformers": ">=5.0"},
    probe=_probe,
    edits=(
        Edit("transformers.trainer:Trainer.__init__", _wrap, ("processing_class",)),
        Edit("transformers.trainer_seq2seq:Seq2SeqTrainer.__init__", _wrap, ("processing_class",)),
    ),
    retire_when="transformers 4 scripts are no longer worth running unchanged; the name will not come back",
)
