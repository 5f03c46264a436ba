"""SequenceLengthWarmupCallback: training begins with short rows and lengthens them step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainerCallback

from ptfix.callbacks.problems import Problems, never_ends_a_run
from ptfix.callbacks.running import trainer_of
from ptfix.sequence_length import warmup
from ptfix.sequence_length.schedule import Schedule


@never_ends_a_run("rows keep their length and order, for the sequence length warmup did not begin")
class SequenceLengthWarmupCallback(TrainerCallback):  # type: ignore[misc]  # the hosts are untyped here
    """Progressive sequence length: exact for each optimizer step, the same for its micro-batches and all processes.

    Which length is allowed follows from the optimizer step alone, so a resumed run goes on as the whole one would, and
    dataloader workers need not know. The Trainer's log gets ``sequence_length`` (longest row since the last log, with
    padding) and ``sequence_length_tokens`` (tokens this process has trained on, without padding).

    Where rows cannot be shortened or sorted, training goes on with the rows as they are, and a warning says so once:
    only ``order`` is allowed for packed rows with cu_seqlens, images and preference pairs, and ``order`` itself needs a
    data set whose rows can be counted and read.

    Args:
        schedule: the length for each step, for the modes that cut: `linear`, `root` or `steps` of
            `ptfix.sequence_length.schedule`.
        mode: ``"order"``: nothing is cut, each epoch takes its rows from short to long, each once. For chat: an answer
            that is cut off teaches to stop in the middle. ``"truncate"``: the first tokens of each row.
            ``"segment"``: each row in pieces, the same tokens in more rows.

    Raises:
        ValueError: a mode without what it needs.
    """

    def __init__(self, schedule: Schedule | None = None, mode: warmup.Mode = "order") -> None:
        if mode not in warmup.MODES:
            raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(map(repr, warmup.MODES))}.")
        if mode == "order" and schedule is not None:
            raise ValueError("mode='order' sorts the rows and follows no schedule; leave one of the two out.")
        if mode != "order" and schedule is None:
            raise ValueError(f"mode={mode!r} needs a schedule: ptfix.sequence_length.schedule.linear(256, 2048, 500).")
        self._problems = Problems()
        self.schedule, self.mode = schedule, mode
        self._longest, self._tokens = 0, 0
        self._trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._problems.begin()
        self._let_go()  # of a run that ended with an error
        self._longest = 0
        logged = (entry.get("sequence_length_tokens") for entry in reversed(state.log_history))
        self._tokens = next((tokens for tokens in logged if tokens is not None), 0) if state.global_step else 0
        trainer = trainer_of(self)
        if self.mode == "order":
            _sort(kwargs["train_dataloader"], args)
        self._trainer = trainer
        try:
            # The attributes lie over the methods of this one object; a subclass's own methods are called as ever.
            trainer.log = _Logged(self, trainer.log)
            if hasattr(Trainer, "get_batch_samples"):  # of Trainer: trl's had another method of that name before
                trainer.get_batch_samples = _Sampled(self, trainer.get_batch_samples)
            else:  # before 4.46 a step's labels are not counted, so a batch may be cut as late as this
                trainer.training_step = _Stepped(self, trainer.training_step)
        except Exception:
            self._let_go()
            raise

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._let_go()

    def _let_go(self) -> None:
        for name in ("log", "get_batch_samples", "training_step"):
            if isinstance(getattr(self._trainer, name, None), _Hook):
                delattr(self._trainer, name)
        self._trainer = None

    def cut(self, batch: Any) -> Any:
        """The batch at the length of the optimizer step that it is for, or as it is where it cannot be cut."""
        if not self._in_force:
            return batch
        with self._problems.guarded("a batch keeps its full length, as will others like it"):
            batch = self._shortened(batch)
        with self._problems.guarded("the log has no right sequence_length"):
            length, real = warmup.tokens(batch)
            self._longest, self._tokens = max(self._longest, length), self._tokens + real
        return batch

    def _shortened(self, batch: Any) -> Any:
        if self.schedule is None:
            return batch
        cut = warmup.truncated if self.mode == "truncate" else warmup.segmented
        return cut(batch, self.schedule.length(self._trainer.state.global_step))

    @property
    def _in_force(self) -> bool:
        """After a run that ended with an error the Trainer may train on without this callback."""
        trainer = self._trainer
        return trainer is not None and any(one is self for one in trainer.callback_handler.callbacks)

    def logged(self, logs: dict[str, float]) -> dict[str, float]:
        """What the Trainer logs of a training step, with the length."""
        if "loss" not in logs or not self._in_force:
            return logs
        longest, self._longest = self._longest, 0
        return {**logs, "sequence_length": longest, "sequence_length_tokens": self._tokens}


class _Hook:
    """Stands where a bound method of the Trainer stood, and calls it."""

    def __init__(self, callback: SequenceLengthWarmupCallback, method: Any) -> None:
        self.callback, self.method = callback, method


class _Sampled(_Hook):
    """All micro-batches of an optimizer step are taken, cut, and only then counted by the host."""

    def __call__(self, epoch_iterator: Iterator[Any], *args: Any, **kwargs: Any) -> Any:
        return self.method(map(self.callback.cut, epoch_iterator), *args, **kwargs)


class _Stepped(_Hook):
    def __call__(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return self.method(model, self.callback.cut(inputs), *args, **kwargs)


class _Logged(_Hook):
    """Before anybody is told: a callback's on_log comes after the reports to wandb and tensorboard."""

    def __call__(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        return self.method(self.callback.logged(logs), *args, **kwargs)


def _sort(dataloader: Any, args: Any) -> None:
    """Let the dataloader take its rows from short to long, in all processes or in none; it was made for this run only.

    Each process takes its share of one order: with two orders some rows would be taken twice, and others never.
    """
    failure = None
    try:
        batches, order = _short_to_long(dataloader, args)
    except Exception as error:
        failure = error
    if not _everywhere(failure is None):
        raise failure or RuntimeError("another process could not sort its rows")
    batches.sampler = order


def _short_to_long(dataloader: Any, args: Any) -> tuple[Any, warmup.ShortToLong]:
    """What draws the dataloader's batches, and the order it is to draw them in."""
    seed = args.seed if args.data_seed is None else args.data_seed
    order = warmup.ShortToLong(warmup.lengths(dataloader.dataset, args.length_column_name), seed)
    sampler: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):  # accelerate's shard for this process
        sampler = sampler.batch_sampler
    if not hasattr(sampler, "sampler"):
        raise ValueError("mode='order' cannot sort what this dataloader's batches are drawn from; use mode='truncate'.")
    return sampler, order


def _everywhere(good: bool) -> bool:
    """Is it good in each process? All of them have to ask, and wait for each other."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return good
    found = [good] * distributed.get_world_size()
    distributed.all_gather_object(found, good)
    return all(found)
