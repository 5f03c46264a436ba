"""What was measured where: reads compat_matrix.yaml. Evidence only; the windows live in code, beside each fix."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from ptfix import hosts


@dataclass(frozen=True)
class Cell:
    """One environment of the matrix: exact pins, and what a run measured there (nothing yet: empty)."""

    id: str
    pins: Mapping[str, str]
    measured: Mapping[str, Any]

    @property
    def imports(self) -> bool:
        """Whether this pair was measured and can be imported."""
        return bool(self.measured.get("imports"))

    def is_pair(self, versions: Mapping[str, str]) -> bool:
        """Whether `versions` names exactly the hosts pinned here."""
        return all(self.pins.get(name) == versions.get(name) for name in hosts.FLOORS)

    def modes(self, runner: str, outcome: str) -> list[str]:
        """The modes in which `runner` ("stock", "ptfix") has `outcome` ("wrong", "raises") for some model."""
        rows = [row for rows in self.measured.get(runner, {}).values() for row in rows.values()]
        letter = {"wrong": "x", "raises": "!"}[outcome]
        return [
            mode
            for index, mode in enumerate(self.measured.get("modes", ()))
            if any(row[index] == letter for row in rows)
        ]


def path() -> Path:
    """The matrix: beside this file in a wheel, beside the package in a checkout (an editable install included)."""
    shipped = Path(__file__).with_name("compat_matrix.yaml")
    return shipped if shipped.exists() else Path(__file__).parents[1] / "compat_matrix.yaml"


@functools.cache
def cells() -> tuple[Cell, ...]:
    """Every cell, in the order of the file; none where the file is missing."""
    import yaml

    if not path().exists():
        return ()
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where libyaml is there
    document = yaml.load(path().read_text(encoding="utf-8"), loader) or {}
    return tuple(_cell(entry) for entry in document.get("cells") or ())


def nearest(versions: Mapping[str, str], among: tuple[Cell, ...] | None = None) -> Cell | None:
    """The measured cell of exactly this pair, or else the nearest one; None without a cell or without both hosts.

    Near means few measured releases in between, over both hosts. `Cell.is_pair` tells which of the two it is.
    """
    if among is None:
        among = tuple(cell for cell in cells() if cell.measured)
    if not among or any(name not in versions for name in hosts.FLOORS):
        return None

    def distance(cell: Cell) -> int:
        return sum(abs(ranks[name][cell.pins[name]] - ranks[name][versions[name]]) for name in hosts.FLOORS)

    ranks = {name: _ranks({*(cell.pins[name] for cell in among), versions[name]}) for name in hosts.FLOORS}
    return min(among, key=distance)


def remedy() -> str:
    """What to do about a host that cannot be used: the command that installs the nearest pair known to import."""
    versions = hosts.versions()
    pair = nearest(versions, tuple(cell for cell in cells() if cell.imports and not cell.is_pair(versions)))
    if pair is None:
        return "Install releases of transformers and peft that import together, such as the newest of both."
    return "The nearest measured pair: pip install " + " ".join(f"{name}=={pair.pins[name]}" for name in hosts.FLOORS)


def _cell(entry: Mapping[str, Any]) -> Cell:
    rest = {key: value for key, value in entry.items() if key not in ("id", "pins")}
    return Cell(str(entry["id"]), {name: str(version) for name, version in entry["pins"].items()}, rest)


def _ranks(versions: set[str]) -> dict[str, int]:
    return {version: rank for rank, version in enumerate(sorted(versions, key=Version))}
