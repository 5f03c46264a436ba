"""Which chat template each program loads from a folder: all look in the same five places, each in its own order.

A folder may hold a template under the key `chat_template` of tokenizer_config.json, in chat_template.jinja, in
additional_chat_templates/NAME.jinja, in chat_template.json and under the key `chat_template` of processor_config.json.
"""

from __future__ import annotations

import functools
import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ptfix.chat_templates.texts import unix_lines

TOKENIZER_CONFIG = "tokenizer_config.json"
JINJA = "chat_template.jinja"
ADDITIONAL = "additional_chat_templates"
LEGACY = "chat_template.json"
PROCESSOR_CONFIG = "processor_config.json"
KEY = "chat_template"
#: Any one of them makes a folder a processor's.
PROCESSORS = (PROCESSOR_CONFIG, "preprocessor_config.json", "video_preprocessor_config.json")

JSON_LIMIT = 64 * 2**20
TEMPLATE_LIMIT = 2**20

_NONE: Mapping[str, str] = MappingProxyType({})


class ReadError(Exception):
    """One sentence: why a reader finds no usable template here."""


@dataclass(frozen=True)
class Templates:
    """What a reader finds: the template it renders with, and others that a program asks for by name, e.g. tool_use.

    Falsy where nothing is there. An empty template is something: the reader renders every conversation to nothing.
    """

    default: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)
    source: str | None = field(default=None, compare=False)  #: the file, or files, they come from

    def __bool__(self) -> bool:
        return self.default is not None or bool(self.named)

    def by_name(self) -> dict[str, str]:
        """All of them, the default one first and by that name."""
        return {**({} if self.default is None else {"default": self.default}), **self.named}

    @staticmethod
    def of(by_name: Mapping[str, str], source: str | None = None) -> Templates:
        """The reverse of `by_name`."""
        named = {name: template for name, template in by_name.items() if name != "default"}
        return Templates(by_name.get("default"), named, source)


