from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ptfix import evidence, hosts
from ptfix.evidence import Cell


def cell(transformers: str, peft: str, **measured: Any) -> Cell:
    return Cell(f"{transformers}+{peft}", {"transformers": transformers, "peft": peft}, {"imports": True, **measured})


CELLS = (
    cell("4.36.2", "0.7.1"),
    cell("4.57.6", "0.17.1"),
    cell("4.57.6", "0.13.2"),
    cell("5.0.0", "0.17.1", imports=False),
    cell("5.24.0", "0.21.2"),
)


@pytest.mark.parametrize(
    ("transformers", "peft", "expected", "exact"),
    [
        ("4.57.6", "0.13.2", "4.57.6+0.13.2", True),
        ("5.30.0", "0.22.0", "5.24.0+0.21.2", False),
        ("4.30.0", "0.5.0", "4.36.2+0.7.1", False),
        ("4.56.0", "0.16.0", "4.57.6+0.17.1", False),
    ],
)
def test_nearest(transformers: str, peft: str, expected: str, exact: bool) -> None:
    versions = {"transformers": transformers, "peft": peft, "torch": "2.13.0"}
    found = evidence.nearest(versions, CELLS)
    assert found is not None
    assert (found.id, found.is_pair(versions)) == (expected, exact)


@pytest.mark.parametrize("versions", [{}, {"peft": "0.21.2"}])
def test_no_pair_no_cell(versions: Mapping[str, str]) -> None:
    assert evidence.nearest(versions, CELLS) is None
    assert evidence.nearest({"transformers": "5.0.0", "peft": "0.21.2"}, ()) is None


def test_a_cell_not_yet_measured_is_no_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = Cell("planned", {"transformers": "5.0.0", "peft": "0.18.1"}, {})
    monkeypatch.setattr(evidence, "cells", lambda: (*CELLS, planned))
    found = evidence.nearest(planned.pins)
    assert found is not None
    assert found.id == "5.0.0+0.17.1"
    assert not planned.imports


def test_the_remedy_is_the_nearest_pair_that_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "cells", lambda: CELLS)
    monkeypatch.setattr(hosts, "versions", lambda: {"transformers": "5.0.0", "peft": "0.17.1"})
    assert evidence.remedy().endswith("pip install transformers==4.57.6 peft==0.17.1")
    monkeypatch.setattr(evidence, "cells", lambda: ())
    assert "newest of both" in evidence.remedy()


def test_the_matrix_of_this_checkout_can_be_read() -> None:
    assert evidence.path().name == "compat_matrix.yaml"
    assert evidence.path().exists()
    for each in evidence.cells():
        assert set(hosts.FLOORS) <= set(each.pins), each.id
    assert len({each.id for each in evidence.cells()}) == len(evidence.cells())


def test_the_readme_shows_what_the_matrix_says() -> None:
    """`python -m tests.matrix.record` writes it."""
    from tests.matrix import record

    readme = record.README.read_text(encoding="utf-8")
    assert record.in_readme(readme, record.read()) == readme
