"""Does a model answer one and the same row alike, however it is fed? Probes that know no model by name.

Each compares two ways to the logits of the same tokens just past a boundary, beside a control: the same two ways where
the boundary is not crossed. What differs there too (rounding, experts with a capacity, a cache that is broken anyway)
is not a matter of length, and nothing is said. Dropout is off, and the model comes back as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ptfix import errors, models

#: New tokens generated across the boundary, and positions whose logits are compared.
_STEPS = 4
_SHORT = 16
#: Logits of a whole row are not held beyond this.
_MOST_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Findings:
    """What was found, one sentence each, and what could not be looked at."""

    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def probe(
    model: Any,
    boundary: int | None,
    own_config: Any = None,
    ids: Sequence[int] = (),
    seconds: float = 20.0,
) -> Findings:
    """Run every probe that applies.

    Args:
        model: a bare decoder-only model, whose weights are all here.
        boundary: the length at which it may begin to act otherwise; None: nothing crosses it, or there is none.
        own_config: the checkpoint's own config, where the live one has another rope.
        ids: tokens of a training row to ask with; where there are too few, any are taken.
        seconds: what the probes may cost. What would cost more, by a forward pass of a short row, is not begun.
    """
    found = Findings()
    asked = _Asked(model, ids)
    #: name, tokens to feed, the length of the longest row, the probe
    probes: list[tuple[str, int, int, Callable[[], str | None]]] = []
    if own_config is not None:
        probes.append(
            ("short prompts, against the checkpoint's own rope", 64 * 2, 64, lambda: _own_rope(asked, own_config))
        )
    if boundary is not None:
        length = boundary
        probes += [
            ("training mode against evaluation mode", 4 * length, length, lambda: _modes(asked, length)),
            ("a row alone against beside a long one", 5 * length, length, lambda: _company(asked, length)),
            ("generation with and without KV cache", 5 * length, length, lambda: _cache(asked, length)),
        ]
    if not probes:
        return found
    with deterministic(model):
        try:
            pace = _Pace(asked, min(64, boundary or 64), boundary, seconds)
        except Exception as error:
            found.skipped.append(f"the sequence length was not probed: {errors.one_line(error)}")
            return found
        left, dear, cost = seconds, [], 0.0
        for name, tokens, longest, look in probes:
            estimate = pace.seconds(tokens, longest)
            if estimate > left:
                dear.append(name)
                cost += estimate
                continue
            start = time.monotonic()
            try:
                with deterministic(model):
                    problem = look()
            except Exception as error:  # out of memory, say: nobody shall believe that the model was found good
                found.skipped.append(f"not probed: {name}. {errors.one_line(error)}")
            else:
                if problem is not None:
                    found.problems.append(problem)
            left -= time.monotonic() - start
        if dear:
            found.skipped.append(
                f"not probed: {'; '.join(dear)}. That would take about {cost:.0f} s here, of {seconds:.0f} s allowed "
                f"(probe_seconds) {max(0.0, left):.0f} s are left"
            )
    return found


@contextmanager
def deterministic(model: Any) -> Iterator[None]:
    """`models.undisturbed`, and no dropout inside, also in training mode."""
    with models.undisturbed(model), _without_dropout():
        yield


def _without_dropout() -> Any:
    """A mode in which no dropout drops, however a model spells it, while its modules believe that they train."""
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    plain = {functional.dropout, torch.dropout, functional.alpha_dropout, functional.dropout1d, torch.feature_dropout}
    attention = functional.scaled_dot_product_attention

    class WithoutDropout(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if func in plain:
                return args[0] if args else kwargs["input"]
            if func is attention:
                if len(args) > 4:
                    args = (*args[:4], 0.0, *args[5:])
                elif "dropout_p" in kwargs:
                    kwargs["dropout_p"] = 0.0
            return func(*args, **kwargs)

    return WithoutDropout()


@dataclass
class _Asked:
    """A model under probe, and the tokens it is asked with."""

    model: Any
    ids: Sequence[int]

    def row(self, length: int) -> Any:
        """``[1, length]``: what the training row begins with, and any tokens after it."""
        import torch

        row = models.any_row(self.model, seed=0, tokens=length)
        size = self.model.get_input_embeddings().weight.shape[0]
        given = [token for token in self.ids[:length] if 0 <= token < size]
        if len(given) == min(length, len(self.ids)):
            row[0, : len(given)] = torch.tensor(given, dtype=row.dtype)
        return row

    def logits(self, ids: Any, last: int = _STEPS, mask: Any = None, end: int | None = None) -> Any:
        """Float logits of the `last` positions before `end` of the first row.

        Through the backbone: the logits of all positions of a long row with a large vocabulary fill a memory.
        """
        body = self.model.base_model if self.model.base_model is not self.model else self.model.get_decoder()
        options = {} if mask is None else {"attention_mask": mask}
        hidden = body(input_ids=ids, use_cache=False, **options)[0]
        stop = ids.shape[1] if end is None else end
        return self.model.get_output_embeddings()(hidden[:1, max(0, stop - last) : stop]).float()[0]

    def seconds_per_token(self, tokens: int) -> float:
        """By a row of so many tokens, the second time: the first warms up."""
        ids = self.row(tokens)
        self.logits(ids)
        start = time.monotonic()
        self.logits(ids)
        return (time.monotonic() - start) / tokens

    def differ(self, ours: Any, theirs: Any, control: float = 0.0) -> bool:
        """Is the difference more than rounding, and much more than the control's?"""
        return models.distance(ours, theirs) > max(models.tolerance(self.model), 4 * control)


