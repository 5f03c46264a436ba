"""`ptfix check` and `ptfix repair` on folders as releases, scripts and strangers leave them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ptfix import cli
from ptfix.chat_templates.readers import READERS, Folder, ReadError
from tests.chat_templates.layouts import CONFIG, lay_out, layouts

ROOT = Path(__file__).parents[2]
TRAINING = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
RIGHT = TRAINING + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OTHER_FORMAT = RIGHT.replace("<|im_start|>", "<|start|>").replace("<|im_end|>", "<|end|>")
TAGGED = RIGHT.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")


def config(template: object = ..., **members: object) -> str:
    """tokenizer_config.json as transformers writes it."""
    key = {} if template is ... else {"chat_template": template}
    return json.dumps(dict(sorted({**CONFIG, **key, **members}.items())), indent=2, ensure_ascii=False) + "\n"


def ptfix(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(list(map(str, arguments)))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def problems(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> str:
    """What `check` finds wrong with a folder."""
    status, out, err = ptfix(capsys, "check", folder, "--json", *arguments)
    found = json.loads(out)
    lines = [problem for one in found["folders"] for problem in one["problems"]]
    assert status == (1 if lines else 0), err
    assert all("\n" not in line for line in lines)
    return " | ".join(lines)


def repaired(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object) -> dict[str, Any]:
    """The outcome for one folder; what is said must be what happened."""
    before = contents(folder)
    status, out, _ = ptfix(capsys, "repair", folder, "--json", *arguments)
    (found,) = json.loads(out)["folders"]
    assert found["written"] == (contents(folder) != before)
    assert status == (1 if found["left"] or (found["diff"] and not found["written"]) else 0)
    assert isinstance(found, dict)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence of an input that cannot be used."""
    status, out, err = ptfix(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("ptfix: ")
    assert err.count("\n") == 1, err
    return err


# What a folder holds.


def test_a_right_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = lay_out(tmp_path, {"tokenizer_config.json": config(RIGHT), "chat_template.jinja": RIGHT})
    before = contents(folder)
    assert problems(capsys, folder) == ""
    status, out, _ = ptfix(capsys, "check", folder)
    assert status == 0
    assert "good: every reader" in out
    assert all(reader.id in out for reader in READERS if reader.kind != "processor")
    assert ptfix(capsys, "repair", folder)[0] == 0
    assert contents(folder) == before


def test_the_story_of_a_training_template(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """It was hard-coded in a training script, without the header of the answer, and the checkpoint carries it."""
    folder = lay_out(tmp_path, {"tokenizer_config.json": config(TRAINING)})
    assert "The generation prompt is missing" in problems(capsys, folder)
    status, out, _ = ptfix(capsys, "check", folder)
    assert status == 1
    assert "+++ b/tokenizer_config.json" in out
    assert ptfix(capsys, "repair", "--dry-run", folder)[0] == 1
    assert contents(folder)["tokenizer_config.json"].decode() == config(TRAINING)
    status, shown, _ = ptfix(capsys, "repair", folder)
    assert status == 0
    assert "Written: the training template, repaired" in shown
    saved = json.loads(contents(folder)["tokenizer_config.json"])["chat_template"]
    assert saved.startswith(TRAINING)
    assert contents(folder)["chat_template.jinja"].decode() == saved
    assert problems(capsys, folder) == ""
    after = contents(folder)
    status, out, _ = ptfix(capsys, "repair", folder)
    assert (status, "nothing to do" in out, contents(folder)) == (0, True, after)


def test_the_base_models_template_comes_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = lay_out(tmp_path / "base", {"tokenizer_config.json": config(RIGHT)})
    adapter = lay_out(
        tmp_path / "adapter",
        {
            "tokenizer_config.json": config(TRAINING),
            "adapter_config.json": json.dumps({"base_model_name_or_path": str(base)}),
        },
    )
    found = repaired(capsys, adapter)
    assert (found["kind"], found["source"]) == ("adapter", "the template of the base model")
    assert contents(adapter)["chat_template.jinja"].decode() == RIGHT
    assert found["left"] == []


def test_a_base_model_in_the_cache(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are links to blobs elsewhere: read through them, written never."""
    repository = tmp_path / "hub" / "models--org--model"
    blobs = lay_out(repository / "blobs", {"tokenizer_config.json": config(TRAINING)})
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(blob)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hub"))
    folder = lay_out(tmp_path / "mine", {})
    assert "No reader finds a chat template" in problems(capsys, folder)
    found = repaired(capsys, folder, "--base", "org/model")
    assert found["base_folder"] == str(snapshot)
    assert "stands before answers" in " ".join(found["left"]), "the base model's own has no header either"
    before = contents(tmp_path)
    found = repaired(capsys, snapshot)
    assert "symbolic link" in " ".join(found["left"])
    assert contents(tmp_path) == before
    (blobs / "tokenizer_config.json").write_text(config(RIGHT))
    assert repaired(capsys, folder, "--base", "org/model")["left"] == []
    assert contents(folder)["chat_template.jinja"].decode() == RIGHT


def test_a_base_of_another_format_is_not_restored(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = lay_out(tmp_path / "base", {"tokenizer_config.json": config(OTHER_FORMAT)})
    folder = lay_out(tmp_path / "mine", {"tokenizer_config.json": config(TRAINING)})
    found = repaired(capsys, folder, "--base", base)
    assert found["source"] == "the training template, repaired"
    assert any("Not the template of the base model" in reason for reason in found["reasons"])


def test_a_right_template_is_kept_unless_the_base_models_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    other = RIGHT.replace("m['role']", "m.role")
    base = lay_out(tmp_path / "base", {"tokenizer_config.json": config(other)})
    folder = lay_out(
        tmp_path / "mine",
        {"chat_template.jinja": RIGHT, "config.json": json.dumps({"_name_or_path": str(base)})},
    )
    shutil.copytree(folder, tmp_path / "asked")
    assert "No template is found by" in problems(capsys, folder)
    repaired(capsys, folder)
    assert contents(folder)["chat_template.jinja"].decode() == RIGHT
    repaired(capsys, tmp_path / "asked", "--base", base)
    assert contents(tmp_path / "asked")["chat_template.jinja"].decode() == other


def test_a_template_of_the_users_own(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "mine", {"tokenizer_config.json": config(RIGHT), "chat_template.jinja": OTHER_FORMAT})
    assert "Readers load different templates" in problems(capsys, folder)
    found = repaired(capsys, folder)
    assert "two formats" in " ".join(found["left"])
    assert not found["written"]
    (tmp_path / "mine.jinja").write_text(OTHER_FORMAT)
    found = repaired(capsys, folder, "--template", tmp_path / "mine.jinja")
    assert (found["source"], found["left"]) == ("as asked for", [])
    assert json.loads(contents(folder)["tokenizer_config.json"])["chat_template"] == OTHER_FORMAT
    assert "does not exist" in refusal(capsys, "repair", folder, "--template", tmp_path / "nothing.jinja")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"tokenizer_config.json": config()}, "No reader finds a chat template"),
        ({"tokenizer_config.json": config("")}, "No reader finds a chat template"),
        ({"tokenizer_config.json": config(None), "chat_template.jinja": RIGHT}, "has a null chat_template"),
        ({"tokenizer_config.json": config(RIGHT), "chat_template.jinja": ""}, "chat_template.jinja is empty"),
        ({"chat_template.jinja": RIGHT}, "No template is found by transformers 4.34-4.38 tokenizer"),
        ({"tokenizer_config.json": config(RIGHT), "chat_template.jinja": TRAINING}, "different templates"),
        ({"tokenizer_config.json": config(TAGGED), "chat_template.jinja": TAGGED}, "{% generation %} tags"),
        ({"tokenizer_config.json": config(RIGHT), "chat_template.json": "{}"}, "is a processor's file"),
        (
            {"tokenizer_config.json": config(RIGHT), "additional_chat_templates/default.jinja": RIGHT},
            "default.jinja wins",
        ),
        (
            {"chat_template.jinja": RIGHT, "additional_chat_templates/tool_use.jinja": RIGHT}
            | {"tokenizer_config.json": config(RIGHT)},
            "Not every reader loads the same template 'tool_use'",
        ),
        (
            {
                "tokenizer_config.json": config(
                    [{"name": "default", "template": RIGHT}, {"name": "../x", "template": "y"}]
                )
            },
            "A template is named '../x'",
        ),
        (
            {"preprocessor_config.json": "{}", "chat_template.json": json.dumps({"chat_template": TRAINING})}
            | {"tokenizer_config.json": config(RIGHT), "chat_template.jinja": RIGHT},
            "Readers load different templates",
        ),
        (
            {"preprocessor_config.json": "{}", "processor_config.json": json.dumps({"chat_template": TRAINING})}
            | {"tokenizer_config.json": config(RIGHT)},
            "The processor has another template than its tokenizer",
        ),
        (
            {"preprocessor_config.json": "{}", "chat_template.json": json.dumps({"chat_template": RIGHT})}
            | {"additional_chat_templates/tool_use.jinja": RIGHT},
            "the processor does not load",
        ),
        ({"tokenizer_config.json": config(RIGHT + "\u202e")}, "U+202E RIGHT-TO-LEFT OVERRIDE"),
        ({"tokenizer_config.json": config("{{ 1 / 0 }}")}, "It does not render"),
        ({"tokenizer_config.json": config("{% for")}, "It does not render"),
        ({"tokenizer_config.json": config(5)}, "chat_template is a number"),
    ],
)
def test_faults_and_their_repair(
    files: dict[str, str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = lay_out(tmp_path, files)
    assert sentence in problems(capsys, folder)
    status, out, _ = ptfix(capsys, "check", folder)
    assert status == 1
    assert sentence in out
    outcome = repaired(capsys, folder)
    if outcome["written"]:  # no reader is worse off, and what is left was there before
        assert set(outcome["left"]) < set(outcome["problems"])
    before = contents(folder)
    again = repaired(capsys, folder)
    assert (again["written"], contents(folder)) == (False, before)
    assert again["left"] == outcome["left"]
    assert problems(capsys, folder) == " | ".join(again["problems"])


def test_every_layout_ends_right_or_as_it_was(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The base model says what is right, where the folder does not hold two formats."""
    base = lay_out(tmp_path / "base", {"tokenizer_config.json": config(RIGHT)})
    outcomes = []
    for name, files in list(layouts().items())[::20]:
        words = {name: text.replace("m['content']", "m['role'] }}\n{{ m['content']") for name, text in files.items()}
        folder = lay_out(tmp_path / name, words)
        try:
            Folder(folder).read_all()
        except ReadError:
            assert "not valid JSON" in refusal(capsys, "repair", folder)
            continue
        before = contents(folder)
        outcome = repaired(capsys, folder, "--base", base)
        outcomes.append(outcome["written"])
        if not outcome["written"]:
            assert contents(folder) == before, name
            assert outcome["left"] or not outcome["problems"], name
        else:
            assert outcome["left"] == [], name
            place = Folder(folder)
            loaded = {
                r.read(place).default for r in READERS if r.reads(place) and r.id != "transformers 4.42 processor"
            }
            assert len(loaded) == 1, name
    assert True in outcomes


# Where generation stops.


@pytest.mark.parametrize(("saved", "after"), [(2, [2, 4]), ([2], [2, 4]), (None, [4])])
def test_the_end_of_an_answer(
    saved: object, after: list[int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    generation = json.dumps({"bos_token_id": 1, "eos_token_id": saved, "top_p": 0.9}, indent=4)
    folder = lay_out(
        tmp_path,
        {"tokenizer_config.json": config(RIGHT), "chat_template.jinja": RIGHT, "generation_config.json": generation},
    )
    assert "an answer ends with '<|im_end|>' (id 4)" in problems(capsys, folder)
    assert not repaired(capsys, folder)["written"]
    outcome = repaired(capsys, folder, "--eos")
    assert outcome["left"] == []
    expected = json.dumps({"bos_token_id": 1, "eos_token_id": after, "top_p": 0.9}, indent=4)
    assert contents(folder)["generation_config.json"].decode() == expected
    assert problems(capsys, folder) == ""


def test_an_end_that_is_known_is_no_problem(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = lay_out(
        tmp_path,
        {
            "tokenizer_config.json": config(RIGHT),
            "chat_template.jinja": RIGHT,
            "generation_config.json": json.dumps({"eos_token_id": [2, 4]}),
        },
    )
    assert problems(capsys, folder) == ""


# Folders of a Trainer.


def test_each_checkpoint_of_an_output_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for step in (9, 10):
        lay_out(tmp_path / f"checkpoint-{step}", {"tokenizer_config.json": config(TRAINING)})
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "runs").mkdir()
    status, out, _ = ptfix(capsys, "check", tmp_path, "--json")
    assert status == 1
    names = [Path(found["folder"]).name for found in json.loads(out)["folders"]]
    assert names == ["checkpoint-9", "checkpoint-10"]
    assert ptfix(capsys, "repair", tmp_path)[0] == 0
    assert ptfix(capsys, "check", tmp_path)[0] == 0


def test_an_adapter_without_tokenizer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/not-here"}))
    assert "There is no tokenizer here" in problems(capsys, tmp_path)
    outcome = repaired(capsys, tmp_path)
    assert "There is no tokenizer here" in " ".join(outcome["left"])
    assert "org/not-here is not on this machine" in " ".join(outcome["notes"])
    assert set(contents(tmp_path)) == {"adapter_config.json"}


# What cannot be used.


def test_unusable_paths(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in ("check", "repair"):
        assert "is not a folder" in refusal(capsys, command, tmp_path / "nowhere")
        assert "holds no tokenizer" in refusal(capsys, command, tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "adapter_config.json"])
def test_junk_is_told_in_a_sentence(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = {"tokenizer_config.json": config(RIGHT), "chat_template.jinja": RIGHT}
    folder = lay_out(tmp_path, files)
    (folder / name).write_bytes(bytes(range(256)))
    before = contents(folder)
    for command in ("check", "repair"):
        assert "not UTF-8" in refusal(capsys, command, folder)
    assert contents(folder) == before


def test_what_a_terminal_would_obey_is_spelled_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    adapter = json.dumps({"base_model_name_or_path": "\x1b]0;\u202ename"})
    hostile = TRAINING + "{# \x1b[2J\u202e #}"
    folder = lay_out(tmp_path, {"chat_template.jinja": hostile, "adapter_config.json": adapter})
    for command in ("check", "repair"):
        _, out, _ = ptfix(capsys, command, folder)
        assert "\x1b" not in out
        assert "\u202e" not in out
    assert "\\x1b[2J\\u202e" in out


def test_a_terminal_without_the_characters(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, {"tokenizer_config.json": config(TRAINING + "{# é 世 #}")})
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "ptfix", "check", folder], cwd=ROOT, env=narrow, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (1, b"")
    assert b"\\u4e16" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
def test_a_repair_that_fails_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = lay_out(tmp_path, {"tokenizer_config.json": config(TRAINING)})
    before = contents(folder)
    resource = pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-m", "ptfix", "repair", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)),  # as a disk that is full
    )
    assert done.returncode == 1, done.stderr
    assert "tokenizer_config.json cannot be written: File too large" in done.stdout
    assert contents(folder) == before


def test_no_host_is_imported(tmp_path: Path) -> None:
    """Each command answers at once, also where torch takes seconds to import, or is broken."""
    folder = lay_out(tmp_path, {"tokenizer_config.json": config(TRAINING)})
    code = (
        "import sys; from ptfix import cli; "
        "statuses = [cli.main([command, sys.argv[1]]) for command in ('check', 'repair', 'check')]; "
        "assert statuses == [1, 0, 0], statuses; "
        "assert not {'torch', 'transformers', 'peft', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, capture_output=True)
