"""Rows of large files stay on disk, and are the same rows."""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.online import OnlineStage
from conf.schema import Config, DataConfig, RunConfig
from conf.stages import KTOStage, RewardStage, SFTStage
from rlhf.data.encoded import Store
from rlhf.data.loading import DataRequest
from rlhf.data.prepare import held
from rlhf.data.reading import (
    Split,
    preference_records,
    prompts,
    sft_records,
    unpaired_records,
)
from rlhf.models.encoding import prompt_ids
from rlhf.process import parallel
from rlhf.rows.sft import encode_sft
from rlhf.types import UserError
from tests.offline.trl_tools import CHATML, tiny_tokenizer, write_rows

ROWS = 40
OF_STAGE: dict[str, tuple[Any, Callable[[DataRequest], Split]]] = {
    "sft": (SFTStage(), sft_records),
    "reward": (RewardStage(soft_label=True), preference_records),
    "kto": (KTOStage(), unpaired_records),
}


def row(stage: str, number: int, rng: random.Random) -> dict[str, Any]:
    """Every third row has the prompt of another."""
    prompt = f"what is {number - number % 3}"
    out: dict[str, Any] = {"prompt": prompt, "weight": rng.random(), "note": "n" * (number % 4)}
    if stage == "sft":
        return out | {"completion": f"it is {rng.random()}"}
    return out | {"chosen": f"yes {number}", "rejected": "no", "margin": 1.0, "soft_label": 0.75}


def split_of(stage: str, path: Path, **data: Any) -> Split:
    options, records = OF_STAGE[stage]
    run = RunConfig(dir=str(path.parent), name="r", dry_run=True)
    cfg = Config(stage=options, data=DataConfig(path=str(path), eval_fraction=0.3, **data), run=run)
    return records(DataRequest.of(cfg))


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(held, "IN_MEMORY", 3)


@pytest.mark.parametrize("stage", OF_STAGE)
def test_rows_on_disk_are_the_same(tmp_path: Path, stage: str, on_disk: Callable[[], None]) -> None:
    rng = random.Random(0)
    path = write_rows(tmp_path / "rows.jsonl", [row(stage, i, rng) for i in range(ROWS)])
    in_memory = split_of(stage, path)
    on_disk()
    kept = split_of(stage, path)
    for rows, expected in zip(kept, in_memory, strict=True):
        assert isinstance(expected, list) and not isinstance(rows, list)
        assert list(rows) == expected and len(expected) > 3
        assert rows[-1] == expected[-1] and list(rows[:2]) == expected[:2]


@pytest.mark.parametrize("template", [None, CHATML])
def test_prompts_of_rows_on_disk_are_the_same(
    tmp_path: Path, template: str | None, on_disk: Callable[[], None]
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"what is {i}", "note": i} for i in range(ROWS)]
    if template is not None:
        rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    run, data = RunConfig(dir=str(tmp_path), name="r"), DataConfig(path=str(path), cache=False)
    request = DataRequest.of(Config(stage=OnlineStage(), data=data, run=run))
    tokenizer = tiny_tokenizer(template)
    few = prompts(request, tokenizer)
    expected = list(few)
    on_disk()
    kept = prompts(request, tokenizer)
    assert list(kept) == expected == [kept[i] for i in range(len(kept))] and len(expected) > 30
    assert list(kept[1:4]) == expected[1:4] and kept[-1] == expected[-1]
    for prompt in kept:
        assert list(prompt.token_ids) == prompt_ids(tokenizer, prompt.source)  # type: ignore[arg-type]
        if template is not None:
            assert prompt.text == tokenizer.decode(prompt.token_ids)
        else:
            assert prompt.text == prompt.source and "note" in prompt.fields


def test_parts_of_rows_on_disk_are_read_together(on_disk: Callable[[], None]) -> None:
    on_disk()
    numbers = list(range(200))
    rows = held.gathered(iter(numbers))
    doubled = held.mapped(lambda number: 2 * number, rows)
    for part in (
        slice(3, 150),
        slice(190, 999),
        slice(5, 2),
        slice(None, None, -7),
        slice(9, 90, 4),
    ):
        assert rows[part] == numbers[part]
        assert doubled[part] == [2 * number for number in numbers[part]]


@pytest.mark.parametrize("processes", [1, 2])
def test_processes_read_rows_on_disk_at_once(
    tmp_path: Path, processes: int, on_disk: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "_WORTH_S", 0.0)
    rng = random.Random(0)
    path = write_rows(tmp_path / "rows.jsonl", [row("sft", i, rng) for i in range(900)])
    given: dict[str, Any] = {"name": "training", "max_length": 64, "completion_only": True}
    tokenizer, store = tiny_tokenizer(), Store(None, 0, processes)
    expected = encode_sft(tokenizer, split_of("sft", path)[0], cut=True, store=store, **given)
    on_disk()
    found = encode_sft(tokenizer, split_of("sft", path)[0], cut=True, store=store, **given)
    assert list(found) == list(expected) and len(expected) > 500


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, on_disk: Callable[[], None]) -> None:
    class Full:
        def write(self, content: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    on_disk()
    monkeypatch.setattr("tempfile.TemporaryFile", lambda dir: Full())
    with pytest.raises(UserError, match="TMPDIR"):
        held.gathered(iter(range(9)))
