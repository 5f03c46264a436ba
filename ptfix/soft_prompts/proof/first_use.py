"""The first-use check: does what runs say what was trained?

Probes judge a release on one tiny model; a user's model is something else. So the first call of each kind that a soft
prompt meets is compared with the truth, on one short row of the user's own, before the call itself runs.

A `Surface` is a function of peft where a soft prompt is used. It looks at a call and asks a `Question`: two tensors
that must be equal, what the surface gives and what was trained. `answer` puts every question in the same way: on a
private view of the model in eval mode, without gradients, by the user's own dtype and device. Greedy decoding draws no
random number, and nothing shared is changed.

What it cannot see: a fault that shows only beyond `MOST_TOKENS`, or only after the second new token.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from ptfix import errors, models
from ptfix.soft_prompts import caches, saving, views
from ptfix.soft_prompts.adapter import active_config, is_encoder_decoder, is_switched_off
from ptfix.soft_prompts.proof import check, reference

#: A row is cut to so many tokens, its padding included, of which at most `MOST_PADS` are padding.
MOST_TOKENS, MOST_PADS = 256, 64
#: The prefill gives the first token, the cache the second.
_NEW_TOKENS = 2

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Finding:
    """A sentence for people: the two differ, or could not be compared."""

    sentence: str
    wrong: bool  #: the soft prompt's own fault


#: ``(model, call) -> (what runs, what was trained)``; `call` is the surface's function of `model`.
Compare = Callable[[Any, Callable[..., Any]], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Question:
    """Two tensors that must be equal."""

    what: str  #: "generate() of a left-padded batch"
    kind: Hashable  #: what tells this call from others that run otherwise
    compare: Compare
    simpler: Question | None = None  #: what to ask where the base model alone is wrong in this


@dataclass(frozen=True)
class Surface:
    """A function of peft where a soft prompt is used."""

    name: str
    ask: Callable[[Any, tuple[Any, ...], dict[str, Any]], Question | None]  #: ``(peft model, args, kwargs)``
    truth: str  #: what it must equal
    advice: str
    once_per: Literal["kind of call", "model", "call"]
    base_method: str | None = None  #: the base model's function of the same kind: its own faults are the host's
    afterwards: bool = False  #: compare when the call has returned


_asked: WeakKeyDictionary[Any, set[Hashable]] = WeakKeyDictionary()
_lock = threading.Lock()
_heard: ContextVar[list[Finding] | None] = ContextVar("ptfix_heard", default=None)


@contextmanager
def hearing() -> Iterator[list[Finding]]:
    """Every call inside is checked, and what is found goes into the list that is given instead of to the user."""
    findings: list[Finding] = []
    token = _heard.set(findings)
    try:
        yield findings
    finally:
        _heard.reset(token)


def question(surface: Surface, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Question | None:
    """What is to be compared about this call; None for most: no soft prompt, compared already, switched off."""
    peft_model: Any = args[0] if args else kwargs.get("model")
    setting = os.environ.get("PTFIX_CHECK", "").strip().lower()
    if setting == "0" or check.is_comparing() or not _has_soft_prompt(peft_model):
        return None
    every_time = setting == "always" or surface.once_per == "call" or _heard.get() is not None
    key: Hashable = (surface.name, peft_model.active_adapter, is_off(peft_model))
    seen = _asked.setdefault(peft_model, set())
    if not every_time and surface.once_per == "model" and key in seen:
        return None
    try:
        asked = surface.ask(peft_model, args[1:], kwargs)
    except Exception as error:
        asked = Question(f"this use ({surface.name})", "failed", partial(_raise, error))
    if asked is None or every_time:
        return asked
    if surface.once_per == "kind of call":
        key = (key, asked.kind)
    with _lock:  # of two threads one asks
        if key in seen:
            return None
        seen.add(key)
    return asked


def _raise(error: Exception, *_: Any) -> Any:
    raise error


def answer(surface: Surface, asked: Question, peft_model: Any, original: Callable[..., Any]) -> Finding | None:
    """Compare, and say so where the two differ or cannot be compared. Never raises."""
    with check.comparing():
        try:
            finding = _compared(surface, asked, peft_model, original)
        except Exception as error:  # the user's own call shall run, whatever becomes of the check
            finding = Finding(f"{asked.what} could not be checked: {errors.one_line(error)}", wrong=False)
    if finding is None:
        return None
    finding = replace(
        finding, sentence=f"{_name(peft_model)}: {finding.sentence}. PTFIX_CHECK=0 switches the check off."
    )
    heard = _heard.get()
    if heard is None:
        return finding
    heard.append(finding)
    return None


def _compared(surface: Surface, asked: Question, peft_model: Any, original: Callable[..., Any]) -> Finding | None:
    _raise_if_out_of_reach(peft_model)
    twin = _private(peft_model)
    base_call = getattr(twin.base_model, surface.base_method) if surface.base_method else None
    device = next(peft_model.parameters()).device.type
    with torch.no_grad(), _uncached_autocast(device):
        tolerance = models.tolerance(peft_model.base_model)
        off = _apart(*asked.compare(twin, partial(original, twin)))
        if off <= tolerance:
            return None
        difference = f"{asked.what} differs from {surface.truth}, by {off:.2g} of its size"
        if base_call is None or not _differs_alone(asked, twin.base_model, base_call, tolerance):
            return Finding(f"{difference}. {surface.advice}", wrong=True)
    simpler = asked.simpler and _compared(surface, asked.simpler, peft_model, original)
    return simpler or Finding(
        f"{difference}; so does the base model alone, of its own training forward: this is transformers' fault, or the "
        "model's, and other rows and options may be right",
        wrong=False,
    )


def _differs_alone(asked: Question, base: Any, base_call: Callable[..., Any], tolerance: float) -> bool:
    try:
        return _apart(*asked.compare(base, base_call)) > tolerance
    except Exception:  # where the base model cannot do this at all, the soft prompt has to answer for itself
        return False


def _apart(got: torch.Tensor, true: torch.Tensor) -> float:
    """The largest difference, as a part of the truth's size; infinite where the two cannot be laid side by side."""
    if got.shape != true.shape:
        return float("inf")
    got, true = got.float(), true.float().to(got.device)
    finite = true.isfinite()  # some models rule tokens out by -inf
    if not finite.any():
        raise RuntimeError("the training forward gives no finite number")
    if not torch.equal(finite, got.isfinite()):
        return float("inf")
    return models.distance(got[finite], true[finite])


