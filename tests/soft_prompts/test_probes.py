"""Probes and proofs on the real hosts, each case in an interpreter of its own."""

from __future__ import annotations

import subprocess

import pytest
import torch

from ptfix.soft_prompts import generation
from ptfix.soft_prompts.proof import probes
from tests.test_door import python


def run(code: str) -> str:
    result: subprocess.CompletedProcess[str] = python(code)
    assert result.returncode == 0, result.stderr
    return result.stdout


#: A next release that does the same by another name: what the view overrides is passed by.
DRIFT = """
import inspect, textwrap
from transformers.generation import utils

def renamed(old, new):
    found = 0
    for name, function in list(vars(utils.GenerationMixin).items()):
        if inspect.isfunction(function) and old in inspect.getsource(function):
            source = textwrap.dedent(inspect.getsource(function)).replace(old, new)
            scope = dict(vars(utils))
            exec(source, scope)
            setattr(utils.GenerationMixin, name, scope[name])
            found += 1
    return found
"""
INPUTS = """
utils.GenerationMixin._prepare_inputs = utils.GenerationMixin.prepare_inputs_for_generation
drifted = renamed("self.prepare_inputs_for_generation(", "self._prepare_inputs(")
"""
STATIC = """
maker = "_prepare_static_cache" if hasattr(utils.GenerationMixin, "_prepare_static_cache") else "_get_cache"
drifted = renamed(f"self.{maker}(", f"GenerationMixin.{maker}(self, ")
"""


@pytest.mark.parametrize("drift", [INPUTS, STATIC], ids=["inputs", "static cache"])
def test_a_drifted_release_is_not_said_to_be_mended(drift: str) -> None:
    """Either the way that does not mend is said to, or another way is taken and the probe agrees."""
    code = """
import os
if not drifted:
    print("this release has no such name")
    raise SystemExit
os.environ["PTFIX_DISABLE"] = "first-use-check"  # which wraps generate() too
import ptfix
from ptfix.soft_prompts.proof import probes
import peft
stock = peft.PeftModelForCausalLM.generate
row = next(row for row in ptfix.apply().rows if row.fix == "soft-prompt-generate")
if row.status.value == "applied":
    assert "with the fix on, " in row.reason, row
else:
    assert row.status.value == "unsupported" and row.reason.startswith("with the fix on, "), row
    assert peft.PeftModelForCausalLM.generate is stock
    try:
        ptfix.revert()
        ptfix.apply(strict=True)
    except ptfix.PatchError as error:
        assert "with the fix on, " in str(error)
    else:
        raise AssertionError("strict did not raise")
print("done")
"""
    said = run(DRIFT + drift + code).splitlines()[-1]
    if said != "done":
        pytest.skip(said)


def test_no_name_that_the_view_overrides_is_gone() -> None:
    assert generation.drift() is None


def test_a_method_that_is_gone_or_takes_other_arguments_is_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    for overridden in generation._OVERRIDDEN:
        for name in overridden.names:
            if hasattr(LlamaForCausalLM, name) and overridden.parameters:
                with monkeypatch.context() as patch:
                    patch.setattr(LlamaForCausalLM, name, lambda self, renamed: None, raising=False)
                    assert f"{name} of generate() no longer takes" in str(generation.drift())
    code = """
from transformers import LlamaForCausalLM
from ptfix.soft_prompts import generation
from transformers import GenerationConfig
served = vars(GenerationConfig())
for overridden in generation._OVERRIDDEN:
    removed = {}
    for name in overridden.names:
        for owner in LlamaForCausalLM.__mro__:
            if name in vars(owner):
                removed[owner, name] = vars(owner)[name]
                delattr(owner, name)
    said = generation.drift()
    assert bool(said) is bool(removed and overridden.serves in served), (overridden, said)
    for (owner, name), function in removed.items():
        setattr(owner, name, function)
assert generation.drift() is None
print("done")
"""
    assert run(code).splitlines()[-1] == "done"


def test_every_override_of_the_host_stands_in_the_table() -> None:
    from transformers import LlamaForCausalLM

    view = {**vars(generation.View), **vars(generation._SoftPromptView)}
    own = {name for name, value in view.items() if callable(value)}
    named = {name for overridden in generation._OVERRIDDEN for name in overridden.names}
    assert named <= own
    assert {name for name in own if hasattr(LlamaForCausalLM, name) and not name.startswith("__")} <= named


