"""InstructionRetentionCallback: at each evaluation, how far the model has moved from its base on short instructions."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ptfix import models
from ptfix.callbacks.problems import Problems, never_ends_a_run
from ptfix.callbacks.running import trainer_of
from ptfix.chat_templates import saving
from ptfix.sequence_length import retention

logger = logging.getLogger("ptfix")

#: The base's answers, in the output directory: a resumed run without an adapter has no other base.
ANSWERS = "instruction_retention.json"


@never_ends_a_run("instruction retention is not measured")
class InstructionRetentionCallback(TrainerCallback):  # type: ignore[misc]  # the hosts are untyped here
    """Remember the base's answers to short instructions when training begins; compare at each evaluation and the end.

    The Trainer's log gets ``retention_kl`` (KL(base || now), nats per token), ``retention_agreement`` (share of places
    where the first choice is still the base's) and ``retention_nll`` (of the base's answers). It is an alert, not a
    proof: a change that training is meant to make moves the numbers too.

    The base is the model with its adapter disabled; without an adapter, the model as training begins, whose answers are
    kept in the output directory for a resumed run. It costs a short generation for each instruction, once, and a
    forward pass of a few short rows for each comparison. A comparison that fails is left out.

    Args:
        instructions: texts, asked as the chat template asks, or rows of token ids. None: a few that ptfix brings.
        alert_kl: warn through ``logging.getLogger("ptfix")`` when ``retention_kl`` rises above it. None: never.
        base: a model that is the base, where the one in training was changed before (another rope, say); it is let go
            of once it has answered.
        new_tokens: how many tokens of each answer to remember.
        top: of how many most probable tokens the probabilities are compared; the others count as one.
    """

    def __init__(
        self,
        instructions: Sequence[str | Sequence[int]] | None = None,
        alert_kl: float | None = 0.5,
        base: Any = None,
        new_tokens: int = 16,
        top: int = 20,
    ) -> None:
        self.instructions: Sequence[str | Sequence[int]] = (
            retention.INSTRUCTIONS if instructions is None else instructions
        )
        if isinstance(instructions, str) or not all(self.instructions) or not self.instructions:
            raise ValueError("instructions must be a list of texts or of rows of token ids, none of them empty.")
        if new_tokens < 1 or top < 1:
            raise ValueError(f"new_tokens is {new_tokens} and top {top}; both must be at least 1.")
        self.alert_kl, self.base, self.new_tokens, self.top = alert_kl, base, new_tokens, top
        self._problems = Problems()
        self._memories: list[retention.Memory] = []
        self._told: list[retention.Memory] = []  # by the base that was given
        self._compared_at: int | None = None
        self._alerted = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._problems.begin()
        self._memories, self._compared_at, self._alerted = [], None, False
        if not state.is_world_process_zero:
            return
        if models.is_sharded(args, kwargs["model"]):
            logger.warning("instruction retention is not measured: each process holds only a part of the weights.")
            return
        trainer_of(self)  # without one the numbers could not be logged, so nothing is asked
        self._memories = self._remembered(models.unwrap(kwargs["model"]), args, state, kwargs)
        self._compare(state, kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(state, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # before the last checkpoint, so that its state has the comparison
            should_log = control.should_log
            self._compare(state, kwargs)
            control.should_log = should_log  # to log takes it back, and this step's loss is not logged yet

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._compare(state, kwargs)  # a run that was stopped early

    def _remembered(self, model: Any, args: Any, state: Any, given: dict[str, Any]) -> list[retention.Memory]:
        """The base's answers: remembered earlier, or given now."""
        adapted = hasattr(model, "disable_adapter")
        kept = Path(args.output_dir) / ANSWERS
        if self._told:
            return self._told
        if state.global_step and not adapted and self.base is None:
            if kept.is_file():
                return retention.load(kept)
            logger.warning("%s is missing: instruction retention compares with the model as it is resumed.", kept)
        tokenizer = given.get("processing_class") or given.get("tokenizer")
        prompts = [_prompt(instruction, tokenizer) for instruction in self.instructions]
        plain = None if tokenizer is None else saving.tokenizer_of(tokenizer)
        if self.base is not None:
            stops = models.stop_tokens(self.base, plain)
            self._told = retention.remember(self.base, prompts, self.new_tokens, self.top, stops)
            self.base = None
            return self._told
        with models.undisturbed(model), model.disable_adapter() if adapted else contextlib.nullcontext():
            memories = retention.remember(model, prompts, self.new_tokens, self.top, models.stop_tokens(model, plain))
        if args.should_save and not adapted:
            with self._problems.guarded("the base's answers were not written, so a resumed run will not have them"):
                retention.save(memories, kept)
        return memories

    def _compare(self, state: Any, given: dict[str, Any]) -> None:
        if not self._memories or self._compared_at == state.global_step:
            return
        self._compared_at = state.global_step
        with self._problems.guarded("instruction retention was not measured, and is tried again at the next time"):
            found = retention.compare(models.unwrap(given["model"]), self._memories)
            trainer_of(self).log({f"retention_{name}": value for name, value in asdict(found).items()})
            self._judge(found)

    def _judge(self, found: retention.Kept) -> None:
        above = self.alert_kl is not None and not found.kl <= self.alert_kl
        if above and not self._alerted:
            logger.warning(
                "on %d short instructions the model has moved %.3f nats per token from its base (KL, alert at %g); "
                "its first choice is the base's in %.0f%% of the places. An alert, not a proof: what it is meant to "
                "learn moves it too. Ask it something; if it has forgotten: a lower learning rate, short "
                "instructions among the rows, or the rope that it was trained with.",
                len(self._memories),
                found.kl,
                self.alert_kl,
                100 * found.agreement,
            )
        self._alerted = above


def _prompt(instruction: str | Sequence[int], tokenizer: Any) -> list[int]:
    """The token ids that ask an instruction, up to and with the generation prompt.

    Raises:
        ValueError: a text, and nothing that makes token ids of it.
    """
    if not isinstance(instruction, str):
        return [int(token) for token in instruction]
    if tokenizer is None:
        raise ValueError(
            "give the Trainer its tokenizer (processing_class=...), or the callback rows of token ids "
            "(instructions=[[...]])."
        )
    template = getattr(tokenizer, "chat_template", None)
    if saving.is_registered(tokenizer):  # then a training template may lie on the tokenizer
        chosen = saving.choice(tokenizer).templates
        template = template if chosen is None or chosen.default is None else chosen.default
    plain = saving.tokenizer_of(tokenizer)
    if template is None:
        return list(plain(instruction)["input_ids"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    return list(plain(text, add_special_tokens=False)["input_ids"])
