"""What we use of vLLM beside its public interface does what we need, and is still there. When
this fails after an upgrade of vLLM, repair rollout/vllm_private.py, or for what runs in a server
rollout/server/extension.py: nothing else depends on it.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.vllm_private import Streamed, kept_apart, multiply_one_adapter_at_once


def missing(source: Any, *names: str) -> list[str]:
    """Those `names` that the source of a class or module no longer has."""
    text = inspect.getsource(source)
    return [f"{source.__name__}: {name}" for name in names if name not in text]


@pytest.mark.vllm
def test_vllm_still_has_the_private_parts() -> None:
    from vllm.distributed.weight_transfer import base, factory
    from vllm.lora import model_manager
    from vllm.lora.layers import base_linear
    from vllm.lora.punica_wrapper import punica_cpu
    from vllm.model_executor import custom_op
    from vllm.model_executor.layers import mla
    from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
    from vllm.model_executor.models import gpt_oss
    from vllm.model_executor.models.transformers import base as transformers_backend
    from vllm.v1.engine import core, core_client
    from vllm.v1.worker import gpu_worker

    wrapper = punica_cpu.PunicaWrapperCPU
    gone = [
        *missing(transformers_backend, "support_torch_compile("),
        *missing(wrapper, "self.token_lora_indices"),
        *missing(base_linear, "self.lora_a_stacked = ", "self.lora_b_stacked = "),
        *missing(unquantized_fused_moe_method, "self.moe_kernel", ".process_weights_after_loading"),
        *missing(gpt_oss.GptOssModel, "_try_load_streamed_expert(", '"sinks" in name'),
        *missing(mla.MultiHeadLatentAttentionWrapper, "self.mla_attn = ", "self.rotary_emb("),
        *missing(custom_op.CustomOp, "self._forward_method = "),
        *missing(core_client.InprocClient, "self._finalizer", "self.engine_core = "),
        *missing(core.EngineCore, "self.model_executor = ", "self.scheduler"),
        *missing(factory.WeightTransferEngineFactory, "def register_engine("),
        *missing(base.WeightTransferEngine, "self.receive_weights(", "self.model = model"),
        *missing(gpu_worker.Worker, "self.weight_transfer_engine.update_weights("),
        *missing(gpu_worker.Worker, "self.model_runner.execute_model("),
        *missing(model_manager.LoRAModelManager, "self.lora_index_to_id"),
    ]
    assert not gone, f"vLLM no longer has {gone}: repair what uses it"
    linear = [*inspect.signature(wrapper.add_lora_linear).parameters][:7]
    assert linear[1:] == ["y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices"]
    logits = [*inspect.signature(wrapper.add_lora_logits).parameters][:6]
    assert logits[1:] == ["y", "x", "lora_a_stacked", "lora_b_stacked", "scale"]
    assert hasattr(wrapper, "sampler_indices")


def gpt_oss_weights() -> dict[str, torch.Tensor]:
    return {
        "model.layers.0.self_attn.sinks": torch.arange(2.0),
        "model.layers.0.mlp.experts.gate_up_proj": torch.arange(12.0).view(3, 2, 2),
        "model.layers.0.mlp.experts.down_proj_bias": torch.arange(6.0).view(3, 2),
        "model.layers.0.mlp.router.weight": torch.ones(3, 2),
    }


def test_joined_experts_stream_into_gpt_oss_one_by_one() -> None:
    weights = gpt_oss_weights()
    sent = dict(Streamed(weights.items(), "gpt_oss"))
    prefix = "model.layers.0.mlp.experts"
    for number in range(3):
        for name in ("gate_up_proj", "down_proj_bias"):
            one = sent.pop(f"{prefix}.{number}.{name}")
            assert torch.equal(one, weights[f"{prefix}.{name}"][number])
    assert list(sent) == ["model.layers.0.self_attn.sinks", "model.layers.0.mlp.router.weight"]
    assert list(Streamed(weights.items(), "llama4")) == list(weights.items())


def test_sinks_are_written_after_the_reload() -> None:
    weights = gpt_oss_weights()
    streamed = Streamed(weights.items(), "gpt_oss")
    for _, tensor in streamed:
        tensor.zero_()  # as a gathered tensor may be, once the next one comes
    layer = torch.nn.Module()
    layer.attn = torch.nn.Module()
    layer.attn.sinks = torch.nn.Parameter(torch.full((2,), 7.0))
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = torch.nn.ModuleList([layer])
    streamed.put_sinks(model)
    assert layer.attn.sinks.tolist() == [0.0, 1.0]


class Base(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kind = "plain"


class Added:
    """What a decorator mixes in."""

    wraps = True


def decorator(**options: str) -> Callable[[type], type]:
    """As vLLM's: it changes the class in place, and instances of before lack what it needs."""

    def decorate(cls: type) -> type:
        if Added in cls.__bases__:
            return cls
        plain = cls.__init__  # type: ignore[misc]
        cls.__bases__ = (*cls.__bases__, Added)

        def init(self: Any) -> None:
            plain(self)
            self.kind = options["kind"]

        cls.__init__ = init  # type: ignore[misc]
        cls.extra = options["kind"]  # type: ignore[attr-defined]
        return cls

    return decorate


