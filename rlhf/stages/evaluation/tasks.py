"""The tasks of ``stage=eval``: any number of policies on local files of rows. One engine for each
policy answers all of its tasks; answers are kept as they come.
"""

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from conf.choices import ModelKind, RolloutBackend
from conf.labelling import TaskConfig, TaskKind
from conf.reward import EnvironmentConfig, EvalStage
from conf.schema import AdapterConfig, Config, ModelConfig, RolloutConfig
from eval.sections import Section
from eval.tasks import figures, lm_eval
from eval.tasks.figures import Measured, RowAnswer
from eval.tasks.report import sample_rows, section
from rlhf.checks import inputs
from rlhf.models.directories import check_model_path
from rlhf.models.loading import load_tokenizer
from rlhf.process import supervision
from rlhf.process.supervision import Watchdog
from rlhf.run import console
from rlhf.run.directory import ANSWERS_FOLDER
from rlhf.run.tracking.tracker import Tracker
from rlhf.stages.evaluation.engines import engine_of, likelihoods_by, write_answers
from rlhf.stages.evaluation.kept import KeptAnswers
from rlhf.stages.evaluation.task_jobs import Job, Policy, jobs_of, of_scored, of_written
from rlhf.stages.evaluation.task_rows import TaskRows, read_task
from rlhf.types import Generator, UserError
from rollout import make_generator, resolve_backend
from rollout.sampling import Sampling

LOG = logging.getLogger("rlhf.stages.eval")
_BATCH = 256  # rows between two writes of answers
LM_EVAL_FOLDER = "lm_eval"
_PROBED = 4  # rows that a check encodes for each policy

Answers = dict[str, list[RowAnswer]]  # by task, in the order of its rows


class TaskRun(Protocol):
    """All that tasks take of a run."""

    cfg: Config
    dir: Path
    tracker: Tracker
    watchdog: Watchdog

    def add_parent(
        self,
        kind: str,
        path: str | Path | None,
    ) -> None: ...
    def add_data(self, path: str | Path | None) -> str | None: ...


# ---- before weights load ----


def policies_of(stage: EvalStage) -> dict[str, str]:
    """The policies by name: `before`, `after`, and those of ``stage.policies``. Raises UserError
    for a name that can't be one.
    """
    found = {"before": stage.before, "after": stage.after}
    paths = {name: path for name, path in found.items() if path is not None}
    for name, path in stage.policies.items():
        if name in found:
            raise UserError(f"stage.policies.{name}: stage.{name} has this name already.")
        if re.fullmatch(r"[\w.-]+", name) is None:
            raise UserError(f"stage.policies.{name}: expected a name of letters, digits, _, - .")
        paths[name] = path
    return paths


def check(
    tasks: Mapping[str, TaskConfig],
    stage: EvalStage,
    model: ModelConfig,
    rollout: RolloutConfig,
    chat_template: str | None,
) -> None:
    """The tasks' files fit, every metric can be had here, and every policy can do what each task
    asks. Raises UserError with all that is wrong.
    """
    wrong: list[str] = []
    held: list[TaskRows] = []
    for name, task in tasks.items():
        found = _gathered(wrong, functools.partial(read_task, name, task))
        held += [] if found is None else [found]
    paths = policies_of(stage)
    if not paths:
        wrong.append(
            "tasks are given, but no policy: expected stage.policies.NAME=<model directory>, "
            "stage.before or stage.after."
        )
    if rollout.backend is RolloutBackend.server:
        wrong.append("rollout=server: tasks want rollout=vllm or hf, an engine in this process.")
    backend = resolve_backend(rollout.backend)
    for name, path in paths.items():
        policy = _gathered(wrong, functools.partial(open_policy, name, path, model, chat_template))
        if policy is None:
            continue
        _gathered(wrong, functools.partial(inputs.check_native, [path], rollout.backend))
        for one in held:
            probed = dataclasses.replace(one, rows=one.rows[:_PROBED])
            _gathered(wrong, functools.partial(jobs_of, policy, probed, 0, backend.value))
    if wrong:
        raise UserError("\n".join(wrong))


def _gathered(wrong: list[str], call: Callable[[], Any]) -> Any:
    """What the call gives; None where it raises UserError, whose message joins the others."""
    try:
        return call()
    except UserError as error:
        if str(error) not in wrong:
            wrong.append(str(error))
        return None


