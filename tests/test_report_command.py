"""`ptfix report` on the run of a real Trainer, and on what is no run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import ptfix
from ptfix.cli import main, report
from ptfix.sequence_length import schedule
from tests.matrix.models import VOCAB, base_model
from tests.runs import arguments

STEPS = 6


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that can be drawn; only its checkpoints hold a state."""
    folder = tmp_path_factory.mktemp("runs") / "warmed"
    rows = torch.randint(2, VOCAB, (24, 32), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in rows]
    args = arguments(
        folder,
        max_steps=STEPS,
        logging_steps=1,
        save_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
    )
    callbacks = [
        ptfix.SequenceLengthWarmupCallback(schedule.linear(8, 32, 3), "truncate"),
        ptfix.InstructionRetentionCallback([[5, 9, 23], [40, 17]], alert_kl=None, new_tokens=4),
    ]
    trainer = Trainer(model=base_model("llama"), args=args, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return folder


@pytest.fixture
def no_picture(run_dir: Path) -> Any:
    yield
    (run_dir / report.PICTURE).unlink(missing_ok=True)


def test_length_tokens_loss_and_retention_over_the_steps(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["warmed"]
    assert found["sequence length"] == [[1, 2, 3, 4, 5, 6], [8, 16, 24, 32, 32, 32]]
    assert found["tokens used"][1] == [16, 48, 96, 160, 224, 288]
    steps, losses = found["loss"]
    assert steps == [1, 2, 3, 4, 5, 6]
    steps, divergences = found["KL from the base, nats/token"]
    assert (steps[0], divergences[0]) == (0, 0)
    assert "agreement with the base" in found
    newest = json.loads((run_dir / "checkpoint-6" / report.STATE).read_text(encoding="utf-8"))
    assert losses == [entry["loss"] for entry in newest["log_history"] if "loss" in entry]


@pytest.mark.usefixtures("no_picture")
def test_the_picture_and_the_table(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'ptfix[plot]'")
    assert main(["report", str(run_dir)]) == 0
    text = capsys.readouterr().out
    drawn = (run_dir / report.PICTURE).read_text(encoding="utf-8")
    for label in ("sequence length", "tokens used", "loss", "KL from the base", "agreement with the base"):
        assert label in text
        assert label in drawn
    assert main(["report", str(run_dir), "--picture", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_two_runs_in_one_picture(run_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'ptfix[plot]'")
    other = tmp_path / "plain"
    other.mkdir()
    log = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25, "epoch": 1.0}]
    (other / report.STATE).write_text(json.dumps({"global_step": 2, "log_history": log}), encoding="utf-8")
    picture = tmp_path / "both.svg"
    assert main(["report", str(run_dir), str(other), "--picture", str(picture)]) == 0
    drawn = picture.read_text(encoding="utf-8")
    assert ">warmed<" in drawn
    assert ">plain<" in drawn


def test_the_state_that_went_furthest_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (5, 10, 20):
        folder = tmp_path / f"checkpoint-{step}" if step != 10 else tmp_path
        folder.mkdir(exist_ok=True)
        state = {"global_step": step, "log_history": [{"step": step, "loss": float(step)}]}
        (folder / report.STATE).write_text(json.dumps(state), encoding="utf-8")
    assert main(["report", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[tmp_path.name]["loss"] == [[20], [20]]


def test_a_loss_that_is_no_number_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}]
    (tmp_path / report.STATE).write_text(json.dumps({"global_step": 2, "log_history": log}), encoding="utf-8")
    assert main(["report", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[tmp_path.name]["loss"] == [[1, 2], [2.0, None]]
    pytest.importorskip("matplotlib", reason="pip install 'ptfix[plot]'")
    assert main(["report", str(tmp_path)]) == 1
    assert "nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "call trainer.save_state() after training"),
        ("{", "is not the state of a Trainer"),
        ("[]", "is not the state of a Trainer"),
        ('{"global_step": 1, "log_history": [1]}', "is not the state of a Trainer"),
        ('{"global_step": 1, "log_history": [{"step": 1, "loss": "high"}]}', "nothing was logged"),
    ],
)
def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / report.STATE).write_text(content, encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / report.PICTURE).exists()


def test_a_picture_that_cannot_be_drawn(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir), "--picture", "run.jpeg"]) == 2
    assert ".svg, .png" in capsys.readouterr().err


def test_without_matplotlib_it_says_what_to_install(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(run_dir)]) == 0
    told = capsys.readouterr()
    assert "sequence length" in told.out
    assert "no picture: a picture needs matplotlib: pip install 'ptfix[plot]'" in told.err
    assert main(["report", str(run_dir), "--picture", "run.svg"]) == 2
    assert "pip install 'ptfix[plot]'" in capsys.readouterr().err
    assert main(["report", str(run_dir), "--json"]) == 0
