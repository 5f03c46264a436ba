"""Which template is taken, in which order, and why not; where a base model lies on this machine."""

from __future__ import annotations

import errno
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ptfix.chat_templates import choosing
from ptfix.chat_templates.choosing import base_folder, base_of, choose
from ptfix.chat_templates.readers import ReadError, Templates

HEADER = "<|im_start|>assistant\n"
TRAINING = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
RIGHT = TRAINING + "{% if add_generation_prompt %}" + HEADER + "{% endif %}"
#: right too, and not the same text
OTHERWISE = RIGHT.replace("m['role']", "m.role")
TAGGED = RIGHT.replace("{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}")
OTHER_FORMAT = RIGHT.replace("<|im_start|>", "<|start|>").replace("<|im_end|>", "<|end|>")
SHOUTS = "{{ raise_exception('no') }}"
BLIND = "hello"
TOKENS = {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def told(choice_reasons: list[str]) -> str:
    for reason in choice_reasons:
        assert "\n" not in reason
    return " ".join(choice_reasons)


@pytest.mark.parametrize("explicit", [OTHERWISE, Templates(OTHERWISE)])
def test_what_was_asked_for_comes_first(explicit: Templates | str) -> None:
    choice = choose(explicit=explicit, base=Templates(RIGHT), training=Templates(TRAINING), special_tokens=TOKENS)
    assert (choice.templates, choice.source, choice.reasons) == (Templates(OTHERWISE), "as asked for", [])


def test_what_was_asked_for_is_taken_as_it_is_and_doubted() -> None:
    choice = choose(explicit=TRAINING, base=Templates(RIGHT), training=Templates(TRAINING), special_tokens=TOKENS)
    assert choice.templates == Templates(TRAINING)
    assert "Taken as it is" in told(choice.reasons)


def test_the_base_models_is_restored_byte_for_byte() -> None:
    base = Templates(OTHERWISE + "\n\n", {"tool_use": RIGHT})
    choice = choose(base=base, first_seen=Templates(RIGHT), training=Templates(TRAINING), special_tokens=TOKENS)
    assert choice.templates == base
    assert choice.source == "the template of the base model"


def test_order_after_the_base_model() -> None:
    training = Templates(TRAINING)
    seen = choose(first_seen=Templates(OTHERWISE), at_train_begin=Templates(RIGHT), training=training)
    assert (seen.templates, seen.source) == (Templates(OTHERWISE), "the template first seen")
    begun = choose(first_seen=training, at_train_begin=Templates(RIGHT), training=training, special_tokens=TOKENS)
    assert (begun.templates, begun.source) == (Templates(RIGHT), "the template at train begin")
    assert "Not the template first seen" in told(begun.reasons)


@pytest.mark.parametrize("good", range(4))
def test_a_candidate_that_could_not_be_judged_leaves_no_choice(good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even of a later one, which may be judged all right a moment later; and the next call tries again."""
    choosing._judge.cache_clear()
    choosing._difference.cache_clear()
    real, starts = subprocess.Popen, itertools.count()

    def refuses(*args: Any, **kwargs: Any) -> Any:
        if next(starts) in (good, good + 1):  # it is asked twice
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(*args, **kwargs)

    monkeypatch.setattr(subprocess, "Popen", refuses)
    given = {
        "base": Templates(OTHER_FORMAT),
        "first_seen": Templates(OTHERWISE),
        "training": Templates(TRAINING),
        "special_tokens": TOKENS,
    }
    choice = choose(**given)  # type: ignore[arg-type]
    assert (choice.templates, choice.judged) == (None, False)
    assert "no process can be started" in told(choice.reasons)
    again = choose(**given)  # type: ignore[arg-type]
    assert (again.templates, again.judged) == (Templates(OTHERWISE), True)


def test_what_was_asked_for_is_taken_where_nobody_can_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing._judge.cache_clear()
    monkeypatch.setattr(sys, "executable", "")
    choice = choose(explicit=RIGHT, special_tokens=TOKENS)
    assert (choice.templates, choice.judged) == (Templates(RIGHT), True)
    assert "Taken as it is" in told(choice.reasons)
    monkeypatch.undo()
    assert choose(explicit=RIGHT, special_tokens=TOKENS).reasons == []


@pytest.mark.parametrize(
    ("base", "why"),
    [
        (Templates(OTHER_FORMAT), "<|start|>"),
        (Templates(TRAINING), "assistant"),
        (Templates(" "), "empty"),
        (Templates(None, {"tool_use": RIGHT}), "empty"),
        (Templates(SHOUTS), "no"),
        (Templates(BLIND), "words"),
    ],
    ids=["another format", "no header", "blank", "no default", "raises", "no conversation"],
)
def test_a_base_template_that_is_not_right_is_not_taken(base: Templates, why: str) -> None:
    choice = choose(base=base, training=Templates(TRAINING), special_tokens=TOKENS)
    assert choice.source == "the training template, repaired"
    assert choice.templates
    assert (choice.templates.default or "").startswith(TRAINING)
    assert choice.templates != Templates(TRAINING)
    assert why in told(choice.reasons).partition("Repaired")[0]


def test_without_a_training_text_there_is_nothing_to_compare_with() -> None:
    assert choose(base=Templates(OTHER_FORMAT)).templates == Templates(OTHER_FORMAT)


def test_a_right_training_template_stays() -> None:
    choice = choose(training=Templates(RIGHT), special_tokens=TOKENS)
    assert (choice.templates, choice.source) == (Templates(RIGHT), "the training template, which is right")


def test_generation_tags_are_for_training() -> None:
    for choice in (
        choose(training=Templates(TAGGED, {"tool_use": TAGGED}), special_tokens=TOKENS),
        choose(base=Templates(TAGGED, {"tool_use": TAGGED}), training=Templates(TRAINING), special_tokens=TOKENS),
    ):
        assert choice.templates == Templates(RIGHT, {"tool_use": RIGHT})


def test_each_of_several_is_repaired() -> None:
    choice = choose(training=Templates(TRAINING, {"plain": TRAINING, "right": OTHERWISE}), special_tokens=TOKENS)
    assert choice.templates
    assert choice.templates.named["plain"] == choice.templates.default != TRAINING
    assert choice.templates.named["right"] == OTHERWISE


@pytest.mark.parametrize("training", [None, Templates(), Templates(""), Templates(SHOUTS), Templates(BLIND)])
def test_unsure_it_leaves_things_alone_and_says_so(training: Templates | None) -> None:
    choice = choose(training=training, special_tokens=TOKENS)
    assert (choice.templates, choice.source) == (None, "")
    assert told(choice.reasons)


# The base model.


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one repository: main and a tag at two commits."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    repository = tmp_path / "home" / "hub" / "models--org--model"
    for reference, commit in (("main", "a" * 40), ("v1", "b" * 40), ("pr/1", "c" * 40), ("gone", "d" * 40)):
        (repository / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
        if reference != "gone":
            (repository / "snapshots" / commit).mkdir(parents=True)
            (repository / "snapshots" / commit / "tokenizer_config.json").write_text("{}")
    return repository / "snapshots"


def test_a_snapshot_in_the_cache(cache: Path) -> None:
    assert base_folder("org/model") == cache / ("a" * 40)
    assert base_folder("org/model", "v1") == cache / ("b" * 40)
    assert base_folder("org/model", "pr/1") == cache / ("c" * 40)
    assert base_folder("org/model", "b" * 40) == cache / ("b" * 40)


def test_it_is_where_the_hubs_own_library_looks(cache: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    for revision in ("main", "v1", "b" * 40):
        file = hub.try_to_load_from_cache(
            "org/model", "tokenizer_config.json", cache_dir=cache.parents[1], revision=revision
        )
        assert Path(file).parent == base_folder("org/model", revision)


@pytest.mark.parametrize("name", ["HF_HUB_CACHE", "TRANSFORMERS_CACHE"])
def test_a_cache_elsewhere(name: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(cache / "nobody"))
    assert base_folder("org/model") is None
    monkeypatch.setenv(name, str(cache.parents[1]))
    assert base_folder("org/model") == cache / ("a" * 40)


@pytest.mark.parametrize(
    ("name", "revision"),
    [
        ("org/other", None),
        ("org/model", "v2"),
        ("org/model", "gone"),
        ("org/model", "../../x"),
        ("org/model", "/etc"),
        ("../model", None),
        ("org/model/more", None),
        ("", None),
    ],
)
def test_what_is_not_there(name: str, revision: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache.parent / "refs")
    assert base_folder(name or "no such folder", revision) is None


def test_a_folder_is_its_own(tmp_path: Path) -> None:
    assert base_folder(tmp_path) == tmp_path
    assert base_folder(str(tmp_path)) == tmp_path


def test_who_names_the_base_model(tmp_path: Path) -> None:
    assert base_of(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "tokenizer"}))
    assert base_of(tmp_path) == ("tokenizer", None)
    (tmp_path / "config.json").write_text(json.dumps({"_name_or_path": "model"}))
    assert base_of(tmp_path) == ("model", None)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base", "revision": "v1"}))
    assert base_of(tmp_path) == ("base", "v1")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base", "revision": None}))
    assert base_of(tmp_path) == ("base", None)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ReadError):
        base_of(tmp_path)
