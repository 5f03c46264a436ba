"""The four numbers, of configs as they lie on disk and as each installed release holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from ptfix.sequence_length import context
from tests.sequence_length.doubles import HARD_LIMIT, HARD_TABLES, NATIVE, llama, qwen_v1, with_table


def numbers(config: dict[str, Any]) -> tuple[int | None, ...]:
    """hard, pretrained, train mode, declared"""
    read = context.read(config)
    four = (read.hard_limit, read.pretrained_context, read.train_mode_context, read.declared_context)
    return tuple(None if one is None else one.value for one in four)


MPE, ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama", MPE: 2048}, (None, 2048, 2048, 2048)),
        ({"model_type": "llama", MPE: 2048, "rope_scaling": None}, (None, 2048, 2048, 2048)),
        # Qwen v1: what is declared is a promise about inference.
        ({"model_type": "qwen", "seq_length": 2048, MPE: 8192}, (None, 2048, 2048, 8192)),
        ({"model_type": "qwen", "seq_length": 8192, MPE: 32768}, (None, 8192, 8192, 32768)),
        # The recipe of the Qwen2.5 cards: the number is from before scaling.
        (
            {"model_type": "qwen2", MPE: 32768, "rope_scaling": {"type": "yarn", "factor": 4.0, ORIGINAL: 32768}},
            (None, 32768, 131072, 131072),
        ),
        # gpt-oss: it is from after scaling.
        (
            {"model_type": "gpt_oss", MPE: 131072, "rope_scaling": {"rope_type": "yarn", "factor": 32, ORIGINAL: 4096}},
            (None, 4096, 131072, 131072),
        ),
        # llama3 is never multiplied.
        (
            {"model_type": "llama", MPE: 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8, ORIGINAL: 8192}},
            (None, 131072, 131072, 131072),
        ),
        # Phi-3 keeps the original at the top, and once called the scheme "su".
        (
            {"model_type": "phi3", MPE: 131072, ORIGINAL: 4096, "rope_scaling": {"type": "su", "long_factor": [1.0]}},
            (None, 4096, 131072, 131072),
        ),
        ({"model_type": "bloom", "seq_length": 2048}, (None, None, None, None)),
        ({"model_type": "gpt2", "n_positions": 1024, "n_ctx": 1024}, (1024, 1024, 1024, 1024)),
        ({"model_type": "mpt", "max_seq_len": 2048}, (2048, 2048, 2048, 2048)),
        ({"model_type": "mistral", MPE: 32768, "sliding_window": 4096}, (None, 32768, 32768, 32768)),
        # Multimodal: the text model's own come first, and what it leaves out stands above.
        ({"model_type": "vl", MPE: 5, "text_config": {"model_type": "llama", MPE: 4096}}, (None, 4096, 4096, 4096)),
        ({"model_type": "vl", MPE: 4096, "text_config": {"model_type": "llama"}}, (None, 4096, 4096, 4096)),
        ({}, (None, None, None, None)),
    ],
)
def test_the_numbers_on_disk(config: dict[str, Any], expected: tuple[int | None, ...]) -> None:
    assert numbers(config) == expected


def test_transformers_5_never_has_an_empty_rope() -> None:
    rope = context.read({MPE: 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}).rope
    assert (rope.scheme, rope.theta) == ("default", 1e4)
    layers = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    rope = context.read({MPE: 8, "rope_parameters": layers}).rope
    assert (rope.scheme, rope.factor, rope.theta) == ("linear", 8.0, 1e6)


def test_a_rope_is_the_same_in_every_layout() -> None:
    """What a release before 5 saved, and what 5 makes of it, are no difference."""
    old = context.read({MPE: 64, "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}).rope
    new = context.read({MPE: 64, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}).rope
    silent = context.read({MPE: 64}).rope
    plain = context.read({MPE: 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}).rope
    assert not old.differs_from(new)
    assert not silent.differs_from(plain)
    assert old.differs_from(plain)
    assert plain.differs_from(context.read({MPE: 64, "rope_theta": 1e6}).rope)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "yarn", "factor": 4.0}, "does not say original_max_position_embeddings"),
        ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 64}, "are both 64"),
        ({"rope_type": "linear", "factor": 4.0}, "before scaling or after"),
        ({"rope_type": "dynamic", "factor": 4.0}, "before scaling or after"),
        ({"rope_type": "brandnew"}, "does not know rope scheme 'brandnew'"),
        ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32}, None),
        ({"rope_type": "llama3", "factor": 8.0, ORIGINAL: 32}, None),
        (None, None),
    ],
)
def test_doubts_are_told(rope: dict[str, Any] | None, words: str | None) -> None:
    doubts = context.read({MPE: 64, "rope_scaling": rope}).doubts
    assert len(doubts) == (words is not None)
    assert words is None or words in doubts[0]


def test_a_lost_theta_is_a_fault() -> None:
    assert "lost rope_theta" in context.read({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}).faults[0]
    assert context.read({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}).faults == ()


@pytest.mark.parametrize("family", HARD_TABLES)
def test_the_numbers_of_a_live_model_are_those_it_saves(family: str, tmp_path: Path) -> None:
    model = with_table(family)
    assert numbers(model.config.to_dict()) == (HARD_LIMIT,) * 4
    model.config.save_pretrained(tmp_path)
    saved = context.read_folder(tmp_path)
    assert saved == context.read(model.config.to_dict())


def test_live_configs_of_this_release() -> None:
    assert numbers(llama().config.to_dict()) == (None, NATIVE, NATIVE, NATIVE)
    assert numbers(qwen_v1().config.to_dict()) == (None, NATIVE, NATIVE, 4 * NATIVE)
    stretched = context.read(llama({"rope_type": "linear", "factor": 2.0}).config.to_dict())
    assert (stretched.rope.scheme, stretched.rope.factor) == ("linear", 2.0)
    assert numbers(transformers.BloomConfig().to_dict()) == (None,) * 4


def test_numbers_say_where_they_stand() -> None:
    read = context.read({"model_type": "qwen", "seq_length": 2048, MPE: 8192})
    assert str(read.train_mode_context) == "2048 (seq_length)"
    told = read.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["declared_context"] == {"tokens": 8192, "source": MPE}


@pytest.mark.parametrize("text", ["", "[1]", "{", "\xff"])
def test_an_unreadable_config_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json"):
        context.read_folder(tmp_path)


def test_no_config_is_no_answer(tmp_path: Path) -> None:
    assert context.read_folder(tmp_path) is None
