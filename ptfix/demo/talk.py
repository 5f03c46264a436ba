"""A handful of ways to ask an adapter, each compared with the truth: its own training forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ptfix.demo import training
from ptfix.soft_prompts import reference

NEW_TOKENS = 28
QUESTIONS = ("What is the capital of Italy?", "What is bread made of?")
#: Stands in a batch beside a short one, which is padded to this length.
LONG_QUESTION = (
    "The last time we sailed, the wind came from the north and the sea was cold, and my brother asked something that "
    "I could not answer, however long I thought about it, so now I am asking you: why is the sky blue?"
)
FOLLOW_UP = "What is the capital of Greece?"

#: (row asked [1, tokens], the answer's ids) for each question of a mode
Answers = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Talk:
    """What is asked, and the two answers to compare with, each made once."""

    tokenizer: Any
    base: Any
    adapter: Any
    _truths: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)
    _plain: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def question(self, text: str) -> torch.Tensor:
        """Ids ``[1, tokens]`` of a question."""
        return torch.tensor([training.ask(self.tokenizer, text)])

    def follow_up(self, first_turn: torch.Tensor) -> torch.Tensor:
        """A turn and its answer ``[1, tokens]`` with the next question after them."""
        text = f"\n<|im_start|>user\n{FOLLOW_UP}<|im_end|>\n<|im_start|>assistant\n"
        return torch.cat((first_turn, torch.tensor([self.tokenizer(text)["input_ids"]])), dim=1)

    def rows(self) -> Iterator[torch.Tensor]:
        """Every row that is asked in some mode; the last is a chat of two turns."""
        first, second = map(self.question, QUESTIONS)
        yield from (first, second)
        yield self.follow_up(torch.cat((first, self.truth(first)[None]), dim=1))

    def truth(self, row: torch.Tensor) -> torch.Tensor:
        """The answer's ids by the adapter's training forward."""
        key = tuple(row[0].tolist())
        if key not in self._truths:
            ids = row
            for _ in range(NEW_TOKENS):
                ids, _ = reference.greedy(self.adapter, ids, 1)
                if ids[0, -1] == self.tokenizer.eos_token_id:
                    break
            self._truths[key] = ids[0, row.shape[1] :]
        return self._truths[key]

    def plain(self, row: torch.Tensor) -> torch.Tensor:
        """The answer's ids by the base model, which knows of no soft prompt."""
        key = tuple(row[0].tolist())
        if key not in self._plain:
            self._plain[key] = self.answer(self.generate(self.base, row)[0], row)
        return self._plain[key]

    def text(self, ids: torch.Tensor) -> str:
        """An answer as a person reads it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def generate(self, model: Any, ids: torch.Tensor, **options: Any) -> Any:
        """Greedy generate()."""
        options = {"attention_mask": torch.ones_like(ids), "pad_token_id": self.tokenizer.pad_token_id, **options}
        return model.generate(input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False, **options)

    def answer(self, sequence: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """What stands after the question ``[tokens]``, up to the end of the turn."""
        ids = sequence[asked.shape[-1] :]
        ends = (ids == self.tokenizer.eos_token_id).nonzero()
        return ids[: int(ends[0]) + 1] if len(ends) else ids


def _one_question(model: Any, talk: Talk, **options: Any) -> Answers:
    row = talk.question(QUESTIONS[0])
    return [(row, talk.answer(talk.generate(model, row, **options)[0], row))]


def _no_cache(model: Any, talk: Talk) -> Answers:
    return _one_question(model, talk, use_cache=False)


def _static_cache(model: Any, talk: Talk) -> Answers:
    return _one_question(model, talk, cache_implementation="static")


def _left_padded(model: Any, talk: Talk) -> Answers:
    long, row = talk.question(LONG_QUESTION), talk.question(QUESTIONS[1])
    batch = talk.tokenizer.pad({"input_ids": [long[0].tolist(), row[0].tolist()]}, return_tensors="pt")
    out = talk.generate(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    return [(row, talk.answer(out[1], batch["input_ids"]))]


def _second_turn(model: Any, talk: Talk) -> Answers:
    row = talk.question(QUESTIONS[0])
    first = talk.generate(model, row, return_dict_in_generate=True)
    if first.past_key_values is None:
        raise NotImplementedError("this transformers returns no cache")
    next_row = talk.follow_up(first.sequences)
    out = talk.generate(model, next_row, past_key_values=first.past_key_values)
    return [(row, talk.answer(first.sequences[0], row)), (next_row, talk.answer(out[0], next_row))]


def _long_chat(model: Any, talk: Talk, **options: Any) -> Answers:
    *_, row = talk.rows()
    return [(row, talk.answer(talk.generate(model, row, **options)[0], row))]


def _prompt_lookup(model: Any, talk: Talk) -> Answers:
    return _long_chat(model, talk, prompt_lookup_num_tokens=4)


def _chunked_prefill(model: Any, talk: Talk) -> Answers:
    return _long_chat(model, talk, prefill_chunk_size=16)


MODES: dict[str, Callable[[Any, Talk], Answers]] = {
    "one question": _one_question,
    "batch with padding on the left": _left_padded,
    "second turn, returned cache": _second_turn,
    "use_cache=False": _no_cache,
    "static cache": _static_cache,
    "prompt lookup decoding": _prompt_lookup,
    "chunked prefill": _chunked_prefill,
}


@dataclass(frozen=True)
class Outcome:
    """How one mode went: ``exact``, ``WRONG, silently``, ``raises ...``, and what was said."""

    verdict: str
    answers: Answers = field(default_factory=list)
    error: str = ""

    @property
    def exact(self) -> bool:
        return self.verdict == "exact"


def ask(mode: str, model: Any, talk: Talk) -> Outcome:
    """Ask `model` in one mode and judge every token."""
    try:
        answers = MODES[mode](model, talk)
    except Exception as error:  # whatever the host raises is the outcome
        return Outcome(f"raises {type(error).__name__}", error=str(error))
    wrong = [(row, ids) for row, ids in answers if not torch.equal(ids, talk.truth(row))]
    if not wrong:
        return Outcome("exact", answers)
    ignored = all(torch.equal(ids, talk.plain(row)) for row, ids in wrong)
    return Outcome("WRONG, silently" + (" (as without adapter)" if ignored else ""), answers)


def host_can(mode: str, talk: Talk) -> bool:
    """Can this transformers do the mode at all, on the bare model?"""
    try:
        MODES[mode](talk.base, talk)
    except Exception:
        return False
    return True
