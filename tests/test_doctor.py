from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import ptfix
from ptfix import evidence, fixes, hosts
from ptfix.cli import UsageError, doctor, main
from ptfix.evidence import Cell
from ptfix.patching import Edit, Fix

TARGET = "peft.peft_model:PeftModelForCausalLM.generate"


def fix(
    id: str,
    symptom: str | None = "greedy is wrong",
    affects: dict[str, str] | None = None,
    target: str = TARGET,
    proof: Callable[[], str | None] = lambda: None,
) -> Fix:
    edits = (Edit(target, lambda original: original),)
    return Fix(
        id, f"why {id}", f"https://example.invalid/{id}", affects or {}, lambda: symptom, edits, "peft is right", proof
    )


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Set the fixes, and the cells of the matrix, that this test sees."""

    def give(*chosen: Fix, cells: tuple[Cell, ...] = ()) -> None:
        monkeypatch.setattr(fixes, "ALL", chosen)
        monkeypatch.setattr(evidence, "cells", lambda: cells)
        ptfix._the_patcher.cache_clear()

    ptfix.revert()
    monkeypatch.delenv("PTFIX_DISABLE", raising=False)
    yield give
    ptfix._the_patcher.cache_clear()


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    status = main(["doctor", *arguments])
    output = capsys.readouterr()
    assert output.err == ""
    return status, json.loads(output.out) if "--json" in arguments else output.out


def test_each_fix_with_status_and_why_and_what_would_retire_it(
    given: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModelForCausalLM

    stock = PeftModelForCausalLM.generate
    given(fix("needed", affects={"peft": ">=0.6,<99"}), fix("healthy", None), fix("forever"))
    status, found = told(capsys, "--json")
    assert status == 0
    assert found["problems"] == []
    assert found["hosts"] == hosts.versions()
    assert [(each["id"], each["status"]) for each in found["fixes"]] == [
        ("needed", "disabled"),
        ("healthy", "not_needed"),
        ("forever", "disabled"),
    ]
    assert [each["upgrade"] for each in found["fixes"]] == [["peft>=99"], [], []]

    status, text = told(capsys)
    assert status == 0
    assert "not needed from peft>=99 on" in text
    assert "needed in every release until peft is right" in text
    assert "greedy is wrong" in text
    assert "https://example.invalid/needed" in text
    assert "probed and found healthy" in text
    assert PeftModelForCausalLM.generate is stock, "what the doctor tries does not stay"


def test_a_fix_that_does_not_mend_is_a_problem(given: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    given(fix("weak", proof=lambda: "greedy is still wrong"))
    status, found = told(capsys, "--json")
    assert status == 1
    assert found["fixes"][0]["status"] == "unsupported"
    assert found["problems"] == ["weak is needed but unsupported: with the fix on, greedy is still wrong"]


def test_a_needed_fix_that_is_unsupported_is_a_problem(
    given: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    given(fix("drifted", target="peft.peft_model:Gone.generate"))
    status, found = told(capsys, "--json")
    assert status == 1
    assert found["problems"][0].startswith("drifted is needed but unsupported: peft.peft_model:Gone.generate")
    status, text = told(capsys)
    assert status == 1
    assert "Problems" in text


def test_a_disabled_fix_is_a_choice_not_a_problem(
    given: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given(fix("unwanted", target="peft.peft_model:Gone.generate"))
    monkeypatch.setenv("PTFIX_DISABLE", "unwanted")
    assert told(capsys)[0] == 0


@pytest.mark.parametrize(
    "reason", ["peft 0.5.0 is older than 0.6", "peft 0.16.0 does not import", "peft is not installed"]
)
def test_a_host_that_cannot_be_used_is_a_problem_even_without_a_fix(
    given: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(hosts, "problem", lambda name: reason if name == "peft" else None)
    for chosen in [(), (fix("one"), fix("two"))]:
        given(*chosen)
        status, found = told(capsys, "--json")
        assert status == 1
        assert found["problems"] == [reason], "told once, not once for each fix"
        assert len(found["advice"]) == 1
        assert "nstall" in found["advice"][0]


@pytest.mark.parametrize(
    ("pins", "exact", "words"),
    [
        ({"transformers": "4.50.0", "peft": "0.15.0"}, True, "this very pair: transformers 4.50.0, peft 0.15.0"),
        ({"transformers": "4.36.2", "peft": "0.7.1"}, False, "not this pair; the nearest measured one"),
    ],
)
def test_what_was_measured_for_this_pair_or_the_nearest(
    given: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    pins: dict[str, str],
    exact: bool,
    words: str,
) -> None:
    monkeypatch.setattr(hosts, "versions", lambda: {"transformers": "4.50.0", "peft": "0.15.0"})
    measured = {
        "imports": True,
        "modes": ["greedy", "beam", "static"],
        "counts": {
            "ptfix": {"exact": 5, "wrong": 0, "raises": 0, "host": 1},
            "stock": {"exact": 2, "wrong": 2, "raises": 1, "host": 1},
        },
        "ptfix": {"prompt_tuning": {"llama": "===", "gpt2": "==h"}},
        "stock": {"prompt_tuning": {"llama": "=!x", "gpt2": "=xh"}},
    }
    given(cells=(Cell("cell", pins, measured), Cell("planned", {"transformers": "4.50.0", "peft": "0.15.0"}, {})))
    found = told(capsys, "--json")[1]["matrix"]
    assert (found["id"], found["exact"], found["counts"]) == ("cell", exact, measured["counts"])
    assert found["modes"]["stock"] == {"wrong": ["beam", "static"], "raises": ["beam"]}
    assert found["modes"]["ptfix"] == {"wrong": [], "raises": []}
    text = told(capsys)[1]
    assert words in text
    assert "stock  2 of 5 cases equal the training forward" in text
    assert "silently wrong in some: beam, static" in text
    assert "ptfix  5 of 5 cases" in text


def test_a_pair_measured_as_not_importable(
    given: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "versions", lambda: {"transformers": "5.0.0", "peft": "0.17.1"})
    pins = {"transformers": "5.0.0", "peft": "0.17.1"}
    given(cells=(Cell("broken", pins, {"imports": False, "reason": "ImportError: HybridCache"}),))
    assert "does not import: ImportError: HybridCache" in told(capsys)[1]


def test_nothing_measured(given: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    given()
    assert told(capsys, "--json")[1]["matrix"] is None
    assert "nothing yet" in told(capsys)[1]


def test_the_real_findings_are_json_and_come_within_a_second() -> None:
    """Beyond importing the hosts. The best of three: the machine may be busy."""
    code = """
