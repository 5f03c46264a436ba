"""What is wrong with a saved folder, in sentences, and what would make it right."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptfix.chat_templates import choosing, files, json_text, readers, texts
from ptfix.chat_templates.choosing import Choice
from ptfix.chat_templates.diagnosis import Diagnosis
from ptfix.chat_templates.files import Change
from ptfix.chat_templates.readers import (
    ADDITIONAL,
    JSON_LIMIT,
    KEY,
    LEGACY,
    READERS,
    TOKENIZER_CONFIG,
    Folder,
    ReadError,
    Templates,
    parsed,
    read_bytes,
)
from ptfix.chat_templates.rendering import Job, NotRenderedError, render_all, strip_generation_tags

ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
_ANSWER = "answer-0-end"
_VOCABULARY_LIMIT = 256 * 2**20


@dataclass(frozen=True)
class Loaded:
    """What one reader loads."""

    by: readers.Reader
    templates: Templates
    error: str | None  #: why it loads nothing usable

    @property
    def reader(self) -> str:
        """The reader's id."""
        return self.by.id

    @property
    def digest(self) -> str | None:
        """A short name of the default template's text."""
        text = self.templates.default
        return None if text is None else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


@dataclass(frozen=True)
class Eos:
    """The token that ends an answer, and where generation should stop at it and does not."""

    token: str
    id: int
    path: Path
    stops_at: list[int]

    def change(self) -> Change:
        """The edit of generation_config.json that adds it."""
        data = read_bytes(self.path, JSON_LIMIT) or b"{}"
        text = json_text.with_member(data.decode(), "eos_token_id", [*self.stops_at, self.id])
        # A plan resolves its folder, and a link is not written through.
        return Change(self.path.parent.resolve() / self.path.name, data, text.encode())


@dataclass(frozen=True)
class Inspection:
    """A folder's readers, faults and remedy."""

    folder: Path
    kind: str  #: tokenizer, processor, adapter, model
    base: str | None  #: the base model's name
    base_folder: Path | None  #: where it lies on this machine
    loaded: list[Loaded]
    verdicts: Mapping[str, Diagnosis]  #: by template
    problems: list[str]
    notes: list[str]  #: worth knowing, no fault
    choice: Choice
    changes: list[Change]  #: what would put the chosen templates where every reader looks
    eos: Eos | None  #: generation does not stop at the end of an answer

    def verdict(self, one: Loaded) -> str:
        """In one word, of what a reader loads."""
        if one.error is not None:
            return "unusable"
        if one.templates.default is None:
            return "none"
        found = self.verdicts.get(one.templates.default)
        return "empty" if found is None else found.verdict


