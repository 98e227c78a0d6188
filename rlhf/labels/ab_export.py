"""An A/B comparison before it is labelled: how many pairs it needs, and what became of the
prompts.
"""

import logging
from collections.abc import Sequence
from typing import Any

from conf.labelling import ABConfig
from rlhf.labels.ab import ABPlan, plan
from rlhf.labels.candidates import Gathered

LOG = logging.getLogger("rlhf.labels")


def plan_comparison(ab: ABConfig, budget: int) -> ABPlan:
    """How many pairs the comparison needs. Warns where ``label.budget`` is less. It is called
    before anything is generated.
    """
    planned = plan(ab.effect, ab.alpha, ab.power, ab.ties)
    LOG.info(
        "A/B comparison: %d pairs are planned, to find a win rate of %g with power %g.",
        planned.pairs,
        0.5 + ab.effect,
        ab.power,
    )
    if budget < planned.pairs:
        LOG.warning(
            "label.budget=%d is less than the %d pairs that label.ab plans: the comparison may "
            "end undecided.",
            budget,
            planned.pairs,
        )
    return planned


def comparison_details(
    planned: ABPlan, gathered: Gathered, policies: Sequence[str], asked: int
) -> dict[str, Any]:
    """The comparison for the ledger: the plan, the two policies, how many pairs are `asked`, and
    the prompts that nobody has to be asked about.

    Where the budget takes a part of the pairs, `identical` is as large a part of the prompts
    that both policies answered alike: all of them beside a sample of the others would pull the win
    rate towards 1/2.
    """
    counts = gathered.counts
    return planned.figures() | {
        "policies": list(policies),
        "asked": asked,
        "identical": round(counts["ties"] * asked / len(gathered.candidates)),
        "identical_of_all_prompts": counts["ties"],
        "empty": counts["empty"],
        "missing": counts["missing"],
    }


def log_comparison(
    planned: ABPlan, gathered: Gathered, policies: Sequence[str], asked: int
) -> None:
    """Log what stands between the plan and the pairs that are asked about."""
    if asked < planned.pairs:
        LOG.warning(
            "A/B comparison: %d pairs are planned, but %d go out: give more prompts, or expect "
            "no decision.",
            planned.pairs,
            asked,
        )
    counts = gathered.counts
    if counts["ties"]:
        LOG.info(
            "A/B comparison: both policies gave the same answer to %d of %d prompts: ties without "
            "a label.",
            counts["ties"],
            counts["prompts"],
        )
    for name, reason in (
        ("empty", "one of the answers is empty"),
        ("missing", "only one policy answered"),
    ):
        if counts[name]:
            LOG.warning(
                "A/B comparison of %s: %d prompts are left out, since %s.",
                " and ".join(policies),
                counts[name],
                reason,
            )
