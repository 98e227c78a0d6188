"""What a message may hold beside role and content: read from every spelling, refused or counted,
shown to templates, masked, written, and read again.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.choices import FileKind
from conf.data import DataTarget
from conf.schema import Config, DataConfig, RunConfig
from conf.stages import KTOStage, OnlineStage, PreferenceStage, SFTStage
from rlhf.data import files, formats, reading
from rlhf.data.converting import Seen
from rlhf.data.formats import Use
from rlhf.data.formats.values import columns_of, keys_of, on_messages
from rlhf.data.loading import tell_unread
from rlhf.data.messages import RECORD
from rlhf.data.prepare import items
from rlhf.data.prepare.items import Item
from rlhf.data.rows import RowError
from rlhf.data.writing import convert, write_items
from rlhf.labels.asking import gold_questions
from rlhf.labels.records import as_text
from rlhf.models.encoding import IGNORED, prompt_ids, split_answer
from rlhf.models.loading import train_tokenizer
from rlhf.models.templates import rendered, template_reads, template_text
from rlhf.rows.preferences import encode_preferences
from rlhf.rows.sft import encode_sft_row
from rlhf.types import PICTURE_MARK, PreferencePair, UserError
from tests.offline.trl_tools import records

ASKED = {"role": "user", "content": "How warm is it in Oslo?"}
CALL = {"type": "function", "function": {"name": "warmth", "arguments": {"city": "Oslo"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
OBSERVED = {"role": "tool", "content": "4"}
SAID = {"role": "assistant", "content": "4 degrees."}
TOOL = {"type": "function", "function": {"name": "warmth", "parameters": {"type": "object"}}}
WHOLE = [ASKED, CALLING, OBSERVED, SAID]


def read(row: dict[str, Any], use: Use = Use.sft) -> Any:
    """The one value of a row, its format detected."""
    found = formats.detect(row, use)
    assert found is not None
    (made,) = found.read(row, use).pairs
    return made.value


def turn(message: dict[str, Any], key: str = "messages") -> dict[str, Any]:
    """A message as it is read."""
    asked = ASKED if key == "messages" else {"from": "human", "value": "x"}
    return read({key: [asked, message, SAID]})["messages"][1]


# ---- reading ----


@pytest.mark.parametrize(
    "message",
    [
        CALLING,
        CALLING | {"content": None},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": [], "tool_calls": json.dumps([CALL])},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "warmth", "arguments": '{"city":"Oslo"}'}}
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "warmth", "arguments": '{"city": "Oslo"}'},
            "tool_calls": None,
        },
        {"role": "assistant", "tool_calls": [{"name": "warmth", "arguments": {"city": "Oslo"}}]},
        {"role": "tool_call", "content": '{"name": "warmth", "arguments": {"city": "Oslo"}}'},
        {"from": "function_call", "value": '[{"name": "warmth", "arguments": {"city": "Oslo"}}]'},
        {"from": "gpt", "value": "", "tool_calls": [CALL]},
    ],
)
def test_a_call_in_every_spelling(message: dict[str, Any]) -> None:
    assert turn(message) == CALLING
    assert turn(message, "conversations") == CALLING


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": "a", "reasoning": "b"}, {"content": "a", "reasoning_content": "b"}),
        ({"content": "a", "thinking": "b"}, {"content": "a", "reasoning_content": "b"}),
        ({"content": "a", "thinking": True}, {"content": "a", "thinking": True}),
        ({"content": "a", "reasoning_content": ""}, {"content": "a"}),
        (
            {"content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]},
            {"content": "a b"},
        ),
        (
            {"content": [{"type": "reasoning", "value": "b"}, {"type": "text", "value": "a"}]},
            {"content": "a", "reasoning_content": "b"},
        ),
        ({"content": "a", "weight": 0}, {"content": "a", "train": False}),
        ({"content": "a", "weight": 1.0, "loss": True}, {"content": "a", "train": True}),
        ({"content": "a", "loss": False}, {"content": "a", "train": False}),
        ({"content": "a", "training": False}, {"content": "a", "train": False}),
        ({"content": "a", "loss": None, "name": "n"}, {"content": "a", "name": "n"}),
        ({"content": "a", "model": {"x": 1}, "note": None}, {"content": "a", "model": {"x": 1}}),
        ({"content": "", "images": []}, {"content": ""}),
    ],
)
def test_what_a_message_holds(message: dict[str, Any], expected: dict[str, Any]) -> None:
    assert turn({"role": "assistant", **message}) == {"role": "assistant", **expected}
    value = {"value" if key == "content" else key: held for key, held in message.items()}
    told = turn({"from": "gpt", **value}, "conversations")
    assert told == {"role": "assistant", **expected}


@pytest.mark.parametrize("speaker", ["observation", "tool", "function", "tool_response"])
def test_what_a_function_gave_back(speaker: str) -> None:
    message = {"from": speaker, "value": "4", "tool_call_id": "c1", "name": "warmth"}
    expected = OBSERVED | {"tool_call_id": "c1", "name": "warmth"}
    assert turn(message, "conversations") == expected
    message = {"role": speaker, "content": "4", "tool_call_id": "c1", "name": "warmth"}
    assert turn(message) == expected


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": None}, ["messages[1]", "'content'", "null"]),
        ({"content": "a", "weight": 0.5}, ["messages[1]", "'weight'", "0.5"]),
        ({"content": "a", "weight": "1"}, ["messages[1]", "'weight'", "'1'"]),
        ({"content": "a", "weight": 0, "loss": True}, ["'weight'", "'loss'"]),
        ({"content": "a", "images": ["x.jpg"]}, ["messages[1]", "pictures", "answer"]),
        ({"content": [{"type": "image", "image": "x"}]}, ["messages[1]", "pictures", "answer"]),
        ({"content": [{"type": "image", "hint": 1}]}, ["content[0]", "'hint'"]),
        ({"content": [{"type": "video"}]}, ["content[0]", "videos", "'video'"]),
        ({"content": [{"type": "text", "text": "a", "audio": "x"}]}, ["content[0]", "'audio'"]),
        ({"content": "a", "image_url": "x"}, ["messages[1]", "'image_url'", "pictures"]),
        ({"content": "a", "videos": ["x.mp4"]}, ["messages[1]", "'videos'", "sounds"]),
        ({"content": [{"type": "tool_use", "id": "x"}]}, ["content[0]", "'tool_use'"]),
        ({"content": [{"type": "text", "text": "a", "hint": 1}]}, ["content[0]", "'hint'"]),
        ({"content": "a", "reasoning": "b", "thinking": "c"}, ["'reasoning'", "'thinking'"]),
        ({"content": "", "tool_calls": [{"name": "f", "arguments": "{"}]}, ["arguments", "'{'"]),
        ({"content": "", "tool_calls": [{"name": "f", "arguments": [1]}]}, ["arguments"]),
        ({"content": "", "tool_calls": [{"arguments": {}}]}, ["tool_calls[0]", "name"]),
        ({"content": "", "tool_calls": [CALL | {"type": "custom"}]}, ["type", "'custom'"]),
        ({"content": "", "tool_calls": [CALL], "function_call": {"name": "f"}}, ["function_call"]),
        ({"content": "a", "tool_call_id": 3}, ["'tool_call_id'", "3"]),
        ({"content": "a", "value": "b"}, []),
    ],
)
def test_messages_that_are_refused(message: dict[str, Any], words: list[str]) -> None:
    if not words:  # a key of its own beside content
        assert turn({"role": "assistant", **message})["value"] == "b"
        return
    with pytest.raises(RowError) as error:
        turn({"role": "assistant", **message})
    for word in words:
        assert word in str(error.value)


def test_a_call_of_a_user_and_two_speakers_are_refused() -> None:
    with pytest.raises(RowError, match="tool_calls"):
        turn(ASKED | {"tool_calls": [CALL]})
    both = {"from": "gpt", "value": "a", "role": "assistant", "content": "a"}
    assert turn(both, "conversations") == {"role": "assistant", "content": "a"}
    with pytest.raises(RowError, match=r"'content' and 'value'"):
        turn(both | {"content": "b"}, "conversations")


MEDIA = [
    {"messages": [ASKED, SAID], "audios": ["a.wav"]},
    {"conversations": [{"from": "human", "value": "<video>x"}, {"from": "gpt", "value": "y"}]}
    | {"video": "a.mp4"},
    {"prompt": "x", "completion": "y", "video": {"path": "v.mp4"}},
]


@pytest.mark.parametrize("row", MEDIA)
@pytest.mark.parametrize("use", [Use.sft, Use.prompt])
def test_rows_with_videos_are_refused_whatever_they_are_read_for(
    row: dict[str, Any], use: Use
) -> None:
    with pytest.raises(RowError, match="videos and sounds are not read"):
        read(row, use)


def test_a_conversation_of_which_no_turn_trains_is_refused() -> None:
    silent = SAID | {"weight": 0}
    with pytest.raises(RowError, match="'messages'"):
        read({"messages": [ASKED, silent]})
    with pytest.raises(RowError, match="'completion'"):
        read({"prompt": [ASKED], "completion": [silent]})
    assert read({"messages": [ASKED, silent]}, Use.prompt) == [ASKED]
    with pytest.raises(RowError, match="'chosen'"):
        read({"prompt": [ASKED], "chosen": [silent], "rejected": [SAID]}, Use.preference)
    with pytest.raises(RowError, match="'messages'"):
        read({"messages": [ASKED, silent], "label": True}, Use.unpaired)


@pytest.mark.parametrize("tools", [[], "", None, "[]", "null"])
def test_no_tools(tools: Any) -> None:
    assert read({"messages": [ASKED, SAID], "tools": tools}) == {"messages": [ASKED, SAID]}
    assert read({"prompt": "a", "completion": "b", "tools": tools}) == {
        "prompt": "a",
        "completion": "b",
    }


@pytest.mark.parametrize(
    "column",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"tools": [TOOL["function"]]},
        {"tools": TOOL},
        {"tools": "[]", "functions": [TOOL["function"]]},
        {"tools": [TOOL | {"function": TOOL["function"] | {"description": None}}]},
    ],
)
def test_tools_go_with_the_row_whatever_it_is_read_for(column: dict[str, Any]) -> None:
    assert read({"messages": WHOLE, **column})["tools"] == [TOOL]
    pair = {"prompt": [ASKED], "chosen": [CALLING], "rejected": [SAID], **column}
    assert read(pair, Use.preference).tools == [TOOL]
    judged = {"prompt": [ASKED], "completion": [CALLING], "label": True, **column}
    assert read(judged, Use.unpaired).tools == [TOOL]
    (made,) = formats.by_name("messages").read({"messages": WHOLE, **column}, Use.prompt).pairs
    assert made.fields["tools"] == [TOOL]


@pytest.mark.parametrize("tools", ["hammer", 3, [3], ["{"]])
def test_tools_that_are_none(tools: Any) -> None:
    with pytest.raises(RowError, match="tools"):
        read({"messages": [ASKED, SAID], "tools": tools})


def test_tools_beside_texts_are_refused_and_those_in_the_system_message_left_out() -> None:
    with pytest.raises(RowError, match="'tools'"):
        read({"prompt": "a", "completion": "b", "tools": [TOOL]})
    row = {"messages": [{"role": "system", "content": "<tools>[]</tools>"}, ASKED, SAID]}
    several = formats.by_name("messages").read(row | {"tools": [TOOL]}, Use.sft)
    assert several.pairs[0].value == row
    assert len(several.notes) == 1 and "tools" in several.notes[0]


# ---- rows of published data sets ----


def test_openai_and_xlam() -> None:
    row = {
        "input": {"messages": [ASKED], "tools": [TOOL], "parallel_tool_calls": True},
        "preferred_output": [CALLING | {"content": None}],
        "non_preferred_output": [SAID],
    }
    pair = read(row, Use.preference)
    assert pair == PreferencePair([ASKED], [CALLING], [SAID], tools=[TOOL])
    (made,) = formats.by_name("openai_preference").read(row, Use.prompt).pairs
    assert made.value == [ASKED]
    assert made.fields["tools"] == [TOOL] and made.fields["parallel_tool_calls"] is True
    row = {
        "query": ASKED["content"],
        "answers": json.dumps([CALL["function"]]),
        "tools": json.dumps([TOOL["function"]]),
    }
    assert read(row) == {"messages": [ASKED, CALLING], "tools": [TOOL]}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, SAID], "rejected_messages": [ASKED, CALLING]},
        {"chosen_messages": [ASKED, SAID], "rejected_messages": [ASKED, CALLING]},
        {"messages": [ASKED], "chosen_messages": [SAID], "rejected_messages": [CALLING]},
        {
            "messages": [ASKED],
            "chosen_messages": [ASKED, SAID],
            "rejected_messages": [ASKED, CALLING],
        },
    ],
)
def test_sides_as_conversations(row: dict[str, Any]) -> None:
    assert formats.detect(row) is formats.detect(row, Use.preference)
    assert read(row, Use.preference) == PreferencePair([ASKED], [SAID], [CALLING])
    with pytest.raises(RowError, match="rejected_messages"):
        read(row | {"rejected_messages": [SAID, ASKED, CALLING]}, Use.preference)


def test_sides_as_texts_beside_a_sharegpt_conversation() -> None:
    row = {"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": "c"}
    row |= {"system": "s", "history": []}
    pair = read(row, Use.preference)
    system = {"role": "system", "content": "s"}
    assert pair.prompt == [system, {"role": "user", "content": "a"}]
    assert (pair.chosen[0]["content"], pair.rejected[0]["content"]) == ("b", "c")


def test_a_system_column_stands_before_messages_once() -> None:
    system = {"role": "system", "content": "s"}
    assert read({"messages": [ASKED, SAID], "system": "s"})["messages"][0] == system
    assert read({"messages": [system, ASKED, SAID], "system": "s"})["messages"][0:2] == [
        system,
        ASKED,
    ]
    with pytest.raises(RowError, match="'system'"):
        read({"messages": [system, ASKED, SAID], "system": "other"})


# ---- templates, masks and prompts ----


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    out = train_tokenizer([json.dumps([WHOLE, TOOL]), "tool_call think tools"], 400, 2048)
    out.chat_template = template_text("hermes")
    return out


def rows_of(tmp_path: Path, rows: list[dict[str, Any]], stage: Any) -> reading.DataRequest:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run, data = RunConfig(dir=str(tmp_path / "runs"), name="r"), DataConfig(path=str(path))
    return reading.DataRequest.of(Config(stage=stage, run=run, data=data))


def trained(tokenizer: Any, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != IGNORED])


def test_sft_trains_calls_and_no_answer_of_a_function(tokenizer: Any, tmp_path: Path) -> None:
    silent = {"role": "assistant", "content": "Wrong.", "weight": 0}
    thinking = SAID | {"reasoning": "It is cold."}
    row = {"messages": [ASKED, silent, *WHOLE[:3], thinking], "tools": [TOOL]}
    other = {"messages": [ASKED, SAID]}
    rows = reading.sft_rows(rows_of(tmp_path, [row, other], SFTStage()))
    (with_tools,) = [r for side in rows for r in side if "tools" in r]
    ((ids, labels),) = encode_sft_row(tokenizer, with_tools, completion_only=True)
    eos = tokenizer.eos_token
    assert trained(tokenizer, labels) == (
        '<tool_call>\n{"name": "warmth", "arguments": {"city": "Oslo"}}\n</tool_call>'
        f"{eos}<think>\nIt is cold.\n</think>\n\n4 degrees.{eos}"
    )
    text = tokenizer.decode(ids)
    assert json.dumps(TOOL) in text and "<tool_response>\n4\n</tool_response>" in text
    ((_, everything),) = encode_sft_row(tokenizer, with_tools, completion_only=False)
    assert "Wrong." in text and "Wrong." not in trained(tokenizer, everything)


def test_sides_of_pairs_and_judged_answers_hold_their_calls(tokenizer: Any, tmp_path: Path) -> None:
    pairs = [
        {"prompt": [ASKED], "chosen": [CALLING], "rejected": [SAID], "tools": [TOOL]},
        {"prompt": [SAID, ASKED], "chosen": [SAID], "rejected": [CALLING], "tools": [TOOL]},
    ]
    chosen, rejected = reading.preference_pairs(rows_of(tmp_path, pairs, PreferenceStage()))
    rows = [
        {"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected, "tools": p.tools}
        for p in [*chosen, *rejected]
    ]
    encoded = encode_preferences(
        tokenizer, records(rows), ("chosen", "rejected"), name="training", max_length=2048
    )
    for row in encoded:
        sides = {tokenizer.decode(row["chosen_ids"]), tokenizer.decode(row["rejected_ids"])}
        assert any("<tool_call>" in side and '"Oslo"' in side for side in sides)
        assert '"warmth"' in tokenizer.decode(row["prompt_ids"])
    judged = reading.judged_answers(rows_of(tmp_path, pairs, KTOStage()))
    assert all(answer.tools == [TOOL] for side in judged for answer in side)


def test_prompts_show_their_tools(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": [ASKED], "tools": [TOOL]}, {"prompt": [ASKED]}]
    request = rows_of(tmp_path, rows, OnlineStage())
    both = reading.distinct_prompts(request, None)
    prompts = reading.tokenised(tokenizer, both, request)
    assert [prompt.tools for prompt in prompts] == [[TOOL], None]
    assert list(prompts[0].token_ids) == prompt_ids(tokenizer, [ASKED], [TOOL])
    assert json.dumps(TOOL) in prompts[0].text and json.dumps(TOOL) not in prompts[1].text
    assert prompts[0].fields["tools"] == [TOOL]
    assert prompts[0].id != prompts[1].id


def test_keys_that_nothing_reads_are_named_with_their_first_row(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = {"messages": [ASKED | {"weight": 1}, SAID | {"source": "web"}]}
    request = rows_of(tmp_path, [{"messages": [ASKED, SAID]}, odd, odd], SFTStage())
    reading.sft_rows(request)
    tell_unread(request.keys, tokenizer, "sft")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2
    assert sum("'source'" in text for text in told) == 1
    assert sum("'train (true, in a turn of role user)'" in text for text in told) == 1
    assert all("2 rows" in text and "rows.jsonl, row 2" in text for text in told)


def test_a_template_that_reads_no_calls_is_refused_for_rows_with_calls(tokenizer: Any) -> None:
    deaf = train_tokenizer(["x"], 300, 64)
    deaf.chat_template = template_text("chatml")
    keys = Seen()
    keys.add(keys_of({"messages": WHOLE}, {}), "rows.jsonl, row 1")
    tell_unread(keys, tokenizer, "sft")
    with pytest.raises(UserError, match="tool_calls"):
        tell_unread(keys, deaf, "sft")


# ---- writing ----


@pytest.mark.parametrize("to", [DataTarget.trl, DataTarget.messages, DataTarget.sharegpt])
def test_targets_that_hold_everything(to: DataTarget) -> None:
    thinking = SAID | {"reasoning_content": "b", "train": False, "source": "web"}
    columns = {"messages": [ASKED, thinking, *WHOLE], "tools": [TOOL], "own": 1}
    written, notes = convert(Use.sft, columns, to)
    assert not notes
    assert read(written[0]) | {"own": 1} == columns
    if to is DataTarget.sharegpt:
        turns = written[0]["conversations"]
        assert [one["from"] for one in turns[2:]] == [
            "human",
            "function_call",
            "observation",
            "gpt",
        ]
        assert json.loads(turns[3]["value"]) == CALL["function"]
        assert json.loads(written[0]["tools"]) == [TOOL]
    pair = {"prompt": [ASKED], "chosen": [CALLING], "rejected": [thinking | {"train": True}]}
    written, notes = convert(Use.preference, pair | {"tools": [TOOL]}, to)
    assert not notes
    value = read(written[0], Use.preference)
    assert columns_of(value, {}) == pair | {"tools": [TOOL]}


@pytest.mark.parametrize(
    ("to", "noted"),
    [(DataTarget.alpaca, ["reasoning_content"]), (DataTarget.alpaca_eval, ["reasoning_content"])],
)
def test_targets_that_hold_texts_alone(to: DataTarget, noted: list[str]) -> None:
    columns = {"messages": [ASKED, SAID | {"reasoning_content": "b"}]}
    written, notes = convert(Use.sft, columns, to)
    assert written[0]["output"] == SAID["content"]
    assert all(any(name in note for note in notes) for name in noted)
    with pytest.raises(RowError, match=r"messages\[1\].tool_calls"):
        convert(Use.sft, {"messages": WHOLE}, to)


def test_prompt_and_completion_become_a_conversation_that_trains_the_same(tokenizer: Any) -> None:
    columns = {"prompt": [ASKED, SAID, ASKED], "completion": [SAID]}
    written, _ = convert(Use.sft, columns, DataTarget.messages)
    expected = encode_sft_row(tokenizer, columns, completion_only=True)
    assert encode_sft_row(tokenizer, read(written[0]), completion_only=True) == expected


def test_a_parquet_file_gives_no_call_the_arguments_of_another(tmp_path: Path) -> None:
    other = {"type": "function", "function": {"name": "now", "arguments": {"zone": ["a", 1]}}}
    rows = [
        {"messages": [ASKED, CALLING, OBSERVED, SAID], "tools": [TOOL]},
        {"messages": [ASKED, SAID, ASKED, CALLING | {"tool_calls": [other, CALL]}]},
    ]
    given_items = [Item(row, "in.jsonl", number) for number, row in enumerate(rows, start=1)]
    path, refused = tmp_path / "rows.parquet", list[str]()
    written = write_items(
        iter(given_items),
        Use.sft,
        DataTarget.trl,
        path,
        lambda item, reason: refused.append(reason),
        FileKind.parquet,
    )
    assert not written.notes and not refused
    assert [read(row) for row in files.read_rows(path)] == rows


# ---- where people and scorers read texts ----


def test_a_turn_as_text_for_people() -> None:
    turn = CALLING | {"reasoning_content": "Ask.", "content": "One moment."}
    call = json.dumps(CALL["function"])
    said = f"<think>\nAsk.\n</think>\nOne moment.\n<tool_call>\n{call}\n</tool_call>"
    assert as_text([ASKED, turn]) == f"user: {ASKED['content']}\n\nassistant: {said}"
    assert split_answer([ASKED], [turn]) == ([ASKED], said)


def test_rows_that_differ_in_their_calls_are_no_duplicates_and_their_texts_are_cleaned() -> None:
    other = CALLING | {"tool_calls": [{**CALL, "function": CALL["function"] | {"name": "cold"}}]}
    first, second = ({"messages": [ASKED, turn]} for turn in (CALLING, other))
    assert items.joined(first) != items.joined(second)
    shouted = items.replace_texts(
        {"messages": [ASKED, CALLING, SAID | {"reasoning_content": "b"}]},
        lambda where, text: text.upper(),
    )
    _, turn, said = shouted["messages"]
    assert turn["tool_calls"][0]["function"] == {"name": "warmth", "arguments": {"city": "OSLO"}}
    assert said["reasoning_content"] == "B" and turn["content"] == ""
    names = [where for where, _ in items.parts({"messages": [ASKED, CALLING]})]
    assert names == ["messages[0]", "messages[1].tool_calls[0].function.arguments.city"]


def test_texts_for_a_tokenizer_hold_calls_and_tools() -> None:
    texts = formats.texts_in({"messages": [ASKED, CALLING | {"note": "x"}], "tools": [TOOL]})
    assert ASKED["content"] in texts and json.dumps(CALL["function"]) in texts
    assert any("warmth" in text for text in texts)


def test_gold_pairs_with_tools_are_left_out() -> None:
    pair = PreferencePair([ASKED], [SAID], [SAID | {"content": "5"}], tools=[TOOL])
    questions, left_out = gold_questions([pair], size=2, chat=True, with_tools={False})
    assert not questions and len(left_out) == 1 and "tools" in next(iter(left_out))


def test_reasoning_under_the_name_that_a_template_reads(tokenizer: Any) -> None:
    thinker = train_tokenizer([json.dumps(WHOLE)], 300, 512)
    thinker.chat_template = (
        "{%- for message in messages -%}{%- if message.thinking is defined -%}"
        "{{- '(' + message.thinking + ')' -}}{%- endif -%}{{- message['content'] + eos_token -}}"
        "{%- endfor -%}"
    )
    turn = SAID | {"reasoning_content": "Cold."}
    assert template_reads(thinker, "reasoning_content")
    assert "(Cold.)4 degrees." in rendered(thinker, [ASKED, turn], generation_prompt=False)
    switch = "{%- set thinking = true -%}{{- messages[0]['content'] -}} tool_calls"
    thinker.chat_template = switch
    assert not template_reads(thinker, "reasoning_content")
    assert not template_reads(thinker, "tool_calls") and template_reads(tokenizer, "tool_calls")


# ---- any message ----

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(0, 1) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)
READ = st.fixed_dictionaries(
    {},
    optional={
        "weight": st.sampled_from([1, None, True]),
        "loss": st.sampled_from([True, None]),
        "name": st.sampled_from(["n", "", None]),
        "tool_call_id": st.sampled_from(["c", None]),
        "reasoning_content": st.sampled_from(["r", None]),
        "thinking": st.sampled_from(["r", True, None]),
        "images": st.sampled_from([[], None]),
    },
)
CALLED = st.sampled_from(
    [
        {},
        {"tool_calls": []},
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"function_call": {"name": "f", "arguments": "{}"}, "tool_calls": None},
    ]
)
REFUSED = st.sampled_from(
    [
        {"weight": 0.5},
        {"weight": 0, "loss": True},
        {"tool_call_id": 3},
        {"images": [{"path": "x"}]},
        {"thinking": "other"},
        {"tool_calls": "x"},
        {"content": 3},
        {"content": [{"type": "image"}]},
    ]
)
EXTRA = st.dictionaries(st.text(min_size=1, max_size=6), ANYTHING, max_size=3)
CONTENT = st.sampled_from(["a", "", [{"type": "text", "text": "a"}]])


@st.composite
def any_messages(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A conversation with further keys; one of four has something that is refused."""
    roles = draw(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=3))
    out = []
    for role in [*roles, "user", "assistant"]:
        message = {**draw(EXTRA), **draw(READ), "role": role, "content": draw(CONTENT)}
        if role == "assistant":
            message |= draw(CALLED)
        out.append(message)
    if draw(st.integers(0, 3)) == 0:
        out[draw(st.integers(0, len(out) - 1))].update(draw(REFUSED))
    if draw(st.booleans()):
        flags = out[0].keys() & {"weight", "loss"}
        out[0].update(dict.fromkeys(flags, 0))
    return out


