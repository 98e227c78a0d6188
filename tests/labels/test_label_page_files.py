"""The labelling page as a file, and the labels file, without a browser:
tests/labels/test_label_page.py drives the page.
"""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import LabelKind
from rlhf.labels.records import Judgement, Unreadable, Verdict
from rlhf.labels.targets import page
from rlhf.types import UserError
from tests.labels.page_exports import CHAT, EVIL, ID, Elements, export_of, pairs, rankings

WEB = Path(page.__file__).with_name("web")
SURROGATES = st.characters(categories=("Cs",))
TEXTS = st.text(
    st.one_of(st.characters(), SURROGATES, st.sampled_from("<>&/!-\"'`\\\u2028\u2029\r\n$"))
) | st.sampled_from(["</script>", "<!--<script>", "]]>", "$data", "${data}", EVIL])
PROMPTS = TEXTS | st.lists(
    st.fixed_dictionaries({"role": TEXTS, "content": TEXTS}), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=150)
@given(
    tasks=st.lists(st.tuples(PROMPTS, st.lists(TEXTS, min_size=2, max_size=4)), max_size=3),
    title=TEXTS,
    told=TEXTS,
)
def test_any_text_stays_data(tasks: list[tuple[Any, list[str]]], title: str, told: str) -> None:
    """Whatever texts say: the page has the same elements as an empty one, and its data reads back
    as what went in.
    """
    text = page.render(export_of(tasks, title=title, instructions=told))
    text.encode("utf-8")
    elements = Elements(text)
    empty = Elements(page.render(export_of([])))
    assert [(tag, attrs) for tag, attrs, _ in elements.found] == [
        (tag, attrs) for tag, attrs, _ in empty.found
    ]
    (stored,) = elements.texts("script", id="data")
    data = json.loads(stored)
    assert [(task["prompt"], task["shown"]) for task in data["tasks"]] == tasks
    assert (data["title"], data["instructions"]) == (title, told)
    assert not re.search("[<>&\u2028\u2029]", stored)


def test_page_tells_nothing_that_is_hidden() -> None:
    export = export_of(
        [("a prompt", ["one", "two"]), (CHAT, ["three", "four"])], prelabel=True, overlap=3
    )
    text = page.render(export)
    hidden = ["secret", "7.43", "0.987", "2031", "gold", "chosen_by", "swapped", "policy"]
    stored = Elements(text).texts("script", id="data")[0]
    assert [word for word in hidden if word in stored.lower()] == []
    assert "secret" not in text.lower()
    data = json.loads(stored)
    assert set(data) == {"export", "kind", "title", "instructions", "ratings", "comments", "tasks"}
    assert [set(task) for task in data["tasks"]] == [{"id", "prompt", "shown"}] * 2


def test_texts_are_shown_in_the_recorded_order() -> None:
    export = export_of([("p", ["one", "two", "three"])], kind=LabelKind.ranking)
    turned = type(export.tasks[0])(
        **{name: getattr(export.tasks[0], name) for name in ("id", "prompt", "answers")},
        order=(2, 0, 1),
    )
    shown = page.page_data(
        type(export)(
            **{f: getattr(export, f) for f in export.__dataclass_fields__ if f != "tasks"},
            tasks=(turned,),
        )
    )
    assert shown["tasks"][0]["shown"] == ["three", "one", "two"]


