"""stage=data with rows that show pictures: they are kept in the run directory, steps look at them,
other formats hold them, and the report shows them.
"""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from PIL import Image

from conf.choices import FileKind
from conf.data import DataTarget
from conf.preparation import STEPS
from rlhf.cli import config
from rlhf.data.formats import Use
from rlhf.data.formats.values import pictures_in
from rlhf.data.prepare.items import Item, shown_in
from rlhf.data.prepare.pipeline import run
from rlhf.data.report.making import make
from rlhf.data.report.schema import SCHEMA
from rlhf.data.rows import RowError
from rlhf.data.targets import TARGETS, convert
from rlhf.run.context import RunContext
from rlhf.stages import data as stage
from rlhf.types import UserError
from tests.data.drawn import M, address, bot, draw, encoded, read, user, widths, write
from tests.data.report_rows import checks, found


def asking(text: str, *images: str) -> dict[str, Any]:
    return {"instruction": "<image>" * len(images) + text, "output": "A", "images": list(images)}


def prepared(folder: Path, rows: list[dict[str, Any]], *overrides: str) -> Path:
    """The run directory of stage=data over rows in `folder`/data."""
    draw(folder / "data")
    path = write(folder / "data/rows.jsonl", *rows)
    options = ["stage=data", f"data.path={path}", f"run.dir={folder / 'runs'}", "tracking=none"]
    ctx = RunContext.open(config.compose([*options, "run.overwrite=true", *overrides]))
    stage.run(ctx)
    return ctx.dir


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


ROWS = [
    asking("What is  it?", "pics/0.png"),
    asking("What is it?", "pics/1.png", address(2)),
    asking("Hello!"),
]


def test_what_the_stage_writes_is_read_again_wherever_it_is(tmp_path: Path) -> None:
    made = prepared(tmp_path, ROWS, "data.pipeline=[repair]")
    kept = sorted(path.name for path in (made / "images").iterdir())
    assert len(kept) == 3
    row = lines(made / "train.jsonl")[0]
    assert row["prompt"][0]["content"] == f"{M}What is it?"  # repaired beside its mark
    assert row["prompt"][0]["images"][0]["path"] == f"images/{row_hash(row)}.png"
    # whole by itself: the rows' own pictures may go, and the directory may be moved
    shutil.rmtree(tmp_path / "data")
    moved = tmp_path / "elsewhere"
    made.rename(moved)
    loaded = read(moved / "train.jsonl")
    assert loaded.rejected == []
    assert [widths(record.value) for record in loaded.records] == [[0], [1, 2], []]
    # a file that was changed is found out
    (moved / "images" / f"{row_hash(row)}.png").write_bytes(encoded(3))
    ((source, reason),) = read(moved / "train.jsonl").rejected
    assert source.number == 1 and "expected sha256" in reason


def row_hash(row: dict[str, Any]) -> str:
    return str(row["prompt"][0]["images"][0]["sha256"])


@pytest.mark.parametrize("to", ["messages", "sharegpt", "alpaca"])
@pytest.mark.parametrize("file", ["jsonl", "parquet"])
def test_other_toolkits_formats_hold_marks_and_paths(to: str, file: str, tmp_path: Path) -> None:
    made = prepared(tmp_path, ROWS, f"data.to={to}", f"data.file={file}")
    loaded = read(made / f"train.{to}.{file}")
    assert loaded.rejected == []
    assert [widths(record.value) for record in loaded.records] == [[0], [1, 2], []]
    own = read(made / "train.jsonl")
    assert [content(r.value) for r in loaded.records] == [content(r.value) for r in own.records]


def content(value: Any) -> list[str]:
    chat = value.get("messages") or [*value["prompt"], *value["completion"]]
    return [message["content"] for message in chat]


IMAGES = [{"path": "images/a.png", "sha256": "a" * 64, "width": 4, "height": 4}]
ASKED = [user(f"{M}What?") | {"images": IMAGES}]
CANONICAL: dict[Use, dict[str, Any]] = {
    Use.sft: {"prompt": ASKED, "completion": [bot("A")]},
    Use.preference: {"prompt": ASKED, "chosen": [bot("A")], "rejected": [bot("B")]},
    Use.unpaired: {"prompt": ASKED, "completion": [bot("A")], "label": True},
    Use.prompt: {"prompt": ASKED},
}
HOLD = ("trl", "kto", "messages", "sharegpt", "alpaca", "ultrafeedback")


