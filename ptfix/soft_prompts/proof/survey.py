"""Every way of calling generate(), each judged by the training forward: is a soft prompt right in all of them?

A mode is a function of the model under check that returns answers. The same function runs on the bare base model where
the adapter fails: what the host cannot do without an adapter is the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ptfix import errors, models
from ptfix.soft_prompts import caches
from ptfix.soft_prompts.adapter import SoftPrompt
from ptfix.soft_prompts.proof import check, task_heads
from ptfix.soft_prompts.proof.check import Answer, Asked

EXACT = "exact"
WRONG = "wrong"  #: other tokens or scores
IGNORED = "ignored"  #: answers as the base model does
RAISES = "raises"
HOST = "host"  #: the bare base model cannot either

#: Real tokens that the longest mode (a second turn after a row of 8) reads and writes, without the new ones.
_TEXT = 12


@dataclass(frozen=True)
class Outcome:
    """How one mode went."""

    mode: str
    verdict: str  #: one of the five above
    detail: str = ""

    @property
    def good(self) -> bool:
        return self.verdict in (EXACT, HOST)


def survey(peft_model: Any, new_tokens: int = 6) -> list[Outcome]:
    """Judge every mode; of a task head the answers to padded rows. The model comes back as it was."""
    peft_model = models.unwrap(peft_model)
    if task_heads.is_head(peft_model):
        with check.comparing():
            wrong = task_heads.judge(peft_model, models.any_row(peft_model.base_model, seed=0)).wrong
        sides = {side: wrong.get(side, "") for side in ("left", "right")}
        return [Outcome(f"padded on the {side}", WRONG if how else EXACT, how) for side, how in sides.items()]
    asked = _Asked(peft_model, new_tokens, length=SoftPrompt(peft_model).length)
    bare = _Asked(peft_model.base_model, new_tokens, length=asked.length)
    with check.isolated(peft_model):
        return [_judge(name, mode, asked, bare) for name, mode in MODES.items()]


def room(new_tokens: int = 6) -> int:
    """How many real tokens a survey needs positions for."""
    return _TEXT + 2 * new_tokens + 4


def _judge(name: str, mode: Callable[[_Asked], list[Answer]], asked: _Asked, bare: _Asked) -> Outcome:
    outcome = _ask(name, mode, asked)
    if outcome.good:
        return outcome
    alone = _ask(name, mode, bare)
    if not alone.good:
        return Outcome(name, HOST, f"the bare base model cannot either: {alone.verdict} {alone.detail}".rstrip())
    return outcome


def _ask(name: str, mode: Callable[[_Asked], list[Answer]], asked: _Asked) -> Outcome:
    for owner in (vars(asked.base), asked.base._modules):
        owner.pop("_cache", None)  # or a mode passes by what the one before it left behind
    try:
        answers = mode(asked)
    except _Wrong as fault:
        return Outcome(name, WRONG, str(fault))
    except Exception as error:  # whatever the host raises is the outcome
        return Outcome(name, RAISES, errors.one_line(error))
    differences = [(answer, asked.first_difference(answer)) for answer in answers]
    wrong = [(answer, at) for answer, at in differences if at is not None]
    if not wrong:
        return Outcome(name, EXACT)
    if not asked.is_bare:
        plain = Asked(asked.base, asked.new_tokens)
        if all(plain.first_difference(answer) is None for answer, _ in wrong):
            return Outcome(name, IGNORED, "answers as the base model does")
    return Outcome(name, WRONG, f"from new token {wrong[0][1] + 1} on")


class _Wrong(Exception):
    """Found by a mode that has its own way of comparing."""


@dataclass
class _Asked(Asked):
    """Also knows what to read. The bare model reads a hard prompt as long as the soft one, to meet the same lengths."""

    length: int = 0

    def row(self, tokens: int = 8) -> torch.Tensor:
        ids = models.any_row(self.base, seed=1)[:, -tokens:]
        return torch.cat((models.any_row(self.base, seed=2, tokens=self.length), ids), 1) if self.is_bare else ids

    def padded(self) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """Two rows, and their left-padded ids and mask."""
        rows = [self.row(), self.row(tokens=5)]
        width = rows[0].shape[1]
        ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
        mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
        return rows, ids, mask


def _greedy(asked: _Asked, **options: Any) -> list[Answer]:
    return [asked.generate(asked.row(), **options)]


def _no_mask(asked: _Asked) -> list[Answer]:
    row = asked.row()
    options = {"max_new_tokens": asked.new_tokens, "do_sample": False, "pad_token_id": 0}
    return [Answer(row, asked.model.generate(input_ids=row, **options, **asked.task_ids())[0, row.shape[1] :])]


def _positional(asked: _Asked) -> list[Answer]:
    row = asked.row()
    return [Answer(row, asked.output(row).sequences[0, row.shape[1] :])]


def _max_length(asked: _Asked) -> list[Answer]:
    row = asked.row()
    return [asked.generate(row, max_new_tokens=None, max_length=row.shape[1] + asked.new_tokens)]


def _left_padded(asked: _Asked, **options: Any) -> list[Answer]:
    rows, ids, mask = asked.padded()
    out = asked.output(input_ids=ids, attention_mask=mask, rows=2, **options)
    scores = torch.stack(out.scores).float()
    return [Answer(row, out.sequences[i, ids.shape[1] :], scores[:, i]) for i, row in enumerate(rows)]


def _inputs_embeds(asked: _Asked) -> list[Answer]:
    row = asked.row()
    out = asked.output(inputs_embeds=asked.base.get_input_embeddings()(row).detach())
    return [Answer(row, out.sequences[0, -asked.new_tokens :], torch.cat(out.scores).float())]


def _own_cache(asked: _Asked) -> list[Answer]:
    return _greedy(asked, **{caches.keyword(): caches.new(asked.base)})


def _second_turn(asked: _Asked) -> list[Answer]:
    row = asked.row()
    first = asked.output(input_ids=row)
    cache = caches.of(first)
    if cache is None:
        raise NotImplementedError("this transformers returns no cache")
    more = models.any_row(asked.base, seed=3, tokens=_TEXT - 8)
    both = torch.cat((first.sequences, more), 1)
    again = asked.generate(both, **{caches.keyword(): cache})
    return [Answer(row, first.sequences[0, row.shape[1] :]), again]


def _prompt_lookup(asked: _Asked) -> list[Answer]:
    row = asked.row(tokens=4)
    row = torch.cat((row, row, row), 1)  # repeats itself, so that there are drafts
    truth = asked.truth(row, asked.new_tokens + 4)[0]
    unsaid = next(token for token in range(truth.shape[1] + 1) if token not in truth)  # 4.44 needs an eos here
    out = asked.output(input_ids=row, prompt_lookup_num_tokens=3, eos_token_id=unsaid)
    return [Answer(row, out.sequences[0, row.shape[1] :])]


def _beam_search(asked: _Asked, beams: int = 3) -> list[Answer]:
    def likelihoods(ids: torch.Tensor) -> torch.Tensor:
        return asked.truth(ids, 1)[1][0].log_softmax(-1)

    def longer(ids: torch.Tensor, token: int) -> torch.Tensor:
        return torch.cat((ids, ids.new_tensor([[token]])), 1)

    row = asked.row()
    found = asked.output(input_ids=row, num_beams=beams).sequences[0, row.shape[1] :]
    alive = [(0.0, row)]
    for _ in range(asked.new_tokens):
        wider = []
        for total, ids in alive:
            best = zip(*(part.tolist() for part in likelihoods(ids).topk(beams)), strict=True)
            wider += [(total + score, longer(ids, token)) for score, token in best]
        alive = sorted(wider, key=lambda beam: -beam[0])[:beams]
    # Two beams may be equally likely within rounding, so the likelihood decides, not the tokens.
    reached, ids = 0.0, row
    for token in found.tolist():
        reached += float(likelihoods(ids)[token])
        ids = longer(ids, token)
    if (
        len(found) != asked.new_tokens
        or not abs(reached - alive[0][0]) <= models.tolerance(asked.base) * max(1.0, abs(reached)) * 2
    ):
        raise _Wrong("finds another beam")
    return []


def _disabled(asked: _Asked) -> list[Answer]:
    """disable_adapter() gives the base model, and leaving it gives the adapter back."""
    if not asked.is_bare:
        with asked.model.disable_adapter():
            off = asked.generate(asked.row())
        if Asked(asked.base, asked.new_tokens).first_difference(off) is not None:
            raise _Wrong("disable_adapter() does not give the base model")
    return _greedy(asked)


MODES: dict[str, Callable[[_Asked], list[Answer]]] = {
    "greedy": _greedy,
    "no attention mask": _no_mask,
    "positional ids": _positional,
    "max_length": _max_length,
    "use_cache=False": partial(_greedy, use_cache=False),
    "left-padded batch": _left_padded,
    "beam search": _beam_search,
    "own cache": _own_cache,
    "second turn, returned cache": _second_turn,
    "static cache": partial(_greedy, cache_implementation="static"),
    "static cache, left-padded": partial(_left_padded, cache_implementation="static"),
    "inputs_embeds": _inputs_embeds,
    "chunked prefill": partial(_greedy, prefill_chunk_size=3),
    "prompt lookup": _prompt_lookup,
    "disable_adapter": _disabled,
}
