"""Options of the watch, which looks at the reward from outside while it trains."""

from dataclasses import dataclass

from conf.choices import Action
from conf.options import check, check_options, option


@dataclass(slots=True, kw_only=True)
class WatchConfig:
    """Looks at the reward from outside while it trains; a rule that holds warns or stops the run
    (Gao et al. 2022, arXiv:2210.10760).
    """

    judge_path: str | None = option(
        None,
        "Directory of a second reward model that judges, trained with another seed or on other "
        "pairs; null: no such judge.",
    )
    judge_function: str | None = option(
        None, "pkg.module:function that judges, with the signature of reward.function."
    )
    judge_every: int = option(
        10,
        "Steps between judgements of held-out responses; the start is judged, too.",
        unit="steps",
        at_least=1,
    )
    judge_prompts: int = option(
        64,
        "Held-out prompts of a judgement, the same each time.",
        unit="prompts",
        at_least=2,
    )
    window: int = option(
        10,
        "Steps that a rule looks at: the last ones for length, the first ones for entropy to "
        "compare with.",
        unit="steps",
        at_least=1,
    )
    divergence: Action = option(
        Action.warn, "The score rises and the judge falls; without a judge the rule does nothing."
    )
    divergence_judgements: int = option(
        3,
        "Last judgements over which both trends are measured.",
        unit="judgements",
        at_least=2,
    )
    divergence_sd: float = option(
        2.0,
        "Standard errors over the held-out prompts by which each trend has to differ from 0.",
        unit="standard errors",
        at_least=0,
    )
    kl: Action = option(Action.off, "The KL divergence from the reference exceeds kl_max.")
    kl_max: float = option(50.0, "Limit of the rule kl.", unit="nats per response", above=0)
    length: Action = option(
        Action.warn, "Too many responses are cut off at rollout.max_response_length."
    )
    length_share: float = option(
        0.9, "Share of responses cut off in the window, for the rule length.", above=0, at_most=1
    )
    entropy: Action = option(Action.warn, "The entropy of the policy has collapsed.")
    entropy_share: float = option(
        0.05, "Share of the first steps' entropy, for the rule entropy.", above=0, below=1
    )

    def __post_init__(self) -> None:
        check_options(self, "stage.watch")
        check(
            self.judge_path is None or self.judge_function is None,
            "stage.watch.judge_function",
            self.judge_function,
            "null beside judge_path",
        )
