from __future__ import annotations

import json

from ptfix.report import Report, Row, Status

REPORT = Report(
    {"transformers": "5.23.0", "peft": "0.21.2"},
    (Row("short", Status.APPLIED, "broken here"), Row("much_longer_id", Status.NOT_NEEDED, "healthy")),
)


def test_the_table_is_aligned() -> None:
    hosts, *table = str(REPORT).splitlines()
    assert hosts == "transformers 5.23.0, peft 0.21.2"
    assert table == [
        "fix             status      reason",
        "short           applied     broken here",
        "much_longer_id  not_needed  healthy",
    ]


def test_nothing_installed_and_nothing_to_fix() -> None:
    assert str(Report({}, ())).splitlines() == ["no host installed", "fix  status  reason"]


def test_to_dict_is_plain_json() -> None:
    assert json.loads(json.dumps(REPORT.to_dict())) == REPORT.to_dict()
    assert REPORT.to_dict()["rows"][0] == {"fix": "short", "status": "applied", "reason": "broken here"}
    assert type(REPORT.to_dict()["rows"][0]["status"]) is str


def test_a_status_prints_as_its_word() -> None:
    assert [str(status) for status in Status] == ["applied", "not_needed", "unsupported", "disabled"]
    assert f"{Status.APPLIED}" == Status.APPLIED == "applied"
