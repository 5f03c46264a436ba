"""Writes the canonical set of files: the same templates wherever a reader looks, each file in one step.

One template: the key of tokenizer_config.json and chat_template.jinja, for a processor also chat_template.json.
Several, of a tokenizer: the list under that key alone, the only form that every release from 4.39 on reads. Several, of
a processor: the list, chat_template.jinja and additional_chat_templates/. What else could hold a template is removed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ptfix.chat_templates import json_text
from ptfix.chat_templates.readers import (
    ADDITIONAL,
    JINJA,
    JSON_LIMIT,
    KEY,
    LEGACY,
    PROCESSOR_CONFIG,
    PROCESSORS,
    READERS,
    TEMPLATE_LIMIT,
    TOKENIZER_CONFIG,
    Reader,
    ReadError,
    Templates,
    parsed,
    read_bytes,
)
from ptfix.chat_templates.texts import unix_lines
from ptfix.errors import one_line

__all__ = [
    "READERS",
    "Change",
    "Outcome",
    "ReadError",
    "Reader",
    "StageError",
    "Templates",
    "WriteError",
    "commit",
    "has_tokenizer",
    "is_name",
    "is_stage",
    "plan",
    "publish",
    "special_tokens",
    "staged",
    "write",
    "write_where_possible",
]

T = TypeVar("T")

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
#: Any one of them makes a folder a tokenizer's, whose tokenizer_config.json may be missing.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_TEMPORARY = re.compile(r"\..+\.(?P<host>[^.]*)-(?P<process>\d+)-[0-9a-f]+\.ptfix-tmp")
_ABANDONED = 3600.0  # seconds after which a temporary file is of no living writer, on whatever machine
_ATTEMPTS = 5
#: Whether this system can hold a folder open and act in it, whatever takes its name meanwhile (Windows cannot).
_HOLDS = (
    hasattr(os, "O_NOFOLLOW") and {os.open, os.mkdir, os.rename, os.rmdir, os.stat, os.unlink} <= os.supports_dir_fd
)


class WriteError(Exception):
    """One sentence: why nothing was written."""


class StageError(Exception):
    """One sentence: why nothing could be staged, or what was staged could not take its place."""


class _ChangedMeanwhile(Exception):
    """A file is no longer what the plan was made from."""


@dataclass(frozen=True)
class Change:
    """One file before and after; None where it is not there."""

    path: Path
    old: bytes | None
    new: bytes | None

    @property
    def removes(self) -> bool:
        """Whether it takes a template away and puts none in its place."""
        return self.new is None or self.path.name == PROCESSOR_CONFIG


@dataclass(frozen=True)
class Outcome:
    """What was changed, and why the rest could not be."""

    changes: list[Change]
    problems: list[str]


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
    survey = _survey([_root(folder)], templates, processor)
    for error in survey.errors.values():
        raise error
    return survey.changes


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

    def attempt() -> list[Change]:
        return _commit(plan(folder, templates, processor=processor), durable)

    return _repeated(attempt)


def write_where_possible(folder: str | Path, templates: Templates, *, processor: bool | None = None) -> Outcome:
    """As `write`, but a place that cannot be written keeps no other from being written. Raises nothing."""

    def attempt() -> Outcome:
        survey = _survey([_root(folder)], templates, processor)
        return Outcome(_commit(survey.changes, errors=survey.errors), survey.problems)

    try:
        return _repeated(attempt)
    except (WriteError, ReadError) as error:
        return Outcome([], [str(error)])


def _repeated(attempt: Callable[[], T]) -> T:
    attempts = 0
    while True:
        attempts += 1
        try:
            return attempt()
        except _ChangedMeanwhile as error:
            if attempts == _ATTEMPTS:
                raise WriteError(f"{error} is being changed by another program: try again when it is done") from error
            time.sleep(0.02 * attempts)


def has_tokenizer(folder: str | Path) -> bool:
    """Whether a tokenizer is saved in `folder`."""
    return any(Path(folder, name).is_file() for name in (TOKENIZER_CONFIG, *_VOCABULARIES))


def is_name(name: str) -> bool:
    """Whether a template other than the default one may be called so: the name becomes a file's."""
    # transformers keeps these under chat_template_NAME beside its own chat_template_file, which is the default one.
    return _NAME.fullmatch(name) is not None and name != "file"


@contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """An empty folder inside `folder` to save into, for `publish`. It is gone when the block ends.

    Raises:
        StageError: there can be none.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with _Directory(place.resolve()) as held:
            held.clean()
        stage = _temporary(place / "save")
        stage.mkdir()
    except Exception as error:
        raise StageError(f"{place} cannot have a stage: {one_line(error)}") from error
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def is_stage(folder: str | Path) -> bool:
    """Whether a folder is one of those that `staged` makes."""
    return _TEMPORARY.fullmatch(os.path.basename(str(folder))) is not None


def publish(stage: Path, folder: str | Path, templates: Templates, *, processor: bool | None = None) -> Outcome:
    """Move what was saved into the stage to `folder`, with `templates` in every place that can be written.

    Each file takes its place in one step: a kill leaves it as it was or as it will be, and whoever reads `folder`
    meanwhile sees no half of one.

    Raises:
        StageError: one of the saved files could not take its place; those before it in the alphabet did.
    """
    root = Path(folder).resolve()
    saved = {path.relative_to(stage).as_posix() for path in _files(stage)}
    survey = _survey([stage, root], templates, processor)
    ours = [change for change in survey.changes if change.path.is_relative_to(stage)]
    # As the saved files beside them, these need not outlive a power failure.
    made = _commit(ours, durable=False, errors=survey.errors)
    with ExitStack() as stack:
        folders = _Folders(stack)
        for path in _files(stage):
            name = path.relative_to(stage).as_posix()
            try:
                folders.of(root / name, create=True).take(path)
            except (OSError, WriteError) as error:
                if name in saved and not name.startswith(f"{ADDITIONAL}/"):
                    raise StageError(_refused(root / name, error)) from error
                survey.errors[name] = WriteError(_refused(root / name, error))
    try:
        made += _commit([change for change in survey.changes if change not in ours], errors=survey.errors)
    except _ChangedMeanwhile:
        return write_where_possible(folder, templates, processor=processor)
    return Outcome(made, survey.problems)


def _files(stage: Path) -> list[Path]:
    return sorted(path for path in stage.rglob("*") if not path.is_dir())


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


@dataclass
class _Survey:
    """What has to change, and by name of the file why another one cannot."""

    changes: list[Change]
    errors: dict[str, ReadError | WriteError]

    @property
    def problems(self) -> list[str]:
        return list(dict.fromkeys(map(str, self.errors.values())))


def _survey(places: Sequence[Path], templates: Templates, processor: bool | None) -> _Survey:
    """One look at every place of a template.

    Args:
        places: the folder; before it another one whose files will take their places there.

    Raises:
        WriteError: `templates` are none that could be written anywhere.
    """
    by_name = _checked(templates)
    found = _Survey([], {})

    def step(name: str, look: Callable[[], Iterable[Change]]) -> None:
        try:
            found.changes.extend(change for change in look() if change.old != change.new)
        except (ReadError, WriteError) as error:
            found.errors[name] = error

    def present(name: str) -> list[Path]:
        return [place for place in places if os.path.lexists(place / name)]

    def load(name: str) -> _Json:
        return _json((present(name) or places)[0], name)

    def text(name: str, content: str) -> list[Change]:
        return [_change(places[0], name, content.encode(), TEMPLATE_LIMIT)]

    def without(name: str) -> list[Change]:
        return [_change(place, name, None, TEMPLATE_LIMIT) for place in present(name)]

    def without_key(name: str) -> list[Change]:
        return [_without_key(_json(place, name)) for place in present(name)]

    config: _Json | None = None
    try:
        config = load(TOKENIZER_CONFIG)
    except (ReadError, WriteError) as error:
        found.errors[TOKENIZER_CONFIG] = error
    if processor is None:
        processor = any((place / name).is_file() for place in places for name in PROCESSORS) or (
            config is not None and bool(config.members.get("processor_class"))
        )
    several = set(by_name) != {"default"}
    jinja = by_name.get("default") if processor or not several else None
    additional = {name: text for name, text in by_name.items() if name != "default"} if processor and several else {}
    key = [{"name": name, "template": text} for name, text in by_name.items()] if several else by_name["default"]
    stale: set[str] = set()
    try:
        stale = {name for place in places for name in _additional_names(place, bool(additional))} - set(additional)
    except WriteError as error:
        found.errors[ADDITIONAL] = error
        additional = {}

    # What a reader falls back to is written before a place is emptied, and chat_template.json, beside which
    # additional_chat_templates/ must never be seen, goes before that comes and comes after that has gone.
    if config is not None:
        step(TOKENIZER_CONFIG, lambda: [_with_key(config, key)])
    if jinja is not None:
        step(JINJA, functools.partial(text, JINJA, jinja))
    if not processor or several:
        step(LEGACY, functools.partial(without_key, LEGACY))
    for name in (f"{ADDITIONAL}/{name}.jinja" for name in sorted(stale - {"default"})):
        step(name, functools.partial(without, name))
    if jinja is None:
        step(JINJA, functools.partial(without, JINJA))
    for name in (f"{ADDITIONAL}/{name}.jinja" for name in stale & {"default"}):
        step(name, functools.partial(without, name))
    for name, content in additional.items():
        step(f"{ADDITIONAL}/{name}.jinja", functools.partial(text, f"{ADDITIONAL}/{name}.jinja", content))
    if processor and not several:
        step(LEGACY, lambda: [_with_key(load(LEGACY), by_name["default"])])
    step(PROCESSOR_CONFIG, functools.partial(without_key, PROCESSOR_CONFIG))
    return found


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


def _additional_names(place: Path, wanted: bool) -> list[str]:
    folder = place / ADDITIONAL
    if folder.is_symlink():
        raise WriteError(_is_link(folder))
    if wanted and folder.exists() and not folder.is_dir():
        raise WriteError(f"{folder} is not a folder: remove it")
    return [path.name.removesuffix(".jinja") for path in folder.glob("*.jinja")] if folder.is_dir() else []


def _change(place: Path, name: str, new: bytes | None, limit: int) -> Change:
    path = place / name
    if path.is_symlink() and not path.resolve().is_relative_to(place):
        raise WriteError(f"{path} is a symbolic link that leads out of the folder: copy the folder, links resolved")
    return Change(path, read_bytes(path, limit), new)


@dataclass(frozen=True)
class _Json:
    path: Path
    data: bytes | None
    members: dict[str, Any]


def _json(place: Path, name: str) -> _Json:
    found = _change(place, name, None, JSON_LIMIT)
    return _Json(found.path, found.old, {} if found.old is None else parsed(found.old, found.path))


def _with_key(file: _Json, value: Any) -> Change:
    if file.data is None:
        fresh = json.dumps({KEY: value}, indent=2, ensure_ascii=False) + "\n"
        return Change(file.path, None, fresh.encode())
    return Change(file.path, file.data, json_text.with_member(file.data.decode(), KEY, value).encode())


def _without_key(file: _Json) -> Change:
    if file.data is None:
        return Change(file.path, None, None)
    if file.path.name == LEGACY:  # without the key no processor loads beside it
        if set(file.members) - {KEY}:
            raise WriteError(f"{file.path} has to go and holds more than a template: move that elsewhere")
        return Change(file.path, file.data, None)
    return Change(file.path, file.data, json_text.without_member(file.data.decode(), KEY).encode())


def _is_link(folder: Path) -> str:
    return f"{folder} is a symbolic link: replace it by the folder itself"


def _refused(path: Path, error: OSError | WriteError) -> str:
    if isinstance(error, WriteError):
        return str(error)
    return f"{path} cannot be written: {error.strerror or error}"


# Writing.


def _commit(
    changes: Sequence[Change], durable: bool = True, errors: dict[str, ReadError | WriteError] | None = None
) -> list[Change]:
    """Make the changes, and return those that were made.

    Args:
        errors: by name of the file, where the other changes are to be made all the same; more are added.
    """
    made = []
    with ExitStack() as stack:
        folders = _Folders(stack)
        for change in changes:
            if errors is not None and _must_wait(change, errors):
                continue
            try:
                _make(change, folders, durable)
            except (ReadError, WriteError) as error:
                if errors is None:
                    raise
                errors[change.path.name] = error
            else:
                made.append(change)
        folders.settle(durable)
    return made


def _must_wait(change: Change, errors: Iterable[str]) -> bool:
    """Whether a change would do harm, because another one before it could not be made."""
    if change.removes:  # a reader would find nothing any more
        return not {TOKENIZER_CONFIG, JINJA}.isdisjoint(errors)
    return change.path.parent.name == ADDITIONAL and LEGACY in errors  # beside each other no processor loads


def _make(change: Change, folders: _Folders, durable: bool) -> None:
    found = read_bytes(change.path, JSON_LIMIT)
    if found == change.new:
        return
    if found != change.old:
        raise _ChangedMeanwhile(str(change.path))
    try:
        folder = folders.of(change.path, create=change.new is not None)
        if change.new is None:
            folder.remove(change.path.name)
        else:
            folder.replace(change.path.name, change.new, durable)
    except OSError as error:
        raise WriteError(_refused(change.path, error)) from error


class _Folders:
    """The folders that a commit changes, each opened once."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, _Directory] = {}

    def of(self, file: Path, create: bool) -> _Directory:
        """The folder of a file.

        Raises:
            WriteError: it is a link.
            OSError: it cannot be opened.
        """
        path = file.parent
        if path not in self._open:
            within = self.of(path, create) if path.name == ADDITIONAL else None
            if create and within is not None:
                within.make(path.name)
            elif create:
                path.mkdir(parents=True, exist_ok=True)
            self._open[path] = self._stack.enter_context(_Directory(path, within))
            self._open[path].clean()
        return self._open[path]

    def settle(self, durable: bool) -> None:
        """Remove what is empty now, and let the names outlive a power failure, too."""
        for path in [path for path in self._open if path.name == ADDITIONAL]:
            with suppress(OSError):  # not empty: somebody's other files stay
                self._open[path.parent].remove_folder(path.name)
        for folder in self._open.values() if durable else ():
            folder.sync()


