"""Does a soft prompt act, and does generate() say what training said? The check nobody makes when nothing raises.

Two questions, both answered with logits, since short answers may agree by chance: is the adapter's training forward
different from the base model (it *acts*), and is generate() the same as the training forward (it is *exact*)? The truth
is `reference`, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ptfix import errors, models
from ptfix.soft_prompts import saving
from ptfix.soft_prompts.adapter import SoftPrompt, active_config, has_soft_prompt, is_encoder_decoder
from ptfix.soft_prompts.proof import reference, task_heads

#: What an adapter of many tasks is checked with.
_TASK = 0

_NO_EFFECT = "the soft prompt has no effect: its own training forward answers exactly as the base model"
_IGNORED = "generate() ignores the soft prompt: it answers as the base model does, not as was trained"
_PADDED = "a row padded on the {side} gets another answer than alone: it {how}"
_HEAD_GOOD = "the soft prompt acts, and a padded row gets what it gets alone"
_GOOD = "the soft prompt acts, and generate() says what the training forward says"


_comparing: ContextVar[bool] = ContextVar("ptfix_comparing", default=False)


@dataclass(frozen=True)
class Check:
    """What was found on one row, with a sentence for people."""

    acts: bool  #: the prompt changes the logits of the training forward, whichever token wins
    exact: bool  #: generate() follows the training forward, as far as was asked
    differs_at: int | None  #: the first new token (from 0) where it does not; None also where generate() raises
    sentence: str

    @property
    def good(self) -> bool:
        """Nothing to worry about."""
        return self.acts and self.exact


def check(peft_model: Any, input_ids: torch.Tensor | None = None, new_tokens: int = 4) -> Check:
    """Compare generate() with the training forward, and both with the base model, on one row; of a task head the
    answer to a padded row with that to the row alone.

    The model comes back as it was: mode, random state, generation settings, gradients.

    Args:
        peft_model: with an active soft prompt, of a decoder or an encoder, also wrapped by DDP or torch.compile.
        input_ids: ``[1, tokens]`` without padding; None: a few tokens of the vocabulary.
    """
    peft_model = models.unwrap(peft_model)
    if task_heads.is_head(peft_model):
        return _check_head(peft_model, input_ids)
    asked = Asked(peft_model, new_tokens)
    base = peft_model.base_model
    row = models.any_row(base, seed=0) if input_ids is None else input_ids.to(asked.device)
    if is_encoder_decoder(base):
        return _check_encoder_decoder(asked, row)
    with isolated(peft_model):
        ids, scores = asked.truth(row)
        plain = torch.cat([reference.last_logits(base, ids[:, :stop]) for stop in range(row.shape[1], ids.shape[1])])
        acts = models.distance(plain, scores) > models.noise(base)
        try:
            answer = asked.generate(row)
        except Exception as error:  # whatever the host raises is the finding
            return Check(
                acts, False, None, f"generate() raises {errors.one_line(error)}; its training forward does not"
            )
        at = asked.first_difference(answer)
        # Nearer to the base than to the truth: also seen where a weak prompt hides in the tolerance of a coarse dtype.
        ignored = acts and answer.scores is not None and _nearer(answer.scores, plain, scores)
    return _verdict(acts, at, ignored)


def _verdict(acts: bool, at: int | None, ignored: bool) -> Check:
    if not acts:
        return Check(False, at is None, at, _NO_EFFECT)
    if ignored:
        return Check(True, False, at or 0, _IGNORED)
    if at is not None:
        return Check(True, False, at, f"generate() leaves the training forward at new token {at + 1}")
    return Check(True, True, None, _GOOD)


def _check_encoder_decoder(asked: Asked, row: torch.Tensor) -> Check:
    """The truth of an answer is the training forward with the answer as its labels."""
    model, base = asked.model, asked.base
    with isolated(model):
        answer, scores, raised = models.any_row(base, seed=1, tokens=asked.new_tokens), None, None
        try:
            out = asked.output(input_ids=row, decoder_start_token_id=base.config.decoder_start_token_id)
            scores = torch.cat(out.scores).float()
            answer = out.sequences[:, -len(scores) :]
        except Exception as error:  # whatever the host raises is the finding
            raised = errors.one_line(error)
        read = {"input_ids": row, "labels": answer}
        truth = reference.logits(model, answer.shape[1], **read, **asked.task_ids())
        plain = reference.logits(base, answer.shape[1], **read)
    acts = models.distance(plain, truth) > models.noise(base)
    if scores is None:
        return Check(acts, False, None, f"generate() raises {raised}; its training forward does not")
    near = models.tolerance(base)
    wrong = (at for at, (got, true) in enumerate(zip(scores, truth, strict=True)) if models.distance(got, true) > near)
    return _verdict(acts, next(wrong, None), acts and _nearer(scores, plain, truth))


def _check_head(peft_model: Any, input_ids: torch.Tensor | None) -> Check:
    row = models.any_row(peft_model.base_model, seed=0) if input_ids is None else input_ids
    with comparing():
        found = task_heads.judge(peft_model, row.to(peft_model.base_model.get_input_embeddings().weight.device))
    if not found.acts:
        return Check(False, not found.wrong, None, _NO_EFFECT)
    for side, how in found.wrong.items():
        return Check(True, False, None, _PADDED.format(side=side, how=how))
    return Check(True, True, None, _HEAD_GOOD)


def unlike_saved(peft_model: Any, folder: Path | str) -> str | None:
    """How the active adapter of a model differs from the one that was saved in a folder, or None where it is that one.

    The base model is not compared.
    """
    from peft.utils.save_and_load import get_peft_model_state_dict, load_peft_weights

    peft_model = models.unwrap(peft_model)
    name = peft_model.active_adapter
    folder = folder if name == "default" else Path(folder, name)
    saved = load_peft_weights(str(folder), device="cpu")
    view = saving.view_to_save(peft_model)
    here = get_peft_model_state_dict(view, adapter_name=name, save_embedding_layers=False)
    for key in sorted(here.keys() & saved.keys(), reverse=True):  # the soft prompt before the encoder
        there, one = saved[key].float(), here[key].detach().float().cpu()
        off = models.distance(one, there) if one.shape == there.shape else float("inf")
        if not off <= models.tolerance(peft_model.base_model):
            return f"{key} differs from that in {folder}, by {off:.2g} of its size"
    return None


def misfit(config: Any, base: Any, text: int = 1) -> str | None:
    """Why a soft prompt's PeftConfig cannot work on this base model with `text` real tokens, or None where it fits."""
    if is_encoder_decoder(base):
        return (
            "the base model is an encoder-decoder, whose adapter is checked by SoftPromptCallback and at its first use"
        )
    length = config.num_virtual_tokens
    if config.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        layers = getattr(models.text_config(base.config), "num_hidden_layers", None)
        if None not in (layers, config.num_layers) and layers != config.num_layers:
            return f"the adapter was made for {config.num_layers} layers, the base model has {layers}"
    else:
        width = base.get_input_embeddings().weight.shape[-1]
        if config.token_dim is not None and config.token_dim != width:
            return f"the adapter's embeddings are {config.token_dim} wide, those of the base model {width}"
    limit = hard_limit(base)
    if limit is not None and length + text > limit:
        left = max(0, limit - length)
        return f"{length} virtual tokens leave {left} of the base model's {limit} positions for text; {text} are needed"
    return None