def _name(peft_model: Any) -> str:
    base = peft_model
    while hasattr(base, "get_base_model"):  # of a soft prompt over LoRA too
        base = base.get_base_model()
    return f"{type(base).__name__} with {check.describe(peft_model)}"


def _raise_if_out_of_reach(peft_model: Any) -> None:
    if models.is_sharded(None, peft_model):
        raise RuntimeError("its weights are spread over processes, which would have to check together")
    if any(parameter.is_meta for parameter in peft_model.parameters()):
        raise RuntimeError("its weights are on the meta device")


def _uncached_autocast(device: str) -> Any:
    # The user's autocast, without its cache: copies of weights made without gradients must not outlive the check.
    return torch.autocast(
        device,
        dtype=torch.get_autocast_dtype(device),
        enabled=torch.is_autocast_enabled(device),
        cache_enabled=False,
    )


def _private(peft_model: Any) -> Any:
    """A view to run the check on: in eval mode, with settings that add nothing to plain greedy decoding."""
    from transformers import GenerationConfig

    twin = views.private(peft_model)
    start = getattr(peft_model.config, "decoder_start_token_id", None)
    plain = GenerationConfig(pad_token_id=0, bos_token_id=0, decoder_start_token_id=start)
    for view in twin.modules():
        if "generation_config" in view.__dict__:
            view.__dict__["generation_config"] = plain
        if "rope_deltas" in view.__dict__:  # Qwen-VL keeps those of its last batch, which had other rows
            view.__dict__["rope_deltas"] = None
        if "_original_forward" in view.__dict__:  # accelerate's autocast hangs on forward() and not on generate()
            view.__dict__.pop("forward", None)
    return twin


def _has_soft_prompt(model: Any) -> bool:
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def is_off(model: Any) -> bool:
    """Is this inside disable_adapter()? Then the base model's forward hangs on the PeftModel."""
    return _has_soft_prompt(model) and is_switched_off(model)


