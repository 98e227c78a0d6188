"""The groups ``model``, ``engine`` and ``rollout``: which weights a stage starts from, how they are
updated, and how they write responses.
"""

from dataclasses import dataclass
from enum import Enum

from conf.choices import (
    Dtype,
    EngineKind,
    LoraSync,
    ModelKind,
    Offload,
    RolloutBackend,
)
from conf.options import check, check_options, nested, option
from conf.schedule import AdamKernels


@dataclass(slots=True, kw_only=True)
class TinyConfig:
    """Shape of ``model=tiny``: a Llama with random weights and a byte-level BPE tokenizer that is
    trained on the stage's text.
    """

    vocab_size: int = option(
        2000,
        "Tokenizer entries; the smallest vocabulary is 256 bytes and the special tokens.",
        unit="entries",
        at_least=260,
    )
    hidden_size: int = option(128, "Width of the model, a multiple of heads.", at_least=1)
    intermediate_size: int = option(384, "Width of the feed-forward layers.", at_least=1)
    layers: int = option(4, "Number of layers.", at_least=1)
    heads: int = option(
        4,
        "Attention heads; hidden_size / heads should be a multiple of 32 for vLLM on CPU.",
        at_least=1,
    )
    max_positions: int = option(
        2048, "Longest sequence that the model can read.", unit="tokens", at_least=8
    )
    tie_embeddings: bool = option(True, "Use the input embeddings as the output layer, too.")

    def __post_init__(self) -> None:
        check_options(self, "model.tiny")
        check(
            self.hidden_size % self.heads == 0,
            "model.tiny.hidden_size",
            self.hidden_size,
            f"a multiple of heads={self.heads}",
        )


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The weights that a stage starts from: the policy's, or the reward model's backbone."""

    kind: ModelKind = option(
        ModelKind.pretrained, "Load a pretrained model, or build a tiny one from model.tiny."
    )
    path: str | None = option(
        None, "Local directory or hub name; null with kind=tiny builds one from model.tiny."
    )
    revision: str | None = option(
        None, "Branch, tag or commit of the hub's model at model.path; null: main.", filled=True
    )
    gguf_file: str | None = option(
        None, "Name of the GGUF file in model.path; null: the weights are no GGUF file."
    )
    add_tokens: list[str] = option(
        [],
        "Stages that train: tokens that the tokenizer gets; each has a row of the embedding and of "
        "the head, which starts at the mean of the others.",
    )
    add_special_tokens: list[str] = option([], "The same for special tokens.")
    dtype: Dtype = option(
        Dtype.auto, "Number format of the weights; auto: float32 on CPU, bfloat16 on CUDA."
    )
    attn_implementation: str | None = option(
        None, "Attention implementation of transformers; null: its own choice (sdpa)."
    )
    trust_remote_code: bool = option(False, "Run Python code that the model's directory holds.")
    params: float | None = option(
        None,
        "Size of the model whose memory stage=doctor plans, such as 7e9 or 7b; null: that of "
        "model.path.",
        unit="parameters",
        at_least=1e6,
        at_most=1e13,
    )
    tiny: TinyConfig = nested(TinyConfig)

    def __post_init__(self) -> None:
        check_options(self, "model")
        inside = self.gguf_file is None or (
            bool(self.gguf_file)
            and not self.gguf_file.startswith("/")
            and ".." not in self.gguf_file.split("/")
        )
        check(inside, "model.gguf_file", self.gguf_file, "a file's name inside model.path")


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """How weights are updated: by torch in one process, or by DeepSpeed ZeRO (Rajbhandari et al.
    2020, arXiv:1910.02054).
    """

    kind: EngineKind = option(EngineKind.torch, "One torch process, or DeepSpeed.")
    zero_stage: int = option(
        0,
        "ZeRO stage of engine=deepspeed; 0: plain data parallelism. 0 and 1 add the bfloat16 "
        "gradients of micro-batches in bfloat16, 2 and 3 in float32.",
        choices=(0, 1, 2, 3),
    )
    offload: Offload = option(
        Offload.none,
        "Where the optimizer's state (ZeRO-1 and above) and the weights (ZeRO-3) are kept.",
    )
    adam: AdamKernels = option(
        AdamKernels.auto,
        "AdamW under DeepSpeed: torch's, or its own kernels, compiled once; auto: those on a GPU.",
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
        "TRL's stages: sequences in one micro-batch of a rank; null: as many tokens as the memory "
        "plan says fit, at most the sequences of batch_size / ranks.",
        unit="sequences",
        at_least=1,
    )
    micro_batch_tokens: int | None = option(
        None,
        "TRL's stages, in place of micro_batch_size: padded tokens in one micro-batch of a rank, "
        "sequences x longest (a pair counts once, by its longer side); null: as micro_batch_size "
        "says.",
        unit="tokens",
        at_least=1,
    )
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    sequence_parallel: int = option(
        1,
        "SFT and online stages under DeepSpeed: ranks that share each row, a part of its tokens "
        "each (Ulysses: Jacobs et al. 2023, arXiv:2309.14509).",
        unit="ranks",
        at_least=1,
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
        check(
            self.micro_batch_size is None or self.micro_batch_tokens is None,
            "engine.micro_batch_tokens",
            self.micro_batch_tokens,
            f"null beside engine.micro_batch_size={self.micro_batch_size}",
        )

    def _check_torch(self) -> None:
        offload, adam = self.offload, self.adam
        check(self.zero_stage == 0, "engine.zero_stage", self.zero_stage, "0 with engine=torch")
        none = offload is Offload.none
        check(none, "engine.offload", offload.value, "none with engine=torch")
        has = adam is not AdamKernels.deepspeed
        check(has, "engine.adam", adam.value, "auto or torch with engine=torch")

    def _check_offload(self) -> None:
        given, stage, path = self.offload.value, self.zero_stage, self.nvme_path
        check(stage >= 1, "engine.offload", given, "none below ZeRO-1")
        if self.offload is Offload.nvme:
            check(stage == 3, "engine.offload", given, "nvme only with engine=zero3")
            check(path is not None, "engine.nvme_path", path, "a directory with offload=nvme")

    def groups(self, ranks: int) -> int:
        """Groups of ranks that share rows; as many as ranks where each has rows of its own."""
        return max(1, ranks // self.sequence_parallel)


class Transfer(Enum):
    """How weights go from the trainer to servers."""

    auto = "auto"  # nccl between devices, else file
    file = "file"  # safetensors in memory or on a disk that both see
    gloo = "gloo"  # over the network, from host memory
    nccl = "nccl"  # between devices of their own
    ipc = "ipc"  # within a device that both share


@dataclass(slots=True, kw_only=True)
class ServerConfig:
    """One vLLM server: its size, its place, and when it counts as lost."""

    count: int = option(
        1,
        "Servers that a run starts itself where rollout.servers names none.",
        unit="servers",
        at_least=1,
    )
    tensor_parallel: int = option(
        1, "Devices that share each layer of one copy of the model.", at_least=1
    )
    data_parallel: int = option(1, "Copies of the model in one server.", at_least=1)
    transfer: Transfer = option(Transfer.auto, "How weights go from the trainer to servers.")
    token_env: str | None = option(
        None,
        "Environment variable with the servers' bearer token; null: a token is made for servers "
        "that the run starts itself, and servers of rollout.servers get none.",
        filled=True,
    )
    cores: list[str] | None = option(
        None,
        "Cores of each server that the run starts, such as [0-3, 4-7]; null: any.",
        filled=True,
    )
    devices: list[str] | None = option(
        None,
        "CUDA devices of each server that the run starts, such as ['0,1', '2,3']; null: all that "
        "the run sees.",
        filled=True,
    )
    python: str | None = option(
        None,
        "Interpreter of the environment that servers run in; null: the trainer's.",
        filled=True,
    )
    start_limit_s: float = option(
        600.0, "Longest start of a server, weights loaded.", unit="s", above=0
    )
    request_limit_s: float = option(
        600.0,
        "Longest wait for a request's answer before its server counts as hung.",
        unit="s",
        above=0,
    )
    restarts: int = option(
        3, "Restarts of each server that the run starts itself.", unit="restarts", at_least=0
    )
    threads: int | None = option(
        None,
        "Threads of each server on a CPU; null: one for each of its cores.",
        unit="threads",
        at_least=1,
    )

    def __post_init__(self) -> None:
        check_options(self, "rollout.server")
        for name, lists in (("cores", self.cores), ("devices", self.devices)):
            check(
                lists is None or len(lists) == self.count,
                f"rollout.server.{name}",
                lists,
                f"one entry for each of rollout.server.count={self.count} servers, or null",
            )


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    """How prompts become responses: the generator, its sampling and its memory."""

    backend: RolloutBackend = option(
        RolloutBackend.auto,
        "Generator of responses; auto: vLLM where it is installed, else hf, which is logged; "
        "server: vLLM in processes of its own.",
    )
    max_response_length: int = option(
        1024, "Longest response; longer ones are cut off.", unit="tokens", at_least=1
    )
    temperature: float = option(1.0, "Softmax temperature of sampling.", above=0)
    top_p: float = option(
        1.0, "Sample from the likeliest tokens with this total probability.", above=0, at_most=1
    )
    top_k: int = option(0, "Sample from so many likeliest tokens; 0: from all.", at_least=0)
    kv_cache_gib: float = option(1.0, "Size of the KV cache of vLLM on CPU.", unit="GiB", above=0)
    gpu_memory_utilization: float = option(
        0.3, "Share of the device's memory that vLLM takes on CUDA.", above=0, below=1
    )
    max_num_seqs: int = option(
        256, "Sequences that are decoded at once.", unit="sequences", at_least=1
    )
    enforce_eager: bool = option(False, "vLLM on CUDA: no CUDA graphs.")
    sleep: bool = option(
        False,
        "vLLM on CUDA in the trainer's process: its weights wait on the host, and its cache is "
        "dropped, while responses are scored and the policy is updated.",
    )
    lora_sync: LoraSync = option(
        LoraSync.auto,
        "What vLLM gets of a LoRA policy: the adapter or merged weights; auto: the adapter, except "
        "with DoRA.",
    )
    gap_tolerance: float | None = option(
        None,
        "Largest difference of log-probabilities between sampler and trainer that is accepted; "
        "null: 1e-4 in float32, calibrated in half precision (gap_factor, gap_tokens).",
        unit="nats",
        above=0,
    )
    gap_factor: float = option(
        2.0,
        "Half precision without gap_tolerance: differences may grow to so many times those of the "
        "first sync, in units of what rounding explains at the time.",
        at_least=1,
    )
    gap_tokens: int = option(
        256,
        "Half precision without gap_tolerance: tokens that sampler and trainer compare after each "
        "sync.",
        unit="tokens",
        at_least=16,
    )
    max_lora_rank: int | None = option(
        None,
        "Largest LoRA rank that vLLM reserves room for; null: the smallest one that holds "
        "adapter.rank.",
        at_least=1,
    )
    servers: list[str] = option(
        [],
        "rollout=server: base URLs of running servers, such as http://10.0.0.2:8200 (stage="
        "serve_rollout starts one); empty: the run starts rollout.server.count of its own.",
        section="rollout=server: vLLM in processes of its own",
    )
    sync_limit_s: float = option(
        600.0,
        "Longest weight update of a server; one that takes longer is restarted or left out.",
        unit="s",
        above=0,
    )
    in_flight: bool = option(
        False,
        "Change the servers' weights while they write, so that tokens of one response may be of "
        "several versions; false: responses are finished before.",
    )
    server: ServerConfig = nested(ServerConfig)

    def __post_init__(self) -> None:
        check_options(self, "rollout")
        check(
            not self.servers or self.backend is RolloutBackend.server,
            "rollout.servers",
            self.servers,
            f"[] with rollout={self.backend.value}, or rollout=server",
        )
        other = self.backend in (RolloutBackend.hf, RolloutBackend.server)
        check(
            not (self.sleep and other),
            "rollout.sleep",
            self.sleep,
            f"false with rollout={self.backend.value}: vLLM in the trainer's process alone sleeps",
        )
        check(
            not self.in_flight or self.backend is RolloutBackend.server,
            "rollout.in_flight",
            self.in_flight,
            f"false with rollout={self.backend.value}, whose engine does one thing at a time",
        )