class _Pace:
    """What forward passes cost here. Attention makes a token dearer in proportion to the length of its row."""

    def __init__(self, asked: _Asked, short: int, boundary: int | None, seconds: float) -> None:
        self.short, self.at_short, self.slope = short, asked.seconds_per_token(short), 0.0
        quarter = (boundary or 0) // 4
        if quarter > 2 * short and self.at_short * 8 * quarter < seconds:  # else it costs too much already
            at_quarter = asked.seconds_per_token(quarter)
            self.slope = max(0.0, (at_quarter - self.at_short) / (quarter - short))

    def seconds(self, tokens: int, longest: int) -> float:
        """An estimate for so many tokens in rows of that length."""
        return tokens * (self.at_short + self.slope * max(0, longest - self.short))


def _agreement(ours: Any, theirs: Any) -> float:
    """The share of positions where both say the same token."""
    return float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())


def _modes(asked: _Asked, boundary: int) -> str | None:
    """Training mode against evaluation mode: finds position tricks that are off in training, as in Qwen v1."""

    def both(length: int) -> list[Any]:
        ids = asked.row(length)
        return [asked.logits(ids, 64) for _ in map(asked.model.train, (True, False))]

    train, evaluate = both(boundary)
    control = models.distance(train, evaluate)
    if control > models.tolerance(asked.model):
        return None  # they differ anyway: a matter of something else, such as a router's noise
    train, evaluate = both(boundary + 1)
    if models.distance(train, evaluate) <= max(models.noise(asked.model), 4 * control):
        return None
    return (
        f"beyond {boundary} tokens the model computes otherwise in training than in inference (of the last "
        f"{len(train)} next tokens of {boundary + 1}, {_agreement(train, evaluate):.0%} agree): a position trick is "
        f"off in training mode, so longer rows are trained at positions the model cannot handle, and inference never "
        f"uses what was learned. Cut rows to {boundary} tokens (max_length={boundary}), or take a model whose rope is "
        "the same in both modes"
    )


def _company(asked: _Asked, boundary: int) -> str | None:
    """A short row alone against padded beside a long one, and after one: finds frequencies that follow the batch."""
    asked.model.eval()
    short = asked.row(min(_SHORT, boundary))
    alone = asked.logits(short)
    control = models.distance(_beside(asked, short, boundary), alone)
    beside = _beside(asked, short, boundary + 1)
    after = asked.logits(short)
    found = []
    if asked.differ(beside, alone, control):
        found.append(f"beside a row of {boundary + 1} tokens")
    if asked.differ(after, alone):
        found.append(f"after a row of {boundary + 1} tokens was fed")
    if not found:
        return None
    return (
        f"a short row gets other logits {' and '.join(found)} than alone: its positions follow the longest row of the "
        f"batch. Batch rows of equal length (group_by_length=True, or ptfix.SequenceLengthWarmupCallback), keep rows "
        f"within {boundary} tokens, or use a static rope scaling such as yarn"
    )


