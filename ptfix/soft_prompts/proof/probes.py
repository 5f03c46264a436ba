"""Is the installed pair wrong? Asked of the hosts themselves, on a model of a few hundred weights, in milliseconds.

A release nobody has seen is judged by what it does, not by its number. Each probe returns how the host is wrong, or
None.
"""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from ptfix.soft_prompts import caches, views
from ptfix.soft_prompts.proof import check, first_use, reference

_VIRTUAL_TOKENS = 2


@contextmanager
def aside() -> Iterator[None]:
    """The same conditions whatever the caller's are; nothing of the caller's or of another thread's is touched.

    Each of these acts on the current thread alone. The default dtype belongs to the process, so it stays as it is.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        _on_cpu(),
        _as_float32(),
        _silence(),
    ):
        yield


def _on_cpu() -> Any:
    """New tensors are on the cpu. Nothing where they are already, since such a mode slows every call down."""
    default = getattr(torch, "get_default_device", lambda: None)()  # since torch 2.3
    return nullcontext() if default == torch.device("cpu") else torch.device("cpu")


def _as_float32() -> Any:
    """New tensors are float32, whatever the process's default is."""
    return nullcontext() if torch.get_default_dtype() is torch.float32 else _Float32()


class _Float32(TorchFunctionMode):  # type: ignore[misc]
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        # Up to 4.37 hosts fill masks with the least float32, which bfloat16 cannot hold.
        filled = name == "full" and isinstance(kwargs.get("fill_value", args[-1]), float)
        if (filled or name in ("empty", "zeros", "ones")) and kwargs.get("dtype") is None:
            kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


class _PrivateRandom(TorchFunctionMode):  # type: ignore[misc]
    """New weights are drawn from a generator of our own, not from torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator("cpu").manual_seed(0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


class _ThisThread:
    """The warnings and log records of the thread that made it."""

    def __init__(self) -> None:
        self.ident = threading.get_ident()

    def match(self, text: str) -> bool:
        """Asked by `warnings`, as if this were a pattern for the message."""
        return threading.get_ident() == self.ident

    def filter(self, record: logging.LogRecord) -> bool:
        """Asked by `logging`: may this record pass?"""
        return threading.get_ident() != self.ident


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what the hosts say to this thread: a broken host complains, and a warning may be an error here.

    ``catch_warnings`` and ``setLevel`` would act on every thread.
    """
    this_thread = _ThisThread()
    ignore: Any = ("ignore", this_thread, Warning, None, 0)
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    if logging.lastResort is not None:
        handlers.add(logging.lastResort)
    warnings.filters.insert(0, ignore)  # type: ignore[attr-defined]
    for handler in handlers:
        handler.addFilter(this_thread)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(this_thread)
        with suppress(ValueError):  # another thread's catch_warnings() may have put the filters back
            warnings.filters.remove(ignore)  # type: ignore[attr-defined]


@aside()
def generation_fault() -> str | None:
    """Does generate() of a prompt-tuned model differ from its training forward, in any of the modes that have ever
    been wrong?"""
    from transformers import GenerationConfig

    model, ids = _prompt_tuned(), torch.tensor([[3, 4, 5, 6]])
    fault = _differs("a left-padded batch", lambda: _padded_scores(model), reference.last_logits(model, ids[:, 1:])[0])
    if fault is not None:
        return fault
    truth, answers = reference.greedy(model, ids, 2)[0], []

    def first_turn() -> torch.Tensor:
        answers.append(model.generate(input_ids=ids, return_dict_in_generate=True, **_TWO))
        return answers[0].sequences

    def second_turn() -> torch.Tensor:
        again = torch.cat((truth, ids), 1)
        held = {caches.keyword(): caches.of(answers[0])}
        return model.generate(input_ids=again, attention_mask=torch.ones_like(again), **held, **_TWO)[0, -2:]

    def static_cache() -> torch.Tensor:
        return model.generate(input_ids=ids, cache_implementation="static", **_TWO)

    fault = _differs("greedy decoding", first_turn, truth)
    if fault is None and hasattr(GenerationConfig(), "cache_implementation"):  # from 4.38 on
        fault = _differs("a static cache", static_cache, truth)
    if fault is None:
        fault = _differs("a second turn", second_turn, _truth(model, torch.cat((truth, ids), 1)))
    return fault


