"""The engine, and the only module that sets attributes on a host: plan -> commit -> ledger -> revert.

A plan touches nothing: is the fix disabled, can its hosts be used, does the window say "may be broken", does the
probe say "is broken", are the targets as expected. A commit makes all edits of a fix or none, writes them in the
ledger and asks the probe again: edits that do not mend the host are unwound, and the fix's next way is tried.
`revert()` walks the ledger backwards. Errors at patch time leave the host as it was; errors at call time are the
caller's to see.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ptfix import hosts
from ptfix.report import Report, Row, Status

log = logging.getLogger("ptfix")

_MISSING: Any = object()

Function = Callable[..., Any]


class PatchError(RuntimeError):
    """`strict` was asked for, and a needed fix could not be applied, or does not mend what it was applied for."""


#: Was ``apply(strict=True)`` called since the last `revert()`?
_strict = False


def is_strict() -> bool:
    """Is an error wanted rather than a warning, by ``apply(strict=True)`` or by PTFIX_STRICT?"""
    return _strict or strict_by_environment()


def strict_by_environment() -> bool:
    """PTFIX_STRICT."""
    return os.environ.get("PTFIX_STRICT", "0") not in ("", "0")


@dataclass(frozen=True)
class Edit:
    """One function of a host to replace."""

    target: str  #: "package.module:Class.method" or "package.module:function"
    wrap: Callable[
        [Function], Function
    ]  #: the plain function (inside a classmethod or staticmethod; a property's getter) -> its replacement
    parameters: tuple[str, ...] = ()  #: names the original must take; if one is gone, the host has drifted
    optional: bool = False  #: skip this edit where the target does not exist, instead of calling it drift


@dataclass(frozen=True)
class Fallback:
    """Another way to mend the fault of a fix, for a host that the fix's own edits do not mend."""

    name: str  #: opens what the row says of it: "by the public contract"
    edits: tuple[Edit, ...]
    proof: Callable[[], tuple[str | None, str]]  #: asked with the edits on: (what is still wrong or None, what works)


