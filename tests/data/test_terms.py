"""The step terms: whole words, capitals, the longest first, scripts without spaces, and a
dictionary that is refused when it can't be right.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.preparation.annotation import Terms
from rlhf.data.formats import Use
from rlhf.data.prepare.terms import exchange, make_dictionary, terms
from rlhf.types import UserError
from tests import steps

DICTIONARY = make_dictionary(
    {
        "machine learning": ["ML", "statistical learning"],
        "learner": ["learning machine"],
        "GPU": ["graphics card", "video card"],
        "car": ["automobile", "motor car"],
        "机器学习": ["机学", "统计学习"],
        "人工智能": ["人智"],
        "机学会": [],
    },
    "dictionary",
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("An automobile.", "An car."),
        (
            "automobiles, xautomobile, automobile_2 and auto-mobile stay",
            "automobiles, xautomobile, automobile_2 and auto-mobile stay",
        ),
        ("Automobile AUTOMOBILE automobile", "Car CAR car"),
        ("Motor car, Motor Car", "Car, Car"),
        ("a motor car is a car", "a car is a car"),
        # with capitals in the dictionary: as it is written
        ("ML and ml", "machine learning and ml"),
        ("a Graphics Card", "a GPU"),
        # the leftmost, then the longest
        ("statistical learning machine", "machine learning machine"),
        ("learning machine learning", "learner learning"),
        ("machine learning", "machine learning"),
        ("用统计学习训练", "用机器学习训练"),
        ("人智与机学", "人工智能与机器学习"),
        ("机学会", "机学会"),  # protected
        (
            "用ML训练graphics card吧",
            "用machine learning训练GPU吧",
        ),  # Latin words end where Chinese begins
        ("(video card)", "(GPU)"),
        ("vidéo card, video cardé", "vidéo card, video cardé"),
        ("", ""),
    ],
)
def test_exchange(text: str, expected: str) -> None:
    assert exchange(text, DICTIONARY, Counter()) == expected


def test_counts_say_what_was_exchanged() -> None:
    changes: Counter[tuple[str, str]] = Counter()
    exchange("Automobile, motor car, automobile; ML", DICTIONARY, changes)
    assert changes == {
        ("car", "automobile"): 2,
        ("car", "motor car"): 1,
        ("machine learning", "ML"): 1,
    }


def write(folder: Path, text: str) -> Terms:
    (folder / "terms.yaml").write_text(text, encoding="utf-8")
    return Terms(dictionary=str(folder / "terms.yaml"))


def test_the_step_changes_every_text_and_reports_it(tmp_path: Path) -> None:
    options = write(tmp_path, "car: [automobile, auto]\nGPU: graphics card\n")
    rows: list[dict[str, Any]] = [
        {"prompt": "an auto", "chosen": "automobile or auto", "rejected": "bus", "note": "auto"},
        {"prompt": "a bus", "chosen": "b", "rejected": "c"},
        {
            "prompt": [{"role": "user", "content": "Auto?"}],
            "chosen": [{"role": "assistant", "content": "x"}],
            "rejected": "graphics card",
        },
    ]
    ran = steps.run(terms, options, rows, tmp_path / "run")
    assert ran.rows[0] == {
        "prompt": "an car",
        "chosen": "car or car",
        "rejected": "bus",
        "note": "auto",
    }, "other columns stay"
    assert ran.rows[1] == rows[1]
    assert (
        ran.rows[2]["prompt"] == [{"role": "user", "content": "Car?"}]
        and ran.rows[2]["rejected"] == "GPU"
    )
    assert rows[2]["prompt"][0]["content"] == "Auto?", "the given messages are not changed in place"
    assert ran.figures["rows_changed"] == 2 and ran.figures["exchanges"] == 5 and not ran.rejected
    assert ran.figures["terms"] == {
        "car": {"exchanges": 4, "rows": 2, "words": {"auto": 3, "automobile": 1}},
        "GPU": {"exchanges": 1, "rows": 1, "words": {"graphics card": 1}},
    }
    report = [
        json.loads(line)
        for line in (tmp_path / "run" / "terms.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["row"] for line in report] == [1, 3] and "auto -> car" in report[0]["exchanged"]


def test_a_pair_whose_sides_become_equal_is_left_out(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "chosen": "an auto", "rejected": "an automobile"},
        {"prompt": "p", "chosen": "auto", "rejected": "bus"},
    ]
    ran = steps.run(terms, write(tmp_path, "car: [automobile, auto]"), rows, tmp_path)
    assert (
        ran.numbers == [2]
        and "have become the same" in ran.left_out[1]
        and ran.rejected[0][0].columns == rows[0]
    )
    assert ran.figures["rows_changed"] == 1


def test_columns_limit_what_is_changed(tmp_path: Path) -> None:
    write(tmp_path, "car: automobile")
    options = Terms(dictionary=str(tmp_path / "terms.yaml"), columns=["prompt"])
    rows = [{"prompt": "automobile", "chosen": "automobile", "rejected": "x"}]
    assert steps.run(terms, options, rows, tmp_path).rows == [
        {"prompt": "car", "chosen": "automobile", "rejected": "x"}
    ]
    with pytest.raises(ValueError, match=r"columns=\[.note.\] is out of range"):
        Terms(dictionary="x", columns=["note"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("car: [automobile]\nbus: [Automobile]", "'Automobile' stands for 'car' and for 'bus'"),
        ("car: [bus]\nbus: [coach]", "'bus' is a term and another word for 'car'"),
        ("car: [no, yes]", "found False; put it in quotes"),
        ("car: ['']", "found an empty one"),
        ("[car, bus]", "expected a mapping of each term to its other words, found list"),
        ("car: []", "no term has another word"),
        ("", "is empty"),
        ("car: [bus", "not a readable YAML file"),
    ],
)
def test_bad_dictionaries_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        steps.run(terms, write(tmp_path, text), [{"text": "x"}], tmp_path, Use.sft)


def test_a_missing_dictionary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        steps.run(
            terms, Terms(dictionary=str(tmp_path / "none.yaml")), [{"text": "x"}], tmp_path, Use.sft
        )


plain = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)


@settings(deadline=None, max_examples=200)
@given(plain)
def test_texts_without_a_word_of_the_dictionary_stay(text: str) -> None:
    changes: Counter[tuple[str, str]] = Counter()
    new = exchange(text, DICTIONARY, changes)
    assert (new == text) == (not changes)
    if not any(
        word in text.lower()
        for word in (
            "ml",
            "learning",
            "card",
            "automobile",
            "motor car",
            "机学",
            "统计学习",
            "人智",
        )
    ):
        assert new == text


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.sampled_from(
            ["automobile", "bus", "ML", "统计学习", "人", "graphics card", "Motor car", "é"]
        ),
        max_size=8,
    )
)
def test_a_second_pass_finds_nothing(words: list[str]) -> None:
    once = exchange(", ".join(words), DICTIONARY, Counter())
    changes: Counter[tuple[str, str]] = Counter()
    assert exchange(once, DICTIONARY, changes) == once and not changes
    assert "automobile" not in once and "统计学习" not in once
