"""Every option of the toolkit: one dataclass per config group, standard library only.

Conventions: ``slots`` and ``kw_only`` everywhere, so that OmegaConf refuses unknown keys (also those added with ``+``);
enumerations instead of ``Literal`` (which OmegaConf refuses); ranges in ``__post_init__``, so that a bad value is reported
before anything loads. ``None`` always means "not set; the stage says what follows from that".
"""

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

MISSING: Any = "???"  # OmegaConf's marker of a mandatory value
_TAKEN = ("step", "prompt", "response", "score", "kl", "response_length", "finish_reason", "clipped")  # a reward term can't have these names


def _check(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise ``ValueError`` naming the option, what was expected and what was found."""
    if not condition:
        raise ValueError(f"{key}={value!r} is out of range: expected {expected}.")


class Dtype(Enum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ModelKind(Enum):
    tiny = "tiny"
    pretrained = "pretrained"


class AdapterKind(Enum):
    none = "none"
    lora = "lora"


class EngineKind(Enum):
    torch = "torch"
    deepspeed = "deepspeed"


class Offload(Enum):
    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class RolloutBackend(Enum):
    auto = "auto"
    vllm = "vllm"
    hf = "hf"


class LoraSync(Enum):
    auto = "auto"
    adapter = "adapter"
    merged = "merged"


class TrackingKind(Enum):
    none = "none"
    wandb = "wandb"
    tensorboard = "tensorboard"


class WandbMode(Enum):
    auto = "auto"
    online = "online"
    offline = "offline"


class Scheduler(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class KLEstimator(Enum):
    k1 = "k1"
    k2 = "k2"
    k3 = "k3"
    k3_weighted = "k3_weighted"  # k3 times the ratio of new to old probability; in a loss only


class KLPlace(Enum):
    reward = "reward"
    loss = "loss"
    both = "both"


class Advantage(Enum):
    gae = "gae"  # with a critic
    group = "group"  # score less the mean of its prompt's group
    leave_one_out = "leave_one_out"  # score less the mean of the others in its group
    reinforce_pp = "reinforce_pp"  # rewards to go, normalised over the whole batch
    greedy = "greedy"  # score less that of the greedy response to the same prompt
    none = "none"  # 1 everywhere: the loss imitates what the selection kept


class PolicyLoss(Enum):
    clip = "clip"
    gspo = "gspo"
    cispo = "cispo"
    nll = "nll"
    dpo = "dpo"


class Aggregation(Enum):
    token = "token"  # sum over tokens / tokens of the step
    sequence = "sequence"  # mean over responses of their token means
    constant = "constant"  # sum over tokens / (responses x a constant)


class Selection(Enum):
    all = "all"
    unequal = "unequal"  # groups whose scores differ; more prompts are drawn in place of the others
    best = "best"  # the best response of each group
    best_worst = "best_worst"  # the best and the worst of each group, as a pair


class ImportanceMode(Enum):
    truncate = "truncate"
    mask = "mask"


class Level(Enum):
    token = "token"
    sequence = "sequence"


class PreferenceLoss(Enum):
    """Losses of TRL's DPOTrainer, by its names; which of them pairs alone can define is in policy/losses.py."""

    sigmoid = "sigmoid"
    sigmoid_norm = "sigmoid_norm"
    hinge = "hinge"
    ipo = "ipo"
    exo_pair = "exo_pair"
    nca_pair = "nca_pair"
    robust = "robust"
    bco_pair = "bco_pair"
    sppo_hard = "sppo_hard"
    aot = "aot"
    aot_unpaired = "aot_unpaired"
    apo_zero = "apo_zero"
    apo_down = "apo_down"
    discopop = "discopop"
    sft = "sft"


class FDivergence(Enum):
    """What DPO keeps policy and reference close by (Wang et al. 2023, arXiv:2309.16240); by TRL's names."""

    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    js_divergence = "js_divergence"
    alpha_divergence = "alpha_divergence"


class KTOLoss(Enum):
    """Losses of TRL's KTOTrainer, by its names."""

    kto = "kto"
    apo_zero_unpaired = "apo_zero_unpaired"  # APO-zero (arXiv:2408.06266) for single answers; no KL estimate


class CPOLoss(Enum):
    """Losses of TRL's CPOTrainer, by its names."""

    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"  # of the log-probability per token
    simpo = "simpo"  # of the log-probability per token, with a target margin


class Rule(Enum):
    """What the watch looks for (rlhf/watch.py)."""

    divergence = "divergence"  # the score rises while the held-out judge falls
    kl = "kl"  # nats per response above a limit
    length = "length"  # too many responses at the length limit
    entropy = "entropy"  # the entropy has collapsed


class Action(Enum):
    off = "off"
    warn = "warn"
    stop = "stop"


class KLController(Enum):
    fixed = "fixed"
    adaptive = "adaptive"


class CriticInit(Enum):
    reward = "reward"
    policy = "policy"


class Judge(Enum):
    lexicon = "lexicon"
    classifier = "classifier"
    function = "function"


class TermKind(Enum):
    """What a reward term looks at (reward/terms.py)."""

    model = "model"  # one reward model, or an ensemble
    function = "function"  # pkg.module:function with TRL's reward signature
    exact = "exact"  # the row's answer, as text
    numeric = "numeric"  # the row's answer, as a number
    math = "math"  # the row's answer, as a mathematical expression
    choice = "choice"  # the row's answer, as a letter
    regex = "regex"  # a pattern that has to be found
    json_schema = "json_schema"  # JSON that a schema allows
    instructions = "instructions"  # the row's constraints
    code = "code"  # Python that passes the row's tests
    gym = "gym"  # a reasoning-gym task, by its own verifier
    length = "length"  # a band of lengths
    format = "format"  # a pattern that the whole response has to match
    remote = "remote"  # a reward model behind HTTP


class Combine(Enum):
    """One score from several reward models' (Coste et al. 2023, arXiv:2310.02743)."""

    mean = "mean"
    minimum = "minimum"
    pessimistic = "pessimistic"  # mean - spread_coef x standard deviation


class Isolation(Enum):
    """How code that a policy wrote is kept apart (reward/sandbox.py)."""

    auto = "auto"  # namespaces where the kernel gives them, else limits alone (said aloud)
    namespaces = "namespaces"  # no network, no view of other processes, a file system without the user's files
    limits = "limits"  # resource limits and an audit hook


class LengthUnit(Enum):
    tokens = "tokens"
    characters = "characters"


class FormatStyle(Enum):
    think = "think"  # <think>...</think> and then anything, as TRL's think_format_reward
    think_answer = "think_answer"  # <think>...</think> <answer>...</answer> and nothing else


class DataFormat(Enum):
    """Formats of data files; which of them a stage reads is in rlhf/data/formats.py."""

    auto = "auto"
    text = "text"
    prompt = "prompt"
    prompt_completion = "prompt_completion"
    messages = "messages"
    alpaca = "alpaca"
    sharegpt = "sharegpt"
    preference = "preference"
    implicit_preference = "implicit_preference"
    ultrafeedback = "ultrafeedback"
    hh_rlhf = "hh_rlhf"
    alpaca_preference = "alpaca_preference"
    sharegpt_preference = "sharegpt_preference"
    swift_preference = "swift_preference"
    unpaired = "unpaired"
    sharegpt_unpaired = "sharegpt_unpaired"
    messages_unpaired = "messages_unpaired"


class Recipe(Enum):
    none = "none"
    reviews = "reviews"
    smollm2 = "smollm2"
    gym = "gym"
    arithmetic = "arithmetic"


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Where a run lives and how it starts."""

    name: str = "default"  # directory under run.dir that the stages of one project share
    dir: str = "runs"  # root of all runs
    seed: int = 0  # seeds python, numpy, torch and every sampler
    resume: bool = False  # continue from the last checkpoint of an existing run directory
    overwrite: bool = False  # delete an existing run directory of this stage and start anew
    dry_run: bool = False  # resolve, check and print; load no weights

    def __post_init__(self) -> None:
        _check(self.seed >= 0, "run.seed", self.seed, "an integer of at least 0")
        _check(bool(self.name) and ".." not in self.name, "run.name", self.name, "a directory name without '..'")
        _check(not (self.resume and self.overwrite), "run.overwrite", self.overwrite, "false when run.resume=true")


@dataclass(slots=True, kw_only=True)
class TinyConfig:
    """Shape of ``model=tiny``: a Llama built from a config, with a byte-level BPE tokenizer trained on the stage's text."""

    vocab_size: int = 2000  # tokenizer entries, special tokens included
    hidden_size: int = 128
    intermediate_size: int = 384
    layers: int = 4
    heads: int = 4  # head size = hidden_size / heads; vLLM's CPU attention wants a multiple of 32
    max_positions: int = 512  # tokens; the default stage.max_length and data.max_prompt_length + rollout.max_response_length fit
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        _check(self.vocab_size >= 260, "model.tiny.vocab_size", self.vocab_size, "at least 260 (256 bytes + special tokens)")
        _check(self.hidden_size % self.heads == 0, "model.tiny.hidden_size", self.hidden_size, f"a multiple of heads={self.heads}")
        _check(self.layers >= 1, "model.tiny.layers", self.layers, "at least 1")
        _check(self.max_positions >= 8, "model.tiny.max_positions", self.max_positions, "at least 8 tokens")


@dataclass(slots=True, kw_only=True)
class ModelConfig:
    """The policy's start (SFT, PPO, eval) or the reward model's backbone (reward)."""

    kind: ModelKind = ModelKind.pretrained
    path: str | None = None  # local directory or hub name; tiny: None builds from config
    gguf_file: str | None = None  # file name inside path, when the weights are GGUF
    dtype: Dtype = Dtype.auto  # auto: float32 on CPU, bfloat16 on CUDA
    attn_implementation: str | None = None  # None: transformers' choice (sdpa)
    trust_remote_code: bool = False
    tiny: TinyConfig = field(default_factory=TinyConfig)


@dataclass(slots=True, kw_only=True)
class AdapterConfig:
    """``none`` trains every weight; ``lora`` trains low-rank updates (Hu et al. 2021, arXiv:2106.09685)."""

    kind: AdapterKind = AdapterKind.none
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])  # module names, or all-linear
    rslora: bool = False  # scale by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732)
    dora: bool = False  # weight-decomposed LoRA (Liu et al. 2024, arXiv:2402.09353)
    merge_on_save: bool = False  # SFT: model/ holds merged weights, not the adapter; every other stage writes them whole

    def __post_init__(self) -> None:
        _check(self.rank >= 1, "adapter.rank", self.rank, "at least 1")
        _check(self.alpha > 0, "adapter.alpha", self.alpha, "above 0")
        _check(0.0 <= self.dropout < 1.0, "adapter.dropout", self.dropout, "in [0, 1)")
        _check(len(self.targets) > 0, "adapter.targets", self.targets, "at least one module name")


