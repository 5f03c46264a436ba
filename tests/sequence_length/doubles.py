"""A small decoder with the two position tricks of Qwen v1, and tiny models of the families with a table of positions.

The double is written from what Qwen's maintainers documented (QwenLM/Qwen#1042), not from their file: beyond
``seq_length`` tokens, and only when the model is not in training mode, the rotary base grows with the length (dynamic
NTK) and queries grow with the logarithm of their position (logn attention).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

VOCAB, HIDDEN, HEADS, NATIVE = 64, 32, 4, 64
HARD_LIMIT = 48


class QwenV1Config(transformers.PretrainedConfig):  # type: ignore[misc]
    model_type = "qwen_v1_double"

    def __init__(
        self, seq_length: int = NATIVE, use_dynamic_ntk: bool = True, use_logn_attn: bool = True, **rest: Any
    ) -> None:
        self.seq_length, self.use_dynamic_ntk, self.use_logn_attn = seq_length, use_dynamic_ntk, use_logn_attn
        self.vocab_size, self.hidden_size, self.num_attention_heads, self.num_hidden_layers = VOCAB, HIDDEN, HEADS, 2
        self.max_position_embeddings = 4 * seq_length  # as the real one: a promise about inference
        self.dropout = 0.2
        super().__init__(**rest)


class _Attention(nn.Module):
    def __init__(self, config: QwenV1Config) -> None:
        super().__init__()
        self.config, self.width = config, HIDDEN // HEADS
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, hidden: torch.Tensor, blocked: torch.Tensor) -> torch.Tensor:
        rows, length, _ = hidden.shape
        parts = self.qkv(hidden).view(rows, length, 3, HEADS, self.width).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        native, positions = self.config.seq_length, torch.arange(length, device=hidden.device)
        base = 10000.0
        if self.config.use_dynamic_ntk and not self.training and length > native:
            alpha = 2 ** math.ceil(math.log2(length / native) + 1) - 1
            base *= alpha ** (self.width / (self.width - 2))
        angles = positions[:, None] / base ** (torch.arange(0, self.width, 2, device=hidden.device) / self.width)
        query, key = (_turned(one, angles) for one in (query, key))
        if self.config.use_logn_attn and not self.training and length > native:
            query = query * (torch.log(positions + 1.0) / math.log(native)).clamp(min=1)[:, None].to(query.dtype)
        scores = (query @ key.transpose(-1, -2) / math.sqrt(self.width)).masked_fill(blocked, float("-inf"))
        mixed = self.drop(scores.softmax(-1)) @ value
        return self.out(mixed.transpose(1, 2).reshape(rows, length, HIDDEN))


def _turned(one: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    first, second = one.chunk(2, -1)
    cos, sin = angles.cos().to(one.dtype), angles.sin().to(one.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class QwenV1Model(transformers.PreTrainedModel):  # type: ignore[misc]
    config_class = QwenV1Config
    base_model_prefix = "transformer"

    def __init__(self, config: QwenV1Config) -> None:
        super().__init__(config)
        self.wte = nn.Embedding(VOCAB, HIDDEN)
        self.h = nn.ModuleList(_Attention(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **unused: Any) -> BaseModelOutputWithPast:
        length = input_ids.shape[1]
        blocked = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)[None, None]
        if attention_mask is not None:
            blocked = blocked | (attention_mask[:, None, None, :] == 0)
            blocked = blocked & ~torch.eye(length, dtype=torch.bool, device=input_ids.device)
        hidden = self.wte(input_ids)
        for layer in self.h:
            hidden = hidden + layer(hidden, blocked)
        return BaseModelOutputWithPast(last_hidden_state=hidden)


class QwenV1ForCausalLM(transformers.PreTrainedModel):  # type: ignore[misc]
    config_class = QwenV1Config
    base_model_prefix = "transformer"

    def __init__(self, config: QwenV1Config) -> None:
        super().__init__(config)
        self.transformer = QwenV1Model(config)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: torch.Tensor, labels: Any = None, **options: Any) -> CausalLMOutputWithPast:
        logits = self.lm_head(self.transformer(input_ids, **options).last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def sharpened(model: Any) -> Any:
    """Weights so large that another position gives another answer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=generator)
    return model.eval()


def qwen_v1(**options: Any) -> Any:
    torch.manual_seed(0)
    return sharpened(QwenV1ForCausalLM(QwenV1Config(**options)))


_GPT = {"n_embd": HIDDEN, "n_layer": 1, "n_head": HEADS, "n_positions": HARD_LIMIT}
_ROTARY = {**_GPT, "rotary_dim": 4, "tie_word_embeddings": False}

#: family -> (config class, its arguments)
HARD_TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT),
    "opt": (
        "OPTConfig",
        {
            "hidden_size": HIDDEN,
            "ffn_dim": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "max_position_embeddings": HARD_LIMIT,
            "word_embed_proj_dim": HIDDEN,
        },
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "hidden_size": HIDDEN,
            "num_layers": 1,
            "attention_types": [[["global"], 1]],
            "num_heads": HEADS,
            "max_position_embeddings": HARD_LIMIT,
        },
    ),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT),
    "gptj": ("GPTJConfig", _ROTARY),
    "codegen": ("CodeGenConfig", {**_ROTARY, "n_ctx": HARD_LIMIT}),
    "mpt": ("MptConfig", {"d_model": HIDDEN, "n_layers": 1, "n_heads": HEADS, "max_seq_len": HARD_LIMIT}),
    "biogpt": (
        "BioGptConfig",
        {
            "hidden_size": HIDDEN,
            "num_hidden_layers": 1,
            "num_attention_heads": HEADS,
            "intermediate_size": 64,
            "max_position_embeddings": HARD_LIMIT,
        },
    ),
}


def tiny(config: str, arguments: dict[str, Any]) -> Any:
    """A tiny CausalLM of a config class of transformers."""
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = getattr(transformers, config)(vocab_size=VOCAB, **special, **arguments)
    return sharpened(transformers.AutoModelForCausalLM.from_config(made))


def with_table(family: str) -> Any:
    """A tiny model that has HARD_LIMIT positions."""
    return tiny(*HARD_TABLES[family])


LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": NATIVE,
}


def llama(rope: dict[str, Any] | None = None, **more: Any) -> Any:
    """A tiny Llama; `rope` in the layout that every release understands."""
    arguments = {**LLAMA, **more}
    if rope is not None:
        # Releases before 4.45 want `type` and refuse other keys than they know.
        old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 45)
        scheme = {"type" if old else "rope_type": rope["rope_type"]}
        arguments["rope_scaling"] = {**scheme, **{k: v for k, v in rope.items() if k != "rope_type"}}
        if int(transformers.__version__.split(".")[0]) >= 5:
            arguments["rope_scaling"]["rope_theta"] = 10000.0
    return tiny("LlamaConfig", arguments)
