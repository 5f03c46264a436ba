"""Folders with chat templates in every combination of places, to be loaded by real releases and by ptfix's readers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [
        {
            "id": index,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, token in enumerate(["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {
        "type": "WordLevel",
        "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4, "hello": 5},
        "unk_token": "<unk>",
    },
}
CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "model_max_length": 512,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
}


def template(word: str) -> str:
    """A template that differs from the one of another word, with what is hard to carry: newlines, quotes, non-ASCII."""
    turn = "<|im_start|>{{ m['content'] }}<|im_end|>"
    return f'{{# {word} é "\\ #}}\n{{% for m in messages %}}{turn}\n{{% endfor %}}\n'


def _list(*words: str) -> list[dict[str, str]]:
    return [{"name": name, "template": template(f"key {name}")} for name in words]


#: One choice for each place; every combination is a layout. A str is a file's text, other values belong under a key.
_KEYS: dict[str, object] = {
    "no key": ...,
    "key": template("key"),
    "null key": None,
    "list key": _list("default", "tool_use"),
}
_JINJA = {"": None, "jinja": template("jinja"), "empty jinja": ""}
_ADDITIONAL: dict[str, dict[str, str]] = {
    "": {},
    "additional": {"tool_use": template("additional")},
    "additional default": {"default": template("additional default")},
}
_LEGACY: dict[str, object] = {"": ..., "json": template("json")}
_PROCESSOR: dict[str, object] = {"": ..., "processor key": template("processor key")}

#: What the combinations do not have.
ODD: dict[str, dict[str, str]] = {
    "table key": {"tokenizer_config.json": json.dumps({**CONFIG, "chat_template": {"default": "a", "tool_use": "b"}})},
    "list without default": {"tokenizer_config.json": json.dumps({**CONFIG, "chat_template": _list("rag")})},
    "number key": {"tokenizer_config.json": json.dumps({**CONFIG, "chat_template": 5})},
    "bad list": {"tokenizer_config.json": json.dumps({**CONFIG, "chat_template": [{"name": "default"}]})},
    "broken config": {"tokenizer_config.json": '{"eos_token": "</s>", '},
    "config with a byte order mark": {"tokenizer_config.json": "\ufeff" + json.dumps({**CONFIG, "chat_template": "k"})},
    "jinja with a byte order mark": {"chat_template.jinja": "\ufeffhello"},
    "jinja with CRLF": {"chat_template.jinja": "hello\r\nold\rmac\n"},
    "key with CRLF": {"tokenizer_config.json": json.dumps({**CONFIG, "chat_template": "hello\r\nold\rmac\n"})},
    "empty key": {"tokenizer_config.json": json.dumps({**CONFIG, "chat_template": ""})},
    "null json": {"chat_template.json": json.dumps({"chat_template": None})},
    "json without the key": {"chat_template.json": "{}"},
    "broken json": {"chat_template.json": "{"},
    "list json": {"chat_template.json": json.dumps({"chat_template": _list("default", "tool_use")})},
    "table processor key": {
        "processor_config.json": json.dumps(
            {"processor_class": "TextProcessor", "chat_template": {"default": "a", "tool_use": "b"}}
        )
    },
    "two additional": {
        "chat_template.jinja": template("jinja"),
        "additional_chat_templates/rag.jinja": template("rag"),
        "additional_chat_templates/tool_use.jinja": template("tool_use"),
    },
    "additional named file": {
        "chat_template.jinja": template("jinja"),
        "additional_chat_templates/file.jinja": template("file"),
    },
    "additional that is no jinja": {
        "chat_template.jinja": template("jinja"),
        "additional_chat_templates/notes.txt": "not a template",
    },
}


def layouts() -> dict[str, dict[str, str]]:
    """Name -> the files, by path, that hold the templates."""
    found: dict[str, dict[str, str]] = {}
    for key, jinja, additional, legacy, processor in itertools.product(_KEYS, _JINJA, _ADDITIONAL, _LEGACY, _PROCESSOR):
        files: dict[str, str] = {}
        if _KEYS[key] is not ...:
            files["tokenizer_config.json"] = json.dumps({**CONFIG, "chat_template": _KEYS[key]}, indent=2)
        text = _JINJA[jinja]
        if text is not None:
            files["chat_template.jinja"] = text
        files |= {f"additional_chat_templates/{name}.jinja": text for name, text in _ADDITIONAL[additional].items()}
        if _LEGACY[legacy] is not ...:
            files["chat_template.json"] = json.dumps({"chat_template": _LEGACY[legacy]}, indent=2)
        if _PROCESSOR[processor] is not ...:
            files["processor_config.json"] = json.dumps(
                {"chat_template": _PROCESSOR[processor], "processor_class": "TextProcessor"}, indent=2
            )
        found[", ".join(filter(None, (key, jinja, additional, legacy, processor)))] = files
    return {**found, **ODD}


def lay_out(folder: Path, files: dict[str, str]) -> Path:
    """Make a tokenizer's folder with these files in it."""
    for name, text in {
        "tokenizer.json": json.dumps(TOKENIZER),
        "tokenizer_config.json": json.dumps(CONFIG),
        **files,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode("utf-8"))
    return folder
