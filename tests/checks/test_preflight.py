"""Every way in which a configuration can't run is reported before weights load."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.choices import (
    Action,
    AdapterKind,
    CriticInit,
    EngineKind,
    Judge,
    LoraSync,
    ModelKind,
    Offload,
    RolloutBackend,
    TrackingKind,
)
from conf.methods import RasaConfig
from conf.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrackingConfig,
)
from conf.stages import EvalStage, OnlineStage, RewardStage, SFTStage, WatchConfig
from reward.model import write_manifest
from rlhf.__main__ import main
from rlhf.checks import inputs, launch
from rlhf.models.loading import tiny_config, train_tokenizer
from rlhf.types import UserError
from tests import toys
from tests.checking import check


def model_directory(path: Path, texts: list[str], positions: int = 512) -> Any:
    """A model's directory without weights: configuration and tokenizer. Returns the tokenizer."""
    tokenizer = train_tokenizer(texts, 300, positions)
    config = ModelConfig(kind=ModelKind.tiny)
    config.tiny.max_positions = positions
    tiny_config(config.tiny, tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


def reward_directory(path: Path, texts: list[str], positions: int = 512) -> None:
    tokenizer = model_directory(path, texts, positions)
    manifest = toys.reward_manifest(tokenizer)
    write_manifest(path, manifest)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def ppo(tmp_path: Path) -> Config:
    """A configuration that passes."""
    model_directory(tmp_path / "policy", ["the film", "good"])
    reward_directory(tmp_path / "reward", ["the film", "good"])
    return Config(
        stage=OnlineStage(),
        run=RunConfig(dir=str(tmp_path / "runs"), name="r"),
        model=ModelConfig(path=str(tmp_path / "policy")),
        reward=RewardConfig(path=str(tmp_path / "reward")),
        rollout=RolloutConfig(backend=RolloutBackend.hf, max_response_length=toys.RESPONSE_LENGTH),
        data=DataConfig(
            path=jsonl(tmp_path / "p.jsonl", [{"prompt": "the film"}, {"prompt": "good"}]),
            max_prompt_length=toys.PROMPT_LENGTH,
        ),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )


@pytest.fixture
def sft(tmp_path: Path) -> Config:
    return Config(
        stage=SFTStage(),
        run=RunConfig(dir=str(tmp_path / "runs"), name="r"),
        model=ModelConfig(kind=ModelKind.tiny),
        data=DataConfig(path=jsonl(tmp_path / "t.jsonl", [{"text": "the film"}, {"text": "good"}])),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )


def refused(cfg: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(cfg)


def test_good_configurations_pass_and_leave_nothing_behind(
    ppo: Config, sft: Config, tmp_path: Path
) -> None:
    before = sorted(p.name for p in tmp_path.iterdir())
    assert check(ppo) == [] and check(sft) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_model_directory(ppo: Config, tmp_path: Path) -> None:
    ppo.model.path = str(tmp_path / "polcy")
    refused(
        ppo,
        rf"model.path={tmp_path}/polcy: no such directory. Directories in {tmp_path}: policy, "
        r"reward",
    )
    ppo.model.path = None
    refused(ppo, r"model.path is not set")
    (tmp_path / "empty").mkdir()
    ppo.model.path = str(tmp_path / "empty")
    refused(ppo, "holds no config.json, adapter_config.json or")


def test_gguf_file(ppo: Config, tmp_path: Path) -> None:
    (tmp_path / "policy" / "m.Q4.gguf").touch()
    ppo.model.gguf_file = "m.gguf"
    refused(ppo, r"model.gguf_file=m.gguf: no such file in .*policy. GGUF files there: m.Q4.gguf")
    tiny = replace(
        ppo, stage=SFTStage(), model=ModelConfig(kind=ModelKind.tiny, gguf_file="m.gguf")
    )
    refused(tiny, "model.gguf_file=m.gguf: expected model.path")


def test_a_broken_model_configuration(ppo: Config, tmp_path: Path) -> None:
    (tmp_path / "policy" / "config.json").write_text(
        '{"max_position_embeddings": 5,', encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"config.json, line 1: not valid JSON"):
        inputs.max_positions(ppo.model.path)


def test_data_files(ppo: Config, tmp_path: Path) -> None:
    path = ppo.data.path
    ppo.data.path = None
    refused(ppo, "data.path is not set: stage=ppo needs a file of prompts")
    ppo.data.path = str(tmp_path / "q.jsonl")
    refused(ppo, r"data.path=.*q.jsonl: no such file. Nearest in .*: p.jsonl")
    (tmp_path / "q.jsonl").touch()
    refused(ppo, r"data.path=.*q.jsonl is empty \(0 bytes\)")
    jsonl(tmp_path / "q.jsonl", [{"weather": "x"}])
    refused(
        ppo,
        r"q.jsonl, row 1: expected prompts, but its keys \(weather\) fit no format. Nearest "
        r"format: .*needs the key",
    )
    jsonl(tmp_path / "q.jsonl", [{"prompt": "x"}, {"promt": "y"}])
    refused(
        ppo,
        r"q.jsonl, row 2: key 'prompt': .*: promt; nearest key: 'promt'",
    )
    ppo.data.path, ppo.data.eval_path = path, str(tmp_path / "e.jsonl")
    refused(ppo, r"data.eval_path=.*e.jsonl: no such file")
    ppo.data.eval_path, ppo.data.chat_template = None, "t.jinja"
    refused(ppo, "data.chat_template=t.jinja: no such file")


def test_rows_of_another_kind(sft: Config, tmp_path: Path) -> None:
    reward = replace(sft, stage=RewardStage())
    refused(
        reward,
        r"t.jsonl, row 1: expected .*chosen.*rejected.* \(text\) are those of format text",
    )


def test_margin(sft: Config, tmp_path: Path) -> None:
    sft.data.path = jsonl(tmp_path / "pairs.jsonl", [{"chosen": "a", "rejected": "b"}])
    assert check(replace(sft, stage=RewardStage())) == []
    refused(
        replace(sft, stage=RewardStage(margin=True)),
        r"row 1: stage.margin=true.* no margin",
    )


def test_reward_source(ppo: Config, tmp_path: Path) -> None:
    path = ppo.reward.path
    ppo.reward.path = None
    refused(ppo, r"reward.path, reward.function .*reward.terms: .* none")
    ppo.reward.function = "tests.toys:short_is_good"
    refused(
        ppo,
        "stage.critic_init=reward needs reward.path.*stage.critic_init=policy",
    )
    ppo.stage.critic_init = CriticInit.policy
    assert check(ppo) == []
    ppo.reward.path = path
    refused(ppo, "expected one of them, found 2")
    ppo.reward = RewardConfig(path=ppo.model.path)
    refused(ppo, r"reward.path=.*policy: .*reward_model.json")
    ppo.reward.path = str(tmp_path / "nowhere" / "model")
    refused(ppo, r"reward.path=.*nowhere/model: no such directory")


def test_a_reward_model_with_another_tokenizer_and_no_template(ppo: Config, tmp_path: Path) -> None:
    reward_directory(
        tmp_path / "other", ["entirely different words", "in another order altogether"]
    )
    ppo.reward.path = str(tmp_path / "other")
    refused(ppo, r"reward.path.*tokenizer.*chat template")


def test_kl_without_a_reference(ppo: Config) -> None:
    ppo.stage.reference = False
    refused(
        ppo,
        r"stage.kl_coef=0.05 penalises .* stage.reference=false keeps none. Set "
        r"stage.reference=true, or stage.kl_coef=0",
    )
    ppo.stage.kl_coef = 0.0
    assert check(ppo) == []


def test_batch_sizes_that_do_not_divide(
    ppo: Config, sft: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft.stage.batch_size, sft.engine.micro_batch_size = 10, 4
    refused(
        sft,
        r"stage.batch_size=10 doesn't divide by 1 rank x engine.micro_batch_size=4 = 4. Expected "
        r"a multiple of 4, such as stage.batch_size=12",
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    ppo.engine = sft.engine = EngineConfig(kind=EngineKind.deepspeed)
    refused(
        sft,
        r"stage.batch_size=10 doesn't divide by 3 ranks = 3. Expected a multiple of 3, such as "
        r"stage.batch_size=12",
    )
    refused(
        ppo, r"stage.prompts_per_step=64 doesn't divide by 3 ranks = 3.*stage.prompts_per_step=66"
    )
    ppo.stage = OnlineStage(prompts_per_step=6, minibatches=3)
    refused(ppo, "stage.minibatches=3 doesn't divide the 2 rollouts of each of 3 ranks")


def test_one_process_for_the_torch_engine(ppo: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(
        ppo,
        "engine=torch .* 2 ranks .* engine=zero0, zero1, zero2 or zero3",
    )


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    known = importlib.util.find_spec

    def found(name: str, *more: Any) -> Any:
        return None if name == package else known(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", found)


def test_vllm_not_installed(ppo: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "vllm")
    ppo.rollout.backend = RolloutBackend.vllm
    refused(ppo, "rollout=vllm, but vLLM is not installed: .*rlhf-toolkit.*Set rollout=hf")
    ppo.rollout.backend = RolloutBackend.auto
    (note,) = check(ppo)
    assert note.startswith("rollout=auto: vLLM is not installed")


def test_deepspeed_not_installed(ppo: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "deepspeed")
    ppo.engine = EngineConfig(kind=EngineKind.deepspeed, zero_stage=3)
    refused(ppo, r"engine=zero3 .*deepspeed.*not installed")


def test_offload_to_a_disk_that_is_not_there(ppo: Config, tmp_path: Path) -> None:
    ppo.engine = EngineConfig(
        kind=EngineKind.deepspeed,
        zero_stage=3,
        offload=Offload.nvme,
        nvme_path=str(tmp_path / "nvme"),
    )
    refused(ppo, r"engine.nvme_path=.*nvme: no such directory")


def test_dora_cannot_be_synced_as_an_adapter(ppo: Config) -> None:
    ppo.adapter = AdapterConfig(kind=AdapterKind.lora, dora=True)
    assert check(ppo) == []
    ppo.rollout.lora_sync = LoraSync.adapter
    refused(ppo, "rollout.lora_sync=adapter with adapter.dora=true")


def test_vllms_rank_limit_holds_the_adapter(ppo: Config) -> None:
    ppo.adapter, ppo.rollout.max_lora_rank = AdapterConfig(kind=AdapterKind.lora, rank=16), 8
    refused(ppo, "rollout.max_lora_rank=8 is below adapter.rank=16")


def test_vllms_rank_limit_holds_the_lora_that_another_method_sends(ppo: Config) -> None:
    """RaSA's rank follows from the number of layers, four."""
    ppo.adapter, ppo.rollout.max_lora_rank = AdapterConfig(kind=AdapterKind.lora_mini, rank=16), 8
    refused(ppo, "rollout.max_lora_rank=8 is below adapter.rank=16")
    ppo.adapter = AdapterConfig(kind=AdapterKind.rasa, rank=8, rasa=RasaConfig(shared=3))
    refused(ppo, r"max_lora_rank=8 is below adapter.rasa.shared=3 \(updates of rank 17, by 4 lay")
    ppo.rollout.max_lora_rank = 32
    assert check(ppo) == []


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rows_do_not_change_the_positions_of_their_neighbours(key: str, tmp_path: Path) -> None:
    """As in Phi-3's 128k models: other frequencies above 4,096 tokens, for a whole micro-batch."""
    content = {"original_max_position_embeddings": 4096, key: {"type": "longrope"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = ModelConfig(path=str(tmp_path))
    inputs.check_rope(model, 3000, 1096)
    assert inputs.rope_note(model, 4096) == []
    with pytest.raises(UserError, match=r"data\.max_prompt_length=3000 .* 4096 tokens \(longrope"):
        inputs.check_rope(model, 3000, 1097)
    (note,) = inputs.rope_note(model, 4097)
    assert "stage.max_length=4096" in note
    (tmp_path / "config.json").write_text(json.dumps({key: {"type": "yarn", "factor": 4.0}}))
    inputs.check_rope(model, 10**6, 1)


def test_lengths_fit_the_models_positions(ppo: Config, sft: Config, tmp_path: Path) -> None:
    sft.model.tiny.max_positions, sft.stage.max_length = 512, 513
    refused(
        sft,
        r"stage.max_length=513 .*\(model.tiny.max_positions = 512\)",
    )
    ppo.data.max_prompt_length = 449
    refused(
        ppo,
        r"data.max_prompt_length=449 \+ rollout.max_response_length=64 = 513 tokens .*policy: "
        r"its positions = 512\)",
    )
    ppo.data.max_prompt_length = 100
    reward_directory(tmp_path / "short", ["the film", "good"], positions=128)
    ppo.reward.path = str(tmp_path / "short")
    refused(
        ppo,
        r"= 164 tokens .*\(reward.path=.*short: its positions = 128\)",
    )


def test_an_existing_run_directory(ppo: Config, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "r" / "ppo"
    directory.mkdir(parents=True)
    (directory / "config.yaml").touch()
    refused(
        ppo,
        r"runs/r/ppo exists. Continue it with run.resume=true, replace it with run.overwrite=true",
    )
    ppo.run.overwrite = True
    assert check(ppo) == [] and (directory / "config.yaml").exists()


def test_what_leaves_no_directory_needs_no_tracker(
    sft: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(launch.tracker, "check", asked.append)
    directory = tmp_path / "runs" / "r" / "sft"
    directory.mkdir(parents=True)
    (directory / "config.yaml").touch()
    assert launch.check_stage([], sft, has_directory=False) == [] and asked == []
    with pytest.raises(UserError, match="exists"):
        launch.check_stage([], sft)
    assert asked == [sft.tracking]


def test_judges_of_an_evaluation(
    ppo: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluation(**options: Any) -> Config:
        return replace(ppo, stage=EvalStage(**options))

    assert check(evaluation()) == []
    refused(evaluation(before=str(tmp_path / "bfore")), r"stage.before=.*bfore: no such directory")
    refused(
        evaluation(judges=[Judge.classifier]),
        r"stage.judge_path is not set.*labelled texts",
    )
    refused(
        evaluation(judges=[Judge.classifier], judge_path=str(tmp_path / "j.csv")),
        r"stage.judge_path=.*j.csv: no such file",
    )
    refused(evaluation(judges=[Judge.function]), "stage.judge_function is not set")
    without(monkeypatch, "vaderSentiment")
    refused(evaluation(judges=[Judge.lexicon]), "needs the package vaderSentiment")


def test_the_held_out_judge_of_a_watch(ppo: Config, tmp_path: Path) -> None:
    def watch(**options: Any) -> Config:
        return replace(ppo, stage=OnlineStage(watch=WatchConfig(**options)))

    refused(
        watch(divergence=Action.stop),
        r"stage.watch.divergence=stop .*held-out judge",
    )
    refused(
        replace(
            ppo, stage=OnlineStage(reference=False, kl_coef=0.0, watch=WatchConfig(kl=Action.warn))
        ),
        "stage.watch.kl=warn needs a KL",
    )
    refused(
        watch(judge_path=str(tmp_path / "jdge")), "stage.watch.judge_path=.*jdge: no such directory"
    )
    refused(
        watch(judge_path=str(tmp_path / "policy")),
        r"stage.watch.judge_path=.*policy: holds no .*reward model",
    )
    refused(
        watch(judge_path=ppo.reward.path),
        r"stage.watch.judge_path=.*reward is reward.path too",
    )
    refused(
        watch(judge_function="tests.toys:no_such"),
        "stage.watch.judge_function=tests.toys:no_such: tests.toys has no function no_such",
    )
    reward_directory(tmp_path / "short", ["the film", "good"], positions=128)
    refused(
        watch(judge_path=str(tmp_path / "short")),
        r"stage.watch.judge_path=.*short: its positions = 128\)",
    )
    reward_directory(tmp_path / "other", ["quite other words", "zebra"])
    refused(
        watch(judge_path=str(tmp_path / "other")),
        r"stage.watch.judge_path=.*other: .*tokenizer",
    )
    reward_directory(tmp_path / "judge", ["the film", "good"])
    assert check(watch(judge_path=str(tmp_path / "judge"), divergence=Action.stop)) == []
    assert check(watch(judge_function="tests.toys:short_is_good", divergence=Action.stop)) == []


def test_the_command_line_says_it_in_one_line_and_loads_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jsonl(tmp_path / "t.jsonl", [{"text": "a"}, {"text": "b"}])
    paths = [f"data.path={tmp_path}/t.jsonl", f"run.dir={tmp_path}/runs"]
    assert main(["stage=sft", f"model.path={tmp_path}/nothing", *paths, "tracking=none"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == lines[-1:]
    assert f"model.path={tmp_path}/nothing: no such directory" in lines[-1]
    assert not (tmp_path / "runs").exists()
