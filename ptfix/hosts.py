"""Which hosts are installed, at which version, and whether they can be used. Only `problem()` imports a host."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Mapping

from packaging.specifiers import SpecifierSet
from packaging.version import Version

#: The oldest release of each host that ptfix is measured on. Each host is built on the ones before it.
FLOORS: Mapping[str, str] = {"transformers": "4.36", "peft": "0.6"}


def installed(name: str) -> Version | None:
    """The installed version, read from the package's metadata; None where there is none."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    # Its line alone: to parse a package's whole metadata, README and all, takes milliseconds, and apply() asks often.
    line = re.search(r"^Version: *(\S+)", found.read_text("METADATA") or "", re.MULTILINE)
    return Version(line[1] if line else found.version)


def versions() -> dict[str, str]:
    """Name -> version of every installed host, torch included."""
    found = {name: installed(name) for name in (*FLOORS, "torch")}
    return {name: str(version) for name, version in found.items() if version}


def satisfies(version: Version, specifier: str) -> bool:
    """Whether `version` is inside `specifier`; rc, dev and local builds count as their release.

    PEP 440 alone has a hole: 5.0.0rc1 satisfies neither ``<5`` nor ``>=5``.
    """
    return SpecifierSet(specifier).contains(Version(version.base_version))


def in_window(affects: Mapping[str, str]) -> bool:
    """Whether every host named in `affects` is installed inside its specifier; always true of an empty mapping."""
    found = {name: installed(name) for name in affects}
    return all(version is not None and satisfies(version, affects[name]) for name, version in found.items())


def problem(name: str) -> str | None:
    """Why the host `name` cannot be used, or None where it is installed, new enough and imports. Imports it."""
    version = installed(name)
    if version is None:
        return f"{name} is not installed"
    floor = FLOORS.get(name)
    if floor is not None and not satisfies(version, f">={floor}"):
        return f"{name} {version} is older than {floor}, the oldest that ptfix supports"
    try:
        importlib.import_module(name)
    except Exception as error:  # a broken host raises whatever it likes: ImportError, RuntimeError, AttributeError ...
        return f"{name} {version} does not import: {type(error).__name__}: {error}"
    return None
