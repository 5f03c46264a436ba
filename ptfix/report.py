"""What ptfix found and did: data, no logic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Status(str, Enum):
    """The outcome of one fix."""

    APPLIED = "applied"  #: and probed again: with the fix on, the fault is gone
    NOT_NEEDED = "not_needed"  #: outside the affected versions, or probed and found healthy
    UNSUPPORTED = (
        "unsupported"  #: needed, but this host has drifted, or the fix does not mend it; the host is as it was
    )
    DISABLED = "disabled"  #: off: named in PTFIX_DISABLE, or (`Row.waiting`) ptfix.apply() has not been called

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Row:
    """One fix: its id, its outcome, and why."""

    fix: str
    status: Status
    reason: str
    waiting: bool = False  #: needed and possible, and only `ptfix.apply()` has not been called


@dataclass(frozen=True)
class Report:
    """The versions of the installed hosts, and one row for each fix in the order in which fixes apply."""

    hosts: Mapping[str, str]
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        hosts = ", ".join(f"{name} {version}" for name, version in self.hosts.items()) or "no host installed"
        table = [("fix", "status", "reason"), *((row.fix, row.status.value, row.reason) for row in self.rows)]
        fix_width, status_width = (max(len(line[column]) for line in table) for column in (0, 1))
        return "\n".join((hosts, *(f"{fix:{fix_width}}  {status:{status_width}}  {why}" for fix, status, why in table)))

    def to_dict(self) -> dict[str, Any]:
        """Plain strings, lists and dicts, ready for json."""
        return {
            "hosts": dict(self.hosts),
            "rows": [{"fix": row.fix, "status": row.status.value, "reason": row.reason} for row in self.rows],
        }
