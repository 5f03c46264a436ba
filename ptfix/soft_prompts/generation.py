"""Generate with a soft prompt exactly as it was trained: one conversion of coordinates.

``generate()`` counts real tokens. The model counts virtual + real tokens. Every upstream fault in this field is a place
where one number stood for the other. Here the base model is seen through a shallow view that shares all weights; its
``prepare_inputs_for_generation`` takes real coordinates from generate(), hands virtual ones to the base model's own
method (which knows the architecture's masks, positions and cache), and lays the soft prompt where placeholder tokens
stood. How much is left to feed follows from the length of the cache alone, so prefill, decoding, a rolled-back draft
and a second turn are one case. Nothing shared is ever changed: threads and interrupts need no clean-up.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ptfix.soft_prompts import caches, padding, views
from ptfix.soft_prompts.adapter import SoftPrompt, host_model

logger = logging.getLogger("ptfix")


def generate(peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``peft_model.generate(*args, **kwargs)`` should return; same arguments, errors and return values as the
    host's.

    With ``guidance_scale`` (classifier-free guidance) the conditional branch has the soft prompt. The unconditional
    one, ``negative_prompt_ids`` or else the last token, is the base model alone, as in peft.
    """
    mask = kwargs.get("attention_mask")
    held = caches.taken_from(kwargs)
    if held is not None:
        kwargs[caches.keyword()] = held
    turn = _Turn(
        prompt=SoftPrompt(peft_model),
        base=host_model(peft_model),
        task_ids=kwargs.pop("task_ids", None),
        mask_length=None if mask is None else mask.shape[-1],
        user_positions=kwargs.get("position_ids") is not None,
    )
    return _view(peft_model, turn).generate(*args, **kwargs)


def one_step(
    peft_model: Any,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    cached: int,
    task_ids: torch.Tensor | None,
) -> tuple[dict[str, Any], _Turn]:
    """What the base model's forward is given for one call of a user's own loop, as generate() would give it.

    Args:
        input_ids: the tokens that are not in the cache, or `inputs_embeds` in place of them.
        attention_mask: ``[batch, real tokens]``, those in the cache too.
        past_key_values: the soft prompt and the text before; empty or None to begin with.
        cached: its positions.

    Returns:
        The arguments, and the turn that made them: `read` is the length of all that the model has then read.

    Raises:
        ValueError: this release of the host cannot continue that cache.
    """
    from transformers import GenerationMixin

    text = input_ids if inputs_embeds is None else inputs_embeds
    if text is None:
        raise ValueError("forward() needs input_ids or inputs_embeds.")
    prompt, (rows, new) = SoftPrompt(peft_model), text.shape[:2]
    turn = _Turn(prompt, host_model(peft_model), task_ids, None, user_positions=False)
    turn.begin(new, cached, False, attention_mask)
    hidden = turn.hidden = max(0, cached - prompt.length)
    turn.read = cached
    first_seen = prompt.length + turn.most_pads
    if cached and cached < first_seen:
        raise ValueError(f"a row's soft prompt ends at position {first_seen}, the cache was cropped to {cached}.")
    if not cached and attention_mask is not None and turn.most_pads == attention_mask.shape[1]:
        raise ValueError("a row is all padding: pass enough of the text that each row has a token of its own.")
    if cached and new > 1 and turn.pads is not None and caches.padded_rows_need_one_span():
        raise ValueError(
            "this transformers release reads left-padded rows behind a cache by one token at a time only: pass one "
            "token, or use transformers 4.39 or later."
        )
    options: dict[str, Any] = {"use_cache": True}
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    if hasattr(GenerationMixin, "_get_initial_cache_position"):  # 4.39 to 5.3
        options["cache_position"] = text.new_zeros(1, dtype=torch.long)
    if hasattr(GenerationMixin, "_prepare_position_ids_for_generation"):  # from 5.2 on
        options["position_ids"] = text.new_zeros(1, hidden + new, dtype=torch.long)
    if "next_sequence_length" in known:
        options["next_sequence_length"] = new
    if "is_first_iteration" in known:
        options["is_first_iteration"] = not cached
    # Behind a cache ids of embeddings are not read; before it they are those of no token.
    ids = text.new_zeros(rows, new if cached else 0, dtype=torch.long) if input_ids is None else input_ids
    inputs = _view(peft_model, turn).prepare_inputs_for_generation(
        ids, past_key_values, attention_mask, None if cached else inputs_embeds, **options
    )
    if cached and inputs_embeds is not None:
        inputs.pop("input_ids", None)
        inputs["inputs_embeds"] = inputs_embeds
    return {name: value for name, value in inputs.items() if value is not None}, turn


