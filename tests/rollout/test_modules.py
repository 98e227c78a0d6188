"""Adapters that are layers of their own, inside vLLM's engine and beside transformers: what they
write, the proof of each sync, and what is refused.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollout
from conf.adapters import AdapterConfig
from conf.choices import AdapterKind, Carrier, Placement, RolloutBackend
from conf.methods import BottleneckConfig, Composition, MoLoraConfig
from conf.schema import Config, DataConfig, RolloutConfig
from conf.stages import OnlineStage
from policy.adapters import attach
from policy.saving import adapter_weights, full_weights, save_adapter
from rlhf.cli.config import compose
from rlhf.online.sync import verify_sync
from rlhf.types import AdapterWeights, Prompt, SyncError, UserError
from rollout.modules import EngineModules, check_places
from tests.checking import check
from tests.online.families import tiny_family

PROBE = tuple(range(40, 84))
TOLERANCE = 1e-5
PROMPTS = [Prompt(id=str(i), text="", token_ids=tuple(range(10 + i, 13 + 3 * i))) for i in range(5)]
MOLORA = AdapterConfig(kind=AdapterKind.molora, rank=4, alpha=16.0, molora=MoLoraConfig(experts=3))


def bottleneck(placement: Placement, name: str = "default", **changes: Any) -> AdapterConfig:
    own = {"combine": changes.pop("combine", Composition.stack)}
    options = BottleneckConfig(size=8, placement=placement, **own)
    return AdapterConfig(kind=AdapterKind.bottleneck, name=name, bottleneck=options, **changes)


KINDS = {
    "houlsby": bottleneck(Placement.houlsby),
    "parallel": bottleneck(Placement.parallel),
    "molora": MOLORA,
}
# the rest of the matrix
FULL = {"pfeiffer": bottleneck(Placement.pfeiffer)}


def load(directory: Path, adapter: AdapterConfig | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return model if adapter is None else attach(model, adapter, task="CAUSAL_LM").eval()


def train(model: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.data.add_(0.05 * torch.randn(param.shape, generator=generator))
    return model


@torch.no_grad()
def logprobs_of(model: Any, ids: Sequence[int] = PROBE) -> list[float]:
    log_p = model(torch.tensor([list(ids)])).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()


def worst(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def start(backend: str, adapter: AdapterConfig, directory: Path) -> Any:
    settings = RolloutConfig(
        backend=RolloutBackend(backend), max_response_length=10, kv_cache_gib=0.05, max_num_seqs=16
    )
    cfg = Config(
        stage=OnlineStage(),
        rollout=settings,
        data=DataConfig(max_prompt_length=50),
        adapter=adapter,
    )
    return rollout.make_generator(
        cfg,
        model_path=str(directory),
        tokenizer=AutoTokenizer.from_pretrained(directory),
        model_factory=lambda: load(directory, adapter),
        carrier=Carrier.modules,
        adapter=adapter_weights(load(directory, adapter)),
    )


@pytest.fixture(scope="module")
def generators(tiny_model: Callable[..., Path]) -> Iterator[Callable[[str, str], Any]]:
    started: dict[tuple[str, str], Any] = {}

    def get(backend: str, kind: str) -> Any:
        if (backend, kind) not in started:
            started[backend, kind] = start(backend, (KINDS | FULL)[kind], tiny_model())
        return started[backend, kind]

    yield get
    for generator in reversed(started.values()):
        generator.close()


BACKENDS = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]
ALL = [*KINDS, pytest.param("pfeiffer", marks=pytest.mark.full)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ALL)
def test_it_writes_what_the_trainer_would(
    backend: str, kind: str, generators: Callable[..., Any], tiny_model: Callable[..., Path]
) -> None:
    """Prompts and single tokens of several sequences at once, after each of two syncs."""
    generator = generators(backend, kind)
    model, base = load(tiny_model(), (KINDS | FULL)[kind]), logprobs_of(load(tiny_model()))
    generator.sync(adapter_weights(model), 1)
    assert worst(generator.logprobs(PROBE), base) < TOLERANCE  # fresh, it adds nothing
    for version in (2, 3):
        train(model, version)
        expected = logprobs_of(model)
        assert worst(expected, base) > 1e-2
        generator.sync(adapter_weights(model), version)
        assert verify_sync(generator, PROBE, expected, TOLERANCE, version) < TOLERANCE
        held = generator.checksums()
        assert len(held) == len(adapter_weights(model).tensors)
        assert all(generator.sent[name] == value for name, value in held.items())
        for written in generator.generate(PROMPTS, greedy=True):
            prompt = list(written.prompt.token_ids)
            theirs = logprobs_of(model, prompt + written.token_ids)[len(prompt) - 1 :]
            assert worst(written.rollout_logprobs, theirs) < TOLERANCE
            with torch.no_grad():
                logits = model(torch.tensor([prompt + written.token_ids[:-1]])).logits[0]
            assert logits[len(prompt) - 1 :].argmax(-1).tolist() == written.token_ids


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_adapters_go_as_one(
    backend: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A fusion of two, with the tensors that don't train."""
    for seed, name in enumerate(("first", "second"), start=1):
        adapter = bottleneck(Placement.pfeiffer, name)
        save_adapter(train(load(tiny_model(), adapter), seed), tmp_path / name)
    fused = bottleneck(
        Placement.pfeiffer,
        combine=Composition.fuse,
        load=[str(tmp_path / "first"), str(tmp_path / "second")],
    )
    generator = start(backend, fused, tiny_model())
    try:
        model = train(load(tiny_model(), fused), 5)
        generator.sync(adapter_weights(model), 1)
        assert verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 1) < TOLERANCE
        assert any(".block_first." in name for name in generator.sent)
        assert any(".fusion." in name for name in generator.sent)
    finally:
        generator.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["houlsby", "molora"])
