"""Ways to generate with a soft prompt, timed token by token in one run and judged by the training forward.

The limit is the base model reading an equally long prompt of ordinary tokens: no soft prompt can be faster.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ptfix

if TYPE_CHECKING:
    import torch

LIMIT, LIMIT_UNCACHED, STOCK, STOCK_UNCACHED, FIXED, FIXED_UNCACHED = WAYS = (
    "base model, ordinary prompt",
    "the same, without cache",
    "stock, with cache",
    "stock, without cache",
    "ptfix, with cache",
    "ptfix, without cache",
)
_WARM_UP_TOKENS = 4
_TOLERANCE = 1e-3  #: of logits in float32

Clock = Callable[[], float]


@dataclass(frozen=True)
class Truth:
    """What full forwards without a cache say, row by row."""

    ids: torch.Tensor  #: [rows, new tokens]
    logits: torch.Tensor  #: [rows, new tokens, vocab]


@dataclass(frozen=True)
class Agreement:
    """How near a way comes to the truth."""

    diverges_at: int | None  #: the first new token, counted from 1, in which a row differs; None where none does
    dlogit: float  #: largest |difference| of a logit, up to and with that token: afterwards other texts are compared
    tolerance: float  #: what rounding in this dtype may make of equal logits (transformers#25420)

    @property
    def agrees(self) -> bool:
        """The same tokens, by logits that are equal but for rounding."""
        return self.diverges_at is None and self.dlogit <= self.tolerance


@dataclass(frozen=True)
class Way:
    """One way to generate: which model reads what, with ptfix applied or not, and generate()'s options."""

    name: str
    model: Any
    input_ids: torch.Tensor
    fixed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    truth: Truth | None = None


@dataclass(frozen=True)
class Lap:
    """One generate(): when each new token's logits were there, when it ended (seconds), and what it said."""

    times: Sequence[float]  #: [new tokens], from the start
    total: float
    ids: torch.Tensor  #: [rows, new tokens]
    agreement: Agreement | None = None  #: where the way has a truth

    @property
    def prefill(self) -> float:
        """Seconds to the first token."""
        return self.times[0]

    @property
    def tokens_per_second(self) -> float:
        """All new tokens over all the time."""
        return float(self.ids.numel() / self.total)

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first over the time they took."""
        return float(self.ids[:, 1:].numel() / (self.total - self.prefill))


Laps = dict[str, list[Lap]]


def race(
    ways: Sequence[Way],
    new_tokens: int,
    repeats: int,
    clock: Clock = time.perf_counter,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[Laps, dict[str, str]]:
    """Time every way in every round, so that a slow moment of the machine slows all alike.

    Args:
        ways: what to time.
        new_tokens: at least 2.
        repeats: timed rounds; a first short one, not timed, warms up.
        clock: seconds.
        progress: told the name of each way before its lap.

    Returns:
        The laps of each way, and the error of each way that raises.
    """
    laps: Laps = {way.name: [] for way in ways}
    errors: dict[str, str] = {}
    for round_number in range(repeats + 1):
        for way in ways:
            progress(way.name)
            if way.name in errors:
                continue
            try:
                lap = _lap(way, new_tokens if round_number else min(new_tokens, _WARM_UP_TOKENS), clock)
            except Exception as error:  # whatever the host raises is the outcome
                errors[way.name] = f"{type(error).__name__}: {error}"
                del laps[way.name]
            else:
                if round_number:
                    laps[way.name].append(lap)
    ptfix.revert()
    return laps, errors


def ratios(laps: Laps, name: str, other: str, of: Callable[[Lap], float]) -> list[float]:
    """`of` one way over `of` another, round by round."""
    return [of(lap) / of(rival) for lap, rival in zip(laps[name], laps[other], strict=True)]


def speedup(laps: Laps, fast: str, slow: str) -> list[tuple[float, float, float]]:
    """How many times sooner `fast` has each new token than `slow`: ``(median, least, most)`` of the rounds."""
    rounds = [
        [late / soon for soon, late in zip(lap.times, rival.times, strict=True)]
        for lap, rival in zip(laps[fast], laps[slow], strict=True)
    ]
    return [(statistics.median(one), min(one), max(one)) for one in zip(*rounds, strict=True)]


def untrained(base: Any, prompt_ids: torch.Tensor) -> Any:
    """`base` with a soft prompt made of ordinary tokens ``[virtual tokens]``: it says what they would."""
    import torch
    from peft import PromptTuningConfig, TaskType, get_peft_model

    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(prompt_ids))
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        model.prompt_encoder[model.active_adapter].embedding.weight.copy_(model.word_embeddings(prompt_ids))
    return model


def without_end(base: Any) -> None:
    """Let nothing but the number of new tokens end a text."""
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0


def with_virtual(prompt_ids: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """`input_ids [rows, tokens]` behind ordinary tokens ``[virtual tokens]`` that stand in for a soft prompt."""
    import torch

    return torch.cat((prompt_ids.expand(len(input_ids), -1), input_ids), dim=1)


def ways(
    base: Any,
    model: Any,
    prompt_ids: torch.Tensor,
    input_ids: torch.Tensor,
    base_truth: Truth | None = None,
    truth: Truth | None = None,
) -> list[Way]:
    """The ways of `WAYS` for a PeftModel on `base`; `prompt_ids` as in `with_virtual`; each model's truth if known."""
    hard, uncached = with_virtual(prompt_ids, input_ids), {"use_cache": False}
    return [
        Way(LIMIT, base, hard, truth=base_truth),
        Way(LIMIT_UNCACHED, base, hard, options=uncached, truth=base_truth),
        Way(STOCK, model, input_ids, truth=truth),
        Way(STOCK_UNCACHED, model, input_ids, options=uncached, truth=truth),
        Way(FIXED, model, input_ids, fixed=True, truth=truth),
        Way(FIXED_UNCACHED, model, input_ids, fixed=True, options=uncached, truth=truth),
    ]


