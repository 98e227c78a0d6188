"""What the data report writes: report.json by its schema, one inert HTML page, and a short terminal
form.
"""

# ruff: noqa: RUF001 - full-width signs of Chinese texts
import io
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from conf.choices import TaskClass
from rlhf.data.formats import Use
from rlhf.data.prepare.held import OnDisk
from rlhf.data.prepare.items import Item
from rlhf.data.report.making import make
from rlhf.data.report.plots import draw
from rlhf.data.report.records import Bars, Histogram, Report, Severity
from rlhf.data.report.remedies import REMEDIES
from rlhf.data.report.schema import SCHEMA
from rlhf.data.report.terminal import tables
from rlhf.data.report.writing import as_json
from rlhf.process import parallel
from rlhf.types import UserError
from tests.data.report_rows import LONG, chat, items, texts

EVIL = (
    '<script>alert("x")</script><img src=x onerror=alert(1)> \x1b[31m [bold]red[/bold] \u202e '
    '"quoted" & \ud800'
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and whether every element is
    closed.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def preference(count: int = 60) -> list[Item]:
    rows: list[dict[str, Any]] = [
        {"prompt": f"question {i}", "chosen": f"a good answer {i}", "rejected": f"bad {i}"}
        for i in range(count)
    ]
    rows[1] = {"prompt": EVIL, "chosen": EVIL, "rejected": EVIL + " "}
    rows[2] = dict(rows[0])
    rows[3] = {
        "prompt": "question 0",
        "chosen": "bad 0",
        "rejected": "a good answer 0",
        "source": EVIL,
    }
    rows[4] = {
        "prompt": LONG,
        "chosen": "这部电影很好看，我喜欢。",
        "rejected": "Мне не понравился этот фильм",
        "label": EVIL,
        "annotator": EVIL,
    }
    return items(*rows, origin=f"rows {EVIL[:30]}.jsonl")


def held() -> list[Item]:
    return items(
        {"prompt": "question 5", "chosen": "a good answer 5", "rejected": "bad 5"},
        origin="held.jsonl",
        split="eval",
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("report")
    with warnings.catch_warnings():
        # matplotlib warns of glyphs that it lacks: no row text may come into a plot
        warnings.simplefilter("error")
        return make(
            preference(),
            held(),
            Use.preference,
            folder,
            formats={"held.jsonl": "preference"},
            task=TaskClass.simple,
            named=5,
        )


def test_report_json_keeps_its_schema(written: Report) -> None:
    loaded = json.loads(written.files["json"].read_text(encoding="utf-8"))
    jsonschema.validate(loaded, SCHEMA)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert loaded == as_json(written)
    assert loaded["kind"] == "preference" and loaded["rows"] == {"train": 60, "eval": 1}
    by_check = {f["check"]: f for f in loaded["findings"]}
    assert [r["row"] for r in by_check["contradictions"]["rows"]] == [1, 3, 4]
    assert (
        by_check["row_leakage_exact"]["rows"][0]["file"] == "held.jsonl"
        and by_check["row_leakage_exact"]["rows"][0]["split"] == "eval"
    )
    order = [f["severity"] for f in loaded["findings"]]
    assert order == sorted(order, key=["fail", "warn", "info"].index) and len(set(order)) > 1


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("version",), 2),
        (("findings", 0, "severity"), "bad"),
        (("findings", 0, "rows", 0, "row"), 0),
        (("rows",), {"train": 1}),
        (("standards", 0, "extra"), 1),
    ],
)
def test_the_schema_refuses_another_report(
    written: Report, where: tuple[Any, ...], value: object
) -> None:
    changed = json.loads(json.dumps(as_json(written)))
    place = changed
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed, SCHEMA)


def test_every_finding_names_rows_and_what_mends_it(written: Report) -> None:
    for finding in written.findings():
        assert finding.remedy == REMEDIES[finding.check] and finding.total >= len(finding.rows) > 0
        assert len(finding.rows) <= 5 and finding.message


