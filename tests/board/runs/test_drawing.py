"""Curves as SVG: few points, spikes kept, every text escaped, the picture's own policy."""

import base64
import hashlib
import math
import xml.etree.ElementTree as ET
from array import array

import pytest

from rlhf.board.runs import drawing
from rlhf.board.runs.metrics import Series
from rlhf.board.runs.panels import PANELS, alone, by_key, others, panels, picked
from rlhf.board.runs.pictures import alternative, drawn, evenly, picture, table

NAME = "<b>&\"loss'\x00"


def series(values: list[float], first: int = 1) -> Series:
    steps = array("q", range(first, first + len(values)))
    return Series(steps, array("d", values))


def draw(**given: Series) -> str:
    words = {"title": NAME, "unit": "nats & bits", "steps": "step", "empty": "nothing <yet>"}
    return drawing.draw(given, **words)


def paths(text: str, kind: str) -> list[ET.Element]:
    root = ET.fromstring(text)
    found = root.iter("{http://www.w3.org/2000/svg}path")
    return [path for path in found if kind in (path.get("class") or "").split()]


def test_a_spike_is_drawn_and_points_are_few() -> None:
    values = [1.0] * 10_000
    values[7_123] = 99.0
    points = drawing.downsample(series(values))
    assert len(points) <= 400
    assert (7_124, 99.0) in points
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    short = series([3.0, 1.0])
    assert drawing.downsample(short) == [(1, 3.0), (2, 1.0)]


def test_the_picture_is_xml_whatever_names_hold() -> None:
    text = draw(**{NAME: series([1.0, 2.0, 0.5]), "other": series([5.0])})
    assert len(paths(text, "l")) == 4  # two lines and their two marks below
    assert "<b>" not in text and "\x00" not in text and "nats &amp; bits" in text
    assert "<script" not in text and " style=" not in text
    assert "nothing &lt;yet&gt;" in draw(a=Series())
    ET.fromstring(draw(a=Series()))


@pytest.mark.parametrize("values", [[0.0], [2.0, 2.0], [1e-12, 2e-12], [-1e9, 1e9], [0.0] * 100])
def test_any_numbers_give_places_inside_the_picture(values: list[float]) -> None:
    text = draw(a=series(values))
    for path in paths(text, "c0"):
        numbers = (path.get("d") or "").replace("M", " ").replace("L", " ").replace("H", " ")
        assert all(-1 <= float(number) <= 641 for number in numbers.split())
    assert "nan" not in text and "inf" not in text


def test_long_lines_have_a_mean_and_all_differ_by_their_dashes() -> None:
    lines = {f"m{number}": series([float(number)] * 100) for number in range(8)}
    text = draw(**lines)
    assert len(paths(text, "r")) == 8
    means = [path for path in paths(text, "l") if "r" not in (path.get("class") or "").split()]
    dashes = {path.get("stroke-dasharray") for path in means}
    assert len(dashes) == 8


def test_the_policy_names_the_only_style() -> None:
    text = draw(a=series([1.0, 2.0]))
    style = text.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in drawing.POLICY
    assert "default-src 'none'" in drawing.POLICY and "unsafe" not in drawing.POLICY
    assert "prefers-color-scheme:dark" in style


def test_ticks_are_round() -> None:
    assert drawing.ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert drawing.ticks(3.0, 97.0) == pytest.approx([20, 40, 60, 80])
    assert drawing.ticks(2.0, 2.0) == [2.0]
    assert drawing.ticks(0.0, math.inf) == [0.0]


def test_panels_follow_from_the_metrics() -> None:
    names = ["loss", "eval_loss", "reward/total", "reward/truncated", "mine", "memory/rss_mb"]
    found = {panel.title: panel for panel in panels(names)}
    assert found["Loss"].names == ("loss", "eval_loss")
    assert found["Reward terms"].names == ("reward/total",)
    assert found["Memory"].unit == "MiB"
    assert others(names) == ["mine"]
    many = [f"reward/term{number}" for number in range(12)]
    crowded = by_key("score-1", many)
    assert crowded is not None and len(crowded.names) == 8 and crowded.left_out == 4
    assert by_key("score-1", ["loss"]) is None and by_key("none", names) is None
    assert alone("mine", names) is not None and alone("absent", names) is None
    assert len(PANELS) > 20


def t(key: str, /, **values: object) -> str:
    return f"{key} {values}"


def test_a_picture_has_words_and_a_table() -> None:
    panel = by_key("loss-0", ["loss", "eval_loss"])
    assert panel is not None
    held = {"loss": series([4.0, 3.0, 2.0]), "eval_loss": series([5.0], first=3), "x": Series()}
    shown = picture("/runs/a/sft", panel, picked(panel, held), t)
    assert shown.source == "/runs/a/sft/curve.svg?panel=loss-0"
    assert shown.rows == ((1, ("4", "")), (2, ("3", "")), (3, ("2", "5")))
    assert "'first': '4'" in shown.alt and "'low': '2'" in shown.alt
    assert drawn(picked(panel, held))[-1] == ("eval_loss", 3, "5")
    assert len(table({"a": series([0.0] * 1000)})) == 25
    assert evenly(range(1, 1001), 3) == [1, 500, 1000] or evenly(range(1, 1001), 3)[1] == 501
    assert alternative("x", {"a": Series()}, t) == "x:"