def says(value: Any) -> bool:
    return value is not None and value not in ("", [], {}, ())


@given(messages=any_messages(), form=st.sampled_from(["messages", "sharegpt", "openai"]))
@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
def test_every_key_is_carried_refused_or_counted(messages: list[dict[str, Any]], form: str) -> None:
    account_for(messages, form)


@pytest.mark.full
@given(messages=any_messages(), form=st.sampled_from(["messages", "sharegpt", "openai"]))
@settings(deadline=None, max_examples=5000, suppress_health_check=list(HealthCheck))
def test_every_key_is_carried_refused_or_counted_5000_times(
    messages: list[dict[str, Any]], form: str
) -> None:
    account_for(messages, form)


def account_for(messages: list[dict[str, Any]], form: str) -> None:
    """Read a conversation in one of the three forms, and find every key of it again."""
    use, row = Use.sft, {"messages": messages, "tools": [TOOL]}
    if form == "sharegpt":
        renamed = {"role": "from", "content": "value"}
        turns = [{renamed.get(k, k): v for k, v in m.items()} for m in messages]
        row = {"conversations": turns, "tools": json.dumps([TOOL])}
    if form == "openai":
        use = Use.preference
        row = {
            "input": {"messages": messages[:-1], "tools": [TOOL]},
            "preferred_output": messages[-1:],
            "non_preferred_output": [{"role": "assistant", "content": "another"}],
        }
    found = formats.detect(row, use)
    assert found is not None
    try:
        (made,) = found.read(row, use).pairs
    except RowError:
        return
    value = made.value
    given_back = value["messages"] if use is Use.sft else [*value.prompt, *value.chosen]
    assert (value["tools"] if use is Use.sft else value.tools) == [TOOL]
    assert len(given_back) == len(messages)
    counted = keys_of(made.value, made.fields)
    for before, after in zip(messages, given_back, strict=True):
        accounted(before, after, counted)
    for to in (DataTarget.messages, DataTarget.sharegpt, DataTarget.trl):
        written, notes = convert(use, columns_of(value, {}), to)
        again = on_messages(read(written[0], use), with_objects)
        assert again == value or notes


