"""data.system: conversations that begin with no system message get one, whatever they are for."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config, DataConfig, RunConfig
from conf.stages import DataStage, KTOStage, OnlineStage, RewardStage, SFTStage
from rlhf.__main__ import main
from rlhf.data import reading
from rlhf.data.formats.values import with_default_system
from rlhf.data.rows import RowError
from rlhf.types import JudgedAnswer, PreferencePair, UserError
from tests import toys

USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Hello"}
WORSE = {"role": "assistant", "content": "No"}
OWN = {"role": "system", "content": "own"}
GIVEN = {"role": "system", "content": "given"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([USER], [GIVEN, USER]),
        ([OWN, USER], [OWN, USER]),
        ({"messages": [USER, BOT]}, {"messages": [GIVEN, USER, BOT]}),
        (
            {"prompt": [USER], "completion": [BOT]},
            {"prompt": [GIVEN, USER], "completion": [BOT]},
        ),
        (PreferencePair([USER], [BOT], [WORSE]), PreferencePair([GIVEN, USER], [BOT], [WORSE])),
        (
            PreferencePair("", [USER, BOT], [OWN, USER, WORSE]),
            PreferencePair("", [GIVEN, USER, BOT], [OWN, USER, WORSE]),
        ),
        (JudgedAnswer([USER], [BOT], True), JudgedAnswer([GIVEN, USER], [BOT], True)),
        (JudgedAnswer("", [USER, BOT], False), JudgedAnswer("", [GIVEN, USER, BOT], False)),
    ],
)
def test_a_value_begins_with_a_system_message(value: Any, expected: Any) -> None:
    assert with_default_system(value, "given") == expected


@pytest.mark.parametrize("value", ["Hi", {"text": "Hi"}, PreferencePair("Hi", "a", "b")])
def test_texts_have_no_system_message(value: Any) -> None:
    with pytest.raises(RowError, match=r"data\.system"):
        with_default_system(value, "given")


def request(folder: Path, rows: list[dict[str, object]], stage: Any) -> reading.DataRequest:
    path = toys.write_jsonl(folder / "rows.jsonl", rows)
    data = DataConfig(path=str(path), system="given", eval_fraction=0.5)
    run = RunConfig(dir=str(folder / "runs"), name="r")
    return reading.DataRequest.of(Config(stage=stage, run=run, data=data))


def asked(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Hi {number}"}]


def test_rows_of_every_stage_begin_with_it(tmp_path: Path) -> None:
    whole: list[dict[str, object]] = [{"messages": [*asked(i), BOT]} for i in range(4)]
    train, held_out = reading.sft_records(request(tmp_path, whole, SFTStage()))
    assert [row.value["messages"][0] for row in (*train, *held_out)] == [GIVEN] * 4
    answers: dict[str, object] = {"chosen": [BOT], "rejected": [WORSE]}
    pairs = [{"prompt": asked(i), **answers} for i in range(4)]
    train, _ = reading.preference_records(request(tmp_path, pairs, RewardStage()))
    assert train[0].value["prompt"][0] == GIVEN
    judged: list[dict[str, object]] = [
        {"prompt": asked(i), "completion": [BOT], "label": good}
        for i in range(4)
        for good in (True, False)
    ]
    train, _ = reading.unpaired_records(request(tmp_path, judged, KTOStage()))
    assert train[0].value["prompt"][0] == GIVEN
    prompts: list[dict[str, object]] = [{"prompt": asked(i)} for i in range(4)]
    loaded = reading.prompt_records(request(tmp_path, prompts, OnlineStage()))
    assert len(loaded.records) == 2  # the others are held out
    for record in loaded.records:
        assert record.value[0] == GIVEN and record.value[1]["role"] == "user"


def test_rows_of_texts_are_refused_with_their_place(tmp_path: Path) -> None:
    wanted = request(tmp_path, [{"prompt": "Hi", "completion": "Hello"}] * 4, SFTStage())
    with pytest.raises(UserError, match=r"row 1.*data\.system"):
        reading.check_first_rows(wanted)


def test_prepared_rows_have_it(tmp_path: Path) -> None:
    toys.write_jsonl(tmp_path / "rows.jsonl", [{"messages": [USER, BOT]}] * 3)
    arguments = [
        "stage=data",
        "tracking=none",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "data.system=given",
        f"run.dir={tmp_path / 'runs'}",
        "run.name=r",
    ]
    assert main(arguments) == 0
    written = (tmp_path / "runs" / "r" / "data" / "train.jsonl").read_text(encoding="utf-8")
    first = json.loads(written.splitlines()[0])
    messages = first.get("messages") or first["prompt"]
    assert messages[0] == GIVEN
    assert Config(stage=DataStage()).data.system is None
