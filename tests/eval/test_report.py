"""report.html and report.json: one inert file, tables and pictures right for screen readers."""

import base64
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from eval.report.html import tracker_tables, write_report
from eval.sections import Section, Table
from rlhf.stages.evaluation.reporting import publish_report
from tests.data.test_report_page import EVIL, Page

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


@pytest.fixture
def sections(tmp_path: Path) -> list[Section]:
    plots = tmp_path / "plots"
    plots.mkdir()
    (plots / "a.png").write_bytes(PIXEL)
    table = Table.of(EVIL, [{"policy": EVIL, "exact": "0.40 [0.31, 0.49]"}])
    return [
        Section(EVIL, (EVIL,), (table,), {EVIL: plots / "a.png"}, {"x": float("nan"), EVIL: [1]}),
        Section("Second", tables=(Table("Nothing", ("policy",), ()),)),
    ]


def test_everything_that_a_model_says_is_text(sections: list[Section], tmp_path: Path) -> None:
    path = write_report(tmp_path, EVIL, sections)
    raw = path.read_text(encoding="utf-8")
    page = Page(raw)
    assert page.open == []
    names = {name for name, _ in page.elements}
    assert not names & {"script", "iframe", "object", "link", "form", "base"}
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "srcset", "action"):
            value = attributes.get(key) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), (name, key, value)
    assert not re.search(r"https?:|url\(|@import", raw)
    policies = [a["content"] for n, a in page.elements if a.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    assert "\x1b" not in raw and "\u202e" not in raw
    text = "".join(page.text)
    assert '<script>alert("x")</script>' in text and "[bold]red[/bold]" in text


def test_a_screen_reader_finds_its_way(sections: list[Section], tmp_path: Path) -> None:
    page = Page(write_report(tmp_path, "Evaluation", sections).read_text(encoding="utf-8"))
    by_name: dict[str, list[Mapping[str, str | None]]] = {}
    for name, attributes in page.elements:
        by_name.setdefault(name, []).append(attributes)
    assert by_name["html"][0]["lang"] == "en" and len(by_name["h1"]) == len(by_name["main"]) == 1
    assert len(by_name["h2"]) == len(sections)
    assert {a["scope"] for a in by_name["th"]} == {"col", "row"}
    assert len(by_name["caption"]) == len(by_name["table"]) == 1
    assert all(a["alt"] for a in by_name["img"]) and by_name["div"][0]["tabindex"] == "0"
    targets = {a["id"] for a in by_name["section"]}
    assert {f"#{target}" for target in targets} == {a["href"] for a in by_name["a"]}
    assert "Nothing: no rows." in "".join(page.text)
    numbers = [a.get("class") for a in by_name["td"]]
    assert numbers == ["number"]


def test_the_figures_are_json(sections: list[Section], tmp_path: Path) -> None:
    write_report(tmp_path, "Evaluation", sections)
    content: Any = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["format_version"] == 1 and content["title"] == "Evaluation"
    first = content["sections"][0]
    assert list(first["plots"].values()) == ["plots/a.png"]
    assert first["figures"]["x"] is None and list(first["figures"].values())[1] == [1]
    assert first["tables"][0]["rows"][0][1] == "0.40 [0.31, 0.49]"


def test_what_a_report_cannot_hold_is_refused(sections: list[Section], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['Second'\] more than once"):
        write_report(tmp_path, "Evaluation", [*sections, Section("Second")])
    (tmp_path / "plots" / "a.png").write_bytes(b"<svg onload=alert(1)>")
    with pytest.raises(ValueError, match=r"a\.png: expected a PNG"):
        write_report(tmp_path, "Evaluation", sections)


def test_tables_reach_the_tracker_under_names_of_their_own(tmp_path: Path) -> None:
    table = Table.of("汉字", [{"policy": "a", "exact": "1"}])
    section = Section("Tasks: GSM8K", tables=(table, table, Table("Empty", ("x",), ())))
    rows = [{"policy": "a", "exact": "1"}]
    expected = {"report/tasks_gsm8k/untitled": rows, "report/tasks_gsm8k/untitled_2": rows}
    assert tracker_tables([section]) == expected
    logged: dict[str, Any] = {}

    class Logging:
        def table(self, name: str, rows: Any, step: int) -> None:
            logged[name] = rows

    page = publish_report(tmp_path, "mine", [section], Logging())  # type: ignore[arg-type]
    assert logged == expected and "Evaluation: mine" in page.read_text(encoding="utf-8")
