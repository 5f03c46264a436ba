"""Task heads under a soft prompt: the class of a text or of each token, a span, features.

peft's own ``forward`` does the work. Padding is moved out of its way, a class is read at a row's last token, and what
is said of tokens is said of the user's own tokens.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ptfix.soft_prompts import caches, padding, training, views
from ptfix.soft_prompts.adapter import SoftPrompt, active_config, is_encoder_decoder, is_switched_off

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Head:
    """What one of peft's task classes takes and gives."""

    per_token: tuple[str, ...] = ()  #: outputs with one row per token; none where a class is given for the whole text
    layers: tuple[str, ...] = ("classifier", "score")  #: what a class layer's name contains, as peft looks for it
    per_row: tuple[str, ...] = ()  #: arguments that say something of a whole row
    places: tuple[str, ...] = ()  #: arguments that are places in the text
    features: str | None = None  #: the output with one row per token of a model without a class layer


#: By the names of peft's classes.
HEADS = {
    "PeftModelForSequenceClassification": Head(per_row=("labels",)),
    "PeftModelForTokenClassification": Head(per_token=("logits",)),
    "PeftModelForQuestionAnswering": Head(
        per_token=("start_logits", "end_logits"),
        layers=("qa_outputs",),
        per_row=("start_positions", "end_positions"),
        places=("start_positions", "end_positions"),
    ),
    "PeftModelForFeatureExtraction": Head(per_token=("last_hidden_state",), features="last_hidden_state"),
}


def of(peft_model: Any) -> Head | None:
    """The description of its task class; None for one that continues texts."""
    return next((HEADS[kind.__name__] for kind in type(peft_model).__mro__ if kind.__name__ in HEADS), None)


def has_soft_prompt(peft_model: Any) -> bool:
    """Is the active adapter a soft prompt in front of a model that is no encoder-decoder, and switched on?"""
    if not active_config(peft_model).is_prompt_learning or is_encoder_decoder(peft_model.base_model):
        return False
    return not is_switched_off(peft_model)


