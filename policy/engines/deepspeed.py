"""DeepSpeed: the only file that imports it, lazily, so that engine=torch never pays for it."""

import logging
import math
import os
import pkgutil
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.choices import Offload
from conf.schema import EngineConfig
from policy.engines.base import NonFinite, OptimSettings
from policy.engines.groups import Rates, WaitingAdamW, one_rate, set_rates
from policy.model import trainable
from rlhf.process import distributed
from rlhf.types import UserError

# What DeepSpeed pickles into a checkpoint beside tensors and plain values. Anything else could be
# code, and DeepSpeed would run it.
CHECKPOINT_CLASSES = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


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
        kind: type[torch.optim.AdamW] = torch.optim.AdamW
        if self.rates.unfreezings:
            kind = WaitingAdamW
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

    def __call__(self, *args: Tensor) -> Any:
        return self.engine(*args)

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
    return int(module.model.config.hidden_size)


def gradient_sums(cfg: EngineConfig, *, half: bool) -> dict[str, Any]:
    """DeepSpeed's options for adding bfloat16 gradients of micro-batches in float32; none for
    float32 weights.

    ZeRO-0 can't, and ZeRO-1 would change to an optimizer with checkpoints of another form: both add
    in bfloat16, so their error grows with the number of micro-batches.
    """
    if not half or cfg.zero_stage < 2:
        return {}
    return {"data_types": {"grad_accum_dtype": "fp32"}}


def zero_config(
    cfg: EngineConfig, *, hidden_size: int, half: bool, max_grad_norm: float
) -> dict[str, Any]:
    """DeepSpeed's configuration for our own loop: no scheduler, no accumulation, the client's AdamW
    on the device it likes.
    """
    zero: dict[str, Any] = {"stage": cfg.zero_stage}
    if cfg.zero_stage == 3:
        # Only vectors (norms, biases) stay whole; with the default of 100,000 elements a small
        # model would never be partitioned.
        zero["stage3_param_persistence_threshold"] = 10 * hidden_size
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    if cfg.offload is not Offload.none:
        target: dict[str, Any] = {"device": cfg.offload.value}
        if cfg.offload is Offload.nvme:
            target["nvme_path"] = cfg.nvme_path
        zero["offload_optimizer"] = dict(target)
        if cfg.zero_stage == 3:
            zero["offload_param"] = dict(target)
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 1e9,  # 0 would leave the norm uncomputed below ZeRO-1
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": half},
        **gradient_sums(cfg, half=half),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def is_universal(directory: Path) -> bool:
    """Whether a checkpoint folder that DeepSpeed wrote was converted to its universal form."""
    return (directory / "latest_universal").is_file()


@contextmanager
def reading(engine: Any, directory: Path) -> Iterator[None]:
    """While inside, DeepSpeed's `engine` loads `directory` as what it is: its own ranks' files, or
    the universal form. A collective.

    DeepSpeed takes this from its configuration, which is made before a checkpoint is known, and one
    run may load both. Raises UserError where a rank would hold no part of some parameter group,
    which the universal form's loader can't do without.
    """
    config, logger = engine._config, logging.getLogger("DeepSpeed")
    before, level = config.load_universal_checkpoint, logger.level
    config.load_universal_checkpoint = is_universal(directory)
    try:
        if config.load_universal_checkpoint:
            _check_parts(engine)
            logger.setLevel(logging.ERROR)  # it warns that there is no tensor parallelism
        yield
        if config.load_universal_checkpoint:
            repair_universal(engine, directory)
    finally:
        config.load_universal_checkpoint = before
        logger.setLevel(level)


def _check_parts(engine: Any) -> None:
    """Every rank holds a part of every parameter group under ZeRO-1 and 2. Raises UserError on all
    ranks alike. A collective.
    """
    groups = getattr(engine.optimizer, "bit16_groups", getattr(engine.optimizer, "bf16_groups", []))
    missing = distributed.gather(any(_holds_nothing(group) for group in groups))
    if any(missing):
        ranks = ", ".join(str(rank) for rank, empty in enumerate(missing) if empty)
        raise UserError(
            f"the model is too small for {len(missing)} ranks: rank {ranks} would hold no part "
            "of some group of weights, and DeepSpeed can't load a "
            "universal checkpoint then. Resume on fewer ranks, or at engine=zero3."
        )


def _holds_nothing(group: Iterable[Any]) -> bool:
    return all(getattr(parameter, "_hp_mapping", None) is None for parameter in group)


def repair_universal(engine: Any, directory: Path) -> None:
    """After DeepSpeed loaded a universal form: what its ZeRO-3 loader gets wrong where the weights
    are in several groups.

    It gives all groups the hyperparameters of the first, so that weights without decay decay, and
    the same tensor as step count, which each optimizer step then counts up once per group.
    """
    tag = (directory / "latest_universal").read_text(encoding="utf-8").strip()
    with torch.serialization.safe_globals(checkpoint_classes()):
        saved = torch.load(
            directory / tag / "zero" / "optimizer_state.pt", weights_only=True, map_location="cpu"
        )["param_groups"]
    optimizer = engine.optimizer.optimizer
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update({k: v for k, v in values.items() if k != "params"})
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def checkpoint_classes() -> list[Any]:
    """The classes that DeepSpeed pickles into its checkpoints, for
    ``torch.load(weights_only=True)``.
    """
    return [pkgutil.resolve_name(name) for name in sorted(CHECKPOINT_CLASSES)]


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


def gather_zero3(params: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """The whole weights of ZeRO-3 parameters while inside, on every rank; a collective that every
    rank enters.
    """
    import deepspeed

    return deepspeed.zero.GatheredParameters(params)
