"""forward() with a KV cache: loops and serving code of the users' own.

peft's forward puts the soft prompt in front of every call's tokens. Here a cache that holds it is continued, an empty
one is filled from the start, by the same conversion of coordinates as in generate(); what cannot be decided is
refused. The user counts real tokens, in masks and in positions, as with the base model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ptfix.soft_prompts import caches, generation, marks, padding, training
from ptfix.soft_prompts.adapter import SoftPrompt

#: Arguments of forward() that the step itself decides.
_COUNTED = ("position_ids", "cache_position", "use_cache")


def forward(original: Callable[..., Any], peft_model: Any, given: dict[str, Any]) -> Any:
    """What ``original(peft_model, **given)`` should return.

    Args:
        given: forward()'s arguments by name.

    Raises:
        ValueError: whether the cache holds the soft prompt, or where a row's text stands in it, is not known.
    """
    name = caches.name_in(given)
    held = None if name is None else given[name]
    if given.get("cache_params") is not None:
        raise ValueError(
            "a soft prompt cannot continue cache_params: how many tokens a recurrent state has read cannot be known; "
            "use generate(), or pass the whole text without a cache."
        )
    if held is None:
        outputs = _without_cache(original, peft_model, given)
    else:
        outputs = _with_cache(original, peft_model, given, held)
    note(peft_model, outputs, held)
    return outputs


def note(peft_model: Any, outputs: Any, held: Any = None) -> None:
    """Remember that the caches of a call, the one given and the one returned, hold the active soft prompt."""
    returned = next((each for each in outputs if caches.is_cache(each)), None) if isinstance(outputs, tuple) else None
    if returned is None and not isinstance(outputs, torch.Tensor | tuple):
        returned = caches.of(outputs)
    for cache in (held, returned):
        # Up to 5.0 mamba2 keeps its states in an object of its own, which no forward() of a loop can be given.
        if not caches.is_cache(cache) and not isinstance(cache, tuple | list):
            continue
        if caches.keeps_states(cache) or caches.length(cache):
            known = marks.of(cache)
            read = None if known is None else known.read
            marks.put(cache, marks.Mark(peft_model.active_adapter, SoftPrompt(peft_model).length, read))


def _without_cache(original: Callable[..., Any], peft_model: Any, given: dict[str, Any]) -> Any:
    text, mask = _text(given), given.get("attention_mask")
    if text is None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return original(peft_model, **given)
    if mask.shape[1] > text.shape[1]:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens and {text.shape[1]} are given without a cache: pass the "
            f"cache that the call before returned ({caches.keyword()}=...), or the whole text."
        )
    starts_a_loop = given.get("use_cache") is True and given.get("labels") is None
    if starts_a_loop and padding.left_pads(mask) is not None:
        # Filled in the order in which it is continued, also where a sliding window lets go of what came first.
        return _step(peft_model, given, None, 0)
    return original(peft_model, **given)


def _with_cache(original: Callable[..., Any], peft_model: Any, given: dict[str, Any], held: Any) -> Any:
    prompt, cached = SoftPrompt(peft_model), _positions_in(held)
    if not cached and not prompt.is_prefix and training.is_left_padded(given) is None:
        return original(peft_model, **given)
    if cached:
        _check_that_it_holds(prompt, given, held, cached)
    return _step(peft_model, given, held, cached)


def _positions_in(held: Any) -> int:
    if not caches.keeps_states(held):
        return caches.length(held)
    mark = marks.of(held)
    if mark is not None and mark.read is not None:
        return mark.read
    if held.has_previous_state():
        raise ValueError("how many tokens a recurrent state has read cannot be known: pass the whole text without it.")
    return 0


def _check_that_it_holds(prompt: SoftPrompt, given: dict[str, Any], held: Any, cached: int) -> None:
    """Raise ValueError unless these `cached` positions are the active soft prompt and the text that the mask covers."""
    new, mask = _new_tokens(given), given.get("attention_mask")
    mark = marks.of(held)
    active, virtual = prompt.peft_model.active_adapter, prompt.length
    if mark is not None and (mark.adapter, mark.virtual_tokens) != (active, virtual):
        raise ValueError(
            f"this cache was filled with the soft prompt of adapter {mark.adapter!r}, and {active!r} is active: start "
            "with an empty cache."
        )
    if mask is None and mark is None:
        raise ValueError(
            f"whether this cache of {cached} positions holds the soft prompt is not known: pass attention_mask, "
            "which covers the text in the cache and the new tokens, or start with an empty cache."
        )
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] != cached - virtual + new:
        if mark is None and mask.shape[1] == cached + new:
            raise ValueError(
                f"this cache of {cached} positions was filled without the soft prompt of {virtual} virtual tokens: "
                "start with an empty cache."
            )
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens; the cache holds {cached} positions, {virtual} of them "
            f"virtual tokens, and {new} tokens are new: a mask of {max(0, cached - virtual) + new} real tokens is "
            "needed."
        )
    if cached < virtual:
        raise ValueError(
            f"this cache was cropped to {cached} positions, into the soft prompt of {virtual} virtual tokens: crop it "
            f"to {virtual} and more, or to 0."
        )


def _step(peft_model: Any, given: dict[str, Any], held: Any, cached: int) -> Any:
    """Feed the new tokens behind `cached` positions, or the soft prompt and the text into an empty cache."""
    prompt, base = SoftPrompt(peft_model), peft_model.base_model
    rest = {name: value for name, value in given.items() if name not in _COUNTED and value is not None}
    caches.taken_from(rest)
    ids, embeds = rest.pop("input_ids", None), rest.pop("inputs_embeds", None)
    mask, labels = rest.pop("attention_mask", None), rest.pop("labels", None)
    rest.pop("return_dict", None)
    task_ids = rest.pop("task_ids", None)
    rest.pop("token_type_ids", None)  # which the training forward does not read either
    keep = next((rest.pop(name) for name in ("logits_to_keep", "num_logits_to_keep") if name in rest), 0)
    if training.is_checkpointed(base):
        raise ValueError("gradient checkpointing drops the cache of a model in training mode: call eval() first.")
    if prompt.config.peft_type == "CPT":
        rest.pop("input_type_mask", None)  # it weighs labels only
        if labels is not None:
            raise ValueError("the loss of CPT is made of whole texts: pass labels without a cache.")
    inputs, turn = generation.one_step(peft_model, ids, embeds, mask, held, cached, task_ids)
    _check_positions(given.get("position_ids"), turn, mask, cached)
    stop = turn.read
    fed = _new_tokens(inputs)
    order = None if turn.pads is None else padding.pads_first(turn.pads, prompt.length, stop)
    if labels is not None:
        inputs["labels"] = _labels(labels, mask, prompt, order, stop)[:, stop - fed :]
    outputs = base(**{**inputs, **rest, "return_dict": True})
    back = None if order is None or fed != stop else order.argsort(-1)
    for name in ("logits", "hidden_states"):
        if outputs.get(name) is not None:
            outputs[name] = _in_order(outputs[name], back, _new_tokens(given) if prompt.is_prefix else fed)
    if not isinstance(keep, int) or keep:
        outputs["logits"] = outputs["logits"][:, -keep:] if isinstance(keep, int) else outputs["logits"][:, keep]
    for cache in (held, caches.of(outputs)):
        if caches.keeps_states(cache):
            marks.put(cache, marks.Mark(peft_model.active_adapter, prompt.length, stop))
    return outputs.to_tuple() if training.wants_tuple(peft_model, given) else outputs


def _in_order(value: Any, back: torch.Tensor | None, last: int) -> Any:
    """Outputs per token in the caller's order: the soft prompt, the padding, the text."""
    if isinstance(value, tuple):
        return tuple(_in_order(each, back, last) for each in value)
    return (value if back is None else padding.reorder(value, back))[:, -last:]


