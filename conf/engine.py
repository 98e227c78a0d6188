"""The group ``engine``: how weights are updated, on how many devices, in which micro-batches."""

from dataclasses import dataclass

from conf.choices import EngineKind, Offload
from conf.options import check, check_options, option


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """How weights are updated: by torch in one process, or by DeepSpeed ZeRO (Rajbhandari et al.
    2020, arXiv:1910.02054).
    """

    kind: EngineKind = option(EngineKind.torch, "One torch process, or DeepSpeed.")
    zero_stage: int = option(
        0, "ZeRO stage of engine=deepspeed; 0: plain data parallelism.", choices=(0, 1, 2, 3)
    )
    offload: Offload = option(
        Offload.none,
        "Where the optimizer's state (ZeRO-1 and above) and the weights (ZeRO-3) are kept.",
    )
    nvme_path: str | None = option(None, "Directory on the NVMe disk; needed with offload=nvme.")
    micro_tokens: int = option(
        4096,
        "Online stages: real tokens in one micro-batch of a rank.",
        unit="tokens",
        at_least=1,
    )
    micro_batch_size: int | None = option(
        None,
        "TRL's stages: sequences in one micro-batch of a rank; null: as many as the memory plan "
        "says fit, at most batch_size / ranks.",
        unit="sequences",
        at_least=1,
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    logits_chunk: int = option(
        1024,
        "Response tokens whose logits are in memory at the same time.",
        unit="tokens",
        at_least=1,
    )
    share_prompts: bool | None = option(
        None,
        "Online stages without a critic: compute a prompt once for all its responses; null: where "
        "the model can.",
    )
    threads: int | None = option(
        None,
        "Threads of torch on each rank; null: cores / ranks of this machine.",
        unit="threads",
        at_least=1,
    )
    gpus: int | None = option(
        None,
        "Devices that the run is meant for, one a rank: doctor and run.dry_run plan for them, and "
        "a launch with another number is refused; null: the ranks that were launched.",
        unit="devices",
        at_least=1,
        at_most=100_000,
    )
    gpu_memory_gib: float | None = option(
        None,
        "Memory of one device, for the memory plan; null: the device's own, or 80 without one.",
        unit="GiB",
        above=0,
    )

    def __post_init__(self) -> None:
        check_options(self, "engine")
        if self.kind is EngineKind.torch:
            self._check_torch()
        if self.offload is not Offload.none:
            self._check_offload()

    def _check_torch(self) -> None:
        check(self.zero_stage == 0, "engine.zero_stage", self.zero_stage, "0 with engine=torch")
        check(
            self.offload is Offload.none,
            "engine.offload",
            self.offload.value,
            "none with engine=torch",
        )

    def _check_offload(self) -> None:
        check(self.zero_stage >= 1, "engine.offload", self.offload.value, "none below ZeRO-1")
        if self.offload is Offload.nvme:
            check(
                self.zero_stage == 3,
                "engine.offload",
                self.offload.value,
                "nvme only with engine=zero3",
            )
            check(
                self.nvme_path is not None,
                "engine.nvme_path",
                self.nvme_path,
                "a directory with offload=nvme",
            )
