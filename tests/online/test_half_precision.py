"""The proof of a sync in bfloat16: rounding passes, wrong weights do not."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollout
from conf.choices import Dtype, RolloutBackend
from conf.schema import Config, DataConfig, ModelConfig, RolloutConfig
from conf.stages import OnlineStage
from policy.agreement import FLOAT32_GAP, Spread, rounding_otherwise, rounding_spread, spread
from policy.saving import full_weights
from rlhf.cli import config
from rlhf.online.sync import (
    Bounds,
    Calibration,
    Probe,
    Proof,
    fixed_bounds,
    gap_tolerance,
    sampled_probes,
)
from rlhf.run.context import RunContext
from rlhf.stages import online as online_stage
from rlhf.stages import rows as stage_rows
from rlhf.stages.evaluation.policies import probe_logprobs
from rlhf.types import FullWeights, Prompt, SyncError
from rollout.weights import sampled_columns
from tests import toys

BACKENDS = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]
PROMPTS = [Prompt(id=str(i), text="", token_ids=tuple(range(10 + i, 16 + i))) for i in range(8)]
LAYER = "model.layers.1."
MATRIX = LAYER + "mlp.down_proj.weight"


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def generators(tiny_model: Callable[..., Path]) -> Iterator[Callable[[str], Any]]:
    made: dict[str, Any] = {}

    def get(backend: str) -> Any:
        if backend not in made:
            settings = RolloutConfig(
                backend=RolloutBackend(backend),
                max_response_length=40,
                kv_cache_gib=0.05,
                max_num_seqs=16,
            )
            model = ModelConfig(path=str(tiny_model()), dtype=Dtype.bfloat16)
            made[backend] = rollout.make_generator(
                Config(
                    stage=OnlineStage(),
                    rollout=settings,
                    data=DataConfig(max_prompt_length=24),
                    model=model,
                ),
                model_path=str(tiny_model()),
                tokenizer=AutoTokenizer.from_pretrained(tiny_model()),
                model_factory=lambda: load(tiny_model()),
                adapter_rank=None,
            )
        return made[backend]

    yield get
    for generator in reversed(made.values()):
        generator.close()


def logprobs_of(model: Any, probes: Sequence[Probe]) -> list[float]:
    found: list[float] = []
    for probe in probes:
        found += probe_logprobs(model, probe.token_ids)[probe.first - 1 :]
    return found


def moved(model: Any, seed: int) -> Any:
    """As a step of training would: every weight moves by about one step of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1 + 0.01 * torch.randn(param.shape, generator=generator).to(param.dtype))
    return model


Change = Callable[[str, Tensor, dict[str, Tensor]], Tensor]


def not_updated(name: str, tensor: Tensor, before: dict[str, Tensor]) -> Tensor:
    return before[name] if name.startswith(LAYER) else tensor


def one_percent(name: str, tensor: Tensor, before: dict[str, Tensor]) -> Tensor:
    return tensor * 1.01 if name == MATRIX else tensor


def swapped(name: str, tensor: Tensor, before: dict[str, Tensor]) -> Tensor:
    """The other layer's weights of before, in the place of this one's."""
    return before[name.replace(".1.", ".0.", 1)] if name.startswith(LAYER) else tensor


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [not_updated, one_percent, swapped])
def test_a_wrong_layer_is_named(
    backend: str,
    change: Change,
    generators: Callable[[str], Any],
    tiny_model: Callable[..., Path],
) -> None:
    generator, model = generators(backend), load(tiny_model())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator.sync(full_weights(model), 1)
    probes = sampled_probes(generator, PROMPTS, 256)
    proof = Proof(probes, None, Calibration(2.0))

    def check(version: int) -> None:
        proof.check(generator, model, lambda: logprobs_of(model, probes), version)

    check(1)
    generator.sync(full_weights(moved(model, 2)), 2)
    check(2)
    assert proof.figures["rollout/probe_gap_mean"] < proof.bounds.mean < 0.5
    generator.sync(full_weights(moved(model, 3)), 3)
    sent = generator.sent
    wrong = FullWeights((n, change(n, t, before)) for n, t in full_weights(model).tensors)
    generator.sync(wrong, 3)
    generator.sent = sent  # of what left the trainer
    with pytest.raises(SyncError, match=r"weight sync 3: .*model\.layers\.1\."):
        check(3)


def test_the_statistic_sees_another_function(tiny_model: Callable[..., Path]) -> None:
    """Where no tensor can be read: a layer that is not there is far above what rounding explains,
    a matrix off by 1 % is not.
    """
    model = load(tiny_model())
    probes = tuple(Probe((*p.token_ids, *range(40, 72)), len(p.token_ids)) for p in PROMPTS)

    class Unreadable:
        version = 1

        def __init__(self, engine: Any) -> None:
            self.engine = engine

        def logprobs(self, token_ids: Sequence[int]) -> list[float]:
            return probe_logprobs(self.engine, token_ids)

    def check(engine: Any) -> None:
        generator: Any = Unreadable(engine)
        proof = Proof(probes, None, Calibration(2.0))
        proof.check(generator, model, lambda: logprobs_of(model, probes), 1)

    engine = load(tiny_model())
    with torch.no_grad():
        engine.get_parameter(MATRIX).mul_(1.01)
    check(engine)
    with torch.no_grad():
        engine.get_parameter(MATRIX).zero_()
    with pytest.raises(SyncError, match=r"weight sync 1: .*rollout\.gap_factor"):
        check(engine)


