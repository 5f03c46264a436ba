"""Give a template the generation prompt that it lacks, and prove that nothing else changed."""

from __future__ import annotations

from collections.abc import Mapping

from ptfix.chat_templates.probes import Observed, observe


def append_generation_prompt(template: str, header: str, *, after_tools: bool) -> str:
    """The template with a block that writes `header` where a generation prompt is asked for; the rest as it is.

    Args:
        after_tools: also where the last message is the result of a tool.
    """
    condition = "add_generation_prompt" if after_tools else "add_generation_prompt and messages[-1]['role'] != 'tool'"
    # Jinja drops one newline at the end of a template, and only there.
    text = template.removesuffix("\n").removesuffix("\r")
    return f"{text}{{% if {condition} %}}{{{{ {_literal(header)} }}}}{{% endif %}}"


def _literal(text: str) -> str:
    escapes = {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "'" + "".join(escapes.get(letter, letter) for letter in text) + "'"


def changed(before: Observed, template: str, special_tokens: Mapping[str, str], header: str = "") -> str | None:
    """The first probe render where `template` is not as `before`, plus `header` at a generation prompt; else None."""
    after = observe(template, special_tokens).renders
    for name, old in before.renders.items():
        if isinstance(old, str) and "marked" not in name:
            wanted = {old, old + header} if name.endswith("tool result prompted") else {old + header}
            if after[name] not in (wanted if name.endswith("prompted") else {old}):
                return name
    return None
