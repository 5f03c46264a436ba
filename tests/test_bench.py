"""`ptfix bench` on tiny models in local folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ptfix
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
    assert list(ways) == [bench.LIMIT, bench.STOCK, bench.STOCK_UNCACHED, bench.FIXED, bench.FIXED_UNCACHED]
    assert ways[bench.LIMIT]["of_limit"] == 1
    assert all("error" in row or row["tokens_per_second"] > 0 for row in ways.values())
    assert all(name in bench._text(findings) for name in ways)


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


def test_the_untrained_soft_prompt_says_what_its_tokens_say() -> None:
    import torch

    base = base_model("llama")
    prompt_ids, input_ids = torch.tensor([3, 1, 4]), torch.tensor([[5, 9, 2, 6]])
    ways = bench.ways(base, bench.untrained(base, prompt_ids), prompt_ids, input_ids)
    laps, errors = bench.race([way for way in ways if way.fixed or way.name == bench.LIMIT], 6, 1)
    assert not errors
    limit, fixed, uncached = (laps[name][0].ids for name in (bench.LIMIT, bench.FIXED, bench.FIXED_UNCACHED))
    assert limit.equal(fixed)
    assert limit.equal(uncached)


def test_ratios_are_taken_round_by_round() -> None:
    import torch

    ids = torch.zeros(1, 4, dtype=torch.long)
    laps = {"fast": [bench.Lap(1, 1, ids), bench.Lap(2, 2, ids)], "slow": [bench.Lap(2, 2, ids), bench.Lap(4, 4, ids)]}
    assert bench.ratios(laps, "fast", "slow", lambda lap: lap.tokens_per_second) == [2, 2]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere is not a folder"),
        (["."], "cannot read a model there"),
        ([".", "--batch", "0"], "--batch must be at least 1"),
        ([".", "--new-tokens", "1"], "--new-tokens must be at least 2"),
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
