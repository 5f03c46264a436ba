"""A registered tokenizer or processor keeps its training template in memory and saves its inference template.

The object that is registered carries a mark of plain data, so that a deepcopy or a pickle of it saves right too. Which
template is the right one is asked at each save, of the template that is in memory then.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
    """Note the template `obj` has now, before the first step."""
    vars(obj)[_MARK].setdefault("at_train_begin", _plain(obj.chat_template))


def is_registered(obj: Any) -> bool:
    """Was `obj`, or what it is a copy of, registered?"""
    return _MARK in getattr(obj, "__dict__", {})


def choice(obj: Any) -> Choice:
    """Which templates a registered object is to be saved with, and why."""
    state = {
        **vars(obj)[_MARK],
        "training": _plain(obj.chat_template),
        "tokens": special_tokens(obj),
        "processor": tokenizer_of(obj) is not obj,
    }
    return _chosen(json.dumps(state))


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


@functools.lru_cache(maxsize=64)  # a template is judged once, not at each checkpoint
def _chosen(key: str) -> Choice:
    from ptfix.chat_templates import choosing

    state = json.loads(key)
    return choosing.choose(
        explicit=_templates(state.get("explicit")),
        base=_loaded_from(Path(state["base"]), state["processor"]) if state.get("base") else None,
        first_seen=_templates(state.get("first_seen")),
        at_train_begin=_templates(state.get("at_train_begin")),
        training=_templates(state.get("training")),
        special_tokens=state["tokens"],
    )


def _loaded_from(folder: Path, processor: bool) -> Templates | None:
    """What the newest reader that finds anything loads from the base model's folder."""
    for reader in reversed(readers.READERS):
        if reader.id.startswith("transformers") and reader.processor in (processor, False):
            with contextlib.suppress(readers.ReadError):
                found = reader.read(folder)
                if found:
                    return found
    return None


def save(original: Callable[..., Any], obj: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's ``save_pretrained``, of a registered object with its inference template. Returns what the host does.

    Raises:
        WriteError, ReadError: the templates cannot be written there; and what the host raises.
    """
    if not is_registered(obj):
        return original(obj, save_directory, *args, **kwargs)
    chosen = choice(obj)
    if chosen.templates is None:
        if training_template(obj) is not None:
            _say_once("; ".join(chosen.reasons))
        return original(obj, save_directory, *args, **kwargs)
    twin = _twin(obj, chosen.templates)
    if kwargs.get("filename_prefix") or os.path.isfile(save_directory):
        # No reader looks for prefixed names; what is no folder, the host refuses.
        return original(twin, save_directory, *args, **kwargs)
    if kwargs.get("push_to_hub") or args:  # uploads from where it saves
        result = original(twin, save_directory, *args, **kwargs)
    else:
        with files.staged(save_directory) as stage:
            result = _moved(original(twin, str(stage), **kwargs), str(stage), str(save_directory))
            write(stage, chosen.templates, obj, durable=False)  # as the host's own files beside it
    write(save_directory, chosen.templates, obj)
    return result


def upload(original: Callable[..., Any], obj: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
    """The host's ``_upload_modified_files``, which sends what `save` will leave."""
    templates = getattr(obj, "__dict__", {}).get(_BEING_SAVED)
    if templates is not None:
        write(working_dir, templates, obj)
    return original(obj, working_dir, *args, **kwargs)


def _moved(saved: Any, stage: str, folder: str) -> Any:
    """The names of the saved files, as the host returns them, where they will be."""
    if not isinstance(saved, tuple | list):
        return saved
    return type(saved)(
        os.path.join(folder, os.path.relpath(name, stage)) if isinstance(name, str) else name for name in saved
    )


def uploaded_by(original: Callable[..., Any]) -> Callable[..., Any]:
    """``_upload_modified_files(self, working_dir, ...)`` that sends what `saved_by` would leave."""

    @functools.wraps(original)
    def _upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        templates = getattr(self, "__dict__", {}).get(_BEING_SAVED)
        if templates is not None:
            write(working_dir, templates, self)
        return original(self, working_dir, *args, **kwargs)

    return _upload_modified_files


def write(folder: Any, templates: Templates, obj: Any, durable: bool = True) -> list[files.Change]:
    """Make `folder`, where `obj` was saved, carry the templates in every place a reader looks."""
    if not os.path.isdir(folder):
        return []
    is_processor = True if tokenizer_of(obj) is not obj else None
    return files.write(folder, templates, processor=is_processor, durable=durable)


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


@functools.lru_cache(maxsize=64)
def _say_once(reasons: str) -> None:
    logger.warning("the chat template is saved as it is: %s", reasons or "nothing better is known")
