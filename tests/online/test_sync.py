"""Weight sync and its proof, on both backends: whole weights (tied or not), merged and applied
adapters, and what goes wrong.
"""

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import rollout
from conf.choices import AdapterKind, RolloutBackend
from conf.schema import AdapterConfig, Config, DataConfig, RolloutConfig
from conf.stages import OnlineStage
from policy.adapters import attach, method_of
from policy.model import no_gather
from policy.saving import adapter_weights, full_weights
from rlhf.online.sync import Calibration, Probe, Proof, verify_sync
from rlhf.types import AdapterWeights, FullWeights, Prompt, SyncError, UserError
from rollout.hf import HFGenerator
from rollout.sampling import Sampling
from rollout.weights import SAMPLED, Incoming, Spec, checksum, readable_checksums, specs_of

BACKENDS = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]
PROBE = tuple(range(40, 84))
# longer than a KV block, so that its first tokens are cached
PROMPT = Prompt(id="p", text="", token_ids=PROBE[:40])
TOLERANCE = 1e-5
LORA = AdapterConfig(kind=AdapterKind.lora, rank=4, alpha=16.0, rslora=True)
PACKED = "model.layers.1.mlp.down_proj.weight"  # vLLM packs it on a CPU: the probe has to see it
PLAIN = "model.embed_tokens.weight"


def load(directory: Path, adapter: AdapterConfig | None = None) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model if adapter is None else attach(model, adapter, task="CAUSAL_LM")


