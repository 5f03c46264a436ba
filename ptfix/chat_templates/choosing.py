"""Which template a checkpoint should carry for inference, and where the base model's own lies on this machine."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ptfix.chat_templates import diagnosis
from ptfix.chat_templates.diagnosis import Diagnosis
from ptfix.chat_templates.readers import JSON_LIMIT, Templates, parsed, read_bytes
from ptfix.chat_templates.rendering import NotRenderedError, strip_generation_tags

#: With these a model is asked in the words it was trained on; a header that is always there is how some are shipped.
_WORKS = ("ok", "unconditional_generation_prompt")


@dataclass(frozen=True)
class Choice:
    """The templates to write, and why these."""

    templates: Templates | None  #: None: leave the folder as it is, the reasons say why
    source: str  #: where they come from, for people; empty where there are none
    reasons: list[str] = field(default_factory=list)
    judged: bool = True  #: False: which templates are right could not be found out, and may be the next time


def choose(
    *,
    explicit: Templates | str | None = None,
    base: Templates | None = None,
    first_seen: Templates | None = None,
    at_train_begin: Templates | None = None,
    training: Templates | None = None,
    special_tokens: Mapping[str, str] | None = None,
) -> Choice:
    """The first of these that is right: as asked for, the base model's, earlier ones, the training template repaired.

    Right is one that works for inference and renders the text that is trained on, for the user may have changed the
    format on purpose. What was asked for is taken as it is. A wrong template is worse than none: unsure, it declines.
    Where one of them could not be judged there is no choice, not even of a later one: `judged` is False.

    Args:
        explicit: what the user asks for.
        base: what the base model was published with.
        first_seen: what the tokenizer had when it was loaded or registered.
        at_train_begin: what it had when training began.
        training: what the training text is rendered with; None: not known, then there is nothing to compare with.
        special_tokens: of the tokenizer, as `files.special_tokens` reads them.
    """
    tokens = None if special_tokens is None else dict(special_tokens)
    asked = Templates(explicit) if isinstance(explicit, str) else explicit
    if asked:
        return Choice(asked, "as asked for", _doubts(asked, tokens))
    candidates = {"of the base model": base, "first seen": first_seen, "at train begin": at_train_begin}
    try:
        return _first_right(candidates, training, tokens)
    except NotRenderedError as error:
        return Choice(None, "", [str(error)], judged=False)


def _first_right(
    candidates: Mapping[str, Templates | None], training: Templates | None, tokens: dict[str, str] | None
) -> Choice:
    reasons: list[str] = []
    for which, candidate in candidates.items():
        if not candidate:
            continue
        objection = _objection(candidate, training, tokens)
        if objection is None:
            return Choice(_for_inference(candidate), f"the template {which}", reasons)
        reasons.append(f"Not the template {which}: {objection}")
    return _repaired(training, tokens, reasons)


def _doubts(templates: Templates, tokens: dict[str, str] | None) -> list[str]:
    """What the user should hear about a template that is taken as it is."""
    found = None if templates.default is None else diagnose(templates.default, tokens)
    return [f"Taken as it is: {reason}" for reason in (found.reasons if found and found.verdict != "ok" else [])]


def _objection(candidate: Templates, training: Templates | None, tokens: dict[str, str] | None) -> str | None:
    """Why not this one, in one sentence, or None."""
    inference = strip_generation_tags(candidate.default or "")
    if not inference.strip():
        return "It is empty."
    found = judge(inference, tokens)
    if found.verdict not in _WORKS:
        return " ".join(found.reasons) or f"It is {found.verdict}."
    trained = (training.default if training else None) or ""
    if not trained.strip() or strip_generation_tags(trained) == inference:
        return None
    return difference(inference, trained, tokens or {})


def _repaired(training: Templates | None, tokens: dict[str, str] | None, reasons: list[str]) -> Choice:
    """The training template made fit for inference."""
    if training is None or not (training.default or "").strip():
        return Choice(None, "", [*reasons, "There is no template to start from."])
    found = {name: judge(text, tokens) for name, text in training.by_name().items()}
    if found["default"].repaired is None and found["default"].verdict not in _WORKS:
        return Choice(None, "", [*reasons, *found["default"].reasons, "It is left as it is."])
    repaired = Templates.of({name: found[name].repaired or text for name, text in training.by_name().items()})
    inference = _for_inference(repaired)
    if inference == training:
        return Choice(training, "the training template, which is right", reasons)
    return Choice(inference, "the training template, repaired", [*reasons, *found["default"].reasons])


def _for_inference(templates: Templates) -> Templates:
    """Without {% generation %}: it marks what is trained on, and some readers know no such tag."""
    by_name = {name: strip_generation_tags(text) for name, text in templates.by_name().items()}
    return Templates.of(by_name, templates.source)


# Each rendering starts a process, and the same few templates come back: with every checkpoint, in every folder. What
# could not be judged raises, and lru_cache keeps no exception: the next call tries again.


def diagnose(template: str, special_tokens: Mapping[str, str] | None) -> Diagnosis:
    """As `diagnosis.diagnose`, remembered where it was judged."""
    try:
        return judge(template, special_tokens)
    except NotRenderedError as error:
        return diagnosis.not_judged(error)


def judge(template: str, special_tokens: Mapping[str, str] | None) -> Diagnosis:
    """As `diagnosis.judge`, remembered.

    Raises:
        NotRenderedError: it could not be judged.
    """
    return _judge(template, None if special_tokens is None else tuple(sorted(special_tokens.items())))


def difference(inference: str, training: str, special_tokens: Mapping[str, str]) -> str | None:
    """As `diagnosis.disagreement`, remembered.

    Raises:
        NotRenderedError: they could not be compared.
    """
    return _difference(inference, training, tuple(sorted(special_tokens.items())))


@functools.lru_cache(maxsize=128)
def _judge(template: str, special_tokens: tuple[tuple[str, str], ...] | None) -> Diagnosis:
    return diagnosis.judge(template, None if special_tokens is None else dict(special_tokens))


@functools.lru_cache(maxsize=128)
def _difference(inference: str, training: str, special_tokens: tuple[tuple[str, str], ...]) -> str | None:
    return diagnosis.disagreement(inference, training, dict(special_tokens))


# The base model.

_REPOSITORY = re.compile(r"(?!.*\.\.)[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)?")
_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*")


def base_folder(folder_or_name: str | Path, revision: str | None = None) -> Path | None:
    """Where a model lies on this machine: a folder, or its snapshot in the hub's cache. Never asks the network.

    Args:
        folder_or_name: a folder, or the name of a repository on the hub.
        revision: branch, tag or commit of the repository. None: its main branch, as it was when it was downloaded.
    """
    folder = Path(folder_or_name).expanduser()
    if folder.is_dir():
        return folder
    name, revision = str(folder_or_name), revision or "main"
    if not _REPOSITORY.fullmatch(name) or not _REVISION.fullmatch(revision):
        return None
    repository = "models--" + name.replace("/", "--")
    for cache in _caches():
        snapshots = cache / repository / "snapshots"
        reference = read_bytes(cache / repository / "refs" / revision, 1024)
        commit = revision if reference is None else reference.decode("ascii", "replace").strip()
        if _REVISION.fullmatch(commit) and (snapshots / commit).is_dir():
            return snapshots / commit
    return None


def _caches() -> list[Path]:
    """The hub's caches, the one in use first."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    places = [os.environ.get(name) for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE")]
    return [Path(os.path.expandvars(place)).expanduser() for place in (*places, os.path.join(home, "hub")) if place]


def base_of(folder: str | Path) -> tuple[str, str | None] | None:
    """The base model that a saved folder names, and its revision; None where it names none.

    Raises:
        ReadError: the file that should name it cannot be read.
    """
    for file, member in (
        ("adapter_config.json", "base_model_name_or_path"),
        ("config.json", "_name_or_path"),
        ("tokenizer_config.json", "name_or_path"),
    ):
        path = Path(folder, file)
        data = read_bytes(path, JSON_LIMIT)
        saved = {} if data is None else parsed(data, path)
        name, revision = saved.get(member), saved.get("revision")
        if isinstance(name, str) and name:
            return name, revision if isinstance(revision, str) and revision else None
    return None
