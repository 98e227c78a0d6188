"""The doctor's page: stage=doctor in a process of its own, its findings as a table."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf.board.pages.doctor import Examination
from rlhf.stages.examination.findings import Finding, State, write
from tests.board.rooms import board

FINDINGS = [
    Finding("python", State.ok, "3.11 <b>"),
    Finding("disk", State.fail, "0 GiB left", "delete something"),
]


def option(command: list[str]) -> Path:
    [given] = [part for part in command if part.startswith("stage.findings=")]
    return Path(given.split("=", 1)[1].strip('"'))


def test_findings_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **named: Any) -> Any:
        assert command[1:4] == ["-m", "rlhf", "stage=doctor"]
        write(FINDINGS, option(command))

    monkeypatch.setattr(subprocess, "run", run)
    with board(tmp_path) as client:
        assert "not examined" in client.get("/doctor").text
        assert client.post("/doctor").headers["location"] == "/doctor"
        while not client.get("/doctor/live").json()["ended"]:
            pass
        page = client.get("/doctor").text
    assert "3.11 &lt;b&gt;" in page and "delete something" in page
    assert "1 failed, 0 warnings, 1 in order" in page


def test_what_went_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], *, stdout: Any, **named: Any) -> None:
        stdout.write(b"no such stage\n")

    monkeypatch.setattr(subprocess, "run", run)
    examination = Examination(tmp_path)
    examination.begin()
    examination.wait()
    assert examination.problem == "no such stage" and examination.findings() is None


@pytest.mark.slow
def test_the_real_examination(tmp_path: Path) -> None:
    examination = Examination(tmp_path)
    examination.begin()
    examination.wait()
    found = examination.findings()
    assert found is not None, examination.problem
    assert {"python"} <= {finding["name"] for finding in found[0]}


def test_the_file_of_the_findings(tmp_path: Path) -> None:
    write(FINDINGS, tmp_path / "deep" / "findings.json")
    content = json.loads((tmp_path / "deep" / "findings.json").read_text())
    assert content["findings"][1] == {
        "name": "disk",
        "state": "fail",
        "found": "0 GiB left",
        "remedy": "delete something",
    }