@dataclass(slots=True, kw_only=True)
class EngineConfig:
    """How weights are updated: one torch process, or DeepSpeed ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054)."""

    kind: EngineKind = EngineKind.torch
    zero_stage: int = 0  # 0..3; only with kind=deepspeed
    offload: Offload = Offload.none  # optimizer (stage >= 1) and weights (stage 3) to CPU or NVMe
    nvme_path: str | None = None  # directory on the NVMe disk, with offload=nvme
    micro_tokens: int = 4096  # online stages: real tokens per micro-batch and rank
    micro_batch_size: int | None = None  # TRL's stages: sequences per micro-batch and rank; None: batch_size / ranks
    gradient_checkpointing: bool = False
    logits_chunk: int = 1024  # response tokens whose logits exist at the same time
    share_prompts: bool | None = None  # online stages without a critic: compute a prompt once for all its responses; None: where the model can
    threads: int | None = None  # torch's threads per rank; None: cores / local ranks

    def __post_init__(self) -> None:
        _check(self.zero_stage in (0, 1, 2, 3), "engine.zero_stage", self.zero_stage, "0, 1, 2 or 3")
        _check(self.micro_tokens >= 1, "engine.micro_tokens", self.micro_tokens, "at least 1 token")
        _check(self.logits_chunk >= 1, "engine.logits_chunk", self.logits_chunk, "at least 1 token")
        _check(self.micro_batch_size is None or self.micro_batch_size >= 1, "engine.micro_batch_size", self.micro_batch_size, "at least 1")
        _check(self.kind is EngineKind.deepspeed or self.zero_stage == 0, "engine.zero_stage", self.zero_stage, "0 with engine=torch")
        _check(self.kind is EngineKind.deepspeed or self.offload is Offload.none, "engine.offload", self.offload.value, "none with engine=torch")
        _check(self.offload is Offload.none or self.zero_stage >= 1, "engine.offload", self.offload.value, "none below ZeRO-1")
        _check(self.offload is not Offload.nvme or self.zero_stage == 3, "engine.offload", self.offload.value, "nvme only with engine=zero3")
        _check(self.offload is not Offload.nvme or self.nvme_path is not None, "engine.nvme_path", self.nvme_path, "a directory with offload=nvme")