# --- one row of the user's ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """The user's text and its padding, whichever way they were passed."""

    name: str  #: "input_ids" or "inputs_embeds"
    text: torch.Tensor  #: ``[batch, tokens]`` or ``[batch, tokens, hidden]``
    mask: torch.Tensor  #: ``[batch, tokens]``
    token_types: Any = None

    @staticmethod
    def of(given: dict[str, Any]) -> _Batch | None:
        """None where there is no text, or its padding is not known."""
        name = "input_ids" if given.get("inputs_embeds") is None else "inputs_embeds"
        text, mask, token_types = given.get(name), given.get("attention_mask"), given.get("token_type_ids")
        if not isinstance(text, torch.Tensor) or text.dim() != (2 if name == "input_ids" else 3) or 0 in text.shape:
            return None
        if mask is None:
            mask = text.new_ones(text.shape[:2], dtype=torch.long)
        if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or len(mask) != len(text):
            return None
        hidden = mask.shape[1] - text.shape[1]
        if hidden < 0:
            return None
        # Text that stands in the cache only is not known here: any will do.
        text = torch.cat((text.new_zeros(len(text), hidden, *text.shape[2:]), text), dim=1)
        known = isinstance(token_types, torch.Tensor) and token_types.shape == text.shape[:2]
        return _Batch(name, text, mask, token_types if known else None)

    def is_padded(self) -> bool:
        return bool((self.mask == 0).any())

    def row(self, whole: bool = False) -> _Row:
        """The row with most padding, cut to size unless the `whole` is asked for."""
        number = int((self.mask == 0).sum(-1).argmax())
        real, pads = (self.mask[number] != 0).nonzero()[:, 0], (self.mask[number] == 0).nonzero()[:, 0]
        if not whole:
            # Of the padding what stands beside the text, on either side.
            beside = torch.minimum((pads - real[0]).abs(), (pads - real[-1]).abs()).argsort()
            pads = pads[beside[:MOST_PADS]]
            real = real[len(pads) - MOST_TOKENS :]
        columns = torch.cat((pads, real)).sort().values
        tensors = {self.name: self.text, "attention_mask": self.mask, "token_type_ids": self.token_types}
        return _Row(
            {name: value[number, columns][None] for name, value in tensors.items() if value is not None}, number
        )


@dataclass(frozen=True)
class _Row:
    """One row of a batch: as it was padded, and alone."""

    padded: Tensors  #: by the names of forward(), each ``[1, tokens, ...]``
    number: int = 0  #: which row of the batch it was

    @property
    def real(self) -> torch.Tensor:
        """``[tokens]``"""
        return self.padded["attention_mask"][0] != 0

    @property
    def alone(self) -> Tensors:
        return {name: value[:, self.real] for name, value in self.padded.items() if name != "attention_mask"}

    def behind(self, ids: torch.Tensor, base: Any) -> _Row:
        """The row of a base model alone, behind ordinary tokens `ids` where a soft prompt would stand: or the two would
        not meet the same lengths."""
        first = int(self.real.nonzero()[0])
        front = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "inputs_embeds" in self.padded:
            front["inputs_embeds"] = base.get_input_embeddings()(ids)
        names = [name for name in self.padded if name in front]
        return _Row(
            {
                name: torch.cat((self.padded[name][:, :first], front[name], self.padded[name][:, first:]), dim=1)
                for name in names
            },
            self.number,
        )

    def task_ids(self, kwargs: dict[str, Any]) -> Tensors:
        """What multitask prompt tuning cannot do without."""
        given = kwargs.get("task_ids")
        return {"task_ids": given[self.number][None]} if isinstance(given, torch.Tensor) else {}


# --- generate() --------------------------------------------------------------------------------------------------

#: Options that choose how generate() runs, rather than which token it takes.
_MODE = ("cache_implementation", "cache_config", "use_cache", "prefill_chunk_size")