@dataclass(frozen=True)
class Fix:
    """One upstream fault, and the edits that mend it."""

    id: str
    why: str  #: one sentence for people
    link: str  #: the upstream issue or pull request
    affects: Mapping[str, str]  #: host -> specifier; the versions that may be broken, empty for all
    probe: Callable[[], str | None]  #: None where this host is healthy, otherwise how it is broken
    edits: tuple[Edit, ...]
    retire_when: str  #: what must be true before this fix can be deleted
    proof: Callable[[], str | None] | None = None  #: asked with the edits on, where the probe cannot see them
    drift: Callable[[], str | None] | None = None  #: what the edits build on beyond their targets, and is gone
    fallbacks: tuple[Fallback, ...] = ()  #: tried in this order

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts this fix needs: those it names, and the ones they are built on."""
        edits = [*self.edits, *(edit for fallback in self.fallbacks for edit in fallback.edits)]
        named = {*self.affects, *(re.split(r"[.:]", edit.target, maxsplit=1)[0] for edit in edits)}
        known = tuple(hosts.FLOORS)
        return next((known[:end] for end in range(len(known), 0, -1) if known[end - 1] in named), ())


class _Drift(Exception):
    """A target is not what the fix was written for."""


@dataclass
class _Switch:
    """Shared by all functions one fix installs, so that they turn on and off together."""

    on: bool = False
    proving: int | None = None  #: the thread in which the fix is proving itself: on there, and nowhere else

    def turn_off(self) -> None:
        self.on, self.proving = False, None


@dataclass(frozen=True)
class _Entry:
    """One attribute ptfix has set."""

    owner: Any
    name: str
    original: Any  #: what the owner's own __dict__ held; _MISSING where it inherited the attribute
    installed: Any
    switch: _Switch


@dataclass(frozen=True)
class _Way:
    """One way to mend a fault, as this host allows it."""

    name: str
    proof: Callable[[], tuple[str | None, str]]  #: (what is still wrong or None, what the row says beside it)
    places: tuple[tuple[Edit, Any, str], ...] = ()  #: (edit, owner, name)
    drift: str = ""  #: why it cannot be tried


@dataclass(frozen=True)
class _Plan:
    """A row; and where it waits for apply(), how the host is broken and the ways to mend it."""

    row: Row
    symptom: str = ""
    ways: tuple[_Way, ...] = ()


@dataclass
class Patcher:
    """Applies `fixes`, in their order. Thread-safe: one lock covers planning and committing.

    `remedy` is asked only when a host cannot be used: one sentence on what to install instead.
    """

    fixes: tuple[Fix, ...]
    remedy: Callable[[], str] = lambda: "Install releases of transformers and peft that import together."
    _ledger: list[_Entry] = field(default_factory=list, init=False)
    _rows: dict[str, Row] = field(default_factory=dict, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False)

    def apply(self, strict: bool = False) -> Report:
        """Import the hosts and apply every fix that is needed.

        Called again, it tries only what was unsupported or disabled.

        Raises:
            PatchError: `strict`, and a needed fix could not be applied. What this call had set is undone first.
        """
        global _strict
        with self._lock:
            mark, before, disabled = len(self._ledger), dict(self._rows), _disabled()
            for unknown in sorted(disabled - {fix.id for fix in self.fixes}):
                log.warning(
                    "PTFIX_DISABLE names %s, which is no fix of this release; `ptfix doctor` lists them.", unknown
                )
            todo = self._unsettled()
            problems = _problems(todo, disabled)
            self._rows |= self._commit_all(todo, problems, disabled)
            report = self._report(self._rows)
            if strict and any(row.status is Status.UNSUPPORTED for row in report.rows):
                self._unwind(mark)
                self._rows = before
                raise PatchError("\n".join(self._warnings(report.rows, problems)))
            _strict = _strict or strict
            news = [row for row in report.rows if row != before.get(row.fix)]
            for row in news:
                if row.status is Status.APPLIED:
                    log.info("%s applied: %s", row.fix, row.reason)
            for warning in self._warnings(news, problems):
                log.warning("%s", warning)
            return report

    def status(self) -> Report:
        """The rows of the last `apply()`; before it, what it would do. Imports and probes, but sets nothing."""
        with self._lock:
            disabled = _disabled()
            todo = [fix for fix in self.fixes if fix.id not in self._rows]
            problems = _problems(todo, disabled)
            return self._report(self._rows | {fix.id: _plan(fix, problems, disabled).row for fix in todo})

    def trial(self) -> Report:
        """What `apply()` would come to: makes and proves every edit, and takes it back."""
        with self._lock:
            mark, disabled, todo = len(self._ledger), _disabled(), self._unsettled()
            try:
                rows = self._commit_all(todo, _problems(todo, disabled), disabled)
            finally:
                self._unwind(mark)
            waiting = {
                fix: Row(fix, Status.DISABLED, f"needed, call ptfix.apply(): {row.reason}", waiting=True)
                for fix, row in rows.items()
                if row.status is Status.APPLIED
            }
            return self._report(self._rows | rows | waiting)

    def revert(self) -> None:
        """Give every host attribute back the object it held.

        A wrapper that someone else put around ours stays; ours, inside it, then calls the original.
        """
        global _strict
        with self._lock:
            self._unwind(0)
            self._rows.clear()
            _strict = False

    def _unsettled(self) -> list[Fix]:
        settled = {fix for fix, row in self._rows.items() if row.status in (Status.APPLIED, Status.NOT_NEEDED)}
        return [fix for fix in self.fixes if fix.id not in settled]

    def _commit_all(self, todo: Iterable[Fix], problems: Mapping[str, str], disabled: set[str]) -> dict[str, Row]:
        # All plans before the first commit: a probe must meet the stock host, not the work of an earlier fix.
        plans = [(fix, _plan(fix, problems, disabled)) for fix in todo]
        return {fix.id: self._commit(fix, plan) for fix, plan in plans}

    def _commit(self, fix: Fix, plan: _Plan) -> Row:
        """Take the first way that mends the host; leave the host as it was where none does."""
        findings: list[str] = []
        for way in plan.ways:
            fault, note = (way.drift, "") if way.drift else self._try(way)
            if fault is None:
                return Row(fix.id, Status.APPLIED, "; ".join(filter(None, (plan.symptom, *findings, note))))
            findings.append(fault)
        return Row(fix.id, Status.UNSUPPORTED, "; ".join(findings)) if findings else plan.row

    def _try(self, way: _Way) -> tuple[str | None, str]:
        """Make all edits of a way, or none where they cannot be made or do not mend the host.

        Returns: why there are none, or None; what the row says of this way.
        """
        mark, switch = len(self._ledger), _Switch()
        try:
            for edit, owner, name in way.places:
                # Read again: an earlier fix of this call may have edited the same place.
                installed = _switched(_find(owner, name), edit.wrap, switch)
                self._ledger.append(_Entry(owner, name, vars(owner).get(name, _MISSING), installed, switch))
                setattr(owner, name, installed)
            switch.proving = threading.get_ident()
            fault, note = _asked(way.proof)
        except BaseException as error:
            self._unwind(mark)
            if not isinstance(error, Exception):  # an interrupt is not ours to keep
                raise
            return f"could not be applied: {_describe(error)}", ""
        if fault is not None:
            self._unwind(mark)
            return f"{way.name or 'with the fix on'}, {fault}", ""
        # Last, and at once for all edits: a call running in another thread never meets half a fix, or an unproven one.
        switch.on, switch.proving = True, None
        return None, f"{way.name}: {note}" if way.name else note

    def _unwind(self, mark: int) -> None:
        """Undo the ledger backwards, down to its first `mark` entries."""
        for entry in self._ledger[mark:]:
            entry.switch.turn_off()
        while len(self._ledger) > mark:
            entry = self._ledger.pop()
            if vars(entry.owner).get(entry.name) is not entry.installed:
                continue  # never set, or wrapped by someone since: not ours to replace
            if entry.original is _MISSING:
                delattr(entry.owner, entry.name)
            else:
                setattr(entry.owner, entry.name, entry.original)

    def _report(self, rows: Mapping[str, Row]) -> Report:
        return Report(hosts.versions(), tuple(rows[fix.id] for fix in self.fixes))

    def _warnings(self, rows: Iterable[Row], problems: Mapping[str, str]) -> list[str]:
        """One line per cause rather than per fix, each saying what to do."""
        causes: dict[str, list[str]] = {}
        for row in rows:
            if row.status is Status.UNSUPPORTED:
                causes.setdefault(row.reason, []).append(row.fix)
        lines = []
        for reason, fixes in causes.items():
            names = ",".join(fixes)
            if reason in problems.values():
                advice = self.remedy()
            else:
                advice = f"The host is as it was. Run `ptfix doctor`, upgrade ptfix, or set PTFIX_DISABLE={names}."
            lines.append(f"{names} needed but not applied: {reason}. {advice}")
        return lines


def _disabled() -> set[str]:
    return {word.strip() for word in os.environ.get("PTFIX_DISABLE", "").split(",")} - {""}


def _problems(fixes: Iterable[Fix], disabled: set[str]) -> dict[str, str]:
    """Host -> why it cannot be used, for the hosts these fixes need. Asked once a call: a failing import is slow."""
    needed = {name for fix in fixes if fix.id not in disabled for name in fix.hosts}
    found = {name: hosts.problem(name) for name in hosts.FLOORS if name in needed}
    return {name: reason for name, reason in found.items() if reason}


def _plan(fix: Fix, problems: Mapping[str, str], disabled: set[str]) -> _Plan:
    """What to do about `fix`. Touches nothing."""

    def row(status: Status, reason: str) -> _Plan:
        return _Plan(Row(fix.id, status, reason))

    if fix.id in disabled:
        return row(Status.DISABLED, "named in PTFIX_DISABLE")
    for name in fix.hosts:
        if name in problems:
            return row(Status.UNSUPPORTED if hosts.installed(name) else Status.NOT_NEEDED, problems[name])
    if not hosts.in_window(fix.affects):
        window = ", ".join(f"{name} {specifier}" for name, specifier in fix.affects.items())
        return row(Status.NOT_NEEDED, f"outside the affected versions ({window})")
    try:
        symptom = fix.probe()
    except Exception as error:
        return row(Status.UNSUPPORTED, f"the probe failed: {_describe(error)}")
    if symptom is None:
        return row(Status.NOT_NEEDED, "probed and found healthy")
    proof = fix.proof or fix.probe
    ways = (
        _way("", fix.edits, lambda: (proof(), ""), fix.drift),
        *(_way(fallback.name, fallback.edits, fallback.proof) for fallback in fix.fallbacks),
    )
    drifts = "; ".join(way.drift for way in ways if way.drift)
    if all(way.drift for way in ways):
        return row(Status.UNSUPPORTED, drifts)
    reason = "; ".join(filter(None, (f"needed, call ptfix.apply(): {symptom}", drifts)))
    return _Plan(Row(fix.id, Status.DISABLED, reason, waiting=True), symptom, ways)


def _way(
    name: str,
    edits: tuple[Edit, ...],
    proof: Callable[[], tuple[str | None, str]],
    drift: Callable[[], str | None] | None = None,
) -> _Way:
    """Find the places of these edits, or why they cannot be made."""
    try:
        gone = drift and drift()
        places = tuple((edit, *place) for edit in edits if (place := _resolve(edit)))
    except Exception as error:
        return _Way(name, proof, drift=_describe(error))
    return _Way(name, proof, places, gone or ("" if places else "none of its targets exists in this host"))


def _asked(proof: Callable[[], tuple[str | None, str]]) -> tuple[str | None, str]:
    try:
        return proof()
    except Exception as error:
        return f"the probe failed: {_describe(error)}", ""


def _resolve(edit: Edit) -> tuple[Any, str] | None:
    """(owner, name) of a target that is as expected; None where it is optional and absent. Raises _Drift otherwise."""
    module, _, path = edit.target.partition(":")
    *outer, name = path.split(".")
    try:
        owner = importlib.import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        function = _function(_find(owner, name))
    except (ModuleNotFoundError, AttributeError) as error:
        if edit.optional:
            return None
        raise _Drift(f"{edit.target} does not exist in this host ({error})") from error
    except _Drift as error:
        raise _Drift(f"{edit.target} {error}") from error
    gone = [name for name in edit.parameters if name not in inspect.signature(function).parameters]
    if gone:
        raise _Drift(f"{edit.target} no longer takes {', '.join(gone)}")
    return owner, name


def _find(owner: Any, name: str) -> Any:
    """The raw attribute, descriptor and all, from a module or along a class's MRO; never what getattr would bind."""
    for scope in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        if name in vars(scope):
            return vars(scope)[name]
    if inspect.ismodule(owner):
        return getattr(owner, name)  # a lazy module; this also fills its __dict__
    raise AttributeError(f"{owner!r} has no attribute {name!r}")


