"""Which columns are read: published data sets in their own shapes, and rows whose columns are not
guessed.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from conf.data import DataFormat, DataTarget
from conf.schema import Config, DataConfig, RunConfig
from conf.stages import OnlineStage, PreferenceStage, RewardStage, SFTStage
from rlhf.data import reading
from rlhf.data.formats import Use, by_name, detect
from rlhf.data.prepare import ingest
from rlhf.data.writing import convert
from rlhf.types import JudgedAnswer, PreferencePair, RowError, UserError

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def bot(text: str) -> Row:
    return {"role": "assistant", "content": text}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


Q, A, B = "Which colour has the sky?", "It is blue.", "It is green."
ASKED, CHAT = [user(Q)], [user(Q), bot(A)]
OTHER = [user(Q), bot(B)]
PAIR = PreferencePair(ASKED, [bot(A)], [bot(B)])
SFT = {"prompt": ASKED, "completion": [bot(A)]}
TOLD = {"prompt": [system("Be brief."), *ASKED], "completion": [bot(A)]}


def graded(pair: PreferencePair, margin: float) -> PreferencePair:
    return PreferencePair(pair.prompt, pair.chosen, pair.rejected, margin)


# a data set's name: (row, what it is by itself, what the row is read as)
SHAPES: dict[str, tuple[Row, Use, Any]] = {
    "OpenOrca": (
        {"id": "1", "system_prompt": "Be brief.", "question": Q, "response": A},
        Use.sft,
        TOLD,
    ),
    "Orca DPO pairs": (
        {"system": "", "question": Q, "chosen": A, "rejected": B},
        Use.preference,
        PAIR,
    ),
    "Dolly": (
        {"instruction": Q, "context": "Look up.", "response": A, "category": "open_qa"},
        Use.sft,
        {"prompt": [user(f"{Q}\n\nLook up.")], "completion": [bot(A)]},
    ),
    "GSM8K": (
        {"question": Q, "answer": "1 + 1 = 2\n#### 2"},
        Use.sft,
        {"prompt": ASKED, "completion": [bot("1 + 1 = 2\n#### 2")]},
    ),
    "MATH": ({"problem": Q, "level": "Level 1", "type": "Algebra", "solution": A}, Use.sft, SFT),
    "NuminaMath": ({"problem": Q, "solution": A, "messages": CHAT}, Use.sft, {"messages": CHAT}),
    "NuminaMath 1.5": ({"problem": Q, "solution": A, "answer": "7"}, Use.sft, SFT),
    "HelpSteer2": (
        {"prompt": Q, "response": A, "helpfulness": 4, "correctness": 3},
        Use.sft,
        {"prompt": Q, "completion": A},
    ),
    "HelpSteer3": (
        {"context": ASKED, "response1": B, "response2": A, "overall_preference": 2},
        Use.preference,
        graded(PAIR, 2.0),
    ),
    "BeaverTails": (
        {"prompt": Q, "response": A, "category": {"violence": False}, "is_safe": True},
        Use.unpaired,
        JudgedAnswer(Q, A, True),
    ),
    "PKU-SafeRLHF": (
        {"prompt": Q, "response_0": B, "response_1": A}
        | {"better_response_id": 1, "safer_response_id": 0},
        Use.preference,
        PreferencePair(Q, A, B),
    ),
    "Nectar": (
        {"prompt": Q, "answers": [{"answer": A, "rank": 1.0}, {"answer": B, "rank": 2.0}]},
        Use.preference,
        PreferencePair(Q, A, B),
    ),
    "SHP": (
        {"history": Q, "human_ref_A": B, "human_ref_B": A, "labels": 0},
        Use.preference,
        PreferencePair(Q, A, B),
    ),
    "WebGPT": (
        {"question": {"dataset": "eli5", "full_text": Q}, "answer_0": A, "score_0": 0.5}
        | {"answer_1": B, "score_1": -0.5, "quotes_0": {"title": ["x"], "extract": ["y"]}},
        Use.preference,
        PAIR,
    ),
    "summarize-from-feedback": (
        {"info": {"post": "Long.", "title": "T", "subreddit": "r"}, "choice": 1}
        | {"summaries": [{"text": B}, {"text": A}]},
        Use.preference,
        PreferencePair("SUBREDDIT: r/r\n\nTITLE: T\n\nPOST: Long.\n\nTL;DR:", A, B),
    ),
    "Capybara": (
        {"source": "s", "conversation": [{"input": Q, "output": A}]},
        Use.sft,
        {"messages": CHAT},
    ),
    "LIMA": ({"conversations": [Q, A], "source": "s"}, Use.sft, {"messages": CHAT}),
    "Magpie": (
        {"instruction": Q, "response": A}
        | {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        Use.sft,
        {"messages": CHAT},
    ),
    "Aya": ({"inputs": Q, "targets": A, "language": "English"}, Use.sft, SFT),
    "Firefly": ({"kind": "Cot", "input": Q, "target": A}, Use.sft, SFT),
    "medical-o1": (
        {"Question": Q, "Complex_CoT": "Light scatters.", "Response": A},
        Use.sft,
        {"prompt": ASKED, "completion": [{**bot(A), "reasoning_content": "Light scatters."}]},
    ),
    "verl": (
        {"data_source": "s", "prompt": ASKED, "reward_model": {"ground_truth": "7"}},
        Use.prompt,
        ASKED,
    ),
    "RLVR": ({"messages": ASKED, "ground_truth": "7", "dataset": "gsm8k"}, Use.prompt, ASKED),
    "UltraFeedback": (
        {"instruction": Q, "models": ["m", "n"], "correct_answers": ["None"]}
        | {
            "completions": [
                {"response": A, "model": "m", "overall_score": 8.0},
                {"response": B, "model": "n", "overall_score": 5.0},
            ]
        },
        Use.preference,
        PAIR,
    ),
    "UltraFeedback, binarised": (
        {"prompt": Q, "messages": CHAT, "chosen": CHAT, "rejected": OTHER},
        Use.preference,
        PAIR,
    ),
    "distilabel, generations": (
        {"instruction": Q, "generations": [B, A], "ratings": [3, 5.0]},
        Use.preference,
        PAIR,
    ),
    "distilabel, pairs": (
        {"system": "", "input": Q, "chosen": A, "rejected": B, "generations": [A, B]}
        | {"ratings": [9, 8]},
        Use.preference,
        PAIR,
    ),
    "distilabel, chats": (
        {"instruction": Q, "chosen": CHAT, "rejected": OTHER},
        Use.preference,
        PAIR,
    ),
    "Open Assistant, trees": (
        {"message_tree_id": "1"}
        | {
            "prompt": {
                "role": "prompter",
                "text": Q,
                "replies": [
                    {"role": "assistant", "text": B, "rank": 1, "replies": []},
                    {"role": "assistant", "text": A, "rank": 0, "replies": []},
                ],
            }
        },
        Use.preference,
        PAIR,
    ),
    "ms-swift": (
        {"system": "Be brief.", "query": Q, "response": A, "history": [["Hi", "Hello"]]},
        Use.sft,
        {
            "prompt": [system("Be brief."), user("Hi"), bot("Hello"), user(Q)],
            "completion": [bot(A)],
        },
    ),
    "Chatbot Arena": (
        {"winner": "model_b", "conversation_a": OTHER, "conversation_b": CHAT, "turn": 1},
        Use.preference,
        PAIR,
    ),
    "Label Studio, JSON-MIN": (
        {"id": 0, "prompt": Q, "answer1": A, "answer2": B, "comparison": [{"selected": "left"}]},
        Use.preference,
        PreferencePair(Q, A, B),
    ),
    "Label Studio, CSV": (
        {"id": "0", "prompt": Q, "answer1": B, "answer2": A, "which": '{"selected": "right"}'},
        Use.preference,
        PreferencePair(Q, A, B),
    ),
    "ms-swift, turns": (
        {"system": "Be brief.", "conversation": [{"human": Q, "assistant": A}]},
        Use.sft,
        {"messages": [system("Be brief."), *CHAT]},
    ),
    "messages without an answer": ({"messages": ASKED, "seed": 3}, Use.prompt, ASKED),
    "a system message beside messages": (
        {"system": "Be brief.", "messages": CHAT},
        Use.sft,
        {"messages": [system("Be brief."), *CHAT]},
    ),
    "capitals": ({"Prompt": Q, "Completion": A}, Use.sft, {"prompt": Q, "completion": A}),
    "capitals of pairs": (
        {"Prompt": Q, "Chosen": A, "Rejected": B},
        Use.preference,
        PreferencePair(Q, A, B),
    ),
    "Alpaca, the question in its input": (
        {"instruction": "", "input": Q, "output": A},
        Use.sft,
        SFT,
    ),
    "Alpaca with an input and its rendering": (
        {
            "instruction": "Add.",
            "input": "2 and 2",
            "output": A,
            "text": f"### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n{A}",
        },
        Use.sft,
        {
            "prompt": [{"role": "user", "content": "Add.\n\n2 and 2"}],
            "completion": [{"role": "assistant", "content": A}],
        },
    ),
    "Alpaca with its rendering": (
        {"instruction": Q, "input": "", "output": A, "text": f"### Q: {Q}\n### A: {A}"},
        Use.sft,
        SFT,
    ),
}


def written(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def data_of(path: Path, row: Row, **options: Any) -> DataConfig:
    return DataConfig(path=written(path, [row] * 3), **options)


@pytest.mark.parametrize("name", SHAPES)
def test_public_data_sets_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    row, use, expected = SHAPES[name]
    data = data_of(tmp_path / "rows.jsonl", row)
    assert ingest.natural_use(data) is use
    found = detect(row)
    assert found is not None
    values = [made.value for made in found.read(row, use).pairs]
    assert values == [expected]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": Q, "response_0": A, "response_1": B}, ["chosen: response_0", "data.kind"]),
        (
            {"question": Q, "response_j": A, "response_k": B},
            ["data.columns='{prompt: question, chosen: response_j, rejected: response_k}'"],
        ),
        ({"question": Q, "context": "Sky.", "answers": {"text": ["blue"]}}, ["'answers'"]),
        ({"prompt": Q, "label": A}, ["'label'"]),
        ({"instruction": Q, "instances": [{"input": "", "output": A}]}, ["'instances'"]),
        ({"Body": "A long story.", "Question": Q, "Answer": 7}, ["'Body'"]),
        ({"prompt": Q, "response": A, "answer": B}, ["completion: response", "completion: answer"]),
        ({"instruction": Q, "question": B, "output": A}, ["'question'"]),
        ({"text": Q, "response": A}, ["'response'"]),
        ({"problem": Q, "generated_solution": A}, ["'generated_solution'"]),
        ({"messages": CHAT, "rejected": B}, ["'rejected'", "data.format=messages"]),
        ({"article": "Long text.", "highlights": "Short text."}, ["prompt: article"]),
    ],
)
def test_a_column_of_content_is_never_passed_over(
    row: Row, named: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UserError) as error:
        ingest.natural_use(data_of(path, row))
    said = str(error.value)
    assert f"{path}, row 1" in said and "expected texts" not in said
    assert [word for word in named if word not in said] == []


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (
            {"message_id": "0", "parent_id": None, "text": "apple", "role": "prompter"},
            ["parent_id", "message_tree"],
        ),
        ({"text": "apple", "label": "COLOUR", "answer": "reject"}, ["'answer'"]),
        ({"text": "apple", "label": False}, ["'label'"]),
        ({"prompt": Q, "response": A, "is_safe": False}, ["'is_safe'", "question_answer"]),
    ],
)
def test_what_was_rejected_is_no_text_to_train_on(
    row: Row, named: list[str], tmp_path: Path
) -> None:
    data = data_of(tmp_path / "rows.jsonl", row)
    request = reading.DataRequest(data, SFTStage(), 0, None)
    with pytest.raises(UserError) as error:
        reading.sft_rows(request)
    assert [word for word in named if word not in str(error.value)] == []


def request_of(tmp_path: Path, stage: Any, rows: list[Row], **options: Any) -> Any:
    data = DataConfig(path=written(tmp_path / "rows.jsonl", rows), **options)
    cfg = Config(stage=stage, run=RunConfig(dir=str(tmp_path), name="r"), data=data)
    return reading.DataRequest.of(cfg)


def test_a_prompts_answers_are_its_fields() -> None:
    """What verifiers and rewards read; its question is not."""
    found = detect({"prompt": Q, "answer": "7", "solution": A}, Use.prompt)
    assert found is not None
    made = found.read({"prompt": Q, "answer": "7", "solution": A}, Use.prompt).pairs[0]
    assert (made.value, made.fields) == (Q, {"answer": "7", "solution": A})
    asked = detect({"prompt": Q, "system": "Be brief."}, Use.prompt)
    assert asked is not None and asked.prompt is not None
    assert asked.prompt({"prompt": Q, "system": "Be brief."}) == [system("Be brief."), *ASKED]


def test_the_reference_answer_of_verl_is_a_field() -> None:
    row = SHAPES["verl"][0]
    made = by_name("verifiable").read(row, Use.prompt).pairs[0]
    assert made.fields["ground_truth"] == "7" and made.fields["data_source"] == "s"


def test_a_users_own_word_is_taken_and_what_it_leaves_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"system": "S", "question": f"q{i}", "chosen": A, "rejected": B} for i in range(6)]
    form = DataFormat.implicit_preference
    train, held = reading.preference_pairs(
        request_of(
            tmp_path,
            RewardStage(),
            [{**row, "chosen": f"{row['question']} {A}"} for row in rows],
            format=form,
        )
    )
    assert [pair.prompt for pair in [*train, *held]] == [""] * 6
    assert "does not read 'question' (6 rows, the first" in caplog.text
    caplog.clear()
    columns = {"prompt": "question"}
    train, held = reading.preference_pairs(
        request_of(tmp_path, RewardStage(), rows, columns=columns)
    )
    assert {pair.prompt[0]["role"] for pair in [*train, *held]} == {"system"}
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not warned, "everything is read"


def test_a_column_that_only_later_rows_have_rejects_those_rows(tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": f"{Q} {i}", "completion": A} for i in range(30)]
    rows[25]["history"] = [["Hi", "Hello"]]
    request = request_of(tmp_path, SFTStage(), rows)
    with pytest.raises(UserError, match=r"row 26: key 'history'"):
        reading.sft_rows(request)
    request = request_of(tmp_path, SFTStage(), rows, max_bad_rows=5)
    train, held = reading.sft_rows(request)
    assert len(train) + len(held) == 29


def test_what_was_taken_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": f"{Q} {i}", "response_0": A, "response_1": B}
        | {"better_response_id": 0, "safer_response_id": 1}
        for i in range(4)
    ]
    reading.preference_pairs(request_of(tmp_path, PreferenceStage(), rows))
    assert "'better_response_id', not safer_response_id" in caplog.text


def test_two_answers_and_a_tie(tmp_path: Path) -> None:
    row = {"prompt": Q, "response_a": A, "response_b": B}
    tie = by_name("compared").read({**row, "winner": "tie (bothbad)"}, Use.preference)
    assert not tie.pairs and len(tie.set_aside) == 1
    with pytest.raises(ValueError, match=r"'winner'.*expected a or b.*'claude'"):
        by_name("compared").read({**row, "winner": "claude"}, Use.preference)


HH = "\n\nHuman: Name a fruit.\n\nAssistant: Pear.\n\nHuman: Another?\n\nAssistant:"
TURNS = [user("Name a fruit."), bot("Pear."), user("Another?")]


def test_transcripts_become_turns_where_that_is_asked_for(tmp_path: Path) -> None:
    row = {"chosen": f"{HH} Apple.", "rejected": f"{HH} Chair."}
    expected = PreferencePair(TURNS, [bot("Apple.")], [bot("Chair.")])
    assert by_name("hh_rlhf_messages").read(row, Use.preference).pairs[0].value == expected
    found = detect(row)
    assert found is not None and found.name == "hh_rlhf", "not by itself"
    pair = {"prompt": HH, "chosen": " Apple.", "rejected": " Chair."}
    rows, notes = convert(Use.preference, pair, DataTarget.messages)
    assert rows == [{"messages": [*TURNS, bot("Apple.")], "rejected_response": "Chair."}]
    assert len(notes) == 1


def test_pictures_inside_a_question_are_refused() -> None:
    row = {"query": f"<img>http://x/y.png</img>{Q}", "response": A}
    with pytest.raises(ValueError, match=r"'query'.*pictures are not read"):
        by_name("question_answer").read(row, Use.sft)


def test_prompts_alone_are_prompts(tmp_path: Path) -> None:
    for row in ({"prompt": Q}, {"prompt": Q, "answer": 7}, {"question": Q, "id": "x"}):
        assert ingest.natural_use(data_of(tmp_path / "rows.jsonl", row)) is Use.prompt
    rows = [{"question": f"{Q} {i}", "answer": str(i)} for i in range(4)]
    request = request_of(tmp_path, OnlineStage(), rows)
    loaded = reading.distinct_prompts(request, None)
    assert [record.fields for record in loaded.records] == [{"answer": str(i)} for i in range(4)]


def test_what_stands_beside_whole_conversations_is_read_or_refused() -> None:
    row: Row = {"question": Q, "chosen": CHAT, "rejected": OTHER}
    form = by_name("question_preference")
    assert form.pair is not None
    assert form.pair(row) == PAIR
    assert form.pair({**row, "system": "Be brief."}).prompt == [system("Be brief."), *ASKED]
    with pytest.raises(RowError, match=r"'question'.*'Is it so"):
        form.pair({**row, "question": "Is it so?"})
    with pytest.raises(RowError, match=r"'context'.*'a storm'"):
        form.pair({**row, "context": "a storm"})
    compared: Row = {"conversation_a": CHAT, "conversation_b": OTHER, "winner": "model_b"}
    sides = by_name("compared").read({**compared, "system": "Be brief."}, Use.preference).pairs
    assert [made.value.prompt for made in sides] == [[system("Be brief."), *ASKED]]
    with pytest.raises(RowError, match=r"'question'.*'Is it so"):
        by_name("compared").read({**compared, "question": "Is it so?"}, Use.preference)


def test_a_chain_of_thought_goes_with_its_answer_or_is_a_field() -> None:
    thought = {**bot(A), "reasoning_content": "Rayleigh"}
    row: Row = {"question": Q, "response": [bot(A)], "reasoning": "Rayleigh"}
    form = by_name("question_answer")
    assert form.read(row, Use.sft).pairs[0].value["completion"] == [thought]
    with pytest.raises(RowError, match=r"'response'.*'reasoning'"):
        form.read({**row, "response": [{**thought, "reasoning_content": "Mie"}]}, Use.sft)
    pair: Row = {"question": Q, "chosen": A, "rejected": B, "reasoning": "Rayleigh"}
    (made,) = by_name("question_preference").read(pair, Use.preference).pairs
    assert made.fields == {"reasoning": "Rayleigh"}


def test_a_column_in_whose_place_a_judgement_has_its_own_is_noted() -> None:
    row: Row = {"question": Q, "answer_0": A, "answer_1": B, "winner": "0", "position": "left"}
    read = by_name("compared").read(row, Use.preference)
    assert read.pairs[0].fields["position"] == 1
    assert len(read.notes) == 1 and "'position'" in read.notes[0]
    assert not by_name("compared").read({**row, "position": 1}, Use.preference).notes


def test_a_row_that_no_format_can_flatten_is_refused_with_its_place(tmp_path: Path) -> None:
    row: Row = {"input": {"messages": ASKED}, "messages": ASKED}
    row |= {"preferred_output": [bot(A)], "non_preferred_output": [bot(B)]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    cfg = Config(stage=RewardStage(), data=DataConfig(path=str(path)))
    with pytest.raises(UserError, match=r"row 1: .*'messages'"):
        reading.preference_pairs(reading.DataRequest.of(cfg))
