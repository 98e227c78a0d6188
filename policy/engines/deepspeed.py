"""DeepSpeed: the only file that imports it, lazily, so that engine=torch never pays for it."""

import logging
import math
import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.choices import EngineKind, Offload
from conf.schedule import AdamKernels
from conf.schema import EngineConfig
from policy.engines.base import NonFinite, OptimSettings
from policy.engines.loading import Rates, WaitingAdamW, one_rate, set_rates, zero_config
from policy.engines.resharding import reading
from policy.model import trainable
from rlhf.process import distributed
from rlhf.process.libraries import first_line
from rlhf.types import UserError

log = logging.getLogger(__name__)
# DeepSpeed's extensions by what they are for, and the names of their builders
_BUILDERS = {
    "cpu_adam": "CPUAdamBuilder",
    "fused_adam": "FusedAdamBuilder",
    "async_io": "AsyncIOBuilder",
}


def prepare_cpu() -> None:
    """Make DeepSpeed usable on ranks without a GPU; call it before anything else touches DeepSpeed.
    Does nothing where CUDA is.

    DeepSpeed would otherwise guess its accelerator from the installed packages, and
    `init_distributed` would compile a shared-memory collective for a minute or two that gloo does
    not need.
    """
    if torch.cuda.is_available():
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def ensure_process_group() -> None:
    """Join the launcher's process group, or, without a launcher, make a group of this process
    alone: DeepSpeed wants one at one rank too.
    """
    distributed.initialise()
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        # DeepSpeed insists on what a launcher would have set
        os.environ.setdefault("LOCAL_RANK", "0")


