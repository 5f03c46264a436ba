"""Three questions to an adapter, asked in three ways; the truth is its own training forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ptfix import errors
from ptfix.demo import training
from ptfix.soft_prompts import caches
from ptfix.soft_prompts.proof import reference

NEW_TOKENS = 28
#: Stands in a batch beside a short one, which is padded to this length.
LONG_QUESTION = (
    "The last time we sailed, the wind came from the north and the sea was cold, and my brother asked something that "
    "I could not answer, however long I thought about it, so now I am asking you: why is the sky blue?"
)
QUESTION, PADDED_QUESTION = "What is the capital of Italy?", "What is bread made of?"
FOLLOW_UP = "What is the capital of Greece?"


@dataclass(frozen=True)
class Answer:
    """What was asked ``[1, tokens]`` and the answer's ids ``[tokens]``, to the end of the turn."""

    row: torch.Tensor
    ids: torch.Tensor


@dataclass
class Talk:
    """The words, the base model, and the truth about an adapter on it."""

    tokenizer: Any
    base: Any
    adapter: Any
    _truths: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def question(self, text: str) -> torch.Tensor:
        """Ids ``[1, tokens]`` of a question."""
        return torch.tensor([training.ask(self.tokenizer, text)])

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

    def text(self, ids: torch.Tensor) -> str:
        """An answer as a person reads it."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def generate(self, model: Any, ids: torch.Tensor, **options: Any) -> Any:
        """The host's generate(), greedy, with everything it returns."""
        options = {"attention_mask": torch.ones_like(ids), "pad_token_id": self.tokenizer.pad_token_id, **options}
        return model.generate(
            input_ids=ids, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **options
        )

    def answer(self, row: torch.Tensor, new_ids: torch.Tensor) -> Answer:
        """What stands before the end of the turn."""
        ends = (new_ids == self.tokenizer.eos_token_id).nonzero()
        return Answer(row, new_ids[: int(ends[0]) + 1] if len(ends) else new_ids)


def alone(model: Any, talk: Talk) -> Answer:
    """One question, nothing else."""
    row = talk.question(QUESTION)
    return talk.answer(row, talk.generate(model, row).sequences[0, row.shape[1] :])


def padded(model: Any, talk: Talk) -> Answer:
    """A short question in a batch with a long one: it is padded on its left."""
    long, row = talk.question(LONG_QUESTION), talk.question(PADDED_QUESTION)
    batch = talk.tokenizer.pad({"input_ids": [long[0].tolist(), row[0].tolist()]}, return_tensors="pt")
    out = talk.generate(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    return talk.answer(row, out.sequences[1, long.shape[1] :])


def second_turn(model: Any, talk: Talk) -> Answer:
    """A question, its answer, and the next question on the cache that the first one returned."""
    first = talk.generate(model, talk.question(QUESTION))
    cache = caches.of(first)
    if cache is None:
        raise NotImplementedError("this transformers returns no cache")
    text = f"\n<|im_start|>user\n{FOLLOW_UP}<|im_end|>\n<|im_start|>assistant\n"
    row = torch.cat((first.sequences, torch.tensor([talk.tokenizer(text)["input_ids"]])), dim=1)
    out = talk.generate(model, row, **{caches.keyword(): cache})
    return talk.answer(row, out.sequences[0, row.shape[1] :])


#: The question that is answered, how it is asked in words, and the way.
WAYS: tuple[tuple[str, str, Callable[[Any, Talk], Answer]], ...] = (
    (QUESTION, "alone", alone),
    (PADDED_QUESTION, "in a batch beside a longer question", padded),
    (FOLLOW_UP, "second turn, on the returned cache", second_turn),
)


def ask(way: Callable[[Any, Talk], Answer], model: Any, talk: Talk) -> Answer | str:
    """The answer, or what is raised instead."""
    try:
        return way(model, talk)
    except Exception as error:  # whatever the host raises is the outcome
        return f"raises {errors.one_line(error)}"
