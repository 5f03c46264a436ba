"""Encoder-decoders: every way of generating and training, each compared with the adapter's own training forward.

The same ideas as `modes`, with a text to read and another to write. The truth of an answer is the training forward of
the row alone with the answer as labels.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from transformers import LogitsProcessor, LogitsProcessorList

from tests.matrix.models import VIRTUAL_TOKENS, VOCAB, sharpen
from tests.matrix.modes import Pairs

NEW = 4

_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "forced_eos_token_id": None,
    "dropout": 0.0,
}
#: architecture -> (class of its config and of the model, their arguments)
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5", {**_T5, "decoder_start_token_id": 0, "dropout_rate": 0.0}),
    "mt5": ("MT5", {**_T5, "decoder_start_token_id": 0, "dropout_rate": 0.0, "tie_word_embeddings": False}),
    "bart": ("Bart", {**_BART, "decoder_start_token_id": 2, "scale_embedding": True}),
}

METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning", "multitask_prompt_tuning")


@dataclass
class Bench:
    """One architecture and method: the base model, the adapter on it (or the base alone), and the truth."""

    base: Any
    model: Any
    tasks: bool = False  #: does it need task_ids?

    @property
    def ids(self) -> torch.Tensor:
        return torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(7))

    @property
    def bare(self) -> bool:
        return self.model is self.base

    def task_ids(self, rows: int) -> dict[str, torch.Tensor]:
        return {"task_ids": torch.ones(rows, dtype=torch.long)} if self.tasks else {}

    def truth(self, ids: torch.Tensor, answer: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """What the training forward says at each token of `answer` ``[tokens]``, and which `ids` are read."""
        texts = {"input_ids": ids} if "inputs_embeds" not in inputs else {}
        with torch.no_grad():
            logits: torch.Tensor = self.model(**texts, labels=answer[None], **self.task_ids(1), **inputs).logits[0]
        return logits[-len(answer) :]

    def generate(self, *args: Any, rows: int = 1, **options: Any) -> Any:
        options = {
            "max_new_tokens": NEW,
            "do_sample": False,
            "output_scores": True,
            "return_dict_in_generate": True,
            **self.task_ids(rows),
            **options,
        }
        return self.model.generate(*args, **options)


def base_model(architecture: str, **sizes: Any) -> Any:
    family, fields = ARCHITECTURES[architecture]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=1, **{**fields, **sizes}
    )
    model = sharpen(getattr(transformers, f"{family}ForConditionalGeneration")(config), seed=0)
    model.generation_config.eos_token_id = None
    return model.eval()


def adapter_config(method: str, submodules: int | None) -> Any:
    common = {
        "task_type": "SEQ_2_SEQ_LM",
        "num_virtual_tokens": VIRTUAL_TOKENS,
        "num_transformer_submodules": submodules,
    }
    if method == "prompt_tuning":
        return peft.PromptTuningConfig(**common)
    if method == "p_tuning":
        return peft.PromptEncoderConfig(encoder_hidden_size=16, **common)
    if method == "prefix_tuning":
        return peft.PrefixTuningConfig(**common)
    return peft.MultitaskPromptTuningConfig(num_tasks=2, num_ranks=1, **common)


def bare(architecture: str) -> Bench:
    base = base_model(architecture)
    return Bench(base, base)


def bench(architecture: str, method: str, submodules: int | None = None, **sizes: Any) -> Bench:
    """With an untrained but unmistakable adapter."""
    base = base_model(architecture, **sizes)
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(base), adapter_config(method, submodules)).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 1.0 if parameter.dim() > 1 else 0.1)
    return Bench(base, model, tasks=method == "multitask_prompt_tuning")


# --- modes -------------------------------------------------------------------------------------------------------


def _pairs(b: Bench, out: Any, rows: list[torch.Tensor], **inputs: Any) -> Pairs:
    """The scores of each row of an answer and their truth, and that they are not the base model's."""
    scores = torch.stack(out.scores, dim=1)
    pairs = []
    for row, ids in enumerate(rows):
        answer = out.sequences[row, -scores.shape[1] :]
        pairs.append((scores[row], b.truth(ids, answer, **inputs)))
    return pairs


def greedy(b: Bench) -> Pairs:
    out = b.generate(input_ids=b.ids, attention_mask=torch.ones_like(b.ids))
    if not b.bare:
        plain = b.base.generate(input_ids=b.ids, max_new_tokens=1, output_scores=True, return_dict_in_generate=True)
        assert (plain.scores[0] - out.scores[0]).abs().max() > 0.1, "the soft prompt has no effect"
    return _pairs(b, out, [b.ids])


def by_position(b: Bench) -> Pairs:
    return _pairs(b, b.generate(b.ids), [b.ids])


