"""What a user installs: only ptfix, with its matrix, from a wheel and from a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

hatchling = pytest.importorskip("hatchling.build", reason="the build backend is not installed here")

ROOT = Path(__file__).parents[1]
WHERE = "from ptfix import evidence; print(evidence.path()); evidence.cells()"


@pytest.fixture
def checkout(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(ROOT)  # PEP 517: a backend builds the current folder
    return ROOT


def unpacked(wheel: Path, folder: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        return archive.namelist()


def location(folder: Path) -> Path:
    """Where the matrix is found by a program that starts elsewhere and has `folder` as its site-packages."""
    code = f"import site; site.addsitedir({str(folder)!r}); {WHERE}"
    # This environment may have an editable ptfix of its own, whose finder would win: put the folder in front.
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return Path(found.stdout.strip())


def test_the_wheel_holds_ptfix_alone_and_finds_its_matrix(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    names = unpacked(tmp_path / hatchling.build_wheel(str(tmp_path)), site)
    roots = {name.partition("/")[0] for name in names}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"ptfix"}
    assert {"ptfix/compat_matrix.yaml", "ptfix/py.typed", "ptfix/patching.py"} <= set(names)
    assert not [name for name in names if "test" in name.lower()]
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert location(site) == site / "ptfix" / "compat_matrix.yaml"
    assert (site / "ptfix" / "compat_matrix.yaml").read_bytes() == (checkout / "compat_matrix.yaml").read_bytes()


def test_an_editable_install_reads_the_matrix_of_the_checkout(checkout: Path, tmp_path: Path) -> None:
    """hatchling also leaves a copy in site-packages, which goes stale: that one must not be read."""
    site = tmp_path / "site"
    unpacked(tmp_path / hatchling.build_editable(str(tmp_path)), site)
    assert location(site) == checkout / "compat_matrix.yaml"