def _ask_generate(peft_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Question | None:
    inputs = args[0] if args else kwargs.get("inputs")
    batch = _Batch.of(kwargs if inputs is None else {**kwargs, "input_ids": inputs})
    if batch is None:
        return None
    config, mode = active_config(peft_model), _mode(peft_model, kwargs)
    cache_name = caches.name_in(kwargs)
    cached = caches.length(kwargs[cache_name]) if cache_name else 0
    turn = ""
    if cached and batch.name == "input_ids" and not is_encoder_decoder(peft_model):
        held = cached - config.num_virtual_tokens
        turn = "a second turn" if held < batch.mask.shape[1] else "a text in the cache"
    more = _other_inputs(peft_model, kwargs) if len(batch.text) == 1 and not turn else {}
    kind = (
        *(f"{name}={value}" for name, value in mode.items()),
        *([turn] if turn else []),
        *(["inputs_embeds"] if batch.name == "inputs_embeds" else []),
        *sorted(more),
    )
    compare = partial(
        _generated,
        virtual_tokens=config.num_virtual_tokens,
        kwargs=kwargs,
        more=more,
        mode=mode,
        turn=turn,
        cache_name=cache_name,
    )
    what = ["generate()" + (" under disable_adapter()" if is_off(peft_model) else "")]
    what += [f"with {', '.join(kind)}"] if kind else []
    simple = Question(" ".join(what), kind, partial(compare, batch=batch, padded=False))
    if not batch.is_padded():
        return simple
    return Question(
        " ".join([*what, "of a padded row"]), (*kind, "padded"), partial(compare, batch=batch, padded=True), simple
    )


def _generated(
    model: Any,
    call: Callable[..., Any],
    batch: _Batch,
    padded: bool,
    virtual_tokens: int,
    kwargs: dict[str, Any],
    more: Tensors,
    mode: dict[str, Any],
    turn: str,
    cache_name: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of the first new tokens, and what the training forward says of the same text."""
    row = batch.row(whole=bool(more))
    if not padded:
        row = _Row({**row.alone, "attention_mask": row.padded["attention_mask"][:, row.real]}, row.number)
    if not _has_soft_prompt(model):
        row = row.behind(models.any_row(model, seed=0, tokens=virtual_tokens), model)
    task_ids = row.task_ids(kwargs) if _has_soft_prompt(model) else {}
    options = {
        **more,
        **task_ids,
        **mode,
        "max_new_tokens": _NEW_TOKENS,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    if hasattr(getattr(model, "generation_config", None), "disable_compile"):
        options["disable_compile"] = True  # a graph for two tokens is not worth its minutes
    if turn:
        row, options[str(cache_name)] = _after_a_turn(row, turn, call, options)
    out = call(**row.padded, **options)
    scores = torch.cat(out.scores)
    new = out.sequences[:, -len(scores) :]
    truth = {name: value for name, value in row.alone.items() if name != "token_type_ids"}  # peft drops these
    if is_encoder_decoder(model):
        truth["labels"] = new  # as in training: the decoder reads its start token, then these
    else:
        read = new[:, :-1] if batch.name == "input_ids" else model.get_input_embeddings()(new[:, :-1])
        shape = truth[batch.name].shape[:2]
        truth[batch.name] = torch.cat((truth[batch.name], read), dim=1)
        more = {  # what is said of each token (mm_token_type_ids) is 0 for the new ones
            name: torch.cat((value, torch.zeros_like(value[:, : read.shape[1]])), dim=1)
            if value.shape[:2] == shape
            else value
            for name, value in more.items()
        }
    return scores, reference.logits(model, len(scores), **truth, **more, **({} if is_off(model) else task_ids))


def _after_a_turn(row: _Row, turn: str, call: Callable[..., Any], options: dict[str, Any]) -> tuple[_Row, Any]:
    """What to pass the second time, and the cache that the first time returned."""
    ids, mask = row.padded["input_ids"], row.padded["attention_mask"]
    begun = ids.shape[1] if turn == "a text in the cache" else max(1, ids.shape[1] - 3)
    first = call(input_ids=ids[:, :begun], attention_mask=mask[:, :begun], **options)
    if turn == "a second turn":
        new = first.sequences[:, begun:]
        ids = torch.cat((first.sequences, ids[:, begun:]), dim=1)
        mask = torch.cat((mask[:, :begun], torch.ones_like(new), mask[:, begun:]), dim=1)
    return _Row({"input_ids": ids, "attention_mask": mask}), _cache_of(first)


def _mode(peft_model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The user's own options of the mode: given, in the settings given, or in those the model ships with."""
    sources = (kwargs.get("generation_config"), getattr(peft_model, "generation_config", None))
    mode = {}
    for name in _MODE:
        values = (kwargs.get(name), *(getattr(source, name, None) for source in sources))
        value = next((value for value in values if value is not None), None)
        if value is not None and not (name == "use_cache" and value):
            mode[name] = value
    return mode


def _other_inputs(peft_model: Any, kwargs: dict[str, Any]) -> Tensors:
    """What a model reads beside text, such as images."""
    base = peft_model.get_base_model()
    known = inspect.signature(base.forward).parameters
    others = {"input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids", "cache_position"}
    return {
        name: value
        for name, value in kwargs.items()
        if isinstance(value, torch.Tensor)
        and name in known
        and name not in others
        and not name.startswith(("decoder_", "encoder_", "labels"))
    }


# --- forward() with a cache --------------------------------------------------------------------------------------


def _cache_of(outputs: Any) -> Any:
    held = caches.of(outputs)
    if held is None:
        raise RuntimeError("this host returns no cache")
    return held


def _ask_loop(peft_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Question | None:
    name = caches.name_in(kwargs)
    if name is None or not caches.length(kwargs[name]):
        return None
    return Question("forward() with a filled KV cache", (), partial(_continued, kwargs=kwargs, cache_name=name))


def _continued(
    model: Any, call: Callable[..., Any], kwargs: dict[str, Any], cache_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a text in two parts, the second one with the cache of the first, and of all of it at once."""
    row = models.any_row(model, seed=0, tokens=6)
    task_ids = _Row({}).task_ids(kwargs) if _has_soft_prompt(model) else {}
    fixed, text = {**task_ids}, "input_ids"
    if is_encoder_decoder(model):
        fixed["input_ids"], text = row, "decoder_input_ids"
    first = call(**fixed, **{text: row[:, :-2]}, use_cache=True)
    rest = call(**fixed, **{text: row[:, -2:], cache_name: _cache_of(first)}, use_cache=True)
    return rest.logits[0, -1:], reference.logits(model, 1, **fixed, **{text: row})


# --- task heads --------------------------------------------------------------------------------------------------


def _ask_head(
    peft_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: tuple[str, ...], per_token: bool
) -> Question | None:
    # forward() of every head begins with these.
    given = {**dict(zip(("input_ids", "attention_mask", "inputs_embeds"), args, strict=False)), **kwargs}
    batch = _Batch.of(given)
    if batch is None or is_off(peft_model) or not batch.is_padded():
        return None
    compare = partial(_judged, batch=batch, kwargs=kwargs, outputs=outputs, per_token=per_token)
    return Question("the answer to a padded row", (), compare)


def _judged(
    model: Any,
    call: Callable[..., Any],
    batch: _Batch,
    kwargs: dict[str, Any],
    outputs: tuple[str, ...],
    per_token: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a head says of a row in its padding, and of the row alone."""
    row = batch.row()
    task_ids = row.task_ids(kwargs) if _has_soft_prompt(model) else {}
    padded, alone = (call(**inputs, **task_ids, return_dict=True) for inputs in (row.padded, row.alone))
    both = [(getattr(padded, name), getattr(alone, name)) for name in outputs]
    if per_token:  # peft's heads answer for the virtual tokens too, in front of the text
        tokens = len(row.real)
        both = [(got[:, -tokens:][:, row.real], true[:, -int(row.real.sum()) :]) for got, true in both]
    got, true = (torch.cat([one.flatten() for one in side]) for side in zip(*both, strict=True))
    return got, true


# --- loading -----------------------------------------------------------------------------------------------------


def _ask_load(peft_model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Question | None:
    given = {**dict(zip(("peft_model_state_dict", "adapter_name"), args, strict=False)), **kwargs}
    name, saved = given.get("adapter_name", "default"), given["peft_model_state_dict"].get("prompt_embeddings")
    if saved is None or name not in peft_model.peft_config:
        return None
    return Question(f"the adapter {name!r} as it was loaded", (), partial(_loaded, name=name, saved=saved))


def _loaded(model: Any, call: Callable[..., Any], name: str, saved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The soft prompt that acts, and the one in the file."""
    return saving.acting(model, name), saved


# --- all of them -------------------------------------------------------------------------------------------------

GENERATE = Surface(
    "generate",
    _ask_generate,
    "the training forward of the same row",
    "Run `ptfix verify` on the saved adapter to see which modes are right, try use_cache=False or rows of equal length "
    "without padding, and report it",
    once_per="kind of call",
    base_method="generate",
)
LOOP = Surface(
    "loop",
    _ask_loop,
    "the training forward of the whole text",
    "The soft prompt is put in front of the text again at each call: use generate(), or pass the whole text without a "
    "cache",
    once_per="model",
    base_method="__call__",
)


def _head(*outputs: str, per_token: bool) -> Surface:
    return Surface(
        f"head: {outputs}",
        partial(_ask_head, outputs=outputs, per_token=per_token),
        "the answer to the same row alone",
        "The results depend on the other rows of the batch: use batches of one row, or of rows of equal length",
        once_per="model",
        base_method="__call__",
    )


CLASS = _head("logits", per_token=False)
CLASS_OF_TOKENS = _head("logits", per_token=True)
SPAN = _head("start_logits", "end_logits", per_token=True)
FEATURES = _head("last_hidden_state", per_token=True)
LOAD = Surface(
    "load",
    _ask_load,
    "the one in the file",
    "Do not train or evaluate it further: load it for inference into a model of its own, with "
    "PeftModel.from_pretrained(base_model, folder)",
    once_per="call",
    afterwards=True,
)
