"""KV caches of every transformers release: how long is one, how is it filled, what does a model want to be given.

This is the only room of soft_prompts that knows kinds of caches. "Empty" means length zero, never None, falsy or
len() == 0: an empty ``DynamicCache`` has been each of those in some release (peft#1969, peft#2106, transformers#33703).
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from ptfix import models
from ptfix.soft_prompts import padding, views

if TYPE_CHECKING:
    from ptfix.soft_prompts.adapter import KeyValues, SoftPrompt

_legacy_layouts: WeakKeyDictionary[torch.nn.Module, list[tuple[int, ...]] | None] = WeakKeyDictionary()

_measures_places: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()

#: What hosts call the KV cache, in arguments and in outputs; transformers 5.24 renamed it.
_NAMES = ("cache", "past_key_values")


@functools.cache
def keyword() -> str:
    """The name by which this host's generate() hands the KV cache on, and by which its outputs return it."""
    from transformers import GenerationMixin

    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next((name for name in _NAMES if name in parameters), "past_key_values")


def taken_from(arguments: dict[str, Any]) -> Any:
    """The KV cache among a call's arguments, taken out of them under whichever name it stands there."""
    found = [arguments.pop(name, None) for name in _NAMES]
    return next((value for value in found if value is not None), None)


def name_in(outputs: Any) -> str | None:
    """The key of a model's or generate()'s outputs that holds a KV cache; None where there is none."""
    return next((name for name in _NAMES if name in outputs and outputs[name] is not None), None)


def of(outputs: Any) -> Any:
    """The KV cache in a model's or generate()'s outputs, or in a call's arguments; or None."""
    name = name_in(outputs)
    return None if name is None else outputs[name]


def is_cache(past_key_values: Any) -> bool:
    """Is it a Cache object, rather than nothing or a legacy tuple?"""
    return hasattr(past_key_values, "get_seq_length") and hasattr(past_key_values, "update")


def length(past_key_values: Any) -> int:
    """Positions held, virtual tokens included. 0 for None."""
    if past_key_values is None:
        return 0
    if isinstance(past_key_values, OnLayers):
        return past_key_values.get_seq_length()
    if not is_cache(past_key_values):
        if not len(past_key_values):
            return 0
        first = past_key_values[0]
        # The value, not the key: bloom's legacy key has its positions last.
        value = first if isinstance(first, torch.Tensor) else first[1]
        return int(value.shape[-2])
    keys = getattr(past_key_values, "key_cache", None)
    if keys and _sliding_layers(past_key_values) is not None and isinstance(keys[0], torch.Tensor):
        # HybridCache answers None (4.42-4.44), or for layer 0, whose sliding window saturates. Count what is written
        # in the longest layer, as StaticCache does for itself.
        longest = max(keys, key=lambda key: key.shape[-2])
        return int(longest[0, 0].any(dim=-1).sum())
    return int(past_key_values.get_seq_length() or 0)


def keeps_states(past_key_values: Any) -> bool:
    """Are all layers recurrent, so that the cache keeps states and cannot say how many positions made them?"""
    linear = getattr(past_key_values, "is_linear", None)
    return isinstance(linear, list) and bool(linear) and all(linear)


def _sliding_layers(past_key_values: Any) -> Any:
    """Which layers of a HybridCache have a sliding window; the attribute had another name in 4.52 and 4.53."""
    return getattr(past_key_values, "is_sliding", getattr(past_key_values, "is_sliding_list", None))


class OnLayers:
    """The static cache of transformers 4.38 to 4.41: a piece hung on each attention module, and none handed around."""

    def __init__(self, base_model: Any) -> None:
        hung = (vars(module).get("past_key_value") for module in base_model.modules())
        self.pieces = [piece for piece in hung if piece is not None]

    def get_seq_length(self) -> int:
        return int(self.pieces[0].get_seq_length())


def crop(past_key_values: Any, positions: int) -> Any:
    """The cache with only its first `positions` positions; raises ValueError for a cache that cannot forget."""
    if past_key_values is None or keeps_states(past_key_values) or length(past_key_values) <= positions:
        return past_key_values
    if is_cache(past_key_values):
        if positions == 0 and not hasattr(past_key_values, "crop"):
            past_key_values.reset()
        elif hasattr(past_key_values, "crop"):
            # How many to remove: since transformers 5.20 a positive number, the length to keep, raises.
            past_key_values.crop(positions - length(past_key_values))
        else:
            raise ValueError(
                f"a {type(past_key_values).__name__} cannot be cropped; pass a DynamicCache or a shorter cache."
            )
        return past_key_values
    if positions == 0:
        return None
    raise ValueError("a legacy tuple of past_key_values cannot be shortened to the text; generate again without it.")


