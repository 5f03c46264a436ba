"""SoftPromptCallback: when training ends, ask the soft prompt a few tokens and say so if generate() loses it, or if it
is not the best one that Trainer was to restore."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from ptfix import models
from ptfix.callbacks.problems import OnProblem, Problems, never_ends_a_run
from ptfix.sequence_length import rows

#: Enough text to be typical, little enough to cost nothing.
_ROW_LENGTH = 32


class SoftPromptError(RuntimeError):
    """A trained soft prompt does not act, or generate() does not say what was trained."""


@never_ends_a_run("the soft prompt could not be checked")
class SoftPromptCallback(TrainerCallback):  # type: ignore[misc]  # the hosts are untyped here
    """Check a soft prompt when training ends: it acts, and generate() says what the training forward says; a task head
    gives a padded row what it gives the row alone. With ``load_best_model_at_end`` it is that of the best checkpoint.

    Silent about models without a soft prompt. Where each process holds only a part of the weights (FSDP, ZeRO-3, tensor
    parallel) the check is left out, and that is said. It costs a dozen forward passes of one short row, once.

    Args:
        on_problem: ``"warn"`` through ``logging.getLogger("ptfix")``, or ``"raise"`` a `SoftPromptError`.
        every_save: also check at each save.
        new_tokens: how many tokens to generate.
        rows: token ids to ask with; None: the first row of the training data where there is one, else any ids.
    """

    def __init__(
        self,
        on_problem: OnProblem = "warn",
        every_save: bool = False,
        new_tokens: int = 4,
        rows: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._problems = Problems(on_problem, SoftPromptError)
        self.every_save, self.new_tokens, self.rows = every_save, new_tokens, rows

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._problems.begin()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every_save:
            self._check(args, state, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._check(args, state, kwargs, state.best_model_checkpoint if args.load_best_model_at_end else None)

    def _check(self, args: Any, state: Any, given: dict[str, Any], best: str | None = None) -> None:
        model = _soft_prompted(given.get("model"))
        if model is None or not state.is_world_process_zero:
            return
        if models.is_sharded(args, given["model"]):
            self._problems.say(
                "the soft prompt was not checked: each process holds only a part of the weights. "
                "`ptfix verify` checks the saved adapter."
            )
            return
        problems = [_unlike_best(model, best), self._problem(model, given.get("train_dataloader"))]
        self._problems.tell(*filter(None, problems))

    def _problem(self, model: Any, dataloader: Any) -> str | None:
        import torch

        from ptfix.soft_prompts.proof import check

        for row in [self._first_row(model.base_model, dataloader)] if self.rows is None else self.rows:
            ids = torch.tensor([list(row)]) if row else None
            result = check.check(model, ids, self.new_tokens)
            if not result.good:
                return result.sentence + (_advice() if result.acts else "")
        return None

    def _first_row(self, base: Any, dataloader: Any) -> Sequence[int]:
        """The beginning of the first training row; empty where there is none, or none that looks like token ids."""
        looked = rows.look(getattr(dataloader, "dataset", None), seconds=0, keep=_ROW_LENGTH)
        if looked is not None and looked.fault is not None and not looked.seen:
            self._problems.say(f"the soft prompt is checked with tokens without a meaning: {looked.fault}")
        ids = looked.seen[0].ids if looked is not None and looked.seen else ()
        vocabulary = base.get_input_embeddings().weight.shape[0]
        return ids if all(0 <= token < vocabulary for token in ids) else ()


def _unlike_best(model: Any, folder: str | None) -> str | None:
    from ptfix.soft_prompts.proof import check

    difference = check.unlike_saved(model, folder) if folder is not None else None
    if difference is None:
        return None
    return (
        f"the best model was not restored: {difference}. Load it with PeftModel.from_pretrained(base_model, folder)"
        f"{_advice()}"
    )


def _soft_prompted(model: Any) -> Any:
    """The PeftModel with an active soft prompt, or None. Imports nothing that training has not."""
    peft = sys.modules.get("peft")
    if peft is None or model is None:
        return None
    from ptfix.soft_prompts import adapter, heads

    model = models.unwrap(model)
    if not isinstance(model, peft.PeftModel):
        return None
    acts = adapter.has_soft_prompt(model) or (heads.of(model) is not None and heads.has_soft_prompt(model))
    return model if acts else None


def _advice() -> str:
    import ptfix

    waiting = [row.fix for row in ptfix.status().rows if row.waiting]
    return f". ptfix.apply() repairs this pair: it was not called ({', '.join(waiting)})" if waiting else ""
