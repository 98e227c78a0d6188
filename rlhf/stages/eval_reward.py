"""``stage=eval_reward``: reward models on judged pairs (accuracy by subset, calibration,
agreement), on several answers to each prompt (best-of-n), and along a run (over-optimisation).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from conf.judging import EvalRewardStage
from conf.schema import Config, RewardConfig
from eval.sections import Section
from rlhf.data.files import check_file
from rlhf.process import distributed
from rlhf.process.supervision import Watchdog
from rlhf.run import console
from rlhf.run.tracking.tracker import Tracker
from rlhf.stages.evaluation.reporting import publish_report
from rlhf.stages.evaluation.reward_parts import (
    Asked,
    best_of_part,
    curve_section,
    pair_sections,
)
from rlhf.stages.evaluation.reward_rows import Text, read_curve, read_pairs, read_samples
from rlhf.stages.evaluation.reward_scores import check_models, score_texts
from rlhf.types import UserError

_LOOKED = 20  # rows that the check reads
_HEADLINES = ("accuracy", "rewardbench", "ece")


class Run(Protocol):
    """What this stage takes of its run."""

    cfg: Config
    dir: Path
    tracker: Tracker
    watchdog: Watchdog

    def closing(self) -> AbstractContextManager[Any]: ...

    def add_parent(self, kind: str, path: str | Path | None) -> None: ...

    def add_data(self, path: str | Path | None) -> str | None: ...

    def finish(
        self,
        *,
        steps: int,
        metrics: Any,
        model: str | None,
        figures: Any = None,
        files: Any = None,
    ) -> None: ...


def models_of(stage: EvalRewardStage, reward: RewardConfig) -> dict[str, str]:
    """The reward models by name: those of stage.models, or reward.path as ``reward``."""
    if stage.models or reward.path is None:
        return dict(stage.models)
    return {"reward": reward.path}


def scorers(stage: EvalRewardStage, models: dict[str, str]) -> tuple[str, str]:
    """What stage.proxy and stage.judge stand for. Raises UserError without a proxy."""
    proxy = stage.proxy or next(iter(models), None)
    if proxy is None:
        raise UserError(
            "stage.proxy is not set, and there is no reward model: name a column of stage.samples, "
            "or a model with stage.models.NAME=<directory>."
        )
    assert stage.judge is not None
    if proxy == stage.judge:
        raise UserError(
            f"stage.judge={stage.judge} is what the best is chosen by: expected a scorer that "
            "stage.proxy never saw."
        )
    return proxy, stage.judge


def check(cfg: Config) -> list[str]:
    """There is something to look at, and the models can read it. Raises UserError."""
    stage = cfg.stage_as(EvalRewardStage)
    distributed.require_one_process("stage=eval_reward", "Run it without torchrun.")
    if stage.pairs is None and stage.samples is None and stage.curve is None:
        raise UserError(
            "stage=eval_reward needs stage.pairs, stage.samples or stage.curve: none is set."
        )
    models = models_of(stage, cfg.reward)
    texts: list[Text] = []
    if stage.pairs is not None:
        if not models:
            raise UserError(
                "stage.pairs needs a reward model: stage.models.NAME=<directory>, or reward.path."
            )
        for row in read_pairs(stage.pairs, _LOOKED):
            texts += [row.chosen, row.rejected]
    if stage.samples is not None:
        names = scorers(stage, models)
        columns = [name for name in names if name not in models]
        rows = read_samples(stage.samples, columns, _LOOKED)
        if len(columns) < len(names):
            texts += [row.text for row in rows]
    if stage.curve is not None:
        check_file(stage.curve, "stage.curve")
    check_models(models, texts)
    return []


def run(ctx: Run) -> None:
    """Score, and write the report."""
    with ctx.closing():
        _run(ctx)


def _run(ctx: Run) -> None:
    cfg = ctx.cfg
    stage = cfg.stage_as(EvalRewardStage)
    models = models_of(stage, cfg.reward)
    for path in models.values():
        ctx.add_parent("reward", path)
    for file in (stage.pairs, stage.samples, stage.curve):
        ctx.add_data(file)
    asked = Asked(stage, cfg.run.seed, ctx.dir / "plots")
    tokens = cfg.reward.batch_tokens
    sections: list[Section] = []
    if stage.pairs is not None:
        ctx.watchdog.phase("score pairs")
        pairs = read_pairs(stage.pairs)
        texts = [row.chosen for row in pairs] + [row.rejected for row in pairs]
        sections += pair_sections(pairs, score_texts(models, texts, batch_tokens=tokens), asked)
    if stage.samples is not None:
        ctx.watchdog.phase("score samples")
        names = scorers(stage, models)
        ours = {name: models[name] for name in names if name in models}
        samples = read_samples(stage.samples, [name for name in names if name not in ours])
        scores = score_texts(ours, [one.text for one in samples], batch_tokens=tokens)
        sections.append(best_of_part(samples, scores, names, asked))
    if stage.curve is not None:
        columns = [stage.curve_kl, stage.curve_proxy, stage.curve_judge]
        points, skipped = read_curve(stage.curve, columns)
        sections.append(curve_section(points, skipped, asked))
    _finish(ctx, sections)


def _finish(ctx: Run, sections: Sequence[Section]) -> None:
    metrics: dict[str, float] = {}
    pictures: list[Path] = []
    for section in sections:
        metrics |= section.figures
        pictures += section.plots.values()
        for table in section.tables:
            console.table(table.as_rows(), title=table.title)
    ctx.tracker.images(pictures)
    ctx.tracker.log(0, metrics)
    page = publish_report(ctx.dir, ctx.cfg.run.name, sections, ctx.tracker)
    shown = {}
    for name, value in metrics.items():
        if name.rpartition("/")[2] in _HEADLINES:
            shown[name.removeprefix("eval/")] = f"{value:.3f}"
    ctx.finish(steps=1, metrics=metrics, model=None, figures=shown, files={"report": page})
