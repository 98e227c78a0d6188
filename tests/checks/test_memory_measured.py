"""The memory plan against measured peaks: real optimizer steps of this toolkit's engines, each in a
process of its own (tests/checks/memory_worker.py).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.choices import EngineKind, Offload
from conf.schedule import TrainPart
from reward.model import write_manifest
from reward.terms import scoring_models
from rlhf.checks.memory import activations, shapes
from rlhf.checks.memory.activations import Pass
from rlhf.checks.memory.moments import Machine, counts_of
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import shapes_of
from rlhf.checks.memory.states import Setting, total, training_states
from rlhf.cli import config
from rlhf.models.loading import train_tokenizer
from tests import toys
from tests.checks.memory_worker import BIG, CHUNK, composed

ROOT = Path(__file__).resolve().parents[2]
# Every tensor of 64 KiB or more is a mapping of its own and goes back when it is freed: what is
# measured is what is held, not what the heap kept.
HEAP = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
R64, NF4, INT8 = "adapter.rank=64", "adapter.quantize=nf4", "adapter.quantize=int8"


def measured(cases: list[dict[str, Any]], tmp_path: Path, ranks: int = 1) -> list[float]:
    """Bytes of rank 0 beyond its libraries, at its peak, of each case."""
    environment = {
        **os.environ,
        **HEAP,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
    }
    environment["PYTHONPATH"] = str(ROOT)
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [*launcher, str(Path(__file__).with_name("memory_worker.py")), json.dumps(cases)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=800
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # two ranks may write into one line
    found = [json.loads(one) for one in re.findall(r"measured (\{[^}]*\})", done.stdout)]
    own = {one["case"]: float(one["bytes"]) for one in found if one["rank"] == 0}
    return [own[number] for number in range(len(cases))]


def planned(case: dict[str, Any], ranks: int = 1) -> float:
    """What the plan says of the same case: states at their worst moment, with the activations of a
    micro-batch where those are live.
    """
    shape = shapes.shape_of_config(shapes.llama(**BIG), "x")
    half, plain = bool(case.get("half")), case["engine"] == "torch"
    cfg = composed(case)
    adapter, train = cfg.adapter, cfg.stage.train
    if case.get("unfreeze"):  # the last phase is full training; the first is that of the top block
        train = TrainPart(layers=1)
    added = shapes.adapter_parameters(shape, adapter)
    setting = Setting(
        kind=EngineKind(case["engine"]),
        zero=case.get("zero", 0),
        offload=Offload(case.get("offload", "none")),
        ranks=ranks,
        half=half,
        fused=plain or case.get("adam") == "deepspeed",
        float32_trained=half and plain and bool(added),
    )
    trained = shapes.trained_parts(shape, train, classifier=False)
    whole = shape.parameters + shape.frozen_by(adapter)
    states = training_states(
        counts_of(shape, whole, added, rounding=adapter, trained=trained), setting
    )
    rows = max(1, case["tokens"] // 128)
    virtual = activations.virtual_tokens(adapter)
    p = Pass(
        case["tokens"] + rows * virtual,
        setting.width,
        length=128 + virtual,
        adapter=activations.beside(shape, adapter),
        adapter_float32=plain,
        checkpointing=bool(case.get("checkpointing")),
        layers=trained.layers,
    )
    head = activations.policy_head(
        shape,
        min(CHUNK, case["tokens"]),
        setting.width,
        temperature=1.0,
        entropy_grad=False,
        grad=True,
    )
    live = activations.kept(shape, p) + max(head, activations.backward_transient(shape, p))
    held = total(states.resident)
    return max(
        states.start.device if adapter.is_quantized else 0.0,
        (held + total(states.backward) + states.gathered).device + live,
        (held + total(states.step)).device,
    )


def compare(cases: list[dict[str, Any]], tmp_path: Path, ranks: int = 1) -> None:
    """Every case's plan is within 15 % of what its process took."""
    wrong = []
    for case, found in zip(cases, measured(cases, tmp_path, ranks), strict=True):
        expected = planned(case, ranks)
        ratio = expected / found
        print(
            f"{name_of(case)}, {ranks} ranks: measured {found / 1e6:.0f} MB, planned "
            f"{expected / 1e6:.0f}, {ratio:.3f}"
        )
        if abs(ratio - 1) > 0.15:
            wrong.append(f"{name_of(case)}: {ratio:.3f}")
    assert not wrong


def name_of(case: dict[str, Any]) -> str:
    """A case in a few words."""
    return "-".join(f"{key}={value}" for key, value in case.items() if value)


# ---- by the method of fine-tuning ----


def method(adapter: str, tokens: int, *options: str, **more: Any) -> dict[str, Any]:
    """A case of the preset `adapter`."""
    return {"engine": "torch", "tokens": tokens, "adapter": adapter, "options": options, **more}


def part(tokens: int, **more: Any) -> dict[str, Any]:
    """A case of a part of the model."""
    return {"engine": "torch", "tokens": tokens, **more}


