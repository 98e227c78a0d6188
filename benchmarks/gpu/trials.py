"""The trials: which runs, their options, and what their metrics say."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_WARM_UP = 2  # steps that are not counted
# 16 prompts of about 128 tokens, 8 answers of 256: as in short reasoning; and for tests on a CPU
FULL = {"steps": 6, "prompts": 16, "samples": 8, "words": 48, "response": 256, "micro": 16384}
TINY = {"steps": 4, "prompts": 4, "samples": 2, "words": 4, "response": 8, "micro": 512}


@dataclass(frozen=True, slots=True)
class Trial:
    """One run."""

    stage: str  # ppo or grpo
    size: str
    # vllm, hf, server (weights by a file), ipc (weights within the device that both share) or ahead
    # (server, one step ahead)
    rollout: str

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.size}-{self.rollout}"


# What matters most comes first: the time may not last for all.
TRIALS = (
    Trial("grpo", "135m", "vllm"),
    Trial("ppo", "135m", "server"),
    Trial("grpo", "1.5b", "vllm"),
    Trial("grpo", "1.5b", "server"),
    Trial("ppo", "135m", "vllm"),
    Trial("grpo", "1.5b", "ahead"),
    Trial("ppo", "1.5b", "vllm"),
    Trial("grpo", "135m", "hf"),
    Trial("grpo", "0.5b", "vllm"),
    Trial("grpo", "135m", "ipc"),
)


def tiny(trial: Trial) -> Trial:
    """The same with a model for a CPU."""
    return Trial(trial.stage, "tiny", trial.rollout)


def chosen(words: Sequence[str], *, small: bool) -> list[Trial]:
    """The trials whose names hold one of the words; `small`: each kind that a CPU has once,
    tiny.
    """
    trials = list(TRIALS)
    if small:
        trials = [tiny(trial) for trial in TRIALS if trial.rollout != "ipc"]
    wanted = words or [""]
    return [t for t in dict.fromkeys(trials) if any(word in t.name for word in wanted)]


def even_tokens(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A reward that costs nothing: the share of even token ids."""
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]


def options(trial: Trial, model: Path, prompts: Path, runs: Path, *, cuda: bool) -> list[str]:
    """The run as command line options."""
    work = TINY if trial.size == "tiny" else FULL
    out = [
        f"stage={trial.stage}",
        *_generator(trial.rollout),
        "tracking=none",
        f"run.dir={runs}",
        f"run.name={trial.name}",
        "run.overwrite=true",
        f"model.path={model}",
        f"model.dtype={'bfloat16' if cuda else 'float32'}",
        f"data.path={prompts}",
        "data.max_prompt_length=512",
        "reward.function=benchmarks.gpu.trials:even_tokens",
        f"stage.steps={work['steps']}",
        f"stage.prompts_per_step={work['prompts']}",
        "stage.epochs=1",
        "stage.minibatches=1",
        "stage.save_steps=0",
        f"rollout.max_response_length={work['response']}",
        "rollout.kv_cache_gib=0.1",  # on a CPU
        "rollout.enforce_eager=true",  # CUDA graphs would take a minute of each trial's start
        f"engine.micro_tokens={work['micro']}",
    ]
    if trial.stage == "ppo":
        out.append("stage.critic_init=policy")
    else:
        out.append(f"stage.samples_per_prompt={work['samples']}")
    return out


def _generator(rollout: str) -> list[str]:
    if rollout in ("vllm", "hf"):
        return [f"rollout={rollout}"]
    return [
        "rollout=server",
        "rollout.server.count=1",
        f"rollout.server.transfer={'ipc' if rollout == 'ipc' else 'file'}",
        f"stage.ahead={int(rollout == 'ahead')}",
    ]


@dataclass(slots=True)
class Outcome:
    """What came of a trial."""

    trial: Trial
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    figures: dict[str, float | None] = field(default_factory=dict)


def figures_of(
    rows: Sequence[Mapping[str, float]],
    notes: Mapping[str, Any],
    trial: Trial,
    prompt_tokens: float,
    peak_flops: Mapping[str, float | None],
) -> dict[str, float | None]:
    """Medians over the steps of a run but the first ones. prompt_tokens: of a prompt; peak_flops:
    of the device, by source, in FLOP/s. Raises ValueError for a run with too few steps.

    The MFU counts 6 FLOPs a parameter and token of the update, a group's prompt once, twice for a
    critic of the same size, and no attention: what computing needs at least.
    """
    steps = [row for row in rows if "time/step_s" in row][_WARM_UP:]
    if not steps:
        raise ValueError(f"{len(rows)} steps are too few, expected more than {_WARM_UP}")
    work = TINY if trial.size == "tiny" else FULL
    trained = [row["rollout/response_tokens"] + work["prompts"] * prompt_tokens for row in steps]
    models = 2 if trial.stage == "ppo" else 1
    flops = [6.0 * float(notes["parameters"]) * models * tokens for tokens in trained]
    update = [row["time/update_s"] for row in steps]
    rates = [flop / second for flop, second in zip(flops, update, strict=True)]
    out: dict[str, float | None] = {
        "step_s": _median(row["time/step_s"] for row in steps),
        # one ahead, time/rollout_s is the wait for what was written meanwhile
        "generation_tokens_per_s": _median(row["rollout/tokens_per_s"] for row in steps),
        "update_tokens_per_s": _median(
            tokens / second for tokens, second in zip(trained, update, strict=True)
        ),
        "sync_s": _median(row["time/sync_s"] for row in steps),
        "gap": max(gap_of(row) for row in steps),
        "plan_gib": float(notes["plan_gib"]),
    }
    for source, peak in peak_flops.items():
        out[f"mfu_{source}"] = None if peak is None else statistics.median(rates) / peak
    for name in ("allocated_gib", "reserved_gib"):
        out[name] = notes.get(name)
    return out


def gap_of(row: Mapping[str, float]) -> float:
    """The largest gap between sampler and trainer in a step, nats: of its own tokens, or, where
    older weights wrote all of them, of the probe after the sync.
    """
    return row.get("rollout/logprob_gap", row["rollout/probe_gap"])


def _median(values: Any) -> float:
    return float(statistics.median(values))


def gap_problem(figures: Mapping[str, float | None]) -> str | None:
    """What is wrong with the gap between sampler and trainer. The run itself stops where it is
    above what rounding explains; here it has to be there at all.
    """
    gap = figures.get("gap")
    if gap is None or not math.isfinite(gap):
        return f"the gap between sampler and trainer is {gap}"
    return None