def prefix_of(prompt: SoftPrompt, batch_size: int) -> KeyValues:
    """The prefix as training gives it to each layer.

    Layers may differ in their heads, or take no prefix (Gemma 4). What peft's own get_prompt() makes of each says so,
    where hosts have caches made of layers.
    """
    from transformers import DynamicCache

    stored = prompt.key_values(batch_size)
    if not hasattr(DynamicCache(), "layers"):
        return stored
    layers = prompt.peft_model.get_prompt(batch_size=batch_size).layers
    shaped: KeyValues = []
    for layer, pair in zip(layers, stored, strict=False):
        held = getattr(layer, "keys", None)
        if pair is None or held is None or not held.numel():
            shaped.append(None)
        else:
            heads, dim = held.shape[1], held.shape[-1]
            shaped.append((pair[0][:, :heads, :, :dim], pair[1][:, :heads, :, :dim]))
    return shaped


def _first(prefix: KeyValues) -> tuple[torch.Tensor, torch.Tensor]:
    return next(pair for pair in prefix if pair is not None)


def fill(past_key_values: Any, prefix: KeyValues, base_model: Any) -> Any:
    """Put a prefix into an empty cache and return what the base model's forward wants.

    An object given by generate() or the user is filled in place; None becomes the kind of cache this model reads.
    """
    if not is_cache(past_key_values):
        layout = legacy_layout(base_model)
        if layout is not None:
            return _legacy(prefix, layout)
        if not _caches_can_be_cropped():
            return tuple(prefix)
        past_key_values = new(base_model)
    first, _ = _first(prefix)
    positions = torch.arange(first.shape[-2], device=first.device)
    is_sliding = _sliding_layers(past_key_values)
    layers = getattr(past_key_values, "layers", None) or []
    for index, pair in enumerate(prefix):
        if pair is None or (index < len(layers) and not hasattr(layers[index], "get_mask_sizes")):
            continue  # a recurrent layer keeps a state, not positions: there is no prefix to give it
        key, value = pair
        sliding = is_sliding is not None and index < len(is_sliding) and bool(is_sliding[index])
        options = {
            "cache_position": positions,
            "sliding_window": window(base_model) if sliding else None,
        }
        past_key_values.update(key, value, index, options)
    return past_key_values


def rolled(past_key_values: Any, shifts: torch.Tensor) -> Any:
    """The cache with each row's positions rolled by its own ``shifts [batch]`` to the right.

    None where that cannot be: a sliding window has let go of positions, or a layer keeps a state in place of positions.
    """
    if not is_cache(past_key_values) or keeps_states(past_key_values):
        return None  # legacy tuples keep their positions in a different place in each architecture
    held = length(past_key_values)
    if any(each is None or each.shape[-2] != held for pair in pairs(past_key_values) for each in pair):
        return None
    return changed(past_key_values, lambda states, layer: padding.roll(states, shifts, -2))


def pairs(past_key_values: Any) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Each layer's keys and values; None for a layer that has none, or none yet."""
    layers = getattr(past_key_values, "layers", None)
    if not is_cache(past_key_values):
        found = [(layer[0], layer[1]) for layer in past_key_values]
    elif layers is not None:
        found = [(vars(layer).get("keys"), vars(layer).get("values")) for layer in layers]
    else:
        found = list(zip(past_key_values.key_cache, past_key_values.value_cache, strict=True))
    return [tuple(each if isinstance(each, torch.Tensor) else None for each in pair) for pair in found]  # type: ignore[misc]


def changed(past_key_values: Any, change: Callable[[torch.Tensor, int], torch.Tensor]) -> Any:
    """A copy of a cache with ``change(keys or values, layer)`` in place of each layer's."""
    new_pairs = [
        tuple(None if each is None else change(each, index) for each in pair)
        for index, pair in enumerate(pairs(past_key_values))
    ]
    if not is_cache(past_key_values):
        return tuple(new_pairs)
    copied = copy.copy(past_key_values)
    layers = getattr(past_key_values, "layers", None)
    if layers is None:
        copied.key_cache = [key for key, _ in new_pairs]
        copied.value_cache = [value for _, value in new_pairs]
        return copied
    copied.layers = [copy.copy(layer) for layer in layers]
    for layer, (key, value) in zip(copied.layers, new_pairs, strict=True):
        if key is not None:
            layer.keys, layer.values = key, value
    return copied


def _caches_can_be_cropped() -> bool:
    """Since 4.42. Before, models read both kinds, but rolling a draft back leaves a Cache miscounted: its host gives
    tuples."""
    from transformers import DynamicCache

    return hasattr(DynamicCache, "crop")


def window(base_model: Any) -> int | None:
    """How many places some layer looks back, or None where all look back to the start."""
    return getattr(models.text_config(base_model.config), "sliding_window", None)