def open_policy(
    name: str,
    path: str,
    model: ModelConfig,
    chat_template: str | None,
) -> Policy:
    """A policy with its tokenizer. Raises UserError that names it."""
    gguf_file = model.gguf_file if path == model.path else None
    own = dataclasses.replace(
        model,
        kind=ModelKind.pretrained,
        path=path,
        gguf_file=gguf_file,
    )
    try:
        check_model_path(path, "its directory")
        tokenizer = load_tokenizer(own, chat_template)
        limit = inputs.max_positions(path)
    except UserError as error:
        raise UserError(f"policy {name} ({path}): {error}") from error
    return Policy(name, own, tokenizer, limit)


# ---- the run ----


def run(ctx: TaskRun) -> tuple[list[Section], dict[str, float]]:
    """Measure every policy on every task: a section for each task, and the metrics. Tables are
    printed, answers go to samples.jsonl.
    """
    cfg, stage = ctx.cfg, ctx.cfg.stage_as(EvalStage)
    ctx.watchdog.phase("read tasks")
    held = [read_task(name, task) for name, task in cfg.tasks.items()]
    for one in held:
        for file in one.files:
            ctx.add_data(file)
    answers: dict[str, Answers] = {}
    backend = resolve_backend(cfg.rollout.backend).value
    for name, path in policies_of(stage).items():
        ctx.add_parent(name, path)
        policy = open_policy(name, path, cfg.model, cfg.data.chat_template)
        jobs = {one.name: jobs_of(policy, one, cfg.run.seed, backend) for one in held}
        ctx.watchdog.phase(f"answers of {name}")
        answers[name] = _answers(ctx, policy, jobs)
    if stage.lm_eval:
        for note in lm_eval.write(ctx.dir / LM_EVAL_FOLDER, held):
            LOG.warning("stage.lm_eval: %s", note)
    ctx.watchdog.phase("figures")
    return _measured(ctx, held, answers)


def _answers(
    ctx: TaskRun,
    policy: Policy,
    jobs: Mapping[str, Sequence[Job]],
) -> Answers:
    """The policy's answers: those that are kept, and for the others those of one engine."""
    folder = ctx.dir / ANSWERS_FOLDER / policy.name
    kept = {task: KeptAnswers(folder / f"{task}.jsonl") for task in jobs}
    every = [job for several in jobs.values() for job in several]
    todo = [job for job in every if job.key not in kept[job.task].found]
    if len(todo) < len(every):
        done = len(every) - len(todo)
        LOG.info("resume: %d of %d answers of %s are kept.", done, len(every), policy.name)
    if todo:
        make = _maker(ctx, todo)
        with engine_of(policy.model, policy.tokenizer, make, ctx.dir / "start") as generator:
            _answer(ctx, policy, generator, todo, kept)
    found: Answers = {}
    for task, several in jobs.items():
        found[task] = [kept[task].found[job.key] for job in several]
    return found


def _maker(ctx: TaskRun, jobs: Sequence[Job]) -> Callable[..., Generator]:
    """Makes an engine that reads and writes as much as these jobs ask for."""
    cfg = ctx.cfg
    lengths = [job.lengths for job in jobs]
    response = max(written for _, written in lengths)
    longest = max(sum(pair) for pair in lengths)
    prompt = max(longest - response, 1)
    longer = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, max_prompt_length=prompt),
        rollout=dataclasses.replace(cfg.rollout, max_response_length=response),
        adapter=AdapterConfig(),
        environment=EnvironmentConfig(),
    )
    return functools.partial(make_generator, longer)


def _answer(
    ctx: TaskRun,
    policy: Policy,
    generator: Any,
    todo: Sequence[Job],
    kept: Mapping[str, KeptAnswers],
) -> None:
    """Have the engine do the jobs, and keep each batch of answers."""
    cfg, done = ctx.cfg, 0
    score: Any = None
    with console.progress(len(todo), f"rows of tasks, {policy.name}") as bar:
        for batch in _batches(todo, cfg.tasks):
            task = cfg.tasks[batch[0].task]
            if task.kind is TaskKind.generation:
                found = _write(policy, generator, batch, task, cfg.run.seed)
            else:
                score = score or likelihoods_by(
                    generator,
                    pad_id=policy.tokenizer.pad_token_id,
                    micro_tokens=cfg.engine.micro_tokens,
                    logits_chunk=cfg.engine.logits_chunk,
                    key=f"policy {policy.name}",
                )
                found = _score(score, batch)
            for name in dict.fromkeys(job.task for job in batch):
                kept[name].add({job.key: found[job.key] for job in batch if job.task == name})
            done += len(batch)
            bar.update(done)
            supervision.alive()


