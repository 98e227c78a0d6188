"""Training stages read every format directly by path."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.choices import FileKind
from conf.data import DataFormat, DataTarget
from conf.schema import Config, DataConfig, RunConfig
from conf.stages import (
    CPOStage,
    KTOStage,
    OnlineStage,
    ORPOStage,
    PreferenceStage,
    RewardStage,
    SFTStage,
)
from rlhf.data import reading
from rlhf.data.formats import FORMATS, Use, by_name
from rlhf.data.writing import convert, write_rows
from rlhf.models.loading import train_tokenizer
from rlhf.models.templates import template_text
from rlhf.run.context import RunContext
from rlhf.stages import reward
from rlhf.stages import rows as stage_rows
from tests.data.format_rows import Drawn, all_rows
from tests.offline import trl_tools

STAGES = {
    Use.sft: [SFTStage],
    Use.preference: [RewardStage, PreferenceStage, CPOStage, ORPOStage],
    Use.unpaired: [KTOStage],
    Use.prompt: [OnlineStage],
}
ROWS = 8


def drawn(i: int) -> Drawn:
    chat = [{"role": "system", "content": "Sei nett."}, {"role": "user", "content": f"你好 {i}"}]
    return Drawn(
        chat,
        f"Frage {i}",
        f"gut {i}",
        f"schlecht {i}",
        f"naja {i}",
        True,
        i % 2 == 0,
        float(i + 10),
        "",
        [],
        [1, 3, 2],
    )


def rows_of(name: str) -> list[dict[str, Any]]:
    def one(i: int) -> dict[str, Any]:
        return all_rows(drawn(i))[name]

    return [one(i) for i in range(ROWS)]


@pytest.mark.parametrize(
    ("name", "stage", "use"),
    [
        (f.name, stage, use)
        for f in FORMATS
        for use, stages in STAGES.items()
        if f.reads(use)
        for stage in stages
    ],
    ids=lambda value: getattr(value, "__name__", getattr(value, "value", value)),
)
def test_a_stage_reads_the_format_that_it_finds(
    name: str, stage: type, use: Use, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = rows_of(name)
    if name == "implicit_preference" and use is Use.prompt:
        said = {side: {"role": "assistant", "content": side} for side in ("chosen", "rejected")}
        rows = [
            {side: [{"role": "user", "content": f"p{i}"}, said[side]] for side in said}
            for i in range(ROWS)
        ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(path=str(path), eval_fraction=0.25)
    if name == "hh_rlhf_messages":
        data.format = DataFormat.hh_rlhf_messages
    cfg = Config(stage=stage(), run=RunConfig(dir=str(tmp_path / "runs"), name="r"), data=data)
    stage_rows.check(cfg)
    tokenizer = train_tokenizer(["x"], 300, 512)
    tokenizer.chat_template = template_text("chatml")
    read: dict[Use, Any] = {
        Use.sft: reading.sft_records,
        Use.preference: reading.preference_records,
        Use.unpaired: reading.unpaired_records,
        Use.prompt: lambda request: (
            reading.prompts(request, tokenizer),
            reading.prompts(request, tokenizer, split="eval"),
        ),
    }
    train, held = read[use](reading.DataRequest.of(cfg))
    format_ = by_name(name)
    records = sum(len(format_.read(row, use).pairs) for row in rows)
    sides = 2 if use is Use.unpaired and format_.unpaired is None else 1
    assert len(train) + len(held) == records * sides and len(train) > len(held) > 0
    assert f"rows.jsonl: {records} rows, read as {name} (" in caplog.text


def test_a_reward_model_learns_from_a_sheet_that_people_filled_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pairs written as an Excel label sheet, ties and skips added, and trained on by path."""
    ties = [
        {
            "pair_id": f"t{i}",
            "prompt": "the film",
            "response_a": "x",
            "response_b": "y",
            "preference": ("tie", "skip")[i % 2],
        }
        for i in range(6)
    ]
    sheet = [
        row
        for pair in trl_tools.pair_rows(80)
        for row in convert(Use.preference, pair, DataTarget.xlsx)[0]
    ]
    write_rows([*sheet, *ties], tmp_path / "sheet.xlsx", FileKind.xlsx)
    stage = RewardStage(
        steps=12,
        batch_size=8,
        eval_steps=6,
        max_length=40,
        learning_rate=5e-3,
        warmup_ratio=0.0,
        bootstrap=200,
    )
    cfg = trl_tools.config(
        stage,
        tmp_path,
        "sheet",
        [],
        data=DataConfig(path=str(tmp_path / "sheet.xlsx"), eval_fraction=0.2),
    )
    ctx = RunContext.open(cfg)
    reward.run(ctx, stage_rows)
    metrics = json.loads((ctx.dir / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["eval/accuracy"] > 0.9
    assert "6 judgements" in caplog.text and "set aside" in caplog.text
    manifest = json.loads((ctx.dir / "manifest.json").read_text(encoding="utf-8"))
    assert [entry["path"] for entry in manifest["data"]] == [str(tmp_path / "sheet.xlsx")]
    assert len((ctx.dir / "data_rejected.jsonl").read_text(encoding="utf-8").splitlines()) == 6
