"""The options' named choices; formats of rows are in conf/data.py. Standard library only."""

from enum import Enum


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
    adalora = "adalora"
    gelora = "gelora"
    lora_mini = "lora_mini"
    rasa = "rasa"
    molora = "molora"
    bottleneck = "bottleneck"
    ia3 = "ia3"
    vera = "vera"
    oft = "oft"
    prompt = "prompt"
    ptuning = "ptuning"
    prefix = "prefix"


class LoraInit(Enum):
    default = "default"  # A random, B 0
    gaussian = "gaussian"
    orthogonal = "orthogonal"
    pissa = "pissa"
    olora = "olora"
    eva = "eva"
    loftq = "loftq"
    corda = "corda"


class Quantization(Enum):
    none = "none"
    nf4 = "nf4"
    int8 = "int8"


class Placement(Enum):
    houlsby = "houlsby"  # behind the attention and behind the feed-forward layer
    pfeiffer = "pfeiffer"  # behind the feed-forward layer
    parallel = "parallel"  # beside the feed-forward layer


class Carrier(Enum):
    lora = "lora"  # two matrices a layer, which generators apply themselves
    merged = "merged"  # whole weights
    modules = "modules"  # layers of its own inside the engine
    embeds = "embeds"  # rows in front of the prompt's embeddings
    hf = "hf"  # no way to vLLM: transformers generates


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
    server = "server"
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
    cosine_restarts = "cosine_restarts"
    polynomial = "polynomial"
    inverse_sqrt = "inverse_sqrt"
    warmup_stable_decay = "warmup_stable_decay"
    plateau = "plateau"  # constant until a figure stalls


class RateCoupling(Enum):
    none = "none"
    linear = "linear"
    square_root = "square_root"


class DecayShape(Enum):
    linear = "linear"
    cosine = "cosine"
    square_root = "square_root"


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
    unequal = "unequal"  # groups whose scores differ; more prompts replace the others
    best = "best"  # the best response of each group
    best_worst = "best_worst"  # the best and the worst of each group, as a pair


class ImportanceMode(Enum):
    truncate = "truncate"
    mask = "mask"


class Level(Enum):
    token = "token"
    sequence = "sequence"


class RewrittenTurns(Enum):
    """What becomes of a conversation of which the chat template renders earlier answers otherwise
    once other turns follow.
    """

    split = "split"
    refuse = "refuse"


class PreferenceLoss(Enum):
    """Losses of TRL's DPOTrainer, by its names (policy/preference.py says what takes pairs)."""

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
    """What DPO keeps policy and reference close by, in TRL's names (arXiv:2309.16240)."""

    reverse_kl = "reverse_kl"
    forward_kl = "forward_kl"
    js_divergence = "js_divergence"
    alpha_divergence = "alpha_divergence"


class KTOLoss(Enum):
    """Losses of TRL's KTOTrainer, by its names."""

    kto = "kto"
    # APO-zero (arXiv:2408.06266) for single answers; no KL estimate
    apo_zero_unpaired = "apo_zero_unpaired"


class CPOLoss(Enum):
    """Losses of TRL's CPOTrainer, by its names."""

    sigmoid = "sigmoid"
    hinge = "hinge"
    ipo = "ipo"  # of the log-probability per token
    simpo = "simpo"  # of the log-probability per token, with a target margin


class Rule(Enum):
    """What the watch looks for (rlhf/online/watch.py)."""

    divergence = "divergence"  # the score rises while the held-out judge falls
    kl = "kl"  # nats per response above a limit
    length = "length"  # too many responses at the length limit
    entropy = "entropy"  # the entropy has collapsed


class Action(Enum):
    off = "off"
    warn = "warn"
    stop = "stop"


class OnNonFinite(Enum):
    """What follows from a score, loss or gradient that is NaN, infinite or (where a limit is set) a
    spike.
    """

    stop = "stop"  # the run ends
    skip = "skip"  # the update is left out
    rewind = "rewind"  # back to the last checkpoint, and on with other prompts


class KLController(Enum):
    fixed = "fixed"
    adaptive = "adaptive"


class CriticInit(Enum):
    reward = "reward"
    policy = "policy"


class Judge(Enum):
    llm = "llm"
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
    regex = "regex"  # a pattern that the response must contain
    json_schema = "json_schema"  # JSON that a schema allows
    instructions = "instructions"  # the row's constraints
    code = "code"  # Python that passes the row's tests
    gym = "gym"  # a reasoning-gym task, by its own verifier
    length = "length"  # a band of lengths
    format = "format"  # a pattern that the whole response has to match
    remote = "remote"  # a reward model behind HTTP
    environment = "environment"  # the rewards of an episode's turns, added up


class Combine(Enum):
    """One score from several reward models' (Coste et al. 2023, arXiv:2310.02743)."""

    mean = "mean"
    minimum = "minimum"
    pessimistic = "pessimistic"  # mean - spread_coef x standard deviation


class Isolation(Enum):
    """How code that a policy wrote is kept apart (reward/sandbox/run.py)."""

    auto = "auto"  # namespaces where the kernel gives them, else limits alone, which is logged
    # no network, no view of other processes, a file system without the user's files
    namespaces = "namespaces"
    limits = "limits"  # resource limits and an audit hook


class LengthUnit(Enum):
    tokens = "tokens"
    characters = "characters"


class FormatStyle(Enum):
    think = "think"  # <think>...</think> and then anything, as TRL's think_format_reward
    think_answer = "think_answer"  # <think>...</think> <answer>...</answer> and nothing else


class FileKind(Enum):
    """Files that rows are written to."""

    jsonl = "jsonl"
    json = "json"
    csv = "csv"
    parquet = "parquet"
    xlsx = "xlsx"


class DataKind(Enum):
    """What rows are to stage=data (rlhf.data.formats.Use)."""

    auto = "auto"
    sft = "sft"
    preference = "preference"
    unpaired = "unpaired"
    prompt = "prompt"


class Recipe(Enum):
    none = "none"
    reviews = "reviews"
    smollm2 = "smollm2"
    films = "films"
    gym = "gym"
    arithmetic = "arithmetic"
    safety = "safety"


class TaskClass(Enum):
    """How hard the task is that the rows teach: what the report asks for in rows."""

    simple = "simple"  # 1,000 to 5,000 rows, such as one style or one label
    medium = "medium"  # 5,000 to 20,000
    complex = "complex"  # 20,000 and more, such as open conversation


# `import` can't be written as an attribute, hence the functional form: tasks for people go out,
# their labels come back.
LabelMode = Enum("LabelMode", [("export", "export"), ("import", "import")])


class LabelKind(Enum):
    """What a task asks."""

    pair = "pair"  # which of two answers is better
    ranking = "ranking"  # the order of several answers


class LabelTarget(Enum):
    """What tasks are written for, and what labels are read from."""

    page = "page"  # an HTML file for a person with a browser
    label_studio = "label_studio"
    argilla = "argilla"
    csv = "csv"
    xlsx = "xlsx"
    jsonl = "jsonl"


class ChoiceMethod(Enum):
    """How pairs are chosen under a budget."""

    random = "random"
    # the reward model's margin nearest to zero; with an ensemble, its members' spread counts too
    uncertainty = "uncertainty"
    diversity = "diversity"  # a pair for each cluster of prompts
    uncertain_diverse = "uncertain_diverse"  # the most uncertain pair of each cluster of prompts


class Strength(Enum):
    """What a pair's strength becomes in the preference data."""

    none = "none"
    margin = "margin"  # column margin, for stage.margin=true
    # column soft_label, the probability that chosen is better, for stage.soft_label=true
    soft_label = "soft_label"
