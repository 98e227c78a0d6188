"""Whether a run's memory grows: 200 online steps of a tiny model, resident memory after the warm-up against that at the end.

python -m rlhf.stages.soak                      runs and checks (minutes)
python -m rlhf.stages.soak --check-only         checks the run that is there
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf import console
from rlhf.tracking import METRICS_FILE, read_jsonl

STEPS, WARM_UP, WINDOW = 200, 40, 20  # steps: in all, left out at the start, and those whose median is one end of the comparison
LIMIT = 0.02  # of growth
_OPTIONS = (
    "stage=ppo",
    "model=tiny",
    "model.tiny.vocab_size=300",
    "model.tiny.hidden_size=64",
    "model.tiny.intermediate_size=96",
    "model.tiny.layers=2",
    "model.tiny.heads=2",
    "model.tiny.max_positions=64",
    "data.max_prompt_length=32",
    "rollout=hf",
    "rollout.max_response_length=16",
    "tracking=none",
    "reward.function=rlhf.stages.soak:even_tokens",
    "stage.critic_init=policy",
    "stage.prompts_per_step=8",
    "stage.save_steps=20",
    "stage.reward_normalise=true",
    "stage.kl_controller=adaptive",
    "run.name=soak",
    f"stage.steps={STEPS}",
)


def even_tokens(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A reward that costs nothing: the share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def growth(resident: Sequence[float], warm_up: int = WARM_UP, window: int = WINDOW) -> float:
    """Median of the last `window` steps over that of the first `window` after the warm-up, less 1. Raises ValueError for fewer steps than that."""
    if len(resident) < warm_up + 2 * window:
        raise ValueError(f"{len(resident)} steps are too few: expected at least {warm_up + 2 * window}")
    return statistics.median(resident[-window:]) / statistics.median(resident[warm_up : warm_up + window]) - 1.0


def run(directory: Path) -> None:
    """The run, in a process of its own; raises CalledProcessError."""
    directory.mkdir(parents=True, exist_ok=True)
    prompts = directory / "soak_prompts.jsonl"
    rows = [{"prompt": f"{word} {number}"} for number in range(16) for word in ("alpha", "beta", "gamma", "delta")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "rlhf", *_OPTIONS, f"run.dir={directory}", f"data.path={prompts}", "run.overwrite=true"]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 where memory does not grow beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", default="runs", help="root of the run's directory")
    parser.add_argument("--check-only", action="store_true", help="check the run that is there")
    given = parser.parse_args(arguments)
    if not given.check_only:
        run(Path(given.dir))
    resident = [row["memory/rss_mb"] for row in read_jsonl(Path(given.dir) / "soak" / "ppo" / METRICS_FILE)]
    found = growth(resident)
    rows = [{"step": step, "resident memory (MiB)": resident[step - 1]} for step in (1, WARM_UP, *range(60, STEPS + 1, 20))]
    console.table(rows, title="resident memory of a run of 200 steps")
    print(f"growth from steps {WARM_UP + 1}-{WARM_UP + WINDOW} to {STEPS - WINDOW + 1}-{STEPS}: {found:+.2%} (limit {LIMIT:.0%})")
    return 0 if found <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
