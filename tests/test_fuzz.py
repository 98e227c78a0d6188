"""Bad input of any kind ends in a clear error: overrides, rows and files that hypothesis breaks,
never a traceback from a library.

`make test` tries about a hundred; `make fuzz` tries thousands and fails unless at least 2,000 of
them were bad.
"""

import dataclasses
import enum
import functools
import gzip
import io
import json
import os
import tempfile
import types
import typing
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from conf.schema import Config
from conf.stages import STAGES
from rlhf.cli import config, options, presets
from rlhf.cli.options import valid_keys
from rlhf.data import reading
from rlhf.data.formats import Use
from rlhf.types import UserError
from tests.checking import check
from tests.data.format_rows import CHARACTERS, drawn, published_rows, tool_rows, training_rows

FEW, MANY, BAD = 30, 1500, 2000
PHASES = (Phase.generate, Phase.shrink)  # what explains a failure runs it hundreds of times more
seen: Counter[str] = Counter()  # by kind of input: good, bad


def fuzzed(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
        phases=PHASES,
    )


def complain(error: UserError, kind: str) -> None:
    """Counts a bad input, whose message must say something."""
    if not str(error).strip():
        raise AssertionError(f"{kind}: an error without a message")
    seen[kind] += 1


# ---- overrides ----

ODD = (
    "",
    "null",
    "-1",
    "0",
    "1",
    "1e999",
    "nan",
    "inf",
    "true",
    "[1,2",
    "[1,2]",
    "[]",
    "{a:1}",
    "{",
    "${x}",
    "${run.name}",
    "${oc.env:NOPE}",
    "???",
)
WILD = (
    "'",
    '"',
    "a b",
    "a,b",
    "=",
    "~",
    "@",
    "../..",
    "/dev/null",
    "/dev/full",
    "\\",
    "é你\u202e",
    "\n",
    "\x00",
    "x" * 5000,
    "0x10",
    "1_000",
    "1e-400",
)
VALUES = (
    st.sampled_from([*ODD, *WILD])
    | st.text(CHARACTERS, max_size=12)
    | st.integers(-(2**70), 2**70).map(str)
    | st.floats().map(str)
)
KEYS = st.sampled_from(
    [
        key.replace(options.NAME, "x").replace(options.ANYTHING, "y")
        for key in valid_keys(list(STAGES))
        if not key.startswith("run.dir")
    ]
)
UNKNOWN = st.text(st.sampled_from("abcdefgr.stage/@+~{}[]$:"), min_size=1, max_size=12)


# What each stage needs to pass its checks, in the folder that the fixture `apart` makes.
READY = {
    "reward": [],
    "dpo": ["model.path=policy"],
    "ppo": ["reward.function=operator:truth", "stage.critic_init=policy"],
    "grpo": ["reward.function=operator:truth"],
    "data": ["data.kind=preference"],
}


@st.composite
def overrides(draw: st.DrawFn) -> list[str]:
    """A command that would run, and up to three overrides, of which most are wrong in some way; or
    any stage and the overrides alone.
    """
    stage = draw(st.sampled_from([*READY, *READY, *presets.choices("stage")]))
    out = [f"stage={stage}", "tracking=none"]
    if stage in READY:
        out += ["model=tiny", "data.path=rows.jsonl", "rollout=hf", *READY[stage]]
    taken = {one.partition("=")[0] for one in out}
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.one_of(KEYS, KEYS, KEYS, UNKNOWN, st.sampled_from(presets.PRESET_GROUPS)))
        out = (
            [one for one in out if one.partition("=")[0] != key]
            if key in taken and key != "stage"
            else out
        )
        out.append(f"{draw(st.sampled_from(['', '', '', '+', '++', '~']))}{key}={draw(VALUES)}")
    return out


def try_overrides(given_: list[str]) -> None:
    try:
        cfg = config.compose(given_)
        if cfg.stage.name not in ("chain", "doctor"):
            check(cfg)
    except UserError as error:
        complain(error, "overrides: bad")
    else:
        seen["overrides: good"] += 1


# ---- options of which it is known that they are wrong ----

WRONG = {  # by what an option holds: values that it can't take
    bool: ["maybe", "1.5", "[true]", "{a: 1}"],
    int: ["1.5", "x", "[1]", "{a: 1}", "nan", "1e999"],
    float: ["x", "nan", "inf", "-inf", "1e999", "[1.0]", "{a: 1}"],
    str: ["[1]", "{a: 1}"],
    enum.Enum: ["nosuch", "7.5", "[x]", "{a: 1}", "''"],
    list: ["7", "x", "{a: 1}", "true"],
    dict: ["7", "[1]", "x"],
}


