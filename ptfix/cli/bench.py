"""`ptfix bench MODEL`: tokens/s with and without cache and with a soft prompt, and whether they say the same."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ptfix
from ptfix import hosts, pictures, speed
from ptfix.cli import UsageError
from ptfix.speed import FIXED, FIXED_UNCACHED, LIMIT, LIMIT_UNCACHED, STOCK, STOCK_UNCACHED, Laps, Truth

if TYPE_CHECKING:
    import torch

#: The demo's model, by this name, is read from its wheel.
SMOLLM2 = "smollm2"
_CACHED = {"base model": (LIMIT, LIMIT_UNCACHED), "stock": (STOCK, STOCK_UNCACHED), "ptfix": (FIXED, FIXED_UNCACHED)}


def add_parser(subparsers: Any) -> None:
    """Offer the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="tokens/s with cache, without cache and with ptfix, and whether the outputs agree"
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help=f"local folder of a model or a saved adapter; {SMOLLM2}: the demo's"
    )
    parser.add_argument("--adapter", type=Path, help="local folder of a soft prompt; default: an untrained one")
    parser.add_argument("--virtual-tokens", type=int, default=20, help="length of the untrained soft prompt (20)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="length of the text (32)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--batch", type=int, default=1, help="rows at a time (1)")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds after one to warm up (3)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw time and speedup against length: .svg, .png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the tables; 1 where ptfix does not say what the training forward says, else 0."""
    for name in ("virtual_tokens", "prompt_tokens", "new_tokens", "batch", "repeats"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1.")
    if args.new_tokens < 2:
        raise UsageError("--new-tokens must be at least 2: decoding starts with the second.")
    if args.picture and (problem := pictures.problem(args.picture)):
        raise UsageError(problem)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hosts are imported: nothing is downloaded
    for host in hosts.FLOORS:
        if problem := hosts.problem(host):
            raise UsageError(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what stock says of itself; the table says it in numbers
        findings = _examine(args)
    print(json.dumps(findings, indent=2) if args.json else _text(findings))
    if args.picture:
        _draw(findings, args.picture)
        print(f"drawn: {args.picture}", file=sys.stderr)
    return 0 if findings["agrees"] else 1


def _examine(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    base, model = _load(args)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    device = base.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(vocabulary, shape, generator=generator).to(device)

    speed.without_end(base)
    if model is None:
        model = speed.untrained(base, tokens(args.virtual_tokens))
    length = model.peft_config[model.active_adapter].num_virtual_tokens
    prompt_ids, input_ids = tokens(length), tokens(args.batch, args.prompt_tokens)
    laps, errors = _race(args, base, model, prompt_ids, input_ids)
    rows = [_row(name, laps, errors, length + args.prompt_tokens) for name in speed.WAYS]
    return {
        "ptfix": ptfix.__version__,
        "hosts": hosts.versions(),
        "model": str(args.model),
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "virtual_tokens": length,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "batch": args.batch,
        "repeats": args.repeats,
        "ways": rows,
        "speedup_of_the_cache": {
            name: [dict(zip(("median", "min", "max"), at, strict=True)) for at in speed.speedup(laps, fast, slow)]
            for name, (fast, slow) in _CACHED.items()
            if fast in laps and slow in laps
        },
        "agrees": all(row.get("agrees", False) for row in rows if row["way"] in (FIXED, FIXED_UNCACHED)),
    }


def _race(
    args: argparse.Namespace, base: Any, model: Any, prompt_ids: torch.Tensor, input_ids: torch.Tensor
) -> tuple[Laps, dict[str, str]]:
    from tqdm import tqdm

    with tqdm(total=2 + len(speed.WAYS) * (args.repeats + 1), unit="lap", disable=None) as bar:

        def progress(name: str) -> None:
            bar.set_description(f"{name:27}")
            bar.update()

        truths: list[Truth] = []
        hard = speed.with_virtual(prompt_ids, input_ids)
        for name, (reader, ids) in {"base model": (base, hard), "training forward": (model, input_ids)}.items():
            progress(f"the truth: {name}")
            truths.append(speed.truth(reader, ids, args.new_tokens))
        ways = speed.ways(base, model, prompt_ids, input_ids, *truths)
        return speed.race(ways, args.new_tokens, args.repeats, progress=progress)


def _row(name: str, laps: Laps, errors: Mapping[str, str], read: int) -> dict[str, Any]:
    """A way's medians; `read` is the number of positions that the prefill computes for each row."""
    if name in errors:
        return {"way": name, "error": errors[name]}
    found = [lap.agreement for lap in laps[name] if lap.agreement is not None]
    worst = max(found, key=lambda agreement: (not agreement.agrees, agreement.dlogit))
    return {
        "way": name,
        "first_token_seconds": statistics.median(lap.prefill for lap in laps[name]),
        "prefill_tokens_per_second": statistics.median(len(lap.ids) * read / lap.prefill for lap in laps[name]),
        "decode_tokens_per_second": statistics.median(lap.decode_tokens_per_second for lap in laps[name]),
        "tokens_per_second": statistics.median(lap.tokens_per_second for lap in laps[name]),
        "of_limit": statistics.median(speed.ratios(laps, name, LIMIT, lambda lap: lap.tokens_per_second)),
        "seconds_until_token": [statistics.median(at) for at in zip(*(lap.times for lap in laps[name]), strict=True)],
        "agrees": worst.agrees,
        "first_divergent_token": worst.diverges_at,
        "max_dlogit": worst.dlogit,
        "tolerance": worst.tolerance,
    }


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The base model, and the PeftModel on it where an adapter was named."""
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM

    folder, adapter = args.model, args.adapter
    bundled = str(folder) == SMOLLM2 and not folder.exists()
    for path in filter(None, (None if bundled else folder, adapter)):
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
        if bundled:
            base = _bundled()
        else:
            base = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return base.eval(), adapter and PeftModel.from_pretrained(base, str(adapter)).eval()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read a model there: {(str(error) or repr(error)).splitlines()[0]}") from error


def _bundled() -> Any:
    from ptfix.demo import smollm2

    file = smollm2.find()
    if file is None:
        raise UsageError(smollm2.MISSING)
    return smollm2.load(file)[0]


def _text(findings: Mapping[str, Any]) -> str:
    versions = findings["hosts"]
    lines = [
        f"transformers {versions['transformers']}, peft {versions['peft']}, {findings['model']}, {findings['dtype']}, "
        f"{findings['device']}, {findings['threads']} thread{'s' * (findings['threads'] > 1)}",
        f"{findings['virtual_tokens']} virtual + {findings['prompt_tokens']} tokens, {findings['new_tokens']} new, "
        f"batch {findings['batch']}, median of {findings['repeats']}",
        "",
        "  tokens/s                     prefill   decode  together  of the limit  max |dlogit|  agrees with the truth",
    ]
    for row in findings["ways"]:
        if "error" in row:
            lines.append(f"  {row['way']:27}  raises {row['error'].splitlines()[0][:80]}")
            continue
        says = "yes" if row["agrees"] else "NO"
        if row["first_divergent_token"]:
            says += f", other tokens from the {_ordinal(row['first_divergent_token'])} on"
        lines.append(
            f"  {row['way']:27} {row['prefill_tokens_per_second']:8.1f} {row['decode_tokens_per_second']:8.1f} "
            f"{row['tokens_per_second']:9.1f} {row['of_limit']:13.2f} {row['max_dlogit']:13.1g}  {says}"
        )
    lines += [
        "",
        "  (the truth: a full forward for every token, row by row; of a soft prompt, the training forward)",
        "",
    ]
    marks = _marks(findings["new_tokens"])
    lines.append(f"  {'the cache is faster, after':27}" + "".join(f"{mark:7}" for mark in marks) + "  new tokens")
    for name, found in findings["speedup_of_the_cache"].items():
        lines.append(f"  {name:27}" + "".join(f"{found[mark - 1]['median']:6.1f}x" for mark in marks))
    return "\n".join(lines)


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _marks(new_tokens: int) -> list[int]:
    """Powers of two, and the last token."""
    return [*(2**power for power in range(1, 20) if 2**power < new_tokens), new_tokens]


def _draw(findings: Mapping[str, Any], path: Path) -> None:
    places = list(range(1, findings["new_tokens"] + 1))
    speedups = findings["speedup_of_the_cache"]
    seconds = {row["way"]: (places, row["seconds_until_token"]) for row in findings["ways"] if "error" not in row}
    panels = [
        pictures.Panel("seconds until the token", seconds, floor=0),
        pictures.Panel(
            "with cache, times faster",
            {_CACHED[name][0]: (places, [at["median"] for at in found]) for name, found in speedups.items()},
            {
                _CACHED[name][0]: ([at["min"] for at in found], [at["max"] for at in found])
                for name, found in speedups.items()
            },
            floor=0,
        ),
    ]
    versions = findings["hosts"]
    pictures.draw(
        panels,
        path,
        "new tokens",
        f"{Path(findings['model']).name}: transformers {versions['transformers']}, peft {versions['peft']}, "
        f"{findings['virtual_tokens']} virtual + {findings['prompt_tokens']} tokens, batch {findings['batch']}",
    )
