"""The canonical set: what is written, what is kept, what is refused, and what is left after a kill at any moment."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ptfix.chat_templates import files, json_text
from ptfix.chat_templates.files import Change, Reader, ReadError, Templates, WriteError
from ptfix.chat_templates.readers import READERS, Folder
from tests.chat_templates.layouts import CONFIG, lay_out, layouts, template

ROOT = Path(__file__).parents[2]
SINGLE = Templates(template("new"))
SEVERAL = Templates(template("new"), {"tool_use": template("new tools"), "rag": template("new rag")})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return lay_out(tmp_path, {"tokenizer_config.json": json.dumps(CONFIG, indent=2) + "\n"})


def readable() -> Iterator[tuple[str, dict[str, str]]]:
    """The layouts whose files can be read."""
    unreadable = ("broken config", "config with a byte order mark", "broken json")
    return ((name, content) for name, content in layouts().items() if name not in unreadable)


# What is written.


@pytest.mark.parametrize("processor", [False, True], ids=["tokenizer alone", "processor"])
@pytest.mark.parametrize("templates", [SINGLE, SEVERAL], ids=["single", "several"])
def test_every_reader_finds_them_at_every_moment(processor: bool, templates: Templates, tmp_path: Path) -> None:
    """From every layout: a reader that had a default template, and will, has a whole one after each step."""
    for name, content in readable():
        if "processor_config.json" in content and not processor:
            continue
        folder = lay_out(tmp_path / name, {**({"preprocessor_config.json": "{}"} if processor else {}), **content})
        before, states = defaults(folder), []
        for change in files.plan(folder, templates):
            files.commit([change])
            states.append(defaults(folder))
        after = defaults(folder)
        assert after == {reader: wanted(reader, templates) for reader in before}, name
        whole = {text for text in (*texts(content), *before.values()) if text and text.strip()} | {templates.default}
        for number, state in enumerate(states):
            lost = [reader for reader, found in state.items() if found not in whole]
            assert [r for r in lost if (before[r] or "").strip() and after[r]] == [], (name, number)
        assert files.plan(folder, templates) == []


def defaults(folder: Path) -> dict[str, str | None]:
    """Reader -> its default template; None where there is none."""
    place = Folder(folder)

    def default(reader: Reader) -> str | None:
        try:
            return reader.read(place).default
        except ReadError:
            return None

    return {reader.id: default(reader) for reader in READERS if reader.reads(place)}


def wanted(reader: str, templates: Templates) -> str | None:
    """The default template, but for releases that have no place for it."""
    unserved = {"transformers 4.42 processor"}
    if templates.named:
        unserved |= {"transformers 4.34-4.38 tokenizer", "transformers 4.43-4.46 processor"}
    return None if reader in unserved else templates.default


def texts(value: object) -> Iterator[str]:
    """Every string that stands somewhere in files' contents."""
    if isinstance(value, str):
        yield value
        with suppress(ValueError):
            yield from texts(json.loads(value)) if value.startswith(("{", "[")) else ()
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from texts(inner)


def test_the_set_of_one_template(folder: Path) -> None:
    before = contents(folder)
    changed = files.write(folder, Templates("{{ 'é' }}\n"))
    assert [change.path.name for change in changed] == ["tokenizer_config.json", "chat_template.jinja"]
    after = contents(folder)
    assert after["chat_template.jinja"] == "{{ 'é' }}\n".encode()
    assert json.loads(after["tokenizer_config.json"]) == {**CONFIG, "chat_template": "{{ 'é' }}\n"}
    assert {**after, **before}.keys() == after.keys()
    assert after["tokenizer.json"] == before["tokenizer.json"]


def test_the_set_of_one_template_of_a_processor(folder: Path) -> None:
    files.write(folder, SINGLE, processor=True)
    assert json.loads((folder / "chat_template.json").read_bytes()) == {"chat_template": SINGLE.default}


def test_the_set_of_several(folder: Path) -> None:
    files.write(folder, SINGLE, processor=True)
    files.write(folder, SEVERAL)
    assert set(contents(folder)) == {"tokenizer.json", "tokenizer_config.json"}
    files.write(folder, SEVERAL, processor=True)
    assert set(contents(folder)) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/rag.jinja",
        "additional_chat_templates/tool_use.jinja",
    }
    files.write(folder, SINGLE)
    assert set(contents(folder)) == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert not (folder / "additional_chat_templates").exists()


