"""Is the installed pair wrong? Asked of the hosts themselves, on a model of a few hundred weights, in milliseconds.

A release nobody has seen is judged by what it does, not by its number. Each probe returns how the host is wrong, or
None.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch

from ptfix.soft_prompts import first_use, reference, views

_VIRTUAL_TOKENS = 2


def generation_fault() -> str | None:
    """Does generate() of a prompt-tuned model differ from its training forward, in any of the modes that have ever
    been wrong?"""
    with _aside():
        model = _prompt_tuned()
        ids = torch.tensor([[3, 4, 5, 6]])
        return (
            _differs("a left-padded batch", lambda: _padded_scores(model), reference.last_logits(model, ids[:, 1:])[0])
            or _differs("greedy decoding", lambda: model.generate(input_ids=ids, **_TWO)[0, 4:], _truth(model, ids))
            or _differs("a second turn", lambda: _second_turn(model, ids), _second_truth(model, ids))
            or _differs(
                "a static cache",
                lambda: model.generate(input_ids=ids, cache_implementation="static", **_TWO)[0, 4:],
                _truth(model, ids),
            )
        )


def left_padding_fault() -> str | None:
    """Does forward() move a left-padded text away from its soft prompt?"""
    with _aside():
        model = _prompt_tuned()
        ids, mask = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
        with torch.no_grad():
            padded = model(input_ids=ids, attention_mask=mask).logits[0, -1]
        alone = reference.last_logits(model, ids[:, 2:])[0]
    return None if torch.allclose(padded, alone, atol=1e-4) else "padding on the left changes the positions of the text"


def prefix_forward_fault() -> str | None:
    """Does the training forward of a prefix raise, or leave the prefix out?"""
    return full_attention_prefix_fault() or sliding_window_prefix_fault()


def full_attention_prefix_fault() -> str | None:
    """Where every layer looks back to the start (llama)."""
    with _aside():
        return _prefix_fault("", _tiny(_prefix_config()))


def sliding_window_prefix_fault() -> str | None:
    """Where some layers look back through a sliding window (gemma2)."""
    import transformers

    if not hasattr(transformers, "Gemma2Config"):
        return None
    with _aside():
        return _prefix_fault(" of gemma2", _tiny(_prefix_config(), "Gemma2", head_dim=4, sliding_window=4))


def _prefix_fault(where: str, model: Any) -> str | None:
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    model.train()
    try:
        # Without a KV cache of its own, as Trainer sets it, and without a mask.
        gradient = _prefix_gradient(model, ids, use_cache=False)
    except Exception as error:
        return f"the training forward{where} raises {type(error).__name__}"
    return None if gradient is not None and bool(gradient.any()) else f"the training forward{where} leaves it out"


def prefix_checkpointing_fault() -> str | None:
    """Is a prefix trained as without it when gradient checkpointing is switched on after wrapping, as Trainer does?"""
    ids = torch.tensor([[3, 4, 5, 6]])
    with _aside():
        model = _tiny(_prefix_config()).train()
        try:
            plain = _prefix_gradient(model, ids)
        except Exception as error:
            return f"the training forward raises {type(error).__name__}, also with gradient checkpointing"
        model.zero_grad()
        model.get_base_model().gradient_checkpointing_enable()
        model.get_base_model().enable_input_require_grads()
        try:
            checkpointed = _prefix_gradient(model, ids)
        except Exception as error:
            return f"the training forward with gradient checkpointing raises {type(error).__name__}"
    if plain is None or checkpointed is None or not torch.allclose(plain, checkpointed, atol=1e-5):
        return "with gradient checkpointing the prefix is not trained"
    return None


def first_use_fault() -> str | None:
    """Does generate() of a soft prompt that answers otherwise than it was trained say nothing?"""
    with _aside(), first_use.hearing() as findings:
        model = views.shallow(_prompt_tuned())
        model.__class__ = _trained_otherwise(type(model))
        with suppress(Exception):  # a host that raises is another fix's business
            model.generate(input_ids=torch.tensor([[3, 4, 5, 6]]), **_TWO)
    return None if findings else "nothing compares what generate() says with what was trained"


def _trained_otherwise(model_class: type[Any]) -> type[Any]:
    class TrainedOtherwise(model_class):  # type: ignore[misc]
        """Its training forward says something that no generate() can."""

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits + torch.arange(outputs.logits.shape[-1]) * 10
            return outputs

    return TrainedOtherwise


def sharded_saving_fault() -> str | None:
    """Does saving fail where the weights of a soft prompt are a DTensor, as FSDP2 leaves them?"""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    with _aside():
        model = copy.deepcopy(_prompt_tuned())
        embedding = model.prompt_encoder.default.embedding
        whole = embedding.weight.detach().clone()
        # All processes of this mesh are this one, so that nobody is talked to.
        mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
        embedding.weight = torch.nn.Parameter(DTensor.from_local(whole, mesh, [Shard(0)], run_check=False))
        try:
            saved = model.get_prompt_embedding_to_save("default")
        except Exception as error:
            return f"saving a sharded soft prompt raises {type(error).__name__}"
    return None if torch.equal(saved, whole) else "a sharded soft prompt is not saved whole"


def split_prefix_fault() -> str | None:
    """Does prefix tuning fail where attention computes only a part of the heads, as in a tensor parallel model?"""
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    if not hasattr(PreTrainedModel, "_tp_size"):
        return None
    with _aside():
        model = _tiny(_prefix_config())
        base = model.get_base_model()
        attention = base.model.layers[0].self_attn
        for name, dim in (("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)):  # one of two heads
            projection = getattr(attention, name)
            projection.weight = torch.nn.Parameter(projection.weight.detach().narrow(dim, 4, 4).clone())
        base._tp_size, base._device_mesh = 2, DeviceMesh("cpu", [0, 1], _init_backend=False, _rank=1)
        try:
            with torch.no_grad():
                model(input_ids=torch.tensor([[3, 4]]))
        except Exception as error:
            return f"prefix tuning of a tensor parallel model raises {type(error).__name__}"
    return None


def _prefix_config() -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=_VIRTUAL_TOKENS, num_layers=1, num_attention_heads=2, token_dim=8
    )


def _prefix_gradient(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor | None:
    model(input_ids=ids, labels=ids, **options).loss.backward()
    gradient = next(model.prompt_encoder.parameters()).grad
    return None if gradient is None else gradient.clone()


_TWO = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}


@cache
def _prompt_tuned() -> Any:
    from peft import PromptTuningConfig

    return _tiny(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=_VIRTUAL_TOKENS))


def _tiny(config: Any, family: str = "Llama", **fields: Any) -> Any:
    import transformers
    from peft import get_peft_model

    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
            **fields,
        )
    )
    wrapped = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return wrapped.eval()


def _truth(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return reference.greedy(model, ids, 2)[0][0, ids.shape[1] :]


def _padded_scores(model: Any) -> torch.Tensor:
    out = model.generate(
        input_ids=torch.tensor([[0, 4, 5, 6], [3, 4, 5, 6]]),
        attention_mask=torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        output_scores=True,
        return_dict_in_generate=True,
        **{**_TWO, "max_new_tokens": 1},
    )
    scores: torch.Tensor = out.scores[0][0].float()
    return scores


def _second_turn(model: Any, ids: torch.Tensor) -> torch.Tensor:
    first = model.generate(input_ids=ids, return_dict_in_generate=True, **_TWO)
    again = torch.cat((first.sequences, ids), 1)
    out: torch.Tensor = model.generate(
        input_ids=again, attention_mask=torch.ones_like(again), past_key_values=first.past_key_values, **_TWO
    )
    return out[0, again.shape[1] :]


def _second_truth(model: Any, ids: torch.Tensor) -> torch.Tensor:
    first, _ = reference.greedy(model, ids, 2)
    return _truth(model, torch.cat((first, ids), 1))


def _differs(what: str, run: Callable[[], torch.Tensor], truth: torch.Tensor) -> str | None:
    try:
        got = run()
        same = torch.allclose(got, truth, atol=1e-4) if truth.is_floating_point() else torch.equal(got, truth)
    except Exception as error:
        return f"{what} raises {type(error).__name__}"
    return None if same else f"{what} is continued otherwise than by the training forward"


@contextmanager
def _aside() -> Iterator[None]:
    """Leave the user's random state, warnings and log as they were."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loggers = [logging.getLogger(name) for name in ("transformers", "peft")]
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
