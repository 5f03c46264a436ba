from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path

import pytest
from packaging.version import Version

from ptfix import hosts


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """The metadata of the environment, as a dict the test fills."""
    known: dict[str, str] = {}

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        folder = tmp_path / f"{name}-{known[name]}.dist-info"
        folder.mkdir(exist_ok=True)
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {known[name]}", "", "Version: 0 was a mistake."]
        (folder / "METADATA").write_text("\n".join(lines))
        return importlib.metadata.Distribution.at(folder)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    return known


def test_installed_is_what_the_metadata_says() -> None:
    for name in ("torch", "packaging", "pytest"):
        assert str(hosts.installed(name)) == importlib.metadata.version(name)


def test_installed(versions: dict[str, str]) -> None:
    versions["peft"] = "0.21.2"
    assert hosts.installed("peft") == Version("0.21.2")
    assert hosts.installed("transformers") is None
    assert hosts.versions() == {"peft": "0.21.2"}


@pytest.mark.parametrize(
    ("transformers", "peft", "affected"),
    [
        ("4.42.0", "0.12.0", True),
        ("4.41.2", "0.12.0", False),
        ("4.42.0", "0.13.0", False),
        ("5.0.0rc1", "0.12.0", True),  # PEP 440 alone would say no to both <5 and >=5
        ("4.42.0.dev0", "0.12.0", True),
        ("4.42.0+local", "0.13.0.dev0", False),
        ("5.23.0", "0.12.1.post1", True),
    ],
)
def test_in_window(versions: dict[str, str], transformers: str, peft: str, affected: bool) -> None:
    versions.update(transformers=transformers, peft=peft)
    assert hosts.in_window({"transformers": ">=4.42", "peft": "<0.13"}) is affected


def test_prereleases_count_as_their_release(versions: dict[str, str]) -> None:
    versions["transformers"] = "5.0.0rc1"
    assert hosts.in_window({"transformers": ">=5"})
    assert not hosts.in_window({"transformers": "<5"})


def test_an_empty_window_is_always_open_and_a_missing_host_closes_it(versions: dict[str, str]) -> None:
    assert hosts.in_window({})
    assert not hosts.in_window({"peft": ">=0"})


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "peft is not installed"),
        ("0.5.0", "peft 0.5.0 is older than 0.6, the oldest that ptfix supports"),
        ("0.6.0.dev0", None),
        ("0.21.2", None),
    ],
)
def test_problem(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str | None
) -> None:
    versions.update({"peft": version} if version else {})
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    assert hosts.problem("peft") == reason


def test_a_host_that_raises_on_import(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("cannot import name 'HybridCache'")

    versions["peft"] = "0.16.0"
    monkeypatch.setattr(importlib, "import_module", broken)
    assert hosts.problem("peft") == "peft 0.16.0 does not import: ImportError: cannot import name 'HybridCache'"