class Folder:
    """The places of one folder, each read when it is first asked for and then kept.

    Every property raises ReadError where its file is there and cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @functools.cached_property
    def tokenizer_config(self) -> dict[str, Any] | None:
        """tokenizer_config.json."""
        return self._json(TOKENIZER_CONFIG)

    @functools.cached_property
    def processor_config(self) -> dict[str, Any] | None:
        """processor_config.json."""
        return self._json(PROCESSOR_CONFIG)

    @functools.cached_property
    def legacy(self) -> dict[str, Any] | None:
        """chat_template.json."""
        return self._json(LEGACY)

    @functools.cached_property
    def jinja(self) -> str | None:
        """chat_template.jinja."""
        return self._template(JINJA)

    @functools.cached_property
    def additional(self) -> dict[str, str]:
        """additional_chat_templates/*.jinja by name."""
        folder = self.path / ADDITIONAL
        names = sorted(path.name for path in folder.glob("*.jinja")) if folder.is_dir() else []
        found = {name.removesuffix(".jinja"): self._template(f"{ADDITIONAL}/{name}") for name in names}
        return {name: template for name, template in found.items() if template is not None}

    @functools.cached_property
    def has_processor(self) -> bool:
        """Whether AutoProcessor finds more than a tokenizer here."""
        return any((self.path / name).is_file() for name in PROCESSORS) or bool(
            (self.tokenizer_config or {}).get("processor_class")
        )

    def read_all(self) -> None:
        """Read every place.

        Raises:
            ReadError: one of the files is there and cannot be read.
        """
        _ = self.tokenizer_config, self.processor_config, self.legacy, self.jinja, self.additional

    def _template(self, name: str) -> str | None:
        data = read_bytes(self.path / name, TEMPLATE_LIMIT)
        if data is None:
            return None
        # Every reader opens these as text, where Python turns each kind of line end into \n.
        return unix_lines(decoded(data, self.path / name))

    def _json(self, name: str) -> dict[str, Any] | None:
        data = read_bytes(self.path / name, JSON_LIMIT)
        return None if data is None else parsed(data, self.path / name)


def read_bytes(path: Path, limit: int) -> bytes | None:
    """The file's bytes, None where there is no such file.

    Raises:
        ReadError: it is something else than a file, too large, or not ours to read.
    """
    try:
        status = path.stat()  # before open(), which would wait for ever at a named pipe
        if stat.S_ISDIR(status.st_mode):
            raise ReadError(f"{path} is a folder where a file is expected: remove it")
        if not stat.S_ISREG(status.st_mode):
            raise ReadError(f"{path} is not a regular file: remove it")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise ReadError(f"{path} is larger than {limit // 2**20} MiB: that is no file of this kind")
    return data


def parsed(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises:
        ReadError: there is none.
    """
    try:
        value = json.loads(decoded(data, path))
    except (ValueError, RecursionError) as error:
        raise ReadError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ReadError(f"{path} holds no JSON object")
    return value


def decoded(data: bytes, path: Path) -> str:
    """The text of the file.

    Raises:
        ReadError: it is not text.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ReadError(f"{path} is not UTF-8 text (byte {error.start})") from error


# What a value under a key means.


def _string(value: object, where: str) -> Templates:
    """Of a reader that takes one template only."""
    if value is None:
        return Templates()
    if not isinstance(value, str):
        raise ReadError(f"{where}: {KEY} is a {_word(value)}, and this reader takes a string")
    if len(value) > TEMPLATE_LIMIT:
        raise ReadError(f"{where}: the template is longer than {TEMPLATE_LIMIT // 2**20} MiB")
    return Templates(value, source=where)


def _mapping(value: object, where: str) -> Templates:
    """A string, or templates by name as they are kept in memory."""
    if not isinstance(value, dict):
        return _string(value, where)
    for name, template in value.items():
        if not isinstance(_string(template, f"{where} (template {name})").default, str):
            raise ReadError(f"{where}: the template {name} is null")
    return Templates.of(value, where)


def _listed(value: object, where: str) -> Templates:
    """As _mapping, and the list of names and templates that a folder holds."""
    if not isinstance(value, list):
        return _mapping(value, where)
    for entry in value:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(part), str) for part in ("name", "template")):
            raise ReadError(f"{where}: an entry of the list under {KEY} is not a name and a template")
    return _mapping({entry["name"]: entry["template"] for entry in value}, where)


def _word(value: object) -> str:
    words = {list: "list", dict: "table of templates", bool: "truth value", int: "number", float: "number"}
    return words.get(type(value), type(value).__name__)


# The places.


def _key(folder: Folder) -> object:
    return (folder.tokenizer_config or {}).get(KEY)


def _processor_key(folder: Folder) -> Templates:
    return _mapping((folder.processor_config or {}).get(KEY), PROCESSOR_CONFIG)


def _legacy(folder: Folder) -> Templates:
    if folder.legacy is not None and KEY not in folder.legacy:
        raise ReadError(f"{LEGACY} has no {KEY}, without which the processor does not load")
    return _string((folder.legacy or {}).get(KEY), LEGACY)


# The readers. Each function gives the precedence of one of them, first found first.


def _tokenizer_434(folder: Folder) -> Templates:
    return _string(_key(folder), TOKENIZER_CONFIG)


def _tokenizer_439(folder: Folder) -> Templates:
    return _listed(_key(folder), TOKENIZER_CONFIG)


def _tokenizer_447(folder: Folder) -> Templates:
    return _tokenizer_439(folder) if folder.jinja is None else Templates(folder.jinja, source=JINJA)


def _tokenizer_452(folder: Folder) -> Templates:
    additional = dict(folder.additional)
    # It collects them as chat_template_NAME beside chat_template_file, its own name for chat_template.jinja.
    default = additional.pop("file", folder.jinja)
    found = {**({} if default is None else {"default": default}), **additional}
    return Templates.of(found, _files(folder)) if found else _tokenizer_439(folder)


def _processor_442(folder: Folder) -> Templates:
    return _processor_key(folder)


def _processor_443(folder: Folder) -> Templates:
    return _legacy(folder) or _processor_key(folder)


def _processor_447(folder: Folder) -> Templates:
    if folder.jinja is not None:
        return Templates(folder.jinja, source=JINJA)
    return _processor_key(folder) if folder.legacy is None else _legacy(folder)


def _processor_452(folder: Folder) -> Templates:
    return _processor_files(folder) or _processor_key(folder)


def _processor_500(folder: Folder) -> Templates:
    files = _processor_files(folder)  # first: it raises whatever the key says
    return _processor_key(folder) or files


def _processor_files(folder: Folder) -> Templates:
    if folder.legacy is not None:
        if folder.additional:
            raise ReadError(f"{LEGACY} beside {ADDITIONAL}: the processor does not load")
        found = _legacy(folder)
    else:
        by_name = {**folder.additional, **({} if folder.jinja is None else {"default": folder.jinja})}
        found = Templates.of(by_name, _files(folder))
    return Templates() if found.by_name() == {"default": ""} else found


def _files(folder: Folder) -> str:
    names = [] if folder.jinja is None else [JINJA]
    return " + ".join([*names, *([f"{ADDITIONAL}/"] if folder.additional else [])])


def _gguf_019(folder: Folder) -> Templates:
    if not folder.tokenizer_config:
        return Templates()
    if KEY in folder.tokenizer_config:
        return _gguf_010(folder)
    if folder.jinja is not None:
        return Templates.of({"default": folder.jinja, **folder.additional}, _files(folder))
    return _gguf(folder.legacy.get(KEY) if folder.legacy else None, LEGACY)


def _gguf_010(folder: Folder) -> Templates:
    return _gguf(_key(folder), TOKENIZER_CONFIG)


def _gguf(value: object, where: str) -> Templates:
    return _listed(value, where) if isinstance(value, str | list) else Templates()


def _vllm(folder: Folder) -> Templates:
    if folder.has_processor:
        try:
            found = _processor_500(folder)
        except ReadError:  # vLLM goes on without the processor
            found = Templates()
        if found:
            return found
    return _tokenizer_452(folder)


def _sglang(folder: Folder) -> Templates:
    return _processor_500(folder) if folder.has_processor else _tokenizer_452(folder)


def _tgi(folder: Folder) -> Templates:
    found = _tokenizer_439(folder) or _listed((folder.processor_config or {}).get(KEY), PROCESSOR_CONFIG)
    return replace(found, named=_NONE)


@dataclass(frozen=True)
class Reader:
    """One program, or one band of its releases, that loads a chat template from a folder."""

    program: str
    find: Callable[[Folder], Templates]
    kind: Literal["tokenizer", "processor", "any"] = "any"  #: what it loads the template for
    since: str | None = None  #: the first release of the program that reads so; None: not a matter of releases
    until: str | None = None  #: the last one; None: all that followed
    #: What it loads of the set of files that `files` writes: every template, the default one for sure, that only where
    #: it is the only one, or nothing.
    loads: Literal["every", "default", "single", "nothing"] = "every"

    @property
    def id(self) -> str:
        """What people call it."""
        releases = self.since if self.since == self.until else f"{self.since}-{self.until}"
        releases = f">={self.since}" if self.since and self.until is None else releases
        kind = None if self.kind == "any" else self.kind
        return " ".join(filter(None, (self.program, releases, kind)))

    def read(self, folder: str | Path | Folder) -> Templates:
        """What this reader loads from `folder`; falsy where it finds nothing.

        Raises:
            ReadError: it raises there, or takes what no conversation can be rendered with.
        """
        folder = folder if isinstance(folder, Folder) else Folder(folder)
        if self.kind == "processor" and isinstance(_key(folder), list):
            _tokenizer_439(folder)  # a processor loads only where its tokenizer does
        return self.find(folder)

    def reads(self, folder: Folder) -> bool:
        """Whether anybody would use this reader on such a folder."""
        return folder.has_processor or self.kind != "processor"

    def finds(self, templates: Templates) -> bool:
        """Whether the set of files for these templates has a place where this reader finds the default one."""
        return self.loads in ("every", "default") or (self.loads == "single" and not templates.named)


READERS: tuple[Reader, ...] = (
    Reader("transformers", _tokenizer_434, "tokenizer", "4.34", "4.38", loads="single"),
    Reader("transformers", _tokenizer_439, "tokenizer", "4.39", "4.46"),
    Reader("transformers", _tokenizer_447, "tokenizer", "4.47", "4.51", loads="default"),
    Reader("transformers", _tokenizer_452, "tokenizer", "4.52"),
    Reader("transformers", _processor_442, "processor", "4.42", "4.42", loads="nothing"),
    Reader("transformers", _processor_443, "processor", "4.43", "4.46", loads="single"),
    Reader("transformers", _processor_447, "processor", "4.47", "4.51", loads="default"),
    Reader("transformers", _processor_452, "processor", "4.52", "4.57"),
    Reader("transformers", _processor_500, "processor", "5.0"),
    Reader("llama.cpp convert (gguf 0.10)", _gguf_010),
    Reader("llama.cpp convert (gguf 0.19)", _gguf_019),
    Reader("vLLM", _vllm),
    Reader("SGLang", _sglang),
    Reader("TGI", _tgi, loads="default"),
)


def load(folder: str | Path | Folder) -> Templates:
    """What the newest releases load from `folder`; where they find nothing usable, what any reader finds.

    Raises:
        ReadError: no reader finds a template, and at least one raises; the first of these sentences.
    """
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    error = None
    for find in (_vllm, *(reader.find for reader in READERS if reader.reads(folder))):
        found = _attempt(find, folder)
        if isinstance(found, ReadError):
            error = error or found
        elif (found.default or "").strip():
            return found
    if error:
        raise error
    return Templates()


def _attempt(find: Callable[[Folder], Templates], folder: Folder) -> Templates | ReadError:
    try:
        return find(folder)
    except ReadError as error:
        return error
