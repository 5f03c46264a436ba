"""SequenceLengthGuardCallback: before step 1, say what the model cannot do with rows of this length."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ptfix import errors, models
from ptfix.callbacks.problems import OnProblem, Problems, never_ends_a_run
from ptfix.chat_templates import choosing
from ptfix.sequence_length import context, judgement, parity, rows
from ptfix.soft_prompts import adapter, refusals

logger = logging.getLogger("ptfix")


class SequenceLengthError(RuntimeError):
    """The run would crash or learn nothing because of the length of its rows, or (when asked) any other problem."""


@never_ends_a_run("the sequence length could not be checked")
class SequenceLengthGuardCallback(TrainerCallback):  # type: ignore[misc]  # the hosts are untyped here
    """Compare the training rows with what the model can do, when training begins. Silent about encoder-decoders.

    A run that is certain to crash (it comes to a row longer than a table of positions) or to learn nothing (no row has
    a label) ends with an error before its first step. Everything else is a warning with numbers and advice; so is
    whatever was found without a look at every row: there is time for a few seconds' look only.

    Args:
        on_problem: ``"warn"`` through ``logging.getLogger("ptfix")``, or ``"raise"`` a `SequenceLengthError`.
        max_length: the longest row there will be, in tokens. None: as ``args.max_length`` or ``args.max_seq_length``
            (TRL) says; without these, what the rows show.
        probes: where rows cross the model's native length or its rope was changed, compare a few forward passes:
            training with evaluation mode, a row alone with one beside a long row, generation with and without cache.
        probe_seconds: what the probes may cost; those that would cost more are left out, and it is said.

    Raises:
        ValueError: an argument that cannot be.
    """

    def __init__(
        self,
        on_problem: OnProblem = "warn",
        max_length: int | None = None,
        probes: bool = True,
        probe_seconds: float = 20.0,
    ) -> None:
        self._problems = Problems(on_problem, SequenceLengthError)
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length is {max_length}; it must be at least 1, or None.")
        self.max_length, self.probes, self.probe_seconds = max_length, probes, probe_seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._problems.begin()
        model = kwargs.get("model")
        config = getattr(model, "config", None)
        if model is None or not hasattr(config, "to_dict") or adapter.is_encoder_decoder(model):
            return
        model = models.unwrap(model)
        dataloader = kwargs.get("train_dataloader")
        looked = rows.look(getattr(dataloader, "dataset", None), getattr(dataloader, "collate_fn", None))
        plan = self._plan(args, state, model, looked if looked is not None and looked.seen else None)
        found = judgement.judge(plan)
        if found.errors:  # in every process: one that ends alone would leave the others waiting for it
            raise SequenceLengthError("; ".join(found.errors))
        if not state.is_world_process_zero:
            return
        logger.info("sequence length: %s", plan.context.to_dict())
        if looked is not None and looked.fault is not None:
            self._problems.say(f"the sequence length was checked without some rows: {looked.fault}")
        found.warnings += _misread(args, model, kwargs.get("train_dataloader"))
        self._problems.tell(*found.warnings, *(self._probed(args, model, plan) if self.probes else []))

    def _plan(self, args: Any, state: Any, model: Any, looked: rows.Rows | None) -> judgement.Plan:
        live = context.read(model.config.to_dict())
        said = getattr(args, "max_length", None) or getattr(args, "max_seq_length", None)
        return judgement.Plan(
            context=live,
            own=_checkpoint(model),
            rows=looked,
            virtual_tokens=_virtual_tokens(model),
            max_length=self.max_length or (said if isinstance(said, int) else None),
            max_length_is_promised=self.max_length is not None,
            packed=getattr(args, "packing", None),
            takes_every_row=looked is not None and _takes_every_row(args, state, looked.total),
        )

    def _probed(self, args: Any, model: Any, plan: judgement.Plan) -> list[str]:
        """What forward passes find. What they cannot find out does not hide what the numbers have found."""
        try:
            found = self._probe(args, model, plan)
        except Exception as error:
            found = parity.Findings(skipped=[f"the sequence length was not probed: {errors.one_line(error)}"])
        for sentence in found.skipped:
            self._problems.say(sentence)
        return found.problems

    def _probe(self, args: Any, model: Any, plan: judgement.Plan) -> parity.Findings:
        boundary, own_config, table = plan.context.boundary, None, plan.context.hard_limit
        if boundary is not None and plan.longest + plan.virtual_tokens <= boundary:
            boundary = None  # no row gets there
        if boundary is not None and table is not None and boundary >= table.value:
            boundary = None  # no row can get there
        if plan.own is not None and plan.context.rope.differs_from(plan.own.rope):
            own_config = _config_of(model)
        if boundary is None and own_config is None:
            return parity.Findings()
        # Weights on the meta device are loaded by accelerate when they are needed.
        if models.is_sharded(args, model) or any(one.device.type == "meta" for one in model.parameters()):
            why = "the model is sharded, so its sequence length was judged by config and rows, without probes"
            return parity.Findings(skipped=[why])
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        ids = plan.rows.seen[0].ids if plan.rows is not None else ()
        return parity.probe(base, boundary, own_config, ids, self.probe_seconds)


def _takes_every_row(args: Any, state: Any, total: int) -> bool:
    """Is the run sure to come to each row? Not where it is resumed, or shorter than an epoch."""
    if state.global_step or args.dataloader_drop_last:
        return False
    if args.max_steps <= 0:
        return bool(args.num_train_epochs >= 1)
    rows_in_a_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return bool(args.max_steps * rows_in_a_step >= total)


def _virtual_tokens(model: Any) -> int:
    return adapter.SoftPrompt(model).length if hasattr(model, "peft_config") and _prompted(model) else 0


def _prompted(model: Any) -> bool:
    return bool(getattr(adapter.active_config(model), "is_prompt_learning", False)) and adapter.has_soft_prompt(model)


def _misread(args: Any, model: Any, dataloader: Any) -> list[str]:
    """Why a soft prompt would misread the batches of this run: packed rows, or rows split over processes."""
    if not _virtual_tokens(model):
        return []
    parallel = getattr(args, "parallelism_config", None)
    split = [name for name in ("cp_size", "sp_size") if (getattr(parallel, name, None) or 1) > 1]
    if split:
        return [refusals.packed(f"{split[0]} is {getattr(parallel, split[0])}")]
    try:
        with models.undisturbed_randomness():
            first = [dict(dataloader.dataset[index]) for index in range(min(2, len(dataloader.dataset)))]
            problem = refusals.unreadable(dict(dataloader.collate_fn(first)))
    except Exception:  # a stream, or rows and collators of a kind of their own: forward() will say it
        return []
    return [] if problem is None else [problem]


def _checkpoint(model: Any) -> context.Context | None:
    """What the checkpoint's own config.json says, where it lies on this machine."""
    folder = _folder(model)
    return None if folder is None else context.read_folder(folder)


def _config_of(model: Any) -> Any:
    """The checkpoint's own config, as an object of the live one's class: no remote code is loaded for it."""
    folder = _folder(model)
    return None if folder is None else type(model.config).from_dict(context.load(folder / "config.json"))


def _folder(model: Any) -> Path | None:
    name = getattr(model.config, "_name_or_path", None)
    folder = choosing.base_folder(name, getattr(model.config, "_commit_hash", None)) if name else None
    return folder if folder is not None and (folder / "config.json").is_file() else None