def test_a_row_with_a_script_stays_inert(written: Report) -> None:
    raw = written.files["html"].read_bytes().decode("utf-8")
    page = Page(raw)
    assert page.open == []
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "img", "iframe", "link", "object"}
    )
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    shown = "".join(page.text)
    assert '<script>alert("x")</script><img src=x onerror=alert(1)>' in shown, (
        "the row's text is shown as it is"
    )
    assert "\x1b" not in raw and "\u202e" not in raw
    policies = [
        a["content"]
        for tag, a in page.elements
        if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_page_needs_nothing_from_elsewhere(written: Report) -> None:
    raw = written.files["html"].read_text(encoding="utf-8")
    page = Page(raw)
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith("#"), (
                f"<{tag} {name}={attributes[name]}>"
            )
    assert "@import" not in raw and not re.search(r"url\((?!#)", raw)
    addresses = set(re.findall(r"https?://[^\"'<> ]+", raw))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, (
        "names of namespaces are the only addresses"
    )


def test_the_page_is_readable_without_a_mouse_or_eyes_and_in_the_dark(written: Report) -> None:
    raw = written.files["html"].read_text(encoding="utf-8")
    page = Page(raw)
    tags = [tag for tag, _ in page.elements]
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)), "every id once, those of the plots too"
    links = {str(a["href"])[1:] for tag, a in page.elements if tag == "a"}
    assert links <= set(ids) and {"findings", "standards", "rows", "lengths", "pairs"} <= links
    assert all(a.get("scope") in ("col", "row") for tag, a in page.elements if tag == "th")
    plots = [a for tag, a in page.elements if tag == "svg"]
    assert len(plots) == tags.count("figure") >= 3 and all(
        a["role"] == "img" and a["aria-label"] for a in plots
    )
    assert "prefers-color-scheme: dark" in raw and "currentColor" in raw and "#123456" not in raw
    assert (
        ("html", {"lang": "en"}) in page.elements
        and tags.count("h1") == 1
        and tags.count("main") == 1
    )


def test_plots_hold_no_row_text(written: Report) -> None:
    plots = re.findall(
        r"<svg.*?</svg>", written.files["html"].read_text(encoding="utf-8"), re.DOTALL
    )
    words = set(re.findall(r"<text[^>]*>([^<]*)</text>", "".join(plots)))
    assert words and all(word.isascii() or set(word) <= set("−.0123456789") for word in words)
    assert not any("script" in word or "question" in word for word in words)


@pytest.mark.parametrize(
    "plot",
    [
        Histogram("One value", "words", {"a": [3.0] * 5}),
        Histogram("Negative", "words", {"a": [-3.0, 2.0], "b": [], "c": [0.0]}, mark=0.0),
        Histogram("Limit", "words", {"a": [1.0, 2.0]}, mark=1024),
        Bars("Many", "rows", tuple(map(str, range(20))), tuple(map(float, range(20)))),
    ],
)
def test_plots_of_any_values(plot: Histogram | Bars) -> None:
    svg = draw(plot, 3)
    page = Page(svg)
    assert (
        page.open == []
        and page.elements[0][0] == "svg"
        and svg.startswith("<svg ")
        and "DOCTYPE" not in svg
    )
    assert draw(plot, 3) == svg and all(
        a["id"].startswith("plot3-") for _, a in page.elements if a.get("id")
    )  # type: ignore[union-attr]


def test_histograms_are_shares_of_each_series() -> None:
    import matplotlib.axes

    drawn: list[Any] = []
    original = matplotlib.axes.Axes.hist

    def hist(self: Any, *args: Any, **options: Any) -> Any:
        drawn.append((args, options))
        return original(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.axes.Axes, "hist", hist)
        draw(Histogram("t", "u", {"a": [1.0, 2.0, 3.0, 4.0], "b": [2.0]}), 1)
    assert [sum(options["weights"]) for _, options in drawn] == [1.0, 1.0]


