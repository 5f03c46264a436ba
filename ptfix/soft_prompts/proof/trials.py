"""Each mode of the public contract, tried once per process on a model of a few hundred weights.

A call in a mode that is not right on the installed release is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from ptfix.soft_prompts import caches
from ptfix.soft_prompts.adapter import SoftPrompt
from ptfix.soft_prompts.proof import probes, reference
from ptfix.soft_prompts.public_contract import Call


def generate(peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``peft_model.generate(*args, **kwargs)`` should return; same arguments and return values.

    Raises:
        NotSupported: the call asks for a mode that is not right by the public contract of the installed release.
    """
    call = Call(peft_model, args, kwargs)
    for mode in call.modes():
        fault = _fault(call.prompt.is_prefix, mode)
        if fault is not None:
            call.refuse(f"{mode} is not right by the public contract of this transformers release ({fault})")
    return call.run()


def modes() -> dict[str, str | None]:
    """Every mode of both kinds of soft prompt: None where it is right, else how it fails."""
    return {
        f"{'prefix tuning' if is_prefix else 'prompt tuning'}: {mode}": _fault(is_prefix, mode)
        for is_prefix in (False, True)
        for mode in _TRIALS
    }


def proof() -> tuple[str | None, str]:
    """(why no soft prompt can be generated with, or None; which modes are right and which are refused)."""
    faults: dict[str, list[str]] = {}
    for each, fault in modes().items():
        kind, mode = each.split(": ")
        if fault is not None:
            faults.setdefault(mode, []).append(kind)
    if len(faults.get("greedy", [])) == 2:
        return "greedy decoding is not right either", ""
    right = [mode for mode in _TRIALS if mode not in faults]
    refused = [mode if len(kinds) == 2 else f"{mode} ({kinds[0]})" for mode, kinds in faults.items()]
    return None, "; ".join((", ".join(right), *([f"refused: {', '.join(refused)}"] if refused else [])))


_NEW = 2
_OPTIONS = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0}


@dataclass
class _Trial:
    model: Any
    truths: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    ids = torch.tensor([[3, 4, 5, 6]])

    def run(self, ids: torch.Tensor | None = None, **options: Any) -> Any:
        ids = self.ids if ids is None else ids
        options = {"attention_mask": torch.ones_like(ids), **_OPTIONS, **options}
        return Call(self.model, (ids,), options).run()

    def truth(self, ids: torch.Tensor | None = None) -> torch.Tensor:
        ids = self.ids if ids is None else ids
        key = tuple(ids[0].tolist())
        if key not in self.truths:
            self.truths[key] = reference.greedy(self.model, ids, _NEW)[0]
        return self.truths[key]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return reference.last_logits(self.model, ids)[0]


Pair = tuple[torch.Tensor, torch.Tensor]


def _scores(**options: Any) -> Callable[[_Trial], Pair]:
    """The second step's scores, which no ignored soft prompt or lost position leaves as they are."""

    def compare(trial: _Trial) -> Pair:
        out = trial.run(output_scores=True, return_dict_in_generate=True, **options)
        return out["scores"][1][0].float(), trial.logits(trial.truth()[:, :-1])

    return compare


def _padded(trial: _Trial, **options: Any) -> Pair:
    ids, mask = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    out = trial.run(ids, attention_mask=mask, output_scores=True, return_dict_in_generate=True, **options)
    alone = torch.cat((ids[:1, 2:], out["sequences"][:1, 4:5]), dim=1)
    return out["scores"][1][0].float(), trial.logits(alone)


def _second(trial: _Trial, padded: bool = False) -> Pair:
    ids, mask = trial.ids, torch.ones_like(trial.ids)
    if padded:
        ids, mask = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    first = trial.run(ids, attention_mask=mask, return_dict_in_generate=True)
    held = caches.of(first)
    again = torch.cat((first["sequences"], first["sequences"][:, -3:] % 5 + 2), dim=1)
    mask = torch.cat((mask, mask.new_ones(len(mask), again.shape[1] - mask.shape[1])), dim=1)
    out = trial.run(again, attention_mask=mask, past_key_values=held, output_scores=True, return_dict_in_generate=True)
    text = out["sequences"][:1, mask[0].argmax() : again.shape[1] + 1]
    return out["scores"][1][0].float(), trial.logits(text)


