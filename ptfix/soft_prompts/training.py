"""The training forward of a soft prompt: what the base model is given on the way.

peft's own ``forward`` builds the inputs; these functions run it on a shallow view of the PeftModel whose base model
passes through us. So labels, losses and methods nobody listed stay peft's business, and nothing shared is changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ptfix.soft_prompts import caches, padding, views
from ptfix.soft_prompts.adapter import SoftPrompt

#: Takes the base model and the keyword arguments peft calls it with, returns what is to be called instead.
Change = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


def with_base_call(peft_model: Any, change: Change) -> Any:
    """A view of `peft_model` whose forward calls ``change(base model, arguments)`` where it called the base model.

    Views stack: each change sees what the one before it made.
    """
    base = peft_model.base_model
    changes = [*base.__dict__.get("_ptfix_changes", ()), change]
    real = origin(base)

    def forward(**kwargs: Any) -> Any:
        module = real
        for each in changes:
            module, kwargs = each(module, kwargs)
        return module.forward(**kwargs)

    view = views.shallow(peft_model)
    view._modules["base_model"] = views.shallow(base, forward=forward, _ptfix_changes=changes, _ptfix_origin=real)
    return view


def origin(base: Any) -> Any:
    """The base model itself, of itself or of a view."""
    return base.__dict__.get("_ptfix_origin", base)


def padding_aside(base: Any, kwargs: dict[str, Any], virtual_tokens: int) -> tuple[Any, dict[str, Any]]:
    """Let padding on the left not come between a text and its soft prompt (peft#1093).

    Positions are counted by the mask; padding stands in front of `virtual_tokens` embeddings (0 for a prefix, which
    stands in the cache). Whoever called sees logits in the order of the inputs.
    """
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return base, kwargs
    pads = padding.left_pads(mask[:, virtual_tokens:]) if virtual_tokens else None
    if pads is not None:
        order = padding.pads_first(pads, virtual_tokens, mask.shape[1])
        for name in ("attention_mask", "inputs_embeds", "labels"):
            if kwargs.get(name) is not None:
                kwargs[name] = padding.reorder(kwargs[name], order)
    if kwargs.get("position_ids") is None and "position_ids" in inspect.signature(base.forward).parameters:
        positions = (kwargs["attention_mask"].long().cumsum(-1) - 1).clamp(min=0)
        kwargs["position_ids"] = positions[:, -_fed(kwargs).shape[1] :]
    return (base if pads is None else _InOrder(base, order)), kwargs


class _InOrder:
    """A base model whose logits are put back into the order of the inputs, without those of `extra` tokens in front."""

    def __init__(self, base: Any, order: torch.Tensor, extra: int = 0) -> None:
        self.base, self.order, self.extra = base, order, extra

    def forward(self, **kwargs: Any) -> Any:
        outputs = self.base.forward(**kwargs)
        back = self.order.argsort(-1)
        if isinstance(outputs, tuple):
            at = 0 if kwargs.get("labels") is None else 1
            return (*outputs[:at], self._restored(outputs[at], back), *outputs[at + 1 :])
        outputs.logits = self._restored(outputs.logits, back)
        return outputs

    def _restored(self, logits: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        # Logits of the last tokens only are in order as they are.
        return padding.reorder(logits, back)[:, self.extra :] if logits.shape[:2] == back.shape else logits


def prefix_is_read(base: Any, kwargs: dict[str, Any], prompt: SoftPrompt) -> tuple[Any, dict[str, Any]]:
    """Let every layer see the prefix: with ``use_cache=False`` some models skip it, with gradient checkpointing all
    do (peft#869)."""
    fed, cached = _fed(kwargs), caches.length(kwargs["past_key_values"])
    if kwargs.get("attention_mask") is None:
        # Without a mask gemma2 and gemma3 (4.44-4.53) take the new tokens for the whole text.
        kwargs["attention_mask"] = fed.new_ones((fed.shape[0], fed.shape[1] + cached), dtype=torch.long)
    if kwargs.get("cache_position") is None and "cache_position" in inspect.signature(base.forward).parameters:
        # gemma2 (4.42-4.44) begins to count at 0 whatever the cache holds.
        kwargs["cache_position"] = torch.arange(cached, cached + fed.shape[1], device=fed.device)
    pads = _pads_in_front(base, kwargs["attention_mask"], prompt.length) if cached == prompt.length else None
    if pads is not None:
        order = padding.pads_first(pads, prompt.length, prompt.length + fed.shape[1])
        _feed_from_the_start(kwargs, pads, order, prompt, base)
    kwargs["past_key_values"] = caches.told_its_size(kwargs["past_key_values"], kwargs["attention_mask"].shape[1], base)
    kwargs["use_cache"] = True  # how the prefix comes in; what is added to the cache goes with the outputs
    if base.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        base = _checkpointed(base, _decoder_layers(base))
    return (base if pads is None else _InOrder(base, order, prompt.length)), kwargs


def _pads_in_front(base: Any, mask: torch.Tensor, virtual_tokens: int) -> torch.Tensor | None:
    """How much padding must stand before each row's prefix for a sliding window to count right: ``[batch]``, or None
    where the prefix may stand in the cache."""
    length = mask.shape[1]
    if mask.dim() != 2 or not caches.counts_places(base) or length <= (caches.window(base) or 0):
        return None
    pads = padding.left_pads(mask[:, virtual_tokens:])
    return mask.new_zeros(len(mask)) if pads is None and caches.wants_one_span(base, length) else pads


def _feed_from_the_start(
    kwargs: dict[str, Any], pads: torch.Tensor, order: torch.Tensor, prompt: SoftPrompt, base: Any
) -> None:
    """Turn the arguments of a forward of a text behind its prefix into those of one forward of both."""
    batch, length = order.shape
    positions = torch.arange(length, device=order.device).expand(batch, length)
    for name, filler in (("input_ids", 0), ("inputs_embeds", 0), ("labels", -100)):
        text = kwargs.get(name)
        if text is not None:
            front = text.new_full((batch, prompt.length, *text.shape[2:]), filler)
            kwargs[name] = padding.reorder(torch.cat((front, text), dim=1), order)
    if kwargs.get("labels") is not None:
        # In a row alone nothing stands before the first token that could be asked for it.
        kwargs["labels"].scatter_(1, (pads + prompt.length).unsqueeze(1), -100)
    if "position_ids" in inspect.signature(base.forward).parameters:
        given = kwargs.get("position_ids")
        if given is not None:
            positions = torch.cat((positions[:, : prompt.length], given.expand(batch, -1)), dim=1)
        kwargs["position_ids"] = padding.reorder(positions, order)
    if kwargs.get("cache_position") is not None:
        kwargs["cache_position"] = torch.arange(length, device=order.device)
    kwargs["attention_mask"] = padding.reorder(kwargs["attention_mask"], order)
    kwargs["past_key_values"] = caches.lay_in(None, prompt.key_values(batch), pads, base)


def _fed(kwargs: dict[str, Any]) -> torch.Tensor:
    """What the base model reads: ``[batch, tokens]`` or ``[batch, tokens, hidden]``."""
    fed: torch.Tensor = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    return fed


def _checkpointed(base: Any, layers: torch.nn.ModuleList) -> Any:
    """A view of the base model with the host's checkpointing off and ours around each decoder layer.

    The host keeps the cache from a checkpointed layer, since running the layer again would append to it again. With a
    replayable cache it may stay.
    """

    def edit(view: Any, module: torch.nn.Module) -> None:
        if getattr(module, "gradient_checkpointing", False):
            view.__dict__["gradient_checkpointing"] = False
        if module is layers:
            for layer in view:
                layer.__dict__["forward"] = partial(_run_twice, layer.forward)

    return views.tree(base, edit)


def _run_twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Here rather than once for the model: some releases give their layers a copy of the cache.
    args = tuple(caches.replayable(value) for value in args)
    kwargs = {name: caches.replayable(value) for name, value in kwargs.items()}
    # Not reentrant: the prefix reaches the layer through the cache, where a reentrant checkpoint sees no gradient.
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def _decoder_layers(base: Any) -> torch.nn.ModuleList:
    depth = getattr(caches.text_config(base), "num_hidden_layers", None)
    for module in base.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    return torch.nn.ModuleList()  # nothing to checkpoint: right gradients, at the price of memory