@pytest.mark.parametrize(
    ("to", "kind"), [(to, kind) for to, kinds in TARGETS.items() for kind in kinds]
)
def test_each_target_holds_pictures_or_refuses_them_by_name(to: DataTarget, kind: Use) -> None:
    if to.value not in HOLD:
        with pytest.raises(RowError, match=f"pictures can't be held by {to.value}"):
            convert(kind, CANONICAL[kind], to)
        return
    for row in convert(kind, CANONICAL[kind], to)[0]:
        # whole conversations have the prompt twice
        assert json.dumps(row).count("images/a.png") == 1 + (to is DataTarget.ultrafeedback)
        marks = json.dumps(row, ensure_ascii=False)
        assert ("<image>" in marks) == ("images" in row)


def test_a_text_with_the_mark_itself_is_not_written_with_marks() -> None:
    row = CANONICAL[Use.prompt] | {"prompt": [*ASKED, bot("<image>"), user("?")]}
    with pytest.raises(RowError, match="expected texts without <image>"):
        convert(Use.prompt, row, DataTarget.sharegpt)
    assert convert(Use.prompt, row, DataTarget.trl)[0] == [row]


def test_a_table_without_lists_holds_no_pictures(tmp_path: Path) -> None:
    made = prepared(tmp_path, ROWS, "data.to=alpaca", f"data.file={FileKind.csv.value}")
    rejected = lines(made / "rejected.jsonl")
    assert [row["row"] for row in rejected] == [1, 2]
    assert all("'images'" in row["reason"] for row in rejected)


# ---- steps ----


def items(*rows: tuple[str, list[int]], answer: str = "A") -> list[Item]:
    """Rows of a question and the numbers of its pictures."""
    out = []
    for number, (text, shown) in enumerate(rows, start=1):
        images = [
            {"path": f"{one}.png", "sha256": str(one), "width": 4, "height": 4} for one in shown
        ]
        message = user(M * len(images) + text)
        asked = [message | {"images": images}] if images else [message]
        out.append(Item({"prompt": asked, "completion": [bot(answer)]}, "a.jsonl", number))
    return out


LONG = "What can be seen here, and where would you say that it was taken, and when?"


@pytest.mark.parametrize("step", ["exact_duplicates", "near_duplicates", "cosine_duplicates"])
def test_rows_with_other_pictures_are_no_duplicates(step: str, tmp_path: Path) -> None:
    rows = items((LONG, [1]), (LONG, [2]), (LONG, [1]), (LONG, []), (LONG, [1, 2]), (LONG, []))
    done = run(rows, [step], kind=Use.sft, folder=tmp_path)
    assert [item.number for item in done.items] == [1, 2, 4, 5]
    answers = run(
        items((LONG, [1]), (LONG, [2])),
        [{"step": step, "part": "answer"}],
        kind="sft",
        folder=tmp_path,
    )
    assert [item.number for item in answers.items] == [1]


def test_a_split_keeps_a_picture_on_one_side(tmp_path: Path) -> None:
    rows = items(
        *[(f"{LONG} {word}", [one]) for one in range(20) for word in ("Tell me.", "Say so, please")]
    )
    done = run(rows, [{"step": "split", "fraction": 0.3}], kind=Use.sft, folder=tmp_path)
    sides: dict[str, set[str]] = {}
    for item in done.items:
        for one in shown_in(item.columns):
            sides.setdefault(one, set()).add(item.split)
    assert all(len(own) == 1 for own in sides.values())
    assert {side for own in sides.values() for side in own} == {"train", "eval"}
    assert done.steps[-1].figures["groups"] == 20


TAKE_NONE = {name for name, options in STEPS.items() if options.without_pictures}


def test_which_steps_take_no_pictures() -> None:
    assert {
        "perplexity",
        "label_noise",
        "augment",
        "back_translate",
        "aggregate",
        "review",
    } == TAKE_NONE


@pytest.mark.parametrize("step", sorted(TAKE_NONE))
def test_a_step_that_takes_no_pictures_names_the_row(step: str, tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "perplexity": {"model": str(tmp_path), "high": 9.0},
        "label_noise": {"probability": "p"},
        "back_translate": {"there": str(tmp_path), "back": str(tmp_path)},
        "augment": {"operations": ["swap"]},
    }
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    rows = items(("Hi", []), ("What?", [1]))
    for item in rows:
        item.columns["annotator"] = "x"
        item.columns["label"] = True
    before = ["split"] if step in ("augment", "back_translate") else []
    entry = {"step": step, **options.get(step, {})}
    with pytest.raises(UserError, match=rf"step {step}: a.jsonl, row 2 shows pictures, and"):
        run(rows, [*before, entry], kind=Use.unpaired, folder=tmp_path)