def hard_limit(base: Any) -> int | None:
    """How many positions a model with a learned table of them has (gpt2, opt); None for one that can go on."""
    words = base.get_input_embeddings()
    for name, module in base.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and module is not words and (leaf == "wpe" or "position" in leaf):
            limit = getattr(models.text_config(base.config), "max_position_embeddings", None)
            return int(limit or module.num_embeddings)
    return None


@dataclass(frozen=True)
class Answer:
    """What generate() said after one row."""

    row: torch.Tensor  #: ``[1, tokens]``, without padding
    tokens: torch.Tensor  #: ``[new]``
    scores: torch.Tensor | None = None  #: ``[new, vocab]``, where the mode has them


@dataclass
class Asked:
    """A model under check, adapter or bare base model, and the truth about it."""

    model: Any
    new_tokens: int
    _truths: dict[Any, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def is_bare(self) -> bool:
        return not hasattr(self.model, "peft_config")

    @property
    def base(self) -> Any:
        return self.model if self.is_bare else self.model.base_model

    @property
    def device(self) -> torch.device:
        device: torch.device = self.base.get_input_embeddings().weight.device
        return device

    def task_ids(self, rows: int = 1) -> dict[str, torch.Tensor]:
        """The argument that multitask prompt tuning cannot do without."""
        if self.is_bare or not has_soft_prompt(self.model):
            return {}  # disable_adapter() leaves the base model's forward, which knows no tasks
        if active_config(self.model).peft_type != "MULTITASK_PROMPT_TUNING":
            return {}
        return {"task_ids": torch.full((rows,), _TASK, device=self.device)}

    def truth(self, row: torch.Tensor, new_tokens: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """`reference.greedy` of a row, made once."""
        key = (tuple(row[0].tolist()), new_tokens or self.new_tokens)
        if key not in self._truths:
            self._truths[key] = reference.greedy(self.model, row, key[1], **self.task_ids())
        return self._truths[key]

    def generate(self, row: torch.Tensor, **options: Any) -> Answer:
        """Greedy generate() after one row, with its scores."""
        out = self.output(input_ids=row, **options)
        return Answer(row, out.sequences[0, row.shape[1] :], torch.cat(out.scores).float())

    def output(self, *args: Any, rows: int = 1, **options: Any) -> Any:
        """The host's generate(), greedy unless told otherwise, with everything it can return."""
        options = {
            "max_new_tokens": self.new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
            "output_scores": True,
            "return_dict_in_generate": True,
            **self.task_ids(rows),
            **options,
        }
        for ids in [*args, options.get("input_ids"), options.get("inputs_embeds")]:
            if isinstance(ids, torch.Tensor):
                options.setdefault("attention_mask", ids.new_ones(ids.shape[:2], dtype=torch.long))
        return self.model.generate(*args, **{name: value for name, value in options.items() if value is not None})

    def first_difference(self, answer: Answer) -> int | None:
        """The first new token that the training forward does not say, or None.

        Tokens that the truth finds equally good are no difference, but after them the two tell different stories: there
        it stops.
        """
        new_tokens = len(answer.tokens)
        if not new_tokens:
            return 0
        ids, scores = self.truth(answer.row, max(self.new_tokens, new_tokens))
        for step, token in enumerate(answer.tokens.tolist()):
            true, right = int(ids[0, answer.row.shape[1] + step]), scores[step]
            near = models.tolerance(self.base) * float(right.abs().max())
            if answer.scores is not None and not float((answer.scores[step] - right).abs().max()) <= near:
                return step
            if token != true:
                return None if float(right[true] - right[token]) <= near else step
        return None if new_tokens >= self.new_tokens else new_tokens


@contextmanager
def comparing() -> Iterator[None]:
    """Inside, somebody compares with the truth: calls are not checked once more."""
    token = _comparing.set(True)
    try:
        yield
    finally:
        _comparing.reset(token)


def is_comparing() -> bool:
    return _comparing.get()


@contextmanager
def isolated(peft_model: Any) -> Iterator[None]:
    """`models.undisturbed`, with plain greedy settings and no autocast inside.

    The settings a model ships with (a repetition penalty, an eos) would make a right generate() look wrong. So would
    accelerate's autocast, which it hangs on forward() and not on generate().
    """
    from transformers import GenerationConfig

    base = peft_model.base_model
    with comparing(), models.undisturbed(peft_model):
        if "_original_forward" in vars(peft_model):
            peft_model.forward = peft_model._original_forward
        # peft hands the settings on to the base model's body.
        base.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=0)
        yield


def describe(peft_model: Any) -> str:
    """``prompt tuning, 20 virtual tokens``"""
    prompt = SoftPrompt(peft_model)
    method = str(getattr(prompt.config.peft_type, "value", prompt.config.peft_type)).replace("_", " ").lower()
    return f"{method}, {prompt.length} virtual tokens"


def _nearer(scores: torch.Tensor, plain: torch.Tensor, true: torch.Tensor) -> bool:
    """Are the scores nearer to the plain than to the true ones? At the first step, where all read the same text."""
    return models.distance(plain[:1], scores[:1]) < models.distance(true[:1], scores[:1])
