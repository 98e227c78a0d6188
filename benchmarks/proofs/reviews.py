"""The demo's proof: the whole chain on the movie reviews, seed by seed, every figure of the
acceptance held against its bound.

python -m benchmarks.proofs.reviews --seeds 0 1 2        runs and checks (about 12 minutes a seed on
two idle cores) python -m benchmarks.proofs.reviews --check-only         checks the runs that are
there
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.proofs.common import Check, prove_seeds, read_run, step_time_share

EXPERIMENT = "reviews"
STAGES = ("sft", "reward", "ppo", "eval")
MAX_WALL_S = 15 * 60
MAX_RSS_MB = 6 * 1024


def check_run(folder: Path) -> list[Check]:
    """Every bound of the demo on the run directories of one seed. Raises MissingRun for a stage
    that has not finished.
    """
    chain = read_run(folder / "chain")
    runs = {stage: read_run(folder / stage) for stage in STAGES}
    reward, ppo, evaluation = runs["reward"], runs["ppo"], runs["eval"]
    sync_share = sum(ppo.series("time/sync_s")) / sum(ppo.series("time/step_s"))
    return [
        Check(
            "held-out score up, in standard deviations of SFT's",
            evaluation.metric("eval/score_shift_sd"),
            low=1.0,
        ),
        Check(
            "lexicon judge's difference, lower bound",
            evaluation.metric("eval/lexicon_low"),
            low=0.0,
            strict=True,
        ),
        Check(
            "classifier judge's difference, lower bound",
            evaluation.metric("eval/classifier_low"),
            low=0.0,
            strict=True,
        ),
        Check("KL, nats per response token", evaluation.metric("eval/kl_per_token"), high=1.0),
        Check("distinct-2, share of SFT's", evaluation.metric("eval/distinct_2_ratio"), low=0.7),
        Check(
            "reward model's accuracy on held-out pairs", reward.metric("eval/accuracy"), low=0.75
        ),
        Check(
            "accuracy of the longer side",
            reward.metric("eval/length_baseline"),
            low=0.45,
            high=0.55,
        ),
        Check(
            "largest rollout/logprob_gap of all steps, nats",
            max(ppo.series("rollout/logprob_gap")),
            high=1e-4,
            strict=True,
        ),
        Check("sync's share of the steps' time", sync_share, high=0.1, strict=True),
        Check("least share of a step's wall time in time/*_s", step_time_share(ppo), low=0.95),
        Check(
            "peak memory of any stage, MiB",
            max(float(run.summary["peak_rss_mb"]) for run in runs.values()),
            high=MAX_RSS_MB,
            strict=True,
        ),
        Check("wall time of the chain, s", float(chain.summary["wall_s"]), high=MAX_WALL_S),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    return prove_seeds(EXPERIMENT, check_run, arguments, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
