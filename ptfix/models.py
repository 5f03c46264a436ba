"""What every part of ptfix asks of a model, and how to ask without leaving a trace."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# --- what it is --------------------------------------------------------------------------------------------------


def unwrap(model: Any) -> Any:
    """The model inside DistributedDataParallel, FSDP1 and torch.compile."""
    while True:
        for name in ("module", "_orig_mod", "_fsdp_wrapped_module"):
            if (inner := getattr(model, "_modules", {}).get(name)) is not None:
                model = inner
                break
        else:
            return model


def text_config(config: Any) -> Any:
    """The config of the part that reads text, of a model that also sees or hears."""
    return config.get_text_config() if hasattr(config, "get_text_config") else getattr(config, "text_config", config)


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The token ids that end an answer: those of the model's generation config, else the tokenizer's (may be None)."""
    config = getattr(model, "generation_config", None)
    return _listed(getattr(config, "eos_token_id", None)) or _listed(getattr(tokenizer, "eos_token_id", None))


def _listed(ids: Any) -> list[int]:
    return [] if ids is None else [int(token) for token in (ids if isinstance(ids, list | tuple) else [ids])]


def is_sharded(args: Any, model: Any) -> bool:
    """Does each process hold only a part of the weights (FSDP, ZeRO-3, tensor parallel)?

    Then a forward waits for all the other processes: one that runs it alone hangs, or ends the run.

    Args:
        args: the TrainingArguments; FSDP may also be asked for by accelerate, of which these know nothing.
    """
    if getattr(args, "fsdp", None):
        return True
    if any(_is_wrapped(module) or (getattr(module, "_tp_size", None) or 1) > 1 for module in model.modules()):
        return True
    # ZeRO-3 marks its parameters; those of FSDP2 and of tensor parallel models are DTensors, or were before a forward.
    return any(hasattr(parameter, "ds_id") or hasattr(parameter, "device_mesh") for parameter in model.parameters())


def _is_wrapped(module: Any) -> bool:
    """Is it inside FSDP? FSDP1 wraps a module, FSDP2 marks it."""
    return hasattr(module, "_fsdp_wrapped_module") or hasattr(module, "_is_fsdp_managed_module")


# --- what it says ------------------------------------------------------------------------------------------------


def any_row(model: Any, seed: int, tokens: int = 8) -> torch.Tensor:
    """A row of the model's vocabulary ``[1, tokens]``, always the same for a seed, for checks that need no meaning."""
    import torch

    words = model.get_input_embeddings().weight
    vocabulary = min(words.shape[0], getattr(text_config(model.config), "vocab_size", words.shape[0]))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary // 8, vocabulary, (1, tokens), generator=generator)  # special tokens come first
    return ids.to(words.device)


def noise(model: Any) -> float:
    """How far apart rounding alone may bring logits, as a part of their size."""
    return max(1e-5, 4 * _epsilon(model))


def tolerance(model: Any) -> float:
    """How far apart two ways to the same logits (with a cache, in a batch) may be, as a part of their size."""
    return max(1e-3, 8 * _epsilon(model))


def _epsilon(model: Any) -> float:
    """The rounding error of the coarsest dtype that it computes with."""
    import torch

    parameters = list(model.parameters())
    # Quantised weights are no floating point numbers and not finer than the coarsest of these.
    dtypes = {one.dtype if one.dtype.is_floating_point else torch.bfloat16 for one in parameters}
    device = parameters[0].device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(float(torch.finfo(dtype).eps) for dtype in dtypes)


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of two logits of one shape, as a part of the size of `theirs`."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))


# --- asking without a trace --------------------------------------------------------------------------------------


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode and no gradients inside; the mode of each module as before afterwards."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    # Not inference_mode: a buffer made under it could not take part in training.
    with torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Eval mode and no gradients inside; modes, random states, buffers and attributes as before afterwards.

    Rope that depends on what was fed keeps its state in buffers and plain attributes, so all of these are put back. So
    is what is trained: peft's disable_adapter() switches gradients off, and all of them on again.
    """
    import torch

    modules = list(model.modules())
    attributes = [_state(module) for module in modules]
    buffers = [{name: (one, one.clone()) for name, one in m._buffers.items() if one is not None} for m in modules]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with undisturbed_randomness(), evaluating(model):
        try:
            yield
        finally:
            for parameter, requires_grad in trained:
                parameter.requires_grad = requires_grad
            for module, state in zip(modules, attributes, strict=True):
                for name in _state(module).keys() - state.keys():
                    del module.__dict__[name]
                for name, (value, content) in state.items():
                    module.__dict__[name] = value
                    if content is not None and list(map(id, value)) != list(map(id, content)):
                        value[:] = content
            for module, kept in zip(modules, buffers, strict=True):  # last: to compare them needs memory
                for name in module._buffers.keys() - kept.keys():
                    module._buffers[name] = None
                for name, (buffer, copy) in kept.items():
                    module._buffers[name] = buffer
                    if not torch.equal(buffer, copy):
                        buffer.copy_(copy)


def _state(module: Any) -> dict[str, tuple[Any, list[Any] | None]]:
    """A module's plain attributes; of a list also what is in it, since lists are changed in place."""
    held = ("_parameters", "_buffers", "_modules")
    return {
        name: (value, list(value) if isinstance(value, list) else None)
        for name, value in vars(module).items()
        if name not in held
    }


@contextmanager
def undisturbed_randomness() -> Iterator[None]:
    """Every random state that training draws from is afterwards as before."""
    import torch

    numpy = sys.modules.get("numpy")
    python, numbers = random.getstate(), numpy.random.get_state() if numpy is not None else None
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numbers)