def _labels(
    labels: torch.Tensor, mask: torch.Tensor | None, prompt: SoftPrompt, order: torch.Tensor | None, stop: int
) -> torch.Tensor:
    """Labels ``[batch, stop]`` of all that the model has read, in its order; of what is not new, none."""
    if prompt.is_prefix and stop == prompt.length + labels.shape[1]:
        # Behind a cache nothing is asked for the text's first token.
        first = torch.zeros_like(labels) if mask is None else mask.long().cumsum(-1).to(labels.device)
        labels = (
            labels.masked_fill(first == 1, -100)
            if mask is not None
            else labels.index_fill(1, torch.zeros(1, dtype=torch.long, device=labels.device), -100)
        )
    whole = torch.cat((labels.new_full((len(labels), stop - labels.shape[1]), -100), labels), dim=1)
    return whole if order is None else padding.reorder(whole, order.to(whole.device))


def _check_positions(position_ids: Any, turn: Any, mask: torch.Tensor | None, cached: int) -> None:
    """Raise ValueError for positions that are not those of the row alone, counted in real tokens or in all.

    The training forward does not read position_ids, so no others have ever been trained.
    """
    if not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2:
        return
    new, virtual = position_ids.shape[1], turn.prompt.length
    if mask is None:
        length = turn.read - virtual
        real = torch.ones(1, length, dtype=torch.long, device=position_ids.device)
    else:
        real = mask.long().to(position_ids.device)
    away = (position_ids - (real.cumsum(-1) - 1)[:, -new:])[(real[:, -new:] != 0).expand(len(position_ids), -1)]
    if away.numel() and not bool((away == 0).all() | (away == virtual).all()):
        raise ValueError(
            "position_ids do not count the text token by token: the training forward of a soft prompt never read "
            "others; leave position_ids out, or pass attention_mask where rows are padded."
        )


def _text(given: dict[str, Any]) -> torch.Tensor | None:
    """``[batch, tokens]`` or ``[batch, tokens, hidden]``"""
    text = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
    return text if isinstance(text, torch.Tensor) else None


def _new_tokens(given: dict[str, Any]) -> int:
    text = _text(given)
    return 0 if text is None else int(text.shape[1])
