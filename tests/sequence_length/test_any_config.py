"""Somebody's config.json holds what it likes."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptfix.sequence_length import context

NAMES = (
    "max_position_embeddings original_max_position_embeddings seq_length n_positions max_seq_len rope_scaling "
    "rope_parameters rope_type type factor rope_theta full_attention text_config model_type"
)
KEYS = st.sampled_from(NAMES.split())
WORDS = st.sampled_from(["yarn", "linear", "dynamic", "longrope", "llama3", "gpt2", "bloom", ""])
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | WORDS
JUNK = VALUES | st.lists(VALUES, max_size=2) | st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES), max_size=4)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, JUNK, max_size=8))
def test_any_json_is_read(config: dict[str, Any]) -> None:
    """Reading never raises, and a length is positive."""
    read = context.read(config)
    four = (read.hard_limit, read.pretrained_context, read.train_mode_context, read.declared_context)
    assert all(number is None or number.value > 0 for number in four)
    assert str(read.to_dict())
