"""Rows as LMSYS's battles and OpenR1's checked solutions have them: read as what they say, or
refused with cures that work.
"""

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.data import DataFormat
from rlhf.data import formats, reading
from rlhf.data.formats import Use
from rlhf.data.reading import DataRequest
from rlhf.types import RowError, UserError
from tests import toys
from tests.labels.test_label_tools import request

Row = dict[str, Any]


def battle(won: str, *turns: tuple[str, str | None, str | None]) -> Row:
    """LMSYS's columns: each turn is (question, answer of a, answer of b)."""
    texts = zip(("prompt", "response_a", "response_b"), zip(*turns, strict=True), strict=True)
    return {
        "id": 30192,
        "model_a": "gpt-x",
        "model_b": "y-13b",
        **{key: json.dumps(list(values)) for key, values in texts},
        **{f"winner_{name}": int(name == won) for name in ("model_a", "model_b", "tie")},
    }


def checked(**columns: Any) -> Row:
    """OpenR1's columns."""
    said = ["<think>\nHm.\n</think>\n2", "<think>\nOh.\n</think>\n3", "Two: 2"]
    return {
        "problem": "What is 1+1?",
        "solution": "Counting gives 2.",
        "answer": "2",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": "u1",
        "is_reasoning_complete": [True, True, True],
        "generations": said,
        "correctness_math_verify": [True, False, True],
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": 2,
        "messages": [
            {"role": "user", "content": "What is 1+1?"},
            {"role": "assistant", "content": said[0]},
        ],
        **columns,
    }


def read(row: Row, use: Use = Use.preference) -> formats.Several:
    found = formats.detect(row, use)
    assert found is not None
    return found.read(row, use)


def sides(several: formats.Several) -> list[tuple[Any, Any]]:
    pairs = [made.value for made in several.pairs]
    return [(pair.chosen[0]["content"], pair.rejected[0]["content"]) for pair in pairs]


# ---- battles ----


@pytest.mark.parametrize("key", ["prompt", "response_a", "response_b"])
def test_a_later_row_without_a_column_is_refused_by_its_name(key: str) -> None:
    whole = battle("model_a", ("q", "a", "b"))
    arena = formats.detect(whole, Use.preference)
    assert arena is not None
    whole.pop(key)
    with pytest.raises(RowError, match=key):
        arena.read(whole, Use.preference)


@pytest.mark.parametrize(
    ("won", "pairs", "position"),
    [("model_a", ("yes\nsir", 'n"o'), 1), ("model_b", ('n"o', "yes\nsir"), 2)],
)
def test_the_winner_of_a_battle_is_chosen(
    won: str, pairs: tuple[str, str], position: int, tmp_path: Path
) -> None:
    """Also out of a CSV file, whose cells are texts; who wrote stays known."""
    row = battle(won, ("Is it [so]?", "yes\nsir", 'n"o'))
    found = formats.detect(row)
    assert found is not None and found.name == "arena"
    path = tmp_path / "train.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    asked = request(path)
    loaded = reading.load(asked, reading.required_sources(asked), Use.preference)
    for several in (read(row), read(json.loads(json.dumps(row)), Use.unpaired)):
        assert sides(several) == [pairs]
        assert several.pairs[0].value.prompt == [{"role": "user", "content": "Is it [so]?"}]
        fields = several.pairs[0].fields
        assert fields == {"id": 30192, "model_a": "gpt-x", "model_b": "y-13b", "position": position}
    assert loaded.records[0].value == several.pairs[0].value


def test_battles_that_give_no_pair_are_set_aside() -> None:
    tie = read(battle("tie", ("Q", "a", "b")))
    assert tie.pairs == [] and tie.set_aside == ["a tie: winner_tie is 1"]
    long = read(battle("model_a", ("Q", "a", "b"), ("More", "c", "d")))
    assert long.pairs == []
    assert long.set_aside == ["2 turns: the last answers do not follow the same conversation"]
    asked = read(battle("model_a", ("Q", "a", "b"), ("More", "c", "d")), Use.prompt)
    assert asked.pairs[0].value == [{"role": "user", "content": "Q"}]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (battle("model_a", ("Q", None, "b")), r"key 'response_a\[0\]': expected text, found null"),
        (battle("nobody", ("Q", "a", "b")), "expected 1 in one of them, found it in 0"),
        (battle("tie", ("Q", "a", "b")) | {"winner_model_a": 1}, "found it in 2"),
        (battle("tie", ("Q", "a", "b")) | {"winner_tie": 0.5}, "'winner_tie': expected 0 or 1"),
        (
            battle("model_a", ("Q", "a", "b")) | {"response_b": '["b", "c"]'},
            "expected as many turns in each, found 1, 1, 2",
        ),
        (
            battle("model_a", ("Q", "a", "b")) | {"response_b": "b"},
            "key 'response_b': expected the turns as a list, or as its JSON text, found text 'b'",
        ),
    ],
)
def test_battles_that_do_not_fit(row: Row, problem: str) -> None:
    with pytest.raises(RowError, match=problem):
        formats.by_name("arena").read(row, Use.preference)