def _batches(todo: Sequence[Job], tasks: Mapping[str, TaskConfig]) -> Iterator[list[Job]]:
    """Jobs that an engine does together: of one kind and drawn alike, long ones beside each
    other.
    """

    def kind(job: Job) -> tuple[str, float, float]:
        task = tasks[job.task]
        if task.kind is not TaskKind.generation:
            return task.kind.value, 0.0, 0.0
        return task.kind.value, task.temperature, task.top_p

    for each in sorted({kind(job) for job in todo}):
        same = [job for job in todo if kind(job) == each]
        same.sort(key=lambda job: -sum(job.lengths))
        for start in range(0, len(same), _BATCH):
            yield same[start : start + _BATCH]


def _write(
    policy: Policy, generator: Any, batch: Sequence[Job], task: TaskConfig, seed: int
) -> dict[str, RowAnswer]:
    sampling = None
    if task.temperature > 0:
        most = generator.sampling.max_response_length
        sampling = Sampling(most, task.temperature, task.top_p)
    wanted = [one for job in batch for one in job.wanted]
    written = iter(write_answers(generator, policy.tokenizer, wanted, sampling, seed))
    return {job.key: of_written([next(written) for _ in job.wanted]) for job in batch}


def _score(
    score: Callable[[Sequence[Any]], list[float]], batch: Sequence[Job]
) -> dict[str, RowAnswer]:
    logprobs = iter(score([one for job in batch for one in job.scored]))
    return {job.key: of_scored(job, [next(logprobs) for _ in job.scored]) for job in batch}


# ---- figures ----


def headlines(tasks: Mapping[str, TaskConfig], metrics: Mapping[str, float]) -> dict[str, str]:
    """The first metric of each task and policy, for the closing panel."""
    out = {}
    for key, value in metrics.items():
        _, task, policy, name = key.split("/")
        if name == tasks[task].metrics[0].value:
            low, high = metrics[f"{key}_low"], metrics[f"{key}_high"]
            out[f"{task}, {policy}: {name}"] = f"{value:.3f} [{low:.3f}, {high:.3f}]"
    return out


def _measured(
    ctx: TaskRun, held: Sequence[TaskRows], answers: Mapping[str, Answers]
) -> tuple[list[Section], dict[str, float]]:
    stage, seed = ctx.cfg.stage_as(EvalStage), ctx.cfg.run.seed
    sections: list[Section] = []
    metrics: dict[str, float] = {}
    samples: list[dict[str, object]] = []
    for one in held:
        found: dict[str, list[Measured]] = {}
        for policy, by_task in answers.items():
            plain = _measure(one, by_task[one.name])
            found[policy] = figures.with_intervals(plain, stage.bootstrap, seed)
            metrics |= figures.metrics_of(one.name, policy, found[policy])
            samples += sample_rows(
                one.name, policy, one.task, one.rows, by_task[one.name], found[policy]
            )
        first, *others = found
        apart = {
            other: figures.differences(found[first], found[other], stage.bootstrap, seed)
            for other in others
        }
        of_policies = {policy: by_task[one.name] for policy, by_task in answers.items()}
        made = section(
            one.name, one.task, one.rows, of_policies, found, apart, one.bad, max(1, stage.shown)
        )
        sections.append(made)
        for table in made.tables:
            rows = [
                dict(
                    zip(
                        table.columns,
                        row,
                        strict=True,
                    )
                )
                for row in table.rows
            ]
            console.table(rows, title=table.title)
    ctx.tracker.samples(0, samples)
    return sections, metrics


def _measure(held: TaskRows, answers: Sequence[RowAnswer]) -> list[Measured]:
    if held.task.kind is TaskKind.loglikelihood:
        return figures.measured_likelihoods(held.task, held.rows, answers)
    checked = {one.metric: one.check(held.rows, answers) for one in held.checkers}
    return figures.measured_answers(held.task, held.rows, answers, checked)
