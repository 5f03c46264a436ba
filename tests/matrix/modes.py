"""Every way of generating and training, each compared with the adapter's own training forward.

A mode is a function of a `Bench`. It returns pairs (got, truth) of tensors; token ids must be equal, floats close
(1e-3). The same function runs on the bare base model first: what the host cannot do without an adapter is the host's
(`host`).
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from ptfix.soft_prompts import caches
from ptfix.soft_prompts.proof import reference
from tests.matrix import zoo
from tests.matrix.models import ARCHITECTURES, VIRTUAL_TOKENS, VOCAB, base_model, task_ids, wrap

Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]
NEW = 5


@dataclass
class Bench:
    """One architecture and method: the base model, the adapter on it, and the truth."""

    architecture: str
    method: str
    base: Any
    model: Any
    bare: bool = False  # run on the base model alone, to see whether the host can do the mode at all
    truths: dict[Any, Any] = field(default_factory=dict)  # kept: the stock run is judged by the same truth

    @property
    def ids(self) -> torch.Tensor:
        ids = torch.randint(2, VOCAB, (1, 9), generator=torch.Generator().manual_seed(7))
        # The bare model reads a hard prompt as long as the soft one, to meet the same lengths.
        return torch.cat((hard_tokens(), ids), 1) if self.bare else ids

    def truth(self, ids: torch.Tensor, new: int = NEW) -> tuple[torch.Tensor, torch.Tensor]:
        key = (tuple(ids[0].tolist()), new)
        if key not in self.truths:
            self.truths[key] = reference.greedy(self.model, ids, new, task_ids(self.method, 1).get("task_ids"))
        return self.truths[key]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        key = tuple(ids[0].tolist())
        if key not in self.truths:
            self.truths[key] = reference.last_logits(self.model, ids, task_ids(self.method, 1).get("task_ids"))
        logits: torch.Tensor = self.truths[key]
        return logits

    def generate(self, *args: Any, model: Any = None, rows: int = 1, **kwargs: Any) -> Any:
        kwargs = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **task_ids(self.method, rows), **kwargs}
        kwargs = {name: value for name, value in kwargs.items() if value is not DROP}
        return (model or self.model).generate(*args, **kwargs)


DROP: Any = object()


def hard_tokens() -> torch.Tensor:
    return torch.randint(2, VOCAB, (1, VIRTUAL_TOKENS), generator=torch.Generator().manual_seed(9))


def text(b: Bench) -> int:
    return b.ids.shape[1]


def ones(ids: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(ids)


def left_padded(bench: Bench, ids: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    ids = bench.ids if ids is None else ids
    rows = [ids, ids[:, 4:]]
    pad = ids.shape[1] - rows[1].shape[1]
    short = torch.cat((rows[1].new_zeros(1, pad), rows[1]), 1)
    ids = torch.cat((rows[0], short))
    mask = ones(ids)
    mask[1, :pad] = 0
    return ids, mask, rows


def greedy(b: Bench) -> Pairs:
    return [
        (b.generate(input_ids=b.ids, attention_mask=ones(b.ids)), b.truth(b.ids)[0])
    ]  # which is not the base's: see bench()


def plain(b: Bench, **options: Any) -> Any:
    """What the base model itself says."""
    return b.base.generate(
        input_ids=b.ids, attention_mask=ones(b.ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )


def no_mask(b: Bench) -> Pairs:
    return [(b.generate(input_ids=b.ids), b.truth(b.ids)[0])]


def no_cache(b: Bench) -> Pairs:
    return [(b.generate(input_ids=b.ids, attention_mask=ones(b.ids), use_cache=False), b.truth(b.ids)[0])]


def past_key_values_none(b: Bench) -> Pairs:
    return [(b.generate(input_ids=b.ids, attention_mask=ones(b.ids), past_key_values=None), b.truth(b.ids)[0])]


def left_padded_batch(b: Bench, **options: Any) -> Pairs:
    ids, mask, rows = left_padded(b)
    out = b.generate(
        input_ids=ids, attention_mask=mask, rows=2, output_scores=True, return_dict_in_generate=True, **options
    )
    for i, row in enumerate(rows):
        tokens, scores = b.truth(row)
        yield out.sequences[i, text(b) :], tokens[0, row.shape[1] :]
        yield torch.stack(out.scores)[:, i], scores


def output_scores(b: Bench, **options: Any) -> Pairs:
    out = b.generate(
        input_ids=b.ids, attention_mask=ones(b.ids), output_scores=True, return_dict_in_generate=True, **options
    )
    ids, scores = b.truth(b.ids)
    return [(out.sequences, ids), (torch.cat(out.scores), scores)]


def beam_search(b: Bench, beams: int = 3) -> Pairs:
    out = b.generate(input_ids=b.ids, attention_mask=ones(b.ids), num_beams=beams)
    alive = [(0.0, b.ids)]
    for _ in range(NEW):
        wider = []
        for score, ids in alive:
            best = b.logits(ids).log_softmax(-1)[0].topk(beams)
            wider += [
                (score + s, torch.cat((ids, t.view(1, 1)), 1))
                for s, t in zip(best.values.tolist(), best.indices, strict=True)
            ]
        alive = sorted(wider, key=lambda item: -item[0])[:beams]
    return [(out, alive[0][1])]


def sampling(b: Bench) -> Pairs:
    torch.manual_seed(11)
    out = b.generate(input_ids=b.ids, attention_mask=ones(b.ids), do_sample=True, top_k=0)
    torch.manual_seed(11)
    ids = b.ids
    for _ in range(NEW):
        ids = torch.cat((ids, torch.multinomial(b.logits(ids).softmax(-1), 1)), 1)
    return [(out, ids)]


def repetition_penalty(b: Bench, penalty: float = 3.0) -> Pairs:
    out = b.generate(input_ids=b.ids, attention_mask=ones(b.ids), repetition_penalty=penalty)
    ids = b.ids
    for _ in range(NEW):
        logits = b.logits(ids)
        seen = logits.gather(1, ids)
        logits = logits.scatter(1, ids, torch.where(seen < 0, seen * penalty, seen / penalty))
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    return [(out, ids)]


def early_eos(b: Bench) -> Pairs:
    truth = b.truth(b.ids)[0]
    eos = int(truth[0, text(b) + 2])
    stop = truth[0, text(b) :].tolist().index(eos) + 1
    out = b.generate(input_ids=b.ids, attention_mask=ones(b.ids), eos_token_id=eos)
    return [(out, truth[:, : text(b) + stop])]


def max_length(b: Bench) -> Pairs:
    out = b.generate(input_ids=b.ids, attention_mask=ones(b.ids), max_new_tokens=DROP, max_length=text(b) + NEW)
    return [(out, b.truth(b.ids)[0])]


def positional_ids(b: Bench) -> Pairs:
    return [(b.generate(b.ids, attention_mask=ones(b.ids)), b.truth(b.ids)[0])]


class _Collector:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None: ...


def streamer(b: Bench) -> Pairs:
    collector = _Collector()
    b.generate(input_ids=b.ids, attention_mask=ones(b.ids), streamer=collector)
    return [(torch.tensor([collector.tokens]), b.truth(b.ids)[0])]


def static_cache(b: Bench) -> Pairs:
    return output_scores(b, cache_implementation="static")


def static_cache_left_padded(b: Bench) -> Pairs:
    return left_padded_batch(b, cache_implementation="static")


def own_dynamic_cache(b: Bench) -> Pairs:
    from transformers import DynamicCache

    return [
        (b.generate(input_ids=b.ids, attention_mask=ones(b.ids), past_key_values=DynamicCache()), b.truth(b.ids)[0])
    ]


def _second_turn(b: Bench, new: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    first = b.generate(input_ids=b.ids, attention_mask=ones(b.ids), return_dict_in_generate=True)
    yield first.sequences, b.truth(b.ids)[0]
    ids = torch.cat((first.sequences, new_tokens(1, new)), 1)
    yield b.generate(input_ids=ids, attention_mask=ones(ids), **on_the_cache(b, first)), b.truth(ids)[0]


def new_tokens(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(8))


def on_the_cache(b: Bench, outputs: Any) -> dict[str, Any]:
    """The argument that continues on the cache which generate() returned."""
    cache = caches.of(outputs)
    if b.bare and cache is None:
        raise NotImplementedError("this host returns no cache")
    return {caches.keyword(): cache}


def multi_turn(b: Bench) -> Pairs:
    return _second_turn(b, 3)


def multi_turn_long(b: Bench) -> Pairs:
    """A second turn longer than the soft prompt."""
    return _second_turn(b, 8)


def multi_turn_left_padded(b: Bench) -> Pairs:
    """The second turn of a left-padded batch: the first one's sequences, new tokens, and a mask over all of it."""
    ids, mask, rows = left_padded(b)
    options = {"rows": 2, "return_dict_in_generate": True}
    first = b.generate(input_ids=ids, attention_mask=mask, **options)
    ids = torch.cat((first.sequences, new_tokens(2, 3)), 1)
    mask = torch.cat((mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])), 1)
    second = b.generate(input_ids=ids, attention_mask=mask, **options, **on_the_cache(b, first))
    for i, row in enumerate(rows):
        alone = ids[i : i + 1, text(b) - row.shape[1] :]
        yield second.sequences[i, ids.shape[1] :], b.truth(alone)[0][0, alone.shape[1] :]


