"""A run goes on with another number of ranks, or at another ZeRO stage, through DeepSpeed's
universal checkpoint; and goes back under ZeRO.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conf.choices import EngineKind, Offload
from conf.schema import EngineConfig
from policy.engines import resharding
from policy.engines.resharding import repair_universal
from rlhf.process import checkpoints, randomness
from rlhf.types import UserError
from tests import toys
from tests.offline import trl_tools
from tests.process.test_security import Payload
from tests.stages.test_resume import rows

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
ZERO = {stage: EngineConfig(kind=EngineKind.deepspeed, zero_stage=stage) for stage in range(4)}
COMMON = [
    "model.dtype=float32",
    "engine.threads=1",
    "tracking=none",
    "run.keep_checkpoints=0",
    "stage.steps=4",
    "stage.learning_rate=1e-3",
]
ONLINE = [
    "rollout=hf",
    "data.max_prompt_length=24",
    "reward.function=tests.toys:even_tokens",
    "rollout.max_response_length=4",
]
ONLINE += [
    "stage.save_steps=2",
    "stage.prompts_per_step=8",
    "stage.epochs=2",
    "stage.samples_kept=4",
]
PPO = [
    "stage=ppo",
    *COMMON,
    *ONLINE,
    "stage.critic_init=policy",
    "stage.critic_learning_rate=1e-3",
    "stage.kl_controller=adaptive",
]
GRPO = [
    "stage=grpo",
    *COMMON,
    *ONLINE,
    "stage.samples_per_prompt=2",
    "adapter=lora",
    "adapter.rank=4",
]
SFT = [
    "stage=sft",
    *COMMON,
    "stage.batch_size=8",
    "stage.eval_steps=2",
    "stage.max_length=48",
    "stage.weight_decay=0.1",
]
# Groups that wait and groups that train, at the checkpoint and after it.
UNFREEZE = ["stage.depth_decay=0.5", "stage.weight_decay=0.1", "stage.adam_eps=1e-5"]
# name -> options, and the engine that it goes on with where that is another
CASES: dict[str, tuple[list[str], str | None]] = {
    "ppo1": ([*PPO, "engine=zero1", "stage.reward_normalise=true"], None),
    # At the checkpoint the policy's optimizer has taken no step. Adam's first step is the sign of
    # each gradient, noise included: eps smooths it.
    "warming3": ([*PPO, "engine=zero3", "stage.critic_warmup=3", "stage.adam_eps=1e-5"], None),
    "lora2": ([*GRPO, "engine=zero2"], None),
    "sft1": ([*SFT, "engine=zero1"], None),
    "sft3": ([*SFT, "engine=zero3"], None),
    "up": ([*PPO, "engine=zero2"], "zero3"),
    "down": ([*SFT, "engine=zero3", "adapter=lora", "adapter.rank=4"], "zero1"),
    "whole": ([*PPO, "engine=zero0"], None),
    "parts1": ([*SFT, *UNFREEZE, "engine=zero1", "stage.unfreeze.every=1"], None),
    "parts3": ([*SFT, *UNFREEZE, "engine=zero3", "stage.unfreeze.every=1"], None),
    # of eight optimizer steps, four before the checkpoint
    "thaw": ([*PPO, *UNFREEZE, "engine=zero2", "stage.unfreeze.every=3"], "zero3"),
    "top": ([*PPO, "engine=zero1", "stage.train.layers=1"], None),
}


def command(folder: Path, model: Path, name: str, given: list[str], *more: str) -> list[str]:
    data = "sft" if "stage=sft" in given else "prompts"
    return [
        *given,
        f"model.path={model}",
        f"run.dir={folder}",
        f"run.name={name}",
        f"data.path={folder / data}.jsonl",
        *more,
    ]


def launch(folder: Path, ranks: int, commands: list[list[str]], **extra: Any) -> str:
    env = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "HF_HUB_OFFLINE": "1",
    }
    whole = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "-m",
        "tests.online.zero_resume_worker",
    ]
    done = subprocess.run(
        [*whole, json.dumps({"commands": commands} | extra)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stderr


def run_directory(folder: Path, name: str) -> Path:
    return next(path for path in (folder / name).iterdir() if path.is_dir())


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{p.relative_to(run)}:{k}": v
        for p in sorted(run.glob("model/*.safetensors"))
        for k, v in load_file(p).items()
    }


def trained(run: Path) -> list[dict[str, float]]:
    """The metric lines; of TRL's, which are means of the ranks' means, those alone that do not
    depend on who held which row.
    """
    kept = rows(run / "metrics.jsonl")
    if run.name == "sft":
        kept = [
            {
                k: v
                for k, v in row.items()
                if k in ("step", "loss", "grad_norm", "learning_rate", "num_tokens")
            }
            for row in kept
        ]
    return kept


def check(folder: Path, names: list[str], before: int, after: int) -> None:
    """Straight on `before` ranks; then the second half anew, on `after`: figures and weights are
    the same to TOLERANCE.
    """
    toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    trl_tools.write_rows(folder / "sft.jsonl", trl_tools.sft_rows(30))
    model = folder / "start"
    commands = {name: command(folder, model, name, CASES[name][0]) for name in names}
    launch(folder, before, list(commands.values()), best=2 if "sft1" in names else None)
    straight = {}
    for name in names:
        run = run_directory(folder, name)
        straight[name] = (trained(run), weights(run))
        last = next((run / "checkpoints").glob("*-4"))
        shutil.rmtree(last)
        (run / "summary.json").unlink()
        shutil.rmtree(run / "model")
    engines = {name: [f"engine={CASES[name][1]}"] if CASES[name][1] else [] for name in names}
    said = launch(
        folder,
        after,
        [[*commands[n], *engines[n], "run.resume=true"] for n in names],
        best=2 if "sft1" in names else None,
    )
    print(said[-6000:])
    for name in names:
        run, (figures, expected) = run_directory(folder, name), straight[name]
        first, last = (next((run / "checkpoints").glob(f"*-{step}")) for step in (2, 4))
        starts = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["starts"]
        converted = f"checkpoints/{checkpoints.UNIVERSAL}/{first.name}"
        assert starts[1]["resume_from"].endswith(first.name if name == "whole" else converted), name
        assert (
            checkpoints.problem(first) is None
            and not (run / "checkpoints" / checkpoints.UNIVERSAL).exists()
        ), name
        assert (resharding.recorded(first), resharding.recorded(last)) != (None, None)
        assert [
            layout.ranks for path in (first, last) if (layout := resharding.recorded(path))
        ] == [before, after], name
        found = trained(run)
        assert [row["step"] for row in found] == [row["step"] for row in figures], name
        for ours, theirs in zip(found, figures, strict=True):
            assert ours == pytest.approx(theirs, abs=TOLERANCE), name
        ends = weights(run)
        assert ends.keys() == expected.keys()
        gaps = {key: float((ends[key] - tensor).abs().max()) for key, tensor in expected.items()}
        print(name, f"{before} -> {after}: largest gap of a weight", max(gaps.values()))
        assert max(gaps.values()) < TOLERANCE, (name, max(gaps, key=lambda k: gaps[k]))
        start = load_file(model / "model.safetensors")
        moved = [
            key
            for key, value in ends.items()
            if (other := start.get(key.split(":")[1])) is None or not torch.equal(other, value)
        ]
        assert moved, f"{name}: weights that never move would pass"
    assert said.count("the random generators of") == len(names)


@pytest.fixture
def started(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    shutil.copytree(tiny_model(), tmp_path / "start")
    return tmp_path


CHANGES = {
    "2 to 1": (["ppo1", "warming3", "lora2", "sft1", "up", "whole"], 2, 1),
    "1 to 2": (["ppo1", "warming3", "sft3", "down"], 1, 2),
    "parts, 2 to 1": (["parts1", "parts3", "top"], 2, 1),
    "parts, 1 to 2": (["parts3", "thaw"], 1, 2),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1400)
@pytest.mark.parametrize("change", CHANGES)
def test_one_or_two_ranks_go_on_as_the_other(started: Path, change: str) -> None:
    check(started, *CHANGES[change])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rewind_under_zero_is_exactly_the_checkpoint(started: Path, ranks: int) -> None:
    """The NaN is on the last rank alone, in the third step; the worker compares weights, moments
    and step counts with those that were saved.
    """
    toys.write_jsonl(started / "prompts.jsonl", toys.prompt_rows())
    given = [*PPO, "stage.on_nonfinite=rewind"]
    commands = [
        command(started, started / "start", f"zero{zero}", [*given, f"engine=zero{zero}"])
        for zero in (1, 3)
    ]
    launch(started, ranks, commands, poison={"rank": ranks - 1, "step": 3})
    for name in ("zero1", "zero3"):
        assert json.loads((started / name / "rewinds.json").read_text(encoding="utf-8")) == [2], (
            name
        )
        figures = rows(started / name / "ppo" / "metrics.jsonl")
        assert [row["step"] for row in figures] == [1, 2, 3, 4], name
        losses = [
            row[key]
            for row in figures
            for key in ("loss/policy", "loss/value", "policy/grad_norm", "value/grad_norm")
        ]
        # NaN is not below anything
        assert all(abs(value) < 1e3 for value in losses), (name, losses)
        assert (
            json.loads((started / name / "ppo" / "summary.json").read_text(encoding="utf-8"))[
                "metrics"
            ]["train/rewinds"]
            == 1.0
        )


# ---- what needs no ranks ----


def saved_by(
    folder: Path, monkeypatch: pytest.MonkeyPatch, engine: EngineConfig, ranks: int
) -> Path:
    """A checkpoint that says that `ranks` ranks saved it, sealed."""
    place = folder / "step-2"
    place.mkdir(parents=True)
    monkeypatch.setattr(resharding.distributed, "world_size", lambda: ranks)
    resharding.record(place, engine)
    (place / "loop.json").write_text("{}", encoding="utf-8")
    checkpoints.seal(place)
    monkeypatch.setattr(resharding.distributed, "world_size", lambda: 1)
    return place


def test_the_same_layout_is_loaded_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved_by(tmp_path, monkeypatch, ZERO[3], 1)
    assert resharding.adapt(place, ZERO[3]) == (place, None)


def test_a_checkpoint_without_a_record_goes_on_as_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved_by(tmp_path, monkeypatch, ZERO[2], 1)
    (place / resharding.LAYOUT).unlink()
    engine = deepspeed_folder(place, {}).parent
    torch.save({}, engine / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert resharding.adapt(place, ZERO[2]) == (place, None)
    torch.save({}, engine / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    with pytest.raises(
        UserError,
        match=r"saved by 2 ranks, .*layout.json.* Resume on 2 ranks",
    ):
        resharding.adapt(place, ZERO[2])


TORCH = EngineConfig()
NVME = EngineConfig(
    kind=EngineKind.deepspeed, zero_stage=3, offload=Offload.nvme, nvme_path="/nvme"
)
REFUSED = {
    "deepspeed to torch": (
        ZERO[1],
        2,
        TORCH,
        "engine=zero1 on 2 ranks, but this launch has engine=torch on 1 rank. The torch engine "
        "and DeepSpeed",
    ),
    "torch to deepspeed": (
        TORCH,
        1,
        ZERO[2],
        "engine=torch on 1 rank, but this launch has engine=zero2 on 1 rank",
    ),
    "zero0 to zero1": (ZERO[0], 2, ZERO[1], "ZeRO-0 keeps no state that is split"),
    "zero3 to zero0": (ZERO[3], 2, ZERO[0], "ZeRO-0 keeps no state that is split"),
    "nvme": (NVME, 2, NVME, "engine=zero3 engine.offload=nvme on 2 ranks, .* State on NVMe"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_converted_is_refused_before_anything_loads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, ranks, now, said = REFUSED[name]
    place = saved_by(tmp_path, monkeypatch, before, ranks)
    with pytest.raises(UserError, match=said) as raised:
        resharding.adapt(place, now)
    assert "Resume as it was saved" in str(raised.value) and "model.path" in str(raised.value)
    assert checkpoints.problem(place) is None and [path.name for path in tmp_path.iterdir()] == [
        "step-2"
    ]


def test_zero0_goes_on_with_any_number_of_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved_by(tmp_path, monkeypatch, ZERO[0], 4)
    assert resharding.adapt(place, ZERO[0]) == (
        place,
        "checkpoint step-2 was saved by engine=zero0 on 4 ranks, and goes on with engine=zero0 "
        "on 1 rank",
    )


def deepspeed_folder(place: Path, content: object) -> Path:
    root = place / "policy"
    (root / "engine").mkdir(parents=True)
    (root / "latest").write_text("engine", encoding="utf-8")
    torch.save(content, root / "engine" / "mp_rank_00_model_states.pt")
    return root / "engine" / "mp_rank_00_model_states.pt"


def test_a_pickle_that_deepspeed_did_not_write_is_never_unpickled(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    file = deepspeed_folder(tmp_path / "step-2", {"weights": torch.zeros(2), "more": Payload(mark)})
    with pytest.raises(UserError, match=r"mp_rank_00_model_states.pt would load .*DeepSpeed"):
        resharding.adapt(tmp_path / "step-2", ZERO[1])
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "loading it would have run it"


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    deepspeed_folder(tmp_path / "step-2", {}).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(UserError, match=r"step-2.*torch.save"):
        resharding.adapt(tmp_path / "step-2", ZERO[1])


def test_a_conversion_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = saved_by(tmp_path, monkeypatch, ZERO[1], 2)
    with pytest.raises(
        UserError,
        match=r"DeepSpeed.*engine=zero1 on 2 ranks",
    ):
        resharding.adapt(place, ZERO[1])
    assert checkpoints.problem(place) is None
    assert not list((tmp_path / checkpoints.UNIVERSAL).iterdir())


def test_groups_of_weights_keep_their_own_steps_and_hyperparameters(tmp_path: Path) -> None:
    """As DeepSpeed's ZeRO-3 leaves an optimizer of two groups: one step count for both, and the
    first group's decay in the second.
    """
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": decay}
            for p, decay in zip(params, (0.1, 0.0), strict=True)
        ],
        lr=0.1,
    )
    (tmp_path / "tag" / "zero").mkdir(parents=True)
    (tmp_path / "latest_universal").write_text("tag", encoding="utf-8")
    torch.save(
        {"param_groups": optimizer.state_dict()["param_groups"]},
        tmp_path / "tag" / "zero" / "optimizer_state.pt",
    )
    optimizer.param_groups[1]["weight_decay"] = 0.1
    step = torch.tensor(3.0)
    for param in params:
        optimizer.state[param] = {
            "step": step,
            "exp_avg": torch.zeros(2),
            "exp_avg_sq": torch.zeros(2),
        }
        param.grad = torch.ones(2)
    repair_universal(SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer)), tmp_path)
    optimizer.step()
    assert [float(optimizer.state[param]["step"]) for param in params] == [4.0, 4.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert [group["params"] for group in optimizer.param_groups] == [[params[0]], [params[1]]]


def test_generators_of_other_ranks_start_anew_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rank in (0, 1):
        torch.save(randomness.state(), tmp_path / f"random-{rank}.pt")
    with caplog.at_level(logging.WARNING):
        randomness.load(tmp_path, 5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    assert [
        record.message
        for record in caplog.records
        if "random generators of 2 ranks don't fit 1" in record.message
    ] == [caplog.messages[0]]
