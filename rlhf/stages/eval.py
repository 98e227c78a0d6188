"""``stage=eval``: two policies on the same held-out prompts, before and after training: scores,
outside judges, KL, length, diversity.
"""

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

from conf.choices import Judge, ModelKind
from conf.schema import AdapterConfig, Config, DataConfig, ModelConfig
from conf.stages import EvalStage
from eval.compare import Answers, compare, side_by_side
from eval.report import comparison as report
from eval.sections import Section
from reward.base import is_set, model_paths
from reward.terms import check_reward, check_reward_model, check_rows, make_scorer
from rlhf.checks import capacity, inputs, launch
from rlhf.data import reading
from rlhf.data.sources import data_files, given
from rlhf.models.directories import adapter_name, check_model_path, contents
from rlhf.process import distributed
from rlhf.run import console
from rlhf.run.context import RunContext
from rlhf.stages.evaluation import tasks
from rlhf.stages.evaluation.further import judge_all
from rlhf.stages.evaluation.judges import check_judges, judge_rollouts, make_judges
from rlhf.stages.evaluation.one_base import Swapped, one_base, without_swapping
from rlhf.stages.evaluation.policies import (
    Apart,
    Asked,
    asked,
    check_policy,
    response_kl,
    same_tokenizer,
)
from rlhf.stages.evaluation.reporting import publish_report
from rlhf.types import Prompt, Scorer, UserError
from rollout import acting_in, lora_obstacle

LOG = logging.getLogger("rlhf.stages.eval")


def check(cfg: Config) -> list[str]:
    """All that can be known before weights load; returns notes worth a warning. Raises
    UserError.
    """
    stage, data = cfg.stage, cfg.data
    assert isinstance(stage, EvalStage)
    notes = launch.check_backend(cfg.rollout.backend)
    if cfg.tasks:
        tasks.check(cfg.tasks, stage, cfg.model, cfg.rollout, cfg.data.chat_template)
    if _only_judges(stage, cfg.data):
        inputs.refuse_running_servers(cfg.rollout, stage.name)
        _check_judging(stage)
        reading.check_first_rows(reading.DataRequest.of(cfg))
        return notes
    if not _compares(stage, cfg.data, bool(cfg.tasks)):
        return notes
    inputs.refuse_running_servers(cfg.rollout, stage.name)
    check_policies(stage, cfg.model)
    inputs.check_native([stage.before, stage.after], cfg.rollout.backend)
    if stage.before is not None and stage.after is not None:
        one_base(cfg.rollout, stage.before, stage.after)
    capacity.check_cache(cfg.rollout, cfg.model, data.max_prompt_length, cfg.environment)
    inputs.check_template(data)
    acting_in(cfg.environment, None)
    inputs.check_acting_terms(cfg.reward, cfg.environment.kind)
    if given(data) is None and data.eval_path is None:
        raise UserError(
            "data.path and data.eval_path are not set: stage=eval needs a file of prompts."
        )
    if not data.holds_out:
        raise UserError(reading.NO_PROMPTS_HELD_OUT)
    reading.check_first_rows(reading.DataRequest.of(cfg))
    inputs.refuse_pipeline(data, stage.name)
    check_judges(stage)
    for path in (stage.before, stage.after):
        reads = dataclasses.replace(cfg.model, path=path, gguf_file=None)
        known = inputs.policy_tokenizer(reads, data.chat_template)
        kind, scoring = cfg.environment.kind, model_paths(cfg.reward)
        reads_pictures = inputs.check_pictures(path, known, cfg.rollout, kind, scoring)
        if reads_pictures and Judge.llm in stage.judges:
            raise UserError(
                f"stage.judges=[llm]: the policy {path} reads pictures, and the judge would get "
                "the texts alone. Leave it out; a function gets the pictures as `images`."
            )
    if is_set(cfg.reward):
        check_reward(cfg.reward)
        tokenizer = inputs.policy_tokenizer(cfg.model, data.chat_template)
        read_as_texts = []
        for key, path in model_paths(cfg.reward):
            read_as_texts += check_reward_model(key, path, tokenizer)
        inputs.refuse_texts(cfg.environment.kind, read_as_texts)
        notes += read_as_texts
        if cfg.reward.terms:
            check_rows(cfg.reward, reading.first_fields(reading.DataRequest.of(cfg)))
    return notes


def _compares(stage: EvalStage, data: DataConfig, has_tasks: bool) -> bool:
    """Whether two policies answer held-out prompts; where there are tasks, only with both policies
    and prompts.
    """
    if not has_tasks and not _only_judges(stage, data):
        return True
    has_prompts = given(data) is not None or data.eval_path is not None
    return has_prompts and stage.before is not None and stage.after is not None


