"""A batch at the length that is allowed now. Pure: batches in, batches out; which step it is, the caller knows.

A batch is what a collator makes for a causal language model: a mapping of tensors whose rows are texts. A tensor is cut
where its shape says that it holds something per token, whatever its name, so labels, position_ids, masks and keys
nobody has seen stay in step with input_ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Literal, get_args

from ptfix.sequence_length.rows import IGNORED

if TYPE_CHECKING:
    import torch

Mode = Literal["order", "truncate", "segment"]
MODES: tuple[str, ...] = get_args(Mode)

#: Names (or their beginnings) that say: a row's tokens belong to something that would not be cut with them.
_UNCUTTABLE = {
    "cu_seq": "packed rows whose boundaries are counted in cu_seqlens",
    "seq_idx": "packed rows whose boundaries are counted in seq_idx",
    "pixel_": "images",
    "image_": "images",
    "video_": "videos",
    "input_features": "audio",
    "chosen_": "preference pairs",
    "rejected_": "preference pairs",
    "prompt_input_ids": "preference pairs",
    "inputs_embeds": "embeddings instead of token ids",
    "decoder_": "an encoder-decoder's two texts",
}


class CannotCut(ValueError):
    """A batch whose rows cannot be cut without changing what they mean."""


def uncuttable(batch: Any) -> str | None:
    """Why a batch allows only the mode ``order``; None where it can be cut."""
    if not isinstance(batch, Mapping):
        return f"the batch is a {type(batch).__name__}"
    for name in batch:
        for beginning, what in _UNCUTTABLE.items():
            if name.startswith(beginning):
                return f"the batch holds {what} ({name})"
    ids: Any = batch.get("input_ids")
    if getattr(ids, "ndim", 0) != 2:
        return "the batch has no input_ids [rows, tokens]"
    for name, value in batch.items():
        shape = tuple(getattr(value, "shape", ()))
        if ids.shape[1] in shape[1:] and _row_dim(shape, ids.shape) is None:
            return f"{name} {list(shape)} does not fit input_ids {list(ids.shape)}"
    return None


def truncated(batch: MutableMapping[str, Any], length: int) -> MutableMapping[str, Any]:
    """The batch with the first `length` tokens of each row, padding on the left not counted.

    Rows left without a label are dropped. Where all would be, each row is cut around its first label instead: the loss
    of a batch without a label is 0/0.

    Raises:
        CannotCut: with what the batch holds, and that ``order`` can do it.
    """
    return _windows(batch, length, segments=False)


def segmented(batch: MutableMapping[str, Any], length: int) -> MutableMapping[str, Any]:
    """The batch with each row in pieces of `length` tokens: the same tokens in more rows, each from position 0 on.

    Pieces without a label are dropped.

    Raises:
        CannotCut: with what the batch holds, and that ``order`` can do it.
    """
    return _windows(batch, length, segments=True)


def tokens(batch: Any) -> tuple[int, int]:
    """How long the rows of a batch are, with padding, and how many tokens without padding it has; (0, 0) if unknown."""
    if not isinstance(batch, Mapping):
        return 0, 0
    ids: Any = batch.get("input_ids")
    mask: Any = batch.get("attention_mask")
    if getattr(ids, "ndim", 0) != 2:
        return 0, 0
    real = int(mask.sum()) if getattr(mask, "shape", None) == ids.shape else ids.numel()
    return int(ids.shape[1]), real


def _windows(batch: MutableMapping[str, Any], length: int, segments: bool) -> MutableMapping[str, Any]:
    import torch

    reason = uncuttable(batch)
    if reason is not None:
        raise CannotCut(f"{reason}, which cannot be cut to a shorter length; use mode='order'.")
    if length < 2:
        raise CannotCut(f"the schedule asks for a length of {length}, at which no token predicts another one.")
    ids = batch["input_ids"]
    if ids.shape[1] <= length:
        return batch
    first, count = _text(ids, batch.get("attention_mask"))
    rows = torch.arange(len(ids), device=ids.device)
    if segments:
        pieces = (count + length - 1).div(length, rounding_mode="floor").clamp(min=1)
        rows = rows.repeat_interleave(pieces)
        piece = torch.cat([torch.arange(int(number), device=ids.device) for number in pieces])
        cut = _take(batch, rows, first[rows] + piece * length, length)
        return _labelled(cut) or cut
    # A row shorter than the window keeps its padding on the side where it was.
    cut = _take(batch, rows, (first + count.clamp(max=length) - length).clamp(min=0), length)
    labelled = _labelled(cut)
    if labelled is None:
        # The token before the first label. That of a text's first token is no such label: only padding comes before it.
        after_first = torch.arange(ids.shape[1], device=ids.device) > first[:, None]
        answer = (batch["labels"].ne(IGNORED) & after_first)[:, 1:].long().argmax(dim=1)
        labelled = _labelled(_take(batch, rows, answer.minimum(first + count - length).clamp(min=0), length))
    return labelled or cut


def _text(ids: torch.Tensor, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the text of each row begins, and how many tokens it reaches over."""
    import torch

    rows, width = ids.shape
    if getattr(mask, "shape", None) != ids.shape:
        return ids.new_zeros(rows), ids.new_full((rows,), width)
    columns = torch.arange(width, device=ids.device)
    real = mask.bool()
    first = columns.expand(rows, width).masked_fill(~real, width).min(dim=1).values
    last = columns.expand(rows, width).masked_fill(~real, -1).max(dim=1).values
    return first.clamp(max=last.clamp(min=0)), (last - first + 1).clamp(min=0)


