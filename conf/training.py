"""The options of the stages that train on rows, and what every training stage has; on the
conventions of conf/schema.py.
"""

from dataclasses import dataclass, field

from conf.checks import MISSING, check
from conf.choices import (
    CPOLoss,
    FDivergence,
    KTOLoss,
    OnNonFinite,
    PreferenceLoss,
    Scheduler,
)

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


@dataclass(slots=True, kw_only=True)
class TrainStage:
    """What every training stage has."""

    name: str = MISSING
    # optimizer steps (SFT, reward) or online iterations (ppo); None: from epochs
    steps: int | None = None
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    scheduler: Scheduler = Scheduler.cosine
    warmup_ratio: float = 0.05  # share of the steps with a rising learning rate
    max_grad_norm: float = 1.0  # 0: no clipping
    # steps between checkpoints beside those after each evaluation; 0: no others
    save_steps: int = 0
    # -- what must not be applied: NaN, infinities, and spikes where a limit is set
    on_nonfinite: OnNonFinite = OnNonFinite.stop
    rewinds: int = 3  # on_nonfinite=rewind: at most so many in a run
    # times the median size of the losses of the last updates; None: no limit
    spike_loss: float | None = None
    # times the median gradient norm of the last updates; None: no limit
    spike_grad_norm: float | None = None
    spike_window: int = 20  # updates that a median is taken over; there is no limit before them

    def __post_init__(self) -> None:
        check(self.steps is None or self.steps >= 1, "stage.steps", self.steps, "at least 1")
        check(self.learning_rate > 0, "stage.learning_rate", self.learning_rate, "above 0")
        check(self.weight_decay >= 0, "stage.weight_decay", self.weight_decay, "at least 0")
        check(0 <= self.adam_beta1 < 1, "stage.adam_beta1", self.adam_beta1, "in [0, 1)")
        check(0 <= self.adam_beta2 < 1, "stage.adam_beta2", self.adam_beta2, "in [0, 1)")
        check(self.adam_eps > 0, "stage.adam_eps", self.adam_eps, "above 0")
        check(0 <= self.warmup_ratio <= 1, "stage.warmup_ratio", self.warmup_ratio, "in [0, 1]")
        check(
            self.max_grad_norm >= 0,
            "stage.max_grad_norm",
            self.max_grad_norm,
            "at least 0 (0: no clipping)",
        )
        check(self.save_steps >= 0, "stage.save_steps", self.save_steps, "at least 0")
        check(self.rewinds >= 1, "stage.rewinds", self.rewinds, "at least 1")
        check(
            self.spike_loss is None or self.spike_loss > 1,
            "stage.spike_loss",
            self.spike_loss,
            "above 1",
        )
        check(
            self.spike_grad_norm is None or self.spike_grad_norm > 1,
            "stage.spike_grad_norm",
            self.spike_grad_norm,
            "above 1",
        )
        check(self.spike_window >= 2, "stage.spike_window", self.spike_window, "at least 2 updates")


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
        check(self.epochs > 0, "stage.epochs", self.epochs, "above 0")
        check(self.batch_size >= 1, "stage.batch_size", self.batch_size, "at least 1")
        check(self.max_length >= 2, "stage.max_length", self.max_length, "at least 2 tokens")
        check(self.eval_steps >= 1, "stage.eval_steps", self.eval_steps, "at least 1")
        check(
            self.patience is None or self.patience >= 1,
            "stage.patience",
            self.patience,
            "at least 1",
        )
        check(self.log_steps >= 1, "stage.log_steps", self.log_steps, "at least 1")


@dataclass(slots=True, kw_only=True)
class SFTStage(OfflineStage):
    """Supervised fine-tuning on TRL's SFTTrainer."""

    name: str = "sft"
    # loss on completions (assistant turns) only, where rows have prompts
    completion_only: bool = True
    packing: bool = False


@dataclass(slots=True, kw_only=True)
class RewardStage(OfflineStage):
    """Pairwise reward model (Bradley-Terry) on TRL's RewardTrainer."""

    name: str = "reward"
    # subtract each row's `margin` from the score difference (Llama 2, arXiv:2307.09288)
    margin: bool = False
    # each row's `soft_label`, the probability that chosen is better, is what the loss is to find;
    # 0.5 is a tie
    soft_label: bool = False
    # weight of (chosen + rejected)^2 (Eisenstein et al. 2023, arXiv:2312.09244)
    centering_coef: float = 0.0
    bootstrap: int = 1000  # resamples for the accuracy's 95 % interval

    def __post_init__(self) -> None:
        super(RewardStage, self).__post_init__()
        check(
            not (self.margin and self.soft_label),
            "stage.soft_label",
            self.soft_label,
            "false with stage.margin=true",
        )
        check(self.centering_coef >= 0, "stage.centering_coef", self.centering_coef, "at least 0")
        check(self.bootstrap >= 1, "stage.bootstrap", self.bootstrap, "at least 1")


