"""What ptfix needs to know about a soft prompt: its length, its embeddings or its keys and values.

Prompt-like methods (prompt tuning, p-tuning, multitask prompt tuning, CPT) put embeddings before the text; prefix
tuning puts keys and values into every layer's KV cache. Both occupy ``num_virtual_tokens`` positions in front of the
real tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ptfix.soft_prompts import tensor_parallel

#: A prefix, layer by layer: ``(key, value)``, each ``[batch, kv heads, virtual tokens, head dim]``; None for a layer
#: that takes none.
KeyValues = list[tuple[torch.Tensor, torch.Tensor] | None]

#: peft types whose soft prompt lives in the KV cache; every other prompt-learning type has embeddings.
_PREFIX_TYPES = ("PREFIX_TUNING", "CARTRIDGE")


def active_config(peft_model: Any) -> Any:
    """The PeftConfig of the active adapter (an old peft has no ``active_peft_config``)."""
    return peft_model.peft_config[peft_model.active_adapter]


def is_encoder_decoder(model: Any) -> bool:
    """Does it read one text and write another (t5, bart)?"""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def has_soft_prompt(peft_model: Any) -> bool:
    """Is the active adapter a prompt-learning one for language modelling, and switched on?"""
    import peft

    base = peft_model.base_model
    kind = peft.PeftModelForSeq2SeqLM if is_encoder_decoder(base) else peft.PeftModelForCausalLM
    if not isinstance(peft_model, kind) or not active_config(peft_model).is_prompt_learning:
        return False
    return not is_switched_off(peft_model)


def is_switched_off(peft_model: Any) -> bool:
    """Is this inside disable_adapter()? It hangs the base model's forward on the PeftModel; that is the one sign all
    releases of peft share."""
    return bool(vars(peft_model).get("forward") == peft_model.base_model.forward)


def has_prefix(peft_model: Any) -> bool:
    """Is the active soft prompt a prefix: keys and values in the KV cache?"""
    return has_soft_prompt(peft_model) and SoftPrompt(peft_model).is_prefix


def host_model(peft_model: Any) -> Any:
    """The transformers model inside, also where the soft prompt was put on another PeftModel (LoRA, whose layers are
    part of it).

    Raises:
        ValueError: that PeftModel has a soft prompt of its own.
    """
    model = peft_model.base_model
    while hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        if has_soft_prompt(model):
            raise ValueError(
                "a soft prompt on another soft prompt cannot be generated with or continued: train one adapter with "
                "the virtual tokens of both."
            )
        model = model.get_base_model()
    return model


@dataclass(frozen=True)
class SoftPrompt:
    """The active soft prompt of a PeftModel, read when asked, never stored on a shared object."""

    peft_model: Any

    @property
    def config(self) -> Any:
        return active_config(self.peft_model)

    @property
    def length(self) -> int:
        """Number of virtual tokens."""
        return int(self.config.num_virtual_tokens)

    @property
    def in_decoder(self) -> int:
        """Number of virtual tokens in front of what an encoder-decoder writes; the others stand before what it reads.

        peft gives prompt tuning and p-tuning a part for the decoder too, and never uses it.
        """
        if self.is_prefix:
            return self.length
        both = self.config.num_transformer_submodules == 2
        return self.length if both and self.config.peft_type == "MULTITASK_PROMPT_TUNING" else 0

    @property
    def in_encoder(self) -> int:
        """Number of virtual tokens in front of what an encoder-decoder reads."""
        return 0 if self.is_prefix else self.length

    @property
    def is_prefix(self) -> bool:
        """Does the prompt consist of keys and values (prefix tuning) rather than embeddings?"""
        return self.config.peft_type in _PREFIX_TYPES

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Word embeddings ``[batch, tokens, hidden]`` of real tokens, by the module peft trains with."""
        embeddings: torch.Tensor = self.peft_model.word_embeddings(input_ids)
        return embeddings

    def embeddings(self, batch_size: int, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        """The soft prompt ``[batch, virtual tokens, hidden]`` of a prompt-like method, exactly as forward() makes
        it."""
        prompt: torch.Tensor = self.peft_model.get_prompt(batch_size=batch_size, task_ids=task_ids)
        return prompt

    def key_values(self, batch_size: int) -> KeyValues:
        """The prefix as the adapter stores it: of the same shape in every layer.

        Made from the prompt encoder's output alone: how a model's layers and caches hold it, `caches` knows.
        """
        config, peft_model = self.config, self.peft_model
        encoder = peft_model.prompt_encoder[peft_model.active_adapter]
        weight = encoder.embedding.weight
        if config.inference_mode:
            # A saved adapter holds what the projection put out, not what went in.
            flat = weight.unsqueeze(0)
        else:
            tokens = peft_model.prompt_tokens[peft_model.active_adapter][: self.length]
            flat = encoder(tokens.unsqueeze(0).to(weight.device))
        if peft_model.base_model_torch_dtype is not None:
            flat = flat.to(peft_model.base_model_torch_dtype)
        heads = config.num_attention_heads
        flat = flat.view(1, self.length, config.num_layers, 2, heads, config.token_dim // heads)
        layers = flat.permute(2, 3, 0, 4, 1, 5).expand(-1, -1, batch_size, -1, -1, -1)
        base = peft_model.base_model
        if tensor_parallel.is_split(base):
            return [
                (tensor_parallel.share(key, index, base), tensor_parallel.share(value, index, base))
                for index, (key, value) in enumerate(layers)
            ]
        return [(layer[0], layer[1]) for layer in layers]
