"""The door, with the real hosts, each case in an interpreter of its own: what was imported when must not matter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import ptfix

ROOT = Path(__file__).parents[1]

#: Two edits of the kinds that go wrong: a method of its own, and one that is inherited.
PRELUDE = """
import logging, sys
import ptfix, ptfix.fixes
from ptfix.patching import Edit, Fix

def wrap(original):
    return lambda *args, **kwargs: "patched"

def edit(name):
    return Edit("peft.peft_model:PeftModelForCausalLM." + name, wrap)

def fix(id, *names, probe=lambda: "broken"):
    return Fix(id, "why", "link", {}, probe, tuple(map(edit, names)), "never", proof=lambda: None)

ptfix.fixes.ALL = (fix("first", "generate", "get_prompt"), fix("second", "generate"))
words = lambda report: [row.status.value for row in report.rows]
"""

CHECKS = """
from peft import PeftModelForCausalLM as Model

assert words(ptfix.status()) == ["applied", "applied"], ptfix.status()
assert Model.generate(None) == Model.get_prompt(None) == "patched"
installed = dict(vars(Model))
assert ptfix.apply() == ptfix.status()
assert dict(vars(Model)) == installed

ptfix.revert()
stock = dict(vars(Model))
assert "get_prompt" not in stock and stock["generate"].__module__ == "peft.peft_model"
assert not hasattr(stock["generate"], "__wrapped__")
assert not before or all(stock[name] is before[name] for name in before | stock)
assert words(ptfix.status()) == ["disabled", "disabled"]
assert all(vars(Model)[name] is stock[name] for name in stock)

for _ in range(3):
    ptfix.apply(); ptfix.apply()
    assert Model.generate(None) == "patched"
    ptfix.revert(); ptfix.revert()
    assert all(vars(Model)[name] is stock[name] for name in stock | dict(vars(Model)))
print("done")
"""


def python(code: str, first: str = "") -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter, with the folder `first` in front of everything else on its path."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PTFIX_")}
    path = os.pathsep.join(filter(None, (first, str(ROOT), inherited.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "order",
    [
        "before = {}; ptfix.apply()",
        "import transformers; before = {}; ptfix.status(); ptfix.revert(); ptfix.apply(strict=True); ptfix.apply()",
        "import peft; before = dict(vars(peft.PeftModelForCausalLM)); ptfix.revert(); ptfix.apply()",
    ],
)
def test_any_order_of_imports_and_calls(order: str) -> None:
    result = python(PRELUDE + order + CHECKS)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr


def test_the_real_fixes_give_every_attribute_back() -> None:
    code = """
import peft, ptfix, ptfix.fixes
from ptfix.patching import _find, _resolve
places = {place for fix in ptfix.fixes.ALL for edit in fix.edits if (place := _resolve(edit))}
stock = {place: (_find(*place), place[1] in vars(place[0])) for place in places}
ptfix.apply()
ptfix.revert()
for place, (raw, own) in stock.items():
    assert _find(*place) is raw and (place[1] in vars(place[0])) is own, place
print("done")
"""
    result = python(code)
    assert (result.returncode, result.stdout.splitlines()[-1:]) == (0, ["done"]), result.stderr


def test_import_ptfix_imports_no_host_and_takes_no_time() -> None:
    code = """
import sys, time
start = time.process_time()
import ptfix
took = time.process_time() - start
heavy = {"torch", "transformers", "peft", "yaml", "packaging", "importlib.metadata"} & set(sys.modules)
assert not heavy, heavy
dir(ptfix), ptfix.Report, ptfix.PatchError
assert not {"torch", "transformers", "peft"} & set(sys.modules)
print(took)
"""
    results = [python(code) for _ in range(5)]
    assert all(result.returncode == 0 for result in results), results[0].stderr
    assert min(float(result.stdout) for result in results) < 0.050, "seconds of processor time"


def test_callbacks_is_a_function_whatever_was_imported() -> None:
    code = """
import ptfix
assert isinstance(ptfix.callbacks(), list)
import ptfix.callbacks
from ptfix.callbacks import default
assert isinstance(ptfix.callbacks(), list)
"""
    result = python(code)
    assert result.returncode == 0, result.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'ptfix' has no attribute 'appply'"):
        ptfix.appply  # noqa: B018


@pytest.mark.parametrize(
    ("argument", "variable", "strict"),
    [
        (None, None, False),
        (None, "1", True),
        (None, "0", False),
        (None, "", False),
        (True, "0", True),
        (False, "1", False),
    ],
)
def test_strict_is_the_argument_or_else_the_environment(
    monkeypatch: pytest.MonkeyPatch, argument: bool | None, variable: str | None, strict: bool
) -> None:
    monkeypatch.delenv("PTFIX_STRICT", raising=False)
    if variable is not None:
        monkeypatch.setenv("PTFIX_STRICT", variable)
    asked: list[bool] = []
    monkeypatch.setattr(ptfix, "_patcher", lambda: SimpleNamespace(apply=asked.append))
    ptfix.apply(argument)
    assert asked == [strict]


def test_a_host_that_does_not_import_is_reported_not_raised(tmp_path: Path) -> None:
    """As peft 0.17 on transformers 5: its metadata is there, its import fails."""
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("raise ImportError(\"cannot import name 'HybridCache'\")")
    code = """
report = ptfix.apply()
assert words(report) == ["unsupported", "unsupported"], report
try:
    ptfix.apply(strict=True)
except ptfix.PatchError as error:
    print(error)
"""
    result = python(PRELUDE + code, first=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "first,second needed but not applied: peft" in result.stdout
    assert result.stderr.count("cannot import name 'HybridCache'") == 1, (
        "one warning for one cause, without a logger too"
    )
    assert "nstall" in result.stderr, "the warning says what to install"