def _regenerate(trial: _Trial) -> Pair:
    first = trial.run(return_dict_in_generate=True)
    held = caches.of(first)
    return _scores(past_key_values=held)(trial)


def _beams(trial: _Trial) -> Pair:
    out = trial.run(num_beams=2, num_return_sequences=2)
    first = trial.logits(trial.ids).log_softmax(-1)
    scores = {}
    for token in first.topk(2).indices.tolist():
        text = torch.cat((trial.ids, torch.tensor([[token]])), dim=1)
        for last, score in enumerate((first[token] + trial.logits(text).log_softmax(-1)).tolist()):
            scores[(token, last)] = score
    best = sorted(scores, key=lambda tokens: -scores[tokens])[:2]
    return out[:, trial.ids.shape[1] :], torch.tensor(best)


def _embeds(trial: _Trial) -> Pair:
    embeds = SoftPrompt(trial.model).embed(trial.ids).detach()
    options = {"inputs_embeds": embeds, "attention_mask": torch.ones_like(trial.ids), **_OPTIONS}
    return Call(trial.model, (), options).run()[:, -_NEW:], trial.truth()[:, -_NEW:]


def _own_cache(trial: _Trial) -> Pair:
    return _scores(past_key_values=caches.new(trial.model.base_model))(trial)


def _lookup(trial: _Trial) -> Pair:
    text = torch.cat((trial.ids, trial.truth()[:, -3:], trial.ids), dim=1)
    out = trial.run(text, prompt_lookup_num_tokens=2, max_new_tokens=4, eos_token_id=15)
    # Old releases let accepted drafts run past the length; those tokens must be true as well.
    truth = reference.greedy(trial.model, text, out.shape[1] - text.shape[1])[0]
    stop = truth[0].tolist().index(15, text.shape[1]) + 1 if 15 in truth[0, text.shape[1] :] else truth.shape[1]
    return out, truth[:, :stop]


def _assisted(trial: _Trial) -> Pair:
    # Long enough that the bare base model, as the assistant, drafts tokens that must be rejected.
    out = trial.run(assistant_model=trial.model.base_model, max_new_tokens=8)
    return out, reference.greedy(trial.model, trial.ids, max(8, out.shape[1] - trial.ids.shape[1]))[0]


def _default_length(trial: _Trial) -> Pair:
    out = trial.run(max_new_tokens=None)
    options = {"attention_mask": torch.ones_like(trial.ids), "do_sample": False, "pad_token_id": 0}
    bare = trial.model.base_model.generate(trial.ids, **options)
    return torch.tensor(out.shape[1]), torch.tensor(bare.shape[1])


_TRIALS: dict[str, Callable[[_Trial], Pair]] = {
    "greedy": _scores(),
    "no mask": _scores(attention_mask=None),
    "left-padded batch": _padded,
    "beam search": _beams,
    "max_length": _scores(max_new_tokens=None, max_length=4 + _NEW),
    "default length": _default_length,
    "static cache": _scores(cache_implementation="static"),
    "static cache, left-padded": lambda trial: _padded(trial, cache_implementation="static"),
    "own cache": _own_cache,
    "second turn": _second,
    "second turn, left-padded": lambda trial: _second(trial, padded=True),
    "text wholly cached": _regenerate,
    "inputs_embeds": _embeds,
    "chunked prefill": _scores(prefill_chunk_size=2),
    "prompt lookup": _lookup,
    "assisted": _assisted,
    "no cache": _scores(use_cache=False),
}


@cache
def _fault(is_prefix: bool, mode: str) -> str | None:
    with probes.aside():
        try:
            got, truth = _TRIALS[mode](_trial(is_prefix))
            same = torch.allclose(got, truth, atol=1e-4) if truth.is_floating_point() else torch.equal(got, truth)
        except Exception as error:
            return f"raises {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    return None if same else "continues otherwise than the training forward"


@cache
def _trial(is_prefix: bool) -> _Trial:
    from peft import PrefixTuningConfig, PromptTuningConfig

    if is_prefix:
        sizes = {"num_layers": 1, "num_attention_heads": 2, "token_dim": 8}
        model = probes.tiny(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, **sizes))
    else:
        model = probes.tiny(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with torch.no_grad():  # so strong that the base model alone answers otherwise
        model.prompt_encoder["default"].embedding.weight.mul_(-8)
    return _Trial(model)