@dataclass(slots=True, kw_only=True)
class RolloutConfig:
    """How prompts become responses."""

    backend: RolloutBackend = RolloutBackend.auto  # auto: vllm where it is installed, else hf (said aloud)
    max_response_length: int = 64  # tokens
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    kv_cache_gib: float = 1.0  # vLLM on CPU: KV cache in GiB
    gpu_memory_utilization: float = 0.3  # vLLM on CUDA: its share of the device
    max_num_seqs: int = 256  # sequences decoded at once
    enforce_eager: bool = False  # vLLM on CUDA: no graphs
    lora_sync: LoraSync = LoraSync.auto  # adapter: the engine applies it; merged: full weights; auto: adapter unless DoRA
    gap_tolerance: float | None = None  # nats; None: 1e-4 in float32, 0.05 in half precision
    max_lora_rank: int | None = None  # None: the smallest rank vLLM takes that holds adapter.rank

    def __post_init__(self) -> None:
        _check(self.max_response_length >= 1, "rollout.max_response_length", self.max_response_length, "at least 1 token")
        _check(self.temperature > 0, "rollout.temperature", self.temperature, "above 0")
        _check(0 < self.top_p <= 1, "rollout.top_p", self.top_p, "in (0, 1]")
        _check(self.top_k >= 0, "rollout.top_k", self.top_k, "at least 0 (0: off)")
        _check(self.kv_cache_gib > 0, "rollout.kv_cache_gib", self.kv_cache_gib, "above 0 GiB")
        _check(0 < self.gpu_memory_utilization < 1, "rollout.gpu_memory_utilization", self.gpu_memory_utilization, "in (0, 1)")
        _check(self.max_num_seqs >= 1, "rollout.max_num_seqs", self.max_num_seqs, "at least 1")
        _check(self.gap_tolerance is None or self.gap_tolerance > 0, "rollout.gap_tolerance", self.gap_tolerance, "above 0 nats")


@dataclass(slots=True, kw_only=True)
class RewardTerm:
    """One term of a composed reward: a kind, how it counts, and what the kind needs. To set a field of another kind is an error (reward/terms.py)."""

    kind: TermKind = MISSING
    weight: float = 1.0  # of the value after clip and normalise; 0: logged, but trains nothing
    clip: float | None = None  # the raw value into [-clip, clip], before any statistics
    normalise: bool = False  # by a running mean and standard deviation of the clipped values, over all ranks; in training only
    # -- model
    paths: list[str] = field(default_factory=list)  # directories that stage=reward wrote; several: an ensemble, each put on its held-out scale first
    combine: Combine = Combine.mean
    spread_coef: float = 1.0  # combine=pessimistic: standard deviations subtracted from the mean
    # -- function
    function: str | None = None  # pkg.module:function
    # -- exact, numeric, math, choice, json_schema, instructions, code, gym
    column: str | None = None  # data column that a response is held against; None: answer, schema, constraints, tests, metadata, by kind
    # -- exact, numeric, choice, json_schema: where in the response the answer stands
    marker: str | None = None  # None: by kind; "\\boxed{}": its content; "<tag>": up to "</tag>"; else the rest of the line after it
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
    time_limit_s: float = 5.0  # CPU time of each test; all of a response's tests together have four times as much wall time
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
        _check(math.isfinite(self.weight), f"{key}.weight", self.weight, "a finite number")
        _check(self.clip is None or self.clip > 0, f"{key}.clip", self.clip, "above 0")
        _check(self.spread_coef >= 0, f"{key}.spread_coef", self.spread_coef, "at least 0")
        _check(self.tolerance >= 0, f"{key}.tolerance", self.tolerance, "at least 0")
        letters = len(set(self.letters)) == len(self.letters) >= 2 and self.letters.isalnum() and self.letters == self.letters.upper()
        _check(letters, f"{key}.letters", self.letters, "at least two different capital letters or digits")
        _check(self.time_limit_s > 0, f"{key}.time_limit_s", self.time_limit_s, "above 0 s")
        _check(self.memory_mb >= 64, f"{key}.memory_mb", self.memory_mb, "at least 64 MB, which Python itself needs")
        _check(self.low is None or self.low >= 0, f"{key}.low", self.low, "at least 0")
        _check(self.high is None or self.high >= (self.low or 0), f"{key}.high", self.high, f"at least low={self.low or 0}")
        _check(self.ramp >= 1, f"{key}.ramp", self.ramp, "at least 1")
        _check(self.timeout_s > 0, f"{key}.timeout_s", self.timeout_s, "above 0 s")
        _check(self.retries >= 0, f"{key}.retries", self.retries, "at least 0")
        _check(self.batch_size >= 1, f"{key}.batch_size", self.batch_size, "at least 1")


@dataclass(slots=True, kw_only=True)
class RewardConfig:
    """What scores a response: a reward model's directory, a function with TRL's reward signature, or a weighted sum of terms."""

    path: str | None = None  # directory of a reward model that stage=reward wrote
    function: str | None = None  # pkg.module:function, called as f(prompts=..., completions=...) -> list[float]
    terms: dict[str, RewardTerm] = field(default_factory=dict)  # by name, which becomes the metric reward/<name>
    batch_tokens: int = 8192  # tokens per scoring batch

    def __post_init__(self) -> None:
        _check(self.batch_tokens >= 1, "reward.batch_tokens", self.batch_tokens, "at least 1 token")
        for name in self.terms:
            _check(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None, "reward.terms", name, "names of letters, digits and _")
            _check(name not in _TAKEN, "reward.terms", name, f"a name beside those of samples.jsonl and the metrics ({', '.join(_TAKEN)})")
            self.terms[name].check(f"reward.terms.{name}")


