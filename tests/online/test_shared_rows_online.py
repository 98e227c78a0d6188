"""Online stages whose ranks share rows (engine.sequence_parallel) take the steps of the engine that
reads rows whole in this process.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conf.choices import AdapterKind, EngineKind
from conf.schema import AdapterConfig, EngineConfig, ModelConfig
from conf.stages import OnlineStage
from rlhf.checks import sharing
from rlhf.checks.memory.moments import Machine, Phase, Plan
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import shapes_of
from rlhf.cli.config import compose
from rlhf.models.loading import train_tokenizer
from rlhf.types import UserError
from tests import toys
from tests.online import zero_online_worker
from tests.online.families import tiny_family
from tests.online.test_zero_online import COMPARED, COMPARED_IN_GROUPS, folder_of, launch, rows
from tests.selection import marked_full, selected

TOLERANCE = 1e-5  # nats, units of the score, and weights
_COMMON = "stage.adam_eps=1e-4"  # Adam's first step is the sign of each gradient, noise included
_GROUPS = f"stage.samples_per_prompt=4:stage.epochs=1:{_COMMON}"
SHARED = "engine.sequence_parallel=2"
RUNS = [
    # a critic, and a reference of its own
    *(f"zero{zero}:none:family=llama:{_COMMON}" for zero in (1, 3)),
    # one pass; the reference is the adapter turned off; one head of keys for two ranks
    f"zero3:lora:stage=grpo:family=qwen3:{_GROUPS}",
    f"zero2:none:stage=grpo:family=llama:{_GROUPS}:stage.entropy_coef=0.01",
    f"zero2:lora:stage=online_dpo:family=llama:{_GROUPS}:stage.kl_coef=0.0",
    # its preset draws each rank's minibatches apart, which are others on one rank
    f"zero3:none:stage=gspo:family=qwen3_moe:{_GROUPS}:stage.epochs=2:stage.minibatches=1:"
    "engine.gradient_checkpointing=true",
]
COVERING = [RUNS[1], RUNS[2]]


def plain(run: str) -> str:
    """The run of the engine in one process that `run` is compared with."""
    return "torch:" + run.split(":", 1)[1].replace(":engine.gradient_checkpointing=true", "")


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: Iterator[None],
) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    held_out = [{"prompt": f"omega {number}"} for number in range(3)]
    toys.write_jsonl(folder / "held_out.jsonl", held_out)
    tokenizer = train_tokenizer([str(row["prompt"]) for row in toys.prompt_rows()], 300, 64)
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_family("llama", folder / "tokenizer", folder / "llama")
    tiny_family("qwen3", folder / "tokenizer", folder / "qwen3", num_key_value_heads=1)
    tiny_family("qwen3_moe", folder / "tokenizer", folder / "qwen3_moe")
    wanted = [run for run in RUNS if run in selected(request, "run")]
    start = folder / "llama"
    for run in dict.fromkeys(plain(run) for run in wanted):
        zero_online_worker.run(str(folder), str(start), run)
    launch(folder, start, [f"{run}:{SHARED}" for run in wanted])
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize("run", marked_full(RUNS, COVERING))
def test_shared_rows_take_the_torch_engines_steps(runs: Path, run: str) -> None:
    shared = f"{run}:{SHARED}"
    expected, found = rows(runs, plain(run)), rows(runs, shared)
    assert len(found) == len(expected) == 3
    names = COMPARED_IN_GROUPS if "stage=" in run else COMPARED
    for theirs, ours in zip(expected, found, strict=True):
        for name in names:
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=TOLERANCE), name
        assert ours["rollout/logprob_gap"] < 1e-4 and ours["rollout/probe_gap"] < 1e-4
    weights, reference = (
        load_file(folder_of(runs, one) / "model" / "model.safetensors")
        for one in (shared, plain(run))
    )
    family = next(part for part in run.split(":") if part.startswith("family="))
    start = load_file(runs / family.removeprefix("family=") / "model.safetensors")
    for name in reference:
        torch.testing.assert_close(weights[name], reference[name], atol=TOLERANCE, rtol=0, msg=name)
    assert max(float((reference[n] - start[n]).abs().max()) for n in start) > 100 * TOLERANCE


# ---- what can't be combined, and what the plan counts ----


@pytest.mark.parametrize(
    ("stage", "adapter", "share_prompts", "word"),
    [
        (OnlineStage(dropout=True), AdapterConfig(), None, "stage.dropout=true"),
        (
            OnlineStage(),
            AdapterConfig(kind=AdapterKind.lora, dropout=0.1),
            None,
            "adapter.dropout=0.1",
        ),
        (OnlineStage(), AdapterConfig(kind=AdapterKind.adalora), None, "adapter=adalora"),
        (OnlineStage(), AdapterConfig(), True, "engine.share_prompts=true"),
    ],
)
def test_options_that_rows_are_not_shared_with(
    stage: OnlineStage, adapter: AdapterConfig, share_prompts: bool | None, word: str
) -> None:
    engine = EngineConfig(
        kind=EngineKind.deepspeed,
        zero_stage=2,
        sequence_parallel=2,
        share_prompts=share_prompts,
    )
    with pytest.raises(UserError, match=r"engine\.sequence_parallel=2") as caught:
        sharing.check(stage, ModelConfig(params=1e9), adapter, engine, 64, 2)
    assert word in str(caught.value)


def planned(*overrides: str) -> Plan:
    cfg = compose(
        [
            "stage=grpo",
            "engine=zero3",
            "rollout=server",
            "model.params=1e9",
            "data.path=x.jsonl",
            "reward=math",
            "data.max_prompt_length=8192",
            *overrides,
        ]
    )
    machine = Machine(ranks=8, cuda=True, device_gib=80.0, host_gib=None)
    return plan(cfg, shapes_of(cfg.model, ())[0], machine)


def test_the_memory_plan_counts_a_part_of_each_row() -> None:
    alone = planned("engine.share_prompts=false", "engine.micro_tokens=16384")
    shared = planned("engine.sequence_parallel=4", "engine.micro_tokens=65536")
    assert shared.peak(Phase.update) == alone.peak(Phase.update)
