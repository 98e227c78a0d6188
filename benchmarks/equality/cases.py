"""The runs that benchmarks.equality makes in both checkouts, and the rows that they read."""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.shared import write_rows

_TINY = (
    "model=tiny",
    "model.tiny.vocab_size=300",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=64",
    "model.tiny.layers=2",
    "model.tiny.heads=2",
    "model.tiny.max_positions=128",
)
_WORDS = ("red", "blue", "green", "round", "small", "loud", "warm", "late")


@dataclass(frozen=True, slots=True)
class Run:
    """One command of a case, and the files of its run directory that are compared."""

    stage: str
    overrides: tuple[str, ...]
    files: tuple[str, ...] = ("metrics.jsonl", "samples.jsonl")
    weights: bool = True  # compare the bytes of model/*.safetensors
    ranks: int = 1


CASES: dict[str, tuple[Run, ...]] = {
    "demo": (
        Run(
            "sft",
            (
                "experiment=reviews",
                "stage.steps=60",
                "stage.eval_steps=30",
                "engine.micro_batch_size=32",
            ),
            files=("metrics.jsonl",),
        ),
        Run(
            "reward",
            (
                "experiment=reviews",
                "stage.steps=30",
                "stage.eval_steps=15",
                "engine.micro_batch_size=32",
            ),
            files=("metrics.jsonl",),
        ),
        Run("ppo", ("experiment=reviews", "stage.steps=10")),
    ),
    "zero2": (
        Run(
            "ppo",
            (
                *_TINY,
                "engine=zero2",
                "rollout=hf",
                "data.path=prompts.jsonl",
                "data.max_prompt_length=32",
                "rollout.max_response_length=12",
                "stage.steps=4",
                "stage.prompts_per_step=8",
                "stage.epochs=2",
                "stage.minibatches=2",
                "stage.critic_init=policy",
                "stage.learning_rate=1e-3",
                "stage.critic_learning_rate=1e-3",
                "+reward.terms.length.kind=length",
                "reward.terms.length.low=8",
                "reward.terms.length.high=12",
                "reward.terms.length.ramp=30",
                "reward.terms.length.unit=characters",
            ),
            ranks=2,
        ),
    ),
    "dpo": (
        Run(
            "dpo",
            (
                *_TINY,
                "data.path=pairs.jsonl",
                "stage.steps=12",
                "stage.batch_size=8",
                "stage.max_length=64",
                "stage.learning_rate=1e-3",
                "stage.eval_steps=6",
                "stage.log_steps=1",
                "engine.micro_batch_size=4",
            ),
            files=("metrics.jsonl",),
        ),
    ),
    "data": (
        Run(
            "data",
            ("data=clean", "data.path=pairs.jsonl", "data.report=true"),
            files=(
                "metrics.jsonl",
                "train.jsonl",
                "eval.jsonl",
                "rejected.jsonl",
                "report.json",
            ),
            weights=False,
        ),
    ),
}


def write_data(folder: Path) -> None:
    """prompts.jsonl and pairs.jsonl, with some repeated and some damaged rows."""
    prompts = [{"prompt": f"{word} {number}"} for number in range(8) for word in _WORDS]
    pairs: list[dict[str, str]] = []
    for number in range(16):
        for word in _WORDS:
            prompt = f"Which thing is {word}? ({number})"
            chosen = f"The {word} one is the {_WORDS[number % len(_WORDS)]} thing, number {number}."
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": f"No, {word * 2}"})
    pairs += pairs[:3]  # duplicates
    pairs.append({"prompt": "Who?", "chosen": "Write to a@example.org.", "rejected": "Nobody."})
    pairs.append({"prompt": "Broken\u00c3\u00a9?", "chosen": "yes  yes yes", "rejected": "no"})
    write_rows(folder / "prompts.jsonl", prompts)
    write_rows(folder / "pairs.jsonl", pairs)