def _view(peft_model: Any, turn: _Turn) -> Any:
    """A private view of the base model for one generate() call: its own attributes, the same weights."""
    twin = view_of(turn.base, _SoftPromptView, peft_model.generation_config, turn)
    body = twin._modules.get("model")
    if hasattr(body, "rope_deltas"):
        # Left on the base, an image's offset would move the positions of the next training step.
        twin._modules["model"] = views.shallow(body, rope_deltas=None)
    return twin


def view_of(base: Any, mixin: type[View], generation_config: Any, turn: Any) -> Any:
    """A view of `base` with `mixin` in front of its class, that keeps what one call knows in ``_ptfix_turn``."""
    twin = views.shallow(base, generation_config=generation_config, _ptfix_turn=turn)
    twin.__class__ = _view_class(mixin, type(twin))  # type: ignore[arg-type]
    # Attributes of the base that stand for one call of its own: peft hangs bound methods on it (and, interrupted,
    # leaves them there), the host keeps its last static cache.
    for name in (
        "prepare_inputs_for_generation",
        "_prepare_encoder_decoder_kwargs_for_generation",
        "_cache",
        "_static_cache",
    ):
        twin.__dict__.pop(name, None)
        twin._modules.pop(name, None)
    return twin


def _has_image_positions(base: Any) -> bool:
    """Does generate() of this model count positions along several axes (M-RoPE: time, height, width)?"""
    return hasattr(base, "rope_deltas") or hasattr(getattr(base, "model", None), "rope_deltas")


@cache
def _view_class(mixin: type[View], base_class: type[Any]) -> type[Any]:
    # The host looks at names (is it mamba? is it remote code?), so the view keeps its base's.
    return type(
        base_class.__name__,
        (mixin, base_class),
        {"__module__": base_class.__module__, "__doc__": base_class.__doc__},
    )


@dataclass
class _Turn:
    """What one generate() call knows beyond what generate() hands on."""

    prompt: SoftPrompt
    base: Any
    task_ids: torch.Tensor | None  #: ``[batch]``, for multitask prompt tuning
    mask_length: int | None  #: of the user's mask, which 5.18 drops where it is all ones
    user_positions: bool  #: position_ids are the user's, not generate()'s own count
    chunk: int | None = None  #: prefill at most so many tokens at once
    read: int = 0  #: virtual and real tokens that the model has been fed by this call
    hidden: int | None = None  #: real tokens that are not in the ids; None before the first step
    pads: torch.Tensor | None = None  #: ``[batch]``, padding on the left of each row
    most_pads: int = 0  #: of any row; kept, because to ask a device each step is slow
    on_layers: caches.OnLayers | None = None
    warned: bool = False

    def begin(self, given: int, cached: int, embedded: bool, mask: torch.Tensor | None) -> None:
        """At the first step: how is the text padded, and which real tokens stand only in the cache, or (negative) in
        the ids without having been read.

        A second turn may pass the whole text or only what is new; the mask tells, else the lengths do. Up to 4.38
        generate() starts the ids of ``inputs_embeds`` with a bos token that the model never sees.
        """
        self.hidden = 0
        behind = cached - self.prompt.length
        mask_length = self.mask_length if mask is None else mask.shape[1]
        if mask_length is not None and (behind > 0 or (embedded and mask_length < given)):
            self.hidden = mask_length - given
        elif behind >= given:
            self.hidden = behind
        if mask is None:
            return
        if self.prompt.is_prefix and not caches.can_put_when_fed(self.base):
            # Tuples of tensors hold a prefix in front of the padding only.
            if padding.left_pads(mask) is not None and caches.measures_places(self.base):
                raise ValueError(
                    f"a {type(self.base).__name__} of this transformers release reads a prefix at other distances in a "
                    "left-padded row than alone: generate rows of equal length, or use transformers 4.42 or later."
                )
            return
        self.pads = padding.left_pads(mask)
        self.most_pads = 0 if self.pads is None else int(self.pads.max())


