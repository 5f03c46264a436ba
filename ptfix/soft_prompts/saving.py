"""What a checkpoint of a soft prompt holds: the soft prompt, and what trains it.

peft saves what the prompt encoder puts out. For p-tuning, prefix tuning with a projection and CPT that is not what is
trained: training cannot go on from it. Here the encoder's own weights are saved beside it, in the same dictionary, so
that they are in the same file, upload and FSDP checkpoint. Releases of peft without ptfix ignore them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ptfix.soft_prompts import sharding, views

State = dict[str, torch.Tensor]

#: Opens the name of a weight of the prompt encoder in what is saved. No name of a model's own: there the adapter's name
#: stands between.
_ENCODER = "prompt_encoder."


def is_only_an_output(config: Any) -> bool:
    """Does peft save of this adapter what its prompt encoder puts out, and not what is trained?"""
    if not config.is_prompt_learning:
        return False
    return config.peft_type in ("P_TUNING", "CPT") or bool(getattr(config, "prefix_projection", False))


def has_encoder(peft_model: Any, adapter_name: str) -> bool:
    """Is such an adapter in training? One for inference has no encoder, only what it put out."""
    config = peft_model.peft_config[adapter_name]
    return is_only_an_output(config) and not config.inference_mode


def state_dict_to_save(get: Callable[[Any], State], peft_model: Any, state_dict: Any, adapter_name: str) -> State:
    """What peft's get_peft_model_state_dict saves of a model, and the weights of its encoder.

    Args:
        get: that function, of a model.
        state_dict: of the whole model, where its weights are spread over processes.
    """
    if not has_encoder(peft_model, adapter_name):
        return get(peft_model)
    view = view_to_save(getattr(peft_model, "_orig_mod", peft_model), state_dict)
    weights = view.prompt_encoder[adapter_name].state_dict()
    # Copies, as the soft prompt beside them is one: a dictionary that is kept must not change when training goes on.
    copies = {_ENCODER + name: one.detach().to("cpu", copy=True) for name, one in weights.items()}
    return {**get(view), **copies}


def view_to_save(peft_model: Any, state_dict: Any = None) -> Any:
    """A view of a model whose prompt encoder has whole weights, and runs without dropout and without changing them
    (CPT's projects them in each forward)."""
    whole = sharding.with_whole_prompt(peft_model, state_dict)
    encoder = whole.prompt_encoder
    if any(hasattr(module, "_fsdp_wrapped_module") for module in encoder.modules()):
        return whole  # FSDP1 gathers for the modules that it wraps, and for no view of them
    view = views.shallow(whole)
    view._modules["prompt_encoder"] = resting = views.with_parameters(
        encoder, lambda parameter: torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
    )
    for module in resting.modules():
        module.__dict__["training"] = False
    return view


def acting(peft_model: Any, adapter_name: str) -> torch.Tensor:
    """The soft prompt that acts, in the shape in which peft saves it."""
    config = peft_model.peft_config[adapter_name]
    if config.inference_mode or config.peft_type == "MULTITASK_PROMPT_TUNING":
        weight: torch.Tensor = peft_model.prompt_encoder[adapter_name].embedding.weight
        return weight.detach()
    prompt: torch.Tensor = view_to_save(peft_model).get_prompt_embedding_to_save(adapter_name)
    return prompt


def parted(saved: Mapping[str, torch.Tensor]) -> tuple[State, State]:
    """``(the encoder's own weights by their names in it, what peft saves)``."""
    weights = {name[len(_ENCODER) :]: one for name, one in saved.items() if name.startswith(_ENCODER)}
    return weights, {name: one for name, one in saved.items() if not name.startswith(_ENCODER)}
