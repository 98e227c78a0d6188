"""Local tasks for lm-eval 0.4.13: a YAML file and a JSON file of rows each, which it reads with
``--include_path``. What lm-eval can't be given is not written, and told.

The prompts stand in the rows as the policy reads them, examples included, so that a figure of
lm-eval is comparable with ours.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from conf.labelling import TaskConfig, TaskKind, TaskMetric
from eval.tasks.figures import references_of
from eval.tasks.prompts import prompt_of, scored_texts, scores_choices
from eval.tasks.shapes import TaskRow

_CHOICES = {TaskMetric.accuracy: "acc", TaskMetric.accuracy_norm: "acc_norm"}
_WRITTEN = {TaskMetric.exact: "exact_match", TaskMetric.bleu: "bleu", TaskMetric.chrf: "chrf"}
_PERPLEXITIES = {
    TaskMetric.byte_perplexity: "byte_perplexity",
    TaskMetric.word_perplexity: "word_perplexity",
}


class HeldTask(Protocol):
    """A task with its rows."""

    @property
    def name(self) -> str: ...
    @property
    def task(self) -> TaskConfig: ...
    @property
    def rows(self) -> list[TaskRow]: ...
    @property
    def pool(self) -> list[TaskRow]: ...


def write(folder: Path, held: Sequence[HeldTask]) -> list[str]:
    """Write NAME.yaml and NAME.jsonl of each task that lm-eval can be given; returns a sentence for
    each task or metric that it can't.
    """
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    notes = []
    for one in held:
        known, missing = _metrics(one.task)
        why = _obstacle(one.task)
        if why is None and not known:
            why = "lm-eval has none of its metrics"
        if why is not None:
            notes.append(f"{one.name} is not written: {why}.")
            continue
        if missing:
            notes.append(f"{one.name} is written without {', '.join(missing)}.")
        data = folder / f"{one.name}.jsonl"
        lines = [json.dumps(_row(one, row), ensure_ascii=False) for row in one.rows]
        data.write_text("\n".join(lines) + "\n", encoding="utf-8")
        text = yaml.safe_dump(
            _declaration(one, data, known),
            sort_keys=False,
            allow_unicode=True,
        )
        (folder / f"{one.name}.yaml").write_text(text, encoding="utf-8")
    return notes


def _obstacle(task: TaskConfig) -> str | None:
    if task.chat and task.fewshot:
        return "examples as turns of a conversation stand in no row (fewshot with chat)"
    if task.chat and task.system is not None:
        return "a system message is an option of lm-eval's command line (--system_instruction)"
    if task.kind is TaskKind.loglikelihood and not scores_choices(task) and task.prompt:
        return "lm-eval takes perplexities of whole texts alone, without a prompt"
    if task.samples > 1:
        return "several answers to a row have no counterpart (samples)"
    return None


def _metrics(task: TaskConfig) -> tuple[dict[TaskMetric, str], list[str]]:
    """lm-eval's names of the task's metrics, and those that it has not."""
    table = _WRITTEN
    if task.kind is TaskKind.loglikelihood:
        table = _CHOICES if scores_choices(task) else _PERPLEXITIES
    known = {metric: table[metric] for metric in task.metrics if metric in table}
    return known, [metric.value for metric in task.metrics if metric not in table]


def _row(held: HeldTask, row: TaskRow) -> dict[str, Any]:
    task = held.task
    prompt = prompt_of(task, row, held.pool)
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    out: dict[str, Any] = {"prompt": text}
    if scores_choices(task):
        return out | {"choices": scored_texts(task, row), "gold": list(row.columns["gold"])}
    if task.kind is TaskKind.loglikelihood:
        return {"target": scored_texts(task, row)[0]}
    return out | {"target": references_of(task, row)}


def _declaration(
    held: HeldTask,
    data: Path,
    known: dict[TaskMetric, str],
) -> dict[str, Any]:
    task = held.task
    declared: dict[str, Any] = {
        "task": held.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": "" if task.chat else task.delimiter,
    }
    if task.kind is TaskKind.loglikelihood and not scores_choices(task):
        declared |= {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{target}}",
        }
    elif scores_choices(task):
        declared |= {
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold[0]}}",
        }
    else:
        declared |= _generation(task)
    declared["metric_list"] = [_metric(task, metric, name) for metric, name in known.items()]
    declared["metadata"] = {"version": 1.0}
    return declared


def _generation(task: TaskConfig) -> dict[str, Any]:
    limits: dict[str, Any] = {"until": list(task.stops), "max_gen_toks": task.max_tokens}
    limits |= {"do_sample": task.temperature > 0, "temperature": task.temperature}
    filters: list[dict[str, Any]] = [{"function": "take_first"}]
    if task.pattern is not None:
        pick = -1 if task.last_match else 0
        filters.insert(
            0, {"function": "regex", "regex_pattern": task.pattern, "group_select": pick}
        )
    return {
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{target[0]}}",
        "generation_kwargs": limits,
        "filter_list": [{"name": "answer", "filter": filters}],
    }


def _metric(
    task: TaskConfig,
    metric: TaskMetric,
    name: str,
) -> dict[str, Any]:
    higher = metric not in _PERPLEXITIES
    declared: dict[str, Any] = {"metric": name, "higher_is_better": higher}
    declared["aggregation"] = "mean"
    if metric in _PERPLEXITIES:
        declared["aggregation"] = "weighted_perplexity"
    if metric in (TaskMetric.bleu, TaskMetric.chrf):
        declared["aggregation"] = name
    if metric is TaskMetric.exact:
        declared |= {
            "ignore_case": task.ignore_case,
            "ignore_punctuation": task.ignore_punctuation,
        }
    return declared
