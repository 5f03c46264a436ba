"""The soft prompt of an encoder-decoder: where it stands, how a forward reads it, how generate() does.

Prompt-like methods stand in front of the text that the encoder reads. A prefix, and the second half of a multitask
prompt, stand in front of what the decoder writes. generate() sees the base model through a private view: its encoder
lays the soft prompt in front of the text, and an empty KV cache of its decoder is filled before the first token. What
comes after follows from the length of the cache, as for decoders (see `generation`).

Padding of the text is moved behind it, where neither positions nor distances to the soft prompt depend on it.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ptfix.soft_prompts import caches, generation, padding, training, views
from ptfix.soft_prompts.adapter import KeyValues, SoftPrompt, is_encoder_decoder

# --- what both read ----------------------------------------------------------------------------------------------


def prefix_of(prompt: SoftPrompt, batch_size: int, base: Any) -> KeyValues:
    """The prefix of each decoder layer, as peft's training forward gives it to self-attention.

    With two submodules peft cuts the pairs into fours, keys and values of self- and of cross-attention; the latter are
    never to be read.
    """
    pairs = prompt.key_values(batch_size)
    step = prompt.config.num_transformer_submodules or 1
    return [pairs[step * layer % len(pairs)] for layer in range(len(pairs))][: decoder_layers(base.config)]


def decoder_layers(config: Any) -> int | None:
    """How many layers the decoder has; None where the config does not say."""
    names = ("decoder_layers", "num_decoder_layers", "num_hidden_layers")
    return next((int(getattr(config, name)) for name in names if getattr(config, name, None)), None)


def with_prefix(past_key_values: Any, prefix: KeyValues, base: Any) -> Any:
    """An empty KV cache, or None, with the prefix in it, in the kind that this model's decoder reads."""
    if past_key_values is None and not _reads_caches(base):
        # No keys and values for cross-attention: it computes its own where there are not as many as the encoder has.
        return tuple((key, value, key[:, :, :0], value[:, :, :0]) for key, value in filter(None, prefix))
    held = _new_cache(base) if past_key_values is None else past_key_values
    caches.fill(getattr(held, "self_attention_cache", held), prefix, base)
    return held


def _reads_caches(base: Any) -> bool:
    """Does its decoder read an EncoderDecoderCache (t5 since 4.46, bart since 4.52), rather than tuples of four?"""
    from transformers import cache_utils

    return hasattr(cache_utils, "EncoderDecoderCache") and getattr(base, "_supports_cache_class", True)


def _new_cache(base: Any) -> Any:
    from transformers import DynamicCache
    from transformers.cache_utils import EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def text_on_the_left(
    given: dict[str, Any], attention_mask: torch.Tensor | None, prompt: SoftPrompt, config: Any
) -> torch.Tensor | None:
    """How many pads ``[batch]`` stand left of each row of the encoder's text, where they must be moved behind it; None
    where nothing is to be moved.

    Behind a prefix the encoder is the base model's own, which left padding disturbs only if it counts positions (bart);
    relative distances within the text (t5) stay.
    """
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError("a soft prompt needs a 2D attention_mask [batch, tokens]; build 4D masks from it, not before.")
    if not prompt.in_encoder and getattr(config, "max_position_embeddings", None) is None:
        return None
    text = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
    return None if text is None else padding.left_pads(attention_mask)


# --- forward() ---------------------------------------------------------------------------------------------------


