"""A run that was killed and goes on in another process, of another hash seed, takes the same steps,
to the bit, as one that never stopped.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.chaos.child import FAULT
from rlhf.cli import config
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from tests import toys
from tests.offline import trl_tools
from tests.online.test_nonfinite import same

ROOT = Path(__file__).resolve().parents[2]
COMMON = ["model.dtype=float32", "engine.threads=1", "tracking=none", "run.keep_checkpoints=0"]
ONLINE = [
    *COMMON,
    "rollout=hf",
    "data.max_prompt_length=24",
    "reward.function=tests.toys:even_tokens",
    "rollout.max_response_length=4",
]
ONLINE += [
    "stage.steps=5",
    "stage.save_steps=2",
    "stage.learning_rate=3e-3",
    "stage.scheduler=cosine",
    "stage.samples_kept=4",
    "stage.minibatches=2",
]
OFFLINE = [
    *COMMON,
    "stage.steps=6",
    "stage.batch_size=8",
    "stage.eval_steps=2",
    "stage.max_length=48",
    "stage.learning_rate=3e-3",
]
# draws from torch's own generator in every forward pass
DROPOUT = ["adapter=lora", "adapter.rank=4", "adapter.dropout=0.2"]
CASES: dict[str, list[str]] = {
    "ppo": [
        *ONLINE,
        "stage.prompts_per_step=8",
        "stage.critic_init=policy",
        "stage.critic_warmup=1",
        "stage.reward_normalise=true",
        "stage.kl_controller=adaptive",
        "stage.kl_horizon=40",
        "stage.reference_every=3",
        "stage.watch.judge_function=tests.toys:mostly_even",
        "stage.watch.judge_every=1",
        "stage.watch.judge_prompts=3",
    ],
    "grpo": [
        *ONLINE,
        *DROPOUT,
        "stage.prompts_per_step=4",
        "stage.samples_per_prompt=2",
        "stage.selection=unequal",
    ],
    "sft": [*OFFLINE, *DROPOUT],
    "reward": [*OFFLINE, "stage.log_steps=3", "stage.bootstrap=10"],
    # TRL turns dropout off; a first step at rate 0 moves nothing
    "dpo": [*OFFLINE, "adapter=lora", "adapter.rank=4", "stage.warmup_ratio=0"],
}
FAST, FULL, SLOW = ("ppo", "sft"), ("grpo",), ("reward", "dpo")
MODULES = {"ppo": "online", "grpo": "online", "dpo": "preference"}
# while this step's metrics are written: the checkpoint of two steps before, or of the step before,
# is the last
KILLED_AT = 4


def options(stage: str, folder: Path, model: Path, name: str) -> list[str]:
    data = {"sft": "sft", "reward": "pairs", "dpo": "pairs"}.get(stage, "prompts")
    files = [f"data.path={folder / data}.jsonl"] + (
        [f"data.eval_path={folder / 'held_out.jsonl'}"] if stage == "ppo" else []
    )
    return [
        f"stage={stage}",
        f"model.path={model}",
        f"run.dir={folder}",
        f"run.name={name}",
        *files,
        *CASES[stage],
    ]


def run(stage: str, given: list[str], killed_at: int | None = None) -> Path:
    """In this process; `killed_at` ends it like a kill, which no handler sees, where that step's
    metrics would be written.
    """
    ctx = RunContext.open(config.compose(given), ())
    log = ctx.tracker.log

    def killed(step: int, metrics: Any) -> None:
        if step == killed_at:
            raise KeyboardInterrupt
        log(step, metrics)

    ctx.tracker.log = killed  # type: ignore[method-assign]
    module = importlib.import_module(f"rlhf.stages.{MODULES.get(stage, stage)}")
    if killed_at is None:
        module.run(ctx, stage_rows)
    else:
        with pytest.raises(KeyboardInterrupt):
            module.run(ctx, stage_rows)
    return ctx.dir


def resume(commands: list[list[str]], *launcher: str, **environment: str) -> None:
    """The commands with run.resume=true in a new process, or in as many as `launcher` starts."""
    given = [[*command, "run.resume=true"] for command in commands]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "17",
        **environment,
    }
    command = [sys.executable, *launcher, "-m", "tests.stages.resume_worker", json.dumps(given)]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def write_data(folder: Path) -> None:
    toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    toys.write_jsonl(
        folder / "held_out.jsonl", [{"prompt": f"omega {number}"} for number in range(3)]
    )
    trl_tools.write_rows(folder / "sft.jsonl", trl_tools.sft_rows(30))
    trl_tools.write_rows(folder / "pairs.jsonl", trl_tools.pair_rows(30))


@pytest.fixture(
    scope="module",
    params=[
        FAST,
        pytest.param(FULL, marks=pytest.mark.full),
        pytest.param(SLOW, marks=pytest.mark.slow),
    ],
    ids=["fast", "full", "slow"],
)
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Callable[..., Path],
    one_thread: Iterator[None],
) -> tuple[Path, Sequence[str]]:
    """Every case twice, straight, and killed and resumed by one other process: their folder, and
    the cases.
    """
    folder = tmp_path_factory.mktemp("resume")
    write_data(folder)
    model = tiny_model()
    for stage in request.param:
        run(stage, options(stage, folder, model, "straight"))
        run(stage, options(stage, folder, model, "broken"), killed_at=KILLED_AT)
    resume([options(stage, folder, model, "broken") for stage in request.param])
    return folder, request.param


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """A metric line without what the clock and the machine decide."""
    return {
        k: v
        for k, v in row.items()
        if not k.startswith(("time", "memory/"))
        and not k.endswith(("_per_s", "_runtime", "_per_second"))
    }


def rows(path: Path) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def both(folder: Path, stage: str) -> tuple[Path, Path]:
    straight, broken = folder / "straight" / stage, folder / "broken" / stage
    starts = json.loads((broken / "manifest.json").read_text(encoding="utf-8"))["starts"]
    assert len(starts) == 2 and starts[1]["resume_from"].endswith(
        ("step-2", "checkpoint-2", "checkpoint-3")
    ), "it was resumed in the middle"
    return straight, broken


def test_every_metric_is_the_same(runs: tuple[Path, Sequence[str]]) -> None:
    for stage in runs[1]:
        straight, broken = both(runs[0], stage)
        expected = rows(straight / "metrics.jsonl")
        assert len(expected) >= 5 and len({row["step"] for row in expected}) == len(expected), stage
        assert rows(broken / "metrics.jsonl") == expected, stage
        assert rows(broken / "samples.jsonl") == rows(straight / "samples.jsonl"), stage


def test_every_weight_is_the_same(runs: tuple[Path, Sequence[str]]) -> None:
    for stage in runs[1]:
        compare_weights(*both(runs[0], stage))


def compare_weights(straight: Path, broken: Path) -> None:
    files = sorted(
        p.relative_to(straight)
        for p in straight.rglob("*.safetensors")
        if p.parts[-3] != "checkpoints"
    )
    assert (
        Path("model/model.safetensors") in files or Path("model/adapter_model.safetensors") in files
    )
    for file in files:
        expected, found = load_file(straight / file), load_file(broken / file)
        assert expected.keys() == found.keys()
        for name in expected:
            assert torch.equal(expected[name], found[name]), (file, name)
    assert {p.relative_to(broken) for p in (broken / "model").rglob("*")} == {
        p.relative_to(straight) for p in (straight / "model").rglob("*")
    }


def test_optimizer_generators_and_counters_are_the_same(runs: tuple[Path, Sequence[str]]) -> None:
    """The last checkpoint of both online cases, which was written after the resume."""
    for stage in set(runs[1]) & {"ppo", "grpo"}:
        compare_checkpoints(stage, *both(runs[0], stage))


def compare_checkpoints(stage: str, straight: Path, broken: Path) -> None:
    places = [place / "checkpoints" / "step-4" for place in (straight, broken)]
    states = []
    for place in places:
        tensors = {
            p.relative_to(place).as_posix(): torch.load(p, weights_only=True)
            for p in sorted(place.rglob("*.pt"))
        }
        loop = json.loads((place / "loop.json").read_text(encoding="utf-8"))
        states.append((tensors, loop | {"history": [timeless(row) for row in loop["history"]]}))
    (expected, loop), (found, other) = states
    assert loop == other
    if stage == "ppo":
        assert (
            loop["moments"]["count"] == 32
            and loop["kl"]["coef"] != 0.05
            and len(loop["watching"]["judged"]) == 5
        )
    else:
        assert loop["draws"] > 4, "prompts were drawn again in some step"
    assert (
        expected.keys() == found.keys() and {"policy/engine.pt", "random-0.pt"} <= expected.keys()
    )
    for name in expected:
        assert same(found[name], expected[name]), name


def test_what_is_compared_moves(runs: tuple[Path, Sequence[str]]) -> None:
    """The comparison would hold for runs in which nothing happens."""
    for stage in runs[1]:
        losses = [
            row[k]
            for row in rows(runs[0] / "straight" / stage / "metrics.jsonl")
            for k in ("loss", "loss/policy")
            if k in row
        ]
        assert len(set(losses)) == len(losses) >= 2, (stage, losses)


# ---- backends that take their time ----


def launch(given: list[str], folder: Path, ranks: int = 1, **fault: Any) -> int:
    """A command line in processes of its own, with a fault of benchmarks.chaos.child in it; returns
    the exit code.
    """
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        if ranks > 1
        else []
    )
    command = [sys.executable, *launcher, "-m", "benchmarks.chaos.child", *given]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=env | {FAULT: json.dumps(fault)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    print(done.stdout[-2000:], done.stderr[-4000:])
    return done.returncode


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero", [1, 3])
def test_a_signal_to_one_of_two_ranks_saves_all_and_they_go_on_to_a_millionth(
    tmp_path: Path, tiny_model: Callable[..., Path], zero: int
) -> None:
    write_data(tmp_path)
    common = [
        *CASES["ppo"],
        f"engine=zero{zero}",
        "stage.reference_every=0",
        "stage.reference=true",
        "stage.save_steps=0",
    ]
    runs = {}
    for name in ("straight", "broken"):
        given = [*options("ppo", tmp_path, tiny_model(), name), *common]
        if name == "broken":
            # torchrun's own code
            assert (
                launch(given, tmp_path, 2, point="update", times=3, action="terminate", rank=1) == 1
            )
            assert [p.name for p in (tmp_path / name / "ppo" / "checkpoints").iterdir()] == [
                "step-3"
            ]
            given.append("run.resume=true")
        assert launch(given, tmp_path, 2) == 0
        runs[name] = tmp_path / name / "ppo"
    for expected, found in zip(
        rows(runs["straight"] / "metrics.jsonl"),
        rows(runs["broken"] / "metrics.jsonl"),
        strict=True,
    ):
        assert found == pytest.approx(expected, abs=1e-6)
    weights = [load_file(place / "model" / "model.safetensors") for place in runs.values()]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, atol=1e-6, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_vllms_rollouts_are_the_same_after_a_kill(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """Every request has a seed of its own, a function of the draw and the prompt."""
    write_data(tmp_path)
    extra = [
        "rollout=vllm",
        "rollout.kv_cache_gib=0.05",
        "stage.samples_per_prompt=2",
        "stage.reference_every=0",
    ]
    for name in ("straight", "broken"):
        given = [*options("ppo", tmp_path, tiny_model(), name), *extra]
        if name == "broken":
            assert launch(given, tmp_path, point="update", times=4, action="kill") == -9
            given.append("run.resume=true")
        assert launch(given, tmp_path) == 0
    straight, broken = both(tmp_path, "ppo")
    assert rows(broken / "metrics.jsonl") == rows(straight / "metrics.jsonl")
    assert rows(broken / "samples.jsonl") == rows(straight / "samples.jsonl")
    assert (broken / "model" / "model.safetensors").read_bytes() == (
        straight / "model" / "model.safetensors"
    ).read_bytes()