def test_battles_of_plain_texts() -> None:
    row = battle("model_b", ("Q", "a", "b")) | {"prompt": "[1] Q", "response_a": "a"}
    assert sides(read(row | {"response_b": "b"})) == [("b", "a")]


# ---- checked solutions ----


def test_right_solutions_are_preferred_to_wrong_ones() -> None:
    row = checked()
    said = row["generations"]
    several = read(row)
    assert sides(several) == [(said[0], said[1]), (said[2], said[1])]
    assert [made.fields["position"] for made in several.pairs] == [1, 2]
    assert several.pairs[0].fields["answer"] == "2" and several.pairs[0].fields["solution"]
    assert several.set_aside == ["a tie: generations[0] and generations[2] share rank 1"]
    assert "correctness_math_verify" in formats.by_name("rated").note(row)


def test_solutions_that_give_no_pair_are_set_aside() -> None:
    right = read(checked(correctness_math_verify=[True, True, True]))
    assert right.pairs == [] and len(right.set_aside) == 3
    torn = read(checked(correctness_llama=[True, True, True]))
    assert torn.pairs == []
    assert torn.set_aside[0] == (
        "generations[1]: correctness_math_verify and correctness_llama differ"
    )
    with pytest.raises(RowError, match="expected true or false of each of the 3 generations"):
        formats.by_name("rated").read(checked(correctness_math_verify=[True]), Use.preference)


def test_every_cure_of_checked_solutions_works(tmp_path: Path) -> None:
    """As texts to train on the row is ambiguous; whatever the message offers reads it."""
    path = toys.write_jsonl(tmp_path / "rows.jsonl", [checked(uuid=str(i)) for i in range(4)])
    asked = request(path)

    def load(changed: DataRequest) -> list[Any]:
        loaded = reading.load(changed, reading.required_sources(changed), Use.sft)
        return [record.value for record in loaded.records]

    with pytest.raises(UserError, match=r"does not read 'solution'.*'generations'") as error:
        load(asked)
    cures = re.findall(r"data\.(columns|format)=('[^']*'|\w+)", str(error.value))
    assert len(cures) == 3
    texts = []
    for key, value in cures:
        changed = request(path)
        given = yaml.safe_load(value.strip("'"))
        setattr(changed.data, key, DataFormat(given) if key == "format" else given)
        (first, *_) = load(changed)
        texts.append(json.dumps(first))
    assert "Counting gives 2." in texts[0] and '"2"' in texts[1] and "Hm." in texts[2]


# ---- what is not guessed ----


def test_no_cure_makes_sides_of_what_is_none() -> None:
    """A solution and its final answer were offered as chosen and rejected, and an answer that
    nothing judges as a judged one.
    """
    row = {"problem": "What is 1+1?", "solution": "Counting gives 2.", "answer": "It is 2."}
    assert formats.remedies(row, Use.preference) == []
    assert formats.remedies(row, Use.unpaired) == []
    assert len(formats.remedies(row, Use.sft)) == 2
    judged = formats.remedies({**row, "verified": True}, Use.unpaired)
    assert judged == ["data.columns='{prompt: problem, completion: solution, label: verified}'"]
    turns = {key: json.dumps([text]) for key, text in row.items()}
    assert formats.remedies(turns, Use.sft) == []
    named = {"prompt": "Q", "rejected_text": "a b", "response": "c d"}
    assert "chosen: response" in formats.remedies(named, Use.preference)[0]
    alike = {"prompt": "Q", "response_j": "a b", "response_k": "c d"}
    assert "chosen: response_j" in formats.remedies(alike, Use.preference)[0]
