"""The memory plan's formulae against the papers, against DeepSpeed's own estimators, and against
models counted parameter by parameter.
"""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.choices import AdapterKind, EngineKind, Offload, RolloutBackend
from conf.model import AdamKernels
from conf.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    EngineConfig,
    ModelConfig,
    RolloutConfig,
)
from policy.adapters import attach
from policy.model import trainable
from rlhf.checks.memory import activations, shapes
from rlhf.checks.memory.fit import eased, engines, names_of, recommended, rows
from rlhf.checks.memory.moments import HEADROOM, Machine, Phase, Plan
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import Shapes, shape_of_config
from rlhf.checks.memory.states import (
    GIB,
    Bytes,
    Counts,
    Setting,
    States,
    frozen_states,
    peak,
    temporaries,
    textbook,
    total,
    training_states,
)
from rlhf.checks.memory.tables import answers
from rlhf.cli import config
from rlhf.types import UserError
from tests import toys

P = 7e9
WHOLE = Counts(total=int(P), trained=int(P), largest=0, largest_layer=0)
GPU = Machine(ranks=8, cuda=True, device_gib=80.0, host_gib=None)


def setting(zero: int, ranks: int = 8, **options: Any) -> Setting:
    return Setting(
        kind=EngineKind.deepspeed,
        zero=zero,
        ranks=ranks,
        half=True,
        cuda=True,
        fused=False,
        **options,
    )


def model_states(states: States, *, without: tuple[str, ...] = ()) -> float:
    """Bytes on the device of weights, gradients, masters and moments in the backward pass; buffers
    are left out.
    """
    parts = {
        **states.resident,
        **{name: part for name, part in states.backward.items() if name not in states.resident},
    }
    return sum(
        part.device
        for name, part in parts.items()
        if "bucket" not in name and "passing" not in name and name not in without
    )


@pytest.mark.parametrize(
    ("zero", "ranks", "gigabytes"),
    [
        (0, 64, 120.0),
        (1, 64, 31.4),
        (2, 64, 16.6),
        (3, 64, 1.9),
        (0, 1, 120.0),
        (1, 1, 120.0),
        (2, 1, 120.0),
        (3, 1, 120.0),
    ],
)
def test_the_textbook_figures_are_those_of_the_papers_figure_1(
    zero: int, ranks: int, gigabytes: float
) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5e9 parameters on 64 ranks, in gigabytes of 1e9
    bytes.
    """
    assert textbook(7.5e9, zero, ranks) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_what_engines_hold_is_the_textbooks_figure_and_buffers(zero: int, ranks: int) -> None:
    """The textbook adds gradients in the weights' dtype; ZeRO-2 and 3 are asked for float32."""
    held = model_states(training_states(WHOLE, setting(zero, ranks)))
    float32_sums = 2 * P / ranks if zero >= 2 else 0
    assert held - float32_sums == pytest.approx(textbook(P, zero, ranks), rel=1e-6)


@pytest.mark.parametrize(("half", "expected"), [(False, 16), (True, 18)])
def test_the_torch_engine_adds_gradients_in_float32(half: bool, expected: int) -> None:
    """Weights, gradients, momentum and variance in float32; in half precision 2 bytes of weights
    beside float32 ones.
    """
    states = training_states(WHOLE, Setting(half=half, cuda=True))
    assert model_states(states) / P == expected
    assert total(states.step).device / P == 4  # the gradient


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_zero_2_is_deepspeeds_estimate(ranks: int) -> None:
    """Theirs counts the float32 gradient of the step beside the half-precision one: 2P + 18P/N.
    Ours has both, but at different moments, and adds them in float32: 2P/N more.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import (
        estimate_zero2_model_states_mem_needs as estimate,
    )

    states = training_states(WHOLE, setting(2, ranks))
    ours = model_states(states) + states.step["gradients"].device
    assert ours - 2 * P / ranks == pytest.approx(
        estimate(int(P), num_gpus_per_node=ranks, cpu_offload=False)[1], rel=1e-6
    )


@pytest.mark.parametrize("ranks", [8, 64])
def test_zero_3_is_deepspeeds_estimate_and_the_weights_that_it_forgets(ranks: int) -> None:
    """Theirs: 18P/N, as under ZeRO-2, and the largest layer in float32. But 2P/N more are there:
    under ZeRO-2 the weights stood beside the 18. And 2P/N for sums in float32.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate

    layer = 5e8
    states = training_states(WHOLE, setting(3, ranks))
    float32 = 4 * P / ranks  # of a sub-group, which holds a whole part here
    # and their flat copy
    assert states.step["float32 gradients"].device == pytest.approx(
        float32 + 2 * P / ranks, rel=1e-6
    )
    ours = model_states(states) + float32 + 4 * layer
    assert ours - 4 * P / ranks == pytest.approx(
        estimate(
            int(P), int(layer), num_gpus_per_node=ranks, cpu_offload=False, cpu_offload_params=False
        )[1],
        rel=1e-6,
    )


