"""The options of the online loop and of its watch; on the conventions of conf/schema.py."""

from dataclasses import dataclass, field

from conf.checks import check
from conf.choices import (
    Action,
    Advantage,
    Aggregation,
    CriticInit,
    ImportanceMode,
    KLController,
    KLEstimator,
    KLPlace,
    Level,
    OnNonFinite,
    PolicyLoss,
    PreferenceLoss,
    Scheduler,
    Selection,
)
from conf.training import TrainStage


@dataclass(slots=True, kw_only=True)
class WatchConfig:
    """Looks at the reward from outside while it trains; a rule that holds warns or stops the run
    (Gao et al. 2022, arXiv:2210.10760).
    """

    # directory of a second reward model, trained with another seed or on other pairs
    judge_path: str | None = None
    judge_function: str | None = None  # pkg.module:function with the signature of reward.function
    judge_every: int = 10  # steps between judgements of held-out responses; the start is judged too
    judge_prompts: int = 64  # held-out prompts per judgement, the same each time
    # steps: the last ones for the length rule, the first ones for the entropy to compare with
    window: int = 10
    # the score rises and the judge falls; without a judge the rule has nothing to look at
    divergence: Action = Action.warn
    divergence_judgements: int = 3  # last judgements over which both trends are measured
    # standard errors over the held-out prompts by which each trend has to differ from 0
    divergence_sd: float = 2.0
    kl: Action = Action.off
    kl_max: float = 50.0  # nats per response
    length: Action = Action.warn
    # share of responses cut off at rollout.max_response_length, over the window
    length_share: float = 0.9
    entropy: Action = Action.warn
    entropy_share: float = 0.05  # of the first steps' entropy

    def __post_init__(self) -> None:
        check(
            self.judge_path is None or self.judge_function is None,
            "stage.watch.judge_function",
            self.judge_function,
            "null beside judge_path",
        )
        check(self.judge_every >= 1, "stage.watch.judge_every", self.judge_every, "at least 1 step")
        check(
            self.judge_prompts >= 2, "stage.watch.judge_prompts", self.judge_prompts, "at least 2"
        )
        check(self.window >= 1, "stage.watch.window", self.window, "at least 1 step")
        check(
            self.divergence_judgements >= 2,
            "stage.watch.divergence_judgements",
            self.divergence_judgements,
            "at least 2",
        )
        check(
            self.divergence_sd >= 0, "stage.watch.divergence_sd", self.divergence_sd, "at least 0"
        )
        check(self.kl_max > 0, "stage.watch.kl_max", self.kl_max, "above 0 nats")
        check(
            0 < self.length_share <= 1, "stage.watch.length_share", self.length_share, "in (0, 1]"
        )
        check(
            0 < self.entropy_share < 1, "stage.watch.entropy_share", self.entropy_share, "in (0, 1)"
        )