def names_window_layers(base_model: Any) -> bool:
    """Does its config say of each layer whether it has a sliding window (gemma2, gemma3), so that its cache has layers
    of two kinds?"""
    config = models.text_config(base_model.config)
    kinds = getattr(config, "layer_types", None) or ()
    return any("sliding" in kind for kind in kinds) or getattr(config, "cache_implementation", None) == "hybrid"


def can_put_when_fed(base_model: Any) -> bool:
    """Does this model read Cache objects, so that a prefix can stand behind a row's padding?"""
    return _caches_can_be_cropped() and legacy_layout(base_model) is None


def measures_places(base_model: Any) -> bool:
    """Do masked tokens between two parts of a text move them apart for this model (mpt's distances, gpt_neo's local
    windows), whatever their positions say?"""
    if base_model not in _measures_places:
        gap = getattr(models.text_config(base_model.config), "window_size", None) or 4
        device = base_model.get_input_embeddings().weight.device
        text = torch.arange(1, 7, device=device)[None]
        apart = torch.cat((text[:, :3], text.new_zeros(1, gap), text[:, 3:]), dim=1)
        logits = [_masked_logits(base_model, ids) for ids in (text, apart)]
        _measures_places[base_model] = not torch.allclose(*logits, rtol=1e-2, atol=1e-2)
    return _measures_places[base_model]


def _masked_logits(base_model: Any, ids: torch.Tensor) -> torch.Tensor:
    mask = (ids != 0).long()
    options = {"attention_mask": mask}
    if "position_ids" in inspect.signature(base_model.forward).parameters:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    view = views.tree(base_model, lambda twin, module: twin.__dict__.update(training=False))
    with torch.no_grad():
        logits: torch.Tensor = view(input_ids=ids, **options).logits[0, -1].float()
    return logits


def wants_one_span(base_model: Any, tokens: int) -> bool:
    """Must `tokens` be fed from the first one on?

    Before transformers.masking_utils (4.53) a layer with a sliding window takes the first token fed for the first of
    the text, and (from 4.48 on) cuts its mask, but not its keys, to the window.
    """
    return (
        window(base_model) is not None
        and can_put_when_fed(base_model)
        and tokens > (window(base_model) or 0)
        and importlib.util.find_spec("transformers.masking_utils") is None
    )


@functools.cache
def padded_rows_need_one_span() -> bool:
    """Must left-padded rows be fed from the first token on, unless by one token at a time?

    In transformers 4.36 to 4.38 the mask for SDPA is mended row by row after a mask that it takes for that of the
    tokens fed, though it also covers what the cache holds.
    """
    try:
        from transformers.modeling_attn_mask_utils import AttentionMaskConverter
    except ImportError:
        return False
    unmask = getattr(AttentionMaskConverter, "_unmask_unattended", None)
    return unmask is not None and "attention_mask" in inspect.signature(unmask).parameters


def put_when_fed(past_key_values: Any, prefix: KeyValues, first: torch.Tensor, base_model: Any) -> Any:
    """An empty cache that takes `prefix` for what is fed at the positions from ``first [rows]`` on.

    So a prefix can stand behind padding, and be fed in one span or in chunks with the text: sliding windows count
    places. What is fed at the positions of the prefix is not read. A cache given is changed in place, until the last
    of these positions has been fed.
    """
    if not is_cache(past_key_values):
        past_key_values = new(base_model)
    stop = int(first.max()) + _first(prefix)[0].shape[-2]
    vars(past_key_values)["_ptfix_waiting"] = {
        layer: (*pair, first, 0, stop) for layer, pair in enumerate(prefix) if pair is not None
    }
    past_key_values.__class__ = _putting_class(type(past_key_values))  # type: ignore[arg-type]
    return past_key_values


