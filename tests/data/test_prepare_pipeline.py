"""The pipeline: what it refuses before a row is read, counts and reasons, seeds, and results that
are kept and found again.
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf import preparation
from conf.options import option
from conf.preparation.base import StepOptions
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.pipeline import run, stream
from rlhf.data.prepare.plan import plan
from rlhf.data.prepare.steps import STEPS
from rlhf.data.prepare.store import FOLDER, StepReport, line, plain
from rlhf.process import parallel
from rlhf.types import UserError

CALLS: list[str] = []  # what the steps below did, in order


@dataclass(slots=True, kw_only=True)
class Shorter(StepOptions):
    """Leaves out texts of more than `most` characters."""

    step: ClassVar[str] = "shorter"
    streaming: ClassVar[bool] = True

    most: int = option(5, "Longer texts are left out.", unit="characters")


@dataclass(slots=True, kw_only=True)
class Shuffled(StepOptions):
    """Writes a random number into each row; takes all rows first."""

    step: ClassVar[str] = "shuffled"


@dataclass(slots=True, kw_only=True)
class Broken(StepOptions):
    """A step with a defect."""

    step: ClassVar[str] = "broken"
    streaming: ClassVar[bool] = True

    how: str = option("raise", "What is wrong with the step.")
    path: str | None = option(None, "A file that it reads.")

    def files(self) -> dict[str, str]:
        return {} if self.path is None else {"path": self.path}


@dataclass(slots=True, kw_only=True)
class Late(StepOptions):
    """Runs after the split, on pairs."""

    step: ClassVar[str] = "late"
    kinds: ClassVar[frozenset[str]] = frozenset({"preference"})
    after_split: ClassVar[bool] = True


@dataclass(slots=True, kw_only=True)
class Halved(StepOptions):
    """A split."""

    step: ClassVar[str] = "halved"
    splits: ClassVar[bool] = True


def shorter(options: Shorter, items: Iterator[Item], context: Context) -> Iterator[Item]:
    for item in items:
        CALLS.append(f"shorter {item.number}")
        if len(item.columns["text"]) <= options.most:
            yield item
        else:
            context.rejected(
                item, f"{len(item.columns['text'])} characters, expected at most {options.most}"
            )
    context.figures["limit"] = options.most


def shuffled(options: Shuffled, items: Iterator[Item], context: Context) -> Iterator[Item]:
    rng = random.Random(context.seed)
    for item in list(items):
        CALLS.append(f"shuffled {item.number}")
        item.columns["draw"] = rng.random()
        yield item


def broken(options: Broken, items: Iterator[Item], context: Context) -> Iterator[Item]:
    for count, item in enumerate(items):
        if count == 2 and options.how == "raise":
            raise UserError("the third row breaks the step")
        if count == 2 and options.how == "stop":
            return
        if count == 2 and options.how == "drop":
            continue
        yield item


def passing(options: StepOptions, items: Iterator[Item], context: Context) -> Iterator[Item]:
    yield from items


def halved(options: Halved, items: Iterator[Item], context: Context) -> Iterator[Item]:
    for item in items:
        item.split = "eval" if item.number % 2 else "train"
        yield item


@pytest.fixture(autouse=True)
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = {
        Shorter: shorter,
        Shuffled: shuffled,
        Broken: broken,
        Late: passing,
        Halved: halved,
    }
    for options, function in functions.items():
        monkeypatch.setitem(preparation.STEPS, options.step, options)
        monkeypatch.setitem(STEPS, options.step, function)
    CALLS.clear()


def rows(*texts: str) -> list[Item]:
    return [
        Item({"text": text}, "rows.jsonl", number) for number, text in enumerate(texts, start=1)
    ]


def texts(items: list[Item]) -> list[str]:
    return [item.columns["text"] for item in items]


# ---- what is refused before a row is read ----


@pytest.mark.parametrize(
    ("pipeline", "message"),
    [
        (["shoter"], "data.pipeline[0]: no such step 'shoter'. Nearest: shorter."),
        (
            [{"step": "shorter", "mots": 3}],
            "data.pipeline[0] (shorter): no such option 'mots'. Nearest: most. Options: most.",
        ),
        (
            ["shorter", {"step": "shorter", "most": "many"}],
            "data.pipeline[1] (shorter): Value 'many' of type 'str' could not be converted to "
            "Integer",
        ),
        ([{"stpe": "shorter"}], "found no 'step'; nearest key: 'stpe'"),
        ([3], "expected a step's name or {step: NAME, option: value ...}, found a number 3"),
        (["late"], "runs after the split only"),
        (
            ["halved", "halved"],
            "data.pipeline[1] (halved): data.pipeline[0] (halved) already says which rows are "
            "held out",
        ),
        (
            ["halved", "late"],
            "data.pipeline[1] (late): takes rows of kind preference; these are of kind sft",
        ),
        (
            [{"step": "length"}],
            "data.pipeline[0] (length): low=None is out of range: expected a number here or in "
            "`high`",
        ),
        (
            [{"step": "length", "low": 5, "high": 4}],
            "high=4 is out of range: expected at least low=5",
        ),
        ([{"step": "perplexity", "high": 9.0}], "missing mandatory value: model"),
        (["smote"], "a point between two embeddings is no text"),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused_before_a_row_is_read(
    pipeline: list[Any], message: str, tmp_path: Path
) -> None:
    def unread() -> Iterator[Item]:
        raise AssertionError("a row was read")
        yield

    with pytest.raises(UserError) as error:
        run(unread(), pipeline, kind="sft", folder=tmp_path)
    assert message in str(error.value)


def test_a_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("x", encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"data.pipeline\[0\] \(broken\): path=.*word.txt: .*: words.txt",
    ):
        plan([{"step": "broken", "path": str(tmp_path / "word.txt")}])


def test_held_out_rows_count_as_a_split() -> None:
    assert [step.name for step in plan(["late"], kind=Use.preference, held_out=True)] == ["late"]
    with pytest.raises(UserError, match=r"data\.eval_path already"):
        plan(["halved"], held_out=True)


def test_options_get_their_types_and_defaults() -> None:
    first, second = plan([{"step": "length", "low": "10", "unit": "words"}, "quality"])
    assert dataclasses.asdict(first.options)["low"] == 10 and first.options.unit.value == "words"  # type: ignore[attr-defined]
    assert second.options.max_duplicate_ngrams == [0.45, 0.42, 0.39, 0.36, 0.33, 0.30]  # type: ignore[attr-defined]


# ---- counts, reasons, streaming ----


def test_each_row_is_counted_and_each_rejected_one_written_with_its_reason(tmp_path: Path) -> None:
    out = run(
        rows("a", "a long one", "bb", "longer still"),
        [{"step": "shorter", "most": 4}, "shuffled"],
        kind="sft",
        folder=tmp_path,
    )
    assert texts(out.items) == ["a", "bb"]
    assert [(r.step, r.rows_in, r.rows_out, r.rejected) for r in out.steps] == [
        ("read", 4, 4, 0),
        ("shorter", 4, 2, 2),
        ("shuffled", 2, 2, 0),
    ]
    assert out.steps[1].reasons == {"N characters, expected at most N": 2} and out.steps[
        1
    ].figures == {"limit": 4}
    lines = [json.loads(text) for text in out.rejected.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {
            "step": "shorter",
            "reason": "10 characters, expected at most 4",
            "file": "rows.jsonl",
            "row": 2,
            "content": {"text": "a long one"},
        },
        {
            "step": "shorter",
            "reason": "12 characters, expected at most 4",
            "file": "rows.jsonl",
            "row": 4,
            "content": {"text": "longer still"},
        },
    ]


def test_streaming_steps_pass_one_row_at_a_time_and_others_take_all_first(tmp_path: Path) -> None:
    run(
        rows("a", "b"),
        ["shorter", {"step": "shorter", "most": 3}, "shuffled"],
        kind="sft",
        folder=tmp_path,
    )
    assert CALLS == ["shorter 1", "shorter 1", "shorter 2", "shorter 2", "shuffled 1", "shuffled 2"]


def test_any_number_of_processes_gives_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_WORTH_S", 0.0)
    monkeypatch.setattr("rlhf.data.prepare.pipeline.PART", 3)
    some = rows(*(f"row  {n} of some, mail to me{n}@b.org" for n in range(20)), "", "x " * 50)
    steps = ["repair", {"step": "length", "low": 1}, "quality", "patterns", "shuffled", "language"]
    written = []
    for processes in (1, 3):
        folder = tmp_path / str(processes)
        items = [dataclasses.replace(item) for item in some]
        out = run(items, steps, kind="sft", folder=folder, identity="x", processes=processes)
        reports = [(r.step, r.rows_in, r.rows_out, r.reasons, r.figures) for r in out.steps]
        files = sorted(folder.rglob("*.jsonl"))
        content = {str(path.relative_to(folder)): path.read_bytes() for path in files}
        written.append((out.items, reports, content))
    assert written[0] == written[1]
    assert written[0][1][4][4] == {"email": 20} and len(written[0][0]) == 20


def test_an_error_in_another_process_is_raised_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(number: int) -> int:
        if number == 7:
            raise UserError("row 7 breaks the step")
        return number * number

    done = parallel.in_order(refusing, range(9), processes=2, worth_s=0.0)
    assert [next(done) for _ in range(7)] == [number**2 for number in range(7)]
    with pytest.raises(UserError, match="row 7 breaks the step"):
        next(done)


@pytest.mark.parametrize(
    ("how", "message"),
    [("drop", "1 rows are gone without a reason"), ("stop", "ended before its rows did")],
)
def test_a_step_that_loses_rows_is_a_defect(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=message):
        run(rows("a", "b", "c", "d"), [{"step": "broken", "how": how}], kind="sft", folder=tmp_path)


def test_steps_after_the_split_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    def look(options: StepOptions, items: Iterator[Item], context: Context) -> Iterator[Item]:
        told.append(context.split_done)
        yield from items

    monkeypatch.setitem(STEPS, "late", look)
    monkeypatch.setattr(Late, "kinds", frozenset({"sft"}))
    monkeypatch.setattr(Late, "after_split", False)
    run(rows("a", "b"), ["late", "halved", "late"], kind="sft", folder=tmp_path)
    assert told == [False, True]


# ---- seeds ----


def draws(pipeline: list[Any], tmp_path: Path, seed: int = 0) -> list[float]:
    out = run(rows("a", "b", "c"), pipeline, kind="sft", seed=seed, folder=tmp_path / "draws")
    return [item.columns["draw"] for item in out.items]


def test_a_steps_seed_depends_on_no_other_step(tmp_path: Path) -> None:
    alone = draws(["shuffled"], tmp_path)
    assert draws(["shorter", "shuffled", "shorter"], tmp_path) == alone
    assert draws(["shuffled", "shuffled"], tmp_path) != alone, (
        "the second step of a name draws other numbers"
    )
    assert draws(["shuffled"], tmp_path, seed=1) != alone


# ---- kept results ----

PIPELINE: list[Any] = ["shorter", "shuffled", {"step": "shorter", "most": 2}]


def kept(
    pipeline: list[Any], folder: Path, identity: str = "x", data: list[Item] | None = None
) -> tuple[list[Item], list[StepReport]]:
    CALLS.clear()
    out = run(
        data or rows("a", "bb", "cccc", "dddddd"),
        pipeline,
        kind="sft",
        folder=folder,
        identity=identity,
    )
    return out.items, out.steps


def test_a_rerun_takes_all_steps_from_the_first_run(tmp_path: Path) -> None:
    first, _ = kept(PIPELINE, tmp_path)
    before = (tmp_path / "rejected.jsonl").read_bytes()
    again, steps = kept(PIPELINE, tmp_path)
    assert again == first and CALLS == []
    assert all(step.reused for step in steps) and [step.rejected for step in steps] == [0, 1, 0, 1]
    assert (tmp_path / "rejected.jsonl").read_bytes() == before


def test_a_changed_step_runs_again_with_those_after_it_alone(tmp_path: Path) -> None:
    kept(PIPELINE, tmp_path)
    items, steps = kept([*PIPELINE[:2], {"step": "shorter", "most": 1}], tmp_path)
    assert texts(items) == ["a"] and [step.reused for step in steps] == [True, True, True, False]
    assert CALLS == ["shorter 1", "shorter 2", "shorter 3"]
    assert items[0].columns["draw"] == kept(PIPELINE[:2], tmp_path / "other")[0][0].columns["draw"]


def test_other_rows_or_another_seed_run_anew(tmp_path: Path) -> None:
    kept(PIPELINE, tmp_path)
    _, steps = kept(PIPELINE, tmp_path, identity="y")
    assert not any(step.reused for step in steps)
    out = run(rows("a"), ["shuffled"], kind="sft", folder=tmp_path, identity="y", seed=1)
    assert not any(step.reused for step in out.steps)


def test_a_file_that_an_option_names_is_looked_at_anew(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("one", encoding="utf-8")
    pipeline = ["shorter", {"step": "broken", "how": "not", "path": str(words)}]
    kept(pipeline, tmp_path / "run")
    words.write_text("two", encoding="utf-8")
    _, steps = kept(pipeline, tmp_path / "run")
    assert [step.reused for step in steps] == [True, True, False]


def test_a_raised_version_runs_the_step_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(PIPELINE, tmp_path)
    monkeypatch.setattr(Shuffled, "version", 2)
    _, steps = kept(PIPELINE, tmp_path)
    assert [step.reused for step in steps] == [True, True, False, False]


def test_what_a_failed_run_leaves_is_whole_steps_only(tmp_path: Path) -> None:
    pipeline = ["shuffled", "shorter", {"step": "broken", "how": "raise"}]
    with pytest.raises(UserError, match="third row"):
        kept(pipeline, tmp_path)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["00-read", "01-shuffled"]
    _, steps = kept([*pipeline[:2], {"step": "broken", "how": "not"}], tmp_path)
    assert [step.reused for step in steps] == [True, True, False, False]


def test_a_run_that_dies_leaves_nothing_that_is_taken_for_a_result(tmp_path: Path) -> None:
    steps = plan(["shorter"], kind=Use.sft)
    begun = stream(
        lambda context: iter(rows("a", "b", "c")),
        steps,
        kind=Use.sft,
        folder=tmp_path,
        done=[],
        identity="x",
    )
    assert next(begun).columns["text"] == "a"
    copy = tmp_path / "killed"  # what lies on the disk at this moment, as after a power failure
    (tmp_path / FOLDER).rename(copy)
    begun.close()
    copy.rename(tmp_path / FOLDER)
    done: list[StepReport] = []
    again = list(
        stream(
            lambda context: iter(rows("a", "b", "c")),
            steps,
            kind=Use.sft,
            folder=tmp_path,
            done=done,
            identity="x",
        )
    )
    assert texts(again) == ["a", "b", "c"] and not any(report.reused for report in done)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["00-read", "01-shorter"]


def test_a_shorter_pipeline_removes_what_it_has_no_use_for(tmp_path: Path) -> None:
    kept(PIPELINE, tmp_path)
    kept(PIPELINE[:1], tmp_path)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["00-read", "01-shorter"]


def test_without_an_identity_no_rows_are_kept(tmp_path: Path) -> None:
    out = run(rows("a", "long text"), ["shorter"], kind="sft", folder=tmp_path)
    assert texts(out.items) == ["a"]
    assert (
        not list(tmp_path.rglob("items.jsonl"))
        and out.rejected.read_text(encoding="utf-8").count("\n") == 1
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=6))
def test_rows_come_back_as_they_were_kept(
    tmp_path_factory: pytest.TempPathFactory, columns: list[dict[str, Any]]
) -> None:
    folder = tmp_path_factory.mktemp("kept")
    data = [
        Item({**plain(row), "text": ""}, "f\u2028.jsonl", number, split="eval")
        for number, row in enumerate(columns, start=1)
    ]
    expected = [Item(dict(item.columns), item.origin, item.number, "eval") for item in data]
    run(data, ["shorter"], kind="sft", folder=folder, identity="x")
    assert run([], ["shorter"], kind="sft", folder=folder, identity="x").items == expected


@given(JSON)
def test_a_line_is_one_line_of_utf8_and_reads_back(value: Any) -> None:
    text = line(plain(value))
    assert text.encode("utf-8").count(b"\n") == 1 and json.loads(text) == plain(value)


def test_every_step_with_options_has_its_function() -> None:
    assert set(STEPS) == set(preparation.STEPS)
