"""Trainer(tokenizer=...) works in every release of transformers, and nobody who does without it notices."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

from ptfix import hosts
from ptfix.fixes.trainer_tokenizer import FIX
from ptfix.patching import Patcher
from ptfix.report import Status

# What releases 4.46-4.57 say about the name is theirs to say.
pytestmark = pytest.mark.filterwarnings("ignore:`tokenizer` is deprecated:FutureWarning")

TOKENIZER, OTHER = object(), object()
DROPPED = hosts.in_window({"transformers": ">=5.0"})
CURRENT = "processing_class" if hosts.in_window({"transformers": ">=4.46"}) else "tokenizer"


@pytest.fixture
def patcher() -> Iterator[Patcher]:
    patcher = Patcher((FIX,))
    yield patcher
    patcher.revert()


@pytest.fixture
def applied(patcher: Patcher) -> Patcher:
    patcher.apply(strict=True)
    return patcher


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    """What any Trainer needs; a collator, because the default one would ask for a real tokenizer."""
    return {
        "model": torch.nn.Linear(1, 1),
        "args": Seq2SeqTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True),
        "data_collator": list,
    }


def given(trainer: Any) -> Any:
    """The tokenizer the host itself will save and hand to callbacks."""
    return getattr(trainer, CURRENT)


class Explicit(Trainer):  # type: ignore[misc]
    def __init__(self, model: Any, args: Any, data_collator: Any, tokenizer: Any = None) -> None:
        super().__init__(model, args, data_collator, tokenizer=tokenizer)


class Passing(Trainer):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


class Keeping(Trainer):  # type: ignore[misc]
    """Has a use of its own for the name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{CURRENT: OTHER}, **kwargs)

    @property
    def tokenizer(self) -> Any:
        return TOKENIZER

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        """Releases before 4.46 set it."""


class SettingFirst(Trainer):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tokenizer = TOKENIZER
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer, Explicit, Passing])
@pytest.mark.usefixtures("applied")
def test_tokenizer_is_accepted_and_can_be_read(kind: type[Any], arguments: dict[str, Any]) -> None:
    trainer = kind(**arguments, tokenizer=TOKENIZER)
    assert given(trainer) is TOKENIZER
    assert trainer.tokenizer is TOKENIZER


@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer, Passing])
@pytest.mark.usefixtures("applied")
def test_the_current_name_is_not_disturbed(kind: type[Any], arguments: dict[str, Any]) -> None:
    trainer = kind(**arguments, **{CURRENT: TOKENIZER})
    assert given(trainer) is TOKENIZER
    assert trainer.tokenizer is TOKENIZER


@pytest.mark.usefixtures("applied")
def test_the_sixth_positional_argument_is_not_disturbed(arguments: dict[str, Any]) -> None:
    assert given(Trainer(*arguments.values(), None, None, TOKENIZER)) is TOKENIZER


@pytest.mark.usefixtures("applied")
def test_no_tokenizer_stays_none(arguments: dict[str, Any]) -> None:
    for more in ({}, {"tokenizer": None}):
        trainer = Trainer(**arguments, **more)
        assert given(trainer) is None
        assert trainer.tokenizer is None


@pytest.mark.skipif(not DROPPED, reason="the host itself has the name")
@pytest.mark.parametrize("kind", [Trainer, Seq2SeqTrainer, Passing])
@pytest.mark.usefixtures("applied")
def test_both_names_are_refused(kind: type[Any], arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`tokenizer` and `processing_class`.*pass only one"):
        kind(**arguments, tokenizer=TOKENIZER, processing_class=OTHER)


@pytest.mark.skipif(not DROPPED, reason="the host itself has the name")
@pytest.mark.usefixtures("applied")
def test_an_explicit_none_beside_the_current_name_is_no_conflict(arguments: dict[str, Any]) -> None:
    assert given(Trainer(**arguments, tokenizer=None, processing_class=TOKENIZER)) is TOKENIZER


@pytest.mark.usefixtures("applied")
def test_a_subclass_keeps_its_own_tokenizer(arguments: dict[str, Any]) -> None:
    assert Keeping(**arguments).tokenizer is TOKENIZER


@pytest.mark.skipif(not DROPPED, reason="the host itself sets, or redirects, the attribute")
@pytest.mark.usefixtures("applied")
def test_a_subclass_that_set_its_tokenizer_first_keeps_it(arguments: dict[str, Any]) -> None:
    trainer = SettingFirst(**arguments, processing_class=OTHER)
    assert (trainer.tokenizer, trainer.processing_class) == (TOKENIZER, OTHER)


@pytest.mark.usefixtures("applied")
def test_an_unknown_argument_is_still_an_error(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        Trainer(**arguments, no_such_argument=1)


def test_signatures_stay_as_the_host_wrote_them(patcher: Patcher) -> None:
    kinds = (Trainer, Seq2SeqTrainer)
    before = [inspect.signature(kind.__init__) for kind in kinds]
    patcher.apply(strict=True)
    assert [inspect.signature(kind.__init__) for kind in kinds] == before
    assert all(CURRENT in signature.parameters for signature in before)


def test_revert_restores_the_very_functions(patcher: Patcher) -> None:
    before = [vars(kind)["__init__"] for kind in (Trainer, Seq2SeqTrainer)]
    patcher.apply(strict=True)
    patcher.revert()
    assert [vars(kind)["__init__"] for kind in (Trainer, Seq2SeqTrainer)] == before


def test_the_report_says_what_is_broken_in_the_words_of_the_host(patcher: Patcher) -> None:
    (row,) = patcher.apply(strict=True).rows
    if DROPPED:
        assert (row.status, "unexpected keyword argument 'tokenizer'" in row.reason) == (Status.APPLIED, True)
    else:
        assert row.status is Status.NOT_NEEDED


def test_the_probe_asks_the_host_not_its_version(patcher: Patcher) -> None:
    assert (FIX.probe() is not None) is DROPPED
    patcher.apply(strict=True)
    assert FIX.probe() is None


def test_a_host_that_takes_the_name_back_is_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    def __init__(self: Any, model: Any = None, args: Any = None, tokenizer: Any = None) -> None:
        raise AssertionError("the probe must not build a Trainer")

    monkeypatch.setattr(Trainer, "__init__", __init__)
    assert FIX.probe() is None
