"""Ranks that share rows (engine.sequence_parallel) take the same steps as one rank that reads them
whole, whatever their lengths.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from conf.choices import AdapterKind, EngineKind
from conf.methods import PromptConfig
from conf.schema import AdapterConfig, EngineConfig, ModelConfig
from conf.stages import PreferenceStage, SFTStage, TrainStage
from rlhf.checks import launch, sharing
from rlhf.checks.memory.fit import eased
from rlhf.checks.memory.moments import Machine, Plan
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import shapes_of
from rlhf.cli.config import compose
from rlhf.types import UserError
from tests.offline import shared_rows_worker, trl_tools
from tests.online.families import tiny_family
from tests.selection import marked_full, selected

TOLERANCE = 1e-5  # nats of loss, and weights
TWO_RANKS = list(shared_rows_worker.CASES)
RUNS = [(2, name) for name in TWO_RANKS] + [(4, name) for name in ("plain", "tokens", "resumed")]
COVERING = [(2, "plain"), (2, "grouped"), (2, "tokens")]


def make_inputs(folder: Path) -> None:
    """Rows of many lengths, some longer than the others by far, and the models."""
    rows = trl_tools.sft_rows()
    for number, row in enumerate(rows):
        row["weight"] = 1 + number % 3
    trl_tools.write_rows(folder / "rows.jsonl", rows)
    tokenizer = trl_tools.tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_family("llama", folder / "tokenizer", folder / "llama")
    tiny_family("qwen3", folder / "tokenizer", folder / "qwen3", num_key_value_heads=1)
    tiny_family("qwen3_moe", folder / "tokenizer", folder / "qwen3_moe")
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=300,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=33,  # the last part of a row has no place for padding
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")


def launch_ranks(folder: Path, ranks: int, names: list[str]) -> None:
    extra = {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "HF_HUB_OFFLINE": "1",
    }
    inherited = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    environment = {key: value for key, value in os.environ.items() if key not in inherited}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", "-m", "tests.offline.shared_rows_worker"]
    done = subprocess.run(
        [*command, str(folder), *names],
        env=environment | extra,
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: Iterator[None],
) -> Path:
    """Directory with 1-ranks/, 2-ranks/ and 4-ranks/, where two ranks share each row."""
    wanted: set[Any] = selected(request, "ranks", "name")
    folder = tmp_path_factory.mktemp("shared")
    make_inputs(folder)
    for name in sorted({name for _, name in wanted}):
        shared_rows_worker.run(folder, name, 1)
    for ranks in sorted({ranks for ranks, _ in wanted}):
        launch_ranks(folder, ranks, sorted(name for count, name in wanted if count == ranks))
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "name"), marked_full(RUNS, COVERING))
def test_shared_rows_train_as_whole_ones(runs: Path, ranks: int, name: str) -> None:
    one, several = (runs / f"{count}-ranks" / name / "sft" for count in (1, ranks))
    expected, found = trl_tools.losses(one), trl_tools.losses(several)
    assert len(found) == shared_rows_worker.STEPS
    assert found == pytest.approx(expected, abs=TOLERANCE)
    if name == "resumed":
        starts = json.loads((several / "manifest.json").read_text(encoding="utf-8"))["starts"]
        assert starts[1]["resume_from"].endswith("checkpoint-2")
    figures = ["eval_loss", "num_tokens", "initial/eval_loss"]
    if ranks == 2:  # TRL's own mean over micro-batches, which are others on more groups
        figures.append("eval_mean_token_accuracy")
    one_summary, summary = (
        json.loads((run / "summary.json").read_text())["metrics"] for run in (one, several)
    )
    start, end = one_summary["initial/eval_loss"], one_summary["eval_loss"]
    assert end < start - 100 * TOLERANCE, "a model that stands still would pass"
    for figure in figures:
        assert summary[figure] == pytest.approx(one_summary[figure], abs=TOLERANCE), figure
    compared = 0
    for path in one.glob("*/*.safetensors"):
        weights = load_file(several / path.relative_to(one))
        for key, tensor in load_file(path).items():
            torch.testing.assert_close(weights[key], tensor, atol=TOLERANCE, rtol=0, msg=key)
            compared += 1
    assert compared >= 8


# ---- how rows spread ----


def zero(**options: Any) -> EngineConfig:
    return EngineConfig(kind=EngineKind.deepspeed, zero_stage=1, **options)


def test_groups_of_ranks_divide_the_batch() -> None:
    plan = launch.plan_batches(12, zero(sequence_parallel=2, micro_batch_size=3), 4)
    assert (plan.ranks, plan.micro, plan.accumulation, plan.sharing) == (2, 3, 2, 2)
    plan = launch.plan_batches(12, zero(sequence_parallel=4), 4)
    assert (plan.ranks, plan.micro, plan.accumulation) == (1, 12, 1)
    plan = launch.plan_batches(12, zero(), 4)
    assert (plan.ranks, plan.micro, plan.accumulation, plan.sharing) == (4, 3, 1, 1)


@pytest.mark.parametrize(
    ("engine", "ranks", "batch", "words"),
    [
        (zero(sequence_parallel=2), 3, 12, ("engine.gpus=3", "engine.sequence_parallel = 2")),
        (EngineConfig(sequence_parallel=2), 1, 12, ("engine.gpus=1", "sequence_parallel")),
        (zero(sequence_parallel=2), 4, 3, ("stage.batch_size=3", "2 x 2 ranks")),
    ],
)
def test_what_does_not_divide_is_refused(
    engine: EngineConfig, ranks: int, batch: int, words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        launch.plan_batches(batch, engine, ranks)
    assert all(word in str(caught.value) for word in words), caught.value


def planned(longest: int, sharing_ranks: int) -> Plan:
    """Of a 1B model on eight devices, a row in each micro-batch."""
    cfg = compose(
        [
            "stage=sft",
            "engine=zero3",
            "model.params=1e9",
            "data.path=x.jsonl",
            "engine.micro_batch_size=1",
            f"stage.max_length={longest}",
            f"engine.sequence_parallel={sharing_ranks}",
        ]
    )
    machine = Machine(ranks=8, cuda=True, device_gib=80.0, host_gib=None)
    return plan(cfg, shapes_of(cfg.model, ())[0], machine)


def test_the_memory_plan_counts_a_part_of_each_row() -> None:
    shared = planned(16384, 4)
    assert shared.moments == planned(4096, 1).moments
    assert shared.device_gib < 0.6 * planned(16384, 1).device_gib


def test_the_doctor_proposes_to_share_rows_that_fit_no_other_way() -> None:
    cfg = compose(
        [
            "stage=sft",
            "engine=zero3",
            "model.params=8b",
            "data.path=x.jsonl",
            "stage.max_length=262144",
            "stage.batch_size=16",
        ]
    )
    machine = Machine(ranks=8, cuda=True, device_gib=80.0, host_gib=None)
    shapes = shapes_of(cfg.model, ())[0]
    found = next(
        (one, changes)
        for one, changes in eased(cfg, shapes, machine)
        if plan(one, shapes, machine).fits
    )
    assert found[1] == (
        "engine.gradient_checkpointing=true",
        "engine.micro_batch_size=1",
        f"engine.sequence_parallel={found[0].engine.sequence_parallel}",
    )
    assert found[0].engine.sequence_parallel > 1
    sharing.check(cfg.stage, cfg.model, cfg.adapter, found[0].engine, 262144, 8)
    by_tokens = replace(cfg, engine=replace(cfg.engine, micro_batch_tokens=300_000))
    *_, (last, changes) = eased(by_tokens, shapes, machine)
    assert changes[-2:] == ("engine.micro_batch_tokens=262144", "engine.sequence_parallel=8")
    assert last.engine.micro_batch_size is None and last.engine.micro_batch_tokens == 262144
    packed = replace(cfg, stage=replace(cfg.stage, packing=True))
    assert not any(one.engine.sequence_parallel > 1 for one, _ in eased(packed, shapes, machine))


# ---- what can't be combined ----

SFT = SFTStage(max_length=32)
SIX_HEADS = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


@pytest.mark.parametrize(
    ("stage", "adapter", "attention", "word"),
    [
        (PreferenceStage(), AdapterConfig(), None, "stage=dpo"),
        (SFTStage(packing=True), AdapterConfig(), None, "stage.packing=true"),
        (SFTStage(noise_scale=0.9), AdapterConfig(), None, "stage.noise_scale=0.9"),
        (SFT, AdapterConfig(kind=AdapterKind.prefix), None, "adapter=prefix"),
        (
            SFT,
            AdapterConfig(kind=AdapterKind.prompt, prompt=PromptConfig(tokens=4)),
            None,
            "adapter=prompt",
        ),
        (SFT, AdapterConfig(), "eager", "model.attn_implementation=eager"),
    ],
)
def test_options_that_rows_are_not_shared_with(
    stage: TrainStage, adapter: AdapterConfig, attention: str | None, word: str
) -> None:
    model = ModelConfig(params=1e9, attn_implementation=attention)
    sharing.check(stage, model, adapter, zero(), 32, 2)
    with pytest.raises(UserError, match=r"engine\.sequence_parallel=2") as caught:
        sharing.check(stage, model, adapter, zero(sequence_parallel=2), 32, 2)
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changed", "ranks", "word"),
    [
        ("mistral", {}, 2, "a sliding window of 16 tokens"),
        ("mistral", {"sliding_window": 32}, 2, None),  # as long as the longest row
        ("gemma2", {}, 2, "layers of sliding_attention"),
        ("gpt_oss", {"sliding_window": 64}, 2, "sdpa"),
        ("deepseek_v2", {}, 2, "latent attention"),
        ("llama", SIX_HEADS, 4, "6 attention heads"),
        ("llama", SIX_HEADS, 2, "3 heads of keys"),
        ("llama", {"num_key_value_heads": 1}, 2, None),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            2,
            "rope_type=dynamic",
        ),
        ("qwen3", {}, 2, None),
    ],
)
def test_families_that_rows_are_not_shared_with(
    tmp_path: Path, family: str, changed: dict[str, Any], ranks: int, word: str | None
) -> None:
    """By the configuration alone: there are no weights to load."""
    trl_tools.tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tiny_family(family, tmp_path / "tokenizer", tmp_path / "model", **changed)
    for weights in (tmp_path / "model").glob("*.safetensors"):
        weights.unlink()
    model = ModelConfig(path=str(tmp_path / "model"))
    engine = zero(sequence_parallel=ranks)
    if word is None:
        sharing.check(SFT, model, AdapterConfig(), engine, SFT.max_length, 4)
        return
    with pytest.raises(UserError, match=rf"engine\.sequence_parallel={ranks}") as caught:
        sharing.check(SFT, model, AdapterConfig(), engine, SFT.max_length, 4)
    assert family in str(caught.value) and word in str(caught.value)
