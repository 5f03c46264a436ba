"""Writes the canonical set of files: the same templates wherever a reader looks, each file in one step.

One template: the key of tokenizer_config.json and chat_template.jinja, for a processor also chat_template.json.
Several, of a tokenizer: the list under that key alone, the only form that every release from 4.39 on reads. Several, of
a processor: the list, chat_template.jinja and additional_chat_templates/. What else could hold a template is removed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptfix.chat_templates import json_text
from ptfix.chat_templates.readers import (
    ADDITIONAL,
    JINJA,
    JSON_LIMIT,
    KEY,
    LEGACY,
    PROCESSOR_CONFIG,
    READERS,
    TEMPLATE_LIMIT,
    TOKENIZER_CONFIG,
    Folder,
    Reader,
    ReadError,
    Templates,
    parsed,
    read_bytes,
)
from ptfix.chat_templates.texts import unix_lines

__all__ = [
    "READERS",
    "Change",
    "ReadError",
    "Reader",
    "Templates",
    "WriteError",
    "commit",
    "has_tokenizer",
    "is_name",
    "out_of_reach",
    "plan",
    "special_tokens",
    "staged",
    "write",
]

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
#: Any one of them makes a folder a tokenizer's, whose tokenizer_config.json may be missing.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
#: Readers that, of several templates, never load or do not always load more than the default one.
ONE_TEMPLATE = {
    "transformers 4.34-4.38 tokenizer",
    "transformers 4.47-4.51 tokenizer",
    "transformers 4.42 processor",
    "transformers 4.43-4.46 processor",
    "transformers 4.47-4.51 processor",
    "TGI",
}
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)-(?P<process>\d+)-[0-9a-f]+\.ptfix-tmp")
_ABANDONED = 3600.0  # seconds after which a temporary file is of no living writer, on whatever machine
_ATTEMPTS = 5


class WriteError(Exception):
    """One sentence: why nothing was written."""


class _ChangedMeanwhile(Exception):
    """A file is no longer what the plan was made from."""


@dataclass(frozen=True)
class Change:
    """One file before and after; None where it is not there."""

    path: Path
    old: bytes | None
    new: bytes | None


def plan(folder: str | Path, templates: Templates, *, processor: bool | None = None) -> list[Change]:
    """What has to change for every reader to find `templates` in `folder`, in the order to do it. Changes nothing.

    Line ends become \\n, as in every file read as text; Jinja makes no difference between them.

    Args:
        folder: of a saved tokenizer or processor.
        templates: what to write; at least one.
        processor: whether a processor is, or will be, saved there. None: as the folder shows.

    Raises:
        WriteError: the templates cannot be written, or not into this folder.
        ReadError: a file that has to change cannot be read.
    """
    root = _root(folder)
    by_name = _checked(templates)
    place = Folder(root)
    if processor is None:
        processor = place.has_processor
    several = set(by_name) != {"default"}
    jinja = by_name.get("default") if processor or not several else None
    additional = {name: text for name, text in by_name.items() if name != "default"} if processor and several else {}
    stale = set(_additional_names(root)) - set(additional)
    key = [{"name": name, "template": text} for name, text in by_name.items()] if several else by_name["default"]

    def text(name: str, content: str | None) -> Change:
        return _change(root, name, None if content is None else content.encode(), TEMPLATE_LIMIT)

    # What a reader falls back to is written before a place is emptied, and chat_template.json, beside which
    # additional_chat_templates/ must never be seen, goes before that comes and comes after that has gone.
    legacy = _member(root, LEGACY, by_name["default"] if processor and not several else None)
    steps = [
        _member(root, TOKENIZER_CONFIG, key),
        *([text(JINJA, jinja)] if jinja is not None else []),
        *([legacy] if legacy.new is None else []),
        *(text(f"{ADDITIONAL}/{name}.jinja", None) for name in sorted(stale - {"default"})),
        *([text(JINJA, None)] if jinja is None else []),
        *(text(f"{ADDITIONAL}/{name}.jinja", None) for name in stale & {"default"}),
        *(text(f"{ADDITIONAL}/{name}.jinja", content) for name, content in additional.items()),
        *([legacy] if legacy.new is not None else []),
        _member(root, PROCESSOR_CONFIG, None),
    ]
    return [change for change in steps if change.old != change.new]


def commit(changes: Iterable[Change]) -> None:
    """Make the changes in this order, each file in one step: a kill leaves it as it was or as it will be.

    Between two files a reader finds in each place the old text or the new, never a part of one. In the order of a plan
    it has a default template at every moment, where it had one and will have one; of several, old and new may mix.

    Raises:
        WriteError: a file is not what the plan was made from, or the system refused; what was done before stays done.
    """
    try:
        _commit(list(changes))
    except _ChangedMeanwhile as error:
        raise WriteError(f"{error} was changed by another program meanwhile: try again") from error


def write(
    folder: str | Path, templates: Templates, *, processor: bool | None = None, durable: bool = True
) -> list[Change]:
    """Plan and commit, and plan anew where another program changed a file meanwhile. Nothing to do: nothing is touched.

    Args:
        folder, templates, processor: as `plan` takes them.
        durable: let the text outlive a power failure, too, which takes some milliseconds a file.

    Returns:
        What was changed.

    Raises:
        WriteError, ReadError: as `plan` and `commit`.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        changes = plan(folder, templates, processor=processor)
        try:
            _commit(changes, durable)
        except _ChangedMeanwhile as error:
            if attempt == _ATTEMPTS:
                raise WriteError(f"{error} is being changed by another program: try again when it is done") from error
            time.sleep(0.02 * attempt)
        else:
            break
    return changes


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer is saved in `folder`."""
    return any(Path(folder, name).is_file() for name in (TOKENIZER_CONFIG, *_VOCABULARIES))


def is_name(name: str) -> bool:
    """Whether a template other than the default one may be called so: the name becomes a file's."""
    # transformers keeps these under chat_template_NAME beside its own chat_template_file, which is the default one.
    return _NAME.fullmatch(name) is not None and name != "file"


