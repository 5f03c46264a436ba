"""The story across releases: what the Trainer of one saves, without ptfix and with it, every other loads.

python -m tests.chat_templates.across all FOLDER PYTHON...  # all of it: a table; status 1 unless all is right and equal
python -m tests.chat_templates.across save FOLDER           # a Trainer of this release saves there, both ways
python -m tests.chat_templates.across load FOLDER           # print what this release loads of all that lies there

`nox -s chat-templates` makes the environments for it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def save(folder: Path) -> None:
    """The story's script, twice."""
    import transformers

    import ptfix
    from tests.chat_templates import stories

    for runner in ("stock", "ptfix"):
        place = folder / transformers.__version__ / runner
        of = stories.publish(place / "base")
        of.chat_template = stories.TRAINING
        (ptfix.apply if runner == "ptfix" else ptfix.revert)()
        callbacks = ptfix.callbacks() if runner == "ptfix" else []
        stories.trainer(place / "base", place / "out", of, callbacks).train()


def load(folder: Path) -> dict[str, Any]:
    """Per release that saved and runner: does the prompt end with the header, and its token ids."""
    import transformers

    from tests.chat_templates import stories

    found: dict[str, Any] = {}
    for place in sorted(folder.glob("*/*/out/checkpoint-2")):
        saver, runner = place.parts[-4], place.parts[-3]
        try:
            with contextlib.redirect_stdout(sys.stderr):
                # Not AutoTokenizer: releases before 5 do not know the class that 5 writes down.
                tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(place)
        except Exception as error:
            outcome: Any = f"does not load: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
        else:
            if not tokenizer.chat_template:
                found.setdefault(runner, {})[saver] = {"header": None, "ids": []}
                continue
            text = tokenizer.apply_chat_template(stories.CHATS[0][:1], tokenize=False, add_generation_prompt=True)
            outcome = {
                "header": text.endswith(stories.HEADER),
                "ids": tokenizer(text, add_special_tokens=False)["input_ids"],
            }
        found.setdefault(runner, {})[saver] = outcome
    return {transformers.__version__: found}


def table(outputs: list[dict[str, Any]]) -> tuple[str, bool]:
    """Rows save, columns load: stock -> ptfix. Good where ptfix's are all right and all equal."""
    loaders: dict[str, Any] = {}
    for output in outputs:
        loaders |= output
    ids = {
        tuple(outcome["ids"])
        for found in loaders.values()
        for outcome in found["ptfix"].values()
        if isinstance(outcome, dict)
    }
    word = {True: "right", False: "no header", None: "no template"}

    def cell(outcome: Any) -> str:
        return word[outcome["header"]] if isinstance(outcome, dict) else "-"

    lines = [
        f"| saved by | {' | '.join(f'loaded by {loader}' for loader in loaders)} |",
        "|---" * (len(loaders) + 1) + "|",
    ]
    for saver in loaders:
        cells = [f"{cell(found['stock'][saver])} -> {cell(found['ptfix'][saver])}" for found in loaders.values()]
        lines.append(f"| {saver} | {' | '.join(cells)} |")
    reasons = {
        f"{saver} in {loader}: {outcome}"
        for loader, found in loaders.items()
        for saver, outcome in found["ptfix"].items()
        if not isinstance(outcome, dict)
    }
    right = all(
        outcome["header"]
        for found in loaders.values()
        for outcome in found["ptfix"].values()
        if isinstance(outcome, dict)
    )
    note = (
        f"\nToken ids of the prompt, over all cells that load: {len(ids)} kind. (-) the tokenizer itself does not load."
    )
    return "\n".join([*lines, note, *sorted(reasons)]), right and len(ids) == 1


def everything(folder: Path, interpreters: list[str]) -> tuple[str, bool]:
    """Save and load in the environments of all `interpreters`."""

    def run(python: str, task: str) -> str:
        command = [python, "-m", "tests.chat_templates.across", task, str(folder)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    for python in interpreters:
        run(python, "save")
    return table([json.loads(run(python, "load").splitlines()[-1]) for python in interpreters])


def main(arguments: list[str]) -> int:
    task, folder, *interpreters = arguments
    if task == "save":
        save(Path(folder))
        return 0
    if task == "load":
        print(json.dumps(load(Path(folder))))
        return 0
    text, good = everything(Path(folder), interpreters)
    print(text)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