@dataclass(slots=True, kw_only=True)
class OnlineStage(TrainStage):
    """The online loop: rollouts, scores, update. Algorithms are presets over these choices; the
    defaults are PPO's.
    """

    name: str = "ppo"
    steps: int | None = 100
    prompts_per_step: int = 64  # over all ranks
    samples_per_prompt: int = 1
    epochs: int = 2  # passes over one step's rollouts
    minibatches: int = 1  # optimizer steps per pass
    scheduler: Scheduler = Scheduler.constant
    # steps between checkpoints; 0: none, so that a run that is killed begins anew
    save_steps: int = 20
    # -- what is learned from a score
    advantage: Advantage = Advantage.gae
    advantage_std: bool = True  # group: divide by the group's standard deviation
    # reinforce_pp: subtract the group's mean score first (REINFORCE++-baseline)
    group_baseline: bool = False
    policy_loss: PolicyLoss = PolicyLoss.clip
    aggregation: Aggregation = Aggregation.token
    # tokens, aggregation=constant; None: rollout.max_response_length
    constant_length: int | None = None
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
    # nats per response, adaptive control (Ziegler et al. 2019, arXiv:1909.08593)
    kl_target: float = 6.0
    kl_horizon: int = 10000  # responses, adaptive control
    reference: bool = True  # keep a frozen start (or the adapter off) to measure KL against
    # steps between moves of the reference towards the policy (Gorbatovski et al. 2024,
    # arXiv:2404.09656); 0: it stays
    reference_every: int = 0
    reference_mix: float = 0.6  # the policy's share of a moved reference's weights
    # -- the policy's loss
    cliprange: float = 0.2
    # upper bound 1 + this; None: cliprange. cispo: the ratio's upper bound is 1 + this
    cliprange_high: float | None = None
    # lower bound for negative advantages (Ye et al. 2020, arXiv:1912.09729)
    dual_clip: float | None = None
    entropy_coef: float = 0.0
    dpo_beta: float = 0.1  # policy_loss=dpo
    dpo_losses: list[PreferenceLoss] = field(default_factory=lambda: [PreferenceLoss.sigmoid])
    dpo_weights: list[float] | None = None  # one per loss; None: 1 each
    label_smoothing: float = 0.0  # policy_loss=dpo: robust, exo_pair
    # importance correction between sampler and trainer; None: none
    importance_cap: float | None = None
    # above the cap: cut to it, or leave the token (sequence) out
    importance_mode: ImportanceMode = ImportanceMode.truncate
    importance_level: Level = Level.token
    # -- scores before the update
    whiten_advantages: bool = True
    # divided by the standard deviation; the mean is scaled, not subtracted
    whiten_rewards: bool = False
    reward_clip: float | None = None  # raw scores into [-clip, clip], before any statistics
    reward_normalise: bool = False  # by a running mean and standard deviation of the scores
    # nats per token between old and new policy that ends a step's update early
    stop_kl: float | None = None
    # subtracted from the score of a response that hit the length limit
    truncation_penalty: float = 0.0
    # tokens before the limit over which the penalty below grows (Yu et al. 2025, arXiv:2503.14476);
    # 0: off
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0  # subtracted at the limit
    mask_truncated: bool = False  # responses that hit the limit give no gradient
    samples_kept: int = 8  # rollouts written to samples.jsonl per step
    watch: WatchConfig = field(default_factory=WatchConfig)

    def __post_init__(self) -> None:
        super(OnlineStage, self).__post_init__()
        check(self.steps is not None, "stage.steps", self.steps, "a number of online iterations")
        check(
            self.prompts_per_step >= 1,
            "stage.prompts_per_step",
            self.prompts_per_step,
            "at least 1",
        )
        check(
            self.samples_per_prompt >= 1,
            "stage.samples_per_prompt",
            self.samples_per_prompt,
            "at least 1",
        )
        check(self.epochs >= 1, "stage.epochs", self.epochs, "at least 1")
        check(self.minibatches >= 1, "stage.minibatches", self.minibatches, "at least 1")
        check(
            self.constant_length is None or self.constant_length >= 1,
            "stage.constant_length",
            self.constant_length,
            "at least 1 token",
        )
        check(self.resample >= 0, "stage.resample", self.resample, "at least 0")
        check(
            self.critic_learning_rate > 0,
            "stage.critic_learning_rate",
            self.critic_learning_rate,
            "above 0",
        )
        check(self.critic_warmup >= 0, "stage.critic_warmup", self.critic_warmup, "at least 0")
        check(self.kl_coef >= 0, "stage.kl_coef", self.kl_coef, "at least 0")
        check(self.kl_target > 0, "stage.kl_target", self.kl_target, "above 0 nats")
        check(self.kl_horizon >= 1, "stage.kl_horizon", self.kl_horizon, "at least 1 response")
        check(
            self.reference_every >= 0,
            "stage.reference_every",
            self.reference_every,
            "at least 0 steps",
        )
        check(0 < self.reference_mix <= 1, "stage.reference_mix", self.reference_mix, "in (0, 1]")
        check(0 < self.gamma <= 1, "stage.gamma", self.gamma, "in (0, 1]")
        check(0 <= self.gae_lambda <= 1, "stage.gae_lambda", self.gae_lambda, "in [0, 1]")
        check(self.cliprange > 0, "stage.cliprange", self.cliprange, "above 0")
        check(
            self.cliprange_high is None or self.cliprange_high > 0,
            "stage.cliprange_high",
            self.cliprange_high,
            "above 0",
        )
        check(self.cliprange_value > 0, "stage.cliprange_value", self.cliprange_value, "above 0")
        check(
            self.dual_clip is None or self.dual_clip > 1,
            "stage.dual_clip",
            self.dual_clip,
            "above 1",
        )
        check(self.vf_coef >= 0, "stage.vf_coef", self.vf_coef, "at least 0")
        check(self.dpo_beta > 0, "stage.dpo_beta", self.dpo_beta, "above 0")
        check(
            0 <= self.label_smoothing < 0.5,
            "stage.label_smoothing",
            self.label_smoothing,
            "in [0, 0.5)",
        )
        check(
            self.reward_clip is None or self.reward_clip > 0,
            "stage.reward_clip",
            self.reward_clip,
            "above 0",
        )
        check(
            self.stop_kl is None or self.stop_kl > 0, "stage.stop_kl", self.stop_kl, "above 0 nats"
        )
        check(
            self.truncation_penalty >= 0,
            "stage.truncation_penalty",
            self.truncation_penalty,
            "at least 0",
        )
        check(
            self.overlong_buffer >= 0,
            "stage.overlong_buffer",
            self.overlong_buffer,
            "at least 0 tokens",
        )
        check(
            self.overlong_penalty >= 0,
            "stage.overlong_penalty",
            self.overlong_penalty,
            "at least 0",
        )
        check(
            self.importance_cap is None or self.importance_cap >= 1,
            "stage.importance_cap",
            self.importance_cap,
            "at least 1",
        )
        check(self.samples_kept >= 0, "stage.samples_kept", self.samples_kept, "at least 0")
        rewind = self.on_nonfinite is OnNonFinite.rewind
        check(
            not rewind or self.save_steps > 0,
            "stage.save_steps",
            self.save_steps,
            "above 0 with on_nonfinite=rewind, which goes to a checkpoint",
        )
        self._check_kl()
        self._check_groups()
        self._check_pairs()
        rollouts = self.prompts_per_step * self.samples_per_prompt
        check(
            self.selection in (Selection.best, Selection.best_worst)
            or rollouts % self.minibatches == 0,
            "stage.minibatches",
            self.minibatches,
            f"a divisor of prompts_per_step x samples_per_prompt = {rollouts}",
        )

    def _check_kl(self) -> None:
        check(
            self.kl_estimator is not KLEstimator.k3_weighted,
            "stage.kl_estimator",
            self.kl_estimator.value,
            "k1, k2 or k3: a reward has no ratio to weigh by",
        )
        if self.kl_place is not KLPlace.reward:
            check(
                self.kl_loss_estimator is not KLEstimator.k1,
                "stage.kl_loss_estimator",
                self.kl_loss_estimator.value,
                "k2, k3 or k3_weighted: the gradient of k1 in a loss has zero mean, so it "
                "penalises nothing",
            )
        if self.kl_controller is KLController.adaptive:
            rollouts = self.prompts_per_step * self.samples_per_prompt
            check(
                self.kl_coef > 0,
                "stage.kl_coef",
                self.kl_coef,
                "above 0 with kl_controller=adaptive, which only scales it",
            )
            # One step scales the coefficient by at least 1 - 0.2 x responses / horizon, which must
            # stay positive.
            check(
                5 * self.kl_horizon > rollouts,
                "stage.kl_horizon",
                self.kl_horizon,
                f"above a fifth of the {rollouts} responses per step",
            )

    def _check_groups(self) -> None:
        compared = (
            self.advantage in (Advantage.group, Advantage.leave_one_out)
            or self.group_baseline
            or self.selection is not Selection.all
        )
        what = (
            f"at least 2 with advantage={self.advantage.value}, "
            f"selection={self.selection.value}: a response alone has nothing to compare with"
        )
        check(
            not compared or self.samples_per_prompt >= 2,
            "stage.samples_per_prompt",
            self.samples_per_prompt,
            what,
        )
        narrowed = self.selection in (Selection.best, Selection.best_worst)
        check(
            not narrowed or self.advantage is Advantage.none,
            "stage.advantage",
            self.advantage.value,
            f"none with selection={self.selection.value}, which leaves nothing of a group to "
            "compare with",
        )
        check(
            not self.group_baseline or self.advantage is Advantage.reinforce_pp,
            "stage.group_baseline",
            self.group_baseline,
            "false without advantage=reinforce_pp",
        )

    def _check_pairs(self) -> None:
        dpo = self.policy_loss is PolicyLoss.dpo
        check(
            dpo == (self.selection is Selection.best_worst),
            "stage.selection",
            self.selection.value,
            "best_worst with policy_loss=dpo, which learns from pairs, and something else "
            "without it",
        )
        if not dpo:
            return
        check(self.reference, "stage.reference", self.reference, "true with policy_loss=dpo")
        check(
            not self.mask_truncated,
            "stage.mask_truncated",
            self.mask_truncated,
            "false with policy_loss=dpo: a pair has two sides",
        )
        check(
            self.kl_place is KLPlace.reward,
            "stage.kl_place",
            self.kl_place.value,
            "reward with policy_loss=dpo, whose beta is its KL penalty",
        )
        check(len(self.dpo_losses) > 0, "stage.dpo_losses", self.dpo_losses, "at least one loss")
        whole = (PreferenceLoss.aot, PreferenceLoss.aot_unpaired)
        check(
            not any(loss in whole for loss in self.dpo_losses),
            "stage.dpo_losses",
            [loss.value for loss in self.dpo_losses],
            "losses of single pairs: aot and aot_unpaired sort a whole batch, which "
            "micro-batches never see at once (stage=dpo has them)",
        )
        smooth = PreferenceLoss.exo_pair in self.dpo_losses
        check(
            not smooth or self.label_smoothing > 0,
            "stage.label_smoothing",
            self.label_smoothing,
            "above 0 with exo_pair, which takes its logarithm",
        )
        count = len(self.dpo_losses)
        check(
            self.dpo_weights is None or len(self.dpo_weights) == count,
            "stage.dpo_weights",
            self.dpo_weights,
            f"one weight for each of {count} losses",
        )