class _Directory:
    """A folder that is held open while it is changed: nothing goes through a link that takes its name meanwhile.

    Raises:
        WriteError: it is a link.
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, within: _Directory | None = None) -> None:
        self.path = path
        self._fd: int | None = None
        if path.is_symlink():
            raise WriteError(_is_link(path))
        if _HOLDS:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            self._fd = (
                os.open(path, flags) if within is None else os.open(within._at(path.name), flags, dir_fd=within._fd)
            )

    def __enter__(self) -> _Directory:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)

    def _at(self, name: str) -> str:
        return str(self.path / name) if self._fd is None else name

    def make(self, name: str) -> None:
        """A folder in it, where there is none."""
        with suppress(FileExistsError):
            os.mkdir(self._at(name), dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """A file of it."""
        with suppress(FileNotFoundError):
            os.unlink(self._at(name), dir_fd=self._fd)

    def remove_folder(self, name: str) -> None:
        """An empty folder in it."""
        os.rmdir(self._at(name), dir_fd=self._fd)

    def replace(self, name: str, data: bytes, durable: bool) -> None:
        """Write beside the file, then put it in its place in one step."""
        temporary = _temporary(self.path / name).name
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
            with open(os.open(self._at(temporary), flags, 0o666, dir_fd=self._fd), "wb") as file:
                with suppress(FileNotFoundError):  # a new file has the mode that the system gives
                    mode = stat.S_IMODE(os.stat(self._at(name), dir_fd=self._fd).st_mode)
                    os.chmod(file.fileno() if os.chmod in os.supports_fd else self._at(temporary), mode)
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())  # or the new name could outlive a power failure that its text does not
            os.replace(self._at(temporary), self._at(name), src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except BaseException:
            self.remove(temporary)
            raise

    def take(self, file: Path) -> None:
        """Put another folder's file in its place here."""
        os.replace(file, self._at(file.name), dst_dir_fd=self._fd)

    def sync(self) -> None:
        """Let the names of its files outlive a power failure, where the file system can."""
        if self._fd is not None:
            with suppress(OSError):
                os.fsync(self._fd)

    def clean(self) -> None:
        """Remove what killed writers left."""
        for name in os.listdir(self.path if self._fd is None else self._fd):
            match = _TEMPORARY.fullmatch(name)
            if match is None:
                continue
            with suppress(OSError):
                status = os.stat(self._at(name), dir_fd=self._fd, follow_symlinks=False)
                mine = match["host"] == _host() and os.name == "posix"
                if (mine and not _lives(int(match["process"]))) or time.time() - status.st_mtime > _ABANDONED:
                    shutil.rmtree(self.path / name) if stat.S_ISDIR(status.st_mode) else self.remove(name)


def _temporary(path: Path) -> Path:
    """A name beside `path` that no other writer has, and that tells whose it is."""
    return path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.ptfix-tmp")


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