def test_the_terminal_shows_findings_and_runs_nothing(written: Report) -> None:
    out = io.StringIO()
    console = Console(file=out, width=150, force_terminal=True, color_system=None)
    for table in tables(written):
        console.print(table)
    shown = out.getvalue()
    assert (
        "contradictions" in shown
        and "equal_sides" in shown
        and "training rows for the task" in shown
    )
    assert "\x1b[31m" not in shown and "\u202e" not in shown and "held.jsonl, row 1" in shown


def test_findings_are_capped_but_counted(tmp_path: Path) -> None:
    report = make(texts(*["the same"] * 30), [], Use.sft, tmp_path, named=4)
    finding = next(f for f in report.findings() if f.check == "exact_duplicates")
    assert finding.total == 29 and len(finding.rows) == 4
    assert "The first 4 of 29 rows" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_nothing_is_written_without_a_folder_and_both_files_with_one(tmp_path: Path) -> None:
    assert make(texts("a b c"), [], Use.sft, None).files == {}
    report = make(texts("a b c"), [], Use.sft, tmp_path / "new")
    assert (
        sorted(p.name for p in (tmp_path / "new").iterdir())
        == ["report.html", "report.json"]
        == sorted(p.name for p in report.files.values())
    )


@pytest.mark.parametrize("kind", list(Use))
def test_every_kind_of_rows_and_no_rows_at_all(kind: Use, tmp_path: Path) -> None:
    one = {
        Use.sft: {"messages": chat(("user", "hi"), ("assistant", "hello"))},
        Use.preference: {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.0},
        Use.unpaired: {"prompt": "p", "completion": "c", "label": True},
        Use.prompt: {"prompt": chat(("user", "hi"))},
    }[kind]
    for train, evaluation in ((items(one), items(one, split="eval")), ([], [])):
        report = make(train, evaluation, kind, tmp_path)
        jsonschema.validate(
            json.loads((tmp_path / "report.json").read_text(encoding="utf-8")), SCHEMA
        )
        assert Page((tmp_path / "report.html").read_text(encoding="utf-8")).open == []
        leaked = [f for f in report.findings() if f.check == "row_leakage_exact"]
        assert bool(leaked) is bool(train) and all(f.severity is Severity.fail for f in leaked)


def test_the_same_rows_give_the_same_report(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(preference(), held(), Use.preference, tmp_path / name, seed=4)
    for name in ("report.json", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_rows_on_disk_and_other_processes_give_the_same_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = make(preference(), held(), Use.preference, None)
    monkeypatch.setattr(parallel, "_WORTH_S", 0.0)
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    monkeypatch.setattr("rlhf.data.report.looked.PART", 20)
    train, kept = OnDisk(preference(), tmp_path), OnDisk(held(), tmp_path)
    assert make(train, kept, Use.preference, None) == here


def test_chinese_and_mixed_scripts(tmp_path: Path) -> None:
    rows = [
        f"这部电影的第{i}个场景非常感人，演员的表演也很自然，我会推荐给朋友。" for i in range(40)
    ] + [f"This is sentence {i} of the film, which I liked." for i in range(20)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = make(texts(*rows), [], Use.sft, tmp_path)
    figures = {s.name: s.figures for s in report.sections}
    assert (
        figures["languages"]["counts"] == {"zh": 40, "en": 20}
        and figures["languages"]["main"] == "zh"
    )
    assert (
        figures["lengths"]["columns"]["text"]["median"] >= 25
        and figures["diversity"]["vocabulary"] > 30
    )
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "这部电影" in page


def test_a_detector_that_cannot_run_does_not_end_the_report(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def languages(*_: Any) -> Any:
        raise UserError("the package is not installed")

    monkeypatch.setattr("rlhf.data.report.making.languages", languages)
    report = make(texts("a b c"), [], Use.sft, None)
    told = {section.name: section.unmeasured for section in report.sections}
    assert told["languages"] == "the package is not installed" and len(told) > 10
