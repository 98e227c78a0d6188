"""What a policy is asked of tasks: for each row the token ids of its prompt, or of the texts that
are scored, and the key under which its answer is kept.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from conf.labelling import TaskConfig, TaskKind
from conf.schema import ModelConfig
from eval.tasks.figures import RowAnswer
from eval.tasks.prompts import Scored, Text, prompt_of, scored_ids, scored_texts, windows
from eval.tasks.prompts import scores_choices as _scores_choices
from eval.tasks.shapes import TaskRow
from rlhf.models.directories import fingerprint
from rlhf.models.encoding import is_chat, prompt_ids, require_template
from rlhf.process.files import digest
from rlhf.stages.evaluation.engines import Wanted, Written
from rlhf.stages.evaluation.task_rows import TaskRows
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.eval")


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy that is measured."""

    name: str
    model: ModelConfig  # loads it
    tokenizer: Any
    limit: int | None  # tokens that it reads; None: its files don't say

    @property
    def digest(self) -> str:
        """Changes when its weights do, as far as its files tell."""
        path = str(self.model.path)
        return digest([fingerprint(path) or path, self.model.gguf_file, self.model.dtype.value])


@dataclass(frozen=True, slots=True)
class Job:
    """One row of one task."""

    task: str
    row: TaskRow
    key: str
    wanted: tuple[Wanted, ...] = ()  # a sample each
    scored: tuple[Scored, ...] = ()
    parts: tuple[int, ...] = ()  # of each text: how many of `scored` it is
    is_cut: bool = False  # its prompt lost its beginning

    @property
    def lengths(self) -> tuple[int, int]:
        """Most tokens of a prompt and of what is written behind it."""
        if self.wanted:
            return len(self.wanted[0].prompt), self.wanted[0].limit
        return max(len(one.context) + len(one.ids) for one in self.scored) - 1, 1


def jobs_of(
    policy: Policy,
    held: TaskRows,
    seed: int,
    backend: str,
) -> list[Job]:
    """What the policy is asked of each row of a task. Raises UserError, which names policy, task
    and row, where its template refuses a row or the row is too long for it.
    """
    if held.task.chat:
        require_template(policy.tokenizer, f"{held.key} for the policy {policy.name}")
    common = [policy.digest, backend]
    jobs = []
    for row in held.rows:
        try:
            jobs.append(_job(policy, held, row, seed, common))
        except ValueError as error:  # RowError, TemplateRefusal and RewrittenTurn too
            raise UserError(f"{held.key}, {row.place}, policy {policy.name}: {error}.") from error
    cut = sum(job.is_cut for job in jobs)
    if cut:
        LOG.warning(
            "%s, policy %s: %d of %d prompts lost their beginning (cut_prompts).",
            held.key,
            policy.name,
            cut,
            len(jobs),
        )
    return jobs


def _job(
    policy: Policy,
    held: TaskRows,
    row: TaskRow,
    seed: int,
    common: Sequence[str],
) -> Job:
    task = held.task
    prompt = prompt_of(task, row, held.pool)
    if task.kind is TaskKind.generation:
        return _writing(policy, held, row, prompt, seed, common)
    texts = [scored_ids(task, policy.tokenizer, prompt, t) for t in scored_texts(task, row)]
    fitted = [_fitted(task, one, policy.limit) for one in texts]
    scored = tuple(part for parts, _ in fitted for part in parts)
    key = digest([*common, [[one.context, one.ids] for one in scored]])
    sizes = tuple(len(parts) for parts, _ in fitted)
    is_cut = any(cut for _, cut in fitted)
    return Job(
        held.name,
        row,
        key,
        scored=scored,
        parts=sizes,
        is_cut=is_cut,
    )


def _fitted(
    task: TaskConfig,
    one: Scored,
    limit: int | None,
) -> tuple[list[Scored], bool]:
    """A text in the parts in which the policy reads it, and whether its context was cut."""
    size = len(one.context) + len(one.ids)
    if limit is None or size <= limit:
        return [one], False
    if not _scores_choices(task):
        return windows(one, limit), False
    if not task.cut_prompts or len(one.ids) >= limit:
        raise ValueError(_too_long(size, limit))
    return [Scored(one.context[size - limit :], one.ids)], True


def _writing(
    policy: Policy,
    held: TaskRows,
    row: TaskRow,
    prompt: Text,
    seed: int,
    common: Sequence[str],
) -> Job:
    task = held.task
    ids = prompt_ids(policy.tokenizer, prompt)
    size, is_cut = len(ids) + task.max_tokens, False
    if not ids:
        raise ValueError("its prompt has no tokens")
    if policy.limit is not None and size > policy.limit:
        if not task.cut_prompts or task.max_tokens >= policy.limit:
            raise ValueError(_too_long(size, policy.limit))
        ids, is_cut = ids[size - policy.limit :], True
    chat = is_chat(prompt)
    drawing = [task.temperature, task.top_p, task.samples, seed] if task.temperature else []
    asked = [ids, task.max_tokens, list(task.stops), chat, drawing]
    wanted = []
    for sample in range(task.samples):
        name = f"{held.name}/{row.number}/{sample}"
        wanted.append(Wanted(name, tuple(ids), task.max_tokens, tuple(task.stops), chat))
    key = digest([*common, f"{held.name}/{row.number}" if task.temperature else "", asked])
    return Job(
        held.name,
        row,
        key,
        wanted=tuple(wanted),
        is_cut=is_cut,
    )


def _too_long(size: int, limit: int) -> str:
    return (
        f"it takes {size} tokens, but the policy reads {limit}: give fewer examples (fewshot), a "
        "smaller max_tokens, or cut_prompts=true to keep the end of long prompts"
    )


# ---- answers ----


def of_written(written: Sequence[Written]) -> RowAnswer:
    """A row's answer of its samples."""
    return RowAnswer(
        texts=tuple(one.text for one in written),
        tokens=tuple(len(one.ids) for one in written),
        finished=tuple(one.finished for one in written),
    )


def of_scored(job: Job, logprobs: Sequence[float]) -> RowAnswer:
    """A row's answer of the log-probabilities of its parts."""
    sums, tokens, at = [], [], 0
    for size in job.parts:
        sums.append(sum(logprobs[at : at + size]))
        tokens.append(sum(len(one.ids) for one in job.scored[at : at + size]))
        at += size
    return RowAnswer(tokens=tuple(tokens), logprobs=tuple(sums))
