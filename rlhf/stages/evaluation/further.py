"""Any number of policies before the judge llm: their answers to the held-out prompts, and what it
says of them.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from conf.schema import Config
from eval.sections import Section
from rlhf.models.loading import load_tokenizer
from rlhf.process.supervision import Watchdog
from rlhf.run import console
from rlhf.stages.evaluation.engines import engine_of
from rlhf.stages.evaluation.llm_judge import judge_policies
from rlhf.stages.evaluation.policies import model_at
from rlhf.stages.evaluation.tasks import policies_of
from rlhf.types import Prompt, Rollout
from rollout import acting_in, make_generator

PromptsOf = Callable[[Any], Sequence[Prompt]]  # by a policy's own tokenizer
_SHOWN = 3  # tables on the terminal


class HasRun(Protocol):
    """What judging takes of a run."""

    cfg: Config
    dir: Path
    watchdog: Watchdog

    def add_parent(self, kind: str, path: str | Path | None) -> None: ...


def judge_all(
    run: HasRun, known: Mapping[str, Sequence[Rollout]], prompts_of: PromptsOf
) -> tuple[Section, dict[str, float]]:
    """What the judge llm says of all policies, as a part of the report and as metrics. `known`:
    answers that are there, by policy; the other policies write theirs now, each read by its own
    tokenizer, which may be another one.
    """
    stage = run.cfg.stage
    others = {name: path for name, path in policies_of(stage).items() if name not in known}
    for name, path in others.items():
        run.add_parent(name, path)
    answers = {**known, **_answers_of(run, others, prompts_of)}
    run.watchdog.phase("judge pairs")
    run.add_parent("judge", stage.llm_judge.path)
    part, figures = judge_policies(run, answers)
    for table in part.tables[:_SHOWN]:
        console.table(table.as_rows(), title=table.title)
    return part, figures


def _answers_of(
    run: HasRun, policies: Mapping[str, str], prompts_of: PromptsOf
) -> dict[str, list[Rollout]]:
    """Each policy's answers by name, with the seed and the sampling of before and after."""
    cfg = run.cfg
    out: dict[str, list[Rollout]] = {}
    drawing = {
        "n": cfg.stage.samples_per_prompt,
        "seed": cfg.run.seed,
        "greedy": cfg.stage.greedy,
    }
    for name, path in policies.items():
        run.watchdog.phase(f"generate {name}")
        model = model_at(cfg.model, path)
        tokenizer = load_tokenizer(model, cfg.data.chat_template)
        acting = acting_in(cfg.environment, tokenizer)
        prompts = prompts_of(tokenizer)
        acting.check(prompts, cfg.data)
        make = functools.partial(make_generator, cfg)
        with engine_of(model, tokenizer, make, run.dir / "start") as generator:
            writing = acting.around(generator, data=cfg.data, rollout=cfg.rollout)
            out[name] = writing.generate(prompts, **drawing)
    return out
