"""The truth: what an adapter's own training forward says, recomputed in full for every token.

No generate(), no cache, no padding, one row at a time. Slow on purpose: this is what `verify`, `demo` and the tests
compare with.
"""

from __future__ import annotations

from typing import Any

import torch

from ptfix import models


def greedy(
    peft_model: Any, input_ids: torch.Tensor, new_tokens: int, task_ids: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue one row greedily by the training forward.

    Args:
        input_ids: ``[1, tokens]``, without padding.
        new_tokens: how many tokens to add; eos does not stop it.
        task_ids: ``[1]``, for multitask prompt tuning.

    Returns:
        ``(ids [1, tokens + new_tokens], scores [new_tokens, vocab])``.
    """
    scores = []
    for _ in range(new_tokens):
        logits = last_logits(peft_model, input_ids, task_ids)
        scores.append(logits[0])
        input_ids = torch.cat((input_ids, logits.argmax(-1, keepdim=True)), dim=1)
    return input_ids, torch.stack(scores)


def last_logits(peft_model: Any, input_ids: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Logits ``[rows, vocab]`` of the token after `input_ids [rows, tokens]`, from one training forward."""
    return logits(peft_model, 1, input_ids=input_ids, **({} if task_ids is None else {"task_ids": task_ids}))


def logits(peft_model: Any, last: int, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits ``[last, vocab]`` of the last tokens of one row, from one training forward of `inputs`."""
    if any(len(inputs[name]) != 1 for name in ("input_ids", "inputs_embeds") if name in inputs):
        raise ValueError("the reference takes one unpadded row at a time.")
    with models.evaluating(peft_model):
        found: torch.Tensor = peft_model(**inputs).logits
    return found[0, -last:].float()