def train(model: Any, seed: int) -> Any:
    """As a step of training would: every trained weight moves a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.add_(0.02 * torch.randn(param.shape, generator=generator))
    return model


@torch.no_grad()
def logprobs_of(model: Any, ids: Sequence[int] = PROBE) -> list[float]:
    log_p = model.eval()(torch.tensor([list(ids)])).logits[0, :-1].log_softmax(-1)
    return log_p.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()


Start = Callable[..., Any]


def hf_generator(directory: Path, adapter: AdapterConfig) -> HFGenerator:
    return HFGenerator(
        lambda: load(directory, adapter),
        AutoTokenizer.from_pretrained(directory),
        Sampling(10),
        max_tokens=64,
        max_num_seqs=4,
        device=torch.device("cpu"),
    )


@pytest.fixture(scope="module")
def start(tiny_model: Callable[..., Path]) -> Iterator[Start]:
    """start(backend, tied=..., adapter=...) -> a generator, started once per module."""
    made: dict[tuple[object, ...], Any] = {}

    def get(backend: str, *, tied: bool = True, adapter: AdapterConfig | None = None) -> Any:
        key = (backend, tied, adapter is not None)
        if key not in made:
            directory = tiny_model(tied=tied)
            settings = RolloutConfig(
                backend=RolloutBackend(backend),
                max_response_length=10,
                kv_cache_gib=0.05,
                max_num_seqs=16,
            )
            cfg = Config(
                stage=OnlineStage(),
                rollout=settings,
                data=DataConfig(max_prompt_length=48),
                adapter=adapter or AdapterConfig(),
            )
            made[key] = rollout.make_generator(
                cfg,
                model_path=str(directory),
                tokenizer=AutoTokenizer.from_pretrained(directory),
                model_factory=lambda: load(directory, adapter),
                adapter_rank=adapter.rank if adapter else None,
            )
        return made[key]

    yield get
    for generator in reversed(made.values()):
        generator.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_whole_weights_arrive(
    backend: str, tied: bool, start: Start, tiny_model: Callable[..., Path]
) -> None:
    generator, model = start(backend, tied=tied), load(tiny_model(tied=tied))
    for version in (3, 4):
        before = generator.logprobs(PROBE)
        train(model, seed=version)
        generator.sync(full_weights(model), version)
        assert verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, version) < TOLERANCE
        assert (
            max(abs(a - b) for a, b in zip(before, generator.logprobs(PROBE), strict=True)) > 1e-2
        ), "the weights had moved"
        assert generator.version == version
        # the second time, its prefix was cached with the weights of before
        (written,) = generator.generate([PROMPT], seed=0)
        expected = logprobs_of(model, [*PROMPT.token_ids, *written.token_ids])[
            len(PROMPT.token_ids) - 1 :
        ]
        assert written.rollout_logprobs == pytest.approx(expected, abs=TOLERANCE)
        assert written.version == version


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_trainers_weights_are_left_alone(
    backend: str, start: Start, tiny_model: Callable[..., Path]
) -> None:
    """In the same process the generator must copy: training on must not show in it, and loading
    must not change the trainer.
    """
    generator, model = start(backend), train(load(tiny_model()), seed=1)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator.sync(full_weights(model), 1)
    assert all(torch.equal(original[name], tensor) for name, tensor in model.state_dict().items())
    before = generator.logprobs(PROBE)
    train(model, seed=2)
    assert generator.logprobs(PROBE) == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_arrives_twice(
    backend: str, start: Start, tiny_model: Callable[..., Path]
) -> None:
    generator, model = start(backend, adapter=LORA), load(tiny_model(), LORA)
    for version in (1, 2):
        before = generator.logprobs(PROBE)
        train(model, seed=version)
        generator.sync(adapter_weights(model), version)
        assert verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, version) < TOLERANCE
        assert (
            max(abs(a - b) for a, b in zip(before, generator.logprobs(PROBE), strict=True)) > 1e-2
        )
        (written,) = generator.generate([PROMPT], seed=0)
        expected = logprobs_of(model, [*PROMPT.token_ids, *written.token_ids])[
            len(PROMPT.token_ids) - 1 :
        ]
        assert written.rollout_logprobs == pytest.approx(expected, abs=TOLERANCE)


# of rank 4, as LORA, whose engine they share: RaSA's own 3 - 1 bases and 1 of each of two layers
AS_LORA = {
    "rasa": AdapterConfig(kind=AdapterKind.rasa, rank=3, alpha=16.0),
    "lora_mini": AdapterConfig(kind=AdapterKind.lora_mini, rank=4, alpha=16.0),
}


@pytest.mark.vllm
@pytest.mark.parametrize("name", AS_LORA)
def test_another_method_arrives_as_the_lora_with_its_update(
    name: str, start: Start, tiny_model: Callable[..., Path]
) -> None:
    adapter = AS_LORA[name]
    generator, model = start("vllm", adapter=LORA), load(tiny_model(), adapter)
    as_lora = method_of(adapter).as_lora
    assert as_lora is not None
    for version in (5, 6):
        before = generator.logprobs(PROBE)
        train(model, seed=version)
        generator.sync(as_lora(model, no_gather), version)
        assert verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, version) < TOLERANCE
        moved = [abs(a - b) for a, b in zip(before, generator.logprobs(PROBE), strict=True)]
        assert max(moved) > 1e-3
        (written,) = generator.generate([PROMPT], seed=0)
        expected = logprobs_of(model, [*PROMPT.token_ids, *written.token_ids])[
            len(PROMPT.token_ids) - 1 :
        ]
        assert written.rollout_logprobs == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("name", AS_LORA)
def test_another_method_arrives_in_transformers_as_it_is(
    name: str, tiny_model: Callable[..., Path]
) -> None:
    adapter = AS_LORA[name]
    generator, model = hf_generator(tiny_model(), adapter), load(tiny_model(), adapter)
    generator.sync(adapter_weights(train(model, seed=7)), 7)
    assert verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 7) < TOLERANCE
    other = load(tiny_model(), replace(adapter, alpha=8.0))
    with pytest.raises(SyncError, match=r"alpha=8\.0, the generator's 16\.0"):
        generator.sync(adapter_weights(other), 8)


@pytest.mark.vllm
@pytest.mark.parametrize("half", ["lora_a_stacked", "lora_b_stacked"])
def test_an_adapter_changed_in_the_engine_is_named(
    half: str, start: Start, tiny_model: Callable[..., Path]
) -> None:
    """One element of what the joint layer of q, k and v holds of v's adapter."""
    generator, model = start("vllm", adapter=LORA), load(tiny_model(), LORA)
    generator.sync(adapter_weights(train(model, seed=4)), 3)
    verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 3)
    assert set(generator.checksums()) == set(generator.sent) == set(adapter_weights(model).tensors)

    def change(engine: nn.Module) -> None:
        layer: Any = dict(engine.named_modules())["model.layers.1.self_attn.qkv_proj"]
        getattr(layer, half)[2][0, 0, 1, 2] += 1e-6

    generator.llm.apply_model(change)
    name = f"v_proj.lora_{half[5].upper()}.weight"
    with pytest.raises(SyncError, match=rf"weight sync 3: .*layers\.1\.self_attn\.{name}\.$"):
        verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 3)
    generator.sync(adapter_weights(model), 4)
    verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_merged_adapter_arrives_as_whole_weights(
    backend: str, dora: bool, start: Start, tiny_model: Callable[..., Path]
) -> None:
    generator = start(backend)
    model = train(
        load(tiny_model(), AdapterConfig(kind=AdapterKind.lora, rank=4, dora=dora)), seed=1
    )
    generator.sync(full_weights(model), 1)
    assert verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 1) < TOLERANCE