def regenerate(b: Bench) -> Pairs:
    """Another answer to a text that the cache holds already, then to a shorter text than the cache holds."""
    first = b.generate(input_ids=b.ids, attention_mask=ones(b.ids), return_dict_in_generate=True)
    for ids in (b.ids, b.ids[:, :-2]):
        yield b.generate(input_ids=ids, attention_mask=ones(ids), **on_the_cache(b, first)), b.truth(ids)[0]


def cache_keyword(b: Bench) -> Pairs:
    """A cache goes in under each name that the host takes, and comes out under the host's own."""
    from transformers import DynamicCache

    options = {"input_ids": b.ids, "attention_mask": ones(b.ids), "return_dict_in_generate": True}
    host = plain(b, return_dict_in_generate=True)
    for name in ("past_key_values", "cache"):
        try:
            plain(b, **{name: DynamicCache()})
        except (TypeError, ValueError):
            continue  # not a name of this host's
        out = b.generate(**options, **{name: DynamicCache()})
        yield out.sequences, b.truth(b.ids)[0]
        yield torch.tensor(list(out) == list(host)), torch.tensor(True)


def inputs_embeds(b: Bench) -> Pairs:
    embeds = b.base.get_input_embeddings()(b.ids)
    out = b.generate(inputs_embeds=embeds.detach(), attention_mask=ones(b.ids))
    return [(out[:, -NEW:], b.truth(b.ids)[0][:, text(b) :])]