def wrong_values(hint: Any) -> list[str]:
    """Values that an option of this annotation must refuse; none for one that takes anything."""
    kinds = [
        one
        for one in (typing.get_args(hint) if isinstance(hint, types.UnionType) else [hint])
        if one is not type(None)
    ]
    if len(kinds) != 1 or kinds[0] is Any:
        return []
    kind = typing.get_origin(kinds[0]) or kinds[0]
    found = next(
        (
            values
            for known, values in WRONG.items()
            if isinstance(kind, type) and issubclass(kind, known)
        ),
        [],
    )
    return (
        found
        if hint in kinds and type(None) not in typing.get_args(hint)
        else [value for value in found if value != "''"]
    )


@functools.cache
def options_of(stage: str) -> tuple[tuple[str, str], ...]:
    """Every option of a stage with each value that it must refuse."""
    out: list[tuple[str, str]] = []

    def walk(value: Any, prefix: str) -> None:
        hints = typing.get_type_hints(type(value))
        for one in dataclasses.fields(value):
            inner = getattr(value, one.name)
            if dataclasses.is_dataclass(inner):
                walk(inner, f"{prefix}{one.name}.")
            else:
                out.extend((prefix + one.name, wrong) for wrong in wrong_values(hints[one.name]))

    walk(
        config.compose([f"stage={stage}", "tracking=none", "model=tiny", "data.path=rows.jsonl"]),
        "",
    )
    return tuple(out)


# Two options that exclude each other, or one that lacks another, on top of what each stage needs.
CONFLICTS = (
    ("ppo", "stage.reference=false stage.kl_coef=0.1"),
    ("ppo", "stage.prompts_per_step=3 stage.minibatches=2"),
    ("ppo", "stage.critic_init=reward"),
    ("ppo", "data.max_prompt_length=500 rollout.max_response_length=100"),
    ("ppo", "model.dtype=float16"),
    ("ppo", "stage.reference_every=2 stage.reference=false stage.kl_coef=0"),
    ("ppo", "stage.on_nonfinite=rewind stage.save_steps=0"),
    ("ppo", "stage.watch.divergence=stop"),
    ("ppo", "stage.watch.kl=stop stage.reference=false stage.kl_coef=0"),
    ("ppo", "run.resume=true run.overwrite=true"),
    ("grpo", "stage.samples_per_prompt=1"),
    ("grpo", "stage.kl_controller=adaptive stage.kl_coef=0"),
    ("grpo", "adapter=lora adapter.rank=1024 rollout=vllm"),
    ("grpo", "adapter=lora adapter.rank=16 rollout=vllm rollout.max_lora_rank=8"),
    ("grpo", "engine=zero3 engine.gpus=2"),
    ("grpo", "engine=torch engine.gpus=2"),
    ("grpo", "engine=zero2 engine.offload=nvme"),
    ("reward", "stage.batch_size=8 engine.micro_batch_size=3"),
    ("reward", "model.gguf_file=x.gguf"),
    ("reward", "stage.max_length=513"),
    ("reward", "data.eval_path=nowhere.jsonl"),
    ("reward", "tracking=wandb tracking.mode=nosuch"),
    ("dpo", "stage.batch_size=8 engine.micro_batch_size=16"),
    ("dpo", "engine=zero1 engine.offload=nvme engine.nvme_path=nowhere"),
    ("data", "data.pipeline=[nosuch]"),
    ("data", "data.pipeline=[{step: split, fraction: 1.5}]"),
    ("data", "data.to=trl data.file=nosuch"),
)
INTERPOLATIONS = (
    "${nosuch}",
    "${run}",
    "${stage.nosuch}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${nosuch:1}",
    "${model.path",
    "${${run.name}}",
)


