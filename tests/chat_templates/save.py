"""Save tokenizers and a processor with the installed release, as a training run would.

    python -m tests.chat_templates.save FOLDER   # makes FOLDER/single, FOLDER/several, FOLDER/processor

Runs in the environment of any release: it imports only the hosts.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from tests.chat_templates.layouts import lay_out, template
from tests.chat_templates.load import TextProcessor


def main(target: Path) -> None:
    """Save them."""
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = AutoTokenizer.from_pretrained(lay_out(Path(scratch), {}), local_files_only=True)
        tokenizer.chat_template = template("training")
        tokenizer.save_pretrained(target / "single")
        processor = TextProcessor(tokenizer)
        processor.chat_template = tokenizer.chat_template  # up to 4.41 it is nobody's argument
        processor.save_pretrained(target / "processor")
        tokenizer.chat_template = {"default": template("training"), "tool_use": template("training tools")}
        tokenizer.save_pretrained(target / "several")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
