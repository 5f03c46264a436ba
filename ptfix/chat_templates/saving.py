"""A registered tokenizer or processor keeps its training template in memory and saves its inference template.

The object that is registered carries a mark of plain data, so that a deepcopy or a pickle of it saves right too. Which
template is the right one is asked at each save, of the template that is in memory then.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ptfix import errors
from ptfix.chat_templates import files, readers
from ptfix.chat_templates.readers import Templates

if TYPE_CHECKING:
    from ptfix.chat_templates.choosing import Choice

logger = logging.getLogger("ptfix")

#: As hosts keep it in memory: one template, or several by name with "default" among them.
InMemory: TypeAlias = str | Mapping[str, str] | None

_MARK = "_ptfix_chat_templates"
_BEING_SAVED = "_ptfix_being_saved"


def register(obj: Any, inference: InMemory = None, *, base: str | Path | None = None) -> None:
    """From now on every ``save_pretrained`` of `obj` writes its inference template (where `ptfix.apply()` was called).

    Its template in memory stays as it is, for training. Registered again, what was seen first is kept.

    Args:
        obj: a tokenizer or processor of transformers; a processor's tokenizer is registered with it.
        inference: the template to write. None: the base model's, or the one `obj` was loaded with, where it agrees with
            what is trained on, otherwise the training template with the generation prompt that it lacks.
        base: folder, or hub name in the local cache, of the base model. None: where `obj` was loaded from.

    Raises:
        TypeError: `obj` has no chat template to speak of.
    """
    from ptfix.chat_templates import choosing  # not before: apply() loads this module, and is quick

    if not hasattr(obj, "chat_template") or not hasattr(obj, "save_pretrained"):
        raise TypeError(f"register() takes a tokenizer or processor of transformers, not a {type(obj).__name__}.")
    tokenizer = tokenizer_of(obj)
    if tokenizer is not obj and hasattr(tokenizer, "chat_template"):
        register(tokenizer, inference, base=base)
    mark = vars(obj).setdefault(_MARK, {})
    if inference is not None:
        mark["explicit"] = _plain(inference)
    name = base if base is not None else getattr(tokenizer, "name_or_path", None)
    folder = choosing.base_folder(name) if name else None
    if folder is not None and (base is not None or "base" not in mark):
        mark["base"] = str(folder)
    # What from_pretrained found: a script that sets another template leaves it there.
    loaded = getattr(obj, "init_kwargs", {}).get("chat_template")
    mark.setdefault("first_seen", _plain(loaded) or _plain(obj.chat_template))


def at_train_begin(obj: Any) -> None:
    """Note the template `obj` has now, before the first step. What was said of an earlier run may be said again."""
    warn.cache_clear()
    vars(obj)[_MARK].setdefault("at_train_begin", _plain(obj.chat_template))


def is_registered(obj: Any) -> bool:
    """Was `obj`, or what it is a copy of, registered?"""
    return _MARK in getattr(obj, "__dict__", {})


def choice(obj: Any) -> Choice:
    """Which templates a registered object is to be saved with, and why.

    Where that cannot be judged now, `judged` is False and the templates are those of the last judgement, if the
    training template is still the same. Each call tries again.
    """
    mark = {**vars(obj)[_MARK]}
    from ptfix.chat_templates import choosing  # not before the mark is read: apply() gets as far as that, and is quick

    training = _plain(obj.chat_template)
    base, unreadable = None, []
    if mark.get("base"):
        try:
            base = _loaded_from(Path(mark["base"]), tokenizer_of(obj) is not obj)
        except readers.ReadError as error:
            unreadable.append(f"Not the template of the base model: {error}.")
    chosen = choosing.choose(
        explicit=_templates(mark.get("explicit")),
        base=base,
        first_seen=_templates(mark.get("first_seen")),
        at_train_begin=_templates(mark.get("at_train_begin")),
        training=_templates(training),
        special_tokens=special_tokens(obj),
    )
    chosen = dataclasses.replace(chosen, reasons=[*unreadable, *chosen.reasons])
    if chosen.judged and chosen.templates is not None:
        vars(obj)[_MARK]["last"] = {"training": training, "templates": chosen.templates.by_name()}
    elif not chosen.judged and "last" in mark and mark["last"]["training"] == training:
        templates = Templates.of(mark["last"]["templates"])
        return dataclasses.replace(chosen, templates=templates, source="the last judgement")
    return chosen


def special_tokens(obj: Any) -> dict[str, str]:
    """The special tokens that a template may name, as the object has them."""
    tokens = getattr(tokenizer_of(obj), "special_tokens_map", {})
    return {name: str(token) for name, token in tokens.items() if not isinstance(token, list | tuple | dict)}


def tokenizer_of(obj: Any) -> Any:
    """A processor's tokenizer; a tokenizer itself."""
    return vars(obj).get("tokenizer", obj)


