"""Does a model in training still answer short instructions as its base did? Answers remembered once, compared often.

Greedy answers of the base are remembered with its most probable tokens at each place. Read by the model as it is now
(teacher forced: one forward pass for all of them), they tell how far it has moved: KL(base || now), how often its first
choice is still the base's, and how probable it finds the base's answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptfix import models, whole_file

if TYPE_CHECKING:
    import torch

#: Short, of different kinds, with answers that most chat models agree with themselves on.
INSTRUCTIONS: tuple[str, ...] = (
    "What is the capital of France?",
    "List three fruits, one per line.",
    "Translate to German: Good morning, my friend.",
    "Answer with yes or no: is ice colder than steam?",
    "Write one sentence about a lighthouse.",
    "What is 17 plus 25? Answer with the number only.",
    "Correct the spelling: I recieved teh letter yesterday.",
    "Reply with the word READY and nothing else.",
)


#: generate()'s plain greedy search, whatever a model's generation config says.
_GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
}


@dataclass(frozen=True)
class Memory:
    """What the base answered to one prompt; all in token ids."""

    prompt: list[int]
    answer: list[int]
    tokens: list[list[int]]  #: the most probable tokens at each place of the answer, first the most probable one
    log_probs: list[list[float]]  #: their log-probabilities, in nats


@dataclass(frozen=True)
class Kept:
    """How near a model is to its base, over all places of all remembered answers."""

    kl: float  #: KL(base || now) in nats per token; what lies outside the most probable tokens counts as one token
    agreement: float  #: share of places where the most probable token is the same
    nll: float  #: mean negative log-likelihood of the base's answers, in nats per token


def remember(
    model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, top: int, stops: Sequence[int] = ()
) -> list[Memory]:
    """What a model answers now, greedily, in at most `new_tokens` tokens each, up to and with one of `stops`.

    For the base itself: a soft prompt in force would be lost on some hosts.
    """
    import torch

    with models.undisturbed(model):
        rows = [[*prompt, *_answer(model, prompt, new_tokens, stops)] for prompt in prompts]
        memories = []
        for prompt, row, scores in zip(prompts, rows, _scores(model, rows), strict=True):
            # With the scores of this pass, as later comparisons make them: an unchanged model is then exactly equal.
            found = torch.log_softmax(scores[len(prompt) - 1 : -1].double(), dim=-1).topk(min(top, scores.shape[-1]))
            memories.append(Memory(list(prompt), row[len(prompt) :], found.indices.tolist(), found.values.tolist()))
    return memories


def _answer(model: Any, prompt: Sequence[int], new_tokens: int, stops: Sequence[int]) -> list[int]:
    """The greedy answer to one prompt: alone, so that nothing depends on padding, and with a KV cache."""
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.tensor([prompt], device=model.get_input_embeddings().weight.device)
    # By keyword, because a model's own generation config would win over the defaults of another one.
    out = base.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
        use_cache=True,
        **_GREEDY,
    )
    return [int(token) for token in out[0, len(prompt) :]]


def compare(model: Any, memories: Sequence[Memory]) -> Kept:
    """Read the remembered answers with the model as it is now: one forward pass."""
    import torch

    divergences, same, surprises = [], [], []
    with models.undisturbed(model):
        scores = _scores(model, [memory.prompt + memory.answer for memory in memories])
        for memory, row in zip(memories, scores, strict=True):
            now = torch.log_softmax(row[len(memory.prompt) - 1 : -1].double(), dim=-1)
            tokens = torch.tensor(memory.tokens, device=now.device)
            base = torch.tensor(memory.log_probs, device=now.device, dtype=now.dtype)
            divergences.append(_divergence(base, now.gather(1, tokens)))
            same.append(now.argmax(dim=1) == tokens[:, 0])
            surprises.append(-now.gather(1, torch.tensor(memory.answer, device=now.device)[:, None])[:, 0])
    return Kept(
        kl=float(torch.cat(divergences).mean()),
        agreement=float(torch.cat(same).double().mean()),
        nll=float(torch.cat(surprises).mean()),
    )


def _divergence(base: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """KL of each place ``[places]``, from log-probabilities of the same tokens ``[places, top]`` and of the rest."""
    import torch

    def with_rest(log_probs: torch.Tensor) -> torch.Tensor:
        rest = (1 - log_probs.exp().sum(dim=1, keepdim=True)).clamp(min=torch.finfo(log_probs.dtype).eps)
        return torch.cat([log_probs, rest.log()], dim=1)

    base, now = with_rest(base), with_rest(now)
    return (base.exp() * (base - now)).sum(dim=1)


def _scores(model: Any, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The logits ``[tokens, vocab]`` of each row, read in one batch."""
    import torch

    width = max(len(row) for row in rows)
    device = model.get_input_embeddings().weight.device
    # Padding on the right: no token before it can see it, and positions are those of the row alone.
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -width:]  # virtual tokens of a soft prompt come first
    return [logits[number, : len(row)] for number, row in enumerate(rows)]


def save(memories: Sequence[Memory], path: Path) -> None:
    """Write the memories, whole or not at all."""
    whole_file.write(path, json.dumps([asdict(memory) for memory in memories]).encode())


def load(path: Path) -> list[Memory]:
    """Read what `save` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        return [Memory(**memory) for memory in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not hold remembered answers ({error}); delete it.") from error