@dataclass(slots=True, kw_only=True)
class GymConfig:
    """``data.recipe=gym``: procedural tasks of reasoning-gym with their verifiers (rlhf/data/gym.py)."""

    tasks: list[str] = field(default_factory=lambda: ["chain_sum"])  # reasoning-gym's names; rows are shared out evenly
    rows: int = 1024  # training prompts, all tasks together
    eval_rows: int = 128  # held-out prompts
    seed: int | None = None  # of the tasks; None: run.seed
    options: dict[str, Any] = field(default_factory=dict)  # by task, its own options: +data.gym.options.chain_sum.max_terms=3
    suffix: str = ""  # after each question, such as how to write the answer
    chat: bool = False  # prompts as messages, for a policy with a chat template
    system: str | None = None  # system message, with chat

    def __post_init__(self) -> None:
        _check(len(self.tasks) > 0 and len(set(self.tasks)) == len(self.tasks), "data.gym.tasks", self.tasks, "at least one task, each once")
        _check(self.rows >= len(self.tasks), "data.gym.rows", self.rows, f"at least one for each of {len(self.tasks)} tasks")
        _check(self.eval_rows >= 1, "data.gym.eval_rows", self.eval_rows, "at least 1")
        _check(set(self.options) <= set(self.tasks), "data.gym.options", sorted(self.options), f"options of the tasks {', '.join(self.tasks)}")
        _check(all(isinstance(o, dict) for o in self.options.values()), "data.gym.options", self.options, "a dictionary for each task")
        _check(self.chat or self.system is None, "data.gym.system", self.system, "null without data.gym.chat=true")


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Where rows come from. ``recipe`` builds them from a package's own data under ``<run.dir>/<run.name>/data``."""

    path: str | None = None  # JSON, JSONL, CSV or Parquet
    eval_path: str | None = None  # held-out rows; None: eval_fraction of path
    format: DataFormat = DataFormat.auto  # auto: detected by the columns, and said aloud
    recipe: Recipe = Recipe.none
    gym: GymConfig = field(default_factory=GymConfig)
    eval_fraction: float = 0.1  # of data.path, when there is no eval_path
    max_rows: int | None = None  # the first rows only
    max_bad_rows: int = 0  # rows that may not fit before the run stops
    chat_template: str | None = None  # file with a Jinja template for a tokenizer without one
    max_prompt_length: int = 256  # tokens; longer prompts are an error unless truncate_prompts
    truncate_prompts: bool = False  # keep the last max_prompt_length tokens

    def __post_init__(self) -> None:
        _check(0 < self.eval_fraction < 1, "data.eval_fraction", self.eval_fraction, "in (0, 1)")
        _check(self.max_rows is None or self.max_rows >= 1, "data.max_rows", self.max_rows, "at least 1")
        _check(self.max_bad_rows >= 0, "data.max_bad_rows", self.max_bad_rows, "at least 0")
        _check(self.max_prompt_length >= 1, "data.max_prompt_length", self.max_prompt_length, "at least 1 token")


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
        _check(self.samples_every >= 0, "tracking.samples_every", self.samples_every, "at least 0")


@dataclass(slots=True, kw_only=True)
class TrainStage:
    """What every training stage has."""

    name: str = MISSING
    steps: int | None = None  # optimizer steps (SFT, reward) or online iterations (ppo); None: from epochs
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    scheduler: Scheduler = Scheduler.cosine
    warmup_ratio: float = 0.05  # share of the steps with a rising learning rate
    max_grad_norm: float = 1.0  # 0: no clipping
    save_steps: int = 0  # steps between checkpoints; 0: only the best and the last where the stage keeps them

    def __post_init__(self) -> None:
        _check(self.steps is None or self.steps >= 1, "stage.steps", self.steps, "at least 1")
        _check(self.learning_rate > 0, "stage.learning_rate", self.learning_rate, "above 0")
        _check(self.weight_decay >= 0, "stage.weight_decay", self.weight_decay, "at least 0")
        _check(0 <= self.adam_beta1 < 1, "stage.adam_beta1", self.adam_beta1, "in [0, 1)")
        _check(0 <= self.adam_beta2 < 1, "stage.adam_beta2", self.adam_beta2, "in [0, 1)")
        _check(self.adam_eps > 0, "stage.adam_eps", self.adam_eps, "above 0")
        _check(0 <= self.warmup_ratio <= 1, "stage.warmup_ratio", self.warmup_ratio, "in [0, 1]")
        _check(self.max_grad_norm >= 0, "stage.max_grad_norm", self.max_grad_norm, "at least 0 (0: no clipping)")
        _check(self.save_steps >= 0, "stage.save_steps", self.save_steps, "at least 0")


@dataclass(slots=True, kw_only=True)
class OfflineStage(TrainStage):
    """What the stages on TRL's trainers share."""

    epochs: float = 1.0  # passes over the data when steps is None
    batch_size: int = 32  # sequences (SFT) or pairs (reward) per optimizer step, over all ranks
    max_length: int = 512  # tokens of prompt + response
    eval_steps: int = 50  # steps between evaluations
    patience: int | None = None  # evaluations without improvement before stopping; None: never
    log_steps: int = 1  # steps between metric lines

    def __post_init__(self) -> None:
        # slots=True makes a new class, so super() without arguments would not find it
        super(OfflineStage, self).__post_init__()
        _check(self.epochs > 0, "stage.epochs", self.epochs, "above 0")
        _check(self.batch_size >= 1, "stage.batch_size", self.batch_size, "at least 1")
        _check(self.max_length >= 2, "stage.max_length", self.max_length, "at least 2 tokens")
        _check(self.eval_steps >= 1, "stage.eval_steps", self.eval_steps, "at least 1")
        _check(self.patience is None or self.patience >= 1, "stage.patience", self.patience, "at least 1")
        _check(self.log_steps >= 1, "stage.log_steps", self.log_steps, "at least 1")


@dataclass(slots=True, kw_only=True)
class SFTStage(OfflineStage):
    """Supervised fine-tuning on TRL's SFTTrainer."""

    name: str = "sft"
    completion_only: bool = True  # loss on completions (assistant turns) only, where rows have prompts
    packing: bool = False


