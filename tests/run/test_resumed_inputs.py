"""A run that goes on with other rows, another adapter or another model than its checkpoint: refused
before anything loads, or warned of, and recorded.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.choices import AdapterKind, ModelKind, TrackingKind
from conf.schema import AdapterConfig, Config, DataConfig, ModelConfig, RunConfig, TrackingConfig
from conf.stages import OnlineStage, SFTStage
from rlhf.process import checkpoints
from rlhf.process.files import fingerprint, sha256
from rlhf.run import lineage
from rlhf.run.context import RunContext
from rlhf.types import UserError

LORA = AdapterConfig(kind=AdapterKind.lora, rank=8)


def config(tmp_path: Path, *, resume: bool = True, stage: Any = None, **groups: Any) -> Config:
    return Config(
        stage=stage or SFTStage(),
        run=RunConfig(dir=str(tmp_path), name="r", resume=resume),
        tracking=TrackingConfig(kind=TrackingKind.none),
        **groups,
    )


def saved(cfg: Config, step: int, *, file: Path | None = None, kind: str = "policy") -> RunContext:
    """A start of a run that reads `file` and its model, and saves at `step`; 0: not at all."""
    ctx = RunContext.open(cfg)
    ctx.add_parent(kind, cfg.model.path)
    ctx.add_data(file)
    if step:
        folder = ctx.checkpoint_dir / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "state").write_text("x", encoding="utf-8")
        checkpoints.seal(folder)
    ctx.tracker.finish()
    return ctx


def manifest(ctx: RunContext) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ctx.dir / "manifest.json").read_text(encoding="utf-8"))
    return content


def rows(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (LORA, {"rank": 16}, ["adapter.rank=8", "adapter.rank=16"]),
        (LORA, {"alpha": 8.0}, ["adapter.alpha=32.0", "adapter.alpha=8.0"]),
        (LORA, {"targets": ["q_proj"]}, ["all-linear", "q_proj"]),
        (LORA, {"dora": True}, ["adapter.dora=True"]),
        (LORA, {"kind": AdapterKind.none}, ["adapter.kind=lora", "adapter.kind=none"]),
        (AdapterConfig(), {"kind": AdapterKind.lora}, ["adapter.kind=none", "adapter.kind=lora"]),
    ],
)
def test_another_adapter_is_refused(
    tmp_path: Path, before: AdapterConfig, now: dict[str, Any], told: list[str]
) -> None:
    saved(config(tmp_path, resume=False, adapter=before), 4)
    stored = (tmp_path / "r/sft/config.yaml").read_bytes()
    with pytest.raises(UserError) as refused:
        RunContext.open(config(tmp_path, adapter=dataclasses.replace(before, **now)))
    assert all(text in str(refused.value) for text in ("checkpoint-4", "run.resume", *told))
    assert (tmp_path / "r/sft/config.yaml").read_bytes() == stored, "a refusal changes nothing"
    assert saved(config(tmp_path, adapter=before), 0).resume_from is not None


def test_what_an_adapters_weights_do_not_depend_on_may_change(tmp_path: Path) -> None:
    saved(config(tmp_path, resume=False, adapter=LORA), 4)
    now = dataclasses.replace(LORA, dropout=0.1, merge_on_save=True)
    assert saved(config(tmp_path, adapter=now), 0).resume_from is not None
    # without a checkpoint nothing was trained that could not fit
    saved(config(tmp_path / "new", resume=False, adapter=LORA), 0)
    assert saved(config(tmp_path / "new"), 0).resume_from is None


def test_a_rank_counts_where_the_critic_alone_has_an_adapter(tmp_path: Path) -> None:
    stage = OnlineStage(critic_adapter=True)
    saved(config(tmp_path, resume=False, stage=stage), 4)
    with pytest.raises(UserError, match=r"adapter\.rank=16.*adapter\.rank=4"):
        RunContext.open(config(tmp_path, stage=stage, adapter=AdapterConfig(rank=4)))
    with pytest.raises(UserError, match=r"stage\.critic_adapter=True.*=False"):
        RunContext.open(config(tmp_path, stage=OnlineStage()))


def test_another_model_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    model = shutil.copytree(tiny_model(), tmp_path / "model")
    first = saved(config(tmp_path, resume=False, model=ModelConfig(path=str(model))), 4)
    weights = manifest(first)["parents"][0]["weights"]
    # the same weights elsewhere are the same model
    moved = shutil.copytree(model, tmp_path / "moved")
    assert saved(config(tmp_path, model=ModelConfig(path=str(moved))), 0).resume_from is not None
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(UserError) as refused:
        RunContext.open(config(tmp_path, model=ModelConfig(path=str(model))))
    assert all(text in str(refused.value) for text in ("checkpoint-4", str(model), weights))
    tiny = ModelConfig(kind=ModelKind.tiny)
    with pytest.raises(UserError, match=r"model\.path=None"):
        RunContext.open(config(tmp_path, model=tiny))


def test_another_size_of_a_tiny_model_is_refused(tmp_path: Path) -> None:
    tiny = ModelConfig(kind=ModelKind.tiny)
    saved(config(tmp_path, resume=False, model=tiny), 4)
    larger = dataclasses.replace(tiny, tiny=dataclasses.replace(tiny.tiny, hidden_size=256))
    with pytest.raises(UserError, match=r"model\.tiny\.hidden_size=256"):
        RunContext.open(config(tmp_path, model=larger))


def test_other_rows_are_warned_of_and_both_are_recorded(
    tmp_path: Path, tiny_model: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = rows(tmp_path, "first\n")
    cfg = {"model": ModelConfig(path=str(tiny_model())), "data": DataConfig(path=str(file))}
    saved(config(tmp_path, resume=False, **cfg), 4, file=file)
    first = sha256(file)
    with caplog.at_level(logging.WARNING):
        saved(config(tmp_path, **cfg), 0, file=file)
    assert not caplog.records, "the same rows again"
    rows(tmp_path, "second\n")
    with caplog.at_level(logging.WARNING):
        ctx = saved(config(tmp_path, **cfg), 8, file=file)
    told = caplog.text
    assert all(text in told for text in (str(file), first, sha256(file), "step 4"))
    content = manifest(ctx)
    assert [entry["sha256"] for entry in content["data"]] == [first, sha256(file)]
    starts = [(start["step"], [e["sha256"] for e in start["data"]]) for start in content["starts"]]
    assert starts == [(0, [first]), (4, [first]), (4, [sha256(file)])]
    node = lineage.lineage(ctx.dir)
    notes = {parent.notes for parent in node.parents if parent.via == ("data",)}
    assert notes == {("steps 1 to 4", "rows.jsonl was changed since"), ("steps from 5",)}


def test_rows_of_steps_that_were_lost_are_not_on_record(tmp_path: Path) -> None:
    file = rows(tmp_path, "first\n")
    model = ModelConfig(kind=ModelKind.tiny)
    saved(config(tmp_path, resume=False, model=model), 0, file=file)
    rows(tmp_path, "second\n")  # nothing was saved of the first start: the run begins anew
    ctx = saved(config(tmp_path, model=model), 4, file=file)
    assert [entry["sha256"] for entry in manifest(ctx)["data"]] == [sha256(file)]


def test_other_rows_are_refused_where_the_tokenizer_comes_from_them(tmp_path: Path) -> None:
    file = rows(tmp_path, "first\n")
    model = ModelConfig(kind=ModelKind.tiny)
    saved(config(tmp_path, resume=False, model=model), 4, file=file)
    rows(tmp_path, "second\n")
    with pytest.raises(UserError, match=rf"{file}.*step 4.*tokenizer"):
        saved(config(tmp_path, model=model), 0, file=file)


def test_a_manifest_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its starts had no inputs of their own: the last one has the manifest's."""
    file = rows(tmp_path, "first\n")
    model = ModelConfig(path="owner/name")
    ctx = saved(config(tmp_path, resume=False, model=model), 4, file=file)
    content = manifest(ctx)
    for start in content["starts"]:
        del start["data"], start["parents"], start["step"]
    (ctx.dir / "manifest.json").write_text(json.dumps(content), encoding="utf-8")
    first = sha256(file)
    rows(tmp_path, "second\n")
    again = saved(config(tmp_path, model=model), 0, file=file)
    assert [e["sha256"] for e in manifest(again)["data"]] == [first, sha256(file)]


def test_a_fingerprint_reads_both_ends_of_a_large_file(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    content = bytearray(3 * 2**20)
    found = set()
    for place in (None, 0, len(content) - 1):
        if place is not None:
            content[place] ^= 1
        file.write_bytes(content)
        found.add(fingerprint([file]))
    assert len(found) == 3 and fingerprint([]) is None