def test_offload_is_deepspeeds_estimate_with_the_buffers_that_its_factor_stands_for() -> None:
    """Theirs: 16 bytes a parameter on the host, times a factor of 1.5 for buffers.

    Ours are named: 2 bytes of weights to send, 4 of gradients that wait for those of the other
    micro-batches, 8 of AdamW's temporaries.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import (
        estimate_zero2_model_states_mem_needs as estimate,
    )

    states = training_states(WHOLE, setting(2, 8, offload=Offload.cpu))
    cpu, gpu = estimate(int(P), num_gpus_per_node=8, cpu_offload=True, additional_buffer_factor=1)
    buffers = ("weights to send", "gradients of micro-batches")
    named = (
        sum(states.resident[name].host for name in buffers)
        + states.step["AdamW's temporaries"].host
    )
    # theirs takes the 4N of float32 loading where N > 4: 32
    assert 8 * (peak(states).host - named) == pytest.approx(16 / 32 * cpu, rel=1e-6)
    assert states.resident["weights"].device == pytest.approx(gpu, rel=1e-6)
    assert 8 * peak(states).host / P == pytest.approx(30)
    wide = training_states(WHOLE, setting(3, 8, offload=Offload.cpu))
    assert total(wide.resident).host * 8 / P == pytest.approx(18)
    assert total(wide.resident).device == 2 * 5e8  # the bucket alone


def test_zero_3_offload_is_deepspeeds_estimate_with_what_it_leaves_out_named() -> None:
    """On the host theirs has 18 bytes a parameter; as without offload the weights' 2 are missing,
    and 2 for sums in float32; AdamW's temporaries stand in its factor of 1.5.

    Where every rank loads the model first (zero_init=False), theirs has 4 bytes a parameter and
    rank: we load half precision as such, 2. On the device theirs has one layer in float32;
    DeepSpeed's own defaults keep 1e9 parameters gathered, and 5e8 gradients in a bucket and its
    copy.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as estimate

    counts = replace(WHOLE, largest_layer=int(5e8))
    states = training_states(counts, setting(3, 8, offload=Offload.cpu))
    cpu, gpu, layer = estimate(
        int(P), counts.largest_layer, num_gpus_per_node=8, additional_buffer_factor=1
    )
    held = 8 * (peak(states).host - states.step["AdamW's temporaries"].host)
    assert held - 4 * P == pytest.approx(cpu, rel=1e-6)
    loading, _, _ = estimate(
        int(P),
        counts.largest_layer,
        num_gpus_per_node=8,
        additional_buffer_factor=1,
        zero_init=False,
    )
    assert 2 * 8 * states.start.host == pytest.approx(loading, rel=1e-6)
    assert gpu == layer == 4 * 5e8
    assert peak(states).device == 2 * (1e9 + 5e8) + 2 * 2 * 5e8


def test_adamws_temporaries() -> None:
    gpu = setting(2)
    assert temporaries(10, 5, replace(gpu, fused=True)) == 0
    assert temporaries(10, 5, gpu) == 40
    assert (
        temporaries(10, 5, gpu, on_host=True) == temporaries(10, 5, replace(gpu, cuda=False)) == 40
    )


@pytest.mark.parametrize("stage", ["grpo", "sft"])
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_deepspeeds_own_kernels_have_no_temporaries(stage: str, zero: int) -> None:
    """On a CPU, in float32: 8 bytes a parameter of the partition. Under ZeRO-1 and 2 flattening
    takes 4 of them anyway.
    """
    machine = replace(GPU, cuda=False)
    cfg = made(stage)
    engine = EngineConfig(kind=EngineKind.deepspeed, zero_stage=zero)
    held = []
    for adam in (AdamKernels.torch, AdamKernels.deepspeed):
        found = planned(replace(cfg, engine=replace(engine, adam=adam)), machine)
        steps = [one for one in found.moments if one.name in ("step", "policy's step")]
        held.append(steps[-1].total.device)
    saved = 8 if zero == 3 else 4
    assert held[0] - held[1] == pytest.approx(saved * SHAPE().parameters / machine.ranks, rel=1e-6)


