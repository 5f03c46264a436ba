"""What a soft prompt cannot do, each in one sentence that says what to do instead."""

from __future__ import annotations

from typing import Any

import torch

#: Entry points of transformers' continuous batching, which PeftModel hands on to the base model.
CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")

#: Arguments that tell attention kernels and recurrent layers where rows end inside a packed one.
_ROW_ENDS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens", "seq_idx")


def continuous_batching(*args: Any, **kwargs: Any) -> Any:
    """In place of each of `CONTINUOUS_BATCHING`."""
    raise ValueError(
        "continuous batching answers as the base model, without the soft prompt: call generate() with a padded batch, "
        "or export the adapter as an ordinary model (ptfix export --to vocabulary)."
    )


def unreadable(given: dict[str, Any]) -> str | None:
    """Why a soft prompt's forward() misreads these arguments (by name), or None.

    peft puts one soft prompt in front of each row of the batch, and reads no position_ids.
    """
    mask = given.get("attention_mask")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        return "a soft prompt needs a 2D attention_mask [batch, tokens]; build 4D masks from it, not before it."
    ends = [name for name in _ROW_ENDS if given.get(name) is not None]
    if ends:
        return packed(f"{ends[0]} is given")
    positions = given.get("position_ids")
    if not isinstance(positions, torch.Tensor) or positions.dim() != 2 or not positions.shape[1]:
        return None
    real = torch.ones_like(positions, dtype=torch.bool)
    if mask is not None and mask.shape[-1] == positions.shape[-1]:
        real = (mask != 0).to(positions.device)
        positions = positions.expand(len(real), -1)
    together = real[:, 1:] & real[:, :-1]
    if bool(((positions.diff(dim=-1) != 1) & together).any()):
        return packed("position_ids start anew inside a row")
    first = positions.gather(1, real.int().argmax(1, keepdim=True))[real.any(1)]
    if bool((first > 1).any()):  # some models count from 1
        return packed(f"position_ids begin at {int(first.max())}")
    return None


def packed(sign: str) -> str:
    """The sentence about rows that share one soft prompt; `sign` is how it shows."""
    return (
        f"rows are packed or split ({sign}), and a soft prompt would stand once in front of all of them: train without "
        "packing, padding_free and context or sequence parallelism, with a collator that pads; give padded rows their "
        "attention_mask."
    )