def _beside(asked: _Asked, short: Any, length: int) -> Any:
    import torch

    long = asked.row(length)
    size = short.shape[1]
    ids = torch.cat([torch.nn.functional.pad(short, (0, length - size)), long])
    mask = torch.ones_like(ids)
    mask[0, size:] = 0
    return asked.logits(ids, mask=mask, end=size)


def _cache(asked: _Asked, boundary: int) -> str | None:
    """Generation with against without KV cache, across the boundary.

    Through generate(): some models fill their cache anew where their frequencies change, and only there.
    """
    from transformers import GenerationConfig

    model = asked.model
    if not model.can_generate():
        return None
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if boundary * vocabulary * 4 > _MOST_BYTES:
        raise MemoryError(f"the logits of {boundary} tokens need more than {_MOST_BYTES // 2**30} GiB")
    model.eval()
    # The settings a model ships with are no fault of its cache.
    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=0)

    def worst(length: int) -> float:
        ids = asked.row(length)
        scores, tokens = [], []
        for use_cache in (True, False):
            out = model.generate(
                input_ids=ids,
                attention_mask=ids.new_ones(ids.shape),
                max_new_tokens=_STEPS,
                do_sample=False,
                use_cache=use_cache,
                output_scores=True,
                return_dict_in_generate=True,
            )
            scores.append([score.float() for score in out.scores])
            tokens.append(out.sequences[0, length:].tolist())
        largest = 0.0
        for step in range(_STEPS):
            largest = max(largest, models.distance(scores[0][step], scores[1][step]))
            if tokens[0][step] != tokens[1][step]:
                break  # they tell different stories from here on
        return largest

    control = worst(min(_SHORT, max(1, boundary - _STEPS)))
    if control > models.tolerance(asked.model) or worst(max(1, boundary - 1)) <= max(
        models.tolerance(asked.model), 4 * control
    ):
        return None
    return (
        f"across {boundary} tokens generate() with the KV cache says otherwise than without it: keys in the cache keep "
        "the rope of the length at which they were made. Keep prompt and answer within it, generate with "
        "use_cache=False, or use a static rope scaling such as yarn"
    )


def _own_rope(asked: _Asked, own_config: Any) -> str | None:
    """Short prompts under the live rope against the checkpoint's own: what a change costs where none was needed."""
    asked.model.eval()
    ids = asked.row(64)
    live = asked.logits(ids, 64)
    with _rope_of(asked.model, own_config) as exchanged:
        if not exchanged:
            raise NotImplementedError("this release or model cannot build its rope from a config")
        own = asked.logits(ids, 64)
    if not asked.differ(live, own):
        return None
    logs = [one.log_softmax(-1) for one in (own, live)]
    divergence = float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())
    return (
        f"the changed rope changes short prompts too: on 64 tokens {_agreement(live, own):.0%} of next tokens are "
        f"those of the checkpoint's own rope, KL {divergence:.3f} nats a token, before any training. Scale less, or "
        "use dynamic scaling or the checkpoint's own rope where rows allow it"
    )


@contextmanager
def _rope_of(model: Any, own_config: Any) -> Iterator[bool]:
    """The model with rotary modules as another config has them. False, and nothing changed, where none can be made.

    A module is exchanged only if the live config gives the very one that is there: some are made from other arguments.
    """
    import torch

    live_config = models.text_config(model.config)
    exchanged: list[tuple[Any, str, Any]] = []
    for parent in list(model.modules()):
        for name, module in list(parent._modules.items()):
            frequencies = getattr(module, "inv_freq", None)
            if not isinstance(frequencies, torch.Tensor):
                continue
            try:
                twin = type(module)(config=live_config)
                own = type(module)(config=models.text_config(own_config))
            except Exception:  # of a release or a model with another constructor
                continue
            if torch.allclose(twin.inv_freq.float(), frequencies.float().cpu(), rtol=1e-3):
                exchanged.append((parent, name, module))
                parent._modules[name] = own.to(frequencies.device)
    try:
        yield bool(exchanged)
    finally:
        for parent, name, module in exchanged:
            parent._modules[name] = module
