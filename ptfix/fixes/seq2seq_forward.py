"""The training forward of an encoder-decoder with a soft prompt: the decoder reads the prefix, the encoder's text too.

Releases disagree on the KV cache that carries a prefix. Some raise; others let cross-attention read the prefix in place
of the text (always, or where the text is as long as the prefix), or the decoder look at its own future.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


@functools.cache
def _two_submodules_fail() -> bool:
    # Asked before the first commit, of the host as it is: see _probe.
    from ptfix.soft_prompts.proof import probes

    return probes.seq2seq_prefix_fault(submodules=2) is not None


def _is_ours(peft_model: Any) -> bool:
    """Has this encoder-decoder a prefix that the host does not read? What the host reads right stays its own."""
    from ptfix.soft_prompts import adapter

    if not adapter.is_encoder_decoder(peft_model.base_model) or not adapter.has_prefix(peft_model):
        return False
    return _two_submodules_fail() or adapter.active_config(peft_model).num_transformer_submodules != 2


def _wrap_get_prompt(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import seq2seq
    from ptfix.soft_prompts.adapter import SoftPrompt

    @functools.wraps(original)
    def get_prompt(self: Any, batch_size: int, *args: Any, **kwargs: Any) -> Any:
        if not _is_ours(self):
            return original(self, batch_size, *args, **kwargs)
        base = self.base_model
        return seq2seq.with_prefix(None, seq2seq.prefix_of(SoftPrompt(self), batch_size, base), base)

    return get_prompt


def _wrap_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import adapter, seq2seq

    names = tuple(inspect.signature(original).parameters)[1:]

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not adapter.has_soft_prompt(self):
            return original(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return seq2seq.forward(original, self, given)

    return forward


def _wrap_init(original: Callable[..., Any]) -> Callable[..., Any]:
    from ptfix.soft_prompts import seq2seq

    @functools.wraps(original)
    def init(self: Any, model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        seq2seq.refuse_what_reads_no_text(model, peft_config)
        original(self, model, peft_config, *args, **kwargs)

    return init


def _probe() -> str | None:
    from ptfix.soft_prompts.proof import probes

    _two_submodules_fail()  # kept, for it cannot be asked of the host any more once the fix is on
    return probes.seq2seq_prefix_fault(submodules=2) or probes.seq2seq_prefix_fault(submodules=1)


FIX = Fix(
    id="seq2seq-forward",
    why="the forward of an encoder-decoder raises with a prefix, or its decoder reads another text or its own future",
    link="https://github.com/huggingface/peft/pull/2096",
    affects={},
    probe=_probe,
    edits=(
        Edit("peft.peft_model:PeftModel.get_prompt", _wrap_get_prompt, ("self", "batch_size")),
        Edit("peft.peft_model:PeftModelForSeq2SeqLM.forward", _wrap_forward, ("self", "kwargs")),
        Edit("peft.peft_model:PeftModelForSeq2SeqLM.__init__", _wrap_init, ("self", "model", "peft_config")),
    ),
    retire_when="peft gives the decoder the same cache whatever num_transformer_submodules is (0.21.2 does not)",
)