def test_stale_tensors_are_found(
    backend: str, kind: str, generators: Callable[..., Any], tiny_model: Callable[..., Path]
) -> None:
    """Those of the version before, in one layer: by their checksums, and by the probe alone."""
    generator = generators(backend, kind)
    model = train(load(tiny_model(), KINDS[kind]), 1)
    generator.sync(adapter_weights(model), 1)
    held = held_tensors(generator)
    name = next(n for n in held if n.endswith((".up.weight", ".b.weight")))
    old = held[name].clone()
    generator.sync(adapter_weights(train(model, 2)), 2)
    expected = logprobs_of(model)
    verify_sync(generator, PROBE, expected, TOLERANCE, 2)
    with torch.no_grad():
        held_tensors(generator)[name].copy_(old)
    with pytest.raises(SyncError, match=f"does not hold what the trainer sent for .*{name[-20:]}"):
        verify_sync(generator, PROBE, expected, TOLERANCE, 2)
    generator.sent = {}
    with pytest.raises(SyncError, match=r"a gap of .* nats"):
        verify_sync(generator, PROBE, expected, TOLERANCE, 2)


def held_tensors(generator: Any) -> dict[str, torch.Tensor]:
    if hasattr(generator, "_modules"):
        found: dict[str, torch.Tensor] = generator._modules._held
        return found
    return dict(generator._tensors())


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_tensors_are_named(
    backend: str, generators: Callable[..., Any], tiny_model: Callable[..., Path]
) -> None:
    generator = generators(backend, "molora")
    weights = adapter_weights(load(tiny_model(), MOLORA))
    generator.sync(weights, 1)
    name = next(iter(weights.tensors))
    fewer = {n: t for n, t in weights.tensors.items() if n != name}

    def refused(tensors: Any, config: Any, message: str) -> None:
        with pytest.raises(SyncError, match=message):
            generator.sync(AdapterWeights(tensors, config), 2)
        assert generator.version == 1

    refused(fewer, weights.config, r"missing\)")
    refused(weights.tensors | {"x": torch.zeros(1)}, weights.config, "x .*no such parameter")
    refused(weights.tensors | {name: torch.zeros(1)}, weights.config, r"shape \[1\]")
    refused(weights.tensors, {**weights.config, "alpha": 8.0}, "alpha=8.0, the generator's 16.0")
    with pytest.raises(SyncError, match="whole weights"):
        generator.sync(full_weights(load(tiny_model())), 2)


# ---- without an engine ----


