"""Options of the online loop; its watch has its own in conf/run.py."""

from dataclasses import dataclass

from conf.choices import (
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
from conf.options import check, names, nested, option, same_option
from conf.reward import TurnCredit
from conf.run import WatchConfig
from conf.training import SORTING, TrainStage, check_exo_pair, check_weights

# The cap of the weights that correct for stale tokens where none is set: truncated importance
# sampling's (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
# Training").
STALE_CAP = 2.0


@dataclass(slots=True, kw_only=True)
class OnlineStage(TrainStage):
    """The online loop: rollouts, scores, update. Algorithms are presets over these choices; the
    defaults are PPO's.
    """

    name: str = same_option(TrainStage, "name", "ppo")
    steps: int | None = same_option(TrainStage, "steps", 100, "Iterations of the loop.")
    scheduler: Scheduler = same_option(TrainStage, "scheduler", Scheduler.constant)
    save_steps: int = same_option(
        TrainStage,
        "save_steps",
        20,
        "Steps between checkpoints; 0: none, so that a run that is killed begins anew.",
    )
    prompts_per_step: int = option(
        64,
        "Prompts of one step, over all ranks.",
        unit="prompts",
        at_least=1,
        section="rollouts of a step",
    )
    samples_per_prompt: int = option(1, "Responses to each prompt.", unit="responses", at_least=1)
    epochs: int = option(2, "Passes over one step's rollouts.", at_least=1)
    minibatches: int = option(1, "Optimizer steps in one pass.", at_least=1)
    samples_kept: int = option(
        8, "Rollouts of each step that samples.jsonl gets.", unit="rollouts", at_least=0
    )
    ahead: int = option(
        0,
        "Versions that a token may be behind the weights that it trains: responses of so many "
        "steps are written while the policy updates. 0: generation and update take turns.",
        unit="versions",
        at_least=0,
    )
    advantage: Advantage = option(
        Advantage.gae,
        "What a token's score is compared with.",
        section="what is learned from a score",
    )
    advantage_std: bool = option(True, "advantage=group: divide by the group's standard deviation.")
    group_baseline: bool = option(
        False,
        "advantage=reinforce_pp: subtract the group's mean score first (REINFORCE++-baseline).",
    )
    turn_credit: TurnCredit = option(
        TurnCredit.episode,
        "Whether an environment's rewards count at the end of an episode, or of their own turns.",
    )
    turn_discount: float = option(
        1.0, "What a reward counts for each turn that it comes later.", above=0, at_most=1
    )
    policy_loss: PolicyLoss = option(PolicyLoss.clip, "The policy's loss.")
    aggregation: Aggregation = option(
        Aggregation.token, "How the terms of tokens become one number."
    )
    constant_length: int | None = option(
        None,
        "aggregation=constant: the constant; null: rollout.max_response_length, in an environment "
        "the most that its turns can hold.",
        unit="tokens",
        at_least=1,
    )
    selection: Selection = option(Selection.all, "Which responses are learned from.")
    resample: int = option(
        3, "selection=unequal: further draws of prompts in one step.", unit="draws", at_least=0
    )
    critic_learning_rate: float | None = option(
        None,
        "Highest learning rate of the critic; null: what is published (conf/published.py).",
        above=0,
        section="the critic, with advantage=gae",
    )
    critic_init: CriticInit = option(
        CriticInit.reward,
        "Weights that the critic starts from: the reward model's or the policy's.",
    )
    critic_adapter: bool = option(
        False, "Train a LoRA adapter of the critic, in the shape that the adapter group says."
    )
    critic_warmup: int = option(
        0, "First steps that train the critic only.", unit="steps", at_least=0
    )
    gamma: float = option(1.0, "Discount per token.", above=0, at_most=1)
    gae_lambda: float = option(
        1.0, "The lambda of generalised advantage estimation.", at_least=0, at_most=1
    )
    cliprange_value: float = option(
        0.2, "Largest change of a value from the old critic's.", above=0
    )
    vf_coef: float = option(1.0, "Weight of the critic's loss.", at_least=0)
    kl_coef: float = option(
        0.05,
        "Weight of the KL penalty per token; above 0 it needs a reference.",
        at_least=0,
        section="the distance from the reference",
    )
    kl_place: KLPlace = option(KLPlace.reward, "Where the KL penalty is: reward, loss or both.")
    kl_estimator: KLEstimator = option(
        KLEstimator.k1, "Estimator of the KL in the reward and of the metric objective/kl."
    )
    kl_loss_estimator: KLEstimator = option(
        KLEstimator.k3_weighted, "Estimator of the KL in the loss."
    )
    kl_controller: KLController = option(
        KLController.fixed,
        "Keep kl_coef, or steer it towards kl_target (Ziegler et al. 2019, arXiv:1909.08593).",
    )
    kl_target: float = option(
        6.0, "kl_controller=adaptive: the KL aimed at.", unit="nats per response", above=0
    )
    kl_horizon: int = option(
        10000,
        "kl_controller=adaptive: responses over which the coefficient adapts.",
        unit="responses",
        at_least=1,
    )
    reference: bool = option(
        True, "Keep the frozen start (LoRA: the adapter turned off) to measure the KL against."
    )
    reference_every: int = option(
        0,
        "Steps between moves of the reference towards the policy (Gorbatovski et al. 2024, "
        "arXiv:2404.09656); 0: it stays.",
        unit="steps",
        at_least=0,
    )
    reference_mix: float = option(
        0.6, "The policy's share of a moved reference's weights.", above=0, at_most=1
    )
    cliprange: float = option(
        0.2,
        "The ratio of new to old probability is clipped to [1 - cliprange, 1 + cliprange_high].",
        above=0,
        section="the policy's loss",
    )
    cliprange_high: float | None = option(
        None, "See cliprange; null: equal to it; with cispo the only bound.", above=0
    )
    dual_clip: float | None = option(
        None,
        "Bound of the loss for negative advantages (Ye et al. 2020, arXiv:1912.09729); null: none.",
        above=1,
    )
    entropy_coef: float = option(0.0, "Weight of the entropy, which is maximised.")
    dpo_beta: float = option(0.1, "policy_loss=dpo: strength of the tie to the reference.", above=0)
    dpo_losses: list[PreferenceLoss] = option(
        [PreferenceLoss.sigmoid], "policy_loss=dpo: losses whose weighted sum is minimised."
    )
    dpo_weights: list[float] | None = option(
        None, "policy_loss=dpo: a weight for each loss; null: 1 each."
    )
    label_smoothing: float = option(
        0.0,
        "policy_loss=dpo with robust: share of pairs that are taken to be flipped; with exo_pair "
        "the paper's epsilon.",
        at_least=0,
        below=0.5,
    )
    importance_cap: float | None = option(
        None,
        "Largest importance weight that corrects the difference of sampler and trainer; null: no "
        f"correction, with ahead {STALE_CAP:g} (but for policy_loss=dpo, which needs none).",
        at_least=1,
    )
    importance_mode: ImportanceMode = option(
        ImportanceMode.truncate,
        "Above the cap, cut the weight to it, or (mask) leave the token or sequence out.",
    )
    importance_floor: float | None = option(
        None,
        "importance_mode=mask: the weight below which a token or sequence is left out too; null: "
        "1 / importance_cap.",
        at_least=0,
        at_most=1,
    )
    importance_level: Level = option(
        Level.token, "Whether tokens or sequences have an importance weight."
    )
    stop_kl: float | None = option(
        None,
        "KL between old and new policy that ends a step's update early; null: none does.",
        unit="nats per token",
        above=0,
    )
    whiten_advantages: bool = option(
        True,
        "Subtract the mean of the advantages, divide by their standard deviation.",
        section="scores before the update",
    )
    whiten_rewards: bool = option(
        False, "Divide rewards by their standard deviation; their mean is scaled, not subtracted."
    )
    reward_clip: float | None = option(
        None,
        "Cut raw scores to [-reward_clip, reward_clip], before any statistics; null: do not.",
        above=0,
    )
    reward_normalise: bool = option(
        False, "Normalise scores by their running mean and standard deviation."
    )
    truncation_penalty: float = option(
        0.0, "Subtracted from the score of a response that is cut off.", at_least=0
    )
    overlong_buffer: int = option(
        0,
        "Tokens before rollout.max_response_length over which overlong_penalty grows (Yu et al. "
        "2025, arXiv:2503.14476); 0: off.",
        unit="tokens",
        at_least=0,
    )
    overlong_penalty: float = option(
        1.0, "Subtracted from the score at the length limit.", at_least=0
    )
    dropout: bool = option(
        False,
        "Train with the dropout that the model's configuration has; without it a training pass "
        "gives the logprobs of the policy that wrote the responses.",
    )
    mask_truncated: bool = option(False, "Responses that are cut off give no gradient.")
    watch: WatchConfig = nested(WatchConfig, section="the watch")

    def check_relations(self) -> None:
        check(self.steps is not None, "stage.steps", self.steps, "a number of online iterations")
        check(
            self.on_nonfinite is not OnNonFinite.rewind or self.save_steps > 0,
            "stage.save_steps",
            self.save_steps,
            "above 0 with on_nonfinite=rewind, which goes to a checkpoint",
        )
        self._check_kl()
        self._check_groups()
        self._check_pairs()
        self._check_minibatches()

    @property
    def first_size(self) -> int:
        return self.prompts_per_step

    @property
    def correction_cap(self) -> float | None:
        """The largest importance weight; None where nothing is corrected."""
        if self.importance_cap is not None or self.policy_loss is PolicyLoss.dpo:
            return self.importance_cap
        return STALE_CAP if self.ahead else None

    @property
    def _responses(self) -> list[int]:
        """Of a step, as the run goes on."""
        return [size * self.samples_per_prompt for size in self.step_sizes()]

    @property
    def _narrowed(self) -> bool:
        return self.selection in (Selection.best, Selection.best_worst)

    def _check_minibatches(self) -> None:
        check(
            self._narrowed or all(count % self.minibatches == 0 for count in self._responses),
            "stage.minibatches",
            self.minibatches,
            f"a divisor of prompts_per_step x samples_per_prompt = {_either(self._responses)}",
        )

    def _check_kl(self) -> None:
        check(
            self.kl_estimator is not KLEstimator.k3_weighted,
            "stage.kl_estimator",
            self.kl_estimator.value,
            "k1, k2 or k3: a reward has no ratio to weigh by",
        )
        check(
            self.kl_place is KLPlace.reward or self.kl_loss_estimator is not KLEstimator.k1,
            "stage.kl_loss_estimator",
            self.kl_loss_estimator.value,
            "k2, k3 or k3_weighted: the gradient of k1 in a loss has zero mean, so it "
            "penalises nothing",
        )
        if self.kl_controller is KLController.adaptive:
            check(
                self.kl_coef > 0,
                "stage.kl_coef",
                self.kl_coef,
                "above 0 with kl_controller=adaptive, which only scales it",
            )
            # One step scales the coefficient by at least 1 - 0.2 x responses / horizon, which must
            # stay positive.
            check(
                5 * self.kl_horizon > self._responses[-1],
                "stage.kl_horizon",
                self.kl_horizon,
                f"above a fifth of the {self._responses[-1]} responses per step",
            )

    def _check_groups(self) -> None:
        compared = (
            self.advantage in (Advantage.group, Advantage.leave_one_out)
            or self.group_baseline
            or self.selection is not Selection.all
        )
        check(
            not compared or self.samples_per_prompt >= 2,
            "stage.samples_per_prompt",
            self.samples_per_prompt,
            f"at least 2 with advantage={self.advantage.value}, "
            f"selection={self.selection.value}: a response alone has nothing to compare with",
        )
        check(
            not self._narrowed or self.advantage is Advantage.none,
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
        self._check_dpo_losses()

    def _check_dpo_losses(self) -> None:
        losses = self.dpo_losses
        check(len(losses) > 0, "stage.dpo_losses", losses, "at least one loss")
        check(
            not any(loss in SORTING for loss in losses),
            "stage.dpo_losses",
            names(losses),
            "losses of single pairs: aot and aot_unpaired sort a whole batch, which "
            "micro-batches never see at once (stage=dpo has them)",
        )
        check_exo_pair(losses, self.label_smoothing)
        if self.dpo_weights is not None:
            check_weights("stage.dpo_weights", self.dpo_weights, len(losses))


def _either(counts: list[int]) -> str:
    return " and ".join(str(count) for count in counts)
