"""Bad input of any kind ends in a clear error: overrides, rows and files that hypothesis breaks, never a traceback from a library.

`make test` tries a few hundred; `make fuzz` tries thousands and fails unless at least 2,000 of them were bad.
"""

import dataclasses
import functools
import io
import json
import os
import tempfile
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
from rlhf import config, preflight
from rlhf.data import reading
from rlhf.data.formats import Use
from rlhf.types import UserError
from tests.format_rows import CHARACTERS, drawn, published_rows, tool_rows, training_rows

FEW, MANY, BAD = 60, 1500, 2000
PHASES = (Phase.generate, Phase.shrink)  # what explains a failure runs it hundreds of times more
seen: Counter[str] = Counter()  # by kind of input: good, bad


def fuzzed(examples: int) -> Callable[[Any], Any]:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None, phases=PHASES)


def complain(error: UserError, kind: str) -> None:
    """Counts a bad input, whose message must say something."""
    if not str(error).strip():
        raise AssertionError(f"{kind}: an error without a message")
    seen[kind] += 1


# ---- overrides ----

ODD = ("", "null", "-1", "0", "1", "1e999", "nan", "inf", "true", "[1,2", "[1,2]", "[]", "{a:1}", "{", "${x}", "${run.name}", "${oc.env:NOPE}", "???")
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
VALUES = st.sampled_from([*ODD, *WILD]) | st.text(CHARACTERS, max_size=12) | st.integers(-(2**70), 2**70).map(str) | st.floats().map(str)
KEYS = st.sampled_from(
    [key.replace(config.NAME, "x").replace(config.ANYTHING, "y") for key in config.valid_keys(list(STAGES)) if not key.startswith("run.dir")]
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
    """A command that would run, and up to three overrides, of which most are wrong in some way; or any stage and the overrides alone."""
    stage = draw(st.sampled_from([*READY, *READY, *config.choices("stage")]))
    out = [f"stage={stage}", "tracking=none"]
    if stage in READY:
        out += ["model=tiny", "data.path=rows.jsonl", "rollout=hf", *READY[stage]]
    taken = {one.partition("=")[0] for one in out}
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.one_of(KEYS, KEYS, KEYS, UNKNOWN, st.sampled_from(config.GROUPS)))
        out = [one for one in out if one.partition("=")[0] != key] if key in taken and key != "stage" else out
        out.append(f"{draw(st.sampled_from(['', '', '', '+', '++', '~']))}{key}={draw(VALUES)}")
    return out


def try_overrides(given_: list[str]) -> None:
    try:
        cfg = config.compose(given_)
        if cfg.stage.name not in ("chain", "doctor"):
            preflight.check(cfg)
    except UserError as error:
        complain(error, "overrides: bad")
    else:
        seen["overrides: good"] += 1


# ---- rows and files ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(CHARACTERS, max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(CHARACTERS, max_size=6), inner, max_size=3),
    max_leaves=6,
)
USES: dict[Use, tuple[str, Callable[[Config], Any]]] = {
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
            row[draw(st.sampled_from(["prompt", "chosen", "messages", "label", "data", "margin", "weight", "text"]))] = draw(JSON)
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
            read(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=str(place)), run=run))
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
    if suffix == ".csv":
        return ("prompt,chosen,rejected\n" + "".join(f'"{r["prompt"]}",{r["chosen"]},{r["rejected"]}\n' for r in rows)).encode()
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


SUFFIXES = [".jsonl", ".json", ".csv", ".parquet", ".xlsx"]
DAMAGE = st.builds(
    Damage,
    suffix=st.sampled_from(SUFFIXES),
    how=st.sampled_from(["cut", "change", "change", "insert", "noise", *SUFFIXES]),
    at=st.floats(0, 1, exclude_max=True),
    data=st.binary(min_size=1, max_size=16) | st.sampled_from([b"\xff\xfe", b"\x00", b'"', b"\n", b"\r", b"{", b"[" * 2000, b"NaN", b"\xed\xa0\x80"]),
)


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> None:
    """A folder with what `READY` names, in which nothing that an override names by accident matters."""
    (tmp_path / "rows.jsonl").write_bytes(whole_file(".jsonl"))
    (tmp_path / "policy").symlink_to(tiny_model())
    monkeypatch.chdir(tmp_path)


USE = st.sampled_from(sorted(USES, key=lambda use: use.value))


@pytest.mark.usefixtures("apart")
def test_overrides() -> None:
    seen.clear()
    fuzzed(FEW)(given(overrides())(try_overrides))()
    assert seen["overrides: bad"] > FEW / 4 and seen["overrides: good"] > 0


def test_rows() -> None:
    seen.clear()
    fuzzed(FEW)(given(USE, broken_rows())(lambda use, rows: read_all(use, lines(rows), ".jsonl")))()
    assert seen[".jsonl: bad"] > FEW / 4


def test_files() -> None:
    seen.clear()
    fuzzed(FEW)(given(USE, DAMAGE)(lambda use, damage: read_all(use, damage.done(), damage.suffix)))()
    assert sum(count for kind, count in seen.items() if kind.endswith("bad")) > FEW / 4


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("apart")
def test_thousands() -> None:
    """What `make fuzz` runs."""
    seen.clear()
    fuzzed(MANY)(given(overrides())(try_overrides))()
    fuzzed(MANY)(given(USE, broken_rows())(lambda use, rows: read_all(use, lines(rows), ".jsonl")))()
    fuzzed(MANY)(given(USE, DAMAGE)(lambda use, damage: read_all(use, damage.done(), damage.suffix)))()
    bad = sum(count for kind, count in seen.items() if kind.endswith("bad"))
    print(f"\n{os.path.basename(__file__)}: {sum(seen.values())} inputs, {bad} of them bad; every bad one ended in an error of ours")
    for kind, count in sorted(seen.items()):
        print(f"  {kind}: {count}")
    assert bad >= BAD