#: what a script may be in when it calls apply(): (entered, left)
CONTEXTS = {
    "plain": ("", ""),
    "meta device": ("stack.enter_context(torch.device('meta'))", ""),
    "inference mode": ("stack.enter_context(torch.inference_mode())", ""),
    "no grad": ("stack.enter_context(torch.no_grad())", ""),
    "autocast": ("stack.enter_context(torch.autocast('cpu', dtype=torch.bfloat16))", ""),
    "grad off": ("torch.set_grad_enabled(False)", "torch.set_grad_enabled(True)"),
    "bfloat16": ("torch.set_default_dtype(torch.bfloat16)", "torch.set_default_dtype(torch.float32)"),
    "float64": ("torch.set_default_dtype(torch.float64)", "torch.set_default_dtype(torch.float32)"),
    "default device meta": ("torch.set_default_device('meta')", "torch.set_default_device('cpu')"),
    "deterministic": ("torch.use_deterministic_algorithms(True)", "torch.use_deterministic_algorithms(False)"),
    "anomaly": ("torch.autograd.set_detect_anomaly(True)", "torch.autograd.set_detect_anomaly(False)"),
    "warnings are errors": ("stack.enter_context(warnings.catch_warnings()); warnings.simplefilter('error')", ""),
}


def test_the_callers_context_changes_no_row_and_is_unchanged() -> None:
    code = f"""
import contextlib, warnings
import torch, transformers, peft, ptfix
from ptfix.soft_prompts.proof import probes
from transformers import LlamaForCausalLM, Trainer

def state():
    return (torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), list(warnings.filters),
            torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled())

rows = {{}}
for name, (entered, left) in {CONTEXTS!r}.items():
    with contextlib.ExitStack() as stack:
        exec(entered)
        for kept in (probes._prompt_tuned, *(each for each in vars(probes).values() if hasattr(each, "cache_clear"))):
            kept.cache_clear()  # each context makes its own models
        before = state()
        rows[name] = [(row.fix, row.status.value, row.reason) for row in ptfix.apply().rows]
        assert state() == before, (name, before, state())
        ptfix.revert()
        exec(left)
assert ("soft-prompt-generate", "applied") in [row[:2] for row in rows["plain"]], rows["plain"]
assert "unsupported" not in str(rows["plain"]), rows["plain"]
assert {{name: row for name, row in rows.items() if row != rows["plain"]}} == {{}}
print("done")
"""
    assert run(code).splitlines()[-1] == "done"


def test_nothing_is_drawn_said_or_warned_in_any_thread() -> None:
    code = """
import logging, random, sys, threading, warnings
import numpy, torch, transformers, peft, ptfix
from transformers.utils import logging as host_logging

said = []
class Handler(logging.Handler):
    def emit(self, record):
        said.append((record.name, record.getMessage()))
for name in (None, "transformers", "peft"):
    logging.getLogger(name).addHandler(Handler())
warnings.simplefilter("always")
warnings.showwarning = lambda message, *rest: said.append(str(message))
levels = {name: logging.getLogger(name).level for name in ("transformers", "peft")}

def state():
    return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())

before = state()
ptfix.apply(strict=True)
ptfix.revert()
assert state() == before
assert said == [], said

def other():
    while not stop.is_set():
        ptfix.apply()
        ptfix.revert()
        turns.append(1)

def draw():
    torch.manual_seed(0)
    drawn = []
    for count in range(3000):
        drawn.append(torch.rand(1))
        if count % 500 == 0:
            seen.append([logging.getLogger(name).level for name in levels])
            with warnings.catch_warnings():
                warnings.warn(f"{count}")
            logging.getLogger("transformers.mine").warning(f"{count}")
    return torch.cat(drawn)

seen, turns, stop = [], [], threading.Event()
alone, said[:] = draw(), []
thread = threading.Thread(target=other)
thread.start()
together = [draw()]
while len(turns) < 3:
    together.append(draw())
stop.set()
thread.join()
assert all(torch.equal(alone, drawn) for drawn in together)
assert all(level == list(levels.values()) for level in seen), seen
heard = [text for text in said if isinstance(text, str)]
assert heard == [str(count) for count in range(0, 3000, 500)] * len(together), heard
logged = [text for text in said if text[0] == "transformers.mine"]
assert len(logged) >= 6 * len(together), logged
assert len(said) == len(heard) + len(logged), said
print("done")
"""
    assert run(code).splitlines()[-1] == "done"


def test_a_probe_is_healthy_after_it_was_broken_and_the_model_was_kept() -> None:
    import ptfix

    ptfix.revert()
    assert probes.generation_fault() is not None
    model = probes._prompt_tuned()
    ptfix.apply()
    try:
        assert probes.generation_fault() is None
        assert probes._prompt_tuned() is model
    finally:
        ptfix.revert()
    assert probes.generation_fault() is not None
    assert all(parameter.dtype is torch.float32 for parameter in model.parameters())
