"""Every decoder-only architecture of the installed transformers, tiny: the list is the host's own, not ours.

A config is shrunk by the names of its fields. Sizes that only make sense together stand in `SIZES`. The twelve
architectures of `models` go through every mode; these go through the questions that an architecture can tell apart.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.matrix.models import CONTEXT, HEADS, HIDDEN, KV_HEADS, VOCAB, NotInThisPair, sharpen

HEAD_DIM = HIDDEN // HEADS
#: Shorter than the texts of the tests.
WINDOW = 8

#: How large the fields of a config become, whatever it is a config of. No weight but the embeddings has VOCAB rows:
#: by that peft finds them.
_SMALL = {
    name: size
    for size, names in (
        (HIDDEN, "hidden_size n_embd d_model dim model_dim word_embed_proj_dim embedding_size lru_width"),
        (48, "intermediate_size n_inner ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim"),
        (
            HIDDEN,
            "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size shared_intermediate_size",
        ),
        (2, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth"),
        (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
        (KV_HEADS, "num_key_value_heads"),
        (HEAD_DIM, "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim"),
        (CONTEXT, "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx"),
        (4, "num_experts num_local_experts n_routed_experts rotary_dim"),
        (2, "num_experts_per_tok moe_topk num_experts_per_token"),
        (1, "n_group topk_group num_shared_experts n_shared_experts bos_token_id"),
        (WINDOW, "sliding_window window_size attention_window_size"),
        (8, "q_lora_rank kv_lora_rank"),
        (0, "pad_token_id"),
    )
    for name in names.split()
}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

#: architecture -> what its config needs beside the common sizes
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 0,
    "global_head_dim": 2 * HEAD_DIM,
    "hidden_size_per_layer_input": 0,
}
_SMALL_VISION = {
    "hidden_size": HIDDEN,
    "depth": 2,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": HIDDEN,
    "embed_dim": HIDDEN,
}
SIZES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "ctrl": {"dff": 2 * HIDDEN},
    "falcon_h1": _MAMBA,
    "gemma4_text": _GEMMA4,
    "gemma4": {"text_config": _GEMMA4},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "moe_topk": 2},
    "gemma3n_text": {
        "intermediate_size": [48, 48],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "kimi_linear": {"linear_head_dim": HEAD_DIM, "linear_num_heads": HEADS},
    "lara_mini": _LINEAR,
    "qwen4_exp_text": {**_LINEAR, "indexer_n_heads": HEADS, "indexer_kv_heads": 1, "indexer_head_dim": HEAD_DIM},
    "xglm": {"attention_heads": HEADS},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"head_dim": HEAD_DIM, "num_key_value_heads": KV_HEADS},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe"],
        "n_groups": 1,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "moe_shared_expert_intermediate_size": HIDDEN,
    },
    "qwen2_5_vl": {"text_config": _MROPE, "vision_config": _SMALL_VISION},
    "qwen2_vl": {"text_config": _MROPE, "vision_config": _SMALL_VISION},
    "qwen3_vl": {"text_config": {}, "vision_config": _SMALL_VISION},
    "glm4v": {"text_config": _MROPE, "vision_config": _SMALL_VISION},
    "qwen3_5": {"text_config": _LINEAR},
    "qwen3_5_moe": {"text_config": _LINEAR},
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zaya": {"num_experts_per_tok": 1},
}

#: Made of images and text, and asked with text alone: in no list of causal models.
WITH_IMAGES = ("paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "idefics3", "mistral3", "internvl", "glm4v")

#: What stock peft trains in every release that has it, or the tiny sizes have gone wrong.
WELL_KNOWN = frozenset(
    (
        *("bloom", "codegen", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neo"),
        *("gpt_neox", "gptj", "granite", "llama", "mistral", "mixtral", "olmo", "opt", "persimmon", "phi", "phi3"),
        *("qwen2", "qwen2_moe", "qwen3", "stablelm", "starcoder2"),
    )
)

#: What peft does not find in these configs and its users give by hand.
_BY_HAND = {"num_layers": 2, "num_attention_heads": HEADS, "token_dim": HIDDEN}
_WITHOUT_SIZES = ("mpt", "xglm", "rwkv", "mamba", "falcon_mamba")


def adapter_sizes(architecture: str, method: str) -> dict[str, int]:
    """The sizes that peft does not find itself for an adapter of `method`; empty for most."""
    if architecture in _WITHOUT_SIZES:
        return _BY_HAND
    if architecture == "falcon" and method.startswith("prefix"):  # one key for all heads
        return {"num_attention_heads": 1, "token_dim": HEAD_DIM}
    return {}


@functools.cache
def architectures() -> tuple[str, ...]:
    """The names of all that the installed transformers makes a causal language model of."""
    pictured = getattr(modeling_auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {})
    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return tuple(sorted(causal | {name for name in WITH_IMAGES if name in pictured}))


def base_model(architecture: str, seed: int = 0) -> Any:
    """A tiny sharp model in eval mode; raises NotInThisPair where none can be made."""
    if architecture not in architectures():
        raise NotInThisPair(f"no {architecture} in transformers {transformers.__version__}")
    torch.manual_seed(seed)
    try:
        default = CONFIG_MAPPING[architecture]()
        config = type(default)(**_small(default, SIZES.get(architecture, {})))
        model = sharpen(_automatic(architecture).from_config(config), seed)
    except Exception as error:  # whatever a host says to sizes that it does not take
        raise NotInThisPair(f"{architecture} cannot be made tiny: {type(error).__name__}: {error}") from error
    model.generation_config.eos_token_id = None
    return model.eval()


def _automatic(architecture: str) -> Any:
    if architecture in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForImageTextToText


def _small(default: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a small config of the kind of `default`."""
    fixed = {name for name, value in inspect.getmembers(type(default)) if isinstance(value, property)}
    given = {name: size for name, size in _SMALL.items() if name not in fixed and _held(default, name)}
    if "qk_rope_head_dim" in given:  # latent attention: a key for each head
        given["num_key_value_heads"] = HEADS
    if _held(default, "tie_word_embeddings"):
        given["tie_word_embeddings"] = False  # or a sharp model repeats what it read last, whatever stands before
    given |= {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    depth = next((getattr(default, name) for name in _DEPTHS if getattr(default, name, None)), None)
    layers = 2
    for name, value in vars(default).items():
        if isinstance(value, transformers.PretrainedConfig):
            given[name] = _small(value, sizes.get(name, {}))
        elif isinstance(value, list) and depth and len(value) == depth and len(_each_kind(value)) <= 3:
            given[name] = _each_kind(value)
            layers = max(layers, len(given[name]))
    for name, value in given.items():
        if name in _DEPTHS:
            given[name] = layers
        elif isinstance(value, list):
            given[name] = (value * layers)[:layers]
    nested = {name: {**given.get(name, {}), **value} for name, value in sizes.items() if name.endswith("_config")}
    return given | sizes | nested


def _held(config: Any, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except RuntimeError:  # differs from layer to layer
        return False


def _each_kind(per_layer: list[Any]) -> list[Any]:
    """Every kind of layer once, in the order in which they come."""
    return list({repr(kind): kind for kind in per_layer}.values())
