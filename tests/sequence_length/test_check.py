"""`ptfix check` on a model folder: the four lengths, for people and for machines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptfix.cli import main
from tests.sequence_length.doubles import HARD_LIMIT, NATIVE, qwen_v1, with_table


def test_the_lengths_of_a_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_table("gpt2").save_pretrained(tmp_path)
    main(["check", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count(f"{HARD_LIMIT} (n_positions)") == 4
    main(["check", str(tmp_path), "--json"])
    (folder,) = json.loads(capsys.readouterr().out)["folders"]
    assert folder["sequence_length"]["hard_limit"] == {"tokens": HARD_LIMIT, "source": "n_positions"}


def test_what_is_declared_is_not_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qwen_v1().config.save_pretrained(tmp_path)
    main(["check", str(tmp_path)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["hard", "limit", "none", "known"] in lines
    assert ["train-mode", "context", str(NATIVE), "(seq_length)"] in lines
    assert ["declared", "context", str(4 * NATIVE), "(max_position_embeddings)"] in lines


def test_a_config_that_cannot_be_read_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    assert main(["check", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "config.json" in err
    assert err.count("\n") == 1
