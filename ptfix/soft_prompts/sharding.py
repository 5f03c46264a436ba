"""A soft prompt whose weights are spread over processes by FSDP2 (``fully_shard``).

Outside of a forward, parameters are shards (DTensors) that no module can compute with. All processes must do the same,
or one waits for the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ptfix.soft_prompts import views


def as_forward(peft_model: Any, call: Callable[[], Any]) -> Any:
    """What `call` returns, with the parameters of a sharded `peft_model` gathered as they are for its forward.

    generate() is no forward to FSDP2, but it embeds text and computes the soft prompt with the same parameters.
    Afterwards they are shards again where they were.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # without it nothing is sharded
    kind: Any = getattr(fsdp, "FSDPModule", ())
    if not isinstance(peft_model, kind):
        return call()
    answers: list[Any] = []
    errors: list[BaseException] = []

    def forward() -> None:
        try:
            answers.append(call())
        except BaseException as error:  # FSDP2 has to leave this forward, or the next one starts inside of it
            errors.append(error)

    was_sharded = any(hasattr(parameter, "full_tensor") for parameter in peft_model.prompt_encoder.parameters())
    name = "_ptfix_forward"
    vars(peft_model)[name] = forward
    try:
        fsdp.register_fsdp_forward_method(peft_model, name)
        getattr(peft_model, name)()
    finally:
        del vars(peft_model)[name]
    if was_sharded:
        peft_model.reshard()
    if errors:
        raise errors[0]
    return answers[0]


def with_whole_prompt(
    peft_model: Any, state_dict: Mapping[str, torch.Tensor] | None = None, is_written: bool = True
) -> Any:
    """A view of `peft_model` whose prompt encoder has whole weights; the model itself where they are whole already.

    Args:
        state_dict: of the whole model, which one process alone may hold. None: all processes gather, together.
        is_written: False in a process that only goes along, whose values do not matter.

    Raises:
        ValueError: weights that the state dict does not have.
    """
    encoder = peft_model._modules.get("prompt_encoder")
    whole: dict[int, torch.nn.Parameter] = {}
    for name, parameter in () if encoder is None else encoder.named_parameters():
        given = None if state_dict is None else state_dict.get(f"prompt_encoder.{name}")
        is_dtensor = hasattr(parameter, "full_tensor")
        if not is_dtensor and (given is None or given.shape == parameter.shape):  # FSDP1 flattens its shards
            continue
        if given is None and state_dict is None:
            given = parameter.full_tensor()
        elif given is None and is_written:
            raise ValueError(f"the soft prompt is sharded, and the state_dict to save lacks 'prompt_encoder.{name}'.")
        elif given is None:
            given = torch.zeros(parameter.shape, dtype=parameter.dtype)
        whole[id(parameter)] = torch.nn.Parameter(given.detach(), parameter.requires_grad)
    if not whole:
        return peft_model

    view = views.shallow(peft_model)
    view._modules["prompt_encoder"] = views.with_parameters(
        encoder, lambda parameter: whole.get(id(parameter), parameter)
    )
    return view
