"""Architectures with something of their own: other shapes in each layer, other positions, windows, and recurrence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import ptfix
from ptfix.soft_prompts import caches
from ptfix.soft_prompts.proof import reference
from tests.matrix import models, modes
from tests.matrix.models import NotInThisPair

MODES = ("greedy", "left_padded_batch", "left_padded_forward", "multi_turn")


@pytest.fixture(autouse=True)
def applied() -> Iterator[None]:
    ptfix.apply()
    torch.set_num_threads(1)
    yield
    ptfix.revert()


@pytest.mark.parametrize("method", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("architecture", ["mpt", "gpt_neo", "llama4_text", "gemma4_text", "mamba2"])
def test_every_row_is_as_alone(architecture: str, method: str) -> None:
    """Distances that do not start at the padding (mpt), local windows (gpt_neo, llama4), a shape for each layer and
    shared keys and values (gemma4), states in place of a cache (mamba2)."""
    if (architecture, method) == ("mamba2", "prefix_tuning"):
        pytest.skip("has no keys and values")
    try:
        bare, bench = modes.bare(architecture), modes.bench(architecture, method)
    except NotInThisPair as reason:
        pytest.skip(str(reason))
    except Exception as error:  # before ptfix comes in: peft itself
        ptfix.revert()
        with pytest.raises(type(error)):
            modes.bench(architecture, method)
        pytest.skip(f"stock cannot train it: {type(error).__name__}")
    can = {mode: modes.judge(mode, bare) for mode in ("output_scores", *MODES)}
    if not modes.host_can(can, "greedy"):
        pytest.skip("the base model alone is not exact here")
    outcomes = {mode: modes.judge(mode, bench) for mode in MODES if modes.host_can(can, mode)}
    if architecture == "mamba2" and outcomes.get("multi_turn", "exact") != "exact":
        assert "recurrent state" in outcomes.pop("multi_turn")  # refused: nobody can know what a state has read
    if method == "prefix_tuning" and not caches.can_put_when_fed(bench.base):  # before transformers 4.42
        for mode in {"left_padded_batch"} & set(outcomes):
            assert outcomes[mode] == "exact" or "left-padded row" in outcomes.pop(mode)
    assert set(outcomes.values()) <= {"exact"}, outcomes


def test_positions_that_start_at_one() -> None:
    """paligemma's forward() alone, since the base model's cached answers are not its uncached ones; and with a prefix,
    since it reads embeddings causally in one row and in both directions beside a padded one."""
    try:
        bench = modes.bench("paligemma", "prefix_tuning")
    except NotInThisPair as reason:
        pytest.skip(str(reason))
    except Exception as error:
        ptfix.revert()
        with pytest.raises(type(error)):
            modes.bench("paligemma", "prefix_tuning")
        pytest.skip(f"stock cannot train it: {type(error).__name__}")
    ids, mask, rows = modes.left_padded(bench)
    with torch.no_grad():
        logits = bench.model(input_ids=ids, attention_mask=mask).logits
        off = [
            (padded[-row.shape[1] :] - bench.model(input_ids=row, attention_mask=modes.ones(row)).logits[0]).abs().max()
            for padded, row in zip(logits, rows, strict=True)
        ]
    if off[0] > 1e-4 or not continues_padded_rows(bench.base, rows[1]):
        pytest.skip("the base model alone reads a padded row behind a cache otherwise than the row alone")
    assert off[1] < 1e-4


def continues_padded_rows(base: Any, row: torch.Tensor) -> bool:
    """Does padding behind a row change nothing of it where a KV cache stands in front?"""
    answers = []
    for text in (row, torch.nn.functional.pad(row, (0, 4))):
        mask = torch.cat((modes.ones(modes.hard_tokens()), (text != 0).long()), 1)
        with torch.no_grad():
            held = caches.of(base(input_ids=modes.hard_tokens(), use_cache=True))
            logits = base(input_ids=text, attention_mask=mask, **{caches.keyword(): held}).logits
        answers.append(logits[0, : row.shape[1]])
    return torch.allclose(*answers, atol=1e-4)


@pytest.fixture
def pictured() -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A tiny Qwen2.5-VL with a soft prompt, an image, and the ids of a text with it."""
    import transformers

    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this config is of transformers 5")
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 67,  # no other weight has so many rows: by that peft finds the embeddings
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 58, "vision_end_token_id": 59}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    base = models.sharpen(transformers.Qwen2_5_VLForConditionalGeneration(config), 0).eval()
    base.generation_config.eos_token_id = None
    if not models.accepts(base.forward, "mm_token_type_ids"):
        pytest.skip("this release has no training forward of embeddings without a mask: stock raises too")
    ids = torch.cat((torch.tensor([[3, 58, 60, 60, 60, 60, 59]]), torch.arange(5, 14)[None]), 1)
    image = {
        "pixel_values": torch.randn(16, 96, generator=torch.Generator().manual_seed(3)),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 60).int(),
    }
    return models.wrap(base, "prompt_tuning"), image, ids


def test_an_image_is_read_at_the_positions_of_training(pictured: tuple[Any, dict[str, torch.Tensor], Any]) -> None:
    model, image, ids = pictured
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "output_scores": True}
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **image, **options
    )
    text = ids
    for scores in out.scores:
        longer = {**image, "mm_token_type_ids": (text == 60).int()}
        with torch.no_grad():
            truth = model(input_ids=text, attention_mask=torch.ones_like(text), **longer).logits[:, -1]
        assert torch.allclose(scores, truth, atol=1e-3)
        text = torch.cat((text, scores.argmax(-1, keepdim=True)), 1)


def test_generate_leaves_no_image_positions_for_training(pictured: tuple[Any, dict[str, torch.Tensor], Any]) -> None:
    model, image, ids = pictured
    text = torch.arange(5, 14)[None]
    before = reference.last_logits(model, text)
    model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, pad_token_id=0, **image)
    assert model.base_model.model.rope_deltas is None
    assert torch.equal(reference.last_logits(model, text), before)


def test_left_padded_texts_of_an_image_model(pictured: tuple[Any, dict[str, torch.Tensor], Any]) -> None:
    model, _, _ = pictured
    rows = [torch.arange(5, 14)[None], torch.arange(20, 25)[None]]
    ids = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0)) for row in rows])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(row), (9 - row.shape[1], 0)) for row in rows])
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for row, answer in zip(rows, out, strict=True):
        assert torch.equal(answer[9:], reference.greedy(model, row, 4)[0][0, row.shape[1] :])