@dataclass(slots=True, kw_only=True)
class RewardStage(OfflineStage):
    """Pairwise reward model (Bradley-Terry) on TRL's RewardTrainer."""

    name: str = "reward"
    margin: bool = False  # subtract each row's `margin` from the score difference (Llama 2, arXiv:2307.09288)
    centering_coef: float = 0.0  # weight of (chosen + rejected)^2 (Eisenstein et al. 2023, arXiv:2312.09244)
    bootstrap: int = 1000  # resamples for the accuracy's 95 % interval

    def __post_init__(self) -> None:
        super(RewardStage, self).__post_init__()
        _check(self.centering_coef >= 0, "stage.centering_coef", self.centering_coef, "at least 0")
        _check(self.bootstrap >= 1, "stage.bootstrap", self.bootstrap, "at least 1")


_SMOOTHED = (PreferenceLoss.robust, PreferenceLoss.exo_pair, PreferenceLoss.aot, PreferenceLoss.aot_unpaired)
# f-DPO's rewards hold a term that only the difference of the two sides cancels; TRL refuses the other losses, too.
_OF_DIFFERENCES = (
    PreferenceLoss.sigmoid,
    PreferenceLoss.sigmoid_norm,
    PreferenceLoss.hinge,
    PreferenceLoss.ipo,
    PreferenceLoss.exo_pair,
    PreferenceLoss.robust,
    PreferenceLoss.discopop,
    PreferenceLoss.sft,
)


@dataclass(slots=True, kw_only=True)
class PreferenceStage(OfflineStage):
    """Direct preference optimisation from pairs, against a frozen reference, on TRL's DPOTrainer."""

    name: str = "dpo"
    learning_rate: float = 1e-6
    losses: list[PreferenceLoss] = field(default_factory=lambda: [PreferenceLoss.sigmoid])  # their weighted sum is minimised
    weights: list[float] | None = None  # one per loss; None: 1 each
    beta: float = 0.1  # strength of the tie to the reference; ipo: the paper's tau
    label_smoothing: float = 0.0  # robust, aot: share of labels taken to be flipped; exo_pair: the paper's epsilon
    f_divergence: FDivergence = FDivergence.reverse_kl
    f_alpha: float | None = None  # f_divergence=alpha_divergence; None: 0.5
    ld_alpha: float | None = None  # weight of tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411); None: 1
    discopop_tau: float = 0.05  # temperature of the discopop loss

    def __post_init__(self) -> None:
        super(PreferenceStage, self).__post_init__()
        names = [loss.value for loss in self.losses]
        _check(len(names) > 0, "stage.losses", names, "at least one loss")
        _check(len(set(names)) == len(names), "stage.losses", names, "each loss once; stage.weights says how much of it")
        if self.weights is not None:
            _check(len(self.weights) == len(names), "stage.weights", self.weights, f"one weight for each of {len(names)} losses")
            fits = all(weight >= 0 for weight in self.weights) and any(weight > 0 for weight in self.weights)
            _check(fits, "stage.weights", self.weights, "weights of at least 0, one of them above 0")
        _check(self.beta > 0, "stage.beta", self.beta, "above 0")
        _check(0 <= self.label_smoothing < 0.5, "stage.label_smoothing", self.label_smoothing, "in [0, 0.5)")
        smoothed = any(loss in _SMOOTHED for loss in self.losses)
        what = f"0 with losses={names}: only {', '.join(loss.value for loss in _SMOOTHED)} read it"
        _check(smoothed or self.label_smoothing == 0, "stage.label_smoothing", self.label_smoothing, what)
        exo = PreferenceLoss.exo_pair in self.losses
        _check(not exo or self.label_smoothing > 0, "stage.label_smoothing", self.label_smoothing, "above 0 with exo_pair, which takes its logarithm")
        if self.f_divergence is not FDivergence.reverse_kl:
            what = f"reverse_kl with losses={names}: another divergence is defined for {', '.join(loss.value for loss in _OF_DIFFERENCES)} only"
            _check(all(loss in _OF_DIFFERENCES for loss in self.losses), "stage.f_divergence", self.f_divergence.value, what)
        alpha = self.f_divergence is FDivergence.alpha_divergence
        _check(self.f_alpha is None or alpha, "stage.f_alpha", self.f_alpha, "null without f_divergence=alpha_divergence")
        _check(self.ld_alpha is None or 0 <= self.ld_alpha <= 1, "stage.ld_alpha", self.ld_alpha, "in [0, 1]")
        _check(self.discopop_tau > 0, "stage.discopop_tau", self.discopop_tau, "above 0")


@dataclass(slots=True, kw_only=True)
class KTOStage(OfflineStage):
    """Preference optimisation from single answers, each judged good or bad, on TRL's KTOTrainer."""

    name: str = "kto"
    learning_rate: float = 1e-6
    loss: KTOLoss = KTOLoss.kto
    beta: float = 0.1  # strength of the tie to the reference
    desirable_weight: float = 1.0  # of the good answers' losses
    undesirable_weight: float = 1.0  # of the bad answers' losses

    def __post_init__(self) -> None:
        super(KTOStage, self).__post_init__()
        _check(self.beta > 0, "stage.beta", self.beta, "above 0")
        _check(self.desirable_weight > 0, "stage.desirable_weight", self.desirable_weight, "above 0")
        _check(self.undesirable_weight > 0, "stage.undesirable_weight", self.undesirable_weight, "above 0")


@dataclass(slots=True, kw_only=True)
class CPOStage(OfflineStage):
    """Preference optimisation from pairs without a reference, on TRL's CPOTrainer: CPO and SimPO."""

    name: str = "cpo"
    learning_rate: float = 1e-6
    loss: CPOLoss = CPOLoss.sigmoid
    beta: float = 0.1  # scale of the log-probabilities' difference; ipo: the paper's tau
    nll_coef: float = 1.0  # weight of the chosen answers' negative log-likelihood per token
    gamma: float = 0.0  # simpo: the target margin between the scaled rewards
    label_smoothing: float = 0.0  # sigmoid, simpo: share of labels taken to be flipped

    def __post_init__(self) -> None:
        super(CPOStage, self).__post_init__()
        _check(self.beta > 0, "stage.beta", self.beta, "above 0")
        _check(self.nll_coef >= 0, "stage.nll_coef", self.nll_coef, "at least 0")
        _check(self.gamma >= 0, "stage.gamma", self.gamma, "at least 0")
        simpo = self.loss is CPOLoss.simpo
        _check(simpo or self.gamma == 0, "stage.gamma", self.gamma, f"0 with loss={self.loss.value}: only simpo has a target margin")
        _check(0 <= self.label_smoothing < 0.5, "stage.label_smoothing", self.label_smoothing, "in [0, 0.5)")
        smoothed = self.loss in (CPOLoss.sigmoid, CPOLoss.simpo)
        what = f"0 with loss={self.loss.value}: only sigmoid and simpo read it"
        _check(smoothed or self.label_smoothing == 0, "stage.label_smoothing", self.label_smoothing, what)


