"""Tiny random models of every architecture, and adapters of every method, made without a hub.

Weights are sharpened: with the default initialisation a tiny model answers the same whatever it reads, and a test
passes by accident.
"""

from __future__ import annotations

import inspect
from typing import Any

import peft
import torch
import transformers

VOCAB, HIDDEN, HEADS, KV_HEADS, LAYERS, CONTEXT = 64, 32, 4, 2, 3, 256
VIRTUAL_TOKENS = 5

_LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
}
_GEMMA = {**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8, "tie_word_embeddings": False}

#: architecture -> (config class, its arguments)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", {**_LLAMA_LIKE, "head_dim": 16}),
    "mistral": ("MistralConfig", {**_LLAMA_LIKE, "sliding_window": None}),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3_text": ("Gemma3TextConfig", {**_GEMMA, "sliding_window_pattern": 2}),
    "phi3": ("Phi3Config", {**_LLAMA_LIKE, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}),
    "gpt_neox": ("GPTNeoXConfig", {**_LLAMA_LIKE, "num_key_value_heads": None}),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": HIDDEN,
            "ffn_dim": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": CONTEXT,
            "word_embed_proj_dim": HIDDEN,
            "dropout": 0.0,
        },
    ),
    "bloom": ("BloomConfig", {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}),
    "falcon": (
        "FalconConfig",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "new_decoder_architecture": False,
        },
    ),
}

METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning", "prefix_projection", "multitask_prompt_tuning", "cpt")


class NotInThisPair(Exception):
    """The architecture or method is younger than the installed release."""


def base_model(architecture: str, seed: int = 0) -> Any:
    """A tiny CausalLM in eval mode, with sharp weights."""
    if architecture not in ARCHITECTURES:
        from tests.matrix import zoo

        return zoo.base_model(architecture, seed)
    name, arguments = ARCHITECTURES[architecture]
    try:
        config_class = getattr(transformers, name)
    except (AttributeError, RuntimeError, ImportError) as error:
        raise NotInThisPair(f"no {name} in transformers {transformers.__version__}") from error
    arguments = {name: value for name, value in arguments.items() if value is not None or name == "sliding_window"}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = config_class(vocab_size=VOCAB, **{**arguments, **special})
    torch.manual_seed(seed)
    model = sharpen(transformers.AutoModelForCausalLM.from_config(config), seed)
    model.generation_config.eos_token_id = None
    return model.eval()


def sharpen(model: Any, seed: int) -> Any:
    """`model` with weights so large that what it reads decides what it answers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=generator)
    return model


def adapter_config(method: str, **sizes: int) -> Any:
    """A PeftConfig for `method`; raises NotInThisPair where peft does not have it.

    `sizes` are those of the base model that peft does not find itself.
    """
    common = {"task_type": "CAUSAL_LM", "num_virtual_tokens": VIRTUAL_TOKENS, **sizes}
    if method == "prompt_tuning":
        return peft.PromptTuningConfig(**common)
    if method == "p_tuning":
        return peft.PromptEncoderConfig(encoder_hidden_size=16, **common)
    if method == "prefix_tuning":
        return peft.PrefixTuningConfig(**common)
    if method == "prefix_projection":
        return peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=16, **common)
    if method == "multitask_prompt_tuning":
        return peft.MultitaskPromptTuningConfig(num_tasks=2, num_ranks=1, **common)
    if method == "cpt":
        if not hasattr(peft, "CPTConfig"):
            raise NotInThisPair(f"no CPT in peft {peft.__version__}")
        tokens = list(range(2, 2 + VIRTUAL_TOKENS))
        return peft.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=tokens,
            cpt_mask=[1] * VIRTUAL_TOKENS,
            cpt_tokens_type_mask=[1, 2, 2, 3, 4][:VIRTUAL_TOKENS],
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=0.95,
            opt_projection_epsilon=0.2,
            opt_projection_format_epsilon=0.1,
            **sizes,
        )
    raise ValueError(method)


def wrap(base: Any, method: str, seed: int = 1, name: str = "default", **sizes: int) -> Any:
    """`base` with an untrained but unmistakable adapter."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, adapter_config(method, **sizes), adapter_name=name)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 1.0 if parameter.dim() > 1 else 0.1)
    return model.eval()


def task_ids(method: str, rows: int) -> dict[str, torch.Tensor]:
    return {"task_ids": torch.ones(rows, dtype=torch.long)} if method == "multitask_prompt_tuning" else {}


def accepts(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters
