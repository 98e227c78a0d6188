"""The proof with a pretrained model: the chain on SmolLM2-135M with LoRA, its chat template and
vLLM, ten PPO steps, a verifiable preference.

python -m benchmarks.proofs.smollm2                      runs and checks (about 15 minutes on two
idle cores) python -m benchmarks.proofs.smollm2 --check-only         checks the run that is there
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.proofs.common import Check, MissingRun, read_run, report, run_chain

EXPERIMENT = "smollm2"
STEPS = 10
MAX_GAP = 1e-3  # nats between vLLM and Hugging Face


def check_run(folder: Path) -> list[Check]:
    """Every bound of the proof on one run's directories. Raises MissingRun for a stage that has not
    finished.
    """
    reward, ppo, evaluation = (read_run(folder / stage) for stage in ("reward", "ppo", "eval"))
    scores = ppo.series("objective/scores")
    half = len(scores) // 2
    return [
        Check("PPO steps", float(ppo.summary["steps"]), low=STEPS),
        Check(
            "reward model's accuracy on held-out pairs", reward.metric("eval/accuracy"), low=0.75
        ),
        Check(
            "score, later half of the steps above the earlier one",
            _mean(scores[half:]) - _mean(scores[:half]),
            low=0.0,
            strict=True,
        ),
        Check(
            "held-out verifiable preference's difference, lower bound",
            evaluation.metric("eval/function_low"),
            low=0.0,
            strict=True,
        ),
        Check(
            "held-out score's difference, lower bound",
            evaluation.metric("eval/score_low"),
            low=0.0,
            strict=True,
        ),
        Check(
            "largest rollout/logprob_gap of all steps, nats",
            max(ppo.series("rollout/logprob_gap")),
            high=MAX_GAP,
            strict=True,
        ),
        Check(
            "largest gap of the probe after a sync, nats",
            max(ppo.series("rollout/probe_gap")),
            high=MAX_GAP,
            strict=True,
        ),
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.smollm2",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--runs", type=Path, default=Path("runs"), help="root of the run directories"
    )
    parser.add_argument(
        "--check-only", action="store_true", help="check the existing run, run nothing"
    )
    options, overrides = parser.parse_known_args(arguments)
    name = f"proof-smollm2-{options.seed}"
    if not options.check_only:
        code = run_chain(EXPERIMENT, name, options.seed, options.runs, overrides)
        if code != 0:
            print(f"the chain ended with exit code {code}", file=sys.stderr)
            return 1
    try:
        return (
            0 if report(f"{EXPERIMENT}, seed {options.seed}", check_run(options.runs / name)) else 1
        )
    except MissingRun as error:
        print(str(error), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