def no_cache(b: Bench) -> Pairs:
    return _pairs(b, b.generate(input_ids=b.ids, use_cache=False), [b.ids])


def as_long_as_the_prompt(b: Bench) -> Pairs:
    """A text of as many tokens as the soft prompt, and one of as many as both together."""
    texts = [b.ids[:, :VIRTUAL_TOKENS], torch.cat((b.ids, b.ids[:, :1]), dim=1)]
    return [pair for ids in texts for pair in _pairs(b, b.generate(input_ids=ids), [ids])]


def _padded(b: Bench, left: bool) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    pads = b.ids.new_zeros(1, 4)
    short = b.ids[:, 4:]
    ids = torch.cat((b.ids, torch.cat((pads, short) if left else (short, pads), dim=1)))
    return ids, (ids != 0).long(), [b.ids, short]


def left_padded(b: Bench) -> Pairs:
    ids, mask, rows = _padded(b, left=True)
    return _pairs(b, b.generate(input_ids=ids, attention_mask=mask, rows=2), rows)


def right_padded(b: Bench) -> Pairs:
    ids, mask, rows = _padded(b, left=False)
    return _pairs(b, b.generate(input_ids=ids, attention_mask=mask, rows=2), rows)


def padded_forward(b: Bench) -> Pairs:
    """The training forward, with padding on either side."""
    answer = torch.randint(3, VOCAB, (2, 3), generator=torch.Generator().manual_seed(8))
    pairs = []
    for left in (True, False):
        ids, mask, rows = _padded(b, left)
        with torch.no_grad():
            logits = b.model(input_ids=ids, attention_mask=mask, labels=answer, **b.task_ids(2)).logits[:, -3:]
        pairs += [(logits[row], b.truth(rows[row], answer[row])) for row in range(2)]
    return pairs


def decoder_ids_forward(b: Bench) -> Pairs:
    """decoder_input_ids beside the labels, as data collators make them."""
    answer = torch.randint(3, VOCAB, (1, 3), generator=torch.Generator().manual_seed(8))
    start = torch.full((1, 1), b.base.config.decoder_start_token_id)
    given = {"decoder_input_ids": torch.cat((start, answer[:, :-1]), dim=1), "labels": answer}
    with torch.no_grad():
        logits = b.model(input_ids=b.ids, **given, **b.task_ids(1)).logits[0, -3:]
    return [(logits, b.truth(b.ids, answer[0]))]


def causal_forward(b: Bench) -> Pairs:
    answer = torch.randint(3, VOCAB, (4,), generator=torch.Generator().manual_seed(8))
    return [(b.truth(b.ids, answer)[:2], b.truth(b.ids, answer[:2]))]


def uncached_forward(b: Bench) -> Pairs:
    """As Trainer sets it for gradient checkpointing."""
    answer = torch.randint(3, VOCAB, (4,), generator=torch.Generator().manual_seed(8))
    return [(b.truth(b.ids, answer, use_cache=False), b.truth(b.ids, answer))]


