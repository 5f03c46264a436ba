"""Print a table of releases: what one saved and ptfix wrote (row) is loaded by every other (column).

    python -m tests.chat_templates.releases PYTHON...   # interpreters of environments with the hosts and gguf

A cell says which of a tokenizer's one template, its several and a processor's one are loaded as they were written. Ends
with status 1 where one is not, but for what no folder can give a release, or where the ids of a conversation differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ptfix.chat_templates import files
from ptfix.chat_templates.files import Templates
from tests.chat_templates.layouts import template

SINGLE = Templates(template("the one"))
SEVERAL = Templates(template("the one"), {"tool_use": template("tools")})
WRITTEN = {"single": SINGLE, "several": SEVERAL, "processor": SINGLE}


def main(interpreters: list[str]) -> int:
    """Print the table."""
    names = {
        python: _run(python, "-c", "import transformers; print(transformers.__version__)") for python in interpreters
    }
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for python, name in names.items():
            _run(python, "-m", "tests.chat_templates.save", str(Path(scratch, name)))
            for kind, templates in WRITTEN.items():
                folder = Path(scratch, name, kind)
                files.write(folder, templates, processor=kind == "processor")
                folders.append(str(folder))
        loaded = {
            name: json.loads(_run(python, "-m", "tests.chat_templates.load", *folders))
            for python, name in names.items()
        }
        ids = {
            json.dumps(found["ids"]) for by_folder in loaded.values() for found in by_folder.values() if found["ids"]
        }
        print("| saved \\ loaded |", " | ".join(loaded), "|")
        print("|---" * (len(loaded) + 1) + "|")
        for saver in names.values():
            cells = []
            for loader in loaded:
                good = [
                    kind for kind in WRITTEN if _equal(kind, loader, loaded[loader][str(Path(scratch, saver, kind))])
                ]
                wrong += len(WRITTEN) - len(good)
                cells.append("equal" if len(good) == len(WRITTEN) else f"only {', '.join(good) or 'none'}")
            print(f"| {saver} |", " | ".join(cells), "|")
    print(f"\n{len(ids)} list of ids for one conversation, in all of them")
    return 1 if wrong or len(ids) != 1 else 0


def _equal(kind: str, loader: str, found: dict[str, Any]) -> bool:
    """Whether this release loads what was written; the first that read several templates from a folder is 4.39."""
    release = tuple(int(part) for part in loader.split(".")[:2])
    expected = WRITTEN[kind].by_name()
    parts = ["gguf"] if kind == "several" and release < (4, 39) else ["gguf", "tokenizer"]
    parts += ["processor"] if kind == "processor" and release >= (4, 43) else []
    return all(found[part] == expected for part in parts)


def _run(python: str, *arguments: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, *arguments], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} {' '.join(arguments)}: {done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