@functools.cache
def _putting_class(kind: type[Any]) -> type[Any]:
    def update(self: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        waiting = vars(self)["_ptfix_waiting"]
        if layer_idx in waiting:
            prefix_key, prefix_value, first, start, stop = waiting.pop(layer_idx)
            fed_to = start + key.shape[2]
            source = torch.arange(start, fed_to, device=key.device) - first.to(key.device).unsqueeze(1)
            key, value = _over(key, prefix_key, source), _over(value, prefix_value, source)
            if fed_to < stop:
                waiting[layer_idx] = (prefix_key, prefix_value, first, fed_to, stop)
        if not waiting:
            del vars(self)["_ptfix_waiting"]
            self.__class__ = kind
        return kind.update(self, key, value, layer_idx, *args, **kwargs)

    return type(kind.__name__, (kind,), {"update": update, "__module__": kind.__module__})


def _over(fed: torch.Tensor, laid: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """`fed [rows, heads, tokens, dim]`, with `laid` in place of it where ``source [rows, tokens]`` is one of its
    positions."""
    inside = ((source >= 0) & (source < laid.shape[2]))[:, None, :, None]
    source = source.clamp(0, laid.shape[2] - 1)[:, None, :, None]
    heads, tokens, dim = laid.shape[1], fed.shape[2], laid.shape[3]
    return torch.where(inside, laid.to(fed).gather(2, source.expand(-1, heads, tokens, dim)), fed)


def new(base_model: Any) -> Any:
    """An empty cache that grows, laid out for this model where the release knows layouts (4.56)."""
    from transformers import DynamicCache

    if "config" in inspect.signature(DynamicCache.__init__).parameters:
        return DynamicCache(config=models.text_config(base_model.config))
    return DynamicCache()


def legacy_layout(base_model: Any) -> list[tuple[int, ...]] | None:
    """The shapes in which an old architecture keeps a layer's ``past_key_values``, or None for one that reads Cache
    objects.

    Up to 4.53 the class says whether it does; what its tuples look like, one dummy forward shows.
    """
    if getattr(base_model, "_supports_cache_class", True):
        return None
    if base_model not in _legacy_layouts:
        _legacy_layouts[base_model] = _probe_legacy_layout(base_model)
    return _legacy_layouts[base_model]


def with_known_length(past_key_values: Any, positions: int, base_model: Any) -> Any:
    """gemma2 on 4.42 reads Cache objects without saying so, and asks any for its full length, which a growing one
    does not have."""
    unsaid = is_cache(past_key_values) and not getattr(base_model, "_supports_cache_class", True)
    if unsaid and past_key_values.get_max_length() is None:
        past_key_values.get_max_length = lambda: positions
    return past_key_values


def replayable(value: Any) -> Any:
    """A Cache whose update() answers as ever but stores nothing, so that a checkpointed layer can be run twice.

    Anything else, a legacy tuple too, never changes and is returned as it is.
    """
    if not is_cache(value):
        return value
    view = copy.copy(value)
    view.__class__ = _replayable_class(type(value))
    return view


def _replayable_class(kind: type) -> type:
    def update(self: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        fresh = copy.copy(self)
        fresh.__class__ = kind
        for name in ("layers", "key_cache", "value_cache", "_ptfix_waiting"):
            if isinstance(vars(self).get(name), list | dict):
                held = copy.copy(vars(self)[name])
                if name == "layers":
                    held[layer_idx] = copy.copy(held[layer_idx])
                fresh.__dict__[name] = held
        return fresh.update(key, value, layer_idx, *args, **kwargs)

    return type(f"Replayable{kind.__name__}", (kind,), {"update": update})


def _legacy(prefix: KeyValues, layout: list[tuple[int, ...]]) -> Any:
    pairs = [pair for pair in prefix if pair is not None]
    batch, heads, tokens, dim = pairs[0][0].shape
    if len(layout) == 1 and len(layout[0]) == 5:  # ctrl: one tensor [2, batch, heads, tokens, head dim]
        return tuple(torch.stack(pair) for pair in pairs)
    if len(layout) == 1:  # one tensor [batch, tokens, 2 * head dim]: multi-query attention keeps key and value together
        return tuple(torch.cat((key[:, 0], value[:, 0]), dim=-1) for key, value in pairs)
    ranks = [len(shape) for shape in layout]
    if ranks == [4, 4]:
        return tuple(pairs)
    if ranks == [3, 3] and layout[0][-1] == _PROBE_TOKENS:  # bloom: keys [batch * heads, dim, tokens]
        return tuple(
            (key.transpose(2, 3).reshape(batch * heads, dim, tokens), value.reshape(batch * heads, tokens, dim))
            for key, value in pairs
        )
    if ranks == [3, 3]:  # falcon: [batch * heads, tokens, dim]
        return tuple(
            (key.reshape(batch * heads, tokens, dim), value.reshape(batch * heads, tokens, dim)) for key, value in pairs
        )
    raise NotImplementedError(f"past_key_values in an unknown layout {layout}: prefix tuning cannot fill them.")


_PROBE_TOKENS = 3


def _probe_legacy_layout(base_model: Any) -> list[tuple[int, ...]] | None:
    device = base_model.get_input_embeddings().weight.device
    # In a view, since a training model with checkpointing returns no cache.
    view = views.tree(base_model, lambda twin, module: twin.__dict__.update(training=False))
    with torch.no_grad():
        output = view(input_ids=torch.zeros(1, _PROBE_TOKENS, dtype=torch.long, device=device), use_cache=True)
    held = of(output)
    if held is None or is_cache(held):
        return None
    first = held[0]
    return [tuple(first.shape)] if isinstance(first, torch.Tensor) else [tuple(part.shape) for part in first]
