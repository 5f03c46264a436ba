"""Padding on the left of a text stands before its soft prompt, not between the two.

Then positions, relative distances and sliding windows are those of the row alone (peft#54, peft#1093).
"""

from __future__ import annotations

import torch


def left_pads(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """How many leading zeros each row of ``attention_mask [batch, tokens]`` has: ``[batch]``, or None where no row
    has any."""
    if bool((attention_mask[:, 0] != 0).all()):
        return None
    return (attention_mask.cumsum(-1) == 0).sum(-1)


def pads_first(pads: torch.Tensor, virtual_tokens: int, length: int) -> torch.Tensor:
    """Index ``[batch, length]`` that turns ``[soft prompt | pads | text]`` into ``[pads | soft prompt | text]``, row
    by row."""
    place = torch.arange(length, device=pads.device).expand(len(pads), length)
    pads = pads.unsqueeze(1)
    return torch.where(
        place < pads, place + virtual_tokens, torch.where(place < pads + virtual_tokens, place - pads, place)
    )


def reorder(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """``rows [batch, tokens, ...]`` by ``index [batch, tokens]``."""
    shape = (*index.shape, *([1] * (rows.dim() - 2)))
    return rows.gather(1, index.view(shape).expand(*index.shape, *rows.shape[2:]))