@dataclass(slots=True, kw_only=True)
class PreferenceStage(OfflineStage):
    """Direct preference optimisation from pairs, against a frozen reference, on TRL's
    DPOTrainer.
    """

    name: str = "dpo"
    learning_rate: float = 1e-6
    # their weighted sum is minimised
    losses: list[PreferenceLoss] = field(default_factory=lambda: [PreferenceLoss.sigmoid])
    weights: list[float] | None = None  # one per loss; None: 1 each
    beta: float = 0.1  # strength of the tie to the reference; ipo: the paper's tau
    # robust, aot: share of labels taken to be flipped; exo_pair: the paper's epsilon
    label_smoothing: float = 0.0
    f_divergence: FDivergence = FDivergence.reverse_kl
    f_alpha: float | None = None  # f_divergence=alpha_divergence; None: 0.5
    # weight of tokens beyond the shorter answer's length (LD-DPO, arXiv:2409.06411); None: 1
    ld_alpha: float | None = None
    discopop_tau: float = 0.05  # temperature of the discopop loss

    def __post_init__(self) -> None:
        super(PreferenceStage, self).__post_init__()
        names = [loss.value for loss in self.losses]
        check(len(names) > 0, "stage.losses", names, "at least one loss")
        check(
            len(set(names)) == len(names),
            "stage.losses",
            names,
            "each loss once; stage.weights says how much of it",
        )
        if self.weights is not None:
            check(
                len(self.weights) == len(names),
                "stage.weights",
                self.weights,
                f"one weight for each of {len(names)} losses",
            )
            fits = all(weight >= 0 for weight in self.weights) and any(
                weight > 0 for weight in self.weights
            )
            check(fits, "stage.weights", self.weights, "weights of at least 0, one of them above 0")
        check(self.beta > 0, "stage.beta", self.beta, "above 0")
        check(
            0 <= self.label_smoothing < 0.5,
            "stage.label_smoothing",
            self.label_smoothing,
            "in [0, 0.5)",
        )
        smoothed = any(loss in _SMOOTHED for loss in self.losses)
        what = f"0 with losses={names}: only {', '.join(loss.value for loss in _SMOOTHED)} read it"
        check(
            smoothed or self.label_smoothing == 0,
            "stage.label_smoothing",
            self.label_smoothing,
            what,
        )
        exo = PreferenceLoss.exo_pair in self.losses
        check(
            not exo or self.label_smoothing > 0,
            "stage.label_smoothing",
            self.label_smoothing,
            "above 0 with exo_pair, which takes its logarithm",
        )
        if self.f_divergence is not FDivergence.reverse_kl:
            what = (
                f"reverse_kl with losses={names}: another divergence is defined for "
                f"{', '.join(loss.value for loss in _OF_DIFFERENCES)} only"
            )
            check(
                all(loss in _OF_DIFFERENCES for loss in self.losses),
                "stage.f_divergence",
                self.f_divergence.value,
                what,
            )
        alpha = self.f_divergence is FDivergence.alpha_divergence
        check(
            self.f_alpha is None or alpha,
            "stage.f_alpha",
            self.f_alpha,
            "null without f_divergence=alpha_divergence",
        )
        check(
            self.ld_alpha is None or 0 <= self.ld_alpha <= 1,
            "stage.ld_alpha",
            self.ld_alpha,
            "in [0, 1]",
        )
        check(self.discopop_tau > 0, "stage.discopop_tau", self.discopop_tau, "above 0")


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
        check(self.beta > 0, "stage.beta", self.beta, "above 0")
        check(self.desirable_weight > 0, "stage.desirable_weight", self.desirable_weight, "above 0")
        check(
            self.undesirable_weight > 0,
            "stage.undesirable_weight",
            self.undesirable_weight,
            "above 0",
        )


@dataclass(slots=True, kw_only=True)
class CPOStage(OfflineStage):
    """Preference optimisation from pairs without a reference, on TRL's CPOTrainer: CPO and
    SimPO.
    """

    name: str = "cpo"
    learning_rate: float = 1e-6
    loss: CPOLoss = CPOLoss.sigmoid
    beta: float = 0.1  # scale of the log-probabilities' difference; ipo: the paper's tau
    nll_coef: float = 1.0  # weight of the chosen answers' negative log-likelihood per token
    gamma: float = 0.0  # simpo: the target margin between the scaled rewards
    label_smoothing: float = 0.0  # sigmoid, simpo: share of labels taken to be flipped

    def __post_init__(self) -> None:
        super(CPOStage, self).__post_init__()
        check(self.beta > 0, "stage.beta", self.beta, "above 0")
        check(self.nll_coef >= 0, "stage.nll_coef", self.nll_coef, "at least 0")
        check(self.gamma >= 0, "stage.gamma", self.gamma, "at least 0")
        simpo = self.loss is CPOLoss.simpo
        check(
            simpo or self.gamma == 0,
            "stage.gamma",
            self.gamma,
            f"0 with loss={self.loss.value}: only simpo has a target margin",
        )
        check(
            0 <= self.label_smoothing < 0.5,
            "stage.label_smoothing",
            self.label_smoothing,
            "in [0, 0.5)",
        )
        smoothed = self.loss in (CPOLoss.sigmoid, CPOLoss.simpo)
        what = f"0 with loss={self.loss.value}: only sigmoid and simpo read it"
        check(
            smoothed or self.label_smoothing == 0,
            "stage.label_smoothing",
            self.label_smoothing,
            what,
        )


@dataclass(slots=True, kw_only=True)
class ORPOStage(OfflineStage):
    """Fine-tuning and preference in one loss, from pairs without a reference, on TRL's
    ORPOTrainer.
    """

    name: str = "orpo"
    learning_rate: float = 5e-6
    beta: float = 0.1  # weight of the odds-ratio term, the paper's lambda

    def __post_init__(self) -> None:
        super(ORPOStage, self).__post_init__()
        check(self.beta > 0, "stage.beta", self.beta, "above 0")