def test_a_decorated_class_is_given_back() -> None:
    before, bases = dict(vars(Base)), Base.__bases__
    backend = SimpleNamespace(support_torch_compile=decorator)
    with kept_apart(backend) as kept:
        for _ in range(2):
            backend.support_torch_compile(kind="engine")(Base)
        engine: Any = torch.nn.Sequential(Base())
    kept.claim(engine)
    assert backend.support_torch_compile is decorator
    assert dict(vars(Base)) == before and Base.__bases__ == bases
    assert Base().kind == "plain" and not isinstance(Base(), Added)
    inner = engine[0]
    assert isinstance(inner, Base) and inner.wraps and inner.extra == inner.kind == "engine"
    assert type(type(inner)()).__mro__ == type(inner).__mro__ and type(inner)().kind == "engine"


@pytest.mark.vllm
@pytest.mark.parametrize("adapters", [[1, 1, 1, 1], [0, 1, 1, 0]])
def test_one_adapter_at_once_gives_what_an_adapter_per_token_gives(
    adapters: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of one adapter is multiplied as a whole; a mixed one goes vLLM's way. Both against
    float64.
    """
    from vllm.lora.punica_wrapper import punica_cpu

    multiply_one_adapter_at_once(punica_cpu.PunicaWrapperCPU)
    gathered: list[int] = []
    shrink = punica_cpu.bgmv_shrink
    monkeypatch.setattr(
        punica_cpu, "bgmv_shrink", lambda *args: (gathered.append(1), shrink(*args))
    )
    generator = torch.Generator().manual_seed(0)
    tokens, width, rank, sizes, scale = len(adapters), 6, 3, (4, 5), 0.5
    x, y = (
        torch.randn(tokens, width, generator=generator),
        torch.randn(tokens, sum(sizes), generator=generator),
    )
    a = tuple(torch.randn(2, 1, rank, width, generator=generator) for _ in sizes)
    b = tuple(torch.randn(2, 1, size, rank, generator=generator) for size in sizes)
    expected = y.double()
    for token, slot in enumerate(adapters):
        update = [
            b_.double()[slot, 0] @ (a_.double()[slot, 0] @ x[token].double())
            for a_, b_ in zip(a, b, strict=True)
        ]
        expected[token] += scale * torch.cat(update)
    wrapper = object.__new__(punica_cpu.PunicaWrapperCPU)
    wrapper._token_lora_indices = wrapper._sampler_indices = torch.tensor(adapters)
    wrapper.indices_len, wrapper.is_prefill, wrapper.no_lora = [tokens] * 5, False, False
    found = y.clone()
    wrapper.add_lora_linear(found, x, a, b, scale, sizes)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    mixed = len(set(adapters)) > 1
    assert bool(gathered) is mixed
    found = y[:, : sizes[0]].clone()
    wrapper.add_lora_logits(found, x, a[0], b[0], scale)
    torch.testing.assert_close(found.double(), expected[:, : sizes[0]], rtol=1e-5, atol=1e-5)