def corrupted(weights: FullWeights, name: str) -> FullWeights:
    """One element of one tensor moves on the way."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for found, tensor in weights.tensors:
            sent = tensor.clone()
            if found == name:
                sent.view(-1)[7] += 0.5
            yield found, sent

    return FullWeights(tensors())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_corrupted_on_the_way_is_caught_by_the_probe(
    backend: str, start: Start, tiny_model: Callable[..., Path]
) -> None:
    generator, model = start(backend), load(tiny_model())
    generator.sync(corrupted(full_weights(model), PACKED), 5)
    with pytest.raises(
        SyncError,
        match=r"weight sync 5: at position \d+ of the probe \(token \d+\).* a gap of .* nats, "
        r"above 1e-05",
    ):
        verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 5)
    generator.sync(full_weights(model), 6)
    verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 6)


def corrupt_held(generator: Any, name: str) -> None:
    """Change the generator's own copy of a tensor, at a row that the probe never reads."""

    def change(model: nn.Module) -> None:
        with torch.no_grad():
            dict(model.named_parameters())[name][3, 5] += 1e-3

    if hasattr(generator, "llm"):
        generator.llm.apply_model(change)
    else:
        change(generator.model)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_corrupted_in_the_generator_is_named(
    backend: str, start: Start, tiny_model: Callable[..., Path]
) -> None:
    generator, model = start(backend, tied=False), load(tiny_model(tied=False))
    generator.sync(full_weights(model), 7)
    verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 7)
    corrupt_held(generator, PLAIN)
    with pytest.raises(
        SyncError,
        match=rf"weight sync 7: .* {PLAIN}\.",
    ):
        verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 7)


@pytest.mark.vllm
def test_what_vllm_lets_read(start: Start, tiny_model: Callable[..., Path]) -> None:
    """Embeddings, norms and the head are compared by checksum; linear layers too where the engine
    keeps them plain, else by some of their columns.
    """
    generator, model = start("vllm", tied=False), load(tiny_model(tied=False))
    generator.sync(full_weights(model), 8)
    plain = {
        name for name in model.state_dict() if "norm" in name or name in (PLAIN, "lm_head.weight")
    }
    readable = set(generator.checksums())
    assert plain <= readable
    for name in set(model.state_dict()) - plain:
        assert name in readable or name + SAMPLED in readable
    # from the second sync on only what can be compared is hashed
    generator.sync(full_weights(model), 9)
    assert set(generator.sent) == readable