def out_of_reach(templates: Templates) -> set[str]:
    """The ids of the readers that have no place where the canonical set of these templates could stand."""
    several = {"transformers 4.34-4.38 tokenizer", "transformers 4.43-4.46 processor"} if templates.named else set()
    return {"transformers 4.42 processor", *several}


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """An empty folder to save into. When the block ends without an error, its files take their places in `folder`.

    Each in one step: a kill leaves a file as it was or as it will be, and other writers of `folder` read no half one.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    _clean(place)
    stage = _temporary(place / "save")
    stage.mkdir()
    try:
        yield stage
        for path in sorted(path for path in stage.rglob("*") if not path.is_dir()):
            target = place / path.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def special_tokens(folder: str | Path) -> dict[str, str]:
    """The special tokens that a template may name (bos_token, eos_token, ...), as the folder's files say.

    Raises:
        ReadError: one of the files cannot be read.
    """
    found: dict[str, str] = {}
    for name in (SPECIAL_TOKENS_MAP, TOKENIZER_CONFIG):
        data = read_bytes(Path(folder, name), JSON_LIMIT)
        members = {} if data is None else parsed(data, Path(folder, name))
        for extra in ("extra_special_tokens", "model_specific_special_tokens"):
            more = members.get(extra)
            found |= _tokens(more if isinstance(more, dict) else {})
        found |= _tokens({key: value for key, value in members.items() if key.endswith("_token")})
    return found


def _tokens(members: dict[str, Any]) -> dict[str, str]:
    contents = {key: value.get("content") if isinstance(value, dict) else value for key, value in members.items()}
    return {key: content for key, content in contents.items() if isinstance(content, str)}


# Planning.


def _root(folder: str | Path) -> Path:
    root = Path(folder)
    if not root.is_dir():
        raise WriteError(f"{root} is not a folder")
    root = root.resolve()
    if not has_tokenizer(root):
        raise WriteError(f"{root} holds no tokenizer: save one there first, tokenizer.save_pretrained({str(root)!r})")
    return root


def _checked(templates: Templates) -> dict[str, str]:
    if not templates:
        raise WriteError("there is no template to write")
    if "default" in templates.named:
        raise WriteError("a template is named 'default' beside the default one: give it another name")
    found = {}
    for name, text in templates.by_name().items():
        if not is_name(name):
            raise WriteError(
                f"{name!r} cannot be the name of a template: use letters, digits, '_' and '-', and not 'file'"
            )
        if not text.strip():
            raise WriteError(f"the template {name!r} is empty: every conversation would render to nothing")
        found[name] = unix_lines(text)
        try:
            size = len(found[name].encode())
        except UnicodeEncodeError as error:
            raise WriteError(
                f"the template {name!r} holds half a character, which is no text: {error.reason}"
            ) from error
        if size > TEMPLATE_LIMIT:
            raise WriteError(f"the template {name!r} is larger than {TEMPLATE_LIMIT // 2**20} MiB")
    return found


def _additional_names(root: Path) -> list[str]:
    folder = root / ADDITIONAL
    if folder.is_symlink():
        raise WriteError(f"{folder} is a symbolic link: replace it by the folder itself")
    return sorted(path.name.removesuffix(".jinja") for path in folder.glob("*.jinja")) if folder.is_dir() else []


def _change(root: Path, name: str, new: bytes | None, limit: int) -> Change:
    path = root / name
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise WriteError(f"{path} is a symbolic link that leads out of the folder: copy the folder, links resolved")
    return Change(path, read_bytes(path, limit), new)


def _member(root: Path, name: str, value: Any) -> Change:
    """`name` with `value` under the key, without the key where `value` is None."""
    change = _change(root, name, None, JSON_LIMIT)
    if change.old is None:
        fresh = None if value is None else (json.dumps({KEY: value}, indent=2, ensure_ascii=False) + "\n").encode()
        return Change(change.path, None, fresh)
    members = parsed(change.old, change.path)
    text = change.old.decode()
    if value is not None:
        return Change(change.path, change.old, json_text.with_member(text, KEY, value).encode())
    if name == LEGACY:  # without the key no processor loads beside it
        if set(members) - {KEY}:
            raise WriteError(f"{change.path} has to go and holds more than a template: move that elsewhere")
        return change
    return Change(change.path, change.old, json_text.without_member(text, KEY).encode())


# Writing.


def _commit(changes: Sequence[Change], durable: bool = True) -> None:
    folders = {change.path.parent for change in changes}
    for folder in folders:
        _clean(folder)
    for change in changes:
        _make(change, durable)
    for folder in folders:
        if folder.name == ADDITIONAL:
            with suppress(OSError):  # not empty: somebody's other files stay
                folder.rmdir()


def _make(change: Change, durable: bool) -> None:
    found = read_bytes(change.path, JSON_LIMIT)
    if found == change.new:
        return
    if found != change.old:
        raise _ChangedMeanwhile(str(change.path))
    try:
        if change.new is None:
            change.path.unlink(missing_ok=True)
        else:
            change.path.parent.mkdir(exist_ok=True)
            _replace(change.path, change.new, durable)
    except OSError as error:
        raise WriteError(f"{change.path} cannot be written: {error.strerror or error}") from error


def _replace(path: Path, data: bytes, durable: bool) -> None:
    """Write beside the file, then put it in its place in one step."""
    temporary = _temporary(path)
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            with suppress(FileNotFoundError):  # a new file has the mode that the system gives
                os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())  # or the new name could outlive a power failure that its text does not
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other writer has, and that tells whose it is."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.ptfix-tmp")


def _clean(folder: Path) -> None:
    """Remove what killed writers left."""
    for path, match in _temporaries(folder):
        with suppress(OSError):
            mine = match["host"] == _host() and os.name == "posix"
            if (mine and not _lives(int(match["process"]))) or time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _temporaries(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    for path in folder.glob(".*.ptfix-tmp"):
        match = _TEMPORARY.fullmatch(path.name)
        if match:
            yield path, match


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname())[:64]