def _only_judges(stage: EvalStage, data: DataConfig) -> bool:
    """Whether the judge llm compares policies of which before and after are not both."""
    has_prompts = given(data) is not None or data.eval_path is not None
    pair = stage.before is not None and stage.after is not None
    return Judge.llm in stage.judges and has_prompts and not pair and bool(stage.policies)


def check_policies(stage: EvalStage, model: ModelConfig) -> None:
    """The two policies' directories are models. Raises UserError."""
    for key, path in (("stage.before", stage.before), ("stage.after", stage.after)):
        if path is not None:
            check_model_path(path, key)
    if model.path is not None or model.kind is ModelKind.tiny:
        inputs.check_model(model)


def _check_judging(stage: EvalStage) -> None:
    """The judge llm and two policies or more are there. Raises UserError."""
    check_judges(stage)
    policies = tasks.policies_of(stage)
    if len(policies) < 2:
        raise UserError(
            f"stage.judges holds llm, but the only policy is {', '.join(policies)}: expected two "
            "or more, as stage.policies.NAME=<model directory>, stage.before or stage.after."
        )
    for name, path in policies.items():
        check_model_path(path, f"stage.policies.{name}")


def run(ctx: RunContext) -> None:
    """Measure policies on tasks, and compare ``stage.before`` with ``stage.after``: reads prompts
    from data.eval_path (or the held-out share of data.path).
    """
    with ctx.closing():
        cfg = ctx.cfg
        distributed.require_one_process("stage=eval", "Run it without torchrun.")
        sections: list[Section] = []
        metrics: dict[str, float] = {}
        if cfg.tasks:
            sections, metrics = tasks.run(ctx)
        if _compares(cfg.stage, cfg.data, bool(cfg.tasks)):
            _run(ctx, sections, metrics)
            return
        if _only_judges(cfg.stage, cfg.data):
            part, figures = judge_all(ctx, {}, functools.partial(_prompts, cfg))
            sections.append(part)
        else:
            figures = {}
        ctx.tracker.log(0, metrics | figures)
        page = publish_report(ctx.dir, cfg.run.name, sections, ctx.tracker)
        files = {"samples": ctx.dir / "samples.jsonl"} if cfg.tasks else {}
        shown = tasks.headlines(cfg.tasks, metrics)
        ctx.finish(
            steps=1,
            metrics=metrics | figures,
            model=None,
            figures=shown,
            files={**files, "report": page},
        )


def _run(ctx: RunContext, sections: list[Section], of_tasks: dict[str, float]) -> None:
    """Compare. `sections`, `of_tasks`: what tasks gave, for the report and the metrics."""
    cfg, stage = ctx.cfg, ctx.cfg.stage
    assert isinstance(stage, EvalStage)
    ctx.watchdog.phase("build")
    paths = _paths(stage)
    tokenizer = same_tokenizer(cfg.model, cfg.data.chat_template, *paths)
    prompts = _prompts(cfg, tokenizer)
    acting_in(cfg.environment, tokenizer).check(prompts, cfg.data)
    judges = make_judges(stage, tokenizer)
    scorer: Scorer | None = None  # without a reward there is no score among the figures
    if is_set(cfg.reward):
        scorer = make_scorer(
            cfg.reward, device=distributed.device(), policy_tokenizer=tokenizer, training=False
        )
    for kind, path in (
        ("before", paths[0]),
        ("after", paths[1]),
        *(("reward", path) for _, path in model_paths(cfg.reward)),
    ):
        ctx.add_parent(kind, path)
    for file in data_files(cfg.data):
        ctx.add_data(file)
    ctx.add_data(stage.judge_path if Judge.classifier in stage.judges else None)

    states = _states(asked(cfg, tokenizer, *paths), ctx.dir / "start")
    check_policy(states.after(), cfg.engine.micro_tokens, "stage.after")
    old, new = states.generate(prompts, ctx.watchdog.phase)
    ctx.watchdog.phase("judge")
    before = Answers(old, judge_rollouts(old, judges, scorer))
    after = Answers(new, judge_rollouts(new, judges, scorer))
    ctx.watchdog.phase("kl")
    kl = response_kl(
        states.after,
        states.before,
        new,
        tokenizer=tokenizer,
        temperature=cfg.rollout.temperature,
        logits_chunk=cfg.engine.logits_chunk,
        micro_tokens=cfg.engine.micro_tokens,
    )
    del states  # their models make room for a judge's
    ctx.watchdog.phase("compare")
    _finish(ctx, before, after, kl, sections, of_tasks)