@aside()
def left_padding_fault() -> str | None:
    """Does forward() move a left-padded text away from its soft prompt?"""
    model = _prompt_tuned()
    ids, mask = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask).logits[0, -1]
    alone = reference.last_logits(model, ids[:, 2:])[0]
    return None if torch.allclose(padded, alone, atol=1e-4) else "padding on the left changes the positions of the text"


@aside()
def classifier_fault() -> str | None:
    """Can no adapter be put on a classifier?"""
    try:
        _classifier.__wrapped__()  # a new one: one that was made with a fix on says nothing about this host
    except Exception as error:
        return f"an adapter on a classifier raises {type(error).__name__}"
    return None


@aside()
def padded_class_fault() -> str | None:
    """Does a task head answer a padded row otherwise than the row alone?"""
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 0, 0]])
    mask = (ids != 0).long()
    left, right, alone = slice(0, 7), slice(2, 9), slice(2, 7)
    features = _feature_model()
    padded, real = _features(features, ids[:, left], mask[:, left]), _features(features, ids[:, alone])
    if not torch.allclose(padded[:, -5:], real[:, -5:], atol=1e-4):
        return "padding on the left changes the features of a text"
    try:
        model = _classifier()
    except TypeError:  # peft 0.13: until another fix is on, there is nothing to ask
        return None
    if not torch.allclose(_class_of(model, ids[:, right], mask[:, right]), _class_of(model, ids[:, alone]), atol=1e-4):
        return "padding on the right changes the class of a text"
    return None


@aside()
def token_outputs_fault() -> str | None:
    """Are there outputs for virtual tokens among those for the tokens of a text?"""
    rows = _features(_feature_model(), torch.tensor([[5, 6, 7]])).shape[1]
    return None if rows == 3 else "virtual tokens are counted among the tokens of a text"


@aside()
def prefix_class_fault() -> str | None:
    """Does prefix tuning of a classifier raise?"""
    model = _classifier(is_prefix=True)
    try:
        _class_of(model, torch.tensor([[5, 6, 7]]))
    except Exception as error:
        return f"prefix tuning of a classifier raises {type(error).__name__}"
    return None


def _class_of(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return _said(model, ids, mask).logits


def _features(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    return _said(model, ids, mask).last_hidden_state


def _said(model: Any, ids: torch.Tensor, mask: torch.Tensor | None) -> Any:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids) if mask is None else mask)


@aside()
def cached_forward_fault() -> str | None:
    """Is a text whose beginning and soft prompt stand in a KV cache continued otherwise than it was trained?"""
    model, ids = _prompt_tuned(), torch.tensor([[3, 4, 5, 6]])

    def in_two_parts() -> torch.Tensor:
        with torch.no_grad():
            held = caches.of(model(input_ids=ids[:, :3], use_cache=True))
            logits: torch.Tensor = model(input_ids=ids[:, 3:], **{caches.keyword(): held}).logits
        return logits[0, -1:]

    return _differs("a loop over forward() with a cache", in_two_parts, reference.last_logits(model, ids))


@aside()
def packed_rows_fault() -> str | None:
    """Does the training forward take two packed rows for one?"""
    model, ids = _prompt_tuned(), torch.tensor([[3, 4, 5, 6]])
    try:
        with torch.no_grad():
            model(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1]]))
    except Exception:  # refused, by whoever
        return None
    return "two packed rows are read as one, with one soft prompt"


@aside()
def continuous_batching_fault() -> str | None:
    """Does continuous batching call the base model?"""
    model = _prompt_tuned()
    method = getattr(model, "generate_batch", None)
    return None if getattr(method, "__self__", None) is not model.base_model else "generate_batch() is the base model's"


@aside()
def cpt_loss_fault() -> str | None:
    """Does the loss of CPT depend on the adapter's name, or change the batch?"""
    model, ids = _cpt_tuned(), torch.tensor([[3, 4, 5, 6]])
    types = torch.ones_like(ids)
    try:
        with torch.no_grad():
            model(input_ids=ids, labels=ids, input_type_mask=types)
    except Exception as error:
        return f"the loss of an adapter that is not called 'default' raises {type(error).__name__}"
    return None if bool((types == 1).all()) else "the loss changes the batch's input_type_mask"


@aside()
def cpt_generate_fault() -> str | None:
    """Does generate() refuse what CPT's collator makes?"""
    model, ids = _cpt_tuned(), torch.tensor([[3, 4, 5, 6]])
    try:
        model.generate(input_ids=ids, input_type_mask=torch.ones_like(ids), **{**_TWO, "max_new_tokens": 1})
    except ValueError as error:
        return "generate() raises on input_type_mask" if "input_type_mask" in str(error) else None
    except Exception:  # another fix's business
        return None
    return None