def test_an_adapter_trains_beside_frozen_weights() -> None:
    counts = Counts(total=1_010, trained=10, largest=5, largest_layer=100)
    states = training_states(counts, Setting(half=True, cuda=True, float32_trained=True))
    # float32 as PEFT makes it, so there is no master copy
    assert total(states.resident).device == 2 * 1_000 + 4 * 10 + 8 * 10
    assert states.step["gradients"].device == 4 * 10
    zero = training_states(counts, setting(3, 2))
    assert (
        zero.resident["weights"].device == 2 * 1_010 / 2
        and zero.resident["Adam"].device == 8 * 10 / 2
    )


def test_a_reference_is_whole_below_zero_3() -> None:
    for zero, device, host in ((0, 2 * P, 0), (2, 2 * P, 0), (3, 2 * P / 8, 0)):
        assert total(frozen_states(P, setting(zero), 0).resident) == Bytes(device, host)
    assert total(frozen_states(P, setting(3, offload=Offload.cpu), 0).resident) == Bytes(
        0, 2 * P / 8
    )


# ---- shapes ----


def test_llama_3_8b_from_its_size_alone() -> None:
    shape = shapes.assumed_shape(8_030_261_248)
    assert (shape.parameters, shape.layers, shape.hidden, shape.intermediate, shape.kv_heads) == (
        8_030_261_248,
        32,
        4096,
        14336,
        8,
    )
    assert activations.kv_bytes_per_token(shape, 2) == 131_072  # 128 KiB a token
    assert shape.classifier == 8_030_261_248 - 128_256 * 4096 + 4096


@pytest.mark.parametrize("wanted", [1.35e8, 5e8, 1.5e9, 3e9, 7e9, 1.3e10, 3.2e10, 7e10])
def test_an_assumed_model_has_the_size_that_was_asked_for(wanted: float) -> None:
    assert shapes.assumed_shape(wanted).parameters == pytest.approx(wanted, rel=0.02)


def test_counts_are_those_of_the_model_itself() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for tied in (True, False):
        made = shapes.llama(
            vocab=300, hidden=64, intermediate=96, layers=2, heads=4, kv_heads=2, tied=tied
        )
        shape = shapes.shape_of_config(made, "x")
        model = AutoModelForCausalLM.from_config(made)
        assert shape.parameters == sum(p.numel() for p in model.parameters()) and shape.tied is tied
        made.num_labels, made.pad_token_id = 1, 0
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(made)
        assert shape.classifier == sum(p.numel() for p in classifier.parameters())
        for targets in (["all-linear"], ["q_proj", "down_proj"]):
            for dora in (False, True):
                adapter = AdapterConfig(kind=AdapterKind.lora, rank=4, targets=targets, dora=dora)
                trained = trainable(
                    attach(AutoModelForCausalLM.from_config(made), adapter, task="CAUSAL_LM")
                )
                assert shapes.adapter_parameters(shape, adapter) == sum(p.numel() for p in trained)
    with pytest.raises(
        UserError,
        match=r"adapter.targets=\['nose'\].*q_proj",
    ):
        shapes.adapter_parameters(shape, AdapterConfig(kind=AdapterKind.lora, targets=["nose"]))