class View:
    """Mixed in front of the base model's class: what one generate() call changes, whatever the architecture."""

    _ptfix_turn: Any

    def _ptfix_room(self) -> int:
        """How many virtual tokens the decoder's KV cache holds."""
        return int(self._ptfix_turn.prompt.length)

    def get_compiled_call(self, compile_config: Any) -> Any:
        # The view lives for one call, the compiled graph must not.
        return self._ptfix_turn.base.get_compiled_call(compile_config)

    def _get_initial_cache_position(self, *args: Any) -> Any:  # transformers < 5.4
        # The host takes the cache's length, in which the soft prompt is counted, from the text's, in which it is not.
        # Its answer is never read: prepare_inputs_for_generation counts anew at each step.
        model_kwargs = args[-1]
        model_kwargs["cache_position"] = torch.zeros(1, dtype=torch.long, device=self._ptfix_turn.base.device)
        return model_kwargs

    def _more_room(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the host's maker of fixed-size caches, which sizes them for real tokens only."""
        maker = getattr(super(), name)
        bound = inspect.signature(maker).bind(*args, **kwargs)
        bound.arguments["max_cache_len"] += self._ptfix_room()
        return maker(*bound.args, **bound.kwargs)

    def _get_static_cache(self, *args: Any, **kwargs: Any) -> Any:  # transformers 4.41
        return self._more_room("_get_static_cache", *args, **kwargs)

    def _get_cache(self, *args: Any, **kwargs: Any) -> Any:  # transformers 4.42 to 5.0
        return self._more_room("_get_cache", *args, **kwargs)

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Any:  # transformers >= 5.1
        return self._more_room("_prepare_static_cache", *args, **kwargs)


class _SoftPromptView(View):
    """The view of a decoder."""

    _ptfix_turn: _Turn

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Translate one step. `input_ids [batch, real tokens]`; `inputs_embeds` are the user's own, before them.

        The KV cache comes as `past_key_values`, from transformers 5.24 on as `cache`.
        """
        if cache is not None:
            past_key_values = cache
        turn = self._ptfix_turn
        prompt, given = turn.prompt, input_ids.shape[1] + (0 if inputs_embeds is None else inputs_embeds.shape[1])
        if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2):
            raise ValueError(
                "a soft prompt needs a 2D attention_mask [batch, tokens]; build 4D masks from it, not before it."
            )
        if not kwargs.get("use_cache", True):
            # Up to 4.44 generate() hands out a cache here all the same.
            past_key_values = None
        if past_key_values is None:
            past_key_values = turn.on_layers
        if caches.keeps_states(past_key_values):
            if not turn.read and past_key_values.has_previous_state():
                raise ValueError(
                    "how many tokens a recurrent state has read cannot be known: generate again without the cache."
                )
            cached = turn.read
        else:
            cached = caches.length(past_key_values)
        if turn.hidden is None:
            turn.begin(given, cached, inputs_embeds is not None, attention_mask)
        hidden = turn.hidden or 0
        input_ids = input_ids[:, max(0, -hidden) :]
        stop = prompt.length + given + hidden
        start = min(cached, stop - 1)  # a text that is wholly cached still needs its last logits
        if stop - start > 1 and turn.pads is not None and caches.padded_rows_need_one_span():
            start = 0
        behind_prefix = prompt.length + turn.most_pads
        if prompt.is_prefix and start < behind_prefix:
            start = 0
        turn.read = stop
        past_key_values = caches.crop(past_key_values, start)
        if prompt.is_prefix:
            self._warn_of_window(attention_mask, stop)
        if prompt.is_prefix and start == 0:
            prefix = caches.prefix_of(prompt, len(input_ids))
            if turn.pads is not None or caches.wants_one_span(turn.base, stop):
                pads = input_ids.new_zeros(len(input_ids)) if turn.pads is None else turn.pads
                past_key_values = caches.put_when_fed(past_key_values, prefix, pads, turn.base)
            else:
                past_key_values = caches.fill(past_key_values, prefix, turn.base)
                start = prompt.length
            past_key_values = caches.with_known_length(past_key_values, stop, turn.base)
            if not kwargs.get("use_cache", True):
                kwargs["use_cache"] = (
                    True  # else some models do not read the cache; this one is thrown away after the step
                )

        text = _Text(self, input_ids, inputs_embeds, attention_mask, stop)
        if turn.chunk is not None and past_key_values is not None:
            while stop - start > turn.chunk:
                chunk_stop = max(start + turn.chunk, behind_prefix if prompt.is_prefix else 0)
                self(**text.inputs(start, chunk_stop, past_key_values, kwargs), return_dict=True)  # type: ignore[operator]
                start = chunk_stop
        return text.inputs(start, stop, past_key_values, kwargs)

    def _warn_of_window(self, attention_mask: torch.Tensor | None, length: int) -> None:
        # Before 4.42 a cache is tuples of tensors, in which a prefix can only stand in front of the padding.
        turn = self._ptfix_turn
        window = caches.window(turn.base)
        if window and length > window and attention_mask is not None and turn.pads is None and not turn.warned:
            turn.warned = True
            if padding.left_pads(attention_mask) is not None:
                logger.warning(
                    "a left-padded batch of %d positions is longer than the model's sliding window (%d): its padded "
                    "rows see less of the prefix than alone. Generate them in batches of equal length.",
                    length,
                    window,
                )

    def _host_inputs(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        return inputs

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> Any:
        # Chunked prefill is done in prepare_inputs_for_generation, where a chunk is counted in the model's coordinates.
        config, *rest = super()._prepare_generation_config(*args, **kwargs)  # type: ignore[misc]
        if getattr(config, "prefill_chunk_size", None) is not None:
            self._ptfix_turn.chunk = config.prefill_chunk_size
            config.prefill_chunk_size = None
        return (config, *rest)

    def _setup_cache(self, *args: Any, **kwargs: Any) -> None:  # transformers 4.38 to 4.41
        # Hung on the attention modules: the view needs its own, or a failure leaves the base model with a cache.
        for name, child in self._modules.items():  # type: ignore[attr-defined]
            self._modules[name] = views.tree(child, lambda view, module: None)  # type: ignore[attr-defined]
        if self._ptfix_turn.prompt.is_prefix:
            # Such a cache is attended to as if it were empty: without a causal mask, all tokens of the text at once.
            logger.warning("prefix tuning has no static cache before transformers 4.42: generating with a growing one.")
            return
        self._more_room("_setup_cache", *args, **kwargs)
        self._ptfix_turn.on_layers = caches.OnLayers(self)


class _Text:
    """One step's text in virtual coordinates: ``[soft prompt | user's embeddings | tokens]``, any span of which can
    be fed."""

    def __init__(
        self,
        owner: Any,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        length: int,
    ) -> None:
        self.owner, self.turn, self.prompt = owner, owner._ptfix_turn, owner._ptfix_turn.prompt
        self.input_ids, self.inputs_embeds = input_ids, inputs_embeds
        batch = len(input_ids)
        self.placeholders = input_ids.new_zeros(batch, length - input_ids.shape[1])
        self.attention_mask = None
        if attention_mask is not None:
            ones = attention_mask.new_ones(batch, self.prompt.length)
            self.attention_mask = torch.cat((ones, attention_mask), dim=1)
        self.order = None
        if self.turn.pads is not None:
            self.order = padding.pads_first(self.turn.pads, self.prompt.length, length)
            if self.attention_mask is not None:
                self.attention_mask = padding.reorder(self.attention_mask, self.order)

    def inputs(self, start: int, stop: int, past_key_values: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Model inputs for positions `start` to `stop`, by the base model's own rules."""
        virtual_ids = torch.cat((self.placeholders, self.input_ids), dim=1)[:, :stop]
        mask = None if self.attention_mask is None else self.attention_mask[:, :stop]
        # Without token_type_ids, as the training forward.
        options = {name: value for name, value in options.items() if name != "token_type_ids"}
        positions = None
        if options.get("position_ids") is not None or _has_image_positions(self.turn.base):
            positions = self._positions(options.get("position_ids"), virtual_ids.device)[..., start:stop]
        if options.get("position_ids") is not None:
            options["position_ids"] = positions
        if options.get("cache_position") is not None:
            options["cache_position"] = torch.arange(start, stop, device=virtual_ids.device)
        if "next_sequence_length" in options:
            options["next_sequence_length"] = stop - start
        handed_on = None if past_key_values is self.turn.on_layers else past_key_values
        inputs: dict[str, Any] = self.owner._host_inputs(
            virtual_ids, attention_mask=mask, **{caches.keyword(): handed_on}, **options
        )
        if _has_image_positions(self.turn.base):
            inputs["position_ids"] = positions
        if start >= max(self.placeholders.shape[1], self.prompt.length + self.turn.most_pads):
            if inputs["input_ids"].shape[1] != stop - start:
                inputs["input_ids"] = virtual_ids[:, start:]
        elif self.prompt.is_prefix and self.inputs_embeds is None:
            # What is said where the prefix stands is not read; so the model may embed the text itself.
            inputs.pop("inputs_embeds", None)
            ids = virtual_ids if self.order is None else padding.reorder(virtual_ids, self.order[:, :stop])
            inputs["input_ids"] = ids[:, start:]
        else:
            inputs["inputs_embeds"], inputs["input_ids"] = self._embeddings(start, stop), None
        if self.turn.on_layers is not None:  # 4.38 counts its own way where it holds no cache
            inputs["position_ids"] = inputs["position_ids"][:, start - stop :]
            inputs["cache_position"] = torch.arange(start, stop, device=virtual_ids.device)
        return inputs

    def _embeddings(self, start: int, stop: int) -> torch.Tensor:
        parts = [] if self.inputs_embeds is None else [self.inputs_embeds]
        if self.input_ids.shape[1]:
            parts.append(self.prompt.embed(self.input_ids))
        dtype = parts[0].dtype
        if not self.prompt.is_prefix:
            rows, task_ids = len(self.input_ids), self.turn.task_ids
            if task_ids is not None:
                task_ids = task_ids.repeat_interleave(rows // len(task_ids))  # as generate() expands for beams
            parts.insert(0, self.prompt.embeddings(rows, task_ids).to(dtype))
        elif start < self.prompt.length or self.order is not None:  # replaced when fed
            parts.insert(0, self.prompt.embed(self.placeholders[:, : self.prompt.length]))
        embeddings = torch.cat([part.to(dtype) for part in parts], dim=1)
        if self.order is not None:
            embeddings = padding.reorder(embeddings, self.order)
        first = self.placeholders.shape[1] + self.input_ids.shape[1] - embeddings.shape[1]
        return embeddings[:, start - first : stop - first]

    def _positions(self, given: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """Virtual positions of the whole text. Those of the user are shifted; others follow from the mask, also where
        the host has several axes of them: training feeds embeddings, in which a model cannot tell where images are.
        """
        length = self.placeholders.shape[1] + self.input_ids.shape[1]
        if given is not None and self.turn.user_positions:
            shape = (*given.shape[:-1], length - given.shape[-1])
            front = torch.arange(shape[-1], device=given.device).expand(shape)
            positions = torch.cat((front, given + self.prompt.length), dim=-1)
            return positions if self.order is None else positions.gather(-1, self.order.expand_as(positions))
        if self.attention_mask is None:
            return torch.arange(length, device=device).unsqueeze(0)
        return (self.attention_mask.long().cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class _Overridden:
    """A method of the host that the view overrides."""

    names: tuple[str, ...]  #: what it is called, from release to release
    parameters: tuple[str, ...] = ()  #: what the view hands on or reads by name
    serves: str | None = None  #: the option of GenerationConfig that is wrong without it; None: it may be absent


_OVERRIDDEN = (
    _Overridden(
        ("prepare_inputs_for_generation",), ("input_ids", "attention_mask", "inputs_embeds"), serves="max_length"
    ),
    _Overridden(("_prepare_generation_config",), ("generation_config",), serves="prefill_chunk_size"),
    _Overridden(
        ("_setup_cache", "_get_static_cache", "_get_cache", "_prepare_static_cache"),
        ("max_cache_len",),
        serves="cache_implementation",
    ),
    _Overridden(("_get_initial_cache_position",)),
    _Overridden(("get_compiled_call",), ("compile_config",)),
)


def drift() -> str | None:
    """Which method that the view must override is gone from this host, or no longer takes what it must; None for
    none."""
    from transformers import GenerationConfig, LlamaForCausalLM

    options = vars(GenerationConfig())
    for overridden in _OVERRIDDEN:
        found = [name for name in overridden.names if hasattr(LlamaForCausalLM, name)]
        if not found and overridden.serves in options:
            return f"generate() no longer has {' or '.join(overridden.names)}, which {overridden.serves} needs"
        for name in found:
            parameters = inspect.signature(getattr(LlamaForCausalLM, name)).parameters
            open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
            gone = [] if open_ended else [taken for taken in overridden.parameters if taken not in parameters]
            if gone:
                return f"{name} of generate() no longer takes {', '.join(gone)}"
    return None
