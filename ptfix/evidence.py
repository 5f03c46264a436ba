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
    """One environment of the matrix: exact pins, and everything else its entry says."""

    id: str
    pins: Mapping[str, str]
    measured: Mapping[str, Any]

    @property
    def importable(self) -> bool:
        """False where the entry says ``imports: false``: this pair cannot even be imported."""
        return bool(self.measured.get("imports", True))

    def is_pair(self, versions: Mapping[str, str]) -> bool:
        """Whether `versions` names exactly the hosts pinned here."""
        return all(self.pins.get(name) == versions.get(name) for name in hosts.FLOORS)


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
    """The cell of exactly this pair, or else the nearest one; None without a cell or without both hosts.

    Near means few measured releases in between, over both hosts. `Cell.is_pair` tells which of the two it is.
    """
    if among is None:
        among = cells()
    if not among or any(name not in versions for name in hosts.FLOORS):
        return None

    def distance(cell: Cell) -> int:
        return sum(abs(ranks[name][cell.pins[name]] - ranks[name][versions[name]]) for name in hosts.FLOORS)

    ranks = {name: _ranks({*(cell.pins[name] for cell in among), versions[name]}) for name in hosts.FLOORS}
    return min(among, key=distance)


def remedy() -> str:
    """What to do about a host that cannot be used: the command that installs the nearest pair known to import."""
    versions = hosts.versions()
    pair = nearest(versions, tuple(cell for cell in cells() if cell.importable and not cell.is_pair(versions)))
    if pair is None:
        return "Install releases of transformers and peft that import together, such as the newest of both."
    return "The nearest measured pair: pip install " + " ".join(f"{name}=={pair.pins[name]}" for name in hosts.FLOORS)


def _cell(entry: Mapping[str, Any]) -> Cell:
    rest = {key: value for key, value in entry.items() if key not in ("id", "pins")}
    return Cell(str(entry["id"]), {name: str(version) for name, version in entry["pins"].items()}, rest)


def _ranks(versions: set[str]) -> dict[str, int]:
    return {version: rank for rank, version in enumerate(sorted(versions, key=Version))}