@pytest.mark.parametrize("kind", ["rasa", "lora_mini", "molora", "pfeiffer", "prefix", "vera"])
def test_every_method_is_counted_by_its_own_formula(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    made = shapes.llama(
        vocab=300, hidden=64, intermediate=96, layers=3, heads=4, kv_heads=2, tied=True
    )
    shape = shapes.shape_of_config(made, "x")
    adapter = config.compose(
        [f"adapter={kind}", "stage=sft", "model=tiny", "stage.learning_rate=1e-3"]
    ).adapter
    model = AutoModelForCausalLM.from_config(made)
    base = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    adapted = attach(model, adapter, task="CAUSAL_LM", sample=lambda: [list(range(30))])
    counted = sum(param.numel() for param in trainable(adapted))
    assert shapes.adapter_parameters(shape, adapter) == counted
    added = [one for one in (*adapted.parameters(), *adapted.buffers()) if id(one) not in base]
    frozen = sum(tensor.numel() for tensor in added if not tensor.requires_grad)
    assert shape.frozen_by(adapter) == frozen
    assert (frozen > 0) is (kind in ("lora_mini", "vera"))


def test_a_model_that_is_not_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"model.path is not set.*model.params=",
    ):
        shapes.read_shape(ModelConfig())
    with pytest.raises(UserError, match=r"model.path=/nowhere: no such directory"):
        shapes.read_shape(ModelConfig(path="/nowhere"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        UserError,
        match=r"model.path=.*config.json.*a.gguf.*model.gguf_file=a.gguf",
    ):
        shapes.read_shape(ModelConfig(path=str(tmp_path)))
    with pytest.raises(
        UserError,
        match=r"model.path=no-such-model: its configuration can't be read .* or model.params=",
    ):
        shapes.read_shape(ModelConfig(path="no-such-model"))


# ---- roles, moments, peaks ----


def made(
    stage: str,
    zero: int | None = 3,
    *,
    lora: bool = False,
    rollout: dict[str, Any] | None = None,
    **options: Any,
) -> Config:
    """A preset's configuration. `options`: of the engine where it has such a field, else of the
    stage.
    """
    engine = {
        name: value for name, value in options.items() if name in EngineConfig.__dataclass_fields__
    }
    chosen = replace(
        config.stage_preset(stage),
        **{name: value for name, value in options.items() if name not in engine},
    )
    kind = EngineKind.torch if zero is None else EngineKind.deepspeed
    return Config(
        stage=chosen,
        model=ModelConfig(params=1e9),
        adapter=AdapterConfig(kind=AdapterKind.lora if lora else AdapterKind.none),
        engine=EngineConfig(kind=kind, zero_stage=zero or 0, **engine),
        data=DataConfig(max_prompt_length=toys.PROMPT_LENGTH),
        rollout=RolloutConfig(**{"max_response_length": toys.RESPONSE_LENGTH, **(rollout or {})}),
    )


SHAPE = functools.cache(lambda: shapes.assumed_shape(1e9))


def planned(cfg: Config, machine: Machine = GPU, *, rewards: int = 1) -> Plan:
    return plan(cfg, Shapes(SHAPE(), (("reward.path", SHAPE()),) * rewards), machine)


def roles(found: Plan, phase: Phase = Phase.rollout) -> set[str]:
    return set(found.peak(phase).roles) - {"process", "generator"}


def test_roles_are_those_that_the_stage_builds() -> None:
    assert roles(planned(made("ppo"))) == {"policy", "critic", "reference", "reward"}
    # the reference is the policy with its adapter off
    assert roles(planned(made("ppo", lora=True))) == {"policy", "critic", "reward"}
    assert roles(planned(made("ppo", 2, lora=True, reference_every=9))) == {
        "policy",
        "critic",
        "reference",
        "reward",
    }
    assert roles(planned(made("grpo"), rewards=0)) == {"policy", "reference"}
    assert roles(planned(made("dapo", reference=False), rewards=2)) == {"policy", "reward"}
    assert roles(planned(made("sft")), Phase.update) == {"policy"}
    assert roles(planned(made("dpo")), Phase.update) == {"policy", "reference"}
    assert roles(planned(made("dpo", lora=True)), Phase.update) == {"policy"}
    assert roles(planned(made("simpo")), Phase.update) == {"policy"}
    assert roles(planned(made("reward")), Phase.update) == {"reward model"}


def test_the_two_sides_of_a_pair_are_in_one_pass() -> None:
    """A micro-batch of stage=online_dpo is two rows at least, of other stages one."""
    row = toys.PROMPT_LENGTH + toys.RESPONSE_LENGTH
    for stage, count in (("online_dpo", 2), ("grpo", 1)):
        found = [
            planned(made(stage, micro_tokens=tokens)).peak(Phase.update).total.device
            for tokens in (1, count * row, (count + 1) * row)
        ]
        assert found[0] == found[1] < found[2], stage


@pytest.mark.parametrize(("zero", "share"), [(2, 1), (3, 8)])
def test_an_ensemble_holds_every_member(zero: int, share: int) -> None:
    """Whole on every rank, or under ZeRO-3 all ranks together."""
    one, three = (
        planned(made("grpo", zero), rewards=n).peak(Phase.rollout).roles["reward"].device
        for n in (1, 3)
    )
    assert three == 3 * one == 3 * 2 * SHAPE().classifier / share


def test_the_peak_is_the_worst_moment_and_moments_add_up() -> None:
    found = planned(made("ppo", 1))
    assert found.phases == list(Phase)
    assert found.device_gib == max(m.total.device for m in found.moments) / GIB
    update = found.peak(Phase.update)
    assert (
        update.total.device
        == sum(part.device for part in update.roles.values())
        > found.peak(Phase.rollout).total.device
    )
    assert {m.name for m in found.moments if m.phase is Phase.update} == {
        "policy's pass",
        "critic's pass",
        "policy's step",
        "critic's step",
    }


def test_zero_3_parts_a_model_while_it_is_read() -> None:
    """A rank's part, and twice the largest layer; the reference's too, and on the host one
    tensor.
    """
    shape = shapes.assumed_shape(7e10)
    found = plan(made("dpo"), Shapes(shape), GPU)
    starts = [moment for moment in found.moments if moment.phase is Phase.start]
    part, layer = 2 * shape.parameters / GPU.ranks, 2 * shape.largest_layer
    assert [one.name for one in starts] == ["policy", "reference"]
    for one in starts:
        assert one.roles[one.name] == Bytes(part + 2 * layer, 2 * layer)


def test_what_starts_from_whole_weights_is_loaded_whole() -> None:
    shape = shapes.assumed_shape(7e10)
    cfg = replace(made("dpo"), adapter=AdapterConfig(kind=AdapterKind.lora, dora=True))
    found = plan(cfg, Shapes(shape), GPU)
    start = next(moment for moment in found.moments if moment.name == "policy")
    assert start.roles["policy"].device > 2 * shape.parameters
    assert found.whole_first and not found.fits


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({"zero": 0}, {"zero": 1}),
        ({"zero": 1}, {"zero": 2}),
        ({"zero": 2}, {"zero": 3}),
        ({}, {"offload": Offload.cpu}),
        ({}, {"lora": True}),
        ({}, {"gradient_checkpointing": True}),
        ({"micro_tokens": 8192}, {"micro_tokens": 4096}),
        ({"logits_chunk": 4096, "gradient_checkpointing": True}, {"gradient_checkpointing": True}),
        ({"entropy_coef": 0.1, "gradient_checkpointing": True}, {"gradient_checkpointing": True}),
        (
            {"rollout": {"temperature": 0.7}, "gradient_checkpointing": True},
            {"gradient_checkpointing": True},
        ),
    ],
)
def test_every_setting_saves_what_it_is_there_for(
    more: dict[str, Any], less: dict[str, Any]
) -> None:
    assert planned(made("grpo", **more)).device_gib > planned(made("grpo", **less)).device_gib


