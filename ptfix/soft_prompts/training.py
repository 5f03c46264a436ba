"""The training forward of a soft prompt.

peft's own ``forward`` does the work. Here a row's padding is moved out of the way before it, and prefix tuning gets
what a release of the hosts does not give it: a KV cache that the base model reads, and gradient checkpointing.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ptfix import models
from ptfix.soft_prompts import caches, padding, views
from ptfix.soft_prompts.adapter import SoftPrompt

logger = logging.getLogger("ptfix")

#: Takes the base model and the keyword arguments peft calls it with, returns what is to be called instead.
Change = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]


def is_left_padded(given: dict[str, Any]) -> torch.Tensor | None:
    """How many pads stand left of each row ``[batch]``, or None where no row has any or the call is of another kind.

    `given` are forward()'s arguments by name. A mask that covers more than the text continues a KV cache, and 4D masks
    say themselves what is padding.
    """
    mask = given.get("attention_mask")
    text = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or text is None or mask.shape != text.shape[:2]:
        return None
    return padding.left_pads(mask)


def by_name(forward: Callable[..., Any]) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
    """What turns the arguments of a method ``forward(self, ...)`` into arguments by name."""
    names = tuple(inspect.signature(forward).parameters)[1:]
    return lambda args, kwargs: {**dict(zip(names, args, strict=False)), **kwargs}


def is_traced() -> bool:
    """Is torch.compile building a graph of this call?"""
    return bool(torch.compiler.is_compiling())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # runs while a graph is built, not in it
def say_that_graphs_keep_padding() -> None:
    """Warn, once in a process, that a compiled forward() trains padded rows as the host does."""
    _say_once(
        "torch.compile: a compiled forward() cannot move padding that stands left of a text, nor read the class of a "
        "right-padded text at its last token. Pad language models on the right (tokenizer.padding_side = 'right') and "
        "give classifiers rows of equal length, or padded rows are trained otherwise than alone."
    )


@cache
def _say_once(sentence: str) -> None:
    logger.warning(sentence)


def padding_on_the_right(
    forward: Callable[..., Any],
    peft_model: Any,
    given: dict[str, Any],
    pads: torch.Tensor,
    per_token: tuple[str, ...] = ("logits",),
    per_row: tuple[str, ...] = (),
) -> Any:
    """Call ``forward(peft_model, **given)`` with the padding of each row behind its text. A causal model cannot see it
    there, an encoder masks it; positions and distances are then those of the row alone (peft#1093). Outputs come back
    in the caller's order.

    Args:
        given: forward()'s arguments by name.
        pads: ``[batch]``, how many pads stand left of each row.
        per_token: which outputs have one row per token, beside hidden states and attentions.
        per_row: arguments that say something of a whole row, whatever their shape.
    """
    shape = given["attention_mask"].shape
    moved = {
        name: padding.roll(value, -pads)
        if isinstance(value, torch.Tensor) and name not in per_row and (value.shape == shape or name == "inputs_embeds")
        else value
        for name, value in given.items()
    }
    keep = next((moved.pop(name) for name in ("logits_to_keep", "num_logits_to_keep") if name in moved), 0)
    as_tuple = wants_tuple(peft_model, given)
    outputs = forward(peft_model, **{**moved, "return_dict": True})
    for name in (*per_token, "hidden_states", "attentions"):
        if outputs.get(name) is not None:
            outputs[name] = _moved_back(outputs[name], pads, shape[1])
    if not isinstance(keep, int) or keep:
        outputs["logits"] = outputs["logits"][:, -keep:] if isinstance(keep, int) else outputs["logits"][:, keep]
    held = caches.name_in(outputs)
    if held is not None:
        # In the order in which generate() fills a cache, so that both can be continued.
        outputs[held] = caches.rolled(outputs[held], pads)
    return outputs.to_tuple() if as_tuple else outputs


def wants_tuple(peft_model: Any, given: dict[str, Any]) -> bool:
    """Does the caller of forward() want its outputs as a tuple?"""
    if given.get("return_dict") is not None:
        return not given["return_dict"]
    return not getattr(peft_model.base_model.config, "return_dict", True)


def _moved_back(value: Any, pads: torch.Tensor, tokens: int) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved_back(each, pads, tokens) for each in value)
    if value.dim() < 4:
        return _text_rolled(value, pads, tokens, 1)
    return _text_rolled(_text_rolled(value, pads, tokens, 2), pads, tokens, 3)  # attention [batch, heads, to, from]


def _text_rolled(rows: torch.Tensor, pads: torch.Tensor, tokens: int, dim: int) -> torch.Tensor:
    """Roll the last `tokens` places along `dim`; the virtual tokens before them stay."""
    virtual = rows.shape[dim] - tokens
    front, text = rows.split((virtual, tokens), dim)
    text = padding.roll(text, pads, dim)
    return torch.cat((front, text), dim) if virtual else text


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

    forward.__signature__ = inspect.signature(real.forward)  # type: ignore[attr-defined]  # peft looks at it
    view = views.shallow(peft_model)
    view._modules["base_model"] = views.shallow(base, forward=forward, _ptfix_changes=changes, _ptfix_origin=real)
    return view


def origin(base: Any) -> Any:
    """The base model itself, of itself or of a view."""
    return base.__dict__.get("_ptfix_origin", base)


def prefix_is_read(base: Any, kwargs: dict[str, Any], prompt: SoftPrompt) -> tuple[Any, dict[str, Any]]:
    """Let the base model read the prefix in every layer, where a release of transformers does not."""
    fed, prefix = _fed(kwargs), caches.taken_from(kwargs)
    cached = caches.length(prefix)
    if kwargs.get("attention_mask") is None:
        # Without a mask gemma2 and gemma3 (4.44-4.53) take the new tokens for the whole text.
        kwargs["attention_mask"] = fed.new_ones((fed.shape[0], fed.shape[1] + cached), dtype=torch.long)
    if kwargs.get("cache_position") is None and "cache_position" in inspect.signature(base.forward).parameters:
        # gemma2 (4.42-4.44) begins to count at 0 whatever the cache holds.
        kwargs["cache_position"] = torch.arange(cached, cached + fed.shape[1], device=fed.device)
    extra = 0
    if cached == prompt.length and caches.wants_one_span(base, kwargs["attention_mask"].shape[1]):
        extra = prompt.length
        prefix = _feed_from_the_start(kwargs, prompt, base)
    # peft calls it past_key_values, also where a host no longer does.
    kwargs[caches.keyword()] = caches.with_known_length(prefix, kwargs["attention_mask"].shape[1], base)
    kwargs["use_cache"] = True  # some models skip the cache otherwise; what is added to it goes with the outputs
    return (_WithoutFirst(base, extra) if extra else base), kwargs


class _WithoutFirst:
    """A base model whose logits of the first `extra` positions are cut off."""

    def __init__(self, base: Any, extra: int) -> None:
        self.base, self.extra = base, extra

    def forward(self, **kwargs: Any) -> Any:
        length = _fed(kwargs).shape[1]
        outputs = self.base.forward(**kwargs)
        if isinstance(outputs, tuple):
            at = 0 if kwargs.get("labels") is None else 1
            return (*outputs[:at], self._cut(outputs[at], length), *outputs[at + 1 :])
        outputs.logits = self._cut(outputs.logits, length)
        return outputs

    def _cut(self, logits: torch.Tensor, length: int) -> torch.Tensor:
        return logits[:, self.extra :] if logits.shape[1] == length else logits


def _feed_from_the_start(kwargs: dict[str, Any], prompt: SoftPrompt, base: Any) -> Any:
    """Turn the arguments of a forward of a text behind its prefix into those of one forward of both, and return the
    KV cache for it."""
    fed = _fed(kwargs)
    batch, length = fed.shape[0], prompt.length + fed.shape[1]
    for name, filler in (("input_ids", 0), ("inputs_embeds", 0), ("labels", -100)):
        text = kwargs.get(name)
        if text is not None:
            front = text.new_full((batch, prompt.length, *text.shape[2:]), filler)
            kwargs[name] = torch.cat((front, text), dim=1)
    if kwargs.get("labels") is not None:
        kwargs["labels"][:, prompt.length] = -100  # behind a cache nothing is asked for the text's first token
    if "position_ids" in inspect.signature(base.forward).parameters:
        kwargs["position_ids"] = torch.arange(length, device=fed.device).expand(batch, length)
    if kwargs.get("cache_position") is not None:
        kwargs["cache_position"] = torch.arange(length, device=fed.device)
    first = torch.zeros(batch, dtype=torch.long, device=fed.device)
    return caches.put_when_fed(None, prompt.key_values(batch), first, base)


def _fed(kwargs: dict[str, Any]) -> torch.Tensor:
    """What the base model reads: ``[batch, tokens]`` or ``[batch, tokens, hidden]``."""
    fed: torch.Tensor = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
    return fed


def is_checkpointed(base: Any) -> bool:
    """Does this model run its layers a second time for the gradient?"""
    return bool(base.training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules()))


def checkpointed(base: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A view of the base model with the host's checkpointing off and ours around each decoder layer (peft#869).

    The host keeps the cache from a checkpointed layer, since running the layer again would append to it again. With a
    replayable cache it may stay.
    """
    layers = _decoder_layers(base)
    chosen = (vars(module).get("_gradient_checkpointing_func") for module in base.modules())
    # The host's call of checkpoint, with the options that the user chose.
    run_twice = next((each for each in chosen if isinstance(each, partial)), checkpoint)

    def edit(view: Any, module: torch.nn.Module) -> None:
        if getattr(module, "gradient_checkpointing", False):
            view.__dict__["gradient_checkpointing"] = False
        if module is layers:
            for layer in view:
                layer.__dict__["forward"] = partial(_with_replayable_caches, run_twice, layer.forward)

    return views.tree(base, edit), {**kwargs, "use_cache": True}


def _with_replayable_caches(
    run_twice: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    # Here rather than once for the model: some releases give their layers a copy of the cache.
    args = tuple(caches.replayable(value) for value in args)
    kwargs = {name: caches.replayable(value) for name, value in kwargs.items()}
    # Not reentrant: the prefix reaches the layer through the cache, where a reentrant checkpoint sees no gradient.
    return run_twice(forward, *args, use_reentrant=False, **kwargs)


def _decoder_layers(base: Any) -> torch.nn.ModuleList:
    depth = getattr(models.text_config(base.config), "num_hidden_layers", None)
    for module in base.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == depth:
            return module
    return torch.nn.ModuleList()  # nothing to checkpoint: right gradients, at the price of memory