@dataclass(slots=True, kw_only=True)
class ORPOStage(OfflineStage):
    """Fine-tuning and preference in one loss, from pairs without a reference, on TRL's ORPOTrainer."""

    name: str = "orpo"
    learning_rate: float = 5e-6
    beta: float = 0.1  # weight of the odds-ratio term, the paper's lambda

    def __post_init__(self) -> None:
        super(ORPOStage, self).__post_init__()
        _check(self.beta > 0, "stage.beta", self.beta, "above 0")


@dataclass(slots=True, kw_only=True)
class WatchConfig:
    """Looks at the reward from outside while it trains; a rule that holds warns or stops the run (Gao et al. 2022, arXiv:2210.10760)."""

    judge_path: str | None = None  # directory of a second reward model, trained with another seed or on other pairs
    judge_function: str | None = None  # pkg.module:function with the signature of reward.function
    judge_every: int = 10  # steps between judgements of held-out responses; the start is judged too
    judge_prompts: int = 64  # held-out prompts per judgement, the same each time
    window: int = 10  # steps: the last ones for the length rule, the first ones for the entropy to compare with
    divergence: Action = Action.warn  # the score rises and the judge falls; without a judge the rule has nothing to look at
    divergence_judgements: int = 3  # last judgements over which both trends are measured
    divergence_sd: float = 2.0  # standard errors over the held-out prompts by which each trend has to differ from 0
    kl: Action = Action.off
    kl_max: float = 50.0  # nats per response
    length: Action = Action.warn
    length_share: float = 0.9  # share of responses cut off at rollout.max_response_length, over the window
    entropy: Action = Action.warn
    entropy_share: float = 0.05  # of the first steps' entropy

    def __post_init__(self) -> None:
        _check(self.judge_path is None or self.judge_function is None, "stage.watch.judge_function", self.judge_function, "null beside judge_path")
        _check(self.judge_every >= 1, "stage.watch.judge_every", self.judge_every, "at least 1 step")
        _check(self.judge_prompts >= 2, "stage.watch.judge_prompts", self.judge_prompts, "at least 2")
        _check(self.window >= 1, "stage.watch.window", self.window, "at least 1 step")
        _check(self.divergence_judgements >= 2, "stage.watch.divergence_judgements", self.divergence_judgements, "at least 2")
        _check(self.divergence_sd >= 0, "stage.watch.divergence_sd", self.divergence_sd, "at least 0")
        _check(self.kl_max > 0, "stage.watch.kl_max", self.kl_max, "above 0 nats")
        _check(0 < self.length_share <= 1, "stage.watch.length_share", self.length_share, "in (0, 1]")
        _check(0 < self.entropy_share < 1, "stage.watch.entropy_share", self.entropy_share, "in (0, 1)")