# ---- the report ----


def photograph(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    """Something with light and shade, as photographs have it."""
    levels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC)


def stored(folder: Path, image: Image.Image, form: str = "PNG", **options: Any) -> str:
    out = io.BytesIO()
    image.save(out, format=form, **options)
    name = f"{len(list(folder.glob('*')))}.{form.lower()}"
    (folder / name).write_bytes(out.getvalue())
    return name


def shown(folder: Path, name: str, number: int, split: str) -> Item:
    row = write(folder / "one.jsonl", asking(f"What is number {number}?", name))
    value = read(row).records[0].value
    row.unlink()
    return Item(value, "a.jsonl", number, split)


def test_the_report_finds_what_is_the_same_and_what_is_like_it(tmp_path: Path) -> None:
    folder = tmp_path / "pics"
    folder.mkdir()
    first = stored(folder, photograph(1))
    smaller = stored(folder, photograph(1, (40, 30)), "JPEG", quality=85)
    red = stored(folder, Image.new("RGB", (20, 20), "red"))
    blue = stored(folder, Image.new("RGB", (20, 20), "blue"))
    others = [stored(folder, photograph(seed)) for seed in range(2, 20)]
    train = [shown(folder, name, at, "train") for at, name in enumerate([first, red, *others], 1)]
    train.append(shown(folder, others[0], 50, "train"))
    held = [shown(folder, name, at, "eval") for at, name in enumerate([smaller, blue, red], 60)]
    report = make(train, held, Use.sft, tmp_path / "out")
    section = next(one for one in report.sections if one.name == "pictures")
    assert [row.row for row in found(section, "same_pictures").rows] == [50]
    assert [row.row for row in found(section, "similar_pictures").rows] == [60]
    assert [row.row for row in found(section, "held_out_pictures").rows] == [62]
    assert [row.row for row in found(section, "similar_held_out_pictures").rows] == [60]
    assert section.figures["different"] == 22 and section.figures["pictures"] == 24
    assert section.figures["kinds"] == {"png": 21, "jpeg": 1}
    assert len(section.thumbnails) == 22
    # texts are the same but for a number, and pictures tell the rows apart
    assert "row_leakage_near" not in {name for one in report.sections for name in checks(one)}


def test_the_page_shows_the_first_24_and_asks_nobody(tmp_path: Path) -> None:
    rows = [asking(f"What is {number}?", address(number)) for number in range(30)]
    made = prepared(tmp_path, rows, "data.report=true")
    page = (made / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'<img src="([^"]+)"', page)
    assert len(sources) == 24
    for source in sources:
        start, _, text = source.partition(",")
        assert start == "data:image/jpeg;base64"
        assert Image.open(io.BytesIO(base64.b64decode(text))).size[0] <= 112
    assert "img-src data:" in page and "rows.jsonl, row 1 (train), 8 x 6" in page
    report = json.loads((made / "report.json").read_text(encoding="utf-8"))
    jsonschema.validate(report, SCHEMA)
    assert report["sections"]["pictures"]["figures"]["different"] == 30


def test_a_report_of_texts_has_no_word_of_pictures(tmp_path: Path) -> None:
    made = prepared(tmp_path, [asking("Hi"), asking("Ho")], "data.report=true")
    page = (made / "report.html").read_text(encoding="utf-8")
    assert (
        "<img" not in page
        and "img-src" not in page
        and "sheet" not in page
        and "icture" not in page
    )
    assert not (made / "images").exists()


def test_pictures_of_a_row_of_several_pairs_are_kept(tmp_path: Path) -> None:
    row = {
        "prompt": "<image>Which is best?",
        "answers": [{"answer": name, "rank": rank} for rank, name in enumerate("abc", 1)],
        "images": ["pics/3.png"],
    }
    made = prepared(tmp_path, [row])
    pairs = lines(made / "train.jsonl")
    assert len(pairs) == 3
    assert all(len(list(pictures_in(pair["prompt"]))) == 1 for pair in pairs)
