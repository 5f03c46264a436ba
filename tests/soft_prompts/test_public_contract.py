"""The second line: generate() by the public contract alone equals the training forward, or is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import ptfix
from ptfix.soft_prompts import caches, public_contract
from ptfix.soft_prompts.proof import reference, trials
from tests.matrix import modes
from tests.matrix.contract import PublicContract
from tests.matrix.models import NotInThisPair

ARCHITECTURES = ("llama", "qwen2", "gemma2", "gpt2", "bloom")
METHODS = ("prompt_tuning", "prefix_tuning")
MAIN_MODES = (
    "left_padded_batch",
    "output_scores",
    "sampling",
    "beam_search",
    "static_cache_left_padded",
    "interrupted",
)


pytestmark = pytest.mark.skipif(
    not hasattr(transformers.DynamicCache, "crop"),
    reason="before 4.42 no host generates with a cache of the caller's own",
)


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()  # the other fixes, without which some pairs have no training forward of a prefix
    torch.set_num_threads(1)
    yield
    ptfix.revert()


def made(architecture: str, method: str) -> PublicContract:
    try:
        bench = PublicContract(**vars(modes.bench(architecture, method)))
        bench.generate(input_ids=bench.ids, attention_mask=modes.ones(bench.ids))
    except NotInThisPair as reason:
        pytest.skip(str(reason))
    except public_contract.NotSupported as reason:
        if "takes no Cache object" in str(reason) or "'hybrid'" in str(reason):
            pytest.skip(str(reason))  # old releases, in which the public contract is not used
        raise
    return bench


@pytest.fixture(params=METHODS)
def bench(request: pytest.FixtureRequest) -> PublicContract:
    return made("llama", request.param)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_the_main_modes_equal_the_training_forward(architecture: str, method: str) -> None:
    bench = made(architecture, method)
    outcomes = {mode: modes.judge(mode, bench) for mode in MAIN_MODES}
    fallen_short = {mode: outcome for mode, outcome in outcomes.items() if outcome != "exact"}
    if fallen_short:
        bare = modes.bare(architecture)
        can = {mode: modes.judge(mode, bare) for mode in {*fallen_short, "output_scores"}}
        fallen_short = {mode: said for mode, said in fallen_short.items() if modes.host_can(can, mode)}
    assert not fallen_short


def test_every_main_mode_is_right_on_the_tiny_model() -> None:
    main = ("greedy", "no mask", "left-padded batch", "beam search", "max_length", "static cache", "second turn")
    assert {mode: fault for mode, fault in trials.modes().items() if mode.split(": ")[1] in main and fault} == {}


@pytest.mark.parametrize("is_prefix", [False, True])
def test_no_trial_passes_where_the_soft_prompt_is_ignored(is_prefix: bool) -> None:
    trial = trials._trial(is_prefix)
    ids, base = trial.ids, trial.model.base_model
    mine = reference.greedy(trial.model, ids, 8)[0][0, 4:]
    bare = reference.greedy(base, ids, 8)[0][0, 4:]
    assert mine[0] != bare[0]
    assert len(set(mine.tolist())) > 2


class _Sees(LogitsProcessor):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return scores


class _Stops(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class _Hears:
    def __init__(self) -> None:
        self.heard: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.heard.append(value)

    def end(self) -> None: ...


def test_whatever_looks_at_ids_is_given_the_real_ones(bench: PublicContract) -> None:
    ids, mask, _ = modes.left_padded(bench)
    sees = _Sees()
    allowed: list[torch.Tensor] = []

    def all_tokens(batch_id: int, sent: torch.Tensor) -> list[int]:
        allowed.append(sent[: ids.shape[1]].eq(ids[batch_id]).all())
        return list(range(64))

    out = bench.generate(
        input_ids=ids,
        attention_mask=mask,
        logits_processor=LogitsProcessorList([sees]),
        prefix_allowed_tokens_fn=all_tokens,
    )
    assert all(seen[:, : ids.shape[1]].equal(ids) for seen in sees.seen)
    assert len(sees.seen) == modes.NEW
    assert out[:, : ids.shape[1]].equal(ids)
    assert all(allowed)
    assert allowed

    hears = _Hears()
    stops = StoppingCriteriaList([_Stops(bench.ids.shape[1] + 2)])
    out = bench.generate(bench.ids, attention_mask=modes.ones(bench.ids), stopping_criteria=stops, streamer=hears)
    assert out.equal(bench.truth(bench.ids, 2)[0])
    assert hears.heard[0].equal(bench.ids)
    assert torch.cat([heard.reshape(-1) for heard in hears.heard]).equal(out[0])


@pytest.mark.parametrize(
    "option", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}]
)
def test_rules_about_the_whole_text_do_not_read_the_placeholders(bench: PublicContract, option: dict[str, Any]) -> None:
    from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

    rule: Any = (
        RepetitionPenaltyLogitsProcessor(option["repetition_penalty"])
        if "repetition_penalty" in option
        else NoRepeatNGramLogitsProcessor(option["no_repeat_ngram_size"])
    )
    ids = bench.ids
    for _ in range(12):
        ids = torch.cat((ids, rule(ids, bench.logits(ids)).argmax(-1, keepdim=True)), dim=1)
    out = bench.generate(bench.ids, attention_mask=modes.ones(bench.ids), max_new_tokens=12, **option)
    assert out.equal(ids)


def test_lengths_count_real_tokens(bench: PublicContract) -> None:
    text, truth = bench.ids.shape[1], bench.truth(bench.ids, 20)[0]
    config = GenerationConfig(max_length=text + 3, do_sample=False, pad_token_id=0)
    assert bench.generate(bench.ids, generation_config=config, max_new_tokens=modes.DROP).equal(truth[:, : text + 3])
    assert config.max_length == text + 3
    assert config.max_new_tokens is None
    eos = int(truth[0, text + 1])
    short = bench.generate(bench.ids, eos_token_id=eos)
    longer = bench.generate(bench.ids, eos_token_id=eos, min_length=short.shape[1] + 1)
    assert short.shape[1] <= text + 2 < longer.shape[1]
    with pytest.raises(ValueError, match="max_length"):
        bench.generate(bench.ids, max_length=text, max_new_tokens=modes.DROP)


def test_several_sequences_and_beams_of_a_padded_batch(bench: PublicContract) -> None:
    ids, mask, rows = modes.left_padded(bench)
    out = bench.generate(ids, attention_mask=mask, rows=2, num_beams=3, num_return_sequences=2)
    assert len(out) == 4
    for index, row in enumerate(rows):
        alone = bench.generate(row, attention_mask=modes.ones(row), num_beams=3, num_return_sequences=2)
        assert out[2 * index : 2 * index + 2, ids.shape[1] :].equal(alone[:, row.shape[1] :])


def test_a_second_turn_of_a_padded_batch(bench: PublicContract) -> None:
    ids, mask, rows = modes.left_padded(bench)
    first = bench.generate(ids, attention_mask=mask, rows=2, return_dict_in_generate=True)
    more = torch.tensor([[7, 8, 9], [9, 8, 7]])
    again = torch.cat((first.sequences, more), 1)
    mask = torch.cat((mask, mask.new_ones(2, again.shape[1] - mask.shape[1])), 1)
    held = caches.of(first)
    out = bench.generate(again, attention_mask=mask, rows=2, past_key_values=held)
    for index, row in enumerate(rows):
        text = again[index : index + 1, ids.shape[1] - row.shape[1] :]
        assert out[index, again.shape[1] :].equal(bench.truth(text)[0][0, text.shape[1] :])


def test_a_second_turn_may_pass_only_what_is_new(bench: PublicContract) -> None:
    first = bench.generate(bench.ids, return_dict_in_generate=True)
    held = caches.of(first)
    again = torch.cat((first.sequences, torch.tensor([[7, 8, 9]])), 1)
    new = again[:, first.sequences.shape[1] - 1 :]
    out = bench.generate(new, attention_mask=modes.ones(again), past_key_values=held)
    assert out.equal(bench.truth(again)[0][:, -new.shape[1] - modes.NEW :])
    with pytest.raises(ValueError, match="equally long"):
        bench.generate(new, attention_mask=modes.ones(again))


def test_nothing_shared_is_changed(bench: PublicContract) -> None:
    def all_of_it() -> list[Any]:
        models = [bench.model, *bench.model.modules()]
        return [(id(module), sorted(vars(module)), dict(module.__dict__.get("_modules", {}))) for module in models]

    config = bench.model.generation_config.to_dict()
    before, state = all_of_it(), torch.random.get_rng_state()
    ids, mask, _ = modes.left_padded(bench)
    for options in ({}, {"cache_implementation": "static"}):
        bench.generate(ids, attention_mask=mask, rows=2, **options)
    assert all_of_it() == before
    assert bench.model.generation_config.to_dict() == config
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"cache_implementation": "quantized"}, "quantized"),
        ({"position_ids": torch.arange(9).unsqueeze(0)}, "position_ids"),
        ({"num_beams": 2, "cache_implementation": "static"}, "beam search and static cache"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_trial_covers_is_refused_in_one_sentence(
    bench: PublicContract, option: dict[str, Any], named: str
) -> None:
    with pytest.raises(public_contract.NotSupported, match=named) as raised:
        bench.generate(bench.ids, attention_mask=modes.ones(bench.ids), **option)
    said = str(raised.value)
    assert "LlamaForCausalLM" in said
    assert bench.method.upper() in said
    assert said.count(". ") == 0


def drifted(drift: str, architectures: str, asked: str) -> dict[str, str | None]:
    """What the public contract answers on a next release that is otherwise."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 0):
        pytest.skip("the drifts are written against today's GenerationMixin")
    command = [sys.executable, "-m", "tests.soft_prompts.drift", drift, architectures, asked]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    answers: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_a_next_release_that_renames_its_private_methods_is_answered_right() -> None:
    main = "greedy,left_padded_batch,beam_search,max_length,static_cache,static_cache_left_padded"
    answers = drifted("renamed", "llama", main)
    assert len(answers) > 40
    assert {what: said for what, said in answers.items() if said} == {}


def test_a_mode_that_a_next_release_gets_wrong_is_refused_and_no_other() -> None:
    answers = drifted("drafts", "llama", "greedy,prompt_lookup")
    for method in METHODS:
        assert "NotSupported" in (said := str(answers[f"llama {method} prompt_lookup"]))
        assert "prompt lookup is not right" in said
    wrong = {what for what, said in answers.items() if said}
    assert wrong == {what for what in answers if "lookup" in what or "assisted" in what}