def training_template(obj: Any) -> Templates | None:
    """What is in memory now."""
    return _templates(_plain(obj.chat_template))


@functools.lru_cache(maxsize=64)  # it is published once; what cannot be read raises, and is read again the next time
def _loaded_from(folder: Path, processor: bool) -> Templates | None:
    """What the newest reader that finds anything loads from the base model's folder.

    Raises:
        ReadError: none finds anything, and one of them could not read.
    """
    fault: readers.ReadError | None = None
    place = readers.Folder(folder)
    for reader in reversed(readers.READERS):
        if reader.program == "transformers" and (processor or reader.kind != "processor"):
            try:
                found = reader.read(place)
            except readers.ReadError as error:
                fault = fault or error
            else:
                if found:
                    return found
    if fault is not None:
        raise fault
    return None


def save(original: Callable[..., Any], obj: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's ``save_pretrained``, of a registered object with its inference template. Returns what the host does.

    Raises nothing but what the host raises: what keeps a template from being written is a warning.
    """
    if not is_registered(obj):
        return original(obj, save_directory, *args, **kwargs)
    of_processor = files.is_stage(save_directory)  # what is saved there, and said of it, is for the processor's save
    twin = None
    try:
        chosen = choice(obj)
        if chosen.templates is not None:
            twin = _twin(obj, chosen.templates)
        if not chosen.judged and not of_processor:
            warn(not_judged(save_directory, chosen))
        elif twin is None and training_template(obj) is not None:
            warn(as_it_is(chosen))
    except Exception as error:
        warn(not_written(save_directory, [errors.one_line(error)]))
    if twin is None:
        return original(obj, save_directory, *args, **kwargs)
    if of_processor or kwargs.get("filename_prefix") or os.path.isfile(save_directory):
        # No reader looks for prefixed names; what is no folder, the host refuses.
        return original(twin, save_directory, *args, **kwargs)
    if not kwargs.get("push_to_hub") and not args:  # else it uploads from where it saves
        try:
            return _save_staged(original, twin, save_directory, kwargs)
        except files.StageError as error:
            logger.debug("%s is saved without a stage: %s", save_directory, error)
    result = original(twin, save_directory, *args, **kwargs)
    _finish(save_directory, twin)
    return result


def _save_staged(original: Callable[..., Any], twin: Any, folder: Any, kwargs: Mapping[str, Any]) -> Any:
    """Save beside the folder's files first, so that each of them is whole at every moment.

    Raises:
        StageError: there is no way to; the host has to save into the folder itself.
    """
    with files.staged(folder) as stage:
        try:
            saved = original(twin, str(stage), **kwargs)
        except Exception as error:
            if _disk_is_full(error):  # it may not be for a host that overwrites the files that are there
                raise files.StageError(str(error)) from error
            raise
        try:
            outcome = files.publish(stage, folder, vars(twin)[_BEING_SAVED], processor=_is_processor(twin) or None)
        except files.StageError:
            raise
        except Exception as error:
            raise files.StageError(errors.one_line(error)) from error
        if outcome.problems:
            warn(not_written(folder, outcome.problems))
        return _moved(saved, str(stage), str(folder))


def _disk_is_full(error: Exception) -> bool:
    codes = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
    # The tokenizers library is written in Rust, and raises a plain Exception with these words.
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


def upload(original: Callable[..., Any], obj: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's ``_upload_modified_files``, which sends what `save` will leave."""
    if _BEING_SAVED in getattr(obj, "__dict__", {}):
        _finish(working_dir, obj)
    return original(obj, working_dir, *args, **kwargs)


def _finish(folder: Any, twin: Any) -> None:
    """Put the templates where the host has saved `twin`, or say why not."""
    try:
        problems = write(folder, vars(twin)[_BEING_SAVED], twin).problems
    except Exception as error:
        problems = [errors.one_line(error)]
    if problems:
        warn(not_written(folder, problems))


def _moved(saved: Any, stage: str, folder: str) -> Any:
    """The names of the saved files, as the host returns them, where they will be."""
    if not isinstance(saved, tuple | list):
        return saved
    return type(saved)(
        os.path.join(folder, os.path.relpath(name, stage)) if isinstance(name, str) else name for name in saved
    )


def write(folder: Any, templates: Templates, obj: Any) -> files.Outcome:
    """Make `folder`, where `obj` was saved, carry the templates in every place a reader looks, where that can be."""
    if not os.path.isdir(folder):
        return files.Outcome([], [])
    return files.write_where_possible(folder, templates, processor=_is_processor(obj) or None)


def _is_processor(obj: Any) -> bool:
    return tokenizer_of(obj) is not obj


def _twin(obj: Any, templates: Templates) -> Any:
    """An object that differs from `obj` in its template alone. `obj` itself may be in use in another thread."""
    twin = object.__new__(type(obj))
    vars(twin).update(vars(obj))
    del vars(twin)[_MARK]
    by_name = templates.by_name()
    vars(twin)["chat_template"] = by_name["default"] if set(by_name) == {"default"} else by_name
    vars(twin)[_BEING_SAVED] = templates
    return twin


def _plain(template: Any) -> Any:
    """A template as JSON holds it; what from_pretrained keeps as a list of names and templates becomes a dict."""
    if isinstance(template, Mapping):
        return dict(template)
    if isinstance(template, list | tuple):
        return {entry["name"]: entry["template"] for entry in template}
    return template if isinstance(template, str) else None


def _templates(plain: Any) -> Templates | None:
    if plain is None:
        return None
    return Templates.of({"default": plain} if isinstance(plain, str) else plain)


# What is said. A save and a callback that looks after it find the same faults, and say them in the same words, once.


def as_it_is(chosen: Choice) -> str:
    """That no template is known to be better than the one in memory."""
    return f"the chat template is saved as it is: {'; '.join(chosen.reasons) or 'nothing better is known'}"


def not_judged(folder: Any, chosen: Choice) -> str:
    """That nobody could find out which template is right."""
    kept = "the one in memory" if chosen.templates is None else "the one that was right when it was last judged"
    return _of_checkpoint(
        f"which chat template is right for inference could not be judged, so {os.path.abspath(folder)} is saved with "
        f"{kept}: {'; '.join(chosen.reasons)} The next save tries again."
    )


def not_written(folder: Any, problems: Iterable[str]) -> str:
    """That a template is not everywhere."""
    return _of_checkpoint(
        f"the chat template for inference is not in every place of {os.path.abspath(folder)} where readers look: "
        f"{'; '.join(problems)}"
    )


def _of_checkpoint(sentence: str) -> str:
    """With the folders' names as they will be: transformers <4.39 saves into tmp-checkpoint-N and renames that."""
    return sentence.replace(f"{os.sep}tmp-checkpoint-", f"{os.sep}checkpoint-")


@functools.lru_cache(maxsize=256)
def warn(sentence: str) -> None:
    """Say it, once in a run."""
    logger.warning("%s", sentence)
