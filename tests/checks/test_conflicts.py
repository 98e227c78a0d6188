"""Options that exclude each other: each conflict is one message that names the option and the mend.
And what is handled is said.
"""

import ast
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from conf.choices import (
    AdapterKind,
    Advantage,
    CriticInit,
    Dtype,
    EngineKind,
    ModelKind,
    RolloutBackend,
    TrackingKind,
)
from conf.schema import (
    VLLM_LORA_RANKS,
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
from conf.stages import KTOStage, OnlineStage, SFTStage
from reward.model import write_manifest
from rlhf.checks import capacity, inputs
from rlhf.checks.memory import moments
from rlhf.checks.memory.moments import Machine
from rlhf.models.loading import tiny_config, train_tokenizer
from rlhf.types import UserError
from tests import toys
from tests.checking import check

CHATML = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def model_directory(
    path: Path,
    *,
    pad_is_eos: bool = False,
    text: str = "the film good",
    template: str | None = None,
    kv_heads: int = 4,
) -> Any:
    """A model's directory without weights."""
    tokenizer = train_tokenizer([text], 300, 512)
    tokenizer.chat_template = template
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    config = tiny_config(ModelConfig(kind=ModelKind.tiny).tiny, tokenizer)
    config.num_key_value_heads = kv_heads
    config.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return tokenizer


def reward_directory(path: Path, **options: Any) -> None:
    tokenizer = model_directory(path, **options)
    write_manifest(
        path,
        toys.reward_manifest(tokenizer),
    )


@pytest.fixture
def ppo(tmp_path: Path) -> Config:
    """A configuration that passes."""
    model_directory(tmp_path / "policy")
    reward_directory(tmp_path / "reward")
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "the film"}\n{"prompt": "good"}\n', encoding="utf-8"
    )
    return Config(
        stage=OnlineStage(),
        run=RunConfig(dir=str(tmp_path / "runs"), name="r"),
        model=ModelConfig(path=str(tmp_path / "policy")),
        reward=RewardConfig(path=str(tmp_path / "reward")),
        rollout=RolloutConfig(
            backend=RolloutBackend.vllm, max_response_length=toys.RESPONSE_LENGTH
        ),
        data=DataConfig(path=str(tmp_path / "p.jsonl"), max_prompt_length=toys.PROMPT_LENGTH),
        tracking=TrackingConfig(kind=TrackingKind.none),
    )


def lora(rank: int) -> AdapterConfig:
    return AdapterConfig(kind=AdapterKind.lora, rank=rank)


def zero(stage: int, **options: Any) -> EngineConfig:
    return EngineConfig(kind=EngineKind.deepspeed, zero_stage=stage, **options)


@dataclass(frozen=True)
class Conflict:
    """What is changed of a good configuration, the option that the message starts with, and the
    mend in it.
    """

    change: Callable[[Config], Config]
    option: str
    mend: str


def short_model(cfg: Config) -> Config:
    place = Path(str(cfg.model.path)) / "config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "max_position_embeddings": 100}))
    return cfg