def _states(asked: Asked, start: Path) -> Apart | Swapped:
    """Both policies: one model and one engine that swap their adapters where they can, else a
    model each.
    """
    common = one_base(asked.rollout, asked.before, asked.after)
    if common is not None:
        model = asked.model
        reason = lora_obstacle(common.weights, trust_remote_code=model.trust_remote_code)
        if reason is None:
            return Swapped(asked, common)
        without_swapping(asked.rollout, reason)
    return Apart(asked, start)


def _finish(
    ctx: RunContext,
    before: Answers,
    after: Answers,
    kl: list[float],
    further: list[Section],
    of_tasks: dict[str, float],
) -> None:
    """Compare, show and log."""
    stage = ctx.cfg.stage
    comparison = compare(before, after, kl, resamples=stage.bootstrap, seed=ctx.cfg.run.seed)
    rows = side_by_side(before, after, kl)
    ctx.tracker.samples(0, rows)
    scores = {}
    for name, judgements in before.judgements.items():
        scores[name] = {"before": judgements, "after": after.judgements[name]}
    plots = report.plot(comparison, scores, ctx.dir / "plots")
    ctx.tracker.images(list(plots.values()))
    metrics = comparison.metrics() | of_tasks
    console.table(report.sample_rows(rows, stage.shown), title="The same prompt before and after")
    prompts = len(before.rollouts) // stage.samples_per_prompt
    before_name, after_name = (_named(path) for path in _paths(stage))
    title = f"Before{before_name} and after{after_name} on {prompts} held-out prompts"
    console.table(report.table_rows(comparison), title=title)
    first = report.section(comparison, rows, plots, about=f"{title}.", shown=max(1, stage.shown))
    sections = [first, *further]
    if Judge.llm in stage.judges:
        known = {"before": before.rollouts, "after": after.rollouts}
        part, figures = judge_all(ctx, known, functools.partial(_prompts, ctx.cfg))
        sections.append(part)
        metrics |= figures
    ctx.tracker.log(0, metrics)
    page = publish_report(ctx.dir, ctx.cfg.run.name, sections, ctx.tracker)
    ctx.finish(
        steps=1,
        metrics=metrics,
        model=None,
        figures=_headlines(metrics) | tasks.headlines(ctx.cfg.tasks, of_tasks),
        files={"samples": ctx.dir / "samples.jsonl", "report": page},
    )


def _named(path: str) -> str:
    """The name in brackets under which an adapter was saved, where it was given one."""
    for adapter in reversed(contents(path).adapters):
        name = adapter_name(adapter)
        if name in (None, AdapterConfig().name):
            break
        return f" ({name})"
    return ""


def _paths(stage: EvalStage) -> tuple[str, str]:
    if stage.before is None or stage.after is None:
        missing = "stage.before" if stage.before is None else "stage.after"
        raise UserError(
            f"{missing} is not set: stage=eval compares two model directories, "
            "stage.before=<before> and stage.after=<after>."
        )
    return stage.before, stage.after


def _prompts(cfg: Config, tokenizer: Any) -> list[Prompt]:
    """The first ``stage.prompts`` held-out prompts; a lone data.eval_path is taken whole."""
    assert isinstance(cfg.stage, EvalStage)
    source = cfg
    if given(cfg.data) is None:
        data = dataclasses.replace(cfg.data, path=cfg.data.eval_path)
        source = dataclasses.replace(cfg, data=data)
    prompts = reading.prompts(reading.DataRequest.of(source), tokenizer, split="eval")
    if len(prompts) < cfg.stage.prompts:
        LOG.warning(
            "stage.prompts=%d, but there are only %d held-out prompts; all of them are used.",
            cfg.stage.prompts,
            len(prompts),
        )
    return list(prompts[: cfg.stage.prompts])


def _headlines(metrics: dict[str, float]) -> dict[str, str]:
    """The few figures of the closing panel."""
    out = {}
    for label, name in (
        ("score up by (standard deviations)", "eval/score_shift_sd"),
        ("KL (nats per token)", "eval/kl_per_token"),
    ):
        if name in metrics:
            out[label] = f"{metrics[name]:.3f}"
    for judge in ("lexicon", "classifier", "function"):
        delta = metrics.get(f"eval/{judge}_delta")
        if delta is not None:
            low = metrics[f"eval/{judge}_low"]
            high = metrics[f"eval/{judge}_high"]
            out[f"judge {judge}"] = f"{delta:+.3f} [{low:+.3f}, {high:+.3f}]"
    return out | {"distinct-2 (share of before)": f"{metrics['eval/distinct_2_ratio']:.2f}"}
