"""ptfix's readers against the real ones: the installed transformers and gguf load the same folders.

The file imports only what every release has; running it in the environment of another release judges that one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from ptfix import hosts
from ptfix.chat_templates import files
from ptfix.chat_templates.readers import READERS, Folder, ReadError, Templates
from tests.chat_templates.layouts import CONFIG, ODD, lay_out, layouts, template

load = pytest.importorskip("tests.chat_templates.load", reason="gguf is missing: pip install gguf")

TEXT = template("the one")
SINGLE = Templates(TEXT)
SEVERAL = Templates(TEXT, {"tool_use": template("tools"), "rag": template("rag")})
_BANDS = {
    "tokenizer": {
        "<4.39": "transformers 4.34-4.38 tokenizer",
        "<4.47": "transformers 4.39-4.46 tokenizer",
        "<4.52": "transformers 4.47-4.51 tokenizer",
        ">=4.52": "transformers >=4.52 tokenizer",
    },
    "processor": {
        "<4.42": None,  # processors have no template
        "<4.43": "transformers 4.42 processor",
        "<4.47": "transformers 4.43-4.46 processor",
        "<4.52": "transformers 4.47-4.51 processor",
        "<5.0": "transformers 4.52-4.57 processor",
        ">=5.0": "transformers >=5.0 processor",
    },
}


def installed() -> dict[str, str]:
    """What loads -> the reader that says what is loaded."""
    version = hosts.installed("transformers")
    assert version
    found = {
        kind: next(reader for band, reader in bands.items() if hosts.satisfies(version, band))
        for kind, bands in _BANDS.items()
    }
    gguf = hosts.installed("gguf")
    assert gguf
    name = "llama.cpp convert (gguf 0.19)" if gguf >= Version("0.11") else "llama.cpp convert (gguf 0.10)"
    return {kind: reader for kind, reader in {**found, "gguf": name}.items() if reader}


def says(reader: str, folder: Path) -> Any:
    """What ptfix says that `reader` loads, as load.py prints it."""
    by_id = {reader.id: reader for reader in READERS}
    try:
        return by_id[reader].read(folder).by_name() or None
    except ReadError:
        return "raises"


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    return {name: lay_out(root / str(number), content) for number, (name, content) in enumerate(layouts().items())}


@pytest.fixture(scope="module")
def loaded(laid_out: dict[str, Path]) -> dict[str, dict[str, Any]]:
    return {name: load.load(folder) for name, folder in laid_out.items()}


@pytest.mark.parametrize(("kind", "reader"), installed().items())
def test_a_reader_says_what_the_installed_release_loads(
    kind: str, reader: str, laid_out: dict[str, Path], loaded: dict[str, dict[str, Any]]
) -> None:
    wrong = {name: (loaded[name][kind], says(reader, folder)) for name, folder in laid_out.items()}
    assert {name: pair for name, pair in wrong.items() if pair[0] != pair[1]} == {}


@pytest.mark.parametrize("processor", [False, True], ids=["tokenizer alone", "processor"])
@pytest.mark.parametrize("templates", [SINGLE, SEVERAL], ids=["single", "several"])
def test_the_installed_release_loads_what_was_written(processor: bool, templates: Templates, tmp_path: Path) -> None:
    """Into a folder that can be read, whatever was there before."""
    kinds = {kind: reader for kind, reader in installed().items() if processor or kind != "processor"}
    wrong, written = {}, 0
    every = list(layouts().items())
    sample = every[::9] + every[-len(ODD) :]  # test_files.py judges all of them, by the readers that are judged above
    for name, content in sample:
        folder = lay_out(tmp_path / name, content)
        try:
            Folder(folder).read_all()
        except ReadError:
            continue
        files.write(folder, templates, processor=processor)
        written += 1
        found = load.load(folder)
        wrong |= {
            (name, kind): found[kind]
            for kind, reader in kinds.items()
            if found[kind] != expected(reader, templates, processor)
        }
    assert wrong == {}
    assert written > len(sample) / 2


def expected(reader: str, templates: Templates, processor: bool) -> Any:
    """All templates, less what no folder can give to a release that has no place for it."""
    if reader == "transformers 4.42 processor":
        return None
    if templates.named and reader == "transformers 4.34-4.38 tokenizer":
        return "raises"
    if templates.named and reader == "transformers 4.43-4.46 processor":
        return None
    if templates.named and reader.startswith("transformers 4.47-4.51") and processor:
        return {"default": templates.default}
    return templates.by_name()


def test_a_saved_processor_loads_what_was_written(tmp_path: Path) -> None:
    """One that transformers ships, saved by the installed release and found by AutoProcessor."""
    import transformers

    shipped = getattr(transformers, "Qwen2AudioProcessor", None)
    if shipped is None:
        pytest.skip(
            "every processor of this release needs libraries beyond the hosts: pip install 'transformers>=4.45'"
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(lay_out(tmp_path / "tokenizer", {}), local_files_only=True)
    processor = shipped(transformers.WhisperFeatureExtractor(), tokenizer, chat_template=template("old"))
    processor.save_pretrained(tmp_path / "saved")
    files.write(tmp_path / "saved", SINGLE)
    loaded = transformers.AutoProcessor.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert isinstance(loaded, shipped)
    assert (loaded.chat_template, loaded.tokenizer.chat_template) == (TEXT, TEXT)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"tokenizer_config.json": '{"a": '}, "not valid JSON"),
        ({"tokenizer_config.json": "[" * 100_000}, "not valid JSON"),
        ({"tokenizer_config.json": "[]"}, "no JSON object"),
        ({"chat_template.jinja": "\ud800"}, "not UTF-8"),
        ({"chat_template.jinja": " " * (2**20 + 1)}, "larger than 1 MiB"),
        ({"chat_template.jinja/file": ""}, "folder where a file is expected"),
    ],
    ids=["broken", "nested", "list", "junk", "huge", "folder"],
)
def test_what_cannot_be_read_is_told_in_a_sentence(content: dict[str, str], sentence: str, tmp_path: Path) -> None:
    for name, text in content.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if "tokenizer_config.json" not in content:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ReadError, match=sentence) as caught:
        Folder(tmp_path).read_all()
    assert "\n" not in str(caught.value)


def test_a_huge_configuration_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "tokenizer_config.json").open("wb") as file:
        file.truncate(2**26 + 1)  # a hole: takes no room on the disk
    with pytest.raises(ReadError, match="larger than 64 MiB"):
        Folder(tmp_path).read_all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "chat_template.jinja")
    with pytest.raises(ReadError, match="not a regular file"):
        Folder(tmp_path).read_all()


def test_templates_are_false_where_nothing_is_there() -> None:
    assert not Templates()
    assert Templates("")
    assert Templates(None, {"tool_use": "x"})
    assert Templates("x", source="here") == Templates("x", source="there")
    assert Templates.of(SEVERAL.by_name()) == SEVERAL
