"""Real templates, out of installed wheels; none are kept in this repository."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import pytest

TRL = "needs trl's template files: pip install --no-deps trl==1.16.0"


def trl() -> Mapping[str, str]:
    """The chat templates in trl's wheel, by name; skips the test where there is none."""
    spec = importlib.util.find_spec("trl")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders for path in sorted(Path(folder, "chat_templates").glob("*.jinja"))]
    if not files:
        pytest.skip(TRL)
    return {path.stem: path.read_text(encoding="utf-8") for path in files}