def test_a_gap_that_is_no_number_is_refused(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model())
    probe = Probe(tuple(range(40, 60)))

    class Broken:
        version = 1

        def logprobs(self, token_ids: Sequence[int]) -> list[float]:
            return [float("nan"), *probe_logprobs(model, token_ids)[1:]]

    generator: Any = Broken()
    with pytest.raises(SyncError, match="weight sync 1"):
        Proof((probe,), None, Calibration(2.0)).check(
            generator, model, lambda: logprobs_of(model, (probe,)), 1
        )


def test_rounding_is_measured_and_leaves_the_model_as_it_was(
    tiny_model: Callable[..., Path],
) -> None:
    """About as much as bfloat16 differs from float32; nothing in float32."""
    half = load(tiny_model())
    probes = [Probe(tuple(range(first, first + 40))) for first in range(10, 26)]
    plain = logprobs_of(half, probes)
    measured = rounding_spread(half, plain, lambda: logprobs_of(half, probes))
    assert logprobs_of(half, probes) == plain
    again = rounding_spread(half, plain, lambda: logprobs_of(half, probes))
    assert again == measured, "the random numbers are its own"
    exact = logprobs_of(load(tiny_model()).float(), probes)
    real = spread([a - b for a, b in zip(plain, exact, strict=True)])
    assert 0.5 * real.mean < measured.mean < 4 * real.mean
    single = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32)
    with rounding_otherwise(single):
        moved_by = [a - b for a, b in zip(logprobs_of(single, probes), exact, strict=True)]
    assert spread(moved_by).mean < 0.5
    none = rounding_spread(single, exact, lambda: exact)
    assert none == Spread(FLOAT32_GAP, FLOAT32_GAP)


def test_calibration_by_hand() -> None:
    noise = Spread(0.01, 0.04)
    calibration = Calibration(factor=2.0)
    assert calibration.fault(Spread(0.05, 0.04), noise) is not None, "5 times at the start"
    assert calibration.mean is None
    assert calibration.fault(Spread(0.03, 0.02), noise) is None
    assert (calibration.mean, calibration.tail) == (pytest.approx(3.0), 1.0)
    assert calibration.fault(Spread(0.059, 0.079), noise) is None
    assert calibration.fault(Spread(0.061, 0.04), noise) is not None
    assert calibration.fault(Spread(0.01, 0.081), noise) is not None
    assert calibration.fault(Spread(float("nan"), 0.01), noise) is not None
    # twice as wide where rounding explains twice as much
    assert calibration.fault(Spread(0.061, 0.081), Spread(0.02, 0.08)) is None
    bounds = calibration.bounds(noise)
    assert (bounds.mean, bounds.tail) == (pytest.approx(0.12), pytest.approx(0.16))


def test_bounds_by_hand() -> None:
    half, single = Bounds(0.1, 0.4, 0.01), fixed_bounds(1e-4)
    assert half.fault(mean=0.1, above=5, tokens=500) is None
    assert half.fault(mean=0.1, above=1, tokens=20) is None, "one token always may"
    assert "6 of 500" in str(half.fault(mean=0.1, above=6, tokens=500))
    assert half.fault(mean=0.11, above=0, tokens=500) is not None
    assert half.fault(mean=float("nan"), above=0, tokens=500) is not None
    assert single.fault(mean=1e-5, above=0, tokens=500) is None
    assert single.fault(mean=1e-5, above=1, tokens=500) is not None, "in float32 none may"


def test_float32_and_a_configured_tolerance_are_fixed() -> None:
    assert gap_tolerance(None, torch.float32) == 1e-4
    assert gap_tolerance(None, torch.bfloat16) is None
    assert gap_tolerance(0.3, torch.bfloat16) == gap_tolerance(0.3, torch.float32) == 0.3


@pytest.mark.parametrize("width", [3, 8, 20, 576])
def test_every_column_has_its_turn(width: int) -> None:
    seen: set[int] = set()
    for version in range(width):
        columns = sampled_columns(width, version).tolist()
        assert len(set(columns)) == len(columns) == min(8, width)
        seen |= set(columns)
    assert seen == set(range(width))


@pytest.mark.parametrize(
    ("backend", "adapter"),
    [
        ("hf", "none"),
        pytest.param("hf", "lora", marks=pytest.mark.full),
        pytest.param("vllm", "none", marks=[pytest.mark.vllm, pytest.mark.full]),
        pytest.param("vllm", "lora", marks=pytest.mark.vllm),
    ],
)
def test_a_run_in_bfloat16_goes_through(
    backend: str, adapter: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    rows = toys.write_jsonl(tmp_path / "prompts.jsonl", toys.prompt_rows())
    cfg = config.compose(
        [
            "stage=grpo",
            f"model.path={tiny_model()}",
            "model.dtype=bfloat16",
            f"adapter={adapter}",
            f"rollout={backend}",
            "rollout.kv_cache_gib=0.05",
            "rollout.max_response_length=12",
            "tracking=none",
            f"run.dir={tmp_path}",
            f"data.path={rows}",
            "data.max_prompt_length=32",
            "reward.function=tests.toys:even_tokens",
            "stage.steps=2",
            "stage.prompts_per_step=8",
            "stage.samples_per_prompt=4",
            "stage.learning_rate=1e-3",
            "stage.save_steps=0",
        ]
    )
    online_stage.run(RunContext.open(cfg, ()), stage_rows)
    path = tmp_path / cfg.run.name / "grpo" / "metrics.jsonl"
    steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(steps) == 2
    for step in steps:
        assert step["rollout/probe_rounding"] >= FLOAT32_GAP
        assert step["rollout/logprob_gap_mean"] < 0.1 and step["rollout/logprob_gap_above"] <= 0.01
        assert step["policy/grad_norm"] > 0
