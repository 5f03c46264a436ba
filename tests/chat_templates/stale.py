"""Odd files that an earlier save, or somebody else, may have left in a folder that a tokenizer is saved into."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def _write(name: str, content: str | bytes) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return build


def _link(name: str, *, to_folder: bool = False) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        outside = folder.parent / f"outside-{folder.name}"
        if to_folder:
            outside.mkdir()
            (outside / "tool_use.jinja").write_text("precious")
        else:
            outside.write_text("precious")
        (folder / name).symlink_to(outside)

    return build


def _folder(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).mkdir(parents=True)


def _fifo(name: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        os.mkfifo(folder / name)

    return build


#: Name -> how it comes there, and the words of the one warning that a tokenizer's save gives; "" where it gives none.
STALE: dict[str, tuple[Callable[[Path], None], str]] = {
    "broken processor_config.json": (_write("processor_config.json", "{"), "processor_config.json is not valid JSON"),
    "a list in processor_config.json": (_write("processor_config.json", "[]"), "processor_config.json holds no JSON"),
    "processor_config.json is a folder": (_folder("processor_config.json"), "processor_config.json is a folder"),
    "broken chat_template.json": (_write("chat_template.json", "{"), "chat_template.json is not valid JSON"),
    "bytes in chat_template.json": (_write("chat_template.json", b"\xff"), "chat_template.json is not UTF-8"),
    "more in chat_template.json": (
        _write("chat_template.json", '{"chat_template": "x", "mine": 1}'),
        "chat_template.json has to go and holds more than a template",
    ),
    "chat_template.json is a link": (_link("chat_template.json"), "chat_template.json is a symbolic link"),
    "chat_template.json is a folder": (_folder("chat_template.json"), "chat_template.json is a folder"),
    "large chat_template.jinja": (_write("chat_template.jinja", "x" * (2**20 + 1)), ""),
    "chat_template.jinja is a link": (_link("chat_template.jinja"), ""),
    "additional_chat_templates is a link": (
        _link("additional_chat_templates", to_folder=True),
        "additional_chat_templates is a symbolic link",
    ),
    "additional_chat_templates is a file": (_write("additional_chat_templates", "mine"), ""),
    "an additional template is a folder": (
        _folder("additional_chat_templates/old.jinja"),
        "old.jinja is a folder",
    ),
    "broken tokenizer_config.json": (_write("tokenizer_config.json", "{"), ""),
    "tokenizer_config.json is a link": (_link("tokenizer_config.json"), ""),
}
if hasattr(os, "mkfifo"):
    STALE["chat_template.jinja is a pipe"] = (_fifo("chat_template.jinja"), "")
    STALE["chat_template.json is a pipe"] = (_fifo("chat_template.json"), "chat_template.json is not a regular file")
