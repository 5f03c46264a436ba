"""A prefix on a tensor parallel model (``tp_plan="auto"``): each process gets the heads that its attention computes.

peft keeps the whole prefix in every process. Attention layers are split by key/value heads, or not split at all where
the plan gathers their projections again; what they put into the KV cache shows which.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch

from ptfix.soft_prompts import caches, views

#: By the model's input embeddings, which its views share.
_heads: WeakKeyDictionary[torch.nn.Module, list[int | None]] = WeakKeyDictionary()


def is_split(base_model: Any) -> bool:
    """Does each process hold only a part of each layer?"""
    return (getattr(base_model, "_tp_size", None) or 1) > 1 and getattr(base_model, "_device_mesh", None) is not None


def share(states: torch.Tensor, layer: int, base_model: Any) -> torch.Tensor:
    """The part of one layer's keys or values ``[batch, all heads, tokens, head dim]`` that this process attends to.

    Its gradient is that of all heads, in every process.
    """
    words = base_model.get_input_embeddings()
    if words not in _heads:
        _heads[words] = _probe_heads(base_model)
    held = _heads[words]
    local = held[layer] if layer < len(held) else None
    if local is None or local == states.shape[1]:
        return states
    mesh = _mesh(base_model)
    if local * mesh.size() != states.shape[1]:
        raise ValueError(
            f"the prefix has {states.shape[1]} key/value heads, layer {layer} of this model has {local} of them in "
            f"each of {mesh.size()} processes: prefix tuning cannot tell which. Use prompt tuning, or no tp_plan."
        )
    shared: torch.Tensor = _Share.apply(states, mesh.get_coordinate()[0] * local, local, mesh)
    return shared


def _mesh(base_model: Any) -> Any:
    mesh = base_model._device_mesh
    return mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) and mesh.ndim > 1 else mesh


def _probe_heads(base_model: Any) -> list[int | None]:
    """How many key/value heads each layer puts into a KV cache in this process. All processes ask together."""
    # In a view, since a training model with checkpointing returns no cache.
    view = views.tree(base_model, lambda twin, module: twin.__dict__.update(training=False))
    device = base_model.get_input_embeddings().weight.device
    with torch.no_grad():
        cache = caches.of(view(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=True))
    return [None if key is None else key.shape[1] for key, _ in caches.pairs(cache)]


class _Share(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """Some of the heads; backwards, the gradients of all heads from all processes."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, first: int, heads: int, mesh: Any) -> torch.Tensor:
        ctx.where = states.shape, first, heads, mesh
        return states.narrow(1, first, heads).clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        shape, first, heads, mesh = ctx.where
        whole = gradient.new_zeros(shape)
        whole.narrow(1, first, heads).copy_(gradient)
        torch.distributed.all_reduce(whole, group=mesh.get_group())
        return whole, None, None, None