def beams(b: Bench) -> Pairs:
    """Every beam says what a search over the training forward says: the sum of its tokens' log-probabilities."""
    ids, mask, rows = _padded(b, left=True)
    out = b.generate(
        input_ids=ids, attention_mask=mask, rows=2, num_beams=3, num_return_sequences=2, length_penalty=0.0
    )
    pairs = []
    for beam, sequence in enumerate(out.sequences):
        answer = sequence[1:]
        truth = b.truth(rows[beam // 2], answer).log_softmax(-1)
        total = truth.gather(1, answer[:, None]).sum()
        pairs.append((out.sequences_scores[beam][None], total[None]))
    return pairs


def sampling(b: Bench) -> Pairs:
    """Two answers to each row; the scores that are drawn from are the truth's, and a seed gives them again."""
    ids, mask, rows = _padded(b, left=True)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(
            b.generate(input_ids=ids, attention_mask=mask, rows=2, do_sample=True, top_k=0, num_return_sequences=2)
        )
    return [*_pairs(b, draws[0], [rows[0], rows[0], rows[1], rows[1]]), (draws[0].sequences, draws[1].sequences)]


def own_processor(b: Bench) -> Pairs:
    """A processor of the caller's reads what the decoder wrote, and nothing virtual."""
    read: list[torch.Tensor] = []

    class Reading(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            read.append(input_ids.clone())
            return scores

    out = b.generate(input_ids=b.ids, logits_processor=LogitsProcessorList([Reading()]))
    return [*_pairs(b, out, [b.ids]), *((ids, out.sequences[:, : ids.shape[1]]) for ids in read)]


def static_cache(b: Bench) -> Pairs:
    ids, mask, rows = _padded(b, left=False)
    options: dict[str, Any] = {"cache_implementation": "static"}
    if hasattr(b.base.generation_config, "disable_compile"):
        options["disable_compile"] = True
    return _pairs(b, b.generate(input_ids=ids, attention_mask=mask, rows=2, **options), rows)


def assisted(b: Bench) -> Pairs:
    assistant = copy.deepcopy(b.base)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return _pairs(b, b.generate(input_ids=b.ids, assistant_model=assistant, max_new_tokens=8), [b.ids])


def prompt_lookup(b: Bench) -> Pairs:
    return _pairs(b, b.generate(input_ids=b.ids, prompt_lookup_num_tokens=2, max_new_tokens=8), [b.ids])


def embedded(b: Bench) -> Pairs:
    """inputs_embeds, as the model embeds its text."""
    words = b.base.get_input_embeddings()(b.ids)
    with torch.no_grad():
        return _pairs(b, b.generate(inputs_embeds=words), [b.ids], inputs_embeds=words)


def encoder_outputs(b: Bench) -> Pairs:
    """Those of the base model: a prefix stands in the decoder; else the text beside them is read anew."""
    with torch.no_grad():
        read = b.base.get_encoder()(input_ids=b.ids, return_dict=True)
    return _pairs(b, b.generate(input_ids=b.ids, encoder_outputs=read), [b.ids])


def decoder_ids(b: Bench) -> Pairs:
    """An answer whose beginning is given."""
    begun = torch.tensor([[b.base.config.decoder_start_token_id, 5, 6]])
    out = b.generate(input_ids=b.ids, decoder_input_ids=begun)
    return [(torch.cat(out.scores), b.truth(b.ids, out.sequences[0, 1:])[-len(out.scores) :])]


def disabled(b: Bench) -> Pairs:
    options = {"input_ids": b.ids, "max_new_tokens": NEW, "output_scores": True, "return_dict_in_generate": True}
    with contextlib.nullcontext() if b.bare else b.model.disable_adapter():
        off = b.model.generate(**options)
    on = b.generate(input_ids=b.ids)
    return [(torch.cat(off.scores), torch.cat(b.base.generate(**options).scores)), *_pairs(b, on, [b.ids])]


def two_threads(b: Bench) -> Pairs:
    """Two texts at once, of two lengths."""
    texts = [b.ids, b.ids[:, 3:]]
    found: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda at=at, ids=ids: found.update({at: b.generate(input_ids=ids)}))
        for at, ids in enumerate(texts)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [pair for at, ids in enumerate(texts) for pair in _pairs(b, found[at], [ids])]


def interrupted(b: Bench) -> Pairs:
    """After an error in the middle, nothing is left on the base model, and the next call is right."""

    class Failing(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

    inner = b.model if b.bare else b.model.get_base_model()
    before = {id(module): dict(vars(module)) for module in inner.modules()}
    with contextlib.suppress(KeyboardInterrupt):
        b.generate(input_ids=b.ids, logits_processor=LogitsProcessorList([Failing()]))
    after = {id(module): dict(vars(module)) for module in inner.modules()}
    left = {name for key in after for name in after[key].keys() - before[key].keys()}
    if not b.bare:
        assert not left, f"left on the base model: {left}"
    return _pairs(b, b.generate(input_ids=b.ids), [b.ids])


MODES: dict[str, Callable[[Bench], Pairs]] = {
    function.__name__: function
    for function in (
        greedy,
        by_position,
        no_cache,
        as_long_as_the_prompt,
        left_padded,
        right_padded,
        padded_forward,
        decoder_ids_forward,
        causal_forward,
        uncached_forward,
        beams,
        sampling,
        own_processor,
        static_cache,
        assisted,
        prompt_lookup,
        embedded,
        encoder_outputs,
        decoder_ids,
        disabled,
        two_threads,
        interrupted,
    )
}


def judge(mode: str, b: Bench) -> str:
    """``exact``, ``wrong: ...`` or ``raises: ...``"""
    try:
        pairs = list(MODES[mode](b))
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:
        return f"raises: {type(error).__name__}: {str(error)[:160]}"
    for number, (got, truth) in enumerate(pairs):
        if got.shape != truth.shape:
            return f"wrong: #{number} shape {tuple(got.shape)} in place of {tuple(truth.shape)}"
        if got.is_floating_point():
            off = float((got.float() - truth.float()).abs().max())
            if not off < 2e-3:
                return f"wrong: #{number} off by {off:.3g}"
        elif not torch.equal(got, truth):
            return f"wrong: #{number} {got.tolist()} in place of {truth.tolist()}"
    return "exact"


def host_can(mode: str, bare: Bench) -> bool:
    """Is the base model alone exact in this mode? Left padding moves the positions of bart's own text: there a soft
    prompt may be right where the base model is not."""
    return mode in ("left_padded", "padded_forward", "beams", "sampling") or judge(mode, bare) == "exact"
