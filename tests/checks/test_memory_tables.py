"""The doctor's table of settings as a user sees it: it fits a narrow terminal, names every change,
and marks what it recommends.
"""

import io
import re
import shlex
from dataclasses import replace

import pytest

from conf.choices import AdapterKind, LoraInit, Quantization
from conf.schema import AdapterConfig
from rlhf.checks.memory import fit, tables
from rlhf.checks.memory.fit import Row, rows
from rlhf.checks.memory.moments import Machine
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import Shapes
from tests.checks.test_memory import GPU, SHAPE, made


def drawn(found: list[Row], width: int) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width).print(tables.fit_table(found, "a title", width))
    return out.getvalue()


def fitted(gib: float = 80.0, stage: str = "ppo") -> list[Row]:
    return rows(
        made(stage), Shapes(SHAPE(), (("reward.path", SHAPE()),)), replace(GPU, device_gib=gib)
    )


@pytest.mark.parametrize("width", [80, 120, 200])
def test_no_cell_is_cut_or_folded(width: int) -> None:
    found = fitted(6.0)
    text = drawn(found, width)
    lines = [line for line in text.splitlines() if line.strip().startswith(("torch", "zero"))]
    assert (
        len(lines) == len(found) and "…" not in text and max(map(len, text.splitlines())) <= width
    )
    assert [tuple(line.split()[:1]) for line in lines] == [
        (f"zero{row.cfg.engine.zero_stage}",) for row in found
    ]
    assert ("reference" in text) is (width >= 120) and "fits" in text and "host" in text


def test_letters_stand_for_every_change_and_the_recommended_lines_are_marked() -> None:
    found = fitted(16.0)
    text = drawn(found, 80)
    changes = {change for row in found for change in row.changes}
    servers = {shlex.join(row.place) for row in found if row.place}
    assert changes and servers
    legend: dict[str, str] = {}
    letter = ""
    for line in text.splitlines():
        if re.match(r" [a-z] ", line):
            letter = line[1]
            legend[letter] = line[2:].strip()
        elif letter and line.startswith("   "):  # the rest of a long one
            legend[letter] += f" {line.strip()}"
    assert set(legend.values()) == changes | servers
    marked = [line for line in text.splitlines() if line.rstrip().endswith("*")]
    best = [
        row
        for row in (fit.recommended(found, name) for name in fit.names_of(found))
        if row is not None
    ]
    assert len(marked) == len(best) > 0
    for line, row in zip(marked, best, strict=True):
        assert f"zero{row.cfg.engine.zero_stage}" in line and " yes " in line
        assert [legend[letter].strip() for letter in line.split("yes")[1].split()[:-1]] == list(
            row.changes
        )


def test_ways_to_train_take_less_in_turn() -> None:
    found = fitted()
    assert fit.names_of(found) == ["all", "top 4", "LoRA", "QLoRA"]
    idle = {}
    for row in found:
        if row.cfg.engine.zero_stage == 1 and row.cfg.engine.offload.value == "none":
            held = plan(row.cfg, Shapes(SHAPE(), (("reward.path", SHAPE()),)), GPU)
            idle[row.way.name] = held.moments[-1].roles["policy"].device
    assert list(idle.values()) == sorted(idle.values(), reverse=True)
    shape = SHAPE()
    linear = sum(one.inputs * one.outputs for one in shape.linears)
    # 4 bits, 8 bits for 64 of them, 32 bits for 256 of those
    saved = linear * (16 - 4 - 8 / 64 - 32 / 64 / 256) / 8
    assert idle["LoRA"] - idle["QLoRA"] == pytest.approx(saved, rel=1e-3)
    best = fit.recommended(found, "QLoRA")
    assert best is not None and "adapter.quantize=nf4" in best.overrides


def test_loftq_is_a_way_to_hold_4_bits() -> None:
    loftq = AdapterConfig(
        kind=AdapterKind.lora, rank=4, init=LoraInit.loftq, quantize=Quantization.nf4
    )
    found = rows(replace(made("sft"), adapter=loftq), Shapes(SHAPE()), GPU)
    ways = {row.way.name: row for row in found}
    assert ways["LoRA"].cfg.adapter.init is LoraInit.default
    assert ways["QLoRA"].cfg.adapter == loftq
    assert "adapter=loftq" in ways["QLoRA"].overrides


def test_the_configured_way_is_there_and_named() -> None:
    other = AdapterConfig(kind=AdapterKind.molora, rank=4)
    cfg = replace(made("sft"), adapter=other)
    found = rows(cfg, Shapes(SHAPE()), GPU)
    assert fit.names_of(found) == ["all", "top 4", "molora", "LoRA", "QLoRA"]
    assert fit.configured(cfg) == "molora"
    answer = tables.answers(found, GPU)[2]
    assert answer.startswith("adapter.kind=molora fits on") and "adapter.kind=molora" in answer


def test_what_does_not_fit_is_shown_at_its_least_with_the_reason() -> None:
    machine = replace(GPU, device_gib=10.0, ranks=1)
    models = Shapes(SHAPE(), (("reward.path", SHAPE()),))
    found = rows(made("ppo"), models, machine)
    settings = [s for way in fit.ways(made("ppo"), models) for s in fit.engines(way.cfg, machine)]
    for setting, row in zip(settings, found, strict=True):
        tried = [plan(cfg, models, machine) for cfg, _ in fit.eased(setting, models, machine)]
        assert row.plan.fits or row.plan.device_gib == min(
            one.device_gib for one in tried if one.problem is None
        )
    assert not all(row.plan.fits for row in found)
    full = tables.answers(found, machine)[0]
    assert full.startswith(
        "full training doesn't fit on 1 device of 10 GiB with any engine. The least is with engine="
    )
    assert "GiB in " in full and "of which" in full


def test_the_obstacle_is_named() -> None:
    machine = Machine(ranks=8, cuda=True, device_gib=80.0, host_gib=2.0)
    models = Shapes(SHAPE(), (("reward.path", SHAPE()),))
    short = plan(made("grpo"), models, machine)
    assert (
        short.obstacle is not None
        and short.obstacle.endswith("GiB of host memory, and 2 are here")
        and not short.fits
    )
    fits = plan(made("grpo"), models, GPU)
    assert fits.obstacle is None and fits.fits
    big = plan(made("grpo"), Shapes(replace(SHAPE(), parameters=int(7e10))), replace(GPU, ranks=64))
    assert big.obstacle is not None and "doesn't hold vLLM's weights" in big.obstacle