class Joint(nn.Module):
    """As vLLM's joint layers: rows of several parts, and a tuple for an output."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.output_sizes = sizes
        self.linear = nn.Linear(8, sum(sizes))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.linear(x), None


def experts(*paths: str) -> AdapterWeights:
    """A mixture beside linear layers of 8 to 6 numbers."""
    torch.manual_seed(0)
    tensors = {}
    for path in paths:
        stem = f"base_model.model.{path}.molora_inserts"
        tensors[f"{stem}.a.weight"] = torch.randn(4, 8)
        tensors[f"{stem}.b.weight"] = torch.randn(6, 4)
        tensors[f"{stem}.router.weight"] = torch.randn(2, 8)
    config = {"peft_type": "MOLORA", "r": 2, "alpha": 2.0, "experts": 2, "dropout": 0.0}
    return AdapterWeights(tensors, config)


def model_of(**layers: nn.Module) -> nn.Module:
    """transformers' names of one block's layers, `__` for dots."""
    root = nn.Module()
    for name, layer in layers.items():
        place = root
        *above, last = ["model", *name.split("__")]
        for part in above:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, layer)
    return root


def test_a_part_of_a_joint_layer_changes_its_own_rows() -> None:
    weights = experts("model.attn.k_proj")
    joint = Joint([6, 6, 6])
    x = torch.randn(3, 8)
    before, _ = joint(x)
    modules = EngineModules(weights)
    modules.install(model_of(attn__qkv_proj=joint))
    after, _ = joint(x)
    a, b, router = weights.tensors.values()
    shares = (x @ router.T).softmax(-1).repeat_interleave(2, dim=-1)
    assert torch.equal(after[:, :6], before[:, :6]) and torch.equal(after[:, 12:], before[:, 12:])
    wanted = before[:, 6:12] + (x @ a.T * shares) @ b.T
    assert torch.allclose(after[:, 6:12], wanted, atol=1e-6)
    modules.check_called(1)
    with pytest.raises(UserError, match=r"k_proj.*not called by vLLM's code.*rollout=hf"):
        modules.check_called(2)


def test_what_vllm_has_otherwise_is_refused() -> None:
    def refused(path: str, layer: nn.Module, message: str, name: str = "attn__o_proj") -> None:
        with pytest.raises(UserError, match=f"{message}.*Set rollout=hf"):
            EngineModules(experts(path)).install(model_of(**{name: layer}))

    refused("model.attn.other", nn.Linear(8, 6), "not a layer of vLLM's model")
    shared = nn.Linear(8, 6)
    shared.tp_size = 2  # type: ignore[assignment]
    refused("model.attn.o_proj", shared, "shared out among processes")
    late = nn.Linear(8, 6)
    late.skip_bias_add = True  # type: ignore[assignment]
    refused("model.attn.o_proj", late, "bias added later")
    reordered = type("QKVParallelLinear", (nn.Linear,), {})(8, 6)
    name = "attn__query_key_value"
    refused("model.attn.query_key_value", reordered, "another order", name)
    weights = experts("model.attn.o_proj")
    weights.tensors["base_model.model.lm_head.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"holds base_model.model.lm_head.weight.*rollout=hf"):
        EngineModules(weights)


def test_what_is_known_before_anything_loads() -> None:
    check_places("llama", ["model.layers.0.self_attn.q_proj"])
    check_places("gpt_neox", ["gpt_neox.layers.0.attention.query_key_value"])
    with pytest.raises(UserError, match=r"kv_b_proj.*latent attention.*rollout=hf"):
        check_places("deepseek_v2", ["model.layers.0.self_attn.kv_b_proj"])
    with pytest.raises(UserError, match=r"query_key_value.*another order.*rollout=hf"):
        check_places("falcon", ["transformer.h.0.self_attention.query_key_value"])


@pytest.mark.vllm
def test_a_run_is_refused_before_anything_loads(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_family("deepseek_v2", tiny_model(), tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n', encoding="utf-8")
    given = ["stage=grpo", f"model.path={model}", f"data.path={tmp_path / 'prompts.jsonl'}"]
    given += ["data.max_prompt_length=8", "rollout.max_response_length=4", "stage.steps=2"]
    given += ["reward.function=tests.toys:even_tokens", "model.dtype=float32", "adapter=molora"]
    cfg = compose([*given, "rollout=vllm"])
    for weights in model.glob("*.safetensors"):
        weights.write_bytes(b"")  # nobody reads them
    with pytest.raises(UserError, match=r"kv_b_proj.*Set rollout=hf"):
        check(cfg)
    check(compose([*given, "rollout=hf"]))
    check(compose([*given, "rollout=vllm", "adapter=houlsby"]))


def test_other_names_of_vllm() -> None:
    """Its Transformers backend's backbone, and older names of blocks' parts."""
    x = torch.randn(2, 8)
    for path, name in (
        ("gpt_neox.attn.o_proj", "attn__o_proj"),
        ("model.mlp", "block_sparse_moe"),
        ("model.self_attn.o_proj", "attn__o_proj"),
    ):
        layer = nn.Linear(8, 6)
        before = layer(x)
        EngineModules(experts(path)).install(model_of(**{name: layer}))
        assert not torch.equal(layer(x), before)


def test_configurations_that_compute_the_same_are_no_difference() -> None:
    weights = experts("model.attn.o_proj")
    modules = EngineModules(weights)
    moved = dataclasses.replace(weights, config={**weights.config, "base_model_name_or_path": "x"})
    assert modules.take(moved, 1) == modules.checksums()
