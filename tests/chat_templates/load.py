"""Load folders with the installed release and print which templates it got, as JSON: {folder: {reader: templates}}.

    python -m tests.chat_templates.load            # every layout of layouts.py
    python -m tests.chat_templates.load FOLDER...  # these folders

Runs in the environment of any release: it imports only the hosts. Templates are a table by name, null where there is
none, and "raises" where the folder does not load, or loads what no conversation can be rendered with.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from tests.chat_templates.layouts import lay_out, layouts


class TextProcessor(ProcessorMixin):
    """A processor of a tokenizer alone: one with an image processor needs libraries that the hosts do not bring."""

    attributes = ["tokenizer"]  # noqa: RUF012 - the host's own name and type
    valid_kwargs = ["chat_template"]  # noqa: RUF012
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer: Any = None, chat_template: Any = None) -> None:
        known = {} if chat_template is None else {"chat_template": chat_template}
        super().__init__(tokenizer, **known)


def load(folder: Path) -> dict[str, Any]:
    """What each reader of this environment gets from `folder`."""
    import gguf  # here: others want this file's processor alone

    loaders = {
        "tokenizer": lambda: _usable(_tokenizer(folder)),
        "processor": lambda: getattr(
            TextProcessor.from_pretrained(folder, local_files_only=True), "chat_template", None
        ),
        "gguf": lambda: _by_name(gguf.SpecialVocab(folder).chat_template),
    }
    return {reader: _outcome(loader) for reader, loader in loaders.items()}


def _outcome(loader: Any) -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            value = loader()
    except Exception:
        return "raises"
    return plain(value)


def ids(folder: Path) -> list[int] | None:
    """A conversation in the default template, as token ids; None where there is none to render with."""
    tokenizer = _tokenizer(folder)
    found = plain(tokenizer.chat_template)
    if not isinstance(found, dict) or "default" not in found:
        return None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], chat_template=found["default"], tokenize=False
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except ValueError as error:
        if "TokenizersBackend" not in str(error):
            raise
        # The class that transformers 5 names in what it saves is not there in 4, which has the same under this name.
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _usable(tokenizer: Any) -> Any:
    found = tokenizer.chat_template
    if isinstance(found, dict) and "default" in found:  # up to 4.38 it loads and cannot be rendered with
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    return found


def _by_name(value: Any) -> Any:
    """gguf keeps the list of a folder as it is, and takes it apart when it writes the file."""
    return {entry["name"]: entry["template"] for entry in value} if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Templates by name."""
    if value is None or value in ({}, []):
        return None
    if isinstance(value, str):
        return {"default": value}
    return value if isinstance(value, dict) else "raises"


def main(folders: list[str]) -> None:
    """Print the outcomes."""
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        if folders:
            places = {folder: Path(folder) for folder in folders}
        else:
            places = {name: lay_out(Path(scratch, str(i)), files) for i, (name, files) in enumerate(layouts().items())}
        print(json.dumps({name: {**load(folder), "ids": ids(folder)} for name, folder in places.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
