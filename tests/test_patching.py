"""The engine, on hosts made for the purpose: small modules, no torch."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import sys
import textwrap
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from ptfix import hosts, patching
from ptfix.patching import Edit, Fallback, Fix, Patcher, PatchError
from ptfix.report import Report, Status

SOURCE = """
    def function(x, *, scale=1):
        "Host docstring."
        return x * scale

    class Base:
        def method(self, x): return ("base", x)

    class Child(Base):
        size = 3
        def own(self, x): return ("own", x)
        @classmethod
        def make(cls, x): return (cls.__name__, x)
        @staticmethod
        def plain(x): return ("plain", x)
        @property
        def shape(self): return "shape"
        async def later(self): return "later"
        def each(self): yield 1
        async def stream(self): yield 1
"""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = ModuleType("fakehost")
    exec(textwrap.dedent(SOURCE), module.__dict__)
    monkeypatch.setitem(sys.modules, "fakehost", module)
    for name in ("PTFIX_DISABLE", "PTFIX_STRICT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(patching, "_strict", False)
    return module


def tagged(tag: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrap that shows in the result who was called, outermost first."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (tag, original(*args, **kwargs))

    return wrap


def fix(
    *targets: str | Edit,
    id: str = "one",
    affects: dict[str, str] | None = None,
    probe: Callable[[], str | None] = lambda: "broken",
    proof: Callable[[], str | None] | None = lambda: None,
    drift: Callable[[], str | None] | None = None,
    fallbacks: tuple[Fallback, ...] = (),
) -> Fix:
    edits = tuple(
        target if isinstance(target, Edit) else Edit(f"fakehost:{target}", tagged(f"<{id}>")) for target in targets
    )
    return Fix(id, "why", "https://example.invalid/1", affects or {}, probe, edits, "never", proof, drift, fallbacks)


def statuses(report: Report) -> list[Status]:
    return [row.status for row in report.rows]


def test_every_kind_of_function_is_switched_and_given_back(host: Any) -> None:
    before = {**vars(host)}, {**vars(host.Child)}, {**vars(host.Base)}
    patcher = Patcher((fix("function", "Child.own", "Child.method", "Child.make", "Child.plain", "Child.shape"),))
    assert statuses(patcher.apply()) == [Status.APPLIED]

    child = host.Child()
    assert host.function(2, scale=3) == ("<one>", 6)
    assert child.own(1) == ("<one>", ("own", 1))
    assert child.method(1) == ("<one>", ("base", 1))
    assert host.Base().method(1) == ("base", 1), "an inherited method is edited on the subclass alone"
    assert host.Child.make(1) == child.make(1) == ("<one>", ("Child", 1))
    assert host.Child.plain(1) == child.plain(1) == ("<one>", ("plain", 1))
    assert child.shape == ("<one>", "shape")

    patcher.revert()
    assert (dict(vars(host)), dict(vars(host.Child)), dict(vars(host.Base))) == before
    assert all(vars(host.Child)[name] is value for name, value in before[1].items())
    assert "method" not in vars(host.Child), "what was inherited is inherited again"


def test_signature_name_and_docstring_stay_the_originals(host: Any) -> None:
    original = host.function
    Patcher((fix("function"),)).apply()
    assert host.function is not original
    assert inspect.signature(host.function) == inspect.signature(original)
    assert (host.function.__name__, host.function.__doc__) == ("function", "Host docstring.")


def test_bound_methods_kept_from_before_revert_obey_the_switch(host: Any) -> None:
    patcher = Patcher((fix("Child.own"),))
    patcher.apply()
    kept = host.Child().own  # as PEFT keeps base_model.prepare_inputs_for_generation
    assert kept(1) == ("<one>", ("own", 1))
    patcher.revert()
    assert kept(1) == ("own", 1)


def test_apply_twice_is_apply_once_and_revert_undoes_it(host: Any) -> None:
    patcher = Patcher((fix("function"),))
    first = patcher.apply()
    installed = host.function
    assert patcher.apply() == first == patcher.status()
    assert host.function is installed
    patcher.revert()
    patcher.revert()
    assert host.function(2) == 2
    assert statuses(patcher.apply()) == [Status.APPLIED]
    assert host.function(2) == ("<one>", 2)


def test_fixes_of_one_target_stack_in_order_and_unstack(host: Any) -> None:
    original = host.function
    patcher = Patcher((fix("function", id="inner"), fix("function", id="outer")))
    patcher.apply()
    assert host.function(2) == ("<outer>", ("<inner>", 2))
    patcher.revert()
    assert host.function is original


def test_a_foreign_wrapper_on_top_stays_and_ours_lets_pass(host: Any) -> None:
    patcher = Patcher((fix("function"),))
    patcher.apply()
    ours = host.function
    host.function = theirs = lambda x: ("theirs", ours(x))
    assert host.function(2) == ("theirs", ("<one>", 2))
    patcher.revert()
    assert host.function is theirs
    assert host.function(2) == ("theirs", 2)


def test_below_a_foreign_wrapper_every_other_edit_is_given_back(host: Any) -> None:
    before = vars(host.Child)["own"]
    patcher = Patcher((fix("Child.own", "function"),))
    patcher.apply()
    host.function = lambda x: x
    patcher.revert()
    assert vars(host.Child)["own"] is before


def test_what_a_lazy_module_makes_when_asked_is_edited(host: Any) -> None:
    made = host.function
    del host.function

    def lazy(name: str) -> Any:
        if name != "function":
            raise AttributeError(name)
        vars(host)[name] = made
        return made

    host.__getattr__ = lazy
    patcher = Patcher((fix("function"),))
    assert statuses(patcher.apply()) == [Status.APPLIED]
    assert host.function(1) == ("<one>", 1)
    patcher.revert()
    assert host.function is made


def test_a_foreign_wrapper_in_between_survives(host: Any) -> None:
    inner, outer = Patcher((fix("function", id="inner"),)), Patcher((fix("function", id="outer"),))
    inner.apply()
    ours = host.function
    host.function = theirs = lambda x: ("theirs", ours(x))
    outer.apply()
    assert host.function(2) == ("<outer>", ("theirs", ("<inner>", 2)))
    inner.revert()
    assert host.function(2) == ("<outer>", ("theirs", 2))
    outer.revert()
    assert host.function is theirs


def test_status_sets_nothing(host: Any) -> None:
    before = dict(vars(host))
    patcher = Patcher((fix("function"), fix("Child.own", id="two", probe=lambda: None)))
    report = patcher.status()
    assert dict(vars(host)) == before
    assert report.hosts == hosts.versions()
    assert [row.fix for row in report.rows] == ["one", "two"]
    assert statuses(report) == [Status.DISABLED, Status.NOT_NEEDED]
    assert "ptfix.apply()" in report.rows[0].reason
    patcher.apply()
    assert statuses(patcher.status()) == [Status.APPLIED, Status.NOT_NEEDED]
    patcher.revert()
    assert patcher.status() == report


def test_a_trial_says_what_apply_would_come_to_and_leaves_nothing(
    host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PTFIX_DISABLE", "off")
    monkeypatch.setattr(hosts, "problem", lambda name: "peft does not import" if name == "peft" else None)
    before = dict(vars(host)), dict(vars(host.Child))
    patcher = Patcher(
        (
            fix("function"),
            fix("Child.own", id="fails", proof=lambda: "still broken"),
            fix("Child.own", id="off"),
            fix("Child.own", id="alone", affects={"peft": ""}),
        )
    )
    found = patcher.trial()
    assert [(row.fix, row.status, row.waiting) for row in found.rows] == [
        ("one", Status.DISABLED, True),
        ("fails", Status.UNSUPPORTED, False),
        ("off", Status.DISABLED, False),
        ("alone", Status.UNSUPPORTED, False),
    ]
    assert [row.reason for row in found.rows] == [
        "needed, call ptfix.apply(): broken",
        "with the fix on, still broken",
        "named in PTFIX_DISABLE",
        "peft does not import",
    ]
    assert (dict(vars(host)), dict(vars(host.Child))) == before
    assert not caplog.records
    assert patcher.status().rows[1].waiting, "nothing is settled by a trial"


@pytest.mark.parametrize(("setting", "strict"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", True)])
def test_strict_by_the_environment(
    host: Any, monkeypatch: pytest.MonkeyPatch, setting: str | None, strict: bool
) -> None:
    if setting is not None:
        monkeypatch.setenv("PTFIX_STRICT", setting)
    assert patching.strict_by_environment() is strict
    assert patching.is_strict() is strict


def test_strict_is_kept_until_revert(host: Any) -> None:
    patcher = Patcher((fix("function"),))
    patcher.apply()
    assert patching.is_strict() is False
    patcher.apply(strict=True)
    patcher.apply()
    assert patching.is_strict() is True
    patcher.revert()
    assert patching.is_strict() is False


def test_healthy_means_untouched(host: Any) -> None:
    before = dict(vars(host))
    report = Patcher((fix("function", probe=lambda: None),)).apply()
    assert (report.rows[0].status, report.rows[0].reason) == (Status.NOT_NEEDED, "probed and found healthy")
    assert dict(vars(host)) == before


def test_a_call_error_is_the_callers_to_see(host: Any) -> None:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def raising(*args: Any) -> Any:
            raise ZeroDivisionError

        return raising

    Patcher((fix(Edit("fakehost:function", wrap)),)).apply()
    with pytest.raises(ZeroDivisionError):
        host.function(1)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("gone", "fakehost:gone does not exist in this host"),
        ("Child.gone", "fakehost:Child.gone does not exist in this host"),
        ("Gone.method", "fakehost:Gone.method does not exist in this host"),
        ("Child.gone", "<class 'fakehost.Child'> has no attribute 'gone'"),
        (
            "Child.size",
            "fakehost:Child.size is a int; only functions, methods, classmethods, staticmethods and getters",
        ),
        ("Child", "fakehost:Child is a type"),
        ("Child.later", "fakehost:Child.later is a coroutine or generator function"),
        ("Child.each", "fakehost:Child.each is a coroutine or generator function"),
        ("Child.stream", "fakehost:Child.stream is a coroutine or generator function"),
        (Edit("fakehost:function", tagged(""), parameters=("x", "mask", "scale", "ids")), "no longer takes mask, ids"),
        (Edit("fakehost.absent:f", tagged("")), "fakehost.absent:f does not exist"),
    ],
)
def test_drift_is_unsupported_and_leaves_every_edit_of_the_fix_undone(
    host: Any, target: str | Edit, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(vars(host)), dict(vars(host.Child))
    report = Patcher((fix("function", target), fix("Child.own", id="two"))).apply()
    assert statuses(report) == [Status.UNSUPPORTED, Status.APPLIED], "one drifted fix does not stop the next"
    assert reason in report.rows[0].reason
    assert dict(vars(host)) == before[0]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "PTFIX_DISABLE=one" in warning.getMessage(), "the warning says what to do"


def test_a_property_is_not_evaluated_to_find_it(host: Any) -> None:
    host.Child.trap = property(lambda self: pytest.fail("the engine called a property"))
    assert statuses(Patcher((fix("Child.trap"),)).apply()) == [Status.APPLIED]


def test_an_optional_edit_is_skipped_only_where_its_target_is_absent(host: Any) -> None:
    def optional(target: str, *parameters: str) -> Edit:
        return Edit(f"fakehost:{target}", tagged("<x>"), parameters, optional=True)

    assert statuses(Patcher((fix("function", optional("Child.gone")),)).apply()) == [Status.APPLIED]
    assert host.function(1) == ("<one>", 1)
    drifted = Patcher((fix(optional("Child.own", "mask"), id="drifted"), fix(optional("gone"), id="empty"))).apply()
    assert statuses(drifted) == [Status.UNSUPPORTED, Status.UNSUPPORTED]
    assert drifted.rows[1].reason == "none of its targets exists in this host"


def test_failing_midway_rolls_the_whole_fix_back(host: Any) -> None:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        raise RuntimeError("midway")

    before = dict(vars(host)), dict(vars(host.Child))
    patcher = Patcher((fix("function", "Child.method", Edit("fakehost:Child.own", wrap)),))
    report = patcher.apply()
    assert statuses(report) == [Status.UNSUPPORTED]
    assert "midway" in report.rows[0].reason
    assert (dict(vars(host)), dict(vars(host.Child))) == before


def test_an_interrupt_midway_rolls_back_and_goes_on(host: Any) -> None:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        raise KeyboardInterrupt

    before = dict(vars(host))
    patcher = Patcher((fix("function", Edit("fakehost:Child.own", wrap)),))
    with pytest.raises(KeyboardInterrupt):
        patcher.apply()
    assert dict(vars(host)) == before
    assert statuses(patcher.status()) == [Status.DISABLED]


def test_a_probe_that_raises_is_unsupported(host: Any) -> None:
    def probe() -> str | None:
        raise AttributeError("host moved")

    report = Patcher((fix("function", probe=probe),)).apply()
    assert statuses(report) == [Status.UNSUPPORTED]
    assert "AttributeError: host moved" in report.rows[0].reason
    assert host.function(1) == 1


def test_strict_raises_and_leaves_nothing_behind(host: Any) -> None:
    before = dict(vars(host))
    patcher = Patcher((fix("function"), fix("gone", id="two")))
    with pytest.raises(PatchError, match="two needed but not applied: fakehost:gone does not exist"):
        patcher.apply(strict=True)
    assert dict(vars(host)) == before
    assert statuses(patcher.status()) == [Status.DISABLED, Status.UNSUPPORTED]
    assert statuses(patcher.apply()) == [Status.APPLIED, Status.UNSUPPORTED]
    with pytest.raises(PatchError):
        patcher.apply(strict=True)
    several = Patcher((fix("gone", id="two"), fix("lost", id="three")))
    with pytest.raises(PatchError, match=r"^two needed but not applied: .*\nthree needed but not applied: ") as raised:
        several.apply(strict=True)
    assert len(str(raised.value).splitlines()) == 2, "a line for each cause"
    assert host.function(1) == ("<one>", 1), "strict undoes what its own call had set, not what an earlier one had"


def test_disabled(host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PTFIX_DISABLE", " one , unheard-of,")
    patcher = Patcher((fix("function", probe=lambda: pytest.fail("a disabled fix was probed")),))
    (row,) = patcher.apply(strict=True).rows
    assert (row.status, row.reason) == (Status.DISABLED, "named in PTFIX_DISABLE")
    assert host.function(1) == 1
    assert [record.getMessage() for record in caplog.records] == [
        "PTFIX_DISABLE names unheard-of, which is no fix of this release; `ptfix doctor` lists them."
    ]
    patcher.revert()
    monkeypatch.setenv("PTFIX_DISABLE", "two,one")
    patcher = Patcher((fix("function"),))
    patcher.apply()
    monkeypatch.delenv("PTFIX_DISABLE")
    assert statuses(patcher.apply()) == [Status.APPLIED], "enabled again, the next apply() picks it up"


def test_one_info_line_per_effect_and_none_for_repeats(host: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ptfix")
    patcher = Patcher((fix("function"), fix("Child.own", id="healthy", probe=lambda: None), fix("gone", id="bad")))
    for _ in range(3):
        patcher.apply()
    assert [(record.name, record.levelname) for record in caplog.records] == [("ptfix", "INFO"), ("ptfix", "WARNING")]
    assert caplog.records[0].getMessage() == "one applied: broken"


def test_the_window_is_asked_before_the_probe(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "problem", lambda name: None)
    monkeypatch.setattr(hosts, "in_window", lambda affects: not affects)
    never = fix(
        "function",
        affects={"peft": "<0.1", "transformers": "<4"},
        probe=lambda: pytest.fail("probed outside its window"),
    )
    report = Patcher((never,)).apply()
    assert statuses(report) == [Status.NOT_NEEDED]
    assert "outside the affected versions (peft <0.1, transformers <4)" in report.rows[0].reason


def test_a_host_that_cannot_be_used_is_told_once_with_the_remedy(
    host: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = "peft 0.16.0 does not import: ImportError: no HybridCache"
    asked: list[str] = []
    monkeypatch.setattr(hosts, "problem", lambda name: asked.append(name) or (broken if name == "peft" else None))
    fixes = (
        fix("function", id="one", affects={"peft": ">=0.6"}),
        fix(Edit("peft.peft_model:PeftModel.forward", tagged("")), id="two", affects={"transformers": ">=4.36"}),
        fix("Child.own", id="three", affects={"transformers": ">=4.36"}),
    )
    monkeypatch.setattr(hosts, "in_window", lambda affects: True)
    patcher = Patcher(fixes, remedy=lambda: "Install a better pair.")
    assert statuses(patcher.status()) == [Status.UNSUPPORTED, Status.UNSUPPORTED, Status.DISABLED]
    asked.clear()
    assert statuses(patcher.apply()) == [Status.UNSUPPORTED, Status.UNSUPPORTED, Status.APPLIED]
    assert asked == ["transformers", "peft"], "each host is tried once, whatever the number of fixes"
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        f"one,two needed but not applied: {broken}. Install a better pair."
    ]
    with pytest.raises(PatchError, match="Install a better pair"):
        patcher.apply(strict=True)


def test_an_absent_host_needs_no_fix(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "installed", lambda name: None)
    report = Patcher((fix("function", affects={"peft": "<9"}),)).apply(strict=True)
    assert (report.rows[0].status, report.rows[0].reason) == (Status.NOT_NEEDED, "transformers is not installed")


@pytest.mark.parametrize("call", ["apply", "status", "trial", "revert"])
def test_a_call_waits_for_the_apply_of_another_thread(host: Any, call: str) -> None:
    others: list[threading.Thread] = []
    waits: list[bool] = []
    probed: list[int] = []
    reports: list[Report | None] = []

    def probe() -> str | None:
        if not others:
            others.append(threading.Thread(target=lambda: reports.append(getattr(patcher, call)())))
            others[0].start()
            others[0].join(0.2)
            waits.append(others[0].is_alive())
        probed.append(threading.get_ident())
        return "broken"

    patcher = Patcher((fix("function", "Child.own", probe=probe),))
    report = patcher.apply()
    others[0].join()
    assert waits == [True]
    assert probed == [threading.get_ident()], "what one thread has settled, the next does not ask again"
    assert reports == [None if call == "revert" else report]
    assert host.function(1) == (1 if call == "revert" else ("<one>", 1))


def test_nobody_meets_half_a_fix(host: Any) -> None:
    """While a fix makes its edits, and after a proof that it fails, every call runs the stock host."""
    met: list[Any] = []

    def call() -> str | None:
        met.append((host.function(1), host.Child().own(1)))
        return None

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        call()
        return tagged("<one>")(original)

    def proof() -> str | None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        return "still broken"

    edits = Edit("fakehost:function", wrap), Edit("fakehost:Child.own", wrap)
    kept = Patcher((fix(*edits, proof=proof),))
    assert statuses(kept.apply()) == [Status.UNSUPPORTED]
    call()
    assert met == [(1, ("own", 1))] * 4


def test_a_probe_may_ask_for_the_status(host: Any) -> None:
    """A probe builds models, and what it meets on the way may call the door: that must not hang."""
    asked: list[Report] = []

    def probe() -> str | None:
        if not asked:
            asked.append(Report({}, ()))
            asked.append(patcher.status())
        return "broken"

    patcher = Patcher((fix("function", probe=probe),))
    assert statuses(patcher.apply()) == [Status.APPLIED]
    assert statuses(asked[1]) == [Status.DISABLED]


def test_every_probe_meets_the_stock_host(host: Any) -> None:
    def probe() -> str | None:
        return "broken" if host.function(1) == 1 else None

    patcher = Patcher((fix("function"), fix("Child.own", id="two", probe=probe)))
    planned = patcher.status()
    assert statuses(planned) == [Status.DISABLED, Status.DISABLED]
    assert statuses(patcher.apply()) == [Status.APPLIED, Status.APPLIED]


@pytest.mark.parametrize(
    ("affects", "target", "needed"),
    [
        ({}, "fakehost:f", ()),
        ({"transformers": ">=5"}, "transformers.cache_utils:f", ("transformers",)),
        ({}, "transformers:f", ("transformers",)),
        ({}, "peft.peft_model:f", ("transformers", "peft")),
        ({"peft": ">=0.6"}, "transformers:f", ("transformers", "peft")),
    ],
)
def test_the_hosts_of_a_fix(affects: dict[str, str], target: str, needed: tuple[str, ...]) -> None:
    assert fix(Edit(target, tagged("")), affects=affects).hosts == needed


def answering(x: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A wrap whose function answers `x`, whatever the host would."""
    return lambda original: lambda *args, **kwargs: x


