"""Schedules: lengths from a step alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptfix.sequence_length import schedule


def test_linear_grows_evenly_in_multiples() -> None:
    assert [schedule.linear(8, 40, 4).length(step) for step in range(6)] == [8, 16, 24, 32, 40, 40]
    assert [schedule.linear(8, 24, 4).length(step) for step in range(5)] == [8, 8, 16, 16, 24]


def test_a_root_is_ahead_of_the_line() -> None:
    assert [schedule.root(16, 116, 4, multiple=1).length(step) for step in range(5)] == [16, 66, 86, 102, 116]


def test_steps_jump() -> None:
    stairs = schedule.steps([(0, 512), (3, 1024)])
    assert [stairs.length(step) for step in (0, 2, 3, 99)] == [512, 512, 1024, 1024]


def test_the_end_is_reached_whatever_the_multiple() -> None:
    assert schedule.linear(8, 45, 3).length(3) == 45


@given(start=st.integers(8, 500), more=st.integers(0, 5000), steps=st.integers(1, 300), degree=st.floats(1, 6))
def test_it_never_shrinks_and_stays_within(start: int, more: int, steps: int, degree: float) -> None:
    grows = schedule.root(start, start + more, steps, degree)
    lengths = [grows.length(step) for step in range(steps + 2)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == start + more
    assert all(length % schedule.MULTIPLE == 0 and length > 0 for length in lengths[:steps])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedule.linear(64, 32, 5), "no less than start"),
        (lambda: schedule.linear(4, 32, 5), "at least 8"),
        (lambda: schedule.linear(8, 32, 0), "at least 1"),
        (lambda: schedule.linear(8, 32, 1, multiple=0), "multiples of 0"),
        (lambda: schedule.root(8, 32, 5, degree=0.5), "degree is 0.5"),
        (lambda: schedule.steps([]), "first must be 0"),
        (lambda: schedule.steps([(5, 64)]), "first must be 0"),
        (lambda: schedule.steps([(0, 64), (0, 128)]), "each later"),
        (lambda: schedule.steps([(0, 1)]), "below 2"),
        (lambda: schedule.linear(1, 32, 5, multiple=1), "at least 2"),
    ],
)
def test_what_is_no_schedule_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
