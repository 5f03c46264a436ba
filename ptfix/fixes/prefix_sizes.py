"""Prefix tuning's keys and values get the shape the model's attention has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix

_MULTI_QUERY = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "multi_query": True}
_WIDE_HEADS = {**_MULTI_QUERY, "multi_query": False, "num_key_value_heads": 2, "head_dim": 16}
_ENCODER_DECODER = {"is_encoder_decoder": True, "num_layers": 2, "d_model": 32, "num_heads": 6, "d_kv": 8}
_KINDS = (_MULTI_QUERY, _WIDE_HEADS, _ENCODER_DECODER)


def key_value_shape(config: dict[str, Any]) -> tuple[int, int] | None:
    """``(key/value heads, head dim)`` by the fields attention modules read, or None where layers differ among
    themselves. Of an encoder-decoder those of the decoder, which alone has a cache."""
    if config.get("global_head_dim") is not None or config.get("per_layer_config") is not None:
        return None  # gemma4: peft sizes these layer by layer
    names = ("decoder_attention_heads", "num_attention_heads", "n_head", "n_heads", "num_heads")
    heads = next((config[name] for name in names if config.get(name)), None)
    hidden = next((config[name] for name in ("hidden_size", "n_embd", "d_model") if config.get(name)), None)
    if heads is None or hidden is None:
        return None
    head_dim = config.get("head_dim") or config.get("d_kv") or hidden // heads
    if _has_one_head(config):
        return 1, head_dim
    return config.get("num_key_value_heads") or config.get("num_kv_heads") or heads, head_dim


def _has_one_head(config: dict[str, Any]) -> bool:
    """Multi-query attention: one head of keys and values for all queries."""
    return bool(config.get("multi_query") and not config.get("new_decoder_architecture"))


def _kind(config: dict[str, Any]) -> tuple[bool, bool]:
    """A kind of attention that a release of peft sizes right or wrong as one."""
    return bool(config.get("is_encoder_decoder")), _has_one_head(config)


def _decoder_layers(config: dict[str, Any]) -> int:
    return config.get("decoder_layers") or config.get("num_decoder_layers") or 0


def _wrap(original: Callable[..., Any]) -> Callable[..., Any]:
    wrong = {_kind(config) for config in _KINDS if _is_wrong(original, config)}

    @functools.wraps(original)
    def prepare(peft_config: Any, model_config: Any) -> Any:
        sized_by_hand = peft_config.token_dim is not None or peft_config.num_attention_heads is not None
        fields = model_config.to_dict() if hasattr(model_config, "to_dict") else model_config
        fields = fields.get("text_config") or fields
        # Only the kind of attention that this peft gets wrong: what it sizes right, it may size for reasons of its own.
        ours = peft_config.peft_type == "PREFIX_TUNING" and not sized_by_hand and _kind(fields) in wrong
        shape = key_value_shape(fields) if ours else None
        # An encoder's width has always followed the hidden size, whatever the keys and values measure.
        result = original(peft_config, model_config)
        if shape is not None:
            heads, head_dim = shape
            result.num_attention_heads, result.token_dim = heads, heads * head_dim
            if fields.get("is_encoder_decoder"):  # peft counts the encoder's; more than the decoder has do no harm
                result.num_layers = max(result.num_layers, _decoder_layers(fields))
        return result

    return prepare


def _is_wrong(prepare: Callable[..., Any], config: dict[str, Any]) -> bool:
    from peft import PrefixTuningConfig

    heads, head_dim = key_value_shape(config) or (0, 0)
    sized = prepare(PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1), dict(config))
    return (sized.num_attention_heads, sized.token_dim) != (heads, heads * head_dim)


def _probe() -> str | None:
    from peft.peft_model import _prepare_prompt_learning_config as prepare  # the name that is edited

    if any(_is_wrong(prepare, config) for config in _KINDS):
        return "a prefix for grouped or multi-query attention, or for an encoder-decoder, gets the wrong shape"
    return None


FIX = Fix(
    id="prefix-sizes",
    why="prefix tuning on grouped/multi-query attention, t5, or with head_dim != hidden/heads raises a shape mismatch",
    link="https://github.com/huggingface/peft/pull/1901",
    affects={},
    probe=_probe,
    edits=(
        Edit("peft.peft_model:_prepare_prompt_learning_config", _wrap, ("peft_config", "model_config")),
        # get_peft_model sizes the config itself up to 0.17, from a module that was renamed in 0.15
        Edit("peft.mapping:_prepare_prompt_learning_config", _wrap, ("peft_config", "model_config"), optional=True),
        Edit(
            "peft.mapping_func:_prepare_prompt_learning_config", _wrap, ("peft_config", "model_config"), optional=True
        ),
    ),
    retire_when="peft reads multi_query (0.21.2 does not)",
)
