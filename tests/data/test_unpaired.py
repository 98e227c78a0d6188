"""Single answers, each judged good or bad: their formats, and pairs read as two of them."""

import re
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config, DataConfig, RunConfig
from conf.stages import KTOStage, RewardStage
from rlhf.data import formats, reading
from rlhf.data.formats import Use
from rlhf.types import JudgedAnswer, PreferencePair, UserError
from tests.offline.trl_tools import write_rows


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def config(folder: Path, rows: list[dict[str, Any]], stage: Any = None, **data: Any) -> Config:
    path = str(write_rows(folder / "rows.jsonl", rows))
    return Config(
        stage=stage or KTOStage(),
        run=RunConfig(dir=str(folder / "runs"), name="r"),
        data=DataConfig(path=path, **data),
    )


SHAREGPT = {
    "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
    "kto_tag": False,
}


@pytest.mark.parametrize(
    ("row", "name", "expected"),
    [
        (
            {"prompt": "Sky is", "completion": " blue", "label": True},
            "unpaired",
            JudgedAnswer("Sky is", " blue", True),
        ),
        (
            {"prompt": "", "completion": "Sky is green", "label": 0},
            "unpaired",
            JudgedAnswer("", "Sky is green", False),
        ),
        # a CSV cell
        (
            {"prompt": "a", "completion": "b", "label": "True"},
            "unpaired",
            JudgedAnswer("a", "b", True),
        ),
        (
            {"prompt": [user("Hi")], "completion": [bot("Hello")], "label": False},
            "unpaired",
            JudgedAnswer([user("Hi")], [bot("Hello")], False),
        ),
        (SHAREGPT, "sharegpt_unpaired", JudgedAnswer([user("Hi")], [bot("Hello")], False)),
        (
            {"messages": [user("Hi"), bot("Hello")], "label": True},
            "messages_unpaired",
            JudgedAnswer([user("Hi")], [bot("Hello")], True),
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "preference",
            PreferencePair("a", "b", "c"),
        ),
    ],
)
def test_formats(row: dict[str, Any], name: str, expected: object) -> None:
    found = formats.detect(row, Use.unpaired)
    assert found is not None and found.name == name
    assert [made.value for made in found.read(row, Use.unpaired).pairs] == [expected]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        (
            "unpaired",
            {"prompt": "a", "completion": "b", "label": None},
            "key 'label': expected true or false (or 1 or 0), found null",
        ),
        (
            "unpaired",
            {"prompt": "a", "completion": "b", "label": 2},
            "key 'label': expected true or false (or 1 or 0), found a number 2",
        ),
        ("unpaired", {"prompt": "a", "completion": "b", "label": "good"}, "found text 'good'"),
        (
            "unpaired",
            {"prompt": "a", "completion": "b", "lable": True},
            "key 'label': expected, but missing",
        ),
        (
            "unpaired",
            {"prompt": "a", "completion": [bot("b")], "label": True},
            "key 'completion': expected what 'prompt' is (text 'a')",
        ),
        (
            "sharegpt_unpaired",
            SHAREGPT | {"conversations": SHAREGPT["conversations"][:1]},
            "ends with the judged answer, found role 'user'",
        ),  # type: ignore[index]
        (
            "messages_unpaired",
            {"messages": [bot("b")], "label": True},
            "ends with the judged answer",
        ),
    ],
)
def test_rows_that_do_not_fit(name: str, row: dict[str, Any], message: str) -> None:
    convert = formats.by_name(name).unpaired
    assert convert is not None
    with pytest.raises(formats.RowError, match=re.escape(message)):
        convert(row)


def test_answers_of_a_prompt_stay_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 10}", "completion": f"c{i}", "label": i % 3 == 0} for i in range(40)]
    train, held = reading.judged_answers(
        reading.DataRequest.of(config(tmp_path, rows, eval_fraction=0.2))
    )
    assert len(train) + len(held) == 40 and len(held) == 8
    assert not {a.prompt for a in train} & {a.prompt for a in held}
    assert {(a.completion, a.good) for a in [*train, *held]} == {
        (r["completion"], r["label"]) for r in rows
    }


def test_pairs_become_two_answers(tmp_path: Path) -> None:
    rows = [{"chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(10)]
    cfg = config(tmp_path, rows)
    train, held = reading.judged_answers(reading.DataRequest.of(cfg))
    assert len(train) == 18 and [a.good for a in held] == [True, False]
    assert all(str(a.completion).startswith("good") == a.good for a in train)
    data, _ = reading.unpaired_records(reading.DataRequest.of(cfg))
    assert data[0].value == {"completion": train[0].completion, "label": True}
    assert sorted(reading.stage_texts(reading.DataRequest.of(cfg))) == sorted(
        text for row in rows for text in row.values()
    )


def test_a_file_of_single_answers_is_no_file_of_pairs(tmp_path: Path) -> None:
    cfg = config(tmp_path, [{"prompt": "a", "completion": "b", "label": True}] * 3, RewardStage())
    with pytest.raises(UserError, match=r"keys \(prompt, completion, label\) .*unpaired"):
        reading.preference_pairs(reading.DataRequest.of(cfg))


def test_what_kto_can_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"Nearest format: unpaired .*key 'label'",
    ):
        reading.judged_answers(
            reading.DataRequest.of(config(tmp_path, [{"prompt": "a", "completion": "b"}]))
        )