def test_a_fix_that_does_not_mend_is_unwound_and_told(host: Any, caplog: pytest.LogCaptureFixture) -> None:
    def probe() -> str | None:
        return None if host.function(2) == 5 else f"2 becomes {host.function(2)}"

    before = dict(vars(host)), dict(vars(host.Child))
    mends = fix(
        Edit("fakehost:Child.own", answering(5)), id="mends", probe=lambda: None if host.Child().own(1) == 5 else "x"
    )
    bad = fix(Edit("fakehost:function", answering(4)), "Child.method", id="bad", probe=probe, proof=None)
    patcher = Patcher((dataclasses.replace(mends, proof=None), bad))
    report = patcher.apply()
    assert statuses(report) == [Status.APPLIED, Status.UNSUPPORTED]
    assert report.rows[1].reason == "with the fix on, 2 becomes 4"
    assert dict(vars(host)) == before[0]
    assert "method" not in vars(host.Child)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "bad needed but not applied: with the fix on, 2 becomes 4" in warning
    patcher.revert()
    with pytest.raises(PatchError, match="with the fix on, 2 becomes 4"):
        patcher.apply(strict=True)
    assert (dict(vars(host)), dict(vars(host.Child))) == before


def test_a_proof_that_raises_or_is_interrupted_unwinds(host: Any) -> None:
    def raising(error: BaseException) -> Callable[[], str | None]:
        def proof() -> str | None:
            raise error

        return proof

    before = dict(vars(host))
    (row,) = Patcher((fix("function", proof=raising(KeyError("x"))),)).apply().rows
    assert (row.status, row.reason) == (Status.UNSUPPORTED, "with the fix on, the probe failed: KeyError: 'x'")
    assert dict(vars(host)) == before
    patcher = Patcher((fix("function", proof=raising(KeyboardInterrupt())),))
    with pytest.raises(KeyboardInterrupt):
        patcher.apply()
    assert dict(vars(host)) == before
    assert statuses(patcher.status()) == [Status.DISABLED]