import json, time
import torch, transformers, peft
from ptfix.cli import doctor
took = []
for _ in range(3):
    start = time.perf_counter()
    json.dumps(doctor.examine())
    took.append(time.perf_counter() - start)
print(min(took))
"""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert float(result.stdout.splitlines()[-1]) < 1.0, "seconds"


# the dispatcher


@pytest.mark.parametrize("arguments", [[], ["unheard-of"], ["doctor", "--unheard-of"], ["doctor", "extra"]])
def test_wrong_usage_is_2_and_a_sentence(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "error: " in output.err
    assert "Traceback" not in output.err


def test_a_usage_error_is_2_and_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(args: object) -> int:
        raise UsageError("adapter/ holds no adapter_config.json.")

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", "ptfix: adapter/ holds no adapter_config.json.\n")


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ptfix {ptfix.__version__}\n"
    assert main(["--help"]) == 0
    assert "doctor" in capsys.readouterr().out
    assert main(["doctor", "--help"]) == 0


def test_only_commands_that_exist_are_offered(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptfix.cli._COMMANDS", ("doctor", "not_written_yet"))
    assert main(["--help"]) == 0
    assert "not_written_yet" not in capsys.readouterr().out
    assert main(["not_written_yet"]) == 2


def test_python_m_ptfix() -> None:
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-m", "ptfix", "--version"], cwd=root, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (0, f"ptfix {ptfix.__version__}\n")
