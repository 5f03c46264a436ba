"""save_pretrained of a registered tokenizer or processor writes its inference template. All others save as ever."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ptfix.patching import Edit, Fix


def _wrap_save(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        from ptfix.chat_templates import saving  # not before: apply() is quick

        return saving.save(original, self, save_directory, *args, **kwargs)

    return save_pretrained


def _wrap_upload(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _upload_modified_files(self: Any, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        from ptfix.chat_templates import saving

        return saving.upload(original, self, working_dir, *args, **kwargs)

    return _upload_modified_files


def _probe() -> str | None:
    # No host keeps a training template and an inference template apart: there is one attribute.
    return "save_pretrained writes the template in memory, be it meant for training or for inference"


class _AskedForTemplates(BaseException):
    """Not an Exception: a save turns those of ours into warnings."""


class _Mark:
    """Stands where `register` notes the templates of an object, and tells when they are read."""

    def keys(self) -> Any:
        raise _AskedForTemplates


def _proof() -> str | None:
    """Does every kind of registered object ask for its templates when it is saved? Nothing is written to find out."""
    from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast, ProcessorMixin

    from ptfix.chat_templates import saving

    for kind in (PreTrainedTokenizer, PreTrainedTokenizerFast, ProcessorMixin):
        registered = kind.__new__(kind)
        vars(registered)[saving._MARK] = _Mark()
        try:
            kind.save_pretrained(registered, "")
        except _AskedForTemplates:
            continue
        except Exception as error:
            return f"a {kind.__name__} is saved without being asked for its templates ({type(error).__name__})"
        return f"a {kind.__name__} is saved without being asked for its templates"
    return None


FIX = Fix(
    id="chat-template-saving",
    why="a training chat template ends up in the checkpoint, and inference lacks the assistant header",
    link="https://github.com/OpenBMB/MiniCPM-V/issues/220",
    affects={},
    probe=_probe,
    edits=(
        Edit(
            "transformers.tokenization_utils_base:PreTrainedTokenizerBase.save_pretrained",
            _wrap_save,
            ("self", "save_directory"),
        ),
        Edit("transformers.processing_utils:ProcessorMixin.save_pretrained", _wrap_save, ("self", "save_directory")),
        # save_pretrained(push_to_hub=True) uploads before it returns
        Edit(
            "transformers.utils.hub:PushToHubMixin._upload_modified_files",
            _wrap_upload,
            ("self", "working_dir"),
            optional=True,
        ),
    ),
    retire_when="a host saves an inference template of its own beside the one that is trained with",
    proof=_proof,
)