def _take(batch: MutableMapping[str, Any], rows: torch.Tensor, starts: torch.Tensor, length: int) -> dict[str, Any]:
    """For each of `rows` (indices) the `length` columns from its start on; beyond the end of a row lies padding."""
    import torch

    shape = batch["input_ids"].shape
    columns = starts[:, None] + torch.arange(length, device=rows.device)
    beyond = columns >= shape[1]
    columns = columns.clamp(max=shape[1] - 1)
    cut: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor):
            cut[name] = _rows_of(value, rows, shape[0])
            continue
        row_dim = _row_dim(tuple(value.shape), shape)
        if row_dim is None:
            cut[name] = value
            continue
        value = value.index_select(row_dim, rows)
        dims = [dim for dim in range(row_dim + 1, value.dim()) if value.shape[dim] == shape[1]]
        for dim in dims:
            value = _columns_of(value, columns, row_dim, dim)
        if dims and beyond.any():
            # Of a mask [queries, keys] the keys are padding, and what it says of keys it hides, it knows itself.
            padding = value.amin() if len(dims) > 1 else IGNORED if "label" in name else 0
            value = value.masked_fill(_aligned(beyond, value, row_dim, dims[-1]), padding)
        cut[name] = value
    positions = cut.get("position_ids")
    if isinstance(positions, torch.Tensor) and positions.shape[-1] == length:
        cut["position_ids"] = _from_zero(positions, cut.get("attention_mask"))
    return cut


def _columns_of(value: torch.Tensor, columns: torch.Tensor, row_dim: int, dim: int) -> torch.Tensor:
    """The value's `columns` of each row, along `dim`."""
    sizes = list(value.shape)
    sizes[dim] = columns.shape[1]
    return value.gather(dim, _aligned(columns, value, row_dim, dim).expand(sizes))


def _aligned(per_token: torch.Tensor, value: torch.Tensor, row_dim: int, dim: int) -> torch.Tensor:
    """``[rows, length]`` so shaped that it broadcasts along the dimensions `row_dim` and `dim` of a value."""
    shape = [1] * value.dim()
    shape[row_dim], shape[dim] = per_token.shape
    return per_token.reshape(shape)


def _from_zero(positions: torch.Tensor, mask: Any) -> torch.Tensor:
    """The positions of a piece, its first text from 0 on; texts packed behind it begin at 0 already.

    Those of padding mean nothing, but are looked up too: up to transformers 4.37 in a table as long as the piece.
    """
    real = positions.ge(0)
    if getattr(mask, "ndim", 0) == 2:
        real = real & mask.bool()
    begun = ((positions == 0) & real).cumsum(dim=-1)
    offset = positions.gather(-1, real.long().argmax(dim=-1, keepdim=True))
    positions = positions.where(real, positions.clamp(max=positions.shape[-1] - 1))
    return positions.where(~real | (begun > 0), positions - offset)


def _row_dim(shape: Sequence[int], ids: Sequence[int]) -> int | None:
    """Which dimension of a tensor counts the rows of input_ids; None for a tensor that has no rows."""
    if shape and shape[0] == ids[0]:
        return 0
    if len(shape) == 3 and shape[1:] == tuple(ids):  # position_ids of more than one kind: [3, rows, tokens]
        return 1
    return None


def _rows_of(value: Any, rows: torch.Tensor, count: int) -> Any:
    """A list with an entry per row, such as the rows' ids, follows its rows."""
    return [value[int(row)] for row in rows] if isinstance(value, list | tuple) and len(value) == count else value


def _labelled(batch: dict[str, Any]) -> dict[str, Any] | None:
    """The batch without rows that train nothing; None where no row trains anything."""
    labels: Any = batch.get("labels")
    if getattr(labels, "shape", None) != batch["input_ids"].shape:
        return batch
    trains = labels[:, 1:].ne(IGNORED).any(dim=1)  # the first token is never predicted
    if trains.all():
        return batch
    if not trains.any():
        return None
    rows = trains.nonzero()[:, 0]
    kept = {}
    for name, value in batch.items():
        if not hasattr(value, "index_select"):
            kept[name] = _rows_of(value, rows, len(trains))
            continue
        row_dim = _row_dim(tuple(value.shape), tuple(batch["input_ids"].shape))
        kept[name] = value if row_dim is None else value.index_select(row_dim, rows)
    return kept


def lengths(dataset: Any, length_column: str = "length") -> list[int]:
    """How many tokens each row of a data set has: its length column, else the size of its input_ids.

    Raises:
        ValueError: a data set that cannot be looked into, with what to do.
    """
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"mode='order' needs a data set with a length, not a {type(dataset).__name__}: "
            "give the Trainer a map-style data set, or use mode='truncate'."
        )
    if length_column in (getattr(dataset, "column_names", None) or ()):
        return [int(length) for length in dataset[length_column]]
    return [_length(row) for row in _rows(dataset)]


def _rows(dataset: Any) -> Iterable[Any]:
    return (dataset[index] for index in range(len(dataset)))


def _length(row: Any) -> int:
    """Of a preference pair, the longer of the two texts."""
    names = [name for name in row if name.endswith("input_ids")] if isinstance(row, Mapping) else []
    if not names:
        raise ValueError("mode='order' needs rows with input_ids, or a column with their lengths (length_column_name).")
    return max(len(row[name]) for name in names)


class ShortToLong:
    """A sampler: each row once an epoch, short ones first; among equals a shuffle that depends on the seed alone."""

    def __init__(self, lengths: Sequence[int], seed: int) -> None:
        import torch

        shuffled = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
        self._order = sorted(shuffled, key=lambda row: lengths[row])

    def __iter__(self) -> Iterator[int]:
        return iter(self._order)

    def __len__(self) -> int:
        return len(self._order)
