"""Every option of the toolkit: one dataclass per config group, standard library only.

Conventions: ``slots`` and ``kw_only`` everywhere, so that OmegaConf refuses unknown keys (also
those added with ``+``); enumerations instead of ``Literal`` (which OmegaConf refuses); ranges in
``__post_init__``, so that a bad value is reported before anything loads. ``None`` always means "not
set; the stage says what follows from that".
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from conf.checks import MISSING, check
from conf.choices import (
    AdapterKind,
    Combine,
    DataFormat,
    DataKind,
    DataTarget,
    Dtype,
    EngineKind,
    FileKind,
    FormatStyle,
    Isolation,
    LengthUnit,
    LoraSync,
    ModelKind,
    Offload,
    Recipe,
    RolloutBackend,
    TaskClass,
    TermKind,
    TrackingKind,
    WandbMode,
)
from conf.labelling import LabelConfig

# a reward term can't have these names
_TAKEN = (
    "step",
    "prompt",
    "response",
    "score",
    "kl",
    "response_length",
    "finish_reason",
    "clipped",
)


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it starts."""

    name: str = "default"  # directory under run.dir that the stages of one project share
    dir: str = "runs"  # root of all runs
    seed: int = 0  # seeds python, numpy, torch and every sampler
    resume: bool = False  # continue from the last checkpoint of an existing run directory
    overwrite: bool = False  # delete an existing run directory of this stage and start anew
    dry_run: bool = False  # resolve, check and print; load no weights
    keep_checkpoints: int = 2  # newest checkpoints kept, beside the best; 0: all
    # seconds that a phase of training (rollout, update, save ...) may take before the run ends;
    # None: any
    phase_timeout_s: float | None = 3600.0

    def __post_init__(self) -> None:
        check(self.seed >= 0, "run.seed", self.seed, "an integer of at least 0")
        inside = (
            bool(self.name.strip("/."))
            and ".." not in self.name
            and not self.name.startswith(("/", "~"))
            and "\x00" not in self.name
        )
        check(
            inside, "run.name", self.name, "a directory name inside run.dir: relative, without '..'"
        )
        check(
            self.phase_timeout_s is None or self.phase_timeout_s > 0,
            "run.phase_timeout_s",
            self.phase_timeout_s,
            "above 0 s, or null",
        )
        check(
            self.keep_checkpoints >= 0,
            "run.keep_checkpoints",
            self.keep_checkpoints,
            "at least 1, or 0 for all",
        )
        check(
            not (self.resume and self.overwrite),
            "run.overwrite",
            self.overwrite,
            "false when run.resume=true",
        )