def test_until_it_is_proved_a_fix_acts_in_its_own_thread_only(host: Any) -> None:
    seen: list[Any] = []

    def proof() -> str | None:
        thread = threading.Thread(target=lambda: seen.append(host.function(2)))
        thread.start()
        thread.join()
        seen.append(host.function(2))
        return None

    Patcher((fix("function", proof=proof),)).apply()
    assert seen == [2, ("<one>", 2)]
    thread = threading.Thread(target=lambda: seen.append(host.function(2)))
    thread.start()
    thread.join()
    assert seen[2:] == [("<one>", 2)]


def test_an_object_from_before_the_patch_obeys_in_the_proof(host: Any) -> None:
    kept = host.Child()  # as the probes keep their model

    def probe() -> str | None:
        return "broken" if kept.own(1) == ("own", 1) else None

    assert statuses(Patcher((fix("Child.own", probe=probe, proof=None),)).apply()) == [Status.APPLIED]


def test_ways_are_tried_in_order_and_the_row_says_which_and_why(host: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ptfix")

    def fault() -> str | None:
        return None if host.function(2) == 5 else f"2 becomes {host.function(2)}"

    def way(name: str, answer: int, target: str = "function") -> Fallback:
        return Fallback(
            name, (Edit(f"fakehost:{target}", answering(answer)),), lambda: (fault(), "greedy; refused: beams")
        )

    def apply(*fallbacks: Fallback, first: Edit, drift: str | None = None) -> Any:
        made = fix(first, probe=fault, proof=None, drift=lambda: drift, fallbacks=fallbacks)
        patcher = Patcher((made,))
        planned = patcher.status().rows[0]
        row = patcher.apply().rows[0]
        answer = host.function(2)
        patcher.revert()
        assert host.function(2) == 2
        return planned, row, answer

    good, bad = Edit("fakehost:function", answering(5)), Edit("fakehost:function", answering(4))
    _, row, answer = apply(way("second", 5), first=good)
    assert (row.status, row.reason, answer) == (Status.APPLIED, "2 becomes 2", 5)

    _, row, answer = apply(way("second", 6), way("third", 5), first=bad)
    assert (row.status, answer) == (Status.APPLIED, 5)
    reason = "2 becomes 2; with the fix on, 2 becomes 4; second, 2 becomes 6; third: greedy; refused: beams"
    assert row.reason == reason
    assert f"one applied: {reason}" in caplog.text

    planned, row, answer = apply(way("second", 5), first=good, drift="a private name is gone")
    assert planned.waiting
    assert planned.reason == "needed, call ptfix.apply(): 2 becomes 2; a private name is gone"
    assert (row.status, answer) == (Status.APPLIED, 5)
    assert row.reason == "2 becomes 2; a private name is gone; second: greedy; refused: beams"

    _, row, answer = apply(way("second", 5), first=Edit("fakehost:gone", answering(5)))
    assert (row.status, answer) == (Status.APPLIED, 5)
    assert "fakehost:gone does not exist" in row.reason

    planned, row, answer = apply(way("second", 5, "gone"), first=good, drift="a private name is gone")
    assert planned == row
    assert (row.status, answer) == (Status.UNSUPPORTED, 2)
    assert row.reason.startswith("a private name is gone; fakehost:gone does not exist")

    _, row, answer = apply(way("second", 6), first=bad)
    assert (row.status, answer) == (Status.UNSUPPORTED, 2)
    assert row.reason == "with the fix on, 2 becomes 4; second, 2 becomes 6"