def chunked_prefill(b: Bench) -> Pairs:
    return [(b.generate(input_ids=b.ids, attention_mask=ones(b.ids), prefill_chunk_size=4), b.truth(b.ids)[0])]


def prompt_lookup(b: Bench) -> Pairs:
    truth = b.truth(b.ids)[0]
    # A text that repeats what is to come, so that candidates exist and some are right.
    ids = torch.cat((b.ids, truth[:, text(b) - 2 :], b.ids, truth[:, text(b) - 2 : text(b) + 3]), 1)
    never = next(token for token in range(2, VOCAB) if token not in b.truth(ids, NEW + 4)[0])  # 4.44 needs an eos here
    out = b.generate(input_ids=ids, attention_mask=ones(ids), prompt_lookup_num_tokens=3, eos_token_id=never)
    return [_drafted(b, ids, out)]


def _drafted(b: Bench, ids: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Old releases let accepted drafts run past max_length; those tokens must be true as well."""
    return out, b.truth(ids, max(NEW, out.shape[1] - ids.shape[1]))[0]


def assisted(b: Bench) -> Pairs:
    # The bare base as its own adapter's assistant: some drafts are accepted, some are not.
    assistant = copy.deepcopy(b.base)
    return [_drafted(b, b.ids, b.generate(input_ids=b.ids, attention_mask=ones(b.ids), assistant_model=assistant))]


def twice(b: Bench) -> Pairs:
    greedy(b)
    return greedy(b)


def reloaded(b: Bench) -> Pairs:
    if b.bare:
        return greedy(b)
    with tempfile.TemporaryDirectory() as folder:
        b.model.save_pretrained(folder)
        model = peft.PeftModel.from_pretrained(copy.deepcopy(b.base), folder).eval()
    return [(b.generate(model=model, input_ids=b.ids, attention_mask=ones(b.ids)), b.truth(b.ids)[0])]


class _Meet(LogitsProcessor):
    """Makes two threads take turns at every step."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier = barrier

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.barrier.wait(timeout=60)
        return scores


def two_threads(b: Bench) -> Pairs:
    """Two adapters on one base model, interleaved step by step."""
    barrier, results = threading.Barrier(2), {}
    rival = b.base if b.bare else wrap(b.base, b.method, seed=3)
    texts = {"mine": (b.model, b.ids), "rival": (rival, b.ids.flip(1))}

    def work(name: str) -> None:
        model, ids = texts[name]
        try:
            results[name] = b.generate(
                model=model,
                input_ids=ids,
                attention_mask=ones(ids),
                logits_processor=LogitsProcessorList([_Meet(barrier)]),
            )
        except BaseException as error:
            barrier.abort()
            results[name] = error

    threads = [threading.Thread(target=work, args=(name,)) for name in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException) and not isinstance(result, threading.BrokenBarrierError):
            raise result
    if "rival" not in b.truths:
        b.truths["rival"] = reference.greedy(rival, b.ids.flip(1), NEW, task_ids(b.method, 1).get("task_ids"))[0]
    return [(results["mine"], b.truth(b.ids)[0]), (results["rival"], b.truths["rival"])]


class _Interrupt(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt


def interrupted(b: Bench) -> Pairs:
    """After Ctrl-C inside generate() the base model answers as before, and so does the adapter."""
    before = plain(b)
    attributes = {name: id(value) for name, value in vars(b.base).items()}
    with contextlib.suppress(KeyboardInterrupt):
        b.generate(input_ids=b.ids, attention_mask=ones(b.ids), logits_processor=LogitsProcessorList([_Interrupt()]))
    after = plain(b)
    same = attributes == {name: id(value) for name, value in vars(b.base).items()}
    return [(after, before), (torch.tensor(same), torch.tensor(True)), *greedy(b)]


def disabled(b: Bench) -> Pairs:
    """disable_adapter() gives the base model's own output, and leaving it gives the adapter's."""
    if b.bare:
        return greedy(b)
    with b.model.disable_adapter():
        off = b.model.generate(
            input_ids=b.ids, attention_mask=ones(b.ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    return [(off, plain(b)), *greedy(b)]


def left_padded_forward(b: Bench) -> Pairs:
    if b.bare:
        return  # without position_ids no host does this; peft's forward gives the caller no say in them
    ids, mask, rows = left_padded(b, torch.cat((b.ids, b.ids.flip(1)), 1))  # which is longer than a sliding window
    options = task_ids(b.method, 2)
    with torch.no_grad():
        logits = b.model(input_ids=ids, attention_mask=mask, **options).logits[:, -1].float()
        # Without each row's first token: what a position before it says depends on the method.
        first = [
            ids.masked_fill(mask.cumsum(-1) < 2, -100),
            *(row.masked_fill(ones(row).cumsum(-1) < 2, -100) for row in rows),
        ]
        loss = b.model(input_ids=ids, attention_mask=mask, labels=first[0], **options).loss
        alone = [
            b.model(input_ids=row, labels=labels, **task_ids(b.method, 1)).loss
            for row, labels in zip(rows, first[1:], strict=True)
        ]
    yield from ((logits[i : i + 1], b.logits(row)) for i, row in enumerate(rows))
    if b.method != "cpt":  # whose loss weighs tokens by their place
        tokens = torch.tensor([float(row.shape[1] - 1) for row in rows])
        yield loss, (torch.stack(alone) * tokens).sum() / tokens.sum()


def _loss(b: Bench, model: Any) -> torch.Tensor:
    ids = torch.cat((b.ids, b.ids.flip(1)))
    options = task_ids(b.method, 2)
    loss: torch.Tensor = model(input_ids=ids, attention_mask=ones(ids), labels=ids, **options).loss
    return loss


def training(b: Bench) -> Pairs:
    """The loss falls."""
    if b.bare:
        return []  # nothing to train
    model = copy.deepcopy(b.model).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        loss = _loss(b, model)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [(torch.tensor(losses[-1] < losses[0]), torch.tensor(True))]


def gradient_checkpointing(b: Bench) -> Pairs:
    """The prompt's gradient is the same with checkpointing switched on after wrapping, as Trainer does."""
    if b.bare:
        model = copy.deepcopy(b.base).train()
        model.gradient_checkpointing_enable()
        _loss(b, model).backward()
        return []
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(b.model).train()
        if checkpointing:
            # Trainer's own steps: switch it on, and let the inputs require a gradient
            model.get_base_model().gradient_checkpointing_enable()
            model.get_base_model().enable_input_require_grads()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        _loss(b, model).backward()
        trained = [p for p in model.prompt_encoder.parameters() if p.requires_grad]
        gradients.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trained]))
    nonzero = torch.tensor(bool(gradients[0].abs().max() > 0))
    return [(gradients[1], gradients[0]), (nonzero, torch.tensor(True))]


def hard_prompt(b: Bench) -> Pairs:
    """A soft prompt made of real tokens is a hard prompt: the base model reading them in front says the same. No peft
    in this truth."""
    if b.bare or b.method not in ("prompt_tuning", "prefix_tuning"):
        return []
    model = wrap(b.base, b.method)
    prompt = hard_tokens()
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        if b.method == "prompt_tuning":
            encoder.embedding.weight.copy_(model.word_embeddings(prompt)[0])
        else:
            encoder.embedding.weight.copy_(prefix_weight(keys_and_values(b.base, prompt)))
    truth = torch.cat((prompt, b.ids), 1)
    for _ in range(NEW):
        with torch.no_grad():
            logits = b.base(input_ids=truth, use_cache=False).logits[:, -1]
        truth = torch.cat((truth, logits.argmax(-1, keepdim=True)), 1)
    got = b.generate(model=model, input_ids=b.ids, attention_mask=ones(b.ids))
    return [(got, truth[:, prompt.shape[1] :])]


def keys_and_values(base: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    # By generate(), since some releases make a gemma cache nowhere else.
    cache = caches.of(
        base.generate(
            input_ids=ids,
            attention_mask=ones(ids),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
    )
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    if hasattr(cache, "key_cache"):
        # A hybrid cache is longer than what it holds.
        keep = ids.shape[1]
        return [(k[..., :keep, :], v[..., :keep, :]) for k, v in zip(cache.key_cache, cache.value_cache, strict=True)]
    pairs = []
    for layer in cache:
        if isinstance(layer, torch.Tensor) and layer.dim() == 3:  # gpt_bigcode: key and value of its one head together
            pairs.append(tuple(part.unsqueeze(1) for part in layer.chunk(2, -1)))
            continue
        key, value = layer
        if key.dim() == 3:  # bloom up to 4.43: [heads, dim, tokens] and [heads, tokens, dim]
            key, value = key.transpose(1, 2)[None], value[None]
        pairs.append((key, value))
    return pairs


def prefix_weight(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Keys and values as PrefixEncoder stores them: ``[tokens, layers * 2 * heads * dim]``."""
    flat = torch.stack([part[0] for pair in pairs for part in pair])  # [layers * 2, heads, tokens, dim]
    return flat.permute(2, 0, 1, 3).reshape(flat.shape[2], -1)


MODES: dict[str, Callable[[Bench], Pairs]] = {
    function.__name__: function
    for function in (
        greedy,
        no_mask,
        no_cache,
        past_key_values_none,
        left_padded_batch,
        output_scores,
        beam_search,
        sampling,
        repetition_penalty,
        early_eos,
        max_length,
        positional_ids,
        streamer,
        static_cache,
        static_cache_left_padded,
        own_dynamic_cache,
        multi_turn,
        multi_turn_long,
        multi_turn_left_padded,
        regenerate,
        cache_keyword,
        inputs_embeds,
        chunked_prefill,
        prompt_lookup,
        assisted,
        twice,
        reloaded,
        two_threads,
        interrupted,
        disabled,
        left_padded_forward,
        training,
        gradient_checkpointing,
        hard_prompt,
    )
}


def bench(architecture: str, method: str) -> Bench:
    """With the first adapter that answers otherwise than its base: or a mode that ignores it would pass."""
    base = base_model(architecture)
    sizes = {} if architecture in ARCHITECTURES else zoo.adapter_sizes(architecture, method)
    ids = torch.randint(2, VOCAB, (1, 9), generator=torch.Generator().manual_seed(7))
    plain_ids, _ = reference.greedy(base, ids, NEW)
    for seed in range(1, 20):
        candidate = Bench(architecture, method, base, wrap(base, method, seed, **sizes))
        if not torch.equal(candidate.truth(candidate.ids)[0], plain_ids):
            return candidate
    raise RuntimeError(f"no adapter of {method} on {architecture} acts")


def bare(architecture: str) -> Bench:
    base = base_model(architecture)
    return Bench(architecture, "none", base, base, bare=True)


def judge(mode: str, bench: Bench) -> str:
    """Run a mode: `exact`, `wrong: ...` (no error, wrong numbers), `raises: ...`, or `none` where there is nothing to
    compare."""
    for owner in (vars(bench.base), bench.base._modules):
        owner.pop("_cache", None)  # or a mode passes by what the one before it left behind
    verdict = "none"
    try:
        for got, truth in MODES[mode](bench):
            verdict = "exact"
            if got.shape != truth.shape:
                return f"wrong: shape {tuple(got.shape)} instead of {tuple(truth.shape)}"
            if truth.is_floating_point():
                difference = float((got.float() - truth.float()).abs().max())
                if not difference <= 1e-3 * max(1.0, float(truth.abs().max())):
                    return f"wrong: off by {difference:.3g}"
            elif not torch.equal(got, truth):
                return "wrong: other tokens" if truth.dtype == torch.long else "wrong"
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return f"raises: {type(error).__name__}: {lines[0][:160]}"
    return verdict


def host_can(outcomes: dict[str, str], mode: str) -> bool:
    """Can the bare base model do `mode`, by its own outcomes? A host whose cached scores are inexact can do no cached
    mode."""
    uncached = mode in ("no_cache", "left_padded_forward", "training", "gradient_checkpointing")
    if not uncached and outcomes.get("output_scores", "exact") != "exact":
        return False
    return outcomes[mode] in ("exact", "none")