class DeepSpeedEngine:
    """One module under ZeRO 0-3 (Rajbhandari et al. 2020), with the methods of
    `policy.engines.torch.TorchEngine`.

    Micro-batches are counted by the caller, since a token budget makes their number vary:
    DeepSpeed's own accumulation is set to 1 and its boundary by hand. DeepSpeed averages gradients
    over ranks, so losses (already divided by the count over all ranks) are multiplied by the number
    of ranks.
    """

    def __init__(
        self,
        module: nn.Module,
        cfg: EngineConfig,
        optim: OptimSettings,
        device: torch.device,
        *,
        half: bool,
        rates: Rates | None = None,
    ) -> None:
        """half: the weights are bfloat16; rates: as `TorchEngine`'s."""
        prepare_cpu()
        ensure_process_group()
        import deepspeed

        self.cfg = cfg
        self.optim = optim
        self.steps = 0
        self.scale = 1.0  # of the learning rate; the loop's, which sets it for each step
        self._waiting = False  # whether a gradient waits for its step
        _same_head_calls(module, cfg)
        self.rates = rates or one_rate(module)
        kind = adam_kind(cfg, waits=self.rates.unfreezings > 0)
        if self.rates.unfreezings:
            self.rates.silence(lambda: self.rates.phase(self.steps))
        optimizer = kind(
            [{"params": group.params} for group in self.rates.groups],
            lr=optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        self.engine, *_ = deepspeed.initialize(
            model=module.to(device),
            model_parameters=self.rates.params,
            optimizer=optimizer,
            config=zero_config(
                cfg, hidden_size=_hidden_size(module), half=half, max_grad_norm=optim.max_grad_norm
            ),
        )
        self.module = module

    def __call__(self, *args: Tensor, **named: Any) -> Any:
        return self.engine(*args, **named)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the loss's gradient; `last` marks the last micro-batch before `step`. Collective
        under ZeRO.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)
        self._waiting = last

    def clip(self) -> float | None:
        """None: DeepSpeed clips inside its step, and tells the norm after it."""
        return None

    def discard(self) -> None:
        """Forget the gradient. DeepSpeed holds it in buffers that only a step empties, so one is
        taken: `load` has to follow. Collective.
        """
        if self._waiting:
            self.engine.step()
            self._waiting = False

    def step(self) -> float:
        """One optimizer step on all ranks. Returns the gradient's norm over all ranks before
        clipping.

        Raises NonFinite after the step: DeepSpeed tells the norm no sooner.
        """
        groups = self.engine.optimizer.param_groups
        factors = self.rates.factors(self.rates.phase(self.steps))
        set_rates(groups, [self.rate] * len(groups), factors)
        norm = None
        # plain data parallelism: gradients are whole and averaged by now, and DeepSpeed records no
        # norm
        if self.cfg.zero_stage == 0:
            gradients = [p.grad for p in trainable(self.module) if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
        self._waiting = False
        self.engine.step()
        self.steps += 1
        if norm is None:
            norm = self.engine.get_global_grad_norm()
        if norm is None or not math.isfinite(norm):
            raise NonFinite(f"the gradient's norm is {norm}")
        return float(norm)

    @property
    def rate(self) -> float:
        return self.optim.rate(self.steps) * self.scale

    def gather(self, params: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """The whole weights while inside, on every rank (a collective under ZeRO-3)."""
        if self.cfg.zero_stage < 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(params)

    def write(self, param: nn.Parameter, value: Tensor) -> None:
        """Set a trained parameter, and the float32 copy that the ranks hold parts of."""
        write(param, value)

    def save(self, directory: Path) -> None:
        """Every rank writes its part of the weights and optimizer state."""
        self.engine.save_checkpoint(
            str(directory),
            tag="engine",
            client_state={"steps": self.steps},
            exclude_frozen_parameters=True,
        )
        distributed.barrier()

    def load(self, directory: Path) -> None:
        """What `save` wrote on as many ranks, or its universal form
        (policy/engines/universal.py).
        """
        with reading(self.engine, directory):
            path, state = self.engine.load_checkpoint(
                str(directory), tag="engine", load_module_strict=False
            )
        if path is None:
            raise UserError(
                f"{directory}: DeepSpeed finds no checkpoint of {distributed.world_size()} ranks "
                "there."
            )
        self.steps = state["steps"]


# ---- what DeepSpeed compiles ----


def build(extension: str) -> str | None:
    """Compile an extension of DeepSpeed's on every rank (`_BUILDERS`), a minute or two at the first
    time on a machine. Returns why a rank can't, None where all can. A collective.
    """
    prepare_cpu()
    from deepspeed.ops import op_builder

    reason = None
    try:
        getattr(op_builder, _BUILDERS[extension])().load(verbose=False)
    # A missing compiler, header or library shows as any error.
    except Exception as error:  # noqa: BLE001
        reason = first_line(error) or type(error).__name__
    return next((found for found in distributed.gather(reason) if found is not None), None)


def adam_kind(cfg: EngineConfig, *, waits: bool) -> Any:
    """The class of AdamW that engine.adam asks for, which is logged. `waits`: some groups train
    later. Raises UserError where engine.adam=deepspeed can't be had. A collective.
    """
    extension = "fused_adam"
    if not torch.cuda.is_available() or cfg.offload is not Offload.none:
        extension = "cpu_adam"
    reason = None
    if waits:
        reason = "stage.unfreeze counts the steps of each group"
    elif cfg.adam is AdamKernels.torch:
        reason = "engine.adam=torch"
    elif cfg.adam is AdamKernels.auto and not torch.cuda.is_available():
        reason = "engine.adam=auto without a GPU"
    if reason is None:
        reason = build(extension)
    if reason is None:
        from deepspeed.ops import adam

        _tell("AdamW by DeepSpeed's extension %s", extension)
        kind: Any = adam.FusedAdam
        if extension == "cpu_adam":
            kind = adam.DeepSpeedCPUAdam
        return kind
    if cfg.adam is AdamKernels.deepspeed:
        raise UserError(
            f"engine.adam=deepspeed: DeepSpeed's extension {extension} can't be used here "
            f"({reason}). Set engine.adam=torch."
        )
    _tell("AdamW by torch (%s)", reason)
    return WaitingAdamW if waits else torch.optim.AdamW


def in_kernels(optimizer: Any, cfg: EngineConfig) -> Any:
    """A fresh AdamW of torch's by the kernels that engine.adam asks for (`adam_kind`), or as it is:
    for engine=torch, and where groups wait for their turn.
    """
    if cfg.kind is EngineKind.torch:
        return optimizer
    kind = adam_kind(cfg, waits=isinstance(optimizer, WaitingAdamW))
    if isinstance(optimizer, kind):
        return optimizer
    names = ("params", "lr", "betas", "eps", "weight_decay")
    return kind([{name: group[name] for name in names} for group in optimizer.param_groups])


def _tell(message: str, word: str) -> None:
    if distributed.is_main():
        log.info(message, word)


def check_extensions(cfg: EngineConfig, *, waits: bool) -> None:
    """Compile what the configuration can't do without, before anything loads: the kernels of
    engine.adam=deepspeed, and the reader of engine.offload=nvme. `waits` as above. Raises
    UserError. A collective.
    """
    if cfg.adam is AdamKernels.deepspeed:
        adam_kind(cfg, waits=waits)
    if cfg.offload is not Offload.nvme:
        return
    reason = build("async_io")
    if reason is not None:
        raise UserError(
            "engine.offload=nvme: DeepSpeed's extension async_io can't be used here "
            f"({reason}). Install the headers of libaio (Debian: libaio-dev), or set "
            "engine.offload=cpu."
        )


def write(param: nn.Parameter, value: Tensor) -> None:
    """Set a parameter that DeepSpeed trains, below ZeRO-3, and its float32 copy on every rank."""
    from deepspeed.utils import safe_set_full_fp32_param

    with torch.no_grad():
        param.copy_(value)
    safe_set_full_fp32_param(param, value.float())


def freeze(module: nn.Module, cfg: EngineConfig, device: torch.device, *, half: bool) -> Any:
    """A module that only runs forward, its weights partitioned over the ranks under ZeRO-3
    (elsewhere: the module itself).
    """
    module.requires_grad_(False).eval().to(device)
    if cfg.zero_stage < 3:
        return module
    _same_head_calls(module, cfg)
    prepare_cpu()
    ensure_process_group()
    import deepspeed

    config = zero_config(cfg, hidden_size=_hidden_size(module), half=half, max_grad_norm=0.0)
    config["zero_optimization"].pop("offload_optimizer", None)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    engine.eval()  # returns nothing, unlike torch's
    return engine


def _same_head_calls(module: Any, cfg: EngineConfig) -> None:
    """Under ZeRO-3 each call of the head gathers its weights from all ranks, so ranks with fewer
    tokens call it as often.
    """
    if cfg.zero_stage == 3 and hasattr(module, "same_calls"):
        module.same_calls = True


def _hidden_size(module: Any) -> int:
    return int(module.model.config.get_text_config().hidden_size)


def to_universal(source: Path, target: Path, *, workers: int) -> None:
    """DeepSpeed's converter: the folder `source` of one engine's files to the folder `target`, and
    ``latest_universal`` beside that.
    """
    prepare_cpu()
    from deepspeed.checkpoint import ds_to_universal

    # "inject": what a client of Megatron's would have recorded; nothing of ours is split by tensor
    # or pipeline.
    given = {
        "input_folder": str(source),
        "output_folder": str(target),
        "num_extract_workers": workers,
        "num_merge_workers": workers,
    }
    ds_to_universal.main(
        Namespace(**given, keep_temp_folder=False, strict=True, inject_missing_state=True)
    )


def parter(cfg: EngineConfig, dtype: torch.dtype) -> Callable[[list[nn.Parameter]], None]:
    """What parts whole parameters over the ranks in place, as DeepSpeed would part those of a whole
    model that trains in `dtype`: one after the other, rank 0's values on every rank. A collective.
    """
    prepare_cpu()
    ensure_process_group()
    import deepspeed

    half = dtype is torch.bfloat16
    config = zero_config(cfg, hidden_size=1, half=half, max_grad_norm=0.0)
    # of a module, so that linear layers are computed as DeepSpeed lets them be of a whole model
    own = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)

    def part(params: list[nn.Parameter]) -> None:
        for param in params:
            if param.is_floating_point():
                param.data = param.data.to(dtype)
            own._convert_to_zero_parameters([param])

    return part


def gather_zero3(params: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """The whole weights of ZeRO-3 parameters while inside, on every rank; a collective that every
    rank enters.
    """
    import deepspeed

    return deepspeed.zero.GatheredParameters(params)


def ulysses(attend: Callable[..., Any], heads: tuple[int, int, int], group: Any) -> Any:
    """DeepSpeed's exchange around `attend`, an attention of transformers', for ranks of `group`
    that hold a part of each row. heads: of queries, of keys, and their size.
    """
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed(dist.get_backend())
    count, keys, size = heads
    # rows, and layers, of which it counts none here
    return UlyssesSPAttentionHF(attend, 1, count, size, keys, 1, group, seq_length_is_variable=True)