def test_vllm_takes_its_share_or_says_why_it_cannot() -> None:
    found = planned(made("grpo", rollout={"gpu_memory_utilization": 0.25}))
    assert found.peak(Phase.rollout).roles["generator"].device == 0.25 * 80 * GIB
    assert "a cache of" in found.notes[0]
    small = planned(made("grpo", rollout={"gpu_memory_utilization": 0.03}))
    assert (
        small.problem is not None
        and "rollout.gpu_memory_utilization=0.03 doesn't hold vLLM's weights" in small.problem
        and not small.fits
    )
    shape = shapes.assumed_shape(8_030_261_248)
    cache = activations.cache_of(10 * GIB, shape, 2, 320)
    assert (cache.tokens, cache.sequences) == (10 * GIB // 131_072, 10 * GIB // 131_072 // 320)
    # 15.0 GiB of weights, 1.5 of overhead, 64 x 320 x 128 KiB = 2.5: 19 of 80, and no less
    assert activations.least_share(shape, 2, 320, 64, 80.0) == pytest.approx(0.25)


def test_without_a_gpu_the_host_is_the_device() -> None:
    cpu = Machine(ranks=2, cuda=False, device_gib=12.0, host_gib=24.0)
    found = planned(made("grpo", 2, rollout={"backend": RolloutBackend.vllm}), cpu)
    assert found.peak(Phase.rollout).roles["policy"].device == pytest.approx(
        4 * 1e9 + (4 + 8) * 1e9 / 2, rel=0.02
    )
    assert all(m.total.host == 0 for m in found.moments) and not found.fits


# ---- does it fit ----


def test_rows_are_every_engine_that_the_schema_allows() -> None:
    found = [
        (c.engine.kind, c.engine.zero_stage, c.engine.offload) for c in engines(made("ppo"), GPU)
    ]
    assert len(found) == len(set(found)) == 1 + 2 + 2 + 3 and EngineKind.torch not in {
        one[0] for one in found
    }
    alone = [c.engine.kind for c in engines(made("ppo"), replace(GPU, ranks=1))]
    assert alone.count(EngineKind.torch) == 1


def test_what_is_recommended_composes_fits_and_what_does_not_fit_is_said() -> None:
    cfg, shape = replace(made("ppo"), model=ModelConfig(params=7e9)), shapes.assumed_shape(7e9)
    models = Shapes(shape, (("reward.path", shape),))
    found = rows(cfg, models, GPU)
    assert len(names_of(found)) == 4
    for way in names_of(found):
        best = recommended(found, way)
        assert best is not None and best.plan.device_gib <= HEADROOM * 80
        again = config.compose(
            ["stage=ppo", "model.params=7e9", *toys.LENGTHS, *best.overrides],
        )
        assert plan(again, models, GPU).device_gib == pytest.approx(best.plan.device_gib)
    lines = answers(found, GPU)
    assert (
        lines[0].startswith("full training fits on 8 devices of 80 GiB")
        and "engine=zero3" in lines[0]
        and [line.partition(" fits")[0] for line in lines[2:]] == ["LoRA", "QLoRA"]
    )
    small = replace(GPU, device_gib=8.0)
    none = answers(rows(cfg, models, small), small)
    assert none[0].startswith("full training doesn't fit on 8 devices of 8 GiB with any engine")


def test_a_model_larger_than_a_device_fits_in_parts() -> None:
    """7B parameters in half precision are 13 GiB, which no rank ever holds."""
    cfg, shape = replace(made("sft"), model=ModelConfig(params=7e9)), shapes.assumed_shape(7e9)
    small = replace(GPU, device_gib=12.0)
    answer = answers(rows(cfg, Shapes(shape), small), small)[0]
    assert answer.startswith("full training fits on 8 devices of 12 GiB")
    assert "engine=zero3 engine.offload=cpu" in answer


def test_changes_come_one_by_one_and_are_all_named() -> None:
    cfg = made("grpo", micro_tokens=2048, rollout={"gpu_memory_utilization": 0.5})
    steps = list(eased(cfg, Shapes(SHAPE()), GPU))
    assert [len(changes) for _, changes in steps] == [0, 1, 2, 3, 4, 4]
    last, changes = steps[-1]
    assert (
        changes[-1] == "engine.micro_tokens=512"
        and last.engine.micro_tokens == 512
        and last.engine.gradient_checkpointing
    )
    sft = list(eased(made("sft", batch_size=16), Shapes(SHAPE()), GPU))
    assert [changes for _, changes in sft] == [
        (),
        ("engine.gradient_checkpointing=true",),
        ("engine.gradient_checkpointing=true", "engine.micro_batch_size=1"),
        *(
            ("engine.gradient_checkpointing=true", "engine.micro_batch_size=1", shared)
            for shared in (f"engine.sequence_parallel={ranks}" for ranks in (2, 4, 8))
        ),
    ]
    assert next(
        changes for _, changes in list(eased(made("ppo", lora=True), Shapes(SHAPE()), GPU))[1:]
    ) == ("stage.critic_adapter=true",)


@pytest.mark.parametrize(
    ("kind", "sizes", "heads"),
    [
        ("mamba", {"hidden_size": 32}, 0),
        ("mamba2", {"hidden_size": 32, "num_heads": 4, "head_dim": 16}, 0),
        ("rwkv", {"hidden_size": 32, "attention_hidden_size": 32}, 0),
        ("gemma3n_text", {}, 8),
        ("gemma4_text", {}, 8),
    ],
)
def test_families_that_name_their_sizes_otherwise_are_counted(
    kind: str, sizes: dict[str, int], heads: int
) -> None:
    """State-space models have no heads; others have sizes of each layer."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **sizes)
    shape = shape_of_config(config, kind)
    assert shape.heads == heads and (shape.head_size > 0) == (heads > 0)
    assert shape.layers == config.get_text_config().num_hidden_layers
    assert shape.parameters > 0 and shape.vocab > 0 and shape.intermediate > 0


def test_a_family_that_cannot_be_built_is_refused_by_name() -> None:
    from transformers import AutoConfig

    with pytest.raises(UserError, match=r"reformer.*can't be built"):
        shape_of_config(AutoConfig.for_model("reformer"), "reformer")