@dataclass(slots=True, kw_only=True)
class OnlineStage(TrainStage):
    """The online loop: rollouts, scores, update. Algorithms are presets over these choices; the defaults are PPO's."""

    name: str = "ppo"
    steps: int | None = 100
    prompts_per_step: int = 64  # over all ranks
    samples_per_prompt: int = 1
    epochs: int = 2  # passes over one step's rollouts
    minibatches: int = 1  # optimizer steps per pass
    scheduler: Scheduler = Scheduler.constant
    # -- what is learned from a score
    advantage: Advantage = Advantage.gae
    advantage_std: bool = True  # group: divide by the group's standard deviation
    group_baseline: bool = False  # reinforce_pp: subtract the group's mean score first (REINFORCE++-baseline)
    policy_loss: PolicyLoss = PolicyLoss.clip
    aggregation: Aggregation = Aggregation.token
    constant_length: int | None = None  # tokens, aggregation=constant; None: rollout.max_response_length
    selection: Selection = Selection.all
    resample: int = 3  # further draws of prompts per step, selection=unequal
    # -- the critic, advantage=gae
    critic_learning_rate: float = 1e-4
    critic_init: CriticInit = CriticInit.reward
    critic_adapter: bool = False  # LoRA critic with the adapter group's shape
    critic_warmup: int = 0  # first steps that train the critic only
    gamma: float = 1.0
    gae_lambda: float = 1.0
    cliprange_value: float = 0.2
    vf_coef: float = 1.0
    # -- the distance from the reference
    kl_coef: float = 0.05  # weight of the KL penalty per token; above 0 it needs a reference
    kl_place: KLPlace = KLPlace.reward
    kl_estimator: KLEstimator = KLEstimator.k1  # in the reward, and of objective/kl
    kl_loss_estimator: KLEstimator = KLEstimator.k3_weighted  # in the loss
    kl_controller: KLController = KLController.fixed
    kl_target: float = 6.0  # nats per response, adaptive control (Ziegler et al. 2019, arXiv:1909.08593)
    kl_horizon: int = 10000  # responses, adaptive control
    reference: bool = True  # keep a frozen start (or the adapter off) to measure KL against
    reference_every: int = 0  # steps between moves of the reference towards the policy (Gorbatovski et al. 2024, arXiv:2404.09656); 0: it stays
    reference_mix: float = 0.6  # the policy's share of a moved reference's weights
    # -- the policy's loss
    cliprange: float = 0.2
    cliprange_high: float | None = None  # upper bound 1 + this; None: cliprange. cispo: the ratio's upper bound is 1 + this
    dual_clip: float | None = None  # lower bound for negative advantages (Ye et al. 2020, arXiv:1912.09729)
    entropy_coef: float = 0.0
    dpo_beta: float = 0.1  # policy_loss=dpo
    dpo_losses: list[PreferenceLoss] = field(default_factory=lambda: [PreferenceLoss.sigmoid])
    dpo_weights: list[float] | None = None  # one per loss; None: 1 each
    label_smoothing: float = 0.0  # policy_loss=dpo: robust, exo_pair
    importance_cap: float | None = None  # importance correction between sampler and trainer; None: none
    importance_mode: ImportanceMode = ImportanceMode.truncate  # above the cap: cut to it, or leave the token (sequence) out
    importance_level: Level = Level.token
    # -- scores before the update
    whiten_advantages: bool = True
    whiten_rewards: bool = False  # divided by the standard deviation; the mean is scaled, not subtracted
    reward_clip: float | None = None  # raw scores into [-clip, clip], before any statistics
    reward_normalise: bool = False  # by a running mean and standard deviation of the scores
    stop_kl: float | None = None  # nats per token between old and new policy that ends a step's update early
    truncation_penalty: float = 0.0  # subtracted from the score of a response that hit the length limit
    overlong_buffer: int = 0  # tokens before the limit over which the penalty below grows (Yu et al. 2025, arXiv:2503.14476); 0: off
    overlong_penalty: float = 1.0  # subtracted at the limit
    mask_truncated: bool = False  # responses that hit the limit give no gradient
    samples_kept: int = 8  # rollouts written to samples.jsonl per step
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        super(OnlineStage, self).__post_init__()
        _check(self.steps is not None, "stage.steps", self.steps, "a number of online iterations")
        _check(self.prompts_per_step >= 1, "stage.prompts_per_step", self.prompts_per_step, "at least 1")
        _check(self.samples_per_prompt >= 1, "stage.samples_per_prompt", self.samples_per_prompt, "at least 1")
        _check(self.epochs >= 1, "stage.epochs", self.epochs, "at least 1")
        _check(self.minibatches >= 1, "stage.minibatches", self.minibatches, "at least 1")
        _check(self.constant_length is None or self.constant_length >= 1, "stage.constant_length", self.constant_length, "at least 1 token")
        _check(self.resample >= 0, "stage.resample", self.resample, "at least 0")
        _check(self.critic_learning_rate > 0, "stage.critic_learning_rate", self.critic_learning_rate, "above 0")
        _check(self.critic_warmup >= 0, "stage.critic_warmup", self.critic_warmup, "at least 0")
        _check(self.kl_coef >= 0, "stage.kl_coef", self.kl_coef, "at least 0")
        _check(self.kl_target > 0, "stage.kl_target", self.kl_target, "above 0 nats")
        _check(self.kl_horizon >= 1, "stage.kl_horizon", self.kl_horizon, "at least 1 response")
        _check(self.reference_every >= 0, "stage.reference_every", self.reference_every, "at least 0 steps")
        _check(0 < self.reference_mix <= 1, "stage.reference_mix", self.reference_mix, "in (0, 1]")
        _check(0 < self.gamma <= 1, "stage.gamma", self.gamma, "in (0, 1]")
        _check(0 <= self.gae_lambda <= 1, "stage.gae_lambda", self.gae_lambda, "in [0, 1]")
        _check(self.cliprange > 0, "stage.cliprange", self.cliprange, "above 0")
        _check(self.cliprange_high is None or self.cliprange_high > 0, "stage.cliprange_high", self.cliprange_high, "above 0")
        _check(self.cliprange_value > 0, "stage.cliprange_value", self.cliprange_value, "above 0")
        _check(self.dual_clip is None or self.dual_clip > 1, "stage.dual_clip", self.dual_clip, "above 1")
        _check(self.vf_coef >= 0, "stage.vf_coef", self.vf_coef, "at least 0")
        _check(self.dpo_beta > 0, "stage.dpo_beta", self.dpo_beta, "above 0")
        _check(0 <= self.label_smoothing < 0.5, "stage.label_smoothing", self.label_smoothing, "in [0, 0.5)")
        _check(self.reward_clip is None or self.reward_clip > 0, "stage.reward_clip", self.reward_clip, "above 0")
        _check(self.stop_kl is None or self.stop_kl > 0, "stage.stop_kl", self.stop_kl, "above 0 nats")
        _check(self.truncation_penalty >= 0, "stage.truncation_penalty", self.truncation_penalty, "at least 0")
        _check(self.overlong_buffer >= 0, "stage.overlong_buffer", self.overlong_buffer, "at least 0 tokens")
        _check(self.overlong_penalty >= 0, "stage.overlong_penalty", self.overlong_penalty, "at least 0")
        _check(self.importance_cap is None or self.importance_cap >= 1, "stage.importance_cap", self.importance_cap, "at least 1")
        _check(self.samples_kept >= 0, "stage.samples_kept", self.samples_kept, "at least 0")
        self._check_kl()
        self._check_groups()
        self._check_pairs()
        rollouts = self.prompts_per_step * self.samples_per_prompt
        _check(
            self.selection in (Selection.best, Selection.best_worst) or rollouts % self.minibatches == 0,
            "stage.minibatches",
            self.minibatches,
            f"a divisor of prompts_per_step x samples_per_prompt = {rollouts}",
        )

    def _check_kl(self) -> None:
        _check(
            self.kl_estimator is not KLEstimator.k3_weighted,
            "stage.kl_estimator",
            self.kl_estimator.value,
            "k1, k2 or k3: a reward has no ratio to weigh by",
        )
        if self.kl_place is not KLPlace.reward:
            _check(
                self.kl_loss_estimator is not KLEstimator.k1,
                "stage.kl_loss_estimator",
                self.kl_loss_estimator.value,
                "k2, k3 or k3_weighted: the gradient of k1 in a loss has zero mean, so it penalises nothing",
            )
        if self.kl_controller is KLController.adaptive:
            rollouts = self.prompts_per_step * self.samples_per_prompt
            _check(self.kl_coef > 0, "stage.kl_coef", self.kl_coef, "above 0 with kl_controller=adaptive, which only scales it")
            # One step scales the coefficient by at least 1 - 0.2 x responses / horizon, which must stay positive.
            _check(5 * self.kl_horizon > rollouts, "stage.kl_horizon", self.kl_horizon, f"above a fifth of the {rollouts} responses per step")

    def _check_groups(self) -> None:
        compared = self.advantage in (Advantage.group, Advantage.leave_one_out) or self.group_baseline or self.selection is not Selection.all
        what = f"at least 2 with advantage={self.advantage.value}, selection={self.selection.value}: a response alone has nothing to compare with"
        _check(not compared or self.samples_per_prompt >= 2, "stage.samples_per_prompt", self.samples_per_prompt, what)
        narrowed = self.selection in (Selection.best, Selection.best_worst)
        _check(
            not narrowed or self.advantage is Advantage.none,
            "stage.advantage",
            self.advantage.value,
            f"none with selection={self.selection.value}, which leaves nothing of a group to compare with",
        )
        _check(
            not self.group_baseline or self.advantage is Advantage.reinforce_pp,
            "stage.group_baseline",
            self.group_baseline,
            "false without advantage=reinforce_pp",
        )

    def _check_pairs(self) -> None:
        dpo = self.policy_loss is PolicyLoss.dpo
        _check(
            dpo == (self.selection is Selection.best_worst),
            "stage.selection",
            self.selection.value,
            "best_worst with policy_loss=dpo, which learns from pairs, and something else without it",
        )
        if not dpo:
            return
        _check(self.reference, "stage.reference", self.reference, "true with policy_loss=dpo")
        _check(not self.mask_truncated, "stage.mask_truncated", self.mask_truncated, "false with policy_loss=dpo: a pair has two sides")
        _check(self.kl_place is KLPlace.reward, "stage.kl_place", self.kl_place.value, "reward with policy_loss=dpo, whose beta is its KL penalty")
        _check(len(self.dpo_losses) > 0, "stage.dpo_losses", self.dpo_losses, "at least one loss")
        whole = (PreferenceLoss.aot, PreferenceLoss.aot_unpaired)
        _check(
            not any(loss in whole for loss in self.dpo_losses),
            "stage.dpo_losses",
            [loss.value for loss in self.dpo_losses],
            "losses of single pairs: aot and aot_unpaired sort a whole batch, which micro-batches never see at once (stage=dpo has them)",
        )
        smooth = PreferenceLoss.exo_pair in self.dpo_losses
        _check(
            not smooth or self.label_smoothing > 0, "stage.label_smoothing", self.label_smoothing, "above 0 with exo_pair, which takes its logarithm"
        )
        count = len(self.dpo_losses)
        _check(
            self.dpo_weights is None or len(self.dpo_weights) == count,
            "stage.dpo_weights",
            self.dpo_weights,
            f"one weight for each of {count} losses",
        )


