"""Options of an adapter that a method, or training without one, would not read."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.adapters import LOOKS_AT_ROWS, AdapterConfig, merges
from conf.choices import AdapterKind, LoraInit, LoraSync, Quantization, RolloutBackend
from conf.methods import BottleneckConfig, Composition, PromptConfig
from conf.schema import RolloutConfig
from conf.stages import OnlineStage, SFTStage
from policy import adapters
from rlhf.checks import launch
from rlhf.cli import config
from rlhf.types import UserError
from tests import toys
from tests.checking import check

KINDS = [kind for kind in AdapterKind if kind is not AdapterKind.none]


@pytest.mark.parametrize("kind", KINDS)
def test_only_methods_that_merge_take_merge_on_save(kind: AdapterKind) -> None:
    if merges(kind):
        AdapterConfig(kind=kind, merge_on_save=True)
        return
    with pytest.raises(ValueError, match=rf"merge_on_save=True.*{kind.value} does not read it"):
        AdapterConfig(kind=kind, merge_on_save=True)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_every_kind_have_names(kind: AdapterKind) -> None:
    AdapterConfig(kind=kind, name="task_1-b")
    for name in ("a.b", "a/b", "a b", "../a"):
        with pytest.raises(ValueError, match=r"adapter\.name='?" + re.escape(name)):
            AdapterConfig(kind=kind, name=name)


def test_rows_that_no_start_looks_at_are_not_asked_for() -> None:
    for init in LoraInit:
        options = {"quantize": Quantization.nf4} if init is LoraInit.loftq else {}
        if init in LOOKS_AT_ROWS:
            AdapterConfig(kind=AdapterKind.lora, init=init, sample_rows=64)
            continue
        with pytest.raises(ValueError, match=r"adapter\.sample_rows=64"):
            AdapterConfig(kind=AdapterKind.lora, init=init, sample_rows=64, **options)
    AdapterConfig(kind=AdapterKind.gelora, sample_rows=64)


def test_a_prompt_without_an_encoder_takes_no_size_of_one() -> None:
    encoder = PromptConfig(encoder_size=64)
    AdapterConfig(kind=AdapterKind.ptuning, prompt=encoder)
    with pytest.raises(ValueError, match=r"adapter\.prompt\.encoder_size=64"):
        AdapterConfig(kind=AdapterKind.prompt, prompt=encoder)


def test_an_option_of_another_methods_group_is_named_by_itself() -> None:
    fused = BottleneckConfig(combine=Composition.fuse)
    with pytest.raises(ValueError, match=r"adapter\.bottleneck\.combine='fuse' .*lora does not"):
        AdapterConfig(kind=AdapterKind.lora, bottleneck=fused)


@pytest.mark.parametrize(
    ("adapter", "rollout", "key"),
    [
        ({}, {"lora_sync": LoraSync.adapter}, "rollout.lora_sync=adapter with adapter=none"),
        ({}, {"max_lora_rank": 8}, "rollout.max_lora_rank=8 with adapter.kind=none"),
        ({"kind": AdapterKind.molora}, {"max_lora_rank": 8}, "adapter.kind=molora: no LoRA"),
    ],
)
def test_what_the_generator_would_not_read_is_refused(
    adapter: dict[str, Any], rollout: dict[str, Any], key: str
) -> None:
    given = RolloutConfig(backend=RolloutBackend.hf, **rollout)
    with pytest.raises(UserError) as refused:
        launch.check_adapter(given, AdapterConfig(**adapter))
    assert key in str(refused.value)


@pytest.mark.parametrize("rounding", [Quantization.none, Quantization.int8])
def test_blocks_scales_are_those_of_four_bits(rounding: Quantization) -> None:
    lora = AdapterKind.lora
    AdapterConfig(kind=lora, quantize=Quantization.nf4, double_quantize=False)
    with pytest.raises(ValueError, match=r"adapter\.double_quantize=False.*quantize=nf4"):
        AdapterConfig(kind=lora, quantize=rounding, double_quantize=False)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (AdapterConfig(rank=4), "adapter.rank=4"),
        (AdapterConfig(rslora=True), "adapter.rslora=True"),
        (AdapterConfig(save_whole=["lm_head"]), "adapter.save_whole="),
        (AdapterConfig(merge_on_save=True), "adapter.merge_on_save=True"),
        (AdapterConfig(name="task"), "adapter.name=task"),
    ],
)
def test_all_weights_are_not_trained_where_an_adapter_was_meant(
    given: AdapterConfig, named: str
) -> None:
    """adapter.rank=4 without adapter=lora trained every weight."""
    for stage in (SFTStage(), OnlineStage()):
        with pytest.raises(UserError) as refused:
            adapters.check_parts(stage, given)
        assert str(refused.value).startswith(named) and "adapter=lora" in str(refused.value)
    adapters.check_parts(SFTStage(), AdapterConfig())


def test_a_critics_adapter_reads_the_shape_of_a_lora() -> None:
    stage = OnlineStage(critic_adapter=True)
    adapters.check_parts(stage, AdapterConfig(rank=4, alpha=8, dropout=0.1, rslora=True))
    with pytest.raises(UserError, match=r"adapter\.rate_ratio=16"):
        adapters.check_parts(stage, AdapterConfig(rate_ratio=16))


def test_room_for_the_largest_rank_of_a_pattern(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """Before anything loads: the generator was told only then that a layer has rank 64."""
    toys.write_jsonl(tmp_path / "prompts.jsonl", toys.prompt_rows())
    given = ["stage=grpo", f"model.path={tiny_model()}", f"data.path={tmp_path}/prompts.jsonl"]
    given += [f"run.dir={tmp_path}", "reward.function=tests.toys:even_tokens", "tracking=none"]
    given += ["model.dtype=float32", "stage.steps=2", "stage.prompts_per_step=2"]
    given += ["stage.samples_per_prompt=2", "data.max_prompt_length=24", "rollout=vllm"]
    given += ["rollout.max_response_length=4", "adapter=lora", "adapter.rank=4"]
    given += ["adapter.rank_pattern={q_proj: 64}"]
    check(config.compose(given))
    check(config.compose([*given, "rollout.max_lora_rank=64"]))
    with pytest.raises(UserError, match=r"max_lora_rank=8.*rank_pattern=.*at least 64"):
        check(config.compose([*given, "rollout.max_lora_rank=8"]))


def test_what_is_no_plain_lora_is_named() -> None:
    adapter = AdapterConfig(kind=AdapterKind.lora, save_whole=["norm"])
    rollout = RolloutConfig(backend=RolloutBackend.hf, lora_sync=LoraSync.adapter)
    with pytest.raises(UserError, match=r"lora_sync=adapter with .*save_whole=\['norm'\]"):
        launch.check_adapter(rollout, adapter)


def test_no_ratio_of_rates_where_one_matrix_trains() -> None:
    adapter = AdapterConfig(kind=AdapterKind.lora, freeze_a=True, rate_ratio=16)
    with pytest.raises(UserError, match=r"adapter\.rate_ratio=16.*freeze_a=true"):
        adapters.method_of(adapter).check(None, adapter, True)