def forward(original: Callable[..., Any], peft_model: Any, given: dict[str, Any]) -> Any:
    """``original(peft_model, **given)``, where a row's padding does not stand before its text, and the base model is
    given all that was given: data collators make ``decoder_input_ids`` from the labels."""
    prompt = SoftPrompt(peft_model)
    given = dict(given)
    mask, decoder_ids = given.get("attention_mask"), given.get("decoder_input_ids")
    pads = text_on_the_left(given, mask, prompt, peft_model.base_model.config)
    if pads is not None:
        for name in ("input_ids", "inputs_embeds", "attention_mask"):
            if given.get(name) is not None:
                given[name] = padding.roll(given[name], -pads)
    dropped = {}  # what peft does not hand on to the base model
    if prompt.is_prefix and given.get("inputs_embeds") is not None:  # an old peft
        dropped["inputs_embeds"] = given["inputs_embeds"]
    if prompt.config.peft_type == "MULTITASK_PROMPT_TUNING" and decoder_ids is not None:
        if prompt.in_decoder:
            given["decoder_inputs_embeds"] = prompt.embed(decoder_ids)
        else:
            dropped["decoder_input_ids"] = decoder_ids
    if dropped:
        peft_model = training.with_base_call(peft_model, lambda base, arguments: (base, {**arguments, **dropped}))
    return original(peft_model, **given)


def refuse_what_reads_no_text(model: Any, peft_config: Any) -> None:
    """Raise ValueError where no soft prompt can stand before what the encoder reads (whisper)."""
    reads = getattr(model, "main_input_name", "input_ids")
    if peft_config.is_prompt_learning and is_encoder_decoder(model) and reads != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads {reads}, not text: it cannot be trained with a soft prompt, use LoRA."
        )


# --- generate() --------------------------------------------------------------------------------------------------