@dataclass(slots=True, kw_only=True)
class EvalStage:
    """Two policies on the same held-out prompts: reward model, outside judges, KL, length, diversity."""

    name: str = "eval"
    before: str | None = None  # model directory of the starting policy
    after: str | None = None  # model directory of the trained policy
    prompts: int = 256
    samples_per_prompt: int = 1
    greedy: bool = False  # the most likely token each time instead of sampling; KL is then along these responses
    judges: list[Judge] = field(default_factory=list)
    judge_path: str | None = None  # labelled texts (text, label) that train the classifier judge
    judge_function: str | None = None  # pkg.module:function for the function judge
    bootstrap: int = 1000
    shown: int = 4  # samples side by side

    def __post_init__(self) -> None:
        _check(self.prompts >= 2, "stage.prompts", self.prompts, "at least 2")
        _check(self.samples_per_prompt >= 1, "stage.samples_per_prompt", self.samples_per_prompt, "at least 1")
        _check(
            not self.greedy or self.samples_per_prompt == 1,
            "stage.samples_per_prompt",
            self.samples_per_prompt,
            "1 with greedy=true, whose responses are all the same",
        )
        _check(self.bootstrap >= 1, "stage.bootstrap", self.bootstrap, "at least 1")
        _check(self.shown >= 0, "stage.shown", self.shown, "at least 0")


@dataclass(slots=True, kw_only=True)
class ServeRewardStage:
    """Serves the reward model of reward.path over HTTP, for reward terms of kind remote."""

    name: str = "serve_reward"
    host: str = "127.0.0.1"  # address to bind to; any other than this machine's own needs token_env
    port: int = 8100  # 0: any free one
    token_env: str | None = None  # environment variable that holds the bearer token; None: one is made and printed at the start
    max_batch: int = 256  # items in one request, and items of several requests that the model scores together
    max_body_mib: float = 16.0  # MiB of one request
    max_waiting: int = 64  # requests that wait for the model; more are sent away with 503 and Retry-After
    grace_s: int = 30  # seconds that open requests get after SIGTERM or Ctrl-C
    log_every_s: float = 10.0  # seconds between lines of metrics.jsonl

    def __post_init__(self) -> None:
        own = self.host in ("127.0.0.1", "localhost", "::1")
        _check(bool(self.host), "stage.host", self.host, "an address, such as 127.0.0.1")
        _check(
            own or self.token_env is not None, "stage.token_env", self.token_env, f"the name of an environment variable with stage.host={self.host}"
        )
        _check(0 <= self.port <= 65535, "stage.port", self.port, "in [0, 65535]")
        _check(self.max_batch >= 1, "stage.max_batch", self.max_batch, "at least 1 item")
        _check(self.max_body_mib > 0, "stage.max_body_mib", self.max_body_mib, "above 0 MiB")
        _check(self.max_waiting >= 1, "stage.max_waiting", self.max_waiting, "at least 1 request")
        _check(self.grace_s >= 1, "stage.grace_s", self.grace_s, "at least 1 second")
        _check(self.log_every_s > 0, "stage.log_every_s", self.log_every_s, "above 0 seconds")


@dataclass(slots=True, kw_only=True)
class DoctorStage:
    """Versions, devices, memory, engines: usable, or why not."""

    name: str = "doctor"


@dataclass(slots=True, kw_only=True)
class ChainStage:
    """Runs other stages one after the other, each in a process of its own, with the same overrides."""

    name: str = "chain"
    stages: list[str] = field(default_factory=lambda: ["sft", "reward", "ppo", "eval"])

    def __post_init__(self) -> None:
        _check(len(self.stages) > 0, "stage.stages", self.stages, "at least one stage")


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
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


STAGES: dict[str, type] = {
    "sft": SFTStage,
    "reward": RewardStage,
    "dpo": PreferenceStage,
    "kto": KTOStage,
    "cpo": CPOStage,
    "orpo": ORPOStage,
    "ppo": OnlineStage,
    "eval": EvalStage,
    "serve_reward": ServeRewardStage,
    "doctor": DoctorStage,
    "chain": ChainStage,
}