QUICK = [part(128, layers=2), method("pfeiffer", 128)]
METHODS = {
    "parts": [part(1024, layers=2), part(1024, unfreeze=True)],
    "one low-rank update": [method(name, 1024) for name in ("lora", "lora_fa", "dora", "adalora")],
    "several": [method(name, 1024) for name in ("gelora", "rasa", "lora_mini", "molora")],
    "bottlenecks": [method(name, 1024) for name in ("pfeiffer", "houlsby", "parallel")],
    "virtual tokens": [method(name, 1024) for name in ("prompt", "ptuning", "prefix")],
    "scales": [method(name, 1024) for name in ("vera", "oft", "ia3")],
}


@pytest.mark.full
def test_the_plan_of_some_methods_is_within_15_percent(tmp_path: Path) -> None:
    compare(QUICK, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", METHODS)
def test_the_plan_of_every_method_is_within_15_percent(group: str, tmp_path: Path) -> None:
    compare(METHODS[group], tmp_path)


@pytest.mark.full
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["lora", "pfeiffer"])
def test_two_ranks_under_zero1_take_what_the_methods_plan_says(name: str, tmp_path: Path) -> None:
    compare([method(name, 1024, engine="deepspeed", zero=1)], tmp_path, ranks=2)


# ---- by the engine ----


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "case",
    [
        {"engine": "torch", "tokens": 64},
        {"engine": "torch", "tokens": 64, "half": True},
        {"engine": "torch", "tokens": 64, "adapter": "lora", "options": [R64]},
        {"engine": "torch", "tokens": 64, "adapter": "lora", "options": [R64, NF4]},
        {"engine": "torch", "tokens": 2048, "adapter": "lora", "options": [NF4]},
        {"engine": "torch", "tokens": 64, "adapter": "lora", "options": [INT8]},
        {"engine": "torch", "tokens": 2048},
        {"engine": "torch", "tokens": 2048, "checkpointing": True},
        {"engine": "deepspeed", "zero": 0, "tokens": 64},
        {"engine": "deepspeed", "zero": 1, "tokens": 64},
        {"engine": "deepspeed", "zero": 2, "tokens": 64},
        {"engine": "deepspeed", "zero": 3, "tokens": 64},
        {"engine": "deepspeed", "zero": 2, "tokens": 64, "half": True},
        {"engine": "deepspeed", "zero": 3, "tokens": 64, "half": True},
        {"engine": "deepspeed", "zero": 2, "tokens": 64, "offload": "cpu"},
        {"engine": "deepspeed", "zero": 3, "tokens": 64, "offload": "cpu"},
        {"engine": "deepspeed", "zero": 0, "tokens": 64, "adam": "deepspeed"},
        {"engine": "deepspeed", "zero": 2, "tokens": 64, "adam": "deepspeed"},
    ],
    ids=name_of,
)
def test_the_plan_is_within_15_percent_of_the_measured_peak(
    case: dict[str, Any], tmp_path: Path
) -> None:
    compare([case], tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_ranks_share_what_their_stage_says(zero: int, tmp_path: Path) -> None:
    compare([{"engine": "deepspeed", "zero": zero, "tokens": 64}], tmp_path, ranks=2)


def big_models(folder: Path) -> None:
    """folder/policy and folder/reward: random weights, 60M parameters each, which outweigh the
    interpreter.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    tokenizer = train_tokenizer(["the film is good"], 300, 512)
    made = shapes.llama(
        vocab=len(tokenizer),
        hidden=768,
        intermediate=2304,
        layers=8,
        heads=12,
        kv_heads=12,
        tied=True,
    )
    made.max_position_embeddings, made.num_labels = 512, 1
    made.bos_token_id, made.eos_token_id, made.pad_token_id = (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    for name, model_class in (
        ("policy", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
    ):
        model_class.from_config(made, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_manifest(folder / "reward", toys.reward_manifest(tokenizer, max_length=512))


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("engine", ["torch", "zero2"])
def test_a_whole_run_takes_what_its_plan_says(engine: str, tmp_path: Path) -> None:
    """stage=ppo from the command line, with the usual malloc: policy, critic, reference, reward
    model and generator, against memory/peak_rss_mb.
    """
    big_models(tmp_path)
    toys.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"the film is {i}"} for i in range(64)])
    options = [
        "stage=ppo",
        f"engine={engine}",
        "rollout=hf",
        "tracking=none",
        f"run.dir={tmp_path / 'runs'}",
        f"data.path={tmp_path / 'p.jsonl'}",
    ]
    options += [
        f"model.path={tmp_path / 'policy'}",
        f"reward.path={tmp_path / 'reward'}",
        "stage.prompts_per_step=8",
        "stage.steps=1",
    ]
    options += [
        "data.max_prompt_length=96",
        "rollout.max_response_length=32",
        "engine.micro_tokens=1024",
        "reward.batch_tokens=2048",
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "ext"),
    }
    command = [sys.executable, "-m", "rlhf", *options]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        timeout=1400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (
        (tmp_path / "runs" / "default" / "ppo" / "metrics.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    found = json.loads(lines[-1])["memory/peak_rss_mb"] / 1024
    cfg = config.compose(options)
    models, _ = shapes_of(cfg.model, scoring_models(cfg.reward, cfg.stage.watch))
    expected = plan(
        cfg, models, Machine(ranks=1, cuda=False, device_gib=64.0, host_gib=64.0)
    ).device_gib
    print(f"stage=ppo engine={engine}: measured {found:.2f} GiB, planned {expected:.2f}")
    assert expected == pytest.approx(found, rel=0.15)