def test_policy_lets_only_its_own_code_and_style_in() -> None:
    elements = Elements(page.render(pairs(1)))
    policy = next(
        attrs["content"] or ""
        for tag, attrs, _ in elements.found
        if tag == "meta" and attrs.get("http-equiv")
    )
    rules = {name: values for name, *values in (rule.split() for rule in policy.split("; "))}

    def hashed(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    scripts = [
        text
        for tag, attrs, texts in elements.found
        for text in ["".join(texts)]
        if tag == "script" and "type" not in attrs
    ]
    assert rules["default-src"] == ["'none'"]
    assert [rules["script-src"]] == [[hashed(text)] for text in scripts]
    assert [rules["style-src"]] == [[hashed(text)] for text in elements.texts("style")]
    assert set(rules) == {
        "default-src",
        "script-src",
        "style-src",
        "base-uri",
        "form-action",
        "require-trusted-types-for",
        "trusted-types",
    }


def test_page_needs_nothing_from_outside_and_has_no_inline_code() -> None:
    elements = Elements(page.render(pairs(2)))
    outside = [
        (tag, attrs)
        for tag, attrs, _ in elements.found
        if {"src", "href", "style", "action", "srcset"} & set(attrs)
    ]
    assert outside == []
    assert [
        (tag, attrs)
        for tag, attrs, _ in elements.found
        if any(name.startswith("on") for name in attrs)
    ] == []
    assert "url(" not in elements.texts("style")[0] and "@import" not in elements.texts("style")[0]


def test_no_text_can_become_markup_or_code() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in sorted(WEB.iterdir())}
    assert {
        "page.html",
        "page.css",
        "labels.js",
        "view.js",
        "prompt.js",
        "page.js",
        "keys.js",
        "server.js",
    } == set(sources)
    way = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new "
        r"Function|DOMParser|createContextualFragment|setHTML|\bfetch\b|import\("
    )
    found = {name: way.findall(text) for name, text in sources.items() if way.search(text)}
    assert found == {"server.js": ["fetch"]}
    assert "fetch(" not in page.render(pairs(1))  # by itself the page sends nothing
    assert "</script" not in "".join(text for name, text in sources.items() if name.endswith(".js"))


def test_a_server_lets_the_page_send_its_labels_and_nothing_else() -> None:
    served = page.Served("Ada", "/annotate/token", None)
    text = page.render(pairs(1), served)
    alone, from_server = page.policy(), page.policy(served)
    script = next(rule for rule in alone.split("; ") if rule.startswith("script-src"))
    rest = [rule for rule in alone.split("; ") if rule != script]
    assert [rule for rule in from_server.split("; ") if rule in rest] == rest
    assert from_server.endswith("; connect-src 'self'") and "connect-src" not in alone
    assert from_server in text and "hand it over yourself" not in text
    data = json.loads(Elements(text).texts("script")[0])
    assert data["server"] == {"annotator": "Ada", "post": "/annotate/token", "kept": None}