@aside()
def full_attention_prefix_fault() -> str | None:
    """Does the training forward of a prefix raise, or leave it out? Where all layers look back to the start (llama)."""
    return _prefix_fault("", _prefix_tuned())


@aside()
def sliding_window_prefix_fault() -> str | None:
    """The same where some layers look back through a sliding window (gemma2)."""
    import transformers

    if not hasattr(transformers, "Gemma2Config"):
        return None
    return _prefix_fault(" of gemma2", tiny(_prefix_config(), "Gemma2", head_dim=4, sliding_window=4))


def _prefix_fault(where: str, model: Any) -> str | None:
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    model.train().zero_grad()
    try:
        # Without a KV cache of its own, as Trainer sets it, and without a mask.
        gradient = _prefix_gradient(model, ids, use_cache=False)
    except Exception as error:
        return f"the training forward{where} raises {type(error).__name__}"
    return None if gradient is not None and bool(gradient.any()) else f"the training forward{where} leaves it out"


@aside()
def prefix_checkpointing_fault() -> str | None:
    """Is a prefix trained as without it when gradient checkpointing is switched on after wrapping, as Trainer does?"""
    ids = torch.tensor([[3, 4, 5, 6]])
    model = copy.deepcopy(_prefix_tuned()).train()
    try:
        plain = _prefix_gradient(model, ids)
    except Exception as error:
        return f"the training forward raises {type(error).__name__}, also with gradient checkpointing"
    model.zero_grad()
    model.get_base_model().gradient_checkpointing_enable()
    model.get_base_model().enable_input_require_grads()
    for module in model.modules():
        chosen = vars(module).get("_gradient_checkpointing_func")
        if chosen is not None:
            options = getattr(chosen, "keywords", {})
            module._gradient_checkpointing_func = partial(_run_twice, use_reentrant=options.get("use_reentrant", True))
    try:
        checkpointed = _prefix_gradient(model, ids)
    except Exception as error:
        return f"the training forward with gradient checkpointing raises {type(error).__name__}"
    if plain is None or checkpointed is None or not torch.allclose(plain, checkpointed, atol=1e-5):
        return "with gradient checkpointing the prefix is not trained"
    return None


def _run_twice(function: Callable[..., Any], *args: Any, use_reentrant: bool, **kwargs: Any) -> Any:
    """torch's checkpoint for a layer that draws nothing: without hold of the random state of every thread, and without
    its import of the compiler."""
    if use_reentrant:
        return CheckpointFunction.apply(function, False, *args)
    function(*args, **kwargs)
    return function(*args, **kwargs)


@aside()
def first_use_fault() -> str | None:
    """Does generate() of a soft prompt that answers otherwise than it was trained say nothing?"""
    with first_use.hearing() as findings:
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


@aside()
def reload_fault() -> str | None:
    """Does an adapter in training come back as another one from what peft saves of it?"""
    from peft import peft_model

    model = views.shallow(_p_tuned())
    model._modules["prompt_encoder"] = copy.deepcopy(model.prompt_encoder)  # it is written to
    with torch.no_grad(), check.comparing():
        before = model.get_prompt(1)
        peft_model.set_peft_model_state_dict(model, peft_model.get_peft_model_state_dict(model))
        same = torch.equal(model.get_prompt(1), before)
    return None if same else "p-tuning is loaded from a checkpoint through its encoder once more"


@aside()
def seq2seq_prefix_fault(submodules: int) -> str | None:
    """What peft gives the decoder of an encoder-decoder: is it a prefix for self-attention, and nothing else?

    Asked of a decoder that passes for one, since t5 and bart take long to load. Cross-attention that is given keys and
    values reads them in place of the text: always (t5 since 4.46), or where the text is as long as the prefix.
    """
    from peft import PeftModelForSeq2SeqLM

    model = views.shallow(_prefix_tuned())
    model.__class__ = PeftModelForSeq2SeqLM
    config = copy.copy(model.peft_config["default"])
    config.num_transformer_submodules = submodules
    sizes = copy.copy(model.base_model.config)
    sizes.is_encoder_decoder = True
    model._modules["base_model"] = views.shallow(model.base_model, config=sizes)
    model.__dict__.update(_peft_config={"default": config}, config=sizes)
    where = f"a prefix of {submodules} submodule{'s' * (submodules > 1)}"
    try:
        held = model.get_prompt(1)
    except Exception as error:
        return f"the training forward with {where} raises {type(error).__name__}"
    if hasattr(held, "cross_attention_cache"):
        return f"with {where} cross-attention reads the prefix" if caches.length(held.cross_attention_cache) else None
    if caches.is_cache(held) or len(held[0]) != 4:
        return f"with {where} self-attention and cross-attention share one cache"
    return f"with {where} cross-attention reads the prefix" if held[0][2].numel() else None


