"""Models under ZeRO-3, loaded whole and parted while they are read: their first figures, and their
weights after a step. `test_parts` starts it.

usage: torchrun ... -m tests.policy.parts_worker FOLDER MODEL:KIND:DTYPE:OFFLOAD ...

MODEL is a directory of the folder; KIND an adapter of a policy, or critic, critic_lora, scorer.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from conf.choices import AdapterKind, Dtype, EngineKind, Offload
from conf.schema import AdapterConfig, EngineConfig, ModelConfig, RewardConfig, facts_of
from policy.adapters import attach
from policy.engines.deepspeed import ensure_process_group, freeze, prepare_cpu
from policy.engines.loading import Loader
from policy.engines.parts import PartsLoader
from policy.engines.torch import make_engine
from policy.model import CriticModule, PolicyModule, whole
from policy.saving import adapter_weights, full_weights
from reward.scorers.reward_model import RewardModelScorer
from rlhf.models.loading import load_causal_lm, load_classifier, load_tokenizer
from rlhf.process import distributed
from rlhf.stages import methods
from rlhf.types import Prompt, Rollout
from tests.policy.test_engine import OPTIM

CPU = torch.device("cpu")
ROWS, LENGTH, PROMPT = 2, 12, 4


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of this rank: ids [B, L], and the positions, ids and mask of their responses [B, T]."""
    generator = torch.Generator().manual_seed(3 + distributed.rank())
    ids = torch.randint(5, 60, (ROWS, LENGTH), generator=generator)
    positions = torch.arange(PROMPT - 1, LENGTH - 1).expand(ROWS, -1)
    return ids, positions, ids[:, PROMPT:], torch.ones(ROWS, LENGTH - PROMPT, dtype=torch.bool)


def held(model: Any) -> dict[str, Tensor]:
    """Elements that this rank holds of a model that was loaded, and those that it has."""
    params = list(model.parameters())
    own = sum(param.numel() for param in params)
    own += sum(param.ds_tensor.numel() for param in params if hasattr(param, "ds_tensor"))
    total = sum(getattr(param, "ds_numel", param.numel()) for param in params)
    return {"held": torch.tensor(own), "total": torch.tensor(total)}


def train(
    module: Any,
    cfg: EngineConfig,
    dtype: torch.dtype,
    run: Callable[[Any], Tensor],
    *,
    merges: bool = True,
) -> dict[str, Tensor]:
    """The first figures of `module`, and its weights after a step, or those of an adapter that no
    weights can hold.
    """
    engine = make_engine(module, cfg, OPTIM, CPU, half=dtype is torch.bfloat16)
    figures = run(engine)
    engine.backward(figures.sum(), last=True)
    norm = engine.step()
    read: Any = full_weights if merges else adapter_weights
    tensors = dict(read(module.model, engine.gather).tensors)
    found = {f"weights.{name}": tensor.clone() for name, tensor in tensors.items()}
    return found | {"figures": figures.detach().clone(), "norm": torch.tensor(norm)}


def policy(
    source: ModelConfig, tokenizer: Any, kind: str, loader: Loader, cfg: EngineConfig
) -> dict[str, Tensor]:
    """Of a policy and of its reference."""
    sizes: dict[str, Any] = {} if kind == "bottleneck" else {"rank": 4}
    adapter = AdapterConfig(kind=AdapterKind(kind), **sizes)
    dtype = getattr(torch, source.dtype.value)
    model = loader.load(lambda: load_causal_lm(source, tokenizer))
    found = held(model)
    model = loader.adapt(model, lambda base: attach(base, adapter, task="CAUSAL_LM"))
    reference = PolicyModule(loader.load(lambda: load_causal_lm(source, tokenizer)), chunk=5)
    frozen = freeze(reference, cfg, CPU, half=dtype is torch.bfloat16)
    with torch.no_grad():
        found["reference"] = frozen(*batch())[0].clone()
    module = PolicyModule(model, chunk=5)
    own = facts_of(adapter).merges
    return found | train(module, cfg, dtype, lambda engine: engine(*batch())[0], merges=own)


def critic(
    source: ModelConfig, tokenizer: Any, kind: str, loader: Loader, cfg: EngineConfig
) -> dict[str, Tensor]:
    """Of a critic whose head starts at 1/8."""
    lora = AdapterConfig(kind=AdapterKind.lora, rank=4)
    adapter = lora if kind == "critic_lora" else AdapterConfig()
    model = loader.load(lambda: load_classifier(source, tokenizer))
    found = held(model)
    with whole([model.score.weight], changed=True):
        torch.nn.init.constant_(model.score.weight, 0.125)
    model = loader.adapt(model, lambda base: attach(base, adapter, task="SEQ_CLS"))
    dtype = getattr(torch, source.dtype.value)
    return found | train(CriticModule(model), cfg, dtype, lambda engine: engine(*batch()[:2]))


def scores(source: ModelConfig, tokenizer: Any, loader: Loader) -> dict[str, Tensor]:
    """Of rows that rank 0 alone has."""
    assert source.path is not None
    scorer = RewardModelScorer(
        source.path,
        RewardConfig(batch_tokens=16),
        CPU,
        policy_tokenizer=tokenizer,
        dtype=getattr(torch, source.dtype.value),
        holder=loader if isinstance(loader, PartsLoader) else None,
    )
    rollouts = []
    if distributed.is_main():
        prompt = Prompt(id="p", text="", token_ids=(7, 9, 11))
        for length in (3, 9, 5):
            ids = list(range(20, 20 + length))
            rollouts.append(Rollout(prompt, "", ids, [0.0] * length, "length", 0))
    return {"scores": torch.tensor(scorer.score(rollouts).total)}


def run(folder: Path, case: str, mode: str) -> None:
    """One case into FOLDER/mode-case-rank.safetensors."""
    name, kind, dtype, offload = case.split(":")
    cfg = EngineConfig(
        kind=EngineKind.deepspeed, zero_stage=3, offload=Offload(offload), nvme_path=str(folder)
    )
    source = ModelConfig(path=str(folder / name), dtype=Dtype(dtype))
    tokenizer = load_tokenizer(source)
    loader = PartsLoader(cfg, getattr(torch, dtype)) if mode == "parts" else Loader()
    torch.manual_seed(11)
    if kind == "scorer":
        found = scores(source, tokenizer, loader)
    elif kind.startswith("critic"):
        found = critic(source, tokenizer, kind, loader, cfg)
    else:
        found = policy(source, tokenizer, kind, loader, cfg)
    file = folder / f"{mode}-{case.replace(':', '-')}-{distributed.rank()}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, str(file))


def main() -> None:
    methods.register()
    distributed.initialise()
    distributed.set_threads(1)
    prepare_cpu()
    ensure_process_group()
    folder, *cases = sys.argv[1:]
    for case in cases:
        for mode in ("whole", "parts"):
            run(Path(folder), case, mode)
    distributed.shutdown()


if __name__ == "__main__":
    main()