def folders(path: Path) -> list[Path]:
    """The folders to look at: this one, and the checkpoints that a Trainer left in it, in their order."""
    checkpoints = [child for child in path.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", child.name)]
    found = [path, *sorted(checkpoints, key=lambda child: int(child.name.partition("-")[2]))]
    return [folder for folder in found if _is_saved(folder)]


def inspect(folder: Path, base: str | None = None, explicit: str | None = None) -> Inspection:
    """Look at one folder. Changes nothing, asks no network, imports no host.

    Args:
        base: the base model, a folder or a name in the hub's cache. None: as the folder says.
        explicit: the template that the user wants.

    Raises:
        ReadError: a file in it cannot be read.
    """
    place = Folder(folder)
    place.read_all()
    tokens = files.special_tokens(folder)
    name, revision = (base, None) if base else choosing.base_of(folder) or (None, None)
    base_folder = choosing.base_folder(name, revision) if name else None
    if base_folder is not None and base_folder.resolve() == folder.resolve():
        name = base_folder = None
    loaded = [_loaded(reader, place) for reader in READERS if reader.reads(place)]
    found = dict.fromkeys(text for one in loaded if (text := one.templates.default) is not None)
    verdicts = {text: choosing.diagnose(text, tokens) for text in found if text.strip()}
    has_tokenizer = files.has_tokenizer(folder)
    misplaced = [*_places(place), *_readers(loaded)] if has_tokenizer else [_NO_TOKENIZER]
    wrong, notes = _judged(loaded, verdicts)
    problems = [*misplaced, *wrong]
    choice = _choose(place, base_folder, bool(base), explicit, verdicts, tokens)
    changes: list[Change] = []
    solved = misplaced or (wrong and choice.templates and choice.templates.default not in verdicts)
    if has_tokenizer and choice.templates and (solved or explicit is not None):
        try:
            changes = files.plan(folder, choice.templates)
        except files.WriteError as error:
            choice = Choice(None, "", [*choice.reasons, str(error)])
    inference = choice.templates.default if choice.templates else next(iter(verdicts), None)
    eos = _eos(folder, base_folder, inference, tokens) if inference else None
    if eos is not None:
        stops = f"stops at {eos.stops_at}" if eos.stops_at else "stops at nothing"
        remedy = " (`ptfix repair --eos` adds it)" if eos.path.parent == folder else ""
        problems.append(
            f"Generation runs on: an answer ends with {eos.token!r} (id {eos.id}), {eos.path} {stops}{remedy}"
        )
    if name and base_folder is None:
        notes.append(f"The base model {name} is not on this machine, so there is nothing to compare with: pass --base")
    return Inspection(folder, _kind(place), name, base_folder, loaded, verdicts, problems, notes, choice, changes, eos)


def read_template(path: Path) -> str:
    """The template in a file.

    Raises:
        ReadError: there is no such file, or it is not text.
    """
    data = read_bytes(path, readers.TEMPLATE_LIMIT)
    if data is None:
        raise ReadError(f"{path} does not exist")
    return readers.decoded(data, path)


def misread(folder: Path, templates: Templates) -> list[str]:
    """The readers that do not get the default template of `templates` from the folder, though they could."""
    place = Folder(folder)
    wanted = texts.unix_lines(templates.default or "")
    loaded = [_loaded(reader, place) for reader in READERS if reader.reads(place)]
    able = [one for one in loaded if one.by.finds(templates)]
    return [one.reader for one in able if (one.templates.default or "") != wanted]


def _is_saved(folder: Path) -> bool:
    names = (TOKENIZER_CONFIG, ADAPTER_CONFIG, "config.json", readers.JINJA, LEGACY, readers.PROCESSOR_CONFIG)
    return files.has_tokenizer(folder) or any((folder / name).exists() for name in names)


def _kind(place: Folder) -> str:
    if (place.path / ADAPTER_CONFIG).is_file():
        return "adapter"
    if place.has_processor:
        return "processor"
    return "tokenizer" if files.has_tokenizer(place.path) else "model"


def _loaded(reader: readers.Reader, place: Folder) -> Loaded:
    try:
        return Loaded(reader, reader.read(place), None)
    except ReadError as error:
        return Loaded(reader, Templates(), str(error))


def _choose(
    place: Folder,
    base_folder: Path | None,
    restore: bool,
    explicit: str | None,
    verdicts: Mapping[str, Diagnosis],
    tokens: dict[str, str],
) -> Choice:
    """What the folder should hold. A right template that lies there is kept, unless the base model's is asked for."""
    if explicit is not None:
        return choosing.choose(explicit=explicit, special_tokens=tokens)
    first, *others = verdicts or [""]
    try:
        difference = next(filter(None, (choosing.difference(first, other, tokens) for other in others)), None)
    except NotRenderedError as error:
        return Choice(None, "", [str(error)], judged=False)
    if difference is not None:
        reasons = [f"There are templates of two formats here. {difference}", "Say which is right: --template FILE"]
        return Choice(None, "", reasons)
    saved, broken = _load(place)
    right = [text for text, found in verdicts.items() if found.verdict == "ok" and found.repaired is None]
    if right and not restore:
        kept = saved if saved.default in right else Templates(right[0])
        return Choice(kept, "the template that lies there and is right")
    base, unreadable = _load(Folder(base_folder)) if base_folder else (None, [])
    choice = choosing.choose(base=base, training=saved, special_tokens=tokens)
    return replace(choice, reasons=[*broken, *unreadable, *choice.reasons])


def _load(place: Folder) -> tuple[Templates, list[str]]:
    """What a folder holds, or why nothing of it can be used."""
    try:
        found = readers.load(place)
    except ReadError as error:
        return Templates(), [f"{place.path}: {error}"]
    if isinstance((place.tokenizer_config or {}).get(KEY), str):
        # A release that writes additional_chat_templates/ takes the key out: those are left from an earlier save.
        found = replace(found, named={})
    return found, []


# Faults, each in a sentence.


_NO_TOKENIZER = (
    "There is no tokenizer here: whoever loads the folder takes one from elsewhere, with its chat template. "
    "Save it beside the weights: tokenizer.save_pretrained(folder)"
)


def _places(place: Folder) -> list[str]:
    """Of single files."""
    found = []
    if place.tokenizer_config is not None and KEY in place.tokenizer_config and place.tokenizer_config[KEY] is None:
        found.append(f"{TOKENIZER_CONFIG} has a null {KEY}: llama.cpp takes it for no template at all")
    if place.jinja is not None and not place.jinja.strip():
        found.append(f"{readers.JINJA} is empty: readers that look there render every conversation to nothing")
    if "default" in place.additional:
        found.append(f"{ADDITIONAL}/default.jinja wins over {readers.JINJA} in tokenizers of transformers >=4.52")
    if place.legacy is not None and not place.has_processor:
        found.append(f"{LEGACY} is a processor's file, and there is no processor: it is left from something else")
    return found


def _readers(loaded: list[Loaded]) -> list[str]:
    """Of what readers load, compared with each other."""
    named = Templates("", {name: "" for one in loaded for name in one.templates.named})
    judged = [one for one in loaded if one.by.finds(named)]
    found = [f"{_listed(group)}: {why}" for why, group in _grouped(judged, lambda one: one.error).items() if why]
    usable = [one for one in judged if (one.templates.default or "").strip()]
    if not usable:
        return [*found, "No reader finds a chat template: it was lost, or there never was one"]
    lost = [one for one in judged if one.error is None and one.templates.default is None]
    if lost:
        found.append(f"No template is found by {_listed(lost)}")
    groups = _grouped(usable, lambda one: one.digest)
    if len(groups) > 1:
        told = [f"{digest} from {_sources(group)} ({_listed(group)})" for digest, group in groups.items()]
        found.append(f"Readers load different templates: {'; '.join(told)}")
        ours = {kind: {one.digest for one in usable if one.by.kind == kind} for kind in ("tokenizer", "processor")}
        if ours["processor"] and ours["processor"].isdisjoint(ours["tokenizer"]):
            found.append("The processor has another template than its tokenizer")
    return [*found, *_named(usable)]


def _named(loaded: list[Loaded]) -> list[str]:
    """Of templates that some readers load by name and others do not."""
    capable = [one for one in loaded if one.by.loads == "every"]
    found = []
    for name in sorted({name for one in capable for name in one.templates.named}):
        groups = _grouped(capable, lambda one, name=name: one.templates.named.get(name))
        if not files.is_name(name):
            found.append(f"A template is named {name!r}, which may be a path that the next save writes to")
        elif len(groups) > 1:
            having = [one for text, group in groups.items() if text is not None for one in group]
            found.append(
                f"Not every reader loads the same template {name!r}: {_listed(having)} from {_sources(having)}"
            )
    return found


def _judged(loaded: list[Loaded], verdicts: Mapping[str, Diagnosis]) -> tuple[list[str], list[str]]:
    """Problems of the templates themselves, and what else is to be said of them."""
    problems, notes = [], []
    for text, found in verdicts.items():
        digest = next(one.digest for one in loaded if one.templates.default == text)
        wrong = _wrong(text, found)
        problems += [f"{digest}: {problem}" for problem in wrong]
        notes += [f"{digest}: {reason}" for reason in ([] if wrong else found.reasons)]
    return problems, notes


def _wrong(text: str, found: Diagnosis) -> list[str]:
    problems = []
    if found.verdict in _FAULTS:
        problems.append(f"{_FAULTS[found.verdict]}. {found.reasons[0]}")
    if strip_generation_tags(text) != text:
        problems.append("It has {% generation %} tags, which are for training and not known to every reader")
    if hidden := texts.hidden(text):
        problems.append(f"It has characters that nobody sees: {texts.names(hidden)}")
    return problems


_FAULTS = {
    "missing_generation_prompt": "The generation prompt is missing",
    "unrenderable": "It does not render",
}


def _grouped(loaded: Iterable[Loaded], key: Any) -> dict[str | None, list[Loaded]]:
    groups: dict[str | None, list[Loaded]] = {}
    for one in loaded:
        groups.setdefault(key(one), []).append(one)
    return groups


def _listed(loaded: Iterable[Loaded]) -> str:
    return ", ".join(one.reader for one in loaded)


def _sources(loaded: Iterable[Loaded]) -> str:
    return " and ".join(dict.fromkeys(one.templates.source or "" for one in loaded))


# The end of an answer.


def _eos(folder: Path, base_folder: Path | None, template: str, tokens: dict[str, str]) -> Eos | None:
    """Where generation goes on after the end of an answer; None where it stops, or nobody can tell."""
    path = next((f / GENERATION_CONFIG for f in (folder, base_folder) if f and (f / GENERATION_CONFIG).is_file()), None)
    if path is None:
        return None
    saved = parsed(read_bytes(path, JSON_LIMIT) or b"{}", path).get("eos_token_id")
    stops_at = [token for token in (saved if isinstance(saved, list) else [saved]) if isinstance(token, int)]
    conversation = [{"role": "user", "content": "question-0-end"}, {"role": "assistant", "content": _ANSWER}]
    rendered = render_all([Job(template, conversation)], tokens)[0]
    if not isinstance(rendered, str) or _ANSWER not in rendered:
        return None
    after = rendered.rpartition(_ANSWER)[2].lstrip()
    added = _added_tokens(folder)
    token = max((token for token in added if token and after.startswith(token)), key=len, default=None)
    return None if token is None or added[token] in stops_at else Eos(token, added[token], path, stops_at)


def _added_tokens(folder: Path) -> dict[str, int]:
    """The tokens that stand for themselves in a text, and their ids."""
    config, vocabulary = folder / TOKENIZER_CONFIG, folder / "tokenizer.json"
    decoder = parsed(read_bytes(config, JSON_LIMIT) or b"{}", config).get("added_tokens_decoder")
    if isinstance(decoder, dict) and decoder:
        pairs = [(token.get("content"), key) for key, token in decoder.items() if isinstance(token, dict)]
    else:
        entries = parsed(read_bytes(vocabulary, _VOCABULARY_LIMIT) or b"{}", vocabulary).get("added_tokens")
        tokens = entries if isinstance(entries, list) else []
        pairs = [(token.get("content"), token.get("id")) for token in tokens if isinstance(token, dict)]
    return {content: int(key) for content, key in pairs if isinstance(content, str) and str(key).isdecimal()}