CONFLICTS = {
    "KL without a reference": Conflict(
        lambda c: replace(c, stage=OnlineStage(reference=False)),
        "stage.kl_coef=0.05",
        "Set stage.reference=true, or stage.kl_coef=0",
    ),
    "a reference that moves under ZeRO-3": Conflict(
        lambda c: replace(c, stage=OnlineStage(reference_every=5), engine=zero(3)),
        "stage.reference_every=5",
        "Set stage.reference_every=0",
    ),
    "a group of one": Conflict(
        lambda c: replace(c, stage=OnlineStage(advantage=Advantage.group)),
        "stage.samples_per_prompt=1",
        "expected at least 2",
    ),
    "a context below prompt and response": Conflict(
        short_model, "data.max_prompt_length=256", "Lower one of them"
    ),
    "vLLM's cache below one sequence": Conflict(
        lambda c: replace(c, rollout=replace(c.rollout, kv_cache_gib=0.0001)),
        "rollout.kv_cache_gib=0.0001",
        "Set rollout.kv_cache_gib=0.1 or more",
    ),
    "a LoRA rank above vLLM's": Conflict(
        lambda c: replace(c, adapter=lora(1024)),
        "adapter.rank=1024",
        "or set rollout.lora_sync=merged",
    ),
    "a LoRA rank that vLLM has not": Conflict(
        lambda c: replace(c, adapter=lora(16), rollout=replace(c.rollout, max_lora_rank=24)),
        "rollout.max_lora_rank=24",
        "Set rollout.max_lora_rank=16",
    ),
    "float16 without a scaled loss": Conflict(
        lambda c: replace(c, model=replace(c.model, dtype=Dtype.float16)),
        "model.dtype=float16",
        "Set model.dtype=bfloat16",
    ),
    "devices that were not launched": Conflict(
        lambda c: replace(c, engine=zero(2, gpus=4)),
        "engine.gpus=4",
        "torchrun --standalone --nproc_per_node 4 -m rlhf",
    ),
    "one process for several devices": Conflict(
        lambda c: replace(c, engine=EngineConfig(gpus=4), run=replace(c.run, dry_run=True)),
        "engine=torch",
        "Use engine=zero0, zero1, zero2 or zero3",
    ),
    "prompts that the devices can't share": Conflict(
        lambda c: replace(
            c,
            stage=OnlineStage(prompts_per_step=10),
            engine=zero(2, gpus=4),
            run=replace(c.run, dry_run=True),
        ),
        "stage.prompts_per_step=10",
        "such as stage.prompts_per_step=12",
    ),
    "tokens where a loss compares a batch's rows": Conflict(
        lambda c: replace(c, stage=KTOStage(), engine=EngineConfig(micro_batch_tokens=512)),
        "engine.micro_batch_tokens=512: stage.loss=kto",
        "Set engine.micro_batch_size",
    ),
    "micro-batches in rows and in tokens": Conflict(
        lambda c: replace(c, engine=replace(c.engine, micro_batch_size=4, micro_batch_tokens=512)),
        "engine.micro_batch_tokens",
        "engine.micro_batch_size=4",
    ),
    "rows that micro-batches can't share": Conflict(
        lambda c: replace(
            c, stage=SFTStage(batch_size=10), engine=EngineConfig(micro_batch_size=4)
        ),
        "stage.batch_size=10",
        "stage.batch_size=12",
    ),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_a_conflict_is_one_message_with_its_option_and_the_mend(name: str, ppo: Config) -> None:
    assert check(ppo) == []
    case = CONFLICTS[name]
    # a dataclass's own range is a ValueError, which composing makes a UserError
    with pytest.raises((UserError, ValueError)) as error:
        check(case.change(ppo))
    message = str(error.value)
    assert message.startswith(case.option) and case.mend in message and "\n" not in message


def test_the_ranks_are_vllms_own() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    tree = ast.parse((Path(found.origin).parent / "config" / "lora.py").read_text(encoding="utf-8"))
    (ranks,) = [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MaxLoRARanks"
    ]
    assert ranks == f"Literal[{', '.join(map(str, VLLM_LORA_RANKS))}]"


def test_what_vllm_has_no_part_in_is_free(ppo: Config) -> None:
    wide = replace(ppo, adapter=lora(1024))
    assert check(replace(wide, rollout=RolloutConfig(backend=RolloutBackend.hf))) == []
    # its weights go over merged
    assert check(replace(wide, adapter=replace(wide.adapter, dora=True))) == []
    assert (
        check(replace(ppo, rollout=RolloutConfig(backend=RolloutBackend.hf, kv_cache_gib=0.0001)))
        == []
    )


def test_the_cache_of_a_token(ppo: Config, tmp_path: Path) -> None:
    # keys and values, layers, heads, head size, float32
    assert capacity.cache_bytes_per_token(ppo.model) == 2 * 4 * 4 * 32 * 4
    model_directory(tmp_path / "grouped", kv_heads=2)
    grouped = replace(ppo, model=ModelConfig(path=str(tmp_path / "grouped"), dtype=Dtype.bfloat16))
    assert capacity.cache_bytes_per_token(grouped.model) == 2 * 4 * 2 * 32 * 2
    assert capacity.cache_bytes_per_token(ModelConfig(path="owner/name")) is None


@pytest.mark.vllm
def test_latents_that_vllm_has_no_code_for_on_a_cpu_are_refused(
    ppo: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_directory(tmp_path / "latent")
    latent = replace(ppo, model=ModelConfig(path=str(tmp_path / "latent")))
    latent = replace(latent, rollout=RolloutConfig(backend=RolloutBackend.vllm))
    file = tmp_path / "latent" / "config.json"
    plain = json.loads(file.read_text(encoding="utf-8"))
    sizes = {"model_type": "deepseek_v3", "qk_rope_head_dim": 64}
    file.write_text(json.dumps(plain | sizes | {"kv_lora_rank": 32}), encoding="utf-8")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    asked = (latent.rollout, latent.model, 32, latent.environment)
    expected = r"kv_lora_rank=512 and qk_rope_head_dim=64 alone, .*deepseek_v3 has 32 and 64"
    with pytest.raises(UserError, match=expected):
        capacity.check_cache(*asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    capacity.check_cache(*asked)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file.write_text(json.dumps(plain | sizes | {"kv_lora_rank": 512}), encoding="utf-8")
    capacity.check_cache(*asked)
    # one latent and its rotated part, layers, float32
    assert capacity.cache_bytes_per_token(latent.model) == (512 + 64) * 4 * 4


def test_padding_that_is_the_end_is_said_once_and_does_no_harm(ppo: Config, tmp_path: Path) -> None:
    model_directory(tmp_path / "llama", pad_is_eos=True)
    (note,) = check(replace(ppo, model=ModelConfig(path=str(tmp_path / "llama"))))
    assert "'<|eos|>'" in note and "pad_token" in note


def test_files_that_can_not_be_read_are_named(ppo: Config) -> None:
    (Path(str(ppo.model.path)) / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"model.path=.*policy: its tokenizer can't be read"):
        inputs.policy_tokenizer(ppo.model, None)
    (Path(str(ppo.model.path)) / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config.json, line 1: not valid JSON"):
        capacity.cache_bytes_per_token(ppo.model)


def test_a_reward_model_that_reads_text_says_so(ppo: Config, tmp_path: Path) -> None:
    reward_directory(tmp_path / "other", text="entirely different words", template=CHATML)
    other = replace(ppo, reward=RewardConfig(path=str(tmp_path / "other")))
    with pytest.raises(
        UserError,
        match=r"stage.critic_init=reward: .*another tokenizer \(\d+ entries\).*Set "
        r"stage.critic_init=policy.",
    ):
        check(other)
    (note,) = check(replace(other, stage=OnlineStage(critic_init=CriticInit.policy)))
    assert (
        note.startswith("reward.path=")
        and "another tokenizer" in note
        and "as text" in note
        and "train it from the policy: stage=reward" in note
    )
    reward_directory(tmp_path / "chat", template=CHATML)
    (note,) = check(replace(ppo, reward=RewardConfig(path=str(tmp_path / "chat"))))
    assert "another chat template than the policy" in note


def test_a_run_that_the_memory_plan_does_not_fit_says_so(
    ppo: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan is made where weights are large: here a file of 1 GiB that takes no room."""
    small = Machine(ranks=1, cuda=True, device_gib=1.0, host_gib=None)
    monkeypatch.setattr(moments, "machine_of", lambda engine, params, all_devices: small)
    assert check(ppo) == []
    with (Path(str(ppo.model.path)) / "model.safetensors").open("wb") as file:
        file.truncate(1 << 30)
    (note,) = check(ppo)
    assert (
        note.startswith("the memory plan doesn't fit, 0.9 GiB are usable on each device: ")
        and "stage=doctor stage.plan=ppo" in note
    )
    # it shows the plan itself
    assert check(replace(ppo, run=replace(ppo.run, dry_run=True))) == []
    monkeypatch.setattr(
        moments, "machine_of", lambda engine, params, all_devices: replace(small, device_gib=80.0)
    )
    assert check(ppo) == []
