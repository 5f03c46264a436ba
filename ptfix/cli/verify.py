"""`ptfix verify ADAPTER`: does a saved adapter act, and does generate() equal the training forward in every mode?"""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import ptfix
from ptfix import errors, hosts
from ptfix.cli import UsageError

#: task type -> the class of transformers that loads its base model
_AUTO = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def add_parser(subparsers: Any) -> None:
    """Offer the command."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify", help="does a saved soft prompt act, and does generate() say what was trained, in every mode"
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="folder that save_pretrained() or Trainer wrote")
    parser.add_argument("--base", metavar="MODEL", help="the base model; default: as the adapter says")
    parser.add_argument("--stock", action="store_true", help="without ptfix.apply(): what the hosts alone do")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the verdicts; 1 where the adapter does not act or some mode is wrong, else 0."""
    saved = _read(args.adapter)
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hosts are imported: nothing is downloaded
    for name in hosts.FLOORS:
        problem = hosts.problem(name)
        if problem:
            raise UsageError(problem)
    _hush()
    try:
        ptfix.revert() if args.stock else ptfix.apply()
        findings = examine(args.adapter, args.base or saved.get("base_model_name_or_path"))
    finally:
        ptfix.revert()
    findings = {"ptfix": ptfix.__version__, "hosts": hosts.versions(), "stock": args.stock, **findings}
    print(json.dumps(findings, indent=2) if args.json else _text(findings))
    return 0 if findings["good"] else 1


def examine(folder: Path, base_name: str | None) -> dict[str, Any]:
    """Load the adapter on its base model and judge it, ready for json."""
    from ptfix.soft_prompts.proof import check, survey

    model = _load(folder, base_name)
    findings: dict[str, Any] = {"adapter": str(folder), "base": base_name, "prompt": check.describe(model)}
    try:
        result = check.check(model)
    except Exception as error:
        sentence = f"the adapter's own training forward raises {errors.one_line(error)}"
        return {**findings, "good": False, "acts": None, "sentence": sentence, "modes": []}
    outcomes = survey.survey(model)
    return {
        **findings,
        "good": result.acts and all(outcome.good for outcome in outcomes),
        "acts": result.acts,
        "sentence": result.sentence,
        "modes": [vars(outcome) for outcome in outcomes],
    }


def _read(folder: Path) -> dict[str, Any]:
    """adapter_config.json, once everything that can be told without the hosts is as it should be."""
    path = folder / "adapter_config.json"
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder")
    if not path.is_file():
        raise UsageError(f"{folder} holds no adapter_config.json: it is not a saved peft adapter")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(saved, dict) or not isinstance(saved.get("peft_type"), str):
        raise UsageError(f"{path} does not say which peft_type the adapter is")
    if "num_virtual_tokens" not in saved:
        raise UsageError(f"{folder} is a {saved['peft_type']} adapter, not a soft prompt: there is nothing to verify")
    if saved.get("task_type") == "SEQ_2_SEQ_LM":
        raise UsageError(f"{folder} is for an encoder-decoder model, which ptfix does not support")
    if saved.get("task_type") not in _AUTO:
        raise UsageError(f"{folder} has the task type {saved.get('task_type')}; known are {', '.join(_AUTO)}")
    length = saved["num_virtual_tokens"]
    if not isinstance(length, int) or length < 1:
        raise UsageError(f"{path} says num_virtual_tokens is {length!r}; it must be a number above 0")
    if not any((folder / name).is_file() for name in _WEIGHTS):
        raise UsageError(f"{folder} holds no weights: neither {' nor '.join(_WEIGHTS)}")
    return saved


def _load(folder: Path, base_name: str | None) -> Any:
    """The adapter on its base model, on this machine's files alone and without anybody's code."""
    import transformers
    from peft import PeftConfig, PeftModel

    from ptfix.soft_prompts.proof import check, survey

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise UsageError(f"this peft cannot read {folder / 'adapter_config.json'}: {errors.one_line(error)}") from error
    # The saved weights are the prompt; what it started from may be gone, or a tokenizer with code of its own.
    if hasattr(config, "prompt_tuning_init"):
        config.prompt_tuning_init = "RANDOM"
    if not base_name:
        raise UsageError(f"{folder} does not name its base model: pass --base MODEL")
    try:
        auto = getattr(transformers, _AUTO[str(getattr(config.task_type, "value", config.task_type))])
        base = auto.from_pretrained(base_name, local_files_only=True, trust_remote_code=False, **_labels(folder))
    except Exception as error:
        raise UsageError(
            f"the base model {base_name} cannot be loaded from this machine ({errors.one_line(error)}): "
            "pass --base MODEL"
        ) from error
    misfit = check.misfit(config, base, text=survey.room()) or _too_many_words(folder, base)
    if misfit:
        raise UsageError(f"{folder} does not fit {base_name}: {misfit}")
    try:
        return PeftModel.from_pretrained(base, str(folder), config=config).eval()
    except Exception as error:
        raise UsageError(f"the weights in {folder} cannot be loaded: {errors.one_line(error)}") from error


def _labels(folder: Path) -> dict[str, int]:
    """The number of classes that the saved class layer tells apart, which the base model's folder does not know."""
    from peft.utils.save_and_load import load_peft_weights

    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception:  # said in words when the adapter is loaded
        return {}
    sizes = [
        weight.shape[0]
        for name, weight in weights.items()
        if weight.dim() == 2 and any(part.startswith(("score", "classifier")) for part in name.split("."))
    ]
    return {"num_labels": sizes[-1]} if sizes else {}


def _too_many_words(folder: Path, base: Any) -> str | None:
    """Whether the tokenizer that Trainer saved beside the adapter has words the base model does not."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        words = len(AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))
    except Exception:
        return None  # whether a tokenizer is readable is another command's question
    known = base.get_input_embeddings().weight.shape[0]
    return f"the tokenizer beside it has {words} tokens, the base model {known}" if words > known else None


def _hush() -> None:
    """The hosts warn on stderr about each other's old ways; here only the verdict counts."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.getLogger("peft").setLevel(logging.ERROR)


def _text(findings: dict[str, Any]) -> str:
    installed = findings["hosts"]
    versions = ", ".join(f"{name} {installed[name]}" for name in hosts.FLOORS)
    lines = [
        f"{findings['adapter']}: {findings['prompt']}, on {findings['base']}",
        f"{versions}, {'without' if findings['stock'] else 'with'} ptfix {findings['ptfix']}",
        "",
    ]
    width = max((len(mode["mode"]) for mode in findings["modes"]), default=0)
    lines += [f"  {m['mode']:{width}}  {m['verdict']:7}  {m['detail']}".rstrip() for m in findings["modes"]]
    lines += [""] if findings["modes"] else []
    return "\n".join([*lines, _verdict(findings)])


def _verdict(findings: dict[str, Any]) -> str:
    sentence: str = findings["sentence"]
    wrong = [mode["mode"] for mode in findings["modes"] if mode["verdict"] not in ("exact", "host")]
    if wrong and findings["acts"]:
        sentence = f"{len(wrong)} of {len(findings['modes'])} modes do not say what was trained"
    return ("good: " if findings["good"] else "PROBLEM: ") + sentence