def with_objects(message: Any) -> Any:
    """A message whose pictures are objects, where a format has their paths."""
    if "images" not in message:
        return message
    named = [one if isinstance(one, dict) else {"path": one} for one in message["images"]]
    return {**message, "images": named}


def accounted(before: dict[str, Any], after: dict[str, Any], counted: set[str]) -> None:
    """Every key of a message that says something is in the message that it became."""
    assert after["role"] == before["role"]
    shown = before.get("images") or []
    assert after.get("images", []) == shown
    said = "a" if isinstance(before["content"], list) else before["content"] or ""
    assert after["content"] == PICTURE_MARK * len(shown) + said
    flags = {bool(before[k]) for k in ("weight", "loss", "train") if says(before.get(k))}
    assert ({after["train"]} if "train" in after else set()) == flags
    if True in flags and before["role"] != "assistant":
        assert any(key.startswith("train") for key in counted)
    reasons = {
        before[k] for k in ("reasoning_content", "thinking") if isinstance(before.get(k), str)
    }
    assert ({after["reasoning_content"]} if "reasoning_content" in after else set()) == reasons
    called = says(before.get("tool_calls")) or says(before.get("function_call"))
    assert ("tool_calls" in after) == called
    spoken = {"weight", "loss", "train", "reasoning_content", "tool_calls", "function_call"}
    for key, value in before.items():
        if key in (*RECORD[:2], *spoken) or not says(value):
            continue
        if key == "thinking" and isinstance(value, str):
            continue
        assert after[key] == value
        assert key in counted