@pytest.mark.parametrize("backend", BACKENDS)
def test_incomplete_or_foreign_weights_are_named(
    backend: str, start: Start, tiny_model: Callable[..., Path]
) -> None:
    generator, model = start(backend), load(tiny_model())
    generator.sync(full_weights(model), 9)
    state = dict(full_weights(model).tensors)
    consumed = []

    def sending(tensors: dict[str, Tensor]) -> FullWeights:
        consumed.clear()
        return FullWeights(
            (consumed.append(name) or name, tensor) for name, tensor in tensors.items()
        )  # type: ignore[func-returns-value]

    wrong = {
        "lm_head.weight (missing)": {n: t for n, t in state.items() if n != "lm_head.weight"},
        f"{PACKED} (missing)": {n: t for n, t in state.items() if n != PACKED},
        "model.layers.9.foo (the generator's model has no such parameter)": {
            "model.layers.9.foo": torch.ones(1),
            **state,
        },
        f"{PACKED} (shape [64, 95], expected [64, 96])": {
            n: t[:, 1:] if n == PACKED else t for n, t in state.items()
        },
    }
    for message, tensors in wrong.items():
        with pytest.raises(SyncError) as error:
            generator.sync(sending(tensors), 10)
        assert message in str(error.value) and "weight sync 10" in str(error.value)
        assert consumed == list(tensors), "every rank has to consume the whole iterator"
        assert generator.version == 9
    generator.sync(full_weights(model), 11)
    verify_sync(generator, PROBE, logprobs_of(model), TOLERANCE, 11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_is_no_whole_weights(
    backend: str, start: Start, tiny_model: Callable[..., Path]
) -> None:
    plain, adapted = load(tiny_model()), train(load(tiny_model(), LORA), seed=1)
    with pytest.raises(SyncError, match="whole weights"):
        start(backend, adapter=LORA).sync(full_weights(plain), 12)
    with pytest.raises(SyncError, match="sent an adapter"):
        start(backend).sync(adapter_weights(adapted), 12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_an_adapter_is_named(
    backend: str, start: Start, tiny_model: Callable[..., Path]
) -> None:
    generator, model = start(backend, adapter=LORA), train(load(tiny_model(), LORA), seed=1)
    weights = adapter_weights(model)
    generator.sync(weights, 13)
    name = next(n for n in weights.tensors if n.endswith("q_proj.lora_B.weight"))
    with pytest.raises(SyncError, match=rf"{name}.*missing"):
        generator.sync(
            AdapterWeights({n: t for n, t in weights.tensors.items() if n != name}, weights.config),
            14,
        )
    assert generator.version == 13


def test_another_scale_of_the_adapter_is_refused(
    start: Start, tiny_model: Callable[..., Path]
) -> None:
    weights = adapter_weights(load(tiny_model(), LORA))
    with pytest.raises(SyncError, match=r"lora_alpha=32, the generator's 16"):
        start("hf", adapter=LORA).sync(
            AdapterWeights(weights.tensors, {**weights.config, "lora_alpha": 32}), 15
        )


class Fake:
    """A generator with given logprobs."""

    version = 2

    def __init__(self, logprobs: list[float]) -> None:
        self.given = logprobs

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return self.given


def test_verify_names_the_place_of_the_largest_gap() -> None:
    generator: Any = Fake([-1.0, -2.0, -3.0])
    assert verify_sync(generator, [5, 6, 7, 8], [-1.0, -2.0, -3.00005], 1e-4, 2) == pytest.approx(
        5e-5
    )
    with pytest.raises(
        SyncError,
        match=r"weight sync 2: at position 2 of the probe \(token "
        r"7\).*-2\.000000.*-2\.500000.*5\.00e-01 nats",
    ):
        verify_sync(generator, [5, 6, 7, 8], [-1.0, -2.5, -3.00005], 1e-4, 2)
    with pytest.raises(SyncError, match=r"position 3 of the probe \(token 8\).*nan"):
        verify_sync(generator, [5, 6, 7, 8], [-1.0, -2.5, math.nan], 1e-4, 2)
    with pytest.raises(SyncError, match="still holds version 2"):
        verify_sync(generator, [5, 6, 7, 8], [-1.0, -2.0, -3.0], 1e-4, 3)
    with pytest.raises(ValueError, match="4 tokens has 3 logprobs, got 2"):
        verify_sync(generator, [5, 6, 7, 8], [-1.0, -2.0], 1e-4, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_sees_every_element_and_the_order(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    sums = {checksum(tensor), checksum(tensor.flip(0)), checksum(tensor.roll(1))}
    for place in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[place] = other.view(-1)[place] * 1.01
        sums.add(checksum(other))
    assert len(sums) == 18
    assert checksum(tensor.t().contiguous().t()) == checksum(tensor), "strides are no content"


def test_checksum_by_hand_and_over_blocks() -> None:
    assert checksum(torch.tensor([1, 2, 3], dtype=torch.int32)) == f"{1 * 1 + 3 * 2 + 5 * 3:016x}"
    assert checksum(torch.tensor([-1], dtype=torch.int16)) == "f" * 16
    ones = (1 << 20) + 3  # the sum of the first n odd numbers is n^2
    assert checksum(torch.ones(ones, dtype=torch.int8)) == f"{ones**2:016x}"


class Attention(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.qkv_proj = nn.Linear(4, rows)


def test_slices_of_joined_rows_are_read() -> None:
    """As vLLM joins them on a GPU: six rows of q, then two of k, then two of v."""
    model, packed = nn.ModuleDict({"a": Attention(10)}), nn.ModuleDict({"a": Attention(0)})
    parts = dict(zip(("q", "k", "v"), model["a"].qkv_proj.weight.split([6, 2, 2]), strict=True))
    specs = {
        f"a.{name}_proj.weight": Spec(tuple(part.shape), part.dtype) for name, part in parts.items()
    }
    assert readable_checksums(model, specs) == {
        f"a.{name}_proj.weight": checksum(part) for name, part in parts.items()
    }
    assert readable_checksums(packed, specs) == {}


def test_incoming_refuses_a_tensor_sent_twice() -> None:
    incoming = Incoming(
        [("a", torch.ones(1)), ("a", torch.zeros(1))], specs_of({"a": torch.ones(1)})
    )
    assert [name for name, _ in incoming] == ["a"]
    with pytest.raises(SyncError, match=r"a \(sent twice\)"):
        incoming.finish(1)


def test_a_reader_that_stops_early_leaves_no_rank_waiting() -> None:
    """`finish` takes the rest of the iterator, which is a collective per tensor, and says what the
    reader never got to see.
    """
    tensors = {name: torch.ones(1) for name in "abc"}
    left = iter(tensors.items())
    incoming = Incoming(left, specs_of(tensors | {"d": torch.ones(1)}))
    assert next(iter(incoming))[0] == "a"
    with pytest.raises(SyncError, match=r": d \(missing\)\.$"):
        incoming.finish(1)
    assert list(left) == []


@pytest.mark.vllm
def test_lora_ranks_of_the_engine() -> None:
    from rollout.vllm_private import engine_lora_rank

    assert [engine_lora_rank(rank, None) for rank in (1, 2, 8, 9, 32)] == [1, 8, 8, 16, 32]
    assert engine_lora_rank(4, 32) == 32
    with pytest.raises(UserError, match=r"adapter.rank=513.*512\).*rollout.lora_sync=merged"):
        engine_lora_rank(513, None)
    for wished in (4, 12):
        with pytest.raises(
            UserError, match=rf"rollout.max_lora_rank={wished}: with adapter.rank=8 .* 8, 16, 32"
        ):
            engine_lora_rank(8, wished)


@pytest.mark.full  # two processes that each import vLLM: a minute
@pytest.mark.vllm
@pytest.mark.distributed
def test_engines_of_two_ranks_leave_the_process_group_alone(
    tiny_model: Callable[..., Path],
) -> None:
    """Starting an engine must not change what our ranks read from the environment, nor closing it
    end the trainer's process group.
    """
    worker = Path(__file__).with_name("vllm_ranks_worker.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(worker),
        str(tiny_model()),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parents[2])}
    env.pop("LD_PRELOAD", None)
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=env, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    assert done.returncode == 0 and len(lines) == 1, done.stdout[-2000:] + done.stderr[-4000:]
    assert json.loads(lines[0].removeprefix("SEEN ")) == {
        "ranks": 2,
        "local_world_size": "2",
        "preloaded": None,
        "responses": [1, 4],
        "same_logprobs": True,
        "sum_after_close": 3.0,
    }


def test_servers_compute_the_probe_while_the_trainer_does() -> None:
    """Each side waits until the other has begun."""
    begun = {"servers": threading.Event(), "trainer": threading.Event()}

    class Servers:
        version = 1

        def logprobs_of_each(self, token_ids: Sequence[int]) -> list[list[float]]:
            begun["servers"].set()
            assert begun["trainer"].wait(10)
            return [[-1.0] * (len(token_ids) - 1)] * 2

        def logprobs(self, token_ids: Sequence[int]) -> list[float]:
            raise AssertionError("each server is asked")

    def trainer() -> list[float]:
        begun["trainer"].set()
        assert begun["servers"].wait(10)
        return [-1.0, -1.5]

    proof = Proof((Probe((5, 6, 7)),), 0.6, Calibration(2.0))
    proof.check(Servers(), None, trainer, 1)  # type: ignore[arg-type]
    assert proof.figures == {"rollout/probe_gap": 0.5}
    proof = Proof((Probe((5, 6, 7)),), 0.4, Calibration(2.0))
    with pytest.raises(SyncError, match="position 2"):
        proof.check(Servers(), None, trainer, 1)  # type: ignore[arg-type]
    with pytest.raises(SyncError, match="version 1"):
        proof.check(Servers(), None, trainer, 2)  # type: ignore[arg-type]
