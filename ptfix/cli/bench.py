"""`ptfix bench MODEL`: tokens per second with a soft prompt, several ways in one run, and whether they say the same.

The limit is the base model reading an equally long prompt of ordinary tokens: no soft prompt can be faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ptfix
from ptfix import hosts
from ptfix.cli import UsageError

if TYPE_CHECKING:
    import torch

LIMIT, STOCK, STOCK_UNCACHED, FIXED, FIXED_UNCACHED = (
    "base model, ordinary prompt",
    "stock, with cache",
    "stock, without cache",
    "ptfix, with cache",
    "ptfix, without cache",
)


def add_parser(subparsers: Any) -> None:
    """Offer the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="tokens/s with cache, without cache and with ptfix, and whether the outputs agree"
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="local folder of a model, or of a saved adapter")
    parser.add_argument("--adapter", type=Path, help="local folder of a soft prompt; default: an untrained one")
    parser.add_argument("--virtual-tokens", type=int, default=20, help="length of the untrained soft prompt (20)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="length of the text (32)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--batch", type=int, default=1, help="rows at a time (1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after one to warm up (3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 where ptfix does not say what the training forward says, else 0."""
    for name in ("virtual_tokens", "prompt_tokens", "new_tokens", "batch", "repeats"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1.")
    if args.new_tokens < 2:
        raise UsageError("--new-tokens must be at least 2: decoding starts with the second.")
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hosts are imported: nothing is downloaded
    for host in hosts.FLOORS:
        if problem := hosts.problem(host):
            raise UsageError(problem)
    findings = _examine(args)
    print(json.dumps(findings, indent=2) if args.json else _text(findings))
    return 0 if findings["agrees"] else 1


@dataclass(frozen=True)
class Way:
    """One way to generate: which model reads what, with ptfix applied or not, and generate()'s options."""

    name: str
    model: Any
    input_ids: torch.Tensor
    fixed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Lap:
    """Seconds to the first token, seconds for the others, and the new tokens ``[rows, new]``."""

    prefill: float
    decode: float
    ids: torch.Tensor

    @property
    def tokens_per_second(self) -> float:
        """All new tokens over all the time."""
        return float(self.ids.numel() / (self.prefill + self.decode))

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens after the first over the time they took."""
        return float(self.ids[:, 1:].numel() / self.decode)


Laps = dict[str, list[Lap]]
_WARM_UP_TOKENS = 4


def race(
    ways: Sequence[Way], new_tokens: int, repeats: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[Laps, dict[str, str]]:
    """Time every way in every round, so that a slow moment of the machine slows all alike.

    Returns:
        The laps of each way, and the error of each way that raises. A first short round, not timed, warms up.
    """
    laps: Laps = {way.name: [] for way in ways}
    errors: dict[str, str] = {}
    for round_number in range(repeats + 1):
        for way in ways:
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


def untrained(base: Any, prompt_ids: torch.Tensor) -> Any:
    """`base` with a soft prompt made of ordinary tokens ``[virtual tokens]``: it says what they would."""
    import torch
    from peft import PromptTuningConfig, TaskType, get_peft_model

    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=len(prompt_ids))
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        model.prompt_encoder[model.active_adapter].embedding.weight.copy_(model.word_embeddings(prompt_ids))
    return model


def ways(base: Any, model: Any, prompt_ids: torch.Tensor, input_ids: torch.Tensor) -> list[Way]:
    """The ways to compare for a PeftModel on `base`; `prompt_ids [virtual tokens]` stand in for its soft prompt."""
    import torch

    hard = torch.cat((prompt_ids.expand(len(input_ids), -1), input_ids), dim=1)
    return [
        Way(LIMIT, base, hard),
        Way(STOCK, model, input_ids),
        Way(STOCK_UNCACHED, model, input_ids, options={"use_cache": False}),
        Way(FIXED, model, input_ids, fixed=True),
        Way(FIXED_UNCACHED, model, input_ids, fixed=True, options={"use_cache": False}),
    ]


class _FirstToken:
    """A logits processor that looks at the clock once."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.at = clock, 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.at:
            self.at = _now(self.clock, scores)
        return scores


def _now(clock: Callable[[], float], tensor: torch.Tensor) -> float:
    """The time when all that was asked of the tensor's device is done."""
    import torch

    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return clock()


def _lap(way: Way, new_tokens: int, clock: Callable[[], float]) -> Lap:
    import torch
    from transformers import LogitsProcessorList

    (ptfix.apply if way.fixed else ptfix.revert)()
    first = _FirstToken(clock)
    start = _now(clock, way.input_ids)
    with torch.no_grad():
        out = way.model.generate(
            input_ids=way.input_ids,
            attention_mask=torch.ones_like(way.input_ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            logits_processor=LogitsProcessorList([first]),
            **way.options,
        )
    stop = _now(clock, out)
    return Lap(first.at - start, stop - first.at, out[:, way.input_ids.shape[1] :])


def without_end(base: Any) -> None:
    """Let nothing but the number of new tokens end a text."""
    base.generation_config.eos_token_id = None
    base.generation_config.pad_token_id = 0


def _examine(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    from ptfix.soft_prompts import reference

    transformers.logging.set_verbosity_error()
    base, model = _load(args)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    device = base.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(vocabulary, shape, generator=generator).to(device)

    without_end(base)
    if model is None:
        model = untrained(base, tokens(args.virtual_tokens))
    length = model.peft_config[model.active_adapter].num_virtual_tokens
    input_ids = tokens(args.batch, args.prompt_tokens)
    print("timing, every way in every round", file=sys.stderr, flush=True)
    laps, errors = race(ways(base, model, tokens(length), input_ids), args.new_tokens, args.repeats)
    truth = torch.cat([reference.greedy(model, row[None], args.new_tokens)[0] for row in input_ids])
    truth = truth[:, input_ids.shape[1] :]
    rows = [_row(name, laps, errors, truth) for name in (LIMIT, STOCK, STOCK_UNCACHED, FIXED, FIXED_UNCACHED)]
    return {
        "ptfix": ptfix.__version__,
        "hosts": hosts.versions(),
        "model": str(args.model),
        "virtual_tokens": length,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "batch": args.batch,
        "repeats": args.repeats,
        "ways": rows,
        "agrees": all(row.get("agrees", False) for row in rows if row["way"] in (FIXED, FIXED_UNCACHED)),
    }


def _row(name: str, laps: Laps, errors: Mapping[str, str], truth: torch.Tensor) -> dict[str, Any]:
    if name in errors:
        return {"way": name, "error": errors[name]}
    row: dict[str, Any] = {
        "way": name,
        "first_token_seconds": statistics.median(lap.prefill for lap in laps[name]),
        "tokens_per_second": statistics.median(lap.tokens_per_second for lap in laps[name]),
        "of_limit": statistics.median(ratios(laps, name, LIMIT, lambda lap: lap.tokens_per_second)),
    }
    if name != LIMIT:  # which says something else
        row["agrees"] = all(lap.ids.equal(truth) for lap in laps[name])
    return row


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The base model, and the PeftModel on it where an adapter was named."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    folder, adapter = args.model, args.adapter
    for path in filter(None, (folder, adapter)):
        if not path.is_dir():
            raise UsageError(f"{path} is not a folder.")
    try:
        if adapter is None and (folder / "adapter_config.json").is_file():
            adapter, base_name = folder, PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
            if not base_name or not Path(base_name).is_dir():
                raise UsageError(
                    f"the base model of {adapter} ({base_name}) is no local folder: bench BASE --adapter {adapter}"
                )
            folder = Path(base_name)
        if adapter is not None and not PeftConfig.from_pretrained(str(adapter)).is_prompt_learning:
            raise UsageError(f"{adapter} is not a soft prompt.")
        base = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False).eval()
        return base, adapter and PeftModel.from_pretrained(base, str(adapter)).eval()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read a model there: {(str(error) or repr(error)).splitlines()[0]}") from error


def _text(findings: Mapping[str, Any]) -> str:
    versions = findings["hosts"]
    lines = [
        f"transformers {versions['transformers']}, peft {versions['peft']}, {findings['model']}",
        f"{findings['virtual_tokens']} virtual + {findings['prompt_tokens']} tokens, {findings['new_tokens']} new, "
        f"batch {findings['batch']}, median of {findings['repeats']}",
        "",
        f"  {'':27}  first token  tokens/s  of the limit  says what training says",
    ]
    for row in findings["ways"]:
        if "error" in row:
            lines.append(f"  {row['way']:27}  raises {row['error'].splitlines()[0][:80]}")
            continue
        says = {True: "yes", False: "NO", None: ""}[row.get("agrees")]
        lines.append(
            f"  {row['way']:27}  {row['first_token_seconds'] * 1000:8.0f} ms  {row['tokens_per_second']:8.1f}"
            f"  {row['of_limit']:12.2f}  {says}".rstrip()
        )
    return "\n".join(lines)