def _function(raw: Any) -> Function:
    """The plain function in `raw`. Raises _Drift for anything a transparent switch cannot stand in for."""
    function: Any = raw.fget if isinstance(raw, property) else raw
    if isinstance(raw, (classmethod, staticmethod)):
        function = raw.__func__
    if not inspect.isfunction(function):
        raise _Drift(
            f"is a {type(function).__name__}; only functions, methods, classmethods, staticmethods and getters can be "
            "edited"
        )
    if (
        inspect.iscoroutinefunction(function)
        or inspect.isasyncgenfunction(function)
        or inspect.isgeneratorfunction(function)
    ):
        raise _Drift("is a coroutine or generator function; only ordinary functions can be edited")
    return function


def _switched(raw: Any, wrap: Callable[[Function], Function], switch: _Switch) -> Any:
    """`raw` with its function behind `switch`, which bound methods kept by old objects obey too."""
    original = _function(raw)
    replacement = wrap(original)

    @functools.wraps(original)  # generate() inspects signatures
    def switched(*args: Any, **kwargs: Any) -> Any:
        on = switch.on or (switch.proving is not None and switch.proving == threading.get_ident())
        return (replacement if on else original)(*args, **kwargs)

    if isinstance(raw, property):
        return raw.getter(switched)
    return type(raw)(switched) if isinstance(raw, (classmethod, staticmethod)) else switched


def _describe(error: BaseException) -> str:
    return str(error) if isinstance(error, _Drift) else f"{type(error).__name__}: {error}"