def test_prompt_that_can_not_be_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"task {ID}-1: its prompt must be"):
        page.write(export_of([([{"role": "user", "content": None}], ["a", "b"])]), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_write_gives_one_file_named_after_the_export(tmp_path: Path) -> None:
    assert page.write(pairs(1), tmp_path / "out") == [tmp_path / "out" / f"label-{ID}.html"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"label-{ID}.html"]
    assert b"\r" not in (tmp_path / "out" / f"label-{ID}.html").read_bytes()


# ---- the labels file ----


def entry(**changes: Any) -> dict[str, Any]:
    whole = {
        "task": f"{ID}-1",
        "verdict": "left",
        "ranking": [],
        "ratings": [],
        "comment": "",
        "seconds": 2.5,
        "time": "2031-01-01T00:00:00.000Z",
    }
    return {
        k: v
        for k, v in (whole | {"prompt": "p", "shown": ["a", "b"]} | changes).items()
        if v is not ...
    }


def labels_file(folder: Path, *labels: Any, **changes: Any) -> Path:
    place = folder / "labels.json"
    whole = {
        "format": "rlhf-labels",
        "version": 1,
        "export": ID,
        "annotator": "Ada",
        "saved": "2031-01-01T00:00:00Z",
        "labels": list(labels),
    }
    place.write_text(
        json.dumps({k: v for k, v in (whole | changes).items() if v is not ...}), encoding="utf-8"
    )
    return place


def test_read_gives_judgements(tmp_path: Path) -> None:
    place = labels_file(
        tmp_path,
        entry(verdict="tie", comment=EVIL, ratings=[5, None]),
        entry(verdict="ranked", ranking=[[2], [0, 1]], prompt=CHAT, shown=["a", EVIL, "c"]),
        entry(
            verdict="skip",
            seconds=...,
            time=...,
            prompt=...,
            shown=...,
            ranking=...,
            ratings=...,
            comment=...,
        ),
    )
    common: dict[str, Any] = {"task": f"{ID}-1", "annotator": "Ada"}
    timed: dict[str, Any] = {"seconds": 2.5, "time": "2031-01-01T00:00:00.000Z"}
    assert list(page.read(place)) == [
        Judgement(
            **common,
            **timed,
            verdict=Verdict.tie,
            comment=EVIL,
            ratings=(5, None),
            place=f"{place}, label 1",
            prompt="p",
            shown=("a", "b"),
        ),
        Judgement(
            **common,
            **timed,
            verdict=Verdict.ranked,
            ranking=((2,), (0, 1)),
            place=f"{place}, label 2",
            prompt=CHAT,
            shown=("a", EVIL, "c"),
        ),
        Judgement(**common, verdict=Verdict.skip, place=f"{place}, label 3"),
    ]


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("left", "expected an object"),
        (entry(task=7), "task: expected an id"),
        (entry(task=""), "task: expected an id"),
        (entry(verdict="cancelled"), "verdict: expected one of left"),
        (entry(verdict=["left"]), "verdict: expected one of left"),
        (entry(comment=None), "comment: expected a text"),
        (entry(verdict="ranked"), "does not go with verdict ranked"),
        (entry(ranking=[[0], [1]]), "does not go with verdict left"),
        (entry(verdict="ranked", ranking=[[0], [0]]), "at most once"),
        (entry(verdict="ranked", ranking=[[0], [2]]), "at most once"),
        (entry(verdict="ranked", ranking=[[-1], [0]]), "at most once"),
        (entry(verdict="ranked", ranking=[[True], [0]]), "expected lists of places"),
        (entry(verdict="ranked", ranking=[[], [0]]), "expected lists of places"),
        (entry(ratings=[6, 1]), "ratings: expected 1 to 5"),
        (entry(ratings=[True, 1]), "ratings: expected 1 to 5"),
        (entry(ratings=[1]), "ratings: expected 1 to 5"),
        (entry(seconds=-1), "seconds: expected a number"),
        (entry(seconds=float("nan")), "seconds: expected a number"),
        (entry(time="yesterday"), "time: expected ISO 8601"),
        (entry(time=5), "time: expected ISO 8601"),
        (entry(prompt=5), "prompt: expected a text"),
        (entry(shown=["a", 1]), "shown: expected a list of texts"),
    ],
)
def test_bad_label_is_told_and_the_others_are_read(tmp_path: Path, label: Any, reason: str) -> None:
    place = labels_file(tmp_path, label, entry(verdict="right"))
    bad, good = page.read(place)
    assert isinstance(bad, Unreadable) and isinstance(good, Judgement)
    assert bad.place == f"{place}, label 1" and reason in bad.reason
    assert bad.task == (
        label["task"] if isinstance(label, dict) and isinstance(label["task"], str) else ""
    )
    assert good.verdict is Verdict.right


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "format 'other'"),
        ({"format": ...}, "format None"),
        ({"version": 2}, "version 2, expected 1"),
        ({"version": True}, "version True, expected 1"),
        ({"annotator": " "}, "with the annotator's name"),
        ({"annotator": ...}, "annotator None"),
        ({"labels": {}}, "labels is dict"),
    ],
)
def test_other_files_are_refused_at_once(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        page.read(labels_file(tmp_path, **changes))


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"\xff\xfe", b'{"format": "rlhf-labels"', b"[" * 200_000]
)
def test_files_that_are_none_are_refused(tmp_path: Path, content: bytes) -> None:
    place = tmp_path / "labels.json"
    place.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(place))):
        page.read(place)
    with pytest.raises(UserError, match="can't be read"):
        page.read(tmp_path / "none.json")


def test_kinds_of_export_are_told(tmp_path: Path) -> None:
    assert page.page_data(rankings(1, ratings=True, comments=False)) | {"tasks": []} == {
        "export": ID,
        "kind": "ranking",
        "title": "Which answer is better?",
        "instructions": "Read both.\n\nThen choose.",
        "ratings": True,
        "comments": False,
        "tasks": [],
    }