def around(original: Forward, run: Callable[[Forward, Any, dict[str, Any], Head], Any]) -> Forward:
    """A ``forward()`` of one of peft's task classes that is ``run(original, peft model, arguments by name, head)``
    where it has a soft prompt."""
    head, by_name = HEADS[original.__qualname__.partition(".")[0]], training.by_name(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not has_soft_prompt(self):
            return original(self, *args, **kwargs)
        return run(original, self, by_name(args, kwargs), head)

    return forward


# --- padding -----------------------------------------------------------------------------------------------------


def as_alone(forward: Forward, peft_model: Any, given: dict[str, Any], head: Head) -> Any:
    """``forward(peft_model, **given)`` in which each row gets what it gets alone, whatever its padding.

    peft puts the soft prompt in front of the padding, so a text padded on the left stands at other positions
    (peft#1093). Of a text padded on the right a decoder reads the class at a pad, since it finds the last token by ids
    and is fed embeddings.
    """
    if training.is_traced():
        training.say_that_graphs_keep_padding()
        return forward(peft_model, **given)
    if not head.per_token:
        forward = partial(_class_at_last_token, forward, head)
    pads = training.is_left_padded(given)
    if pads is None:
        return forward(peft_model, **given)
    given = {name: _shifted(value, -pads) if name in head.places else value for name, value in given.items()}
    return training.padding_on_the_right(forward, peft_model, given, pads, head.per_token, head.per_row)


def _shifted(places: Any, by: torch.Tensor) -> Any:
    return places if places is None else places + by.to(places.device).view_as(places)


def _class_at_last_token(forward: Forward, head: Head, peft_model: Any, **given: Any) -> Any:
    mask = given.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2 or bool((mask[:, -1] != 0).all()):
        return forward(peft_model, **given)
    pads = padding.right_pads(mask)

    def last_token_last(classes: torch.Tensor) -> torch.Tensor:
        # Decoders take the class there. Where a model takes it elsewhere, it finds what it always found.
        last = classes.shape[1] - 1 - pads.to(classes.device)
        at_last = classes[torch.arange(len(classes), device=classes.device), last]
        return torch.cat((classes[:, :-1], at_last[:, None]), dim=1)

    return forward(_with_class_layer(peft_model, head, last_token_last), **given)


# --- what is said of tokens --------------------------------------------------------------------------------------


def of_real_tokens(forward: Forward, peft_model: Any, given: dict[str, Any], head: Head) -> Any:
    """``forward(peft_model, **given)`` that says nothing of virtual tokens: one output for each of the user's tokens,
    and a loss of these.

    peft has outputs for the virtual tokens in front of them, so labels do not fit and a span's loss is that of another
    span. Two of its classes take `task_ids` and do not hand them on to the soft prompt.
    """
    task_ids = given.get("task_ids")
    given = {name: value for name, value in given.items() if name != "task_ids"}
    prompt, view = SoftPrompt(peft_model), _with_task_ids(peft_model, task_ids)
    if prompt.is_prefix:
        return forward(view, **given)
    if head.features is None and not training.is_traced():
        # Contiguous, since models view them for their losses.
        view = _with_class_layer(view, head, lambda classes: classes[:, prompt.length :].contiguous())
        return forward(view, **given)
    as_tuple = training.wants_tuple(peft_model, given)
    if head.features is None:  # a graph takes no view of a model, so labels and places make way for the virtual tokens
        given = _behind(prompt.length, given, head)
    outputs = forward(view, **{**given, "return_dict": True})
    for name in head.per_token:
        outputs[name] = outputs[name][:, prompt.length :]
    return outputs.to_tuple() if as_tuple else outputs


def _behind(virtual_tokens: int, given: dict[str, Any], head: Head) -> dict[str, Any]:
    """The arguments with labels and places counted from the first virtual token on."""
    moved = {name: given[name] + virtual_tokens for name in head.places if given.get(name) is not None}
    if given.get("labels") is not None:
        moved["labels"] = torch.nn.functional.pad(given["labels"], (virtual_tokens, 0), value=-100)
    return {**given, **moved}


def _with_class_layer(peft_model: Any, head: Head, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A view of `peft_model` whose class layer gives ``change(classes [batch, tokens, classes])``.

    Looked for by its name, since peft 0.16 has no ``cls_layer_name`` for soft prompts.

    A layer that is fed one vector a text (that of bert) stays as it is, and so does a model without such a layer.
    """
    children = peft_model.base_model._modules
    layer = next((name for name in children if any(part in name for part in head.layers)), None)
    if layer is None:
        return peft_model

    def changed(base: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        real, view = base._modules[layer], views.bound(base)

        def forward(hidden: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            classes: torch.Tensor = real.forward(hidden, *args, **options)
            return change(classes) if classes.dim() == 3 else classes

        view._modules[layer] = views.shallow(real, forward=forward)
        return view, kwargs

    return training.with_base_call(peft_model, changed)


def _with_task_ids(peft_model: Any, task_ids: Any) -> Any:
    if task_ids is None:
        return peft_model
    make = peft_model.get_prompt

    def get_prompt(*args: Any, **kwargs: Any) -> Any:
        return make(*args, **{**kwargs, "task_ids": task_ids})

    return views.shallow(peft_model, get_prompt=get_prompt)


# --- the KV cache's name -----------------------------------------------------------------------------------------


def takes_old_name(peft_model: Any) -> Any:
    """A view of a prefix-tuned model whose base model and backbone take the KV cache as ``past_key_values``.

    peft looks for that name in their signatures; transformers 5.24 calls it ``cache``.
    """
    backbone = getattr(peft_model, "transformer_backbone_name", None)
    base = peft_model.base_model
    view = views.shallow(peft_model)
    view._modules["base_model"] = _renamed(base)
    if backbone in base._modules:
        view._modules["base_model"]._modules[backbone] = _renamed(base._modules[backbone])
    return view


def _renamed(module: Any) -> Any:
    signature = inspect.signature(module.forward)
    if "past_key_values" in signature.parameters or caches.keyword() not in signature.parameters:
        return views.shallow(module)

    def forward(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None:
            kwargs[caches.keyword()] = past_key_values
        return module.forward(*args, **kwargs)

    parameters = [
        each.replace(name="past_key_values") if each.name == caches.keyword() else each
        for each in signature.parameters.values()
    ]
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return views.shallow(module, forward=forward)