def test_somebody_elses_files_stay(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "notes.txt").write_text("mine")
    (folder / "additional_chat_templates" / "old.jinja").write_text("stale")
    (folder / "notes.jinja").write_text("mine")
    files.write(folder, SINGLE)
    assert (folder / "additional_chat_templates" / "notes.txt").read_text() == "mine"
    assert (folder / "notes.jinja").read_text() == "mine"
    assert not (folder / "additional_chat_templates" / "old.jinja").exists()


def test_nothing_to_do_touches_nothing(folder: Path) -> None:
    files.write(folder, SINGLE)
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    assert files.write(folder, SINGLE) == []
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before


def test_a_key_that_is_right_already_keeps_its_spelling(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text('{"chat_template":   "\\u0041\\/"}')
    files.write(folder, Templates("A/"))
    assert (folder / "tokenizer_config.json").read_text() == '{"chat_template":   "\\u0041\\/"}'


def test_line_ends_become_the_same_in_every_place(folder: Path) -> None:
    files.write(folder, Templates("a\r\nb\rc\n"))
    assert (folder / "chat_template.jinja").read_bytes() == b"a\nb\nc\n"
    assert json.loads((folder / "tokenizer_config.json").read_bytes())["chat_template"] == "a\nb\nc\n"
    assert files.plan(folder, Templates("a\r\nb\rc\n")) == []


def test_a_tokenizer_without_configuration_gets_one(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    files.write(folder, SINGLE)
    assert (folder / "tokenizer_config.json").read_bytes() == (
        json.dumps({"chat_template": SINGLE.default}, indent=2, ensure_ascii=False) + "\n"
    ).encode()


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_modes_stay(folder: Path) -> None:
    (folder / "tokenizer_config.json").chmod(0o640)
    mask = os.umask(0o027)
    try:
        files.write(folder, SINGLE)
    finally:
        os.umask(mask)
    assert (folder / "tokenizer_config.json").stat().st_mode & 0o777 == 0o640
    assert (folder / "chat_template.jinja").stat().st_mode & 0o777 == 0o640


# What the user's JSON keeps.

STYLES = {
    "transformers": ('{\n  "a": 1,\n  "z": 2\n}\n', '{\n  "a": 1,\n  "chat_template": "x",\n  "z": 2\n}\n'),
    "unsorted": ('{\n  "z": 1,\n  "a": 2\n}\n', '{\n  "z": 1,\n  "a": 2,\n  "chat_template": "x"\n}\n'),
    "before all": ('{\n    "d": 1,\n    "z": 2\n}', '{\n    "chat_template": "x",\n    "d": 1,\n    "z": 2\n}'),
    "after all": ('{\n\t"a": 1,\n\t"b": {"c": []}\n}', '{\n\t"a": 1,\n\t"b": {"c": []},\n\t"chat_template": "x"\n}'),
    "compact": ('{"a":1,"z":2}', '{"a":1,"chat_template":"x","z":2}'),
    "one line": ('{"a": 1, "z": 2}', '{"a": 1, "chat_template": "x", "z": 2}'),
    "one member": ('{"a": 1}', '{"a": 1, "chat_template": "x"}'),
    "CRLF": ('{\r\n  "a": 1,\r\n  "z": 2\r\n}\r\n', '{\r\n  "a": 1,\r\n  "chat_template": "x",\r\n  "z": 2\r\n}\r\n'),
    "null": ('{"chat_template" : null , "a":[ ]}', '{"chat_template" : "x" , "a":[ ]}'),
    "twice": ('{"chat_template": "old", "a": 1, "chat_template": "older"}', '{"a": 1, "chat_template": "x"}'),
    "decoys": (
        '{"a": "\\"chat_template\\": {", "b": {"chat_template": 1}}',
        '{"a": "\\"chat_template\\": {", "b": {"chat_template": 1}, "chat_template": "x"}',
    ),
    "escaped name": ('{"chat\\u005ftemplate": 1}', '{"chat\\u005ftemplate": "x"}'),
    "empty": ("{}", '{\n  "chat_template": "x"\n}'),
    "numbers": ('{"a": 1.0, "b": 1e5, "z": -0}', '{"a": 1.0, "b": 1e5, "chat_template": "x", "z": -0}'),
}


@pytest.mark.parametrize(("before", "after"), STYLES.values(), ids=STYLES)
def test_only_the_member_changes(before: str, after: str, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_bytes(before.encode())
    files.write(folder, Templates("x"))
    assert (folder / "tokenizer_config.json").read_bytes() == after.encode()


def test_a_list_is_laid_out_like_the_rest(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    for style in ({"indent": 2}, {"indent": 4}, {"indent": "\t"}, {}, {"separators": (",", ":")}):
        path.write_text(json.dumps(CONFIG, **style))
        files.write(folder, SEVERAL)
        value = [{"name": name, "template": text} for name, text in SEVERAL.by_name().items()]
        expected = dict(sorted({**CONFIG, "chat_template": value}.items()))
        assert path.read_text() == json.dumps(expected, ensure_ascii=False, **style)


@pytest.mark.parametrize(("other", "escapes"), [("é", False), ("e", False), ("\\u00e9", True)])
def test_characters_are_escaped_where_the_file_escapes(other: str, escapes: bool, folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(f'{{"a": "{other}"}}', encoding="utf-8")
    files.write(folder, Templates("ü"))
    template = "\\u00fc" if escapes else "ü"
    assert path.read_text(encoding="utf-8") == f'{{"a": "{other}", "chat_template": "{template}"}}'


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
LAYOUT = st.sampled_from([{}, {"indent": 1}, {"indent": 4}, {"separators": (",", ":")}, {"ensure_ascii": False}])


@given(st.dictionaries(st.sampled_from(["a", "chat_template", "é", "z"]) | st.text(), JSON), LAYOUT, JSON)
@settings(deadline=None, max_examples=300)
def test_any_object_holds_the_member_and_all_else(
    members: dict[str, object], style: dict[str, object], value: object
) -> None:
    text = json.dumps(members, **style)  # type: ignore[arg-type]
    added = json_text.with_member(text, "chat_template", value)
    assert json.loads(added) == {**members, "chat_template": value}
    assert json_text.with_member(added, "chat_template", value) == added
    removed = json_text.without_member(added, "chat_template")
    assert json.loads(removed) == {name: other for name, other in members.items() if name != "chat_template"}
    if members and "chat_template" not in members:
        assert removed == text


def test_what_is_no_object_is_not_edited() -> None:
    for text in ("[]", "1", "", '{"a": 1} 2', "[" * 100_000):
        with pytest.raises(ValueError, match=r"."):
            json_text.with_member(text, "a", 1)


# What is refused.


@pytest.mark.parametrize(
    ("templates", "sentence"),
    [
        (Templates(), "no template to write"),
        (Templates(" \n"), "is empty"),
        (Templates("x", {"tool_use": ""}), "is empty"),
        (Templates("x", {"../../x": "y"}), "cannot be the name"),
        (Templates("x", {"..": "y"}), "cannot be the name"),
        (Templates("x", {"": "y"}), "cannot be the name"),
        (Templates("x", {"a\n": "y"}), "cannot be the name"),
        (Templates("x", {"file": "y"}), "cannot be the name"),
        (Templates("x", {"default": "y"}), "another name"),
        (Templates("\ud800"), "half a character"),
        (Templates("x" * (2**20 + 1)), "larger than"),
    ],
)
def test_templates_that_cannot_be_written(templates: Templates, sentence: str, folder: Path) -> None:
    before = contents(folder.parent)
    with pytest.raises(WriteError, match=sentence) as caught:
        files.write(folder, templates, processor=True)
    assert "\n" not in str(caught.value)
    assert contents(folder.parent) == before


def test_folders_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="not a folder"):
        files.write(folder / "nowhere", SINGLE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WriteError, match="holds no tokenizer"):
        files.write(tmp_path / "empty", SINGLE)
    assert list((tmp_path / "empty").iterdir()) == []


def test_a_file_that_has_to_go_and_holds_more_stays(folder: Path) -> None:
    (folder / "chat_template.json").write_text('{"chat_template": "x", "mine": 1}')
    before = contents(folder)
    with pytest.raises(WriteError, match="holds more than a template"):
        files.write(folder, SINGLE)
    assert contents(folder) == before
    files.write(folder, SINGLE, processor=True)
    assert json.loads((folder / "chat_template.json").read_bytes()) == {"chat_template": SINGLE.default, "mine": 1}


@pytest.mark.parametrize("broken", ["tokenizer_config.json", "chat_template.json", "processor_config.json"])
def test_broken_files_are_left_alone(broken: str, folder: Path) -> None:
    (folder / broken).write_text('{"chat_template": ')
    before = contents(folder)
    with pytest.raises(ReadError, match="not valid JSON"):
        files.write(folder, SINGLE)
    assert contents(folder) == before


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need privileges elsewhere")
@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates"]
)
def test_links_that_lead_out_of_the_folder(name: str, tmp_path: Path) -> None:
    """As in the hub's cache, where a write through the link would change every snapshot."""
    folder, outside = lay_out(tmp_path / "in", {}), tmp_path / "outside"
    if name == "additional_chat_templates":
        outside.mkdir()
        (outside / "tool_use.jinja").write_text("precious")
    else:
        outside.write_text('{"chat_template": "precious"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(outside)
    before = contents(tmp_path)
    with pytest.raises(WriteError, match="symbolic link"):
        files.write(folder, SEVERAL, processor=name != "chat_template.json")
    assert contents(tmp_path) == before


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need privileges elsewhere")
def test_a_link_to_the_folder_is_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "last").symlink_to(folder, target_is_directory=True)
    files.write(tmp_path / "last", SINGLE)
    assert (folder / "chat_template.jinja").is_file()


def test_a_file_changed_meanwhile_is_not_overwritten(folder: Path) -> None:
    changes = files.plan(folder, SINGLE)
    (folder / "tokenizer_config.json").write_text('{"new": 1}')
    with pytest.raises(WriteError, match="changed by another program"):
        files.commit(changes)
    assert (folder / "tokenizer_config.json").read_text() == '{"new": 1}'


def test_a_change_that_somebody_else_made_is_no_conflict(folder: Path) -> None:
    changes = files.plan(folder, SINGLE)
    files.commit(changes)
    files.commit(changes)
    assert files.plan(folder, SINGLE) == []


# Faults.


def script(code: str, *arguments: object) -> str:
    """Run in a process of its own: forks and limits do not concern this one."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


FULL_DISK = """
import resource, signal, sys
from ptfix.chat_templates import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
try:
    files.write(sys.argv[1], files.Templates("x" * 100))
except files.WriteError as error:
    print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="limits are POSIX's")
def test_a_write_that_fails_leaves_the_old_file_and_no_other(folder: Path) -> None:
    before = contents(folder)
    assert "tokenizer_config.json cannot be written: File too large" in script(FULL_DISK, folder)
    assert contents(folder) == before


RACE = """
import os, sys
from ptfix.chat_templates import files
children = []
for number in range(3):
    child = os.fork()
    if not child:
        for round in range(30):
            name = "abc"[(number + round) % 3]
            try:
                files.write(sys.argv[1], files.Templates(name * 5000), processor=True)
            except files.WriteError as error:
                assert "another program" in str(error), error
        os._exit(0)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_several_processes_write_one_folder(folder: Path) -> None:
    assert script(RACE, folder) == "[0, 0, 0]\n"
    found = {reader.read(folder).default for reader in READERS if reader.id != "transformers 4.42 processor"}
    assert found <= {"a" * 5000, "b" * 5000, "c" * 5000}
    assert not list(folder.rglob("*.ptfix-tmp"))
    files.write(folder, SINGLE, processor=True)
    assert json.loads((folder / "tokenizer_config.json").read_bytes()) == {**CONFIG, "chat_template": SINGLE.default}


# Each child writes for ever, one set after the other; the parent kills it somewhere, reads, and starts the next one.
# A reader may find the old template or the new one, only whole; `wanted` says which releases have no place for one.
KILL = """
import json, os, random, signal, sys, time
from pathlib import Path
from ptfix.chat_templates import files
from ptfix.chat_templates.readers import Folder, READERS

folder, trials, seed = Path(sys.argv[1]), int(sys.argv[2]), random.Random(0)
texts = [letter * 9000 for letter in "abcd"]
sets = [
    (files.Templates(texts[0]), True),
    (files.Templates(texts[1], {"tool_use": texts[2], "rag": texts[3]}), True),
    (files.Templates(texts[2]), False),
    (files.Templates(texts[3], {"tool_use": texts[0]}), False),
]
unserved = {"transformers 4.42 processor", "transformers 4.43-4.46 processor", "transformers 4.34-4.38 tokenizer"}
config = json.loads((folder / "tokenizer_config.json").read_bytes())
files.write(folder, *sets[0][:1], processor=True)
faults, unfinished = [], 0
for trial in range(trials):
    child = os.fork()
    if not child:
        while True:
            for templates, processor in sets:
                files.write(folder, templates, processor=processor)
    time.sleep(seed.random() * 0.008)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    unfinished += bool(list(folder.rglob("*.ptfix-tmp")))
    place = Folder(folder)
    for reader in READERS:
        try:
            found = reader.read(place)
        except files.ReadError as error:
            if reader.id not in unserved:
                faults.append((trial, reader.id, str(error)))
            continue
        may_be_none = reader.id in unserved or reader.kind == "processor"
        if found.default not in texts and not (found.default is None and may_be_none):
            faults.append((trial, reader.id, (found.default or "")[:10]))
        faults += [(trial, reader.id, name) for name, text in found.named.items() if text not in texts]
    left = dict(place.tokenizer_config, chat_template=None)
    if left != dict(config, chat_template=None):
        faults.append((trial, "tokenizer_config.json", left))
files.write(folder, *sets[0][:1], processor=True)
files.write(folder, *sets[1][:1], processor=True)
print(json.dumps({"faults": faults, "unfinished": unfinished, "left": [str(p) for p in folder.rglob("*.ptfix-tmp")]}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_kill_at_any_moment_leaves_each_file_old_or_new(folder: Path) -> None:
    result = json.loads(script(KILL, folder, 1000))
    assert result["faults"] == []
    assert result["unfinished"] > 0, "no kill fell into a write: the test shows nothing"
    assert result["left"] == [], "what killed writers leave is removed by the next"


# Between plan and write.


@pytest.fixture
def swapped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside, to which additional_chat_templates/ is a link, after the plan, before the first write."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "old.jinja").write_text("stale")  # as in the folder: only its place tells them apart
    (outside / ".x.elsewhere-1-00.ptfix-tmp").write_text("precious")
    os.utime(outside / ".x.elsewhere-1-00.ptfix-tmp", (0, 0))
    make = files._make

    def swap(*args: object) -> None:
        real = folder / "additional_chat_templates"
        if not real.is_symlink():
            if real.exists():
                real.rename(folder / "aside")
            real.symlink_to(outside)
        make(*args)

    monkeypatch.setattr(files, "_make", swap)
    return outside


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need privileges elsewhere")
@pytest.mark.parametrize("templates", [SINGLE, SEVERAL], ids=["removes", "writes"])
@pytest.mark.parametrize("there", [False, True], ids=["none before", "one before"])
def test_nothing_is_written_through_a_link_that_comes_after_the_plan(
    there: bool, templates: Templates, folder: Path, swapped: Path
) -> None:
    if there:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "old.jinja").write_text("stale")
    before = contents(swapped)
    outcome = files.write_where_possible(folder, templates, processor=True)
    assert contents(swapped) == before
    assert (folder / "additional_chat_templates").is_symlink()
    assert json.loads((folder / "tokenizer_config.json").read_bytes())["chat_template"]
    if there or templates is SEVERAL:
        assert any("additional_chat_templates is a symbolic link" in problem for problem in outcome.problems)
        with pytest.raises(WriteError, match="symbolic link"):
            files.write(folder, templates, processor=True)
        assert contents(swapped) == before


@pytest.mark.skipif(not files._HOLDS, reason="this system cannot hold a folder open")
def test_nothing_is_written_through_a_link_that_comes_while_a_file_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is held open from its first check to the last rename: what takes its name then has no effect."""
    outside, real = tmp_path / "outside", folder / "additional_chat_templates"
    outside.mkdir()
    replace = files._Directory.replace

    def swap(self: files._Directory, name: str, *args: object) -> None:
        if self.path.name == real.name and not real.is_symlink():
            real.rename(folder / "aside")
            real.symlink_to(outside)
        replace(self, name, *args)

    monkeypatch.setattr(files._Directory, "replace", swap)
    found = files.write_where_possible(folder, SEVERAL, processor=True)
    assert real.is_symlink()
    assert list(outside.iterdir()) == []
    assert found.problems == []
    assert {path.name for path in (folder / "aside").iterdir()} == {"tool_use.jinja", "rag.jinja"}


@pytest.mark.skipif(os.name != "posix", reason="symbolic links need privileges elsewhere")
@pytest.mark.parametrize("planned", [False, True], ids=["before the plan", "after it"])
def test_a_staged_file_is_not_moved_through_a_link(
    planned: bool, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    commit, link = files._commit, folder / "additional_chat_templates"

    def swap(*args: Any, **kwargs: Any) -> Any:
        if not link.is_symlink():
            link.symlink_to(outside)
        return commit(*args, **kwargs)

    with files.staged(folder) as stage:
        (stage / "tokenizer_config.json").write_text("{}")
        if planned:
            monkeypatch.setattr(files, "_commit", swap)
        else:
            link.symlink_to(outside)
        found = files.publish(stage, folder, SEVERAL, processor=True)
    assert list(outside.iterdir()) == []
    assert any("symbolic link" in problem for problem in found.problems)
    assert Folder(folder).tokenizer_config == {
        "chat_template": [{"name": name, "template": text} for name, text in SEVERAL.by_name().items()]
    }


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.skipif(os.name != "posix", reason="symbolic links need privileges elsewhere")
def test_a_file_that_becomes_a_link_after_the_plan_is_not_written_through(
    name: str, folder: Path, tmp_path: Path
) -> None:
    files.write(folder, Templates("old"))
    changes = files.plan(folder, SINGLE)
    outside = tmp_path / "outside"
    (folder / name).rename(outside)  # the same text, so that nothing but the link itself is new
    (folder / name).symlink_to(outside)
    before = outside.read_bytes()
    files.commit(changes)
    assert outside.read_bytes() == before
    assert not (folder / name).is_symlink()


# Power failures.


@pytest.mark.skipif(not files._HOLDS, reason="this system cannot hold a folder open")
def test_the_text_is_on_disk_before_its_name_and_then_the_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the system's calls: a file's text, the rename, and at the end each folder that was changed."""
    (folder / "additional_chat_templates").mkdir()
    calls: list[tuple[str, object]] = []
    fsync, replace, unlink = os.fsync, os.replace, os.unlink

    def syncs(descriptor: int) -> None:
        status = os.fstat(descriptor)
        calls.append(("sync", (status.st_ino, status.st_size if stat.S_ISREG(status.st_mode) else None)))
        fsync(descriptor)

    def replaces(source: str, target: str, **kwargs: int) -> None:
        status = os.stat(source, dir_fd=kwargs["src_dir_fd"])
        calls.append(("name", (status.st_ino, status.st_size)))
        replace(source, target, **kwargs)

    def unlinks(name: str, **kwargs: int) -> None:
        calls.append(("unlink", name))
        unlink(name, **kwargs)

    monkeypatch.setattr(os, "fsync", syncs)
    monkeypatch.setattr(os, "replace", replaces)
    monkeypatch.setattr(os, "unlink", unlinks)
    files.write(folder, SEVERAL, processor=True)
    names = [place for place, (what, _) in enumerate(calls) if what == "name"]
    assert len(names) == 4
    for place in names:
        assert ("sync", calls[place][1]) in calls[:place], "a name may outlive a power failure that its text does not"
    for changed in (folder, folder / "additional_chat_templates"):
        assert ("sync", (changed.stat().st_ino, None)) in calls[names[-1] :], changed
    calls.clear()
    files.write(folder, SINGLE, processor=True)
    last = max(place for place, (what, _) in enumerate(calls) if what in ("name", "unlink"))
    assert ("sync", (folder.stat().st_ino, None)) in calls[last:]


# What `publish` makes of a stage.


def test_a_stage_and_what_lies_there_are_planned_together(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "stale.jinja").write_text("stale")
    (folder / "chat_template.json").write_text('{"chat_template": "stale"}')
    (folder / "mine.txt").write_text("mine")
    with files.staged(folder) as stage:
        (stage / "tokenizer_config.json").write_text('{"new": 1}')
        (stage / "inner").mkdir()
        (stage / "inner" / "more.json").write_text("{}")
        assert files.is_stage(stage)
        found = files.publish(stage, folder, SINGLE)
    assert found.problems == []
    assert not files.is_stage(folder)
    after = contents(folder)
    assert set(after) == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "mine.txt",
        "inner/more.json",
    }
    assert json.loads(after["tokenizer_config.json"]) == {"new": 1, "chat_template": SINGLE.default}


def test_a_place_that_cannot_be_written_keeps_no_template_from_its_readers(folder: Path) -> None:
    """Without the key there is a default template in chat_template.jinja alone: it stays."""
    (folder / "tokenizer_config.json").write_text("{")
    (folder / "chat_template.jinja").write_text("old")
    found = files.write_where_possible(folder, SEVERAL, processor=False)
    assert found.changes == []
    assert len(found.problems) == 1
    assert (folder / "chat_template.jinja").read_text() == "old"


def test_no_additional_template_beside_a_legacy_file_that_stays(folder: Path) -> None:
    """A processor of any release would not load."""
    (folder / "chat_template.json").write_text('{"chat_template": "x", "mine": 1}')
    found = files.write_where_possible(folder, SEVERAL, processor=True)
    assert len(found.problems) == 1
    assert not (folder / "additional_chat_templates").exists()
    assert (folder / "chat_template.jinja").read_text() == SEVERAL.default


# What is said of readers.


@pytest.mark.parametrize("processor", [False, True], ids=["tokenizer alone", "processor"])
@pytest.mark.parametrize("templates", [SINGLE, SEVERAL], ids=["single", "several"])
def test_what_a_reader_is_said_to_load_is_what_it_loads(processor: bool, templates: Templates, folder: Path) -> None:
    if processor:
        (folder / "preprocessor_config.json").write_text("{}")
    files.write(folder, templates)
    place = Folder(folder)
    for reader in READERS:
        if not reader.reads(place):
            continue
        try:
            found = reader.read(place)
        except ReadError:
            found = Templates()
        assert (found.default == templates.default) == reader.finds(templates), reader.id
        if reader.loads == "every":
            assert found.by_name() == templates.by_name(), reader.id
    assert {reader.kind for reader in READERS} == {"tokenizer", "processor", "any"}


def test_a_reader_that_loads_less_is_not_said_to_load_every_template(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{}")
    files.write(folder, SEVERAL)
    place = Folder(folder)
    for reader in READERS:
        try:
            whole = reader.read(place).by_name() == SEVERAL.by_name()
        except ReadError:
            whole = False
        assert whole == (reader.loads == "every"), reader.id


# Special tokens.


def test_special_tokens_in_either_spelling(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": {"content": "<old>"}, "pad_token": {"content": "<pad>", "lstrip": False}})
    )
    config = {**CONFIG, "bos_token": {"content": "<s>"}, "add_bos_token": True, "mask_token": None}
    config["extra_special_tokens"] = {"image_token": "<image>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert files.special_tokens(folder) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "image_token": "<image>",
    }


def test_special_tokens_of_a_folder_without(tmp_path: Path) -> None:
    assert files.special_tokens(tmp_path) == {}
    (tmp_path / "special_tokens_map.json").write_text("{")
    with pytest.raises(ReadError, match="not valid JSON"):
        files.special_tokens(tmp_path)


def test_a_change_is_data(folder: Path) -> None:
    before = contents(folder)
    changes = files.plan(folder, SINGLE)
    assert contents(folder) == before
    assert all(isinstance(change, Change) and change.path.is_relative_to(folder.resolve()) for change in changes)