def truth(model: Any, input_ids: torch.Tensor, new_tokens: int) -> Truth:
    """What a model says without generate(), cache or batch; `input_ids [rows, tokens]` without padding."""
    import torch

    from ptfix.soft_prompts.proof import reference

    rows = [reference.greedy(model, row[None], new_tokens) for row in input_ids]
    ids = torch.cat([ids for ids, _ in rows])[:, input_ids.shape[1] :]
    return Truth(ids, torch.stack([logits for _, logits in rows]))


class _Watch:
    """A logits processor that looks at the clock, and keeps what it is shown."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.times: list[float] = []
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(_now(self.clock, scores))
        self.scores.append(scores)  # a new tensor at each token, so keeping it costs no time
        return scores


def _now(clock: Clock, tensor: torch.Tensor) -> float:
    """The time when all that was asked of the tensor's device is done."""
    import torch

    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return clock()


def _lap(way: Way, new_tokens: int, clock: Clock) -> Lap:
    import torch
    from transformers import LogitsProcessorList

    (ptfix.apply if way.fixed else ptfix.revert)()
    watch = _Watch(clock)
    start = _now(clock, way.input_ids)
    with torch.no_grad():
        out = way.model.generate(
            input_ids=way.input_ids,
            attention_mask=torch.ones_like(way.input_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([watch]),
            **way.options,
        )
    total = _now(clock, out) - start
    ids = out[:, way.input_ids.shape[1] :]
    agreement = None if way.truth is None else _agreement(ids, watch.scores, way.truth, new_tokens, way.model.dtype)
    return Lap([at - start for at in watch.times], total, ids, agreement)


def _agreement(
    ids: torch.Tensor, scores: Sequence[torch.Tensor], truth: Truth, new_tokens: int, dtype: torch.dtype
) -> Agreement:
    import torch

    said = truth.ids[:, :new_tokens]
    if ids.shape != said.shape:  # ended early
        return Agreement(min(ids.shape[1], len(scores)) + 1, float("inf"), 0.0)
    differs = (ids != said).any(dim=0).nonzero()
    diverges_at = int(differs[0]) + 1 if len(differs) else None
    logits = truth.logits[:, : diverges_at or len(scores)]
    found = torch.stack(list(scores[: logits.shape[1]]), dim=1).float()
    tolerance = max(_TOLERANCE, 8 * torch.finfo(dtype).eps * float(logits.abs().max()))
    return Agreement(diverges_at, float((found - logits).abs().max()), tolerance)
