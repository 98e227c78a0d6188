"""Pictures in rows: each way in which data files hold them, where they stand in the messages, and
what a row says that can't be used.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from conf.schema import DataConfig
from rlhf.data import llama_factory
from rlhf.data.formats import Use, detect
from rlhf.data.formats.values import pictures_in
from rlhf.data.loading import convert
from rlhf.data.pictures import AT_BEGINNING
from rlhf.types import UserError
from tests.data.drawn import M, address, bot, draw, encoded, read, user, widths, write

IMAGE = {"type": "image"}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


# name: (row, format, the messages' contents, which pictures); {0} is the path of the first picture
FORMATS: dict[str, tuple[dict[str, Any], str, list[str], list[int]]] = {
    "LLaVA": (
        {
            "image": "pics/1.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "A"},
            ],
        },
        "sharegpt",
        [f"{M}\nWhat?", "A"],
        [1],
    ),
    "LLaMA-Factory, alpaca": (
        {
            "instruction": "<image>or <image>?",
            "input": "Say.",
            "output": "A",
            "images": ["pics/1.png", "pics/0.png"],
        },
        "alpaca",
        [f"{M}or {M}?\n\nSay.", "A"],
        [1, 0],
    ),
    "ms-swift": (
        {
            "messages": [user("<image>What?"), bot("A"), user("And <image>?"), bot("B")],
            "images": [{"path": "pics/0.png", "bytes": None}, {"path": "pics/2.png"}],
        },
        "messages",
        [f"{M}What?", "A", f"And {M}?", "B"],
        [0, 2],
    ),
    "ms-swift without a mark": (
        {"messages": [{"role": "system", "content": "S"}, user("What?"), bot("A")]}
        | {"images": ["pics/0.png", "pics/1.png"]},
        "messages",
        ["S", f"{M}{M}What?", "A"],
        [0, 1],
    ),
    "OpenAI, data: addresses": (
        {
            "messages": [
                user(
                    [
                        text("Is "),
                        {"type": "image_url", "image_url": {"url": address(3), "detail": "auto"}},
                        text(" red?"),
                    ]
                ),
                bot([text("A")]),
            ]
        },
        "messages",
        [f"Is {M} red?", "A"],
        [3],
    ),
    "OpenAI, files": (
        {
            "messages": [
                user([{"type": "input_image", "image_url": "pics/1.png"}, text("What?")]),
                bot("A"),
            ]
        },
        "messages",
        [f"{M}What?", "A"],
        [1],
    ),
    "TRL, parts": (
        {
            "prompt": [user([IMAGE, text("What? <image>")])],
            "completion": [bot([text("A")])],
            "images": ["pics/2.png"],
        },
        "prompt_completion",
        [f"{M}What? <image>", "A"],
        [2],
    ),
    "TRL, texts": (
        {"prompt": "What?", "completion": "A", "images": ["pics/2.png"]},
        "prompt_completion",
        [f"{M}What?", "A"],
        [2],
    ),
    "a question and its answer": (
        {"question": "What is it?", "answer": "A pear, I think.", "image": "pics/1.png"},
        "question_answer",
        [f"{M}What is it?", "A pear, I think."],
        [1],
    ),
    "transformers' parts": (
        {
            "messages": [
                user([{**IMAGE, "path": "pics/1.png"}, text("and"), {**IMAGE, "url": address(2)}]),
                bot("A"),
            ]
        },
        "messages",
        [f"{M}and{M}", "A"],
        [1, 2],
    ),
    "our own": (
        {"messages": [user(f"a {M} b") | {"images": ["pics/1.png"]}, bot("A")]},
        "messages",
        [f"a {M} b", "A"],
        [1],
    ),
    "a message's images": (
        {"messages": [user("What?") | {"images": ["pics/1.png", "pics/0.png"]}, bot("A")]},
        "messages",
        [f"{M}{M}What?", "A"],
        [1, 0],
    ),
}


def contents(value: Any) -> list[str]:
    messages = value.get("messages") or [*value["prompt"], *value["completion"]]
    return [message["content"] for message in messages]


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_of_pictures(name: str, tmp_path: Path) -> None:
    row, form, said, shown = FORMATS[name]
    draw(tmp_path)
    found = detect(row)
    assert found is not None and found.name == form
    loaded = read(write(tmp_path / "rows.jsonl", row), store=tmp_path / "store")
    assert loaded.rejected == []
    (record,) = loaded.records
    assert contents(record.value) == said
    assert widths(record.value) == shown
    assert "images" not in record.fields and "image" not in record.fields
    for picture in pictures_in(record.value):
        data = Path(picture["path"]).read_bytes()
        assert Path(picture["path"]).is_absolute()
        assert picture["sha256"] == hashlib.sha256(data).hexdigest()
    assert list(loaded.notes.counts) == ([AT_BEGINNING] if said[-2][:1] == M != _mark(row) else [])


def _mark(row: dict[str, Any]) -> str:
    """What stands for a picture in a row: M where its column has no mark in the texts."""
    written = json.dumps(row, ensure_ascii=False)
    column = row.keys() & {"image", "images"}
    return "" if column and "<image>" not in written and "type" not in written else M


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_parquet_file_with_bytes(form: str, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [user([IMAGE, text("What?")])],
            "chosen": [bot("A")],
            "rejected": [bot("B")],
            "images": [{"bytes": encoded(number, form), "path": None}],
        }
        for number in (0, 3, 3)
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    store = tmp_path / "store"
    loaded = read(path, Use.preference, store)
    assert loaded.rejected == []
    assert [widths(record.value) for record in loaded.records] == [[0], [3], [3]]
    pair = loaded.records[1].value
    assert pair.prompt[0]["content"] == f"{M}What?" and "images" not in pair.chosen[0]
    # written once, under the hash of the bytes
    written = sorted(each.name for each in store.iterdir())
    assert len(written) == 2
    for name in written:
        assert hashlib.sha256((store / name).read_bytes()).hexdigest() == name.split(".")[0]


def test_a_data_set_of_the_datasets_library(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in draw(tmp_path)]
    rows = {"question": ["What?"] * 2, "answer": ["It is a pear."] * 2, "image": names[:2]}
    whole = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    listed = datasets.Dataset.from_dict(
        {**rows, "image": [names[:1], names[1:3]]},
        features=datasets.Features(
            {
                "question": datasets.Value("string"),
                "answer": datasets.Value("string"),
                "image": datasets.List(datasets.Image()),
            }
        ),
    )
    for data, shown in ((whole, [[0], [1]]), (listed, [[0], [1, 2]])):
        folder = tmp_path / f"saved{len(shown[1])}"
        data.save_to_disk(str(folder))
        loaded = read(folder, image_dir=str(tmp_path), store=tmp_path / "store")
        assert loaded.rejected == []
        assert [widths(record.value) for record in loaded.records] == shown
    path = tmp_path / "hub.parquet"
    whole.to_parquet(str(path))  # as a hub has it, its bytes inside
    assert [widths(r.value) for r in read(path).records] == [[0], [1]]


def test_an_entry_of_llama_factorys_registry(tmp_path: Path) -> None:
    draw(tmp_path)
    (tmp_path / "below").mkdir()
    turns = [
        {"who": "me", "says": "<image>What?"},
        {"who": "it", "says": "A"},
    ]
    write(tmp_path / "below/rows.jsonl", {"turns": turns, "pics": ["pics/3.png"]})
    entry = {
        "file_name": "below/rows.jsonl",
        "formatting": "sharegpt",
        "columns": {"messages": "turns", "images": "pics"},
        "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}), encoding="utf-8")
    sources = llama_factory.sources(tmp_path, "mine")
    loaded = convert(sources, Use.sft, DataConfig(), 0, None)
    assert [widths(record.value) for record in loaded.records] == [[3]]
    # media_dir, which may be elsewhere
    elsewhere = llama_factory.sources(tmp_path, "mine", tmp_path / "below")
    (row, reason), *_ = convert(elsewhere, Use.sft, DataConfig(), 0, None).rejected
    assert row.number == 1 and "no such file" in reason and "below" in reason


def test_pictures_of_a_mixed_file_make_all_of_it_conversations(tmp_path: Path) -> None:
    draw(tmp_path)
    rows = [
        {"prompt": "Hi", "completion": "A"},
        {"prompt": "What?", "completion": "B", "images": ["pics/1.png"]},
        {"prompt": "Bye", "completion": "C", "images": []},
    ]
    loaded = read(write(tmp_path / "rows.jsonl", *rows))
    assert [contents(record.value)[0] for record in loaded.records] == ["Hi", f"{M}What?", "Bye"]
    plain = read(write(tmp_path / "plain.jsonl", rows[0], rows[2]))
    assert [record.value["prompt"] for record in plain.records] == ["Hi", "Bye"]


PAIRS: dict[str, dict[str, Any]] = {
    "swift_preference": {
        "messages": [user("<image>What?"), bot("A")],
        "rejected_response": "B",
    },
    "sharegpt_preference": {
        "conversations": [{"from": "human", "value": "<image>What?"}],
        "chosen": {"from": "gpt", "value": "A"},
        "rejected": {"from": "gpt", "value": "B"},
    },
    "alpaca_preference": {"instruction": "<image>What?", "chosen": "A", "rejected": "B"},
    "preference": {"prompt": "<image>What?", "chosen": "A", "rejected": "B"},
    "implicit_preference": {
        "chosen": [user("<image>What?"), bot("A")],
        "rejected": [user("<image>What?"), bot("B")],
    },
}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_have_their_pictures_in_the_prompt(name: str, tmp_path: Path) -> None:
    draw(tmp_path)
    row = PAIRS[name] | {"images": ["pics/2.png"]}
    loaded = read(write(tmp_path / "rows.jsonl", row), Use.preference)
    assert loaded.rejected == [] and [f.name for f in loaded.formats.values()] == [name]
    pair = loaded.records[0].value
    assert [message["content"] for message in pair.prompt] == [f"{M}What?"]
    assert widths(pair.prompt) == [2]
    assert pair.chosen == [bot("A")] and pair.rejected == [bot("B")]
    prompts = read(tmp_path / "rows.jsonl", Use.prompt)
    assert widths(prompts.records[0].value) == [2]


# what is wrong: (row, words of the reason)
ONE = {"prompt": "<image>What?", "completion": "A"}
WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "too few": (ONE | {"prompt": "<image><image>"} | {"images": ["pics/0.png"]}, ["1 pic", "2 ma"]),
    "too many": (ONE | {"images": ["pics/0.png", "pics/1.png"]}, ["2 pictures", "1 marks"]),
    "parts without pictures": ({"messages": [user([IMAGE]), bot("A")]}, ["0 pictures", "1 marks"]),
    "in both": (
        {"messages": [user([{**IMAGE, "image": "pics/0.png"}]), bot("A")]}
        | {"images": ["pics/0.png"]},
        ["in both"],
    ),
    "two columns": (ONE | {"image": "pics/0.png", "images": ["pics/1.png"]}, ["'image'", "one of"]),
    "in an answer": (ONE | {"completion": "<image>"} | {"images": [address()] * 2}, ["answer"]),
    "whole texts": ({"text": "<image> a"} | {"images": ["pics/0.png"]}, ["whole texts"]),
    "a transcript": (
        {"prompt": "\n\nHuman: <image>\n\nAssistant:", "completion": "A"} | {"images": [address()]},
        ["transcript"],
    ),
    "the mark's own character": (
        ONE | {"prompt": f"<image>{M}", "images": [address()]},
        ["U+FFFC"],
    ),
    "missing": (ONE | {"images": ["pics/9.png"]}, ["picture 1", "no such file", "pics/9.png"]),
    "a folder": (ONE | {"images": ["pics"]}, ["another kind"]),
    "outside": (ONE | {"images": ["../secret.png"]}, ["outside", "data.image_dir"]),
    "absolute": (ONE | {"images": ["/etc/hostname"]}, ["outside"]),
    "a link to outside": (ONE | {"images": ["pics/link.png"]}, ["outside"]),
    "links in a circle": (ONE | {"images": ["pics/circle.png"]}, ["no path of a file"]),
    "an address": (ONE | {"images": ["https://a.b/c.png"]}, ["an address", "nothing is fetched"]),
    "another machine's": (ONE | {"images": ["file://host/a.png"]}, ["file:///"]),
    "a text": (ONE | {"images": ["pics/text.png"]}, ["'pics/text.png'", "no PNG"]),
    "cut off": (ONE | {"images": ["pics/cut.png"]}, ["'pics/cut.png'", "damaged or cut off"]),
    "empty": (ONE | {"images": ["pics/empty.png"]}, ["empty (0 bytes)"]),
    "large": (ONE | {"images": ["pics/large.png"]}, ["20 x 20 = 400 pixels", "399"]),
    "a name that is too long": (ONE | {"images": ["a" * 5000]}, ["no path of a file"]),
    "a null in a name": (ONE | {"images": ["a\0b"]}, ["no path of a file"]),
    "broken base64": (ONE | {"images": ["data:image/png;base64,a$"]}, ["expected base64"]),
    "a letter that base64 has not": (
        ONE | {"images": [address()[:-8] + "$" + address()[-8:]]},
        ["expected base64"],
    ),
    "data without base64": (ONE | {"images": ["data:image/png,abc"]}, ["expected data:"]),
    "base64 of nothing": (ONE | {"images": ["data:image/png;base64,"]}, ["bytes, found none"]),
    "a number": (ONE | {"images": [7]}, ["picture 1", "a number 7"]),
    "null": (ONE | {"images": [None]}, ["images[0]", "null"]),
    "an object": (ONE | {"images": [{"file": "a.png"}]}, ["'file'"]),
    "bytes as text": (ONE | {"images": [{"bytes": "iVBO"}]}, ["expected bytes"]),
    "another file": (
        ONE | {"images": [{"path": "pics/0.png", "sha256": "0" * 64}]},
        ["expected sha256", "another than when"],
    ),
    "a column of addresses": (ONE | {"image_url": "pics/0.png"}, ["data.columns"]),
    "a size that is not kept": (
        {
            "messages": [
                user([{"type": "image_url", "image_url": {"url": address(), "detail": "low"}}]),
                bot("A"),
            ]
        },
        ["'detail'"],
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_pictures_is_said_with_the_row(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    draw(folder)
    (tmp_path / "secret.png").write_bytes(encoded())
    os.symlink(tmp_path / "secret.png", folder / "pics/link.png")
    os.symlink("circle.png", folder / "pics/circle.png")
    (folder / "pics/text.png").write_text("not a picture", encoding="utf-8")
    (folder / "pics/cut.png").write_bytes(encoded()[:45])
    (folder / "pics/empty.png").write_bytes(b"")
    (folder / "pics/large.png").write_bytes(encoded(size=(20, 20)))
    row, words = WRONG[name]
    path = write(folder / "rows.jsonl", row)
    loaded = read(path, store=tmp_path / "store", max_image_pixels=399)
    assert list(loaded.records) == []
    ((source, reason),) = loaded.rejected
    assert source.place == f"{path}, row 1"
    for word in words:
        assert word in reason, reason


def test_a_link_inside_and_another_folder_are_read(tmp_path: Path) -> None:
    draw(tmp_path / "pictures")
    folder = tmp_path / "data"
    draw(folder)
    os.symlink("1.png", folder / "pics/link.png")
    path = write(folder / "rows.jsonl", ONE | {"images": ["pics/link.png"]})
    assert widths(read(path).records[0].value) == [1]
    absolute = str(tmp_path / "pictures/pics/2.png")
    path = write(folder / "rows.jsonl", ONE | {"images": [absolute]})
    inside = read(path, image_dir=str(tmp_path / "pictures"))
    assert widths(inside.records[0].value) == [2]
    with pytest.raises(UserError, match=r"data.image_dir=.*no such folder"):
        read(path, image_dir=str(tmp_path / "nowhere"))


def test_texts_alone_import_no_pillow_and_are_as_before(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"An <image> tag {M}", "completion": "A"},
        {"prompt": "B", "completion": "C", "images": None},
    ]
    path = write(tmp_path / "rows.jsonl", *rows)
    code = (
        "import sys\n"
        "from conf.schema import DataConfig\n"
        "from rlhf.data.formats import Use\n"
        "from rlhf.data.loading import convert\n"
        "from rlhf.data.sources import train_sources\n"
        f"data = DataConfig(path={str(path)!r})\n"
        "loaded = convert(train_sources(data), Use.sft, data, 0, None)\n"
        f"assert [r.value['prompt'] for r in loaded.records] == [{rows[0]['prompt']!r}, 'B']\n"
        "loaded_modules = [name for name in sys.modules if name == 'PIL' or 'picture' in name]\n"
        "assert loaded_modules == [], loaded_modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