@aside()
def seq2seq_generate_fault() -> str | None:
    """Does generate() of an encoder-decoder refuse a text, or keep the soft prompt inside disable_adapter()?

    What is wrong wherever anything is, and can be asked of a decoder. Whether what generate() answers is what was
    trained, the first use of a model shows.
    """
    from peft import PeftModelForSeq2SeqLM

    model, ids = views.shallow(_prefix_tuned()), torch.tensor([[3, 4, 5, 6]])
    model.__class__ = PeftModelForSeq2SeqLM
    truth = model.base_model.generate(ids, **_TWO)
    with model.disable_adapter():
        return _differs("the text of a disabled adapter", lambda: model.generate(ids, **_TWO), truth)


@aside()
def sharded_saving_fault() -> str | None:
    """Does saving fail where the weights of a soft prompt are a DTensor, as FSDP2 leaves them?"""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

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


@aside()
def split_prefix_fault() -> str | None:
    """Does prefix tuning fail where attention computes only a part of the heads, as in a tensor parallel model?"""
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel

    if not hasattr(PreTrainedModel, "_tp_size"):
        return None
    model = copy.deepcopy(_prefix_tuned())
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


def _prompt_config(task: str = "CAUSAL_LM") -> Any:
    from peft import PromptTuningConfig

    return PromptTuningConfig(task_type=task, num_virtual_tokens=_VIRTUAL_TOKENS)


def _prefix_config(task: str = "CAUSAL_LM") -> Any:
    from peft import PrefixTuningConfig

    return PrefixTuningConfig(
        task_type=task, num_virtual_tokens=_VIRTUAL_TOKENS, num_layers=1, num_attention_heads=2, token_dim=8
    )


def _prefix_gradient(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor | None:
    model(input_ids=ids, labels=ids, **options).loss.backward()
    gradient = next(model.prompt_encoder.parameters()).grad
    return None if gradient is None else gradient.clone()


#: Not synchronized: one rank may ask alone.
_TWO = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0, "synced_gpus": False}


@cache
def _prompt_tuned() -> Any:
    return tiny(_prompt_config())


@cache
def _p_tuned() -> Any:
    from peft import PromptEncoderConfig, get_peft_model

    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=_VIRTUAL_TOKENS, encoder_hidden_size=4)
    with _PrivateRandom():
        return get_peft_model(_prompt_tuned().base_model, config).float().eval()


@cache
def _cpt_tuned() -> Any:
    from peft import CPTConfig

    config = CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[2, 3], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], num_virtual_tokens=2
    )
    return tiny(config, adapter_name="probe")


@cache
def _prefix_tuned() -> Any:
    return tiny(_prefix_config())


@cache
def _feature_model() -> Any:
    return tiny(_prompt_config("FEATURE_EXTRACTION"), head="Model")


@cache
def _classifier(is_prefix: bool = False) -> Any:
    config = _prefix_config("SEQ_CLS") if is_prefix else _prompt_config("SEQ_CLS")
    return tiny(config, head="ForSequenceClassification")


def tiny(
    config: Any, family: str = "Llama", head: str = "ForCausalLM", adapter_name: str = "default", **fields: Any
) -> Any:
    import transformers
    from peft import get_peft_model

    sizes = getattr(transformers, f"{family}Config")(
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
    with _PrivateRandom():
        model = getattr(transformers, f"{family}{head}")(sizes)
        # Cast twice: peft notes the dtype of what it wraps, and makes the soft prompt in the default one.
        wrapped = get_peft_model(model.float(), config, adapter_name).float()
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


def _differs(what: str, run: Callable[[], torch.Tensor], truth: torch.Tensor) -> str | None:
    try:
        got = run()
        same = torch.allclose(got, truth, atol=1e-4) if truth.is_floating_point() else torch.equal(got, truth)
    except Exception as error:
        return f"{what} raises {type(error).__name__}"
    return None if same else f"{what} is continued otherwise than by the training forward"