@st.composite
def wrong_commands(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command that would run, with one thing in it that is wrong by a known rule; and which kind
    of thing.
    """
    kind = draw(
        st.sampled_from(["type", "type", "type", "conflict", "interpolation", "group", "name"])
    )
    stage = draw(st.sampled_from(sorted(READY)))
    if kind == "type":
        key, value = draw(st.sampled_from(options_of(stage)))
        wrong = [f"{key}={value}"]
    elif kind == "conflict":
        stage, options = draw(st.sampled_from(CONFLICTS))
        wrong = options.split(" ") if "[" not in options else [options]
    elif kind == "interpolation":
        names = ["run.name", "run.seed", "model.path", "tracking.group", "data.path"]
        name = draw(st.sampled_from(names))
        wrong = [f"{name}={draw(st.sampled_from(INTERPOLATIONS))}"]
    elif kind == "group":
        group = draw(st.sampled_from(presets.PRESET_GROUPS))
        wrong = [f"{group}={draw(st.text('abcxyz_', min_size=1, max_size=6))}9"]
    else:
        key = draw(st.sampled_from(options_of(stage)))[0]
        at = draw(st.integers(0, len(key) - 1))
        sign = draw(st.sampled_from(["", "+", "++"]))
        wrong = [f"{sign}{key[:at]}{draw(st.sampled_from('qxz'))}{key[at + 1 :]}=1"]
    keys = {one.partition("=")[0] for one in wrong}
    needed = [
        f"stage={stage}",
        "tracking=none",
        "model=tiny",
        "data.path=rows.jsonl",
        "rollout=hf",
        *READY[stage],
    ]
    return kind, [*(one for one in needed if one.partition("=")[0] not in keys), *wrong]


def try_wrong(command: tuple[str, list[str]]) -> None:
    kind, given_ = command
    try:
        check(config.compose(given_))
    except UserError as error:
        complain(error, f"wrong {kind}: bad")
    else:
        raise AssertionError(f"accepted: {' '.join(given_)}")


# ---- rows and files ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(CHARACTERS, max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(CHARACTERS, max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
USES: dict[Use, tuple[str, Callable[[reading.DataRequest], Any]]] = {
    Use.sft: ("stage=sft", reading.sft_rows),
    Use.preference: ("stage=reward", reading.preference_pairs),
    Use.unpaired: ("stage=kto", reading.judged_answers),
}


@st.composite
def broken_rows(draw: st.DrawFn) -> list[Any]:
    """Rows of one format, some of them with a column lost, replaced or added."""
    name = draw(st.sampled_from(sorted(all_rows(draw(drawn())))))
    rows: list[Any] = [all_rows(draw(drawn()))[name] for _ in range(draw(st.integers(1, 4)))]
    for at in range(len(rows)):
        how = draw(st.sampled_from(["keep", "lose", "replace", "inside", "add", "other"]))
        row = json.loads(json.dumps(rows[at]))
        keys = sorted(row)
        if how == "lose":
            row.pop(draw(st.sampled_from(keys)))
        elif how == "replace":
            row[draw(st.sampled_from(keys))] = draw(JSON)
        elif how == "inside":
            place = row[draw(st.sampled_from(keys))]
            if isinstance(place, dict) and place:
                place[draw(st.sampled_from(sorted(place)))] = draw(JSON)
            elif isinstance(place, list) and place:
                place[draw(st.integers(0, len(place) - 1))] = draw(JSON)
        elif how == "add":
            row[
                draw(
                    st.sampled_from(
                        [
                            "prompt",
                            "chosen",
                            "messages",
                            "label",
                            "data",
                            "margin",
                            "weight",
                            "text",
                        ]
                    )
                )
            ] = draw(JSON)
        rows[at] = draw(JSON) if how == "other" else row
    return rows


def all_rows(d: Any) -> dict[str, Any]:
    return {**training_rows(d), **published_rows(d), **tool_rows(d)}


@functools.cache
def base(stage: str) -> Config:
    return config.compose([stage, "data.path=x.jsonl", "model=tiny"])


def read_all(use: Use, content: bytes, suffix: str) -> None:
    """Read a file's bytes as a stage would; counts whether it was good or bad."""
    override, read = USES[use]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / f"rows{suffix}"
        place.write_bytes(content)
        cfg = base(override)
        run = dataclasses.replace(cfg.run, dir=folder)
        try:
            data = dataclasses.replace(cfg.data, path=str(place))
            read(reading.DataRequest.of(dataclasses.replace(cfg, data=data, run=run)))
        except UserError as error:
            complain(error, f"{suffix}: bad")
        else:
            seen[f"{suffix}: good"] += 1


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@functools.cache
def whole_file(suffix: str) -> bytes:
    """A good file of preference rows."""
    rows = [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]
    if suffix == ".jsonl":
        return lines(rows)
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".ndjson":  # each object over several lines
        return "\n".join(json.dumps(row, indent=1) for row in rows).encode()
    if suffix == ".jsonl.gz":
        return gzip.compress(lines(rows))
    if suffix == ".jsonl.zst":
        import pyarrow

        return pyarrow.compress(lines(rows), codec="zstd", asbytes=True)
    if suffix == ".csv":
        return (
            "prompt,chosen,rejected\n"
            + "".join(f'"{r["prompt"]}",{r["chosen"]},{r["rejected"]}\n' for r in rows)
        ).encode()
    out = io.BytesIO()
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    else:
        import openpyxl

        book = openpyxl.Workbook()
        for cells in [list(rows[0]), *(list(row.values()) for row in rows)]:
            book.active.append(cells)
        book.save(out)
    return out.getvalue()


@dataclass(frozen=True)
class Damage:
    """What is done to a good file."""

    suffix: str
    how: str
    at: float  # in [0, 1): where in the file
    data: bytes

    def done(self) -> bytes:
        content = whole_file(self.suffix)
        at = int(self.at * len(content))
        if self.how == "cut":
            return content[:at]
        if self.how == "change":
            return content[:at] + self.data + content[at + len(self.data) :]
        if self.how == "insert":
            return content[:at] + self.data + content[at:]
        return self.data if self.how == "noise" else whole_file(self.how)


SUFFIXES = [
    ".jsonl",
    ".json",
    ".ndjson",
    ".jsonl.gz",
    ".jsonl.zst",
    ".csv",
    ".parquet",
    ".xlsx",
]
DAMAGE = st.builds(
    Damage,
    suffix=st.sampled_from(SUFFIXES),
    how=st.sampled_from(["cut", "change", "change", "insert", "noise", *SUFFIXES]),
    at=st.floats(0, 1, exclude_max=True),
    data=st.binary(min_size=1, max_size=16)
    | st.sampled_from(
        [b"\xff\xfe", b"\x00", b'"', b"\n", b"\r", b"{", b"[" * 2000, b"NaN", b"\xed\xa0\x80"]
    ),
)


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> None:
    """A folder with what `READY` names, in which nothing that an override names by accident
    matters.
    """
    (tmp_path / "rows.jsonl").write_bytes(whole_file(".jsonl"))
    (tmp_path / "policy").symlink_to(tiny_model())
    monkeypatch.chdir(tmp_path)


USE = st.sampled_from(sorted(USES, key=lambda use: use.value))


@pytest.mark.usefixtures("apart")
def test_overrides() -> None:
    seen.clear()
    fuzzed(FEW)(given(overrides())(try_overrides))()
    assert seen["overrides: bad"] > FEW / 4 and seen["overrides: good"] > 0


@pytest.mark.usefixtures("apart")
def test_what_is_wrong_by_a_known_rule_is_refused() -> None:
    seen.clear()
    fuzzed(FEW // 3)(given(wrong_commands())(try_wrong))()
    assert len(seen) >= 4, "of the five kinds"


def test_rows() -> None:
    seen.clear()
    fuzzed(FEW)(given(USE, broken_rows())(lambda use, rows: read_all(use, lines(rows), ".jsonl")))()
    assert seen[".jsonl: bad"] > FEW / 4


def test_files() -> None:
    seen.clear()
    fuzzed(FEW)(
        given(USE, DAMAGE)(lambda use, damage: read_all(use, damage.done(), damage.suffix))
    )()
    assert sum(count for kind, count in seen.items() if kind.endswith("bad")) > FEW / 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("apart")
def test_thousands() -> None:
    """What `make fuzz` runs."""
    seen.clear()
    fuzzed(MANY)(given(overrides())(try_overrides))()
    fuzzed(MANY)(given(wrong_commands())(try_wrong))()
    fuzzed(MANY)(
        given(USE, broken_rows())(lambda use, rows: read_all(use, lines(rows), ".jsonl"))
    )()
    fuzzed(MANY)(
        given(USE, DAMAGE)(lambda use, damage: read_all(use, damage.done(), damage.suffix))
    )()
    bad = sum(count for kind, count in seen.items() if kind.endswith("bad"))
    print(
        f"\n{os.path.basename(__file__)}: {sum(seen.values())} inputs, {bad} of them bad; every "
        "bad one ended in an error of ours"
    )
    for kind, count in sorted(seen.items()):
        print(f"  {kind}: {count}")
    assert bad >= BAD
