"""Padding on the left of a text must not come between the text and its soft prompt.

Otherwise positions, relative distances and sliding windows are not those of the row alone (peft#54, peft#1093).
"""

from __future__ import annotations

import torch


def left_pads(attention_mask: torch.Tensor) -> torch.Tensor | None:
    """How many leading zeros each row of ``attention_mask [batch, tokens]`` has: ``[batch]``, or None where no row
    has any."""
    if bool((attention_mask[:, 0] != 0).all()):
        return None
    return (attention_mask.cumsum(-1) == 0).sum(-1)


def right_pads(attention_mask: torch.Tensor) -> torch.Tensor:
    """How many trailing zeros each row of ``attention_mask [batch, tokens]`` has: ``[batch]``."""
    return (attention_mask.flip(-1).cumsum(-1) == 0).sum(-1)


def roll(rows: torch.Tensor, shifts: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Roll each of ``rows [batch, ...]`` along `dim` by its own ``shifts [batch]`` places to the right."""
    dim = dim % rows.dim()
    places = torch.arange(rows.shape[dim], device=rows.device)
    index = (places - shifts.to(rows.device).unsqueeze(1)) % rows.shape[dim]
    return _gather(rows, index, dim)


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
    return _gather(rows, index, 1)


def _gather(rows: torch.Tensor, index: torch.Tensor, dim: int) -> torch.Tensor:
    shape = [1] * rows.dim()
    shape[0], shape[dim] = index.shape
    wanted = list(rows.shape)
    wanted[dim] = index.shape[1]
    return rows.gather(dim, index.view(shape).expand(wanted))
