"""Every sentence of the options has its Chinese, and what was translated is still said."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from conf.preparation import STEPS
from conf.stages import OnlineStage, SFTStage
from rlhf.board.forms.basic import stages
from rlhf.board.forms.fields import Field, form_of, step_fields
from rlhf.board.forms.filling import fill, place_problem
from rlhf.board.forms.view import View
from rlhf.board.rendering import translator
from rlhf.board.said import PARTS, part, said
from rlhf.checks.arithmetic import offline_arithmetic, online_arithmetic
from rlhf.checks.launch import BatchPlan
from rlhf.cli import presets
from rlhf.cli.presets import CONF_DIR
from tests.board.entering import place_in
from tests.board.making import client

ZH = "zh"
HAN = re.compile("[\u4e00-\u9fff]")
_FRAME = "{}={} is out of range: expected {~}."


def fields() -> Iterator[Field]:
    for stage in stages():
        for each in form_of(stage, True):
            if each.option is not None:
                yield each
                yield from each.inner
    for step in STEPS:
        yield from step_fields(step)


def test_every_option_has_its_sentence_in_chinese() -> None:
    """By the English sentence, so that one that changes is looked at again."""
    wanted = {each.option.info.doc for each in fields() if each.option is not None}
    known = part("options", ZH)
    assert sorted(wanted - known.keys()) == [], "translate these in words/said_options.zh.json"
    assert sorted(known.keys() - wanted) == [], "no option says this any more"
    assert [text for text in known.values() if not HAN.search(text)] == []


def test_names_in_a_sentence_stay_in_the_other() -> None:
    """Options, papers: what has an underscore, a number of arXiv or an equals sign."""
    named = re.compile(r"arXiv:[\d.]+|[a-z]+_[a-z_]+|\w+=\w+", re.ASCII)
    changed = []
    for name in ("options", "presets"):
        for english, chinese in part(name, ZH).items():
            if set(named.findall(english)) - set(named.findall(chinese)):
                changed.append(english)
    assert changed == []


def test_titles_units_and_presets() -> None:
    infos = [each.option.info for each in fields() if each.option is not None]
    sections = {each.option.section for each in fields() if each.option is not None}
    titles = sections | {info.unit for info in infos if info.unit}
    assert part("titles", ZH).keys() == titles - {""}
    groups = {each.key for stage in stages() for each in form_of(stage, True).presets}
    said_of = {presets.summary("stage", name) for name in stages()}
    for group in groups:
        said_of |= {presets.summary(group, name) for name in presets.choices(group)}
    assert part("presets", ZH).keys() == said_of - {""}


def relations() -> Iterator[tuple[str, str]]:
    """(option, what is expected) of every relation between options that conf/ checks."""
    for path in CONF_DIR.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "check":
                continue
            key, expected = template(node.args[1]), template(node.args[3])
            if expected is not None:
                yield key or "", expected


def template(node: ast.expr) -> str | None:
    """A text with {} for each value in it; None for a name."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if not isinstance(node, ast.JoinedStr):
        return None
    return "".join(
        str(each.value) if isinstance(each, ast.Constant) else "{}" for each in node.values
    )


def in_a_form(key: str) -> bool:
    """Whether a form may have the option, in which {} stands for what the code puts in; an empty
    key is the code's own.
    """
    pattern = re.escape(key).replace(r"\{\}", ".+")
    keys = {each.key for stage in stages() for each in form_of(stage, True)}
    return not key or any(re.fullmatch(pattern, each) for each in (*keys, "data", "label"))


def test_every_relation_between_options_has_its_chinese() -> None:
    found = list(relations())
    assert len(found) > 80
    known = part("relations", ZH).keys() - {_FRAME, "a value with environment.kind={}"}
    wanted = {expected for key, expected in found if in_a_form(key)}
    assert sorted(wanted - known) == []
    assert sorted(known - {expected for _, expected in found}) == []


def test_the_errors_that_were_translated_are_still_said() -> None:
    """The commonest ones; the others stay English."""
    said_of = set()
    for folder in ("rlhf", "reward"):
        for path in (CONF_DIR.parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                    said_of.add(template(node.args[0]))
    assert sorted(part("errors", ZH).keys() - said_of) == []


@pytest.mark.parametrize("name", PARTS)
def test_holes_are_the_same(name: str) -> None:
    hole = re.compile(r"\{([~#]|\d*)\}")
    for english, chinese in part(name, ZH).items():
        count, there = len(hole.findall(english)), hole.findall(chinese)
        numbered = [number for number in there if number.isdigit()]
        if numbered:
            assert sorted(map(int, there)) == list(range(1, count + 1)), english
        else:
            assert there == hole.findall(english), english


def test_what_is_not_known_stays_english_and_says_so() -> None:
    text = "The moon is out of range."
    assert (said(text, ZH).text, said(text, ZH).language) == (text, "en")
    assert said(text, "en").language is None
    assert said("x" * 10_000 + " ranks", ZH).language == "en"


@pytest.mark.parametrize("ranks", [1, 2])
def test_figures_of_a_dry_run(ranks: int) -> None:
    online = OnlineStage(steps=10, prompts_per_step=8, samples_per_prompt=2)
    online.batch_growth.steps, online.batch_growth.factor = [4, 6], 2
    rows = SFTStage(batch_size=8, epochs=2)
    packed = SFTStage(batch_size=8, packing=True, steps=12)
    packed.batch_growth.steps = [4]
    shared = BatchPlan(ranks, 2, 2, sharing=2)
    together = [
        online_arithmetic(online, 4096, 128, ranks, 100),
        offline_arithmetic(rows, BatchPlan(ranks, 4, 2), 64, 60),
        offline_arithmetic(rows, BatchPlan(ranks, 4, 1, tokens=512), 64, 64),
        offline_arithmetic(packed, shared, 64, 32),
    ]
    for figures in together:
        for english in (*figures, *figures.values()):
            chinese = said(english, ZH)
            assert chinese.language is None, english
            plain = re.sub(r"[a-z]+\.[a-z_]+|token", "", chinese.text)
            assert HAN.search(plain) and not re.search("[a-z]{2}", plain), chinese.text
            numbers = re.findall(r"\d+", english)
            assert sorted(numbers) == sorted(re.findall(r"\d+", chinese.text)), english


def test_a_form_that_comes_back_in_chinese(tmp_path: Path) -> None:
    board = client(place_in(tmp_path))
    board.cookies.set("board_language", ZH)
    page = board.get("/new/grpo?stage.samples_per_prompt=1").text
    assert "stage.samples_per_prompt 的值 1 不可用" in page and "因为 advantage=group" in page
    assert "out of range" not in page
    # the sentence of an option below the fold
    assert "解耦的权重衰减" in page and "Decoupled weight decay" not in page
    english = client(place_in(tmp_path)).get("/new/grpo?stage.samples_per_prompt=1").text
    assert "stage.samples_per_prompt=1 is out of range: expected at least 2" in english


def test_a_message_without_translation_stands_behind_its_options(tmp_path: Path) -> None:
    made = fill(place_in(tmp_path), "sft", {})
    place_problem(made, "data.path and stage.steps hide behind the moon.")
    ((at, _, text),) = View(made, ZH, translator(ZH)).summary()
    assert at == "f-data-path"
    assert text.startswith("请检查 data.path, stage.steps。")
    assert text.endswith("data.path and stage.steps hide behind the moon.")
    place_problem(made, "The moon.")
    assert View(made, ZH, translator(ZH)).summary()[0][2].endswith("The moon.")
