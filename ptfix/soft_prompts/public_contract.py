"""Generate with a soft prompt by the public contract of ``GenerationMixin`` alone.

A soft prompt is keys and values in every layer: a prefix is stored as such, and one forward of a prompt's embeddings
makes them. The base model generates for the ids ``[placeholders; ids]`` with a cache of the caller's own. That cache
replaces the keys and values of the placeholders by those of the soft prompt (`caches.put_when_fed`), so the host sees
an ordinary first turn: ``generate(ids, attention_mask=mask, past_key_values=cache)``. Whatever looks at ids (logits
processors, stopping criteria, streamers, the caller) is given the real ones.

No private method, no override and no view of the base model's class: what the host renames inside itself does not
matter here. Nothing shared is changed. Which modes are right on the installed release, `proof.trials` finds out.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from ptfix import models
from ptfix.soft_prompts import caches, padding
from ptfix.soft_prompts.adapter import KeyValues, SoftPrompt, host_model


class NotSupported(ValueError):
    """A call that the public contract does not answer as the adapter was trained."""


#: Options of generate() that run the base model in ways of their own, and their values that mean "off".
_REFUSED = {
    "guidance_scale": (None, 1, 1.0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "token_healing": (None, False),
    "assistant_early_exit": (None,),
    "output_hidden_states": (None, False),
    "output_attentions": (None, False),
}
#: Arguments of generate() that are handed on as they are.
_HANDED_ON = ("synced_gpus", "assistant_model", "tokenizer", "assistant_tokenizer", "logits_to_keep")


class Call:
    """One generate() call: what was asked, in real coordinates, and how it is put to the host, in virtual ones."""

    def __init__(self, peft_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.prompt, self.base = SoftPrompt(peft_model), host_model(peft_model)
        asked = self._by_name(args, kwargs)
        self.task_ids = asked.pop("task_ids", None)
        self.explicit = {name for name in ("max_length", "min_length") if asked.get(name) is not None}
        given = asked.pop("generation_config", None)
        self.default_config = peft_model.generation_config
        self.config = copy.deepcopy(self.default_config if given is None else given)
        asked = self.config.update(**asked)

        inputs, ids = asked.pop("inputs", None), asked.pop("input_ids", None)
        self.ids = inputs if ids is None else ids
        self.embeds = asked.pop("inputs_embeds", None)
        if self.ids is None and self.embeds is None:
            raise ValueError("generate() with a soft prompt needs input_ids or inputs_embeds.")
        if self.ids is not None and self.embeds is not None:
            self.refuse("input_ids together with inputs_embeds are not supported")
        self.cache = caches.taken_from(asked)
        self.cached = caches.length(self.cache)
        self.has_mask = asked.get("attention_mask") is not None
        self.mask = self._mask(asked.pop("attention_mask", None))
        self.processors = asked.pop("logits_processor", None)
        self.criteria = asked.pop("stopping_criteria", None)
        self.streamer = asked.pop("streamer", None)
        self.allowed = asked.pop("prefix_allowed_tokens_fn", None)
        asked.pop("token_type_ids", None)  # which the training forward does not read either
        self.rest = {name: value for name, value in asked.items() if value is not None}
        self.places = self._places()

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        bound = inspect.signature(self.base.generate).bind(*args, **kwargs).arguments
        return {**bound.pop("kwargs", {}), **bound}

    def refuse(self, why: str, what_to_do: str = "leave that out") -> None:
        kind = str(self.prompt.config.peft_type).split(".")[-1]
        raise NotSupported(
            f"generate() of {type(self.base).__name__} with {kind}: {why}; {what_to_do}, or install a transformers "
            "release that ptfix was measured on (see ptfix doctor)."
        )

    def option(self, name: str, otherwise: Any = None) -> Any:
        """A generation option: the caller's, else the model's (since 5.0 an unset option is None)."""
        value = getattr(self.config, name, None)
        if value is None:
            value = getattr(self.default_config, name, None)
        return otherwise if value is None else value

    @property
    def rows(self) -> int:
        """Rows that the host feeds: each of the caller's, once per beam or returned sequence."""
        return len(self._text) * self.expand

    @property
    def expand(self) -> int:
        return max(int(self.option("num_beams", 1)), int(self.option("num_return_sequences", 1)))

    @property
    def _text(self) -> torch.Tensor:
        text: torch.Tensor = self.embeds if self.ids is None else self.ids
        return text

    def _mask(self, mask: Any) -> torch.Tensor:
        """The caller's mask; without one the host's rule: pad tokens are padding, unless they also end a text."""
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            return mask
        if mask is not None:
            raise ValueError(
                "a soft prompt needs a 2D attention_mask [batch, tokens]; build 4D masks from it, not before it."
            )
        length = max(self._text.shape[1], self.cached - self.prompt.length)
        ones = torch.ones(len(self._text), length, dtype=torch.long, device=self._text.device)
        pad, eos = self.option("pad_token_id"), self.option("eos_token_id", [])
        ends = eos.reshape(-1).tolist() if isinstance(eos, torch.Tensor) else eos if isinstance(eos, list) else [eos]
        if self.ids is None or pad is None or int(pad) in ends:
            return ones
        ones[:, length - self.ids.shape[1] :] = self.ids.ne(int(pad)).long()
        return ones

    def _places(self) -> _Places:
        hidden = self.mask.shape[1] - self._text.shape[1]  # real tokens that stand only in the cache
        if hidden < 0 or (hidden and not self.cached):
            raise ValueError(
                f"the attention_mask is for {self.mask.shape[1]} tokens, the text has {self._text.shape[1]}; without "
                "a cache of the earlier text both must be equally long."
            )
        return _Places(self.prompt.length, self.mask.shape[1], hidden, padding.left_pads(self.mask))

    # -- what is asked ------------------------------------------------------------------------------------------

    def modes(self) -> list[str]:
        """The modes of this call that the host must be right in. Refuses what no trial covers."""
        for name, off in _REFUSED.items():
            if self.option(name) not in off:
                self.refuse(f"{name} is not supported")
        for name in self.rest:
            if name not in _HANDED_ON:
                self.refuse(f"the argument {name} is not supported")
        left_behind = vars(self.base).get("prepare_inputs_for_generation")
        if getattr(left_behind, "__self__", self.base) is not self.base:
            self.refuse("an interrupted generate() of peft left a method on the base model", "load the model anew")
        if caches.legacy_layout(self.base) is not None:
            self.refuse("this architecture takes no Cache object in this release", "use another architecture")
        implementation = self.option("cache_implementation")
        if implementation not in (None, "dynamic", "static") or (implementation and self.cache is not None):
            self.refuse(f"cache_implementation={implementation!r} is not supported", "pass a cache of your own")
        padded = self.places.pads is not None
        second, draft = self.cached > 0, self._draft()
        length = self.option("max_new_tokens") is None
        named = {
            "greedy": True,
            "no mask": not self.has_mask,
            "left-padded batch": padded,
            "beam search": self.expand > 1,
            "max_length": length and self._length("max") is not None,
            "default length": length and self._length("max") is None,
            "static cache": implementation == "static",
            "static cache, left-padded": implementation == "static" and padded,
            "own cache": self.cache is not None and not second,
            "second turn": second,
            "second turn, left-padded": second and padded,
            "text wholly cached": second and self.cached >= self.places.length,
            "inputs_embeds": self.embeds is not None,
            "chunked prefill": self.option("prefill_chunk_size") is not None,
            "prompt lookup": draft is not None,
            "assisted": draft == "assisted",
            "no cache": self.option("use_cache") is False,
        }
        asked = [mode for mode, is_asked in named.items() if is_asked]
        untried = {"second turn", "inputs_embeds", "chunked prefill", "prompt lookup", "beam search", "static cache"}
        if len(together := [mode for mode in asked if mode in untried]) > 1:
            self.refuse(f"{' and '.join(together)} together are not supported")
        return asked

    def _draft(self) -> str | None:
        if self.rest.get("assistant_model") is not None:
            return "assisted"
        return "prompt lookup" if self.option("prompt_lookup_num_tokens") is not None else None

    def _length(self, which: str) -> int | None:
        """max_length or min_length as the caller set it; None where the host's default stands."""
        from transformers import GenerationConfig

        name = f"{which}_length"
        value = self.option(name)
        if value is None or (name not in self.explicit and value == getattr(GenerationConfig(), name)):
            return None
        return int(value)

    # -- how it is put to the host ------------------------------------------------------------------------------

    def run(self) -> Any:
        with torch.no_grad():
            return self._run()

    def _run(self) -> Any:
        config = self._host_config()
        processors = self._processors(config)
        mask = self.places.virtual(self.mask, self.mask.new_ones(len(self.mask), self.prompt.length))
        inputs = self._inputs()
        options = {
            "attention_mask": mask,
            caches.keyword(): self._cache(config),
            "generation_config": config,
            "logits_processor": processors,
            "stopping_criteria": self._criteria(),
            "streamer": None if self.streamer is None else _Streamer(self),
            "prefix_allowed_tokens_fn": None if self.allowed is None else self._allowed,
            **self.rest,
        }
        options = {name: value for name, value in options.items() if value is not None}
        return self._real(self.base.generate(**inputs, **options))

    def _inputs(self) -> dict[str, torch.Tensor]:
        batch, length = len(self._text), self.prompt.length
        if self.embeds is None:
            placeholders = self._text.new_zeros(batch, length + self.places.hidden)
            return {"inputs": self.places.reorder(torch.cat((placeholders, self._text), dim=1))}
        return {"inputs_embeds": self.places.virtual(self.embeds, self._placeholders(batch).to(self.embeds.dtype))}

    def _host_config(self) -> Any:
        """The caller's options with lengths as counts of new tokens, which mean the same in both coordinates."""
        from transformers import GenerationConfig

        config, tokens, default = copy.deepcopy(self.config), self._text.shape[1], GenerationConfig()
        maximum, minimum = self._length("max"), self._length("min")
        if self.option("max_new_tokens") is None and maximum is not None:
            if maximum <= tokens:
                raise ValueError(
                    f"Input length of input_ids is {tokens}, but `max_length` is set to {maximum}: set a larger "
                    "`max_length`, or better `max_new_tokens`."
                )
            config.max_new_tokens = maximum - tokens
        if self.option("min_new_tokens") is None and minimum is not None and minimum > tokens:
            config.min_new_tokens = minimum - tokens
        config.max_length, config.min_length = default.max_length, default.min_length
        config.cache_implementation = None
        config.use_cache = True
        return config

    def _cache(self, config: Any) -> Any:
        """The cache that holds the soft prompt, or will, as soon as its positions have been fed."""
        from transformers import DynamicCache

        first = torch.zeros(self.rows, dtype=torch.long, device=self._text.device)
        if self.places.pads is not None:
            first = self.places.pads.repeat_interleave(self.expand)
        stop = self.places.length
        held = self.cache
        if self.cached >= self.prompt.length + int(first.max()):
            return caches.crop(held, min(self.cached, stop - 1))  # the last position's logits are still needed
        if self.cached:
            held = caches.crop(held, 0)
        if held is None and self.option("cache_implementation") == "static":
            held = self._static_cache(stop + self._new_tokens(config))
        if held is None and self._draft() is not None:
            held = DynamicCache()  # laid out for no model: layers with a sliding window forget what a draft rolls back
        return caches.put_when_fed(held, self._keys_and_values(), first, self.base)

    def _new_tokens(self, config: Any) -> int:
        """At most so many; without any length given, the hosts' default of 20."""
        return int(self.option("max_new_tokens") or config.max_new_tokens or 20)

    def _static_cache(self, length: int) -> Any:
        from transformers import StaticCache

        length = max(length, int(self.option("max_cache_len", 0)))
        known = {
            "config": models.text_config(self.base.config),
            "max_cache_len": length,
            "max_batch_size": self.rows,
            "device": self._text.device,
            "dtype": self.base.dtype,
        }
        accepted = inspect.signature(StaticCache.__init__).parameters
        return StaticCache(**{name: value for name, value in known.items() if name in accepted})

    def _keys_and_values(self) -> KeyValues:
        """The soft prompt as keys and values, for each row that the host feeds."""
        layers = getattr(caches.new(self.base), "layers", None) or []
        if not all(hasattr(layer, "get_mask_sizes") for layer in layers):
            self.refuse("some layers keep a state, not keys and values", "use another architecture")
        if self.prompt.is_prefix:
            prefix = caches.prefix_of(self.prompt, self.rows)
            without = {layer for layer, pair in enumerate(prefix) if pair is None}
            if without and without & set(self._recorded(self._placeholders(1))):
                self.refuse("some layers take no prefix", "use another architecture")
            return prefix
        batch = 1 if self.task_ids is None else len(self._text)
        embeds = self.prompt.embeddings(batch, self.task_ids).to(self._placeholders(1).dtype)
        recorded = self._recorded(embeds)
        if sorted(recorded) != list(range(models.text_config(self.base.config).num_hidden_layers)):
            self.refuse("not every layer stores keys and values", "call eval() where the model is in training")
        times = self.rows // batch
        return [
            (key.repeat_interleave(times, dim=0), value.repeat_interleave(times, dim=0))
            for _, (key, value) in sorted(recorded.items())
        ]

    def _placeholders(self, batch: int) -> torch.Tensor:
        ids = torch.zeros(batch, self.prompt.length, dtype=torch.long, device=self._text.device)
        return self.prompt.embed(ids)

    def _recorded(self, embeds: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """The keys and values that each layer makes of `embeds` at the first positions."""
        cache, recorded = _recorder(self.base)
        self.base(inputs_embeds=embeds, use_cache=True, **{caches.keyword(): cache})
        return recorded

    # -- whatever looks at ids is given the real ones -----------------------------------------------------------

    def _processors(self, config: Any) -> Any:
        """All logits processors as one that is given real ids; so the host's own that read the whole text move here."""
        from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

        mine = LogitsProcessorList()
        if (penalty := self.option("repetition_penalty", 1.0)) != 1.0:
            mine.append(RepetitionPenaltyLogitsProcessor(penalty))
        if (size := self.option("no_repeat_ngram_size", 0)) > 0:
            mine.append(NoRepeatNGramLogitsProcessor(size))
        config.repetition_penalty, config.no_repeat_ngram_size = 1.0, 0
        mine.extend(self.processors or [])
        return LogitsProcessorList([_Processor(self, mine)]) if mine else None

    def _criteria(self) -> Any:
        from transformers import StoppingCriteria, StoppingCriteriaList

        if not self.criteria:
            return None
        theirs, places = StoppingCriteriaList(self.criteria), self.places

        class OnRealIds(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
                return theirs(places.real(input_ids), scores, **kwargs)

        return StoppingCriteriaList([OnRealIds()])

    def _allowed(self, batch_id: int, sent: torch.Tensor) -> Any:
        return self.allowed(batch_id, self.places.real(sent.unsqueeze(0), row=batch_id)[0])

    def _real(self, result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return result if self.embeds is not None else self.places.real(result)
        if self.embeds is None:
            result["sequences"] = self.places.real(result["sequences"])
        if self.option("use_cache") is False and (name := caches.name_in(result)) is not None:
            result[name] = None
        return result


@dataclass
class _Places:
    """Where real tokens stand among the virtual ones: ``[padding | soft prompt | text]`` in each row."""

    virtual_tokens: int
    real_tokens: int  #: in the cache or in the ids
    hidden: int  #: real tokens that stand only in the cache
    pads: torch.Tensor | None  #: ``[batch]``, padding before the soft prompt of each row

    @property
    def length(self) -> int:
        return self.virtual_tokens + self.real_tokens

    def reorder(self, rows: torch.Tensor) -> torch.Tensor:
        """``[soft prompt | padding and text]`` with the padding put in front."""
        if self.pads is None:
            return rows
        return padding.reorder(rows, padding.pads_first(self.pads, self.virtual_tokens, self.length))

    def virtual(self, real: torch.Tensor, soft_prompt: torch.Tensor) -> torch.Tensor:
        return self.reorder(torch.cat((soft_prompt, real), dim=1))

    def real(self, ids: torch.Tensor, row: int | None = None) -> torch.Tensor:
        """``ids [rows, virtual tokens]`` as the caller knows them; each row of the batch may stand there several
        times."""
        if self.pads is None:
            return ids[:, self.virtual_tokens + self.hidden :]
        pads = self.pads[row].reshape(1) if row is not None else self.pads
        pads = pads.repeat_interleave(len(ids) // len(pads)).unsqueeze(1)
        place = torch.arange(self.hidden, ids.shape[1] - self.virtual_tokens, device=ids.device).unsqueeze(0)
        return ids.gather(1, torch.where(place < pads, place, place + self.virtual_tokens))


class _Processor:
    # A logits processor is anything that can be called so.
    def __init__(self, call: Call, processors: Any) -> None:
        self.places, self.processors = call.places, processors
        self.embedded = call.embeds is not None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        return self.processors(input_ids if self.embedded else self.places.real(input_ids), scores)


class _Streamer:
    """The caller's streamer, whose first text is the prompt."""

    def __init__(self, call: Call) -> None:
        self.streamer, self.places, self.begun = call.streamer, call.places, call.embeds is not None

    def put(self, value: torch.Tensor) -> None:
        if not self.begun:
            self.begun, value = True, self._real(value)
        self.streamer.put(value)

    def _real(self, ids: torch.Tensor) -> torch.Tensor:
        pads = None if self.places.pads is None else self.places.pads.to(ids.device)
        places = _Places(self.places.virtual_tokens, self.places.real_tokens, self.places.hidden, pads)
        return places.real(ids)

    def end(self) -> None:
        self.streamer.end()


def _recorder(base_model: Any) -> tuple[Any, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """An empty cache, and the keys and values that each layer hands to it."""
    recorded: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    held = caches.new(base_model)
    kind = type(held)

    def update(self: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        recorded[layer_idx] = (key, value)
        return kind.update(self, key, value, layer_idx, *args, **kwargs)

    held.__class__ = type(kind.__name__, (kind,), {"update": update, "__module__": kind.__module__})
    return held, recorded