@dataclass(slots=True, kw_only=True)
class TinyConfig:
    """Shape of ``model=tiny``: a Llama built from a config, with a byte-level BPE tokenizer trained
    on the stage's text.
    """

    vocab_size: int = 2000  # tokenizer entries, special tokens included
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4  # head size = hidden_size / heads; vLLM's CPU attention wants a multiple of 32
    # tokens; the default stage.max_length and data.max_prompt_length + rollout.max_response_length
    # fit
    max_positions: int = 512
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        check(
            self.vocab_size >= 260,
            "model.tiny.vocab_size",
            self.vocab_size,
            "at least 260 (256 bytes + special tokens)",
        )
        check(self.heads >= 1, "model.tiny.heads", self.heads, "at least 1")
        multiple = self.hidden_size >= 1 and self.hidden_size % self.heads == 0
        check(
            multiple,
            "model.tiny.hidden_size",
            self.hidden_size,
            f"a multiple of heads={self.heads}",
        )
        check(
            self.intermediate_size >= 1,
            "model.tiny.intermediate_size",
            self.intermediate_size,
            "at least 1",
        )
        check(self.layers >= 1, "model.tiny.layers", self.layers, "at least 1")
        check(
            self.max_positions >= 8,
            "model.tiny.max_positions",
            self.max_positions,
            "at least 8 tokens",
        )


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The policy's start (SFT, PPO, eval) or the reward model's backbone (reward)."""

    kind: ModelKind = ModelKind.pretrained
    path: str | None = None  # local directory or hub name; tiny: None builds from config
    gguf_file: str | None = None  # file name inside path, when the weights are GGUF
    dtype: Dtype = Dtype.auto  # auto: float32 on CPU, bfloat16 on CUDA
    attn_implementation: str | None = None  # None: transformers' choice (sdpa)
    trust_remote_code: bool = False
    # stage=doctor: plan memory for a model of so many parameters (7e9, or 7b), where there is no
    # model.path
    params: float | None = None
    tiny: TinyConfig = field(default_factory=TinyConfig)

    def __post_init__(self) -> None:
        inside = self.gguf_file is None or (
            bool(self.gguf_file)
            and not self.gguf_file.startswith("/")
            and ".." not in self.gguf_file.split("/")
        )
        check(inside, "model.gguf_file", self.gguf_file, "a file's name inside model.path")
        check(
            self.params is None or 1e6 <= self.params <= 1e13,
            "model.params",
            self.params,
            "a number of parameters from 1e6 to 1e13, such as 7e9 or 7b",
        )


@dataclass(slots=True, kw_only=True)
class AdapterConfig:
    """``none`` trains every weight; ``lora`` trains low-rank updates (Hu et al. 2021,
    arXiv:2106.09685).
    """

    kind: AdapterKind = AdapterKind.none
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    # module names, or all-linear
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    rslora: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)
    dora: bool = False  # weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353)
    # SFT: model/ holds merged weights, not the adapter; every other stage writes them whole
    merge_on_save: bool = False

    def __post_init__(self) -> None:
        check(self.rank >= 1, "adapter.rank", self.rank, "at least 1")
        check(self.alpha > 0, "adapter.alpha", self.alpha, "above 0")
        check(0.0 <= self.dropout < 1.0, "adapter.dropout", self.dropout, "in [0, 1)")
        check(len(self.targets) > 0, "adapter.targets", self.targets, "at least one module name")


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """How weights are updated: one torch process, or DeepSpeed ZeRO (Rajbhandari et al. 2020,
    arXiv:1910.02054).
    """

    kind: EngineKind = EngineKind.torch
    zero_stage: int = 0  # 0..3; only with kind=deepspeed
    offload: Offload = Offload.none  # optimizer (stage >= 1) and weights (stage 3) to CPU or NVMe
    nvme_path: str | None = None  # directory on the NVMe disk, with offload=nvme
    micro_tokens: int = 4096  # online stages: real tokens per micro-batch and rank
    # TRL's stages: sequences per micro-batch and rank; None: batch_size / ranks
    micro_batch_size: int | None = None
    gradient_checkpointing: bool = False
    logits_chunk: int = 1024  # response tokens whose logits exist at the same time
    # online stages without a critic: compute a prompt once for all its responses; None: where the
    # model can
    share_prompts: bool | None = None
    threads: int | None = None  # torch's threads per rank; None: cores / local ranks
    # devices, one rank each; doctor and run.dry_run plan for them. None: the ranks that were
    # launched
    gpus: int | None = None
    # GiB of one device, for the memory plan; None: the devices' own, or 80 where there is none
    gpu_memory_gib: float | None = None

    def __post_init__(self) -> None:
        check(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        check(self.micro_tokens >= 1, "engine.micro_tokens", self.micro_tokens, "at least 1 token")
        check(self.logits_chunk >= 1, "engine.logits_chunk", self.logits_chunk, "at least 1 token")
        check(
            self.threads is None or self.threads >= 1, "engine.threads", self.threads, "at least 1"
        )
        check(
            self.gpus is None or 1 <= self.gpus <= 100_000, "engine.gpus", self.gpus, "1 to 100000"
        )
        finite = self.gpu_memory_gib is None or 0 < self.gpu_memory_gib < math.inf
        check(finite, "engine.gpu_memory_gib", self.gpu_memory_gib, "a finite number above 0 GiB")
        check(
            self.micro_batch_size is None or self.micro_batch_size >= 1,
            "engine.micro_batch_size",
            self.micro_batch_size,
            "at least 1",
        )
        check(
            self.kind is EngineKind.deepspeed or self.zero_stage == 0,
            "engine.zero_stage",
            self.zero_stage,
            "0 with engine=torch",
        )
        check(
            self.kind is EngineKind.deepspeed or self.offload is Offload.none,
            "engine.offload",
            self.offload.value,
            "none with engine=torch",
        )
        check(
            self.offload is Offload.none or self.zero_stage >= 1,
            "engine.offload",
            self.offload.value,
            "none below ZeRO-1",
        )
        check(
            self.offload is not Offload.nvme or self.zero_stage == 3,
            "engine.offload",
            self.offload.value,
            "nvme only with engine=zero3",
        )
        check(
            self.offload is not Offload.nvme or self.nvme_path is not None,
            "engine.nvme_path",
            self.nvme_path,
            "a directory with offload=nvme",
        )


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    """How prompts become responses."""

    # auto: vllm where it is installed, else hf (said aloud)
    backend: RolloutBackend = RolloutBackend.auto
    max_response_length: int = 64  # tokens
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    kv_cache_gib: float = 1.0  # vLLM on CPU: KV cache in GiB
    gpu_memory_utilization: float = 0.3  # vLLM on CUDA: its share of the device
    max_num_seqs: int = 256  # sequences decoded at once
    enforce_eager: bool = False  # vLLM on CUDA: no graphs
    # adapter: the engine applies it; merged: full weights; auto: adapter unless DoRA
    lora_sync: LoraSync = LoraSync.auto
    gap_tolerance: float | None = None  # nats; None: 1e-4 in float32, 0.05 in half precision
    max_lora_rank: int | None = None  # None: the smallest rank vLLM takes that holds adapter.rank

    def __post_init__(self) -> None:
        check(
            self.max_response_length >= 1,
            "rollout.max_response_length",
            self.max_response_length,
            "at least 1 token",
        )
        check(self.temperature > 0, "rollout.temperature", self.temperature, "above 0")
        check(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "in (0, 1]")
        check(self.top_k >= 0, "rollout.top_k", self.top_k, "at least 0 (0: off)")
        check(self.kv_cache_gib > 0, "rollout.kv_cache_gib", self.kv_cache_gib, "above 0 GiB")
        check(
            0 < self.gpu_memory_utilization < 1,
            "rollout.gpu_memory_utilization",
            self.gpu_memory_utilization,
            "in (0, 1)",
        )
        check(self.max_num_seqs >= 1, "rollout.max_num_seqs", self.max_num_seqs, "at least 1")
        check(
            self.max_lora_rank is None or self.max_lora_rank >= 1,
            "rollout.max_lora_rank",
            self.max_lora_rank,
            "at least 1",
        )
        check(
            self.gap_tolerance is None or self.gap_tolerance > 0,
            "rollout.gap_tolerance",
            self.gap_tolerance,
            "above 0 nats",
        )


@dataclass(slots=True, kw_only=True)
class RewardTerm:
    """One term of a composed reward: a kind, how it counts, and what the kind needs. To set a field
    of another kind is an error (reward/terms.py).
    """

    kind: TermKind = MISSING
    weight: float = 1.0  # of the value after clip and normalise; 0: logged, but trains nothing
    clip: float | None = None  # the raw value into [-clip, clip], before any statistics
    # by a running mean and standard deviation of the clipped values, over all ranks; in training
    # only
    normalise: bool = False
    # -- model
    # directories that stage=reward wrote; several: an ensemble, each put on its held-out scale
    # first
    paths: list[str] = field(default_factory=list)
    combine: Combine = Combine.mean
    spread_coef: float = 1.0  # combine=pessimistic: standard deviations subtracted from the mean
    # -- function
    function: str | None = None  # pkg.module:function
    # -- exact, numeric, math, choice, json_schema, instructions, code, gym
    # data column that a response is held against; None: answer, schema, constraints, tests,
    # metadata, by kind
    column: str | None = None
    # -- exact, numeric, choice, json_schema: where in the response the answer stands
    # None: by kind; "\\boxed{}": its content; "<tag>": up to "</tag>"; else the rest of the line
    # after it
    marker: str | None = None
    # -- exact
    ignore_case: bool = True
    ignore_punctuation: bool = True
    # -- numeric
    tolerance: float = 1e-6  # absolute, and relative to the answer
    # -- choice
    letters: str = "ABCDE"
    # -- regex, format
    pattern: str | None = None  # Python's syntax; regex: null takes each row's own from `column`
    style: FormatStyle | None = None  # format: a pattern with a name
    # -- json_schema
    schema_file: str | None = None  # JSON file; null: each row's own from `column`
    # -- instructions, code
    all_or_nothing: bool = False  # 1 for all constraints (tests), else 0; false: their share
    # -- code
    # CPU time of each test; all of a response's tests together have four times as much wall time
    time_limit_s: float = 5.0
    memory_mb: int = 512  # address space of a process
    isolation: Isolation = Isolation.auto
    # -- length
    low: int | None = None  # units; 0 inside [low, high]
    high: int | None = None
    ramp: int = 32  # units outside the band at which the value has fallen to -1
    unit: LengthUnit = LengthUnit.tokens
    # -- remote
    url: str | None = None
    token_env: str | None = None  # environment variable that holds the bearer token
    timeout_s: float = 30.0  # per request
    retries: int = 3
    batch_size: int = 64  # responses per request

    def check(self, key: str) -> None:
        """Ranges; `key` is the term's place, since a term doesn't know its own name."""
        check(math.isfinite(self.weight), f"{key}.weight", self.weight, "a finite number")
        check(self.clip is None or self.clip > 0, f"{key}.clip", self.clip, "above 0")
        check(self.spread_coef >= 0, f"{key}.spread_coef", self.spread_coef, "at least 0")
        check(self.tolerance >= 0, f"{key}.tolerance", self.tolerance, "at least 0")
        letters = (
            len(set(self.letters)) == len(self.letters) >= 2
            and self.letters.isalnum()
            and self.letters == self.letters.upper()
        )
        check(
            letters,
            f"{key}.letters",
            self.letters,
            "at least two different capital letters or digits",
        )
        check(self.time_limit_s > 0, f"{key}.time_limit_s", self.time_limit_s, "above 0 s")
        check(
            self.memory_mb >= 64,
            f"{key}.memory_mb",
            self.memory_mb,
            "at least 64 MB, which Python itself needs",
        )
        check(self.low is None or self.low >= 0, f"{key}.low", self.low, "at least 0")
        check(
            self.high is None or self.high >= (self.low or 0),
            f"{key}.high",
            self.high,
            f"at least low={self.low or 0}",
        )
        check(self.ramp >= 1, f"{key}.ramp", self.ramp, "at least 1")
        check(self.timeout_s > 0, f"{key}.timeout_s", self.timeout_s, "above 0 s")
        check(self.retries >= 0, f"{key}.retries", self.retries, "at least 0")
        check(self.batch_size >= 1, f"{key}.batch_size", self.batch_size, "at least 1")


@dataclass(slots=True, kw_only=True)
class RewardConfig:
    """What scores a response: a reward model's directory, a function with TRL's reward signature,
    or a weighted sum of terms.
    """

    path: str | None = None  # directory of a reward model that stage=reward wrote
    # pkg.module:function, called as f(prompts=..., completions=...) -> list[float]
    function: str | None = None
    # by name, which becomes the metric reward/<name>
    terms: dict[str, RewardTerm] = field(default_factory=dict)
    batch_tokens: int = 8192  # tokens per scoring batch

    def __post_init__(self) -> None:
        check(self.batch_tokens >= 1, "reward.batch_tokens", self.batch_tokens, "at least 1 token")
        for name in self.terms:
            check(
                re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None,
                "reward.terms",
                name,
                "names of letters, digits and _",
            )
            check(
                name not in _TAKEN,
                "reward.terms",
                name,
                f"a name beside those of samples.jsonl and the metrics ({', '.join(_TAKEN)})",
            )
            self.terms[name].check(f"reward.terms.{name}")


@dataclass(slots=True, kw_only=True)
class GymConfig:
    """``data.recipe=gym``: procedural tasks of reasoning-gym with their verifiers
    (rlhf/data/recipes/gym.py).
    """

    # reasoning-gym's names; rows are shared out evenly
    tasks: list[str] = field(default_factory=lambda: ["chain_sum"])
    rows: int = 1024  # training prompts, all tasks together
    eval_rows: int = 128  # held-out prompts
    seed: int | None = None  # of the tasks; None: run.seed
    # by task, its own options: +data.gym.options.chain_sum.max_terms=3
    options: dict[str, Any] = field(default_factory=dict)
    suffix: str = ""  # after each question, such as how to write the answer
    chat: bool = False  # prompts as messages, for a policy with a chat template
    system: str | None = None  # system message, with chat

    def __post_init__(self) -> None:
        check(
            len(self.tasks) > 0 and len(set(self.tasks)) == len(self.tasks),
            "data.gym.tasks",
            self.tasks,
            "at least one task, each once",
        )
        check(
            self.rows >= len(self.tasks),
            "data.gym.rows",
            self.rows,
            f"at least one for each of {len(self.tasks)} tasks",
        )
        check(self.eval_rows >= 1, "data.gym.eval_rows", self.eval_rows, "at least 1")
        check(
            set(self.options) <= set(self.tasks),
            "data.gym.options",
            sorted(self.options),
            f"options of the tasks {', '.join(self.tasks)}",
        )
        check(
            all(isinstance(o, dict) for o in self.options.values()),
            "data.gym.options",
            self.options,
            "a dictionary for each task",
        )
        check(
            self.chat or self.system is None,
            "data.gym.system",
            self.system,
            "null without data.gym.chat=true",
        )


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    """One source of a mixture; `path` as in data.path."""

    path: str = MISSING
    # its part of the mixture, relative to the others'; None for all: every row of every source
    weight: float | None = None
    cap: int | None = None  # at most so many rows, drawn by run.seed
    format: DataFormat = DataFormat.auto
    columns: dict[str, Any] = field(default_factory=dict)
    subset: str | None = None
    split: str | None = None

    def check(self, key: str) -> None:
        """Ranges; `key` is the source's place, since it doesn't know its own name."""
        check(
            self.weight is None or (math.isfinite(self.weight) and self.weight > 0),
            f"{key}.weight",
            self.weight,
            "above 0",
        )
        check(self.cap is None or self.cap >= 1, f"{key}.cap", self.cap, "at least 1 row")
        _check_columns(f"{key}.columns", self.columns)


def _check_columns(key: str, columns: dict[str, Any]) -> None:
    named = all(isinstance(name, str) and name for name in columns.values())
    check(
        named and len(set(columns.values())) == len(columns),
        key,
        columns,
        "a different column's name for each",
    )


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Where rows come from. ``recipe`` builds them from a package's own data under
    ``<run.dir>/<run.name>/recipe``.
    """

    # JSON, JSONL, CSV, Parquet or XLSX file, glob, datasets directory or hub name; with #500 at
    # most so many rows
    path: str | None = None
    # a mixture by name, in place of path
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    registry: str | None = None  # LLaMA-Factory's dataset_info.json
    dataset: str | None = None  # its entries to read, in place of path: NAME or "NAME,NAME"
    eval_path: str | None = None  # held-out rows; None: eval_fraction of path
    format: DataFormat = DataFormat.auto  # auto: detected by the columns, and said aloud
    # a format's column: the file's; applied before detection
    columns: dict[str, Any] = field(default_factory=dict)
    subset: str | None = None  # configuration of a hub's data set
    split: str | None = None  # of a data set with several; None: train, or the only one
    # MT-Bench: files of questions and of answers, whose texts the rows refer to
    join: list[str] = field(default_factory=list)
    to: DataTarget = DataTarget.trl  # stage=data: the format that it writes
    # stage=data: the files that it writes; None: csv and xlsx as `to` says, else jsonl
    file: FileKind | None = None
    preview: int = 0  # stage=data: so many rows' tokens in colour
    recipe: Recipe = Recipe.none
    gym: GymConfig = field(default_factory=GymConfig)
    eval_fraction: float = 0.1  # of data.path, when there is no eval_path
    max_rows: int | None = None  # the first rows only
    max_bad_rows: int = 0  # rows that may not fit before the run stops
    # a row's weight in the loss, where the rows have such a column; null: not used
    weight_column: str | None = "weight"
    # a name (chatml, llama-3 ...: rlhf/data/templates) or a Jinja file; None: the tokenizer's own
    chat_template: str | None = None
    max_prompt_length: int = 256  # tokens; longer prompts are an error unless truncate_prompts
    truncate_prompts: bool = False  # keep the last max_prompt_length tokens
    # -- stage=data
    kind: DataKind = DataKind.auto  # what the rows become; auto: what the detected format is
    # steps in order: a name, or {step: NAME, option: value ...} (conf/preparation)
    pipeline: list[Any] = field(default_factory=list)
    # keep each step's rows in the run directory, so that run.resume=true starts from the last step
    # that is still right
    cache: bool = True
    # examine the prepared rows; report.json and report.html in the run directory
    report: bool = False
    # tokens of a row from which the report counts it as truncated: the stage.max_length that will
    # train on it
    report_limit: int = 1024
    report_rows: int = 100  # rows that a finding of the report names
    # what the rows are to teach; the report then checks that there are enough
    task: TaskClass | None = None

    def __post_init__(self) -> None:
        check(0 < self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "in (0, 1)")
        check(
            self.max_rows is None or self.max_rows >= 1,
            "data.max_rows",
            self.max_rows,
            "at least 1",
        )
        check(self.max_bad_rows >= 0, "data.max_bad_rows", self.max_bad_rows, "at least 0")
        check(self.preview >= 0, "data.preview", self.preview, "at least 0 rows")
        _check_columns("data.columns", self.columns)
        for name, source in self.sources.items():
            source.check(f"data.sources.{name}")
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        check(
            len(weighted) in (0, len(self.sources)),
            "data.sources",
            weighted,
            "a weight for every source or for none",
        )
        given = [key for key in ("path", "sources", "dataset") if getattr(self, key)]
        check(len(given) <= 1, "data", given, "one of path, sources and dataset")
        check(
            (self.dataset is None) == (self.registry is None),
            "data.dataset",
            self.dataset,
            "set where data.registry is, and only there",
        )
        check(
            self.max_prompt_length >= 1,
            "data.max_prompt_length",
            self.max_prompt_length,
            "at least 1 token",
        )
        check(self.report_limit >= 2, "data.report_limit", self.report_limit, "at least 2 tokens")
        check(self.report_rows >= 1, "data.report_rows", self.report_rows, "at least 1")


@dataclass(slots=True, kw_only=True)
class TrackingConfig:
    """metrics.jsonl is always written; this adds a tracker."""

    kind: TrackingKind = TrackingKind.wandb
    project: str = "rlhf"
    entity: str | None = None
    group: str | None = None  # None: run.name; a multirun: the sweep
    tags: list[str] = field(default_factory=list)
    mode: WandbMode = WandbMode.auto  # auto: online where a login exists, else offline
    log_model: bool = True  # the final model as an artifact
    samples_every: int = 10  # steps between sample tables; 0: none

    def __post_init__(self) -> None:
        check(self.samples_every >= 0, "tracking.samples_every", self.samples_every, "at least 0")


@dataclass(slots=True, kw_only=True)
class Config:
    """The whole configuration; ``stage`` holds one of the stage dataclasses."""

    stage: Any = MISSING
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    data: DataConfig = field(default_factory=DataConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
