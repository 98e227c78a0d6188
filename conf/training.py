"""Options of the stages that train on rows, and what every training stage has."""

from collections.abc import Sequence
from dataclasses import dataclass

from conf.choices import (
    FDivergence,
    KTOLoss,
    OnNonFinite,
    PreferenceLoss,
    RewrittenTurns,
    Scheduler,
)
from conf.options import MISSING, check, check_options, names, nested, option, same_option
from conf.schedule import (
    BatchGrowthConfig,
    OptimizerKind,
    PlateauConfig,
    ScheduleConfig,
    TrainPart,
    UnfreezeConfig,
    check_schedule,
)

# The losses that read stage.label_smoothing.
_SMOOTHED = (
    PreferenceLoss.robust,
    PreferenceLoss.exo_pair,
    PreferenceLoss.aot,
    PreferenceLoss.aot_unpaired,
)

# f-DPO's rewards hold a term that only the difference of the two sides cancels; TRL refuses the
# other losses, too.
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

# Losses that sort the pairs of a batch, so that no pair has a loss of its own.
SORTING = (PreferenceLoss.aot, PreferenceLoss.aot_unpaired)
LABEL_SMOOTHING = "Share of labels that are taken to be flipped"


@dataclass(slots=True, kw_only=True)
class TrainStage:
    """What every training stage has."""

    name: str = option(MISSING, "Name of the preset; stage=NAME sets it.")
    steps: int | None = option(
        None,
        "Optimizer steps; null: as many as epochs passes over the data take.",
        unit="steps",
        at_least=1,
        section="training",
    )
    learning_rate: float | None = option(
        None,
        "Highest learning rate; null: what is published for the method, and for all "
        "weights or an adapter (conf/published.py).",
        above=0,
    )
    optimizer: OptimizerKind = option(
        OptimizerKind.adamw, "What steps the weights; another than adamw needs engine=torch."
    )
    weight_decay: float = option(0.0, "Decoupled weight decay.", at_least=0)
    adam_beta1: float = option(
        0.9, "Decay rate of AdamW's mean of gradients; Lion's first beta.", at_least=0, below=1
    )
    adam_beta2: float = option(
        0.999,
        "Decay rate of AdamW's mean of squared gradients; Lion's second beta.",
        at_least=0,
        below=1,
    )
    adam_eps: float = option(1e-8, "Term that keeps AdamW from dividing by zero.", above=0)
    scheduler: Scheduler = option(
        Scheduler.cosine, "How the learning rate develops after the warm-up."
    )
    warmup_ratio: float = option(
        0.05, "Share of the steps in which the learning rate rises.", at_least=0, at_most=1
    )
    min_rate: float = option(
        0.0,
        "Share of learning_rate below which the schedule never falls after the warm-up.",
        at_least=0,
        at_most=1,
    )
    max_grad_norm: float = option(
        1.0, "Largest gradient norm, larger ones are scaled down to it; 0: no clipping.", at_least=0
    )
    min_improvement: float = option(
        0.0,
        "A figure that betters the best by no more than this has not improved: for patience and "
        "for scheduler=plateau.",
        at_least=0,
    )
    save_steps: int = option(
        0,
        "Steps between checkpoints beside those after each evaluation; 0: no others.",
        unit="steps",
        at_least=0,
    )
    on_nonfinite: OnNonFinite = option(
        OnNonFinite.stop,
        "What follows from a loss or gradient that is NaN, infinite or, where a limit is set, a "
        "spike.",
        section="updates that must not be applied",
    )
    rewinds: int = option(3, "on_nonfinite=rewind: the most rewinds of one run.", at_least=1)
    spike_loss: float | None = option(
        None,
        "A loss is a spike from so many times the median size of the last updates' losses; null: "
        "no limit.",
        above=1,
    )
    spike_grad_norm: float | None = option(
        None,
        "A gradient is a spike from so many times the median norm of the last updates; null: no "
        "limit.",
        above=1,
    )
    spike_window: int = option(
        20,
        "Updates that a median is taken over; there is no limit before them.",
        unit="updates",
        at_least=2,
    )
    noise_scale: float | None = option(
        None,
        "Measure the gradient-noise scale, the rows of a step beyond which more hardly help "
        "(McCandlish et al. 2018, arXiv:1812.06162); its averages decay at this rate, such as "
        "0.95. null: not measured.",
        at_least=0,
        below=1,
        section="the noise of gradients",
    )
    schedule: ScheduleConfig = nested(ScheduleConfig, section="what changes along the run")
    plateau: PlateauConfig = nested(PlateauConfig)
    batch_growth: BatchGrowthConfig = nested(BatchGrowthConfig)
    train: TrainPart = nested(TrainPart, section="which weights train, and from when on")
    unfreeze: UnfreezeConfig = nested(UnfreezeConfig)
    depth_decay: float = option(
        1.0,
        "What the learning rate is multiplied by for each block further down; ULMFiT's is 1 / 2.6.",
        above=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        check_options(self, "stage")
        check_schedule(
            self.scheduler,
            self.schedule,
            self.plateau,
            warmup_ratio=self.warmup_ratio,
            min_rate=self.min_rate,
        )
        sizes = self.batch_growth.sizes
        check(
            not sizes or sizes[0] > self.first_size,
            "stage.batch_growth.sizes",
            sizes,
            f"sizes above the {self.first_size} of the first step",
        )
        self.check_relations()

    @property
    def trains_alike(self) -> bool:
        """Whether all weights train, from the start and at one rate."""
        return self.train.everything and not self.unfreeze.on and self.depth_decay == 1.0

    def check_relations(self) -> None:
        """Raise ValueError where options of the stage contradict each other."""

    @property
    def first_size(self) -> int:
        """Rows, online prompts, of the first step, over all ranks."""
        return 1

    def step_size(self, step: int) -> int:
        """Rows, online prompts, of step `step` (from 0), over all ranks."""
        return self.batch_growth.size(self.first_size, step)

    def step_sizes(self) -> list[int]:
        """Every size that a step can have, in rising order."""
        return self.batch_growth.all_sizes(self.first_size)


@dataclass(slots=True, kw_only=True)
class OfflineStage(TrainStage):
    """What the stages on TRL's trainers share."""

    epochs: float = option(
        1.0, "Passes over the data when steps is null.", above=0, section="batches and evaluation"
    )
    batch_size: int = option(
        32,
        "Sequences (sft, kto) or pairs in one optimizer step, over all ranks.",
        unit="rows",
        at_least=1,
    )
    max_length: int = option(
        2048, "Longest prompt and response together.", unit="tokens", at_least=2
    )
    eval_steps: int = option(50, "Steps between evaluations.", unit="steps", at_least=1)
    save_optimizer: bool = option(
        True,
        "Checkpoints hold the optimizer's state; false: they are weights alone, a third of the "
        "size, and no run can be resumed from them. Needs engine=torch.",
    )
    patience: int | None = option(
        None,
        "Evaluations without improvement before the run stops; null: it never stops early.",
        unit="evaluations",
        at_least=1,
    )
    log_steps: int = option(1, "Steps between lines of metrics.jsonl.", unit="steps", at_least=1)

    @property
    def first_size(self) -> int:
        return self.batch_size


@dataclass(slots=True, kw_only=True)
class SFTStage(OfflineStage):
    """Supervised fine-tuning on TRL's SFTTrainer."""

    name: str = same_option(TrainStage, "name", "sft")
    completion_only: bool = option(
        True,
        "Loss on completions (assistant turns) only, where rows have prompts.",
        section="supervised fine-tuning",
    )
    packing: bool = option(False, "Put several rows into one sequence.")
    neftune_alpha: float | None = option(
        None,
        "Uniform noise on the embeddings, up to alpha / sqrt(tokens of the longest row x hidden "
        "size) (NEFTune, arXiv:2310.05914); null: none.",
        above=0,
    )
    rewritten_turns: RewrittenTurns = option(
        RewrittenTurns.split,
        "A conversation of which the chat template renders earlier answers otherwise once others "
        "follow (Qwen 3 leaves out their reasoning): split into a row for each of them, as the "
        "policy would have seen it, or refused. With completion_only=false it is refused.",
    )


@dataclass(slots=True, kw_only=True)
class RewardStage(OfflineStage):
    """Pairwise reward model (Bradley-Terry) on TRL's RewardTrainer."""

    name: str = same_option(TrainStage, "name", "reward")
    margin: bool = option(
        False,
        "Subtract each row's column margin from the score difference (Llama 2, arXiv:2307.09288).",
        section="reward model",
    )
    soft_label: bool = option(
        False,
        "Train towards each row's column soft_label, the probability that chosen is better; 0.5 "
        "is a tie.",
    )
    centering_coef: float = option(
        0.0,
        "Weight of (chosen + rejected)^2 (Eisenstein et al. 2023, arXiv:2312.09244).",
        at_least=0,
    )
    bootstrap: int = option(
        1000, "Resamples for the accuracy's 95 % interval.", unit="resamples", at_least=1
    )

    cache_frozen: bool = option(
        False,
        "Compute the frozen blocks (stage.train) once for all rows, and read their hidden states "
        "from the disk from then on.",
    )

    def check_relations(self) -> None:
        check(
            not (self.margin and self.soft_label),
            "stage.soft_label",
            self.soft_label,
            "false with stage.margin=true",
        )


@dataclass(slots=True, kw_only=True)
class PreferenceStage(OfflineStage):
    """Direct preference optimisation from pairs, against a frozen reference, on TRL's
    DPOTrainer.
    """

    name: str = same_option(TrainStage, "name", "dpo")
    losses: list[PreferenceLoss] = option(
        [PreferenceLoss.sigmoid], "Losses whose weighted sum is minimised.", section="the loss"
    )
    weights: list[float] | None = option(None, "A weight for each loss; null: 1 each.")
    beta: float = option(
        0.1, "Strength of the tie to the reference; with ipo the paper's tau.", above=0
    )
    label_smoothing: float = option(
        0.0,
        f"{LABEL_SMOOTHING} (robust, aot); with exo_pair the paper's epsilon.",
        at_least=0,
        below=0.5,
    )
    f_divergence: FDivergence = option(
        FDivergence.reverse_kl, "Divergence that ties the policy to the reference."
    )
    f_alpha: float | None = option(None, "The alpha of f_divergence=alpha_divergence; null: 0.5.")
    ld_alpha: float | None = option(
        None,
        "Weight of tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411); null: 1.",
        at_least=0,
        at_most=1,
    )
    discopop_tau: float = option(0.05, "Temperature of the discopop loss.", above=0)

    def check_relations(self) -> None:
        self._check_losses()
        self._check_smoothing()
        self._check_divergence()

    def _check_losses(self) -> None:
        given = names(self.losses)
        check(len(given) > 0, "stage.losses", given, "at least one loss")
        check(
            len(set(given)) == len(given),
            "stage.losses",
            given,
            "each loss once; stage.weights says how much of it",
        )
        if self.weights is not None:
            check_weights("stage.weights", self.weights, len(given))
            positive = all(weight >= 0 for weight in self.weights) and sum(self.weights) > 0
            check(
                positive,
                "stage.weights",
                self.weights,
                "weights of at least 0, and at least one above 0",
            )

    def _check_smoothing(self) -> None:
        check(
            self.label_smoothing == 0 or any(loss in _SMOOTHED for loss in self.losses),
            "stage.label_smoothing",
            self.label_smoothing,
            f"0 with losses={names(self.losses)}: only {', '.join(names(_SMOOTHED))} read it",
        )
        check_exo_pair(self.losses, self.label_smoothing)

    def _check_divergence(self) -> None:
        if self.f_divergence is not FDivergence.reverse_kl:
            check(
                all(loss in _OF_DIFFERENCES for loss in self.losses),
                "stage.f_divergence",
                self.f_divergence.value,
                f"reverse_kl with losses={names(self.losses)}: another divergence is defined for "
                f"{', '.join(names(_OF_DIFFERENCES))} only",
            )
        check(
            self.f_alpha is None or self.f_divergence is FDivergence.alpha_divergence,
            "stage.f_alpha",
            self.f_alpha,
            "null without f_divergence=alpha_divergence",
        )


def check_weights(key: str, weights: Sequence[float], losses: int) -> None:
    """Raise ValueError unless there is a weight for each of so many losses."""
    check(len(weights) == losses, key, weights, f"one weight for each of {losses} losses")


def check_exo_pair(losses: Sequence[PreferenceLoss], smoothing: float) -> None:
    """Raise ValueError for the loss exo_pair without label smoothing."""
    check(
        PreferenceLoss.exo_pair not in losses or smoothing > 0,
        "stage.label_smoothing",
        smoothing,
        "above 0 with exo_pair, which takes its logarithm",
    )


@dataclass(slots=True, kw_only=True)
class KTOStage(OfflineStage):
    """Preference optimisation from single answers, each judged good or bad, on TRL's KTOTrainer."""

    name: str = same_option(TrainStage, "name", "kto")
    loss: KTOLoss = option(KTOLoss.kto, "The loss.", section="the loss")
    beta: float = option(0.1, "Strength of the tie to the reference.", above=0)
    desirable_weight: float = option(1.0, "Weight of the good answers' losses.", above=0)
    undesirable_weight: float = option(1.0, "Weight of the bad answers' losses.", above=0)
