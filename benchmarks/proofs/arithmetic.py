"""The proof of verifiable rewards: SFT and GRPO on sums from scratch, seed by seed, exact match on
held-out sums before and after GRPO.

python -m benchmarks.proofs.arithmetic --seeds 0 1 2     runs and checks
python -m benchmarks.proofs.arithmetic --check-only      checks the runs that are there
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.proofs.common import Check, prove_seeds, read_run

EXPERIMENT = "arithmetic"
LEAST_RISE = 0.20  # of the share of held-out sums whose most likely answer is right
MAX_WALL_S = 10 * 60


def check_run(folder: Path) -> list[Check]:
    """Every bound on the run directories of one seed. Raises MissingRun for a stage that has not
    finished.
    """
    chain, grpo, evaluation = (read_run(folder / stage) for stage in ("chain", "grpo", "eval"))
    return [
        Check(
            "exact match on held-out sums before GRPO",
            evaluation.metric("eval/function_before"),
            low=0.0,
            high=1.0 - LEAST_RISE,
        ),
        Check(
            "exact match on held-out sums after GRPO",
            evaluation.metric("eval/function_after"),
            low=LEAST_RISE,
            high=1.0,
        ),
        Check("its rise", evaluation.metric("eval/function_delta"), low=LEAST_RISE),
        Check("wall time of GRPO, s", float(grpo.summary["wall_s"]), high=MAX_WALL_S),
        Check("wall time of the chain, s", float(chain.summary["wall_s"]), high=MAX_WALL_S),
        Check(
            "largest rollout/logprob_gap of all steps, nats",
            max(grpo.series("rollout/logprob_gap")),
            high=1e-3,
            strict=True,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    return prove_seeds(EXPERIMENT, check_run, arguments, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
