"""Rows of large files stay on disk, and are the same rows."""

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Config, DataConfig, RunConfig
from conf.stages import KTOStage, RewardStage, SFTStage
from rlhf.data.encoded import Store
from rlhf.data.loading import DataRequest
from rlhf.data.prepare import held
from rlhf.data.reading import Split, preference_records, sft_records, unpaired_records
from rlhf.process import parallel
from rlhf.rows.sft import encode_sft
from rlhf.types import UserError
from tests.offline.trl_tools import tiny_tokenizer, write_rows

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