def generate(peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    """What ``peft_model.generate(*args, **kwargs)`` should return; same arguments, errors and return values as the
    host's of the base model."""
    prompt, base = SoftPrompt(peft_model), _innermost(peft_model)
    for name in ("position_ids", "token_type_ids"):  # as in training
        if kwargs.pop(name, None) is not None:
            warnings.warn(f"{name} are ignored with a soft prompt, as in training.", stacklevel=2)
    if prompt.in_encoder and kwargs.pop("encoder_outputs", None) is not None:
        if not args and all(kwargs.get(name) is None for name in ("inputs", "input_ids", "inputs_embeds")):
            raise ValueError(
                "encoder_outputs of the base model lack the soft prompt, which stands before the text: pass input_ids."
            )
        warnings.warn("encoder_outputs are computed anew, with the soft prompt.", stacklevel=2)
    held = caches.taken_from(kwargs)
    if held is not None:
        kwargs[caches.keyword()] = held
    turn = _Turn(prompt, base, kwargs.pop("task_ids", None))
    return generation.view_of(base, _View, peft_model.generation_config, turn).generate(*args, **kwargs)


def _innermost(peft_model: Any) -> Any:
    """The model of transformers, of a soft prompt over LoRA too."""
    while hasattr(peft_model, "get_base_model"):
        peft_model = peft_model.get_base_model()
    return peft_model


@dataclass
class _Turn:
    """What one generate() call knows beyond what generate() hands on."""

    prompt: SoftPrompt
    base: Any
    task_ids: torch.Tensor | None  #: ``[batch]``, for multitask prompt tuning
    pads: torch.Tensor | None = None  #: ``[batch]``, padding on the left of each row, which the encoder moved
    batch: int = 1  #: rows that the encoder read; generate() may put several answers behind each

    def embeddings(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The soft prompt for the encoder and the one for the decoder."""
        task_ids = self.task_ids
        if task_ids is not None:
            task_ids = task_ids.repeat_interleave(rows // len(task_ids))
        found = self.prompt.embeddings(rows, task_ids)
        return found[:, : self.prompt.in_encoder], found[:, self.prompt.in_encoder :]

    def encoder(self, encoder: Any) -> Any:
        """A view of the base model's encoder that reads the soft prompt before the text."""

        @functools.wraps(encoder.forward)  # the host looks at its parameters
        def forward(*args: Any, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask")
            self.pads = text_on_the_left(kwargs, mask, self.prompt, self.base.config)
            for name in ("input_ids", "inputs_embeds"):
                if kwargs.get(name) is not None and self.pads is not None:
                    kwargs[name] = padding.roll(kwargs[name], -self.pads)
            if self.prompt.in_encoder:
                text = kwargs.pop("input_ids", None)
                text = kwargs["inputs_embeds"] if text is None else self.prompt.embed(text)
                prompt, _ = self.embeddings(len(text))
                kwargs["inputs_embeds"] = torch.cat((prompt.to(text.dtype), text), dim=1)
            kwargs["attention_mask"] = self.mask(mask)
            return encoder.forward(*args, **kwargs)

        return views.shallow(encoder, forward=forward)

    def mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """The user's mask of the text ``[rows, tokens]``, as that of what the encoder read."""
        if mask is None:
            return None
        if self.pads is not None:
            mask = padding.roll(mask, -self.pads.repeat_interleave(len(mask) // len(self.pads)))
        return torch.cat((mask.new_ones(len(mask), self.prompt.in_encoder), mask), dim=1)

    def begun(self, view: Any, held: Any, rows: int, **read: Any) -> Any:
        """A KV cache that holds the decoder's part of the soft prompt.

        Args:
            held: an empty cache, which is filled in place, or None.
            read: ``encoder_outputs`` and its ``attention_mask``.
        """
        if self.prompt.is_prefix:
            return with_prefix(held, prefix_of(self.prompt, rows, self.base), self.base)
        prompt = self.embeddings(rows)[1].to(self.base.dtype)
        held = {} if held is None else {caches.keyword(): held}
        return caches.of(view(decoder_inputs_embeds=prompt, use_cache=True, return_dict=True, **held, **read))


class _View(generation.View):
    """The view of an encoder-decoder."""

    _ptfix_turn: _Turn

    def _ptfix_room(self) -> int:
        return self._ptfix_turn.prompt.in_decoder

    def get_encoder(self, *args: Any, **kwargs: Any) -> Any:
        return self._ptfix_turn.encoder(super().get_encoder(*args, **kwargs))  # type: ignore[misc]

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Translate one step: `input_ids [rows, tokens]` are those the decoder reads, `attention_mask` is the text's.

        The KV cache comes as `past_key_values`, from transformers 5.24 on as `cache`.
        """
        turn, rows = self._ptfix_turn, len(input_ids)
        virtual = turn.prompt.in_decoder
        held = past_key_values if cache is None else cache
        mask = turn.mask(attention_mask)
        uses_cache = kwargs.get("use_cache") is not False
        if not uses_cache:
            held = None  # up to 4.44 generate() hands out a cache here all the same
        stop = virtual + input_ids.shape[1]
        start = min(caches.length(held), stop - 1)  # what is wholly cached still needs its last logits
        if start < virtual:
            read = {"encoder_outputs": kwargs["encoder_outputs"], "attention_mask": mask}
            held, start = turn.begun(self, caches.crop(held, 0), rows, **read), virtual
            if "use_cache" in kwargs:
                kwargs["use_cache"] = True  # else some models do not read the cache; this one lives for one step
        else:
            held = caches.crop(held, start)
        if decoder_attention_mask is not None:
            if virtual and not decoder_attention_mask.all():
                raise ValueError(
                    "decoder_input_ids behind a soft prompt of the decoder must not be padded: pass rows one by one."
                )
            ones = decoder_attention_mask.new_ones(rows, virtual)
            kwargs["decoder_attention_mask"] = torch.cat((ones, decoder_attention_mask), dim=1)
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = torch.arange(start, stop, device=input_ids.device)
        host = super().prepare_inputs_for_generation  # type: ignore[misc]
        if "next_sequence_length" in inspect.signature(host).parameters:  # since 5.0
            kwargs["next_sequence_length"] = stop - start
        ids = torch.cat((input_ids.new_zeros(rows, virtual), input_ids), dim=1)
        inputs: dict[str, Any] = host(ids, attention_mask=mask, **{caches.keyword(): held}, **kwargs)
        inputs["decoder_input_ids"] = ids[:, start:]
        if virtual and not turn.prompt.is_prefix:
            # peft's forward embeds what the decoder reads itself, behind its part of the prompt.
            inputs["decoder_inputs_embeds"] = turn.prompt.embed(inputs.pop("decoder_input_ids"))
        return inputs
