"""The questions of an export: the tasks of a review queue, or the pairs (for rankings: groups) of
answers that ``label.choice`` takes; and gold questions beside them.
"""

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from conf.choices import ChoiceMethod, LabelKind
from conf.labelling import LabelConfig
from rlhf.labels.asking import Question, gold_questions, share_of
from rlhf.labels.candidates import Candidates, Gathered, Response, gather, gather_two
from rlhf.labels.checks_export import chosen_by_score
from rlhf.labels.choice import Chosen, choose
from rlhf.labels.clusters import Vectors, text_vectors
from rlhf.labels.records import prompt_key
from rlhf.labels.samples import read_review
from rlhf.models.encoding import is_chat
from rlhf.types import PreferencePair, UserError

LOG = logging.getLogger("rlhf.labels")


@dataclass(frozen=True, slots=True)
class Selection:
    """What is to be asked, and how it came about."""

    questions: list[Question]
    counts: dict[str, int]  # prompts, responses, ...: for metrics
    details: dict[str, Any] = field(default_factory=dict)  # for the ledger and the data card


def task_size(label: LabelConfig) -> int:
    """Answers in a task."""
    return label.group if label.kind is LabelKind.ranking else 2


def select_review(path: str, kind: LabelKind) -> Selection:
    """The tasks of the review queue in the file `path`: all of them, with the same answers. Raises
    UserError.
    """
    questions = read_review(path, kind)
    prompts = {prompt_key(question.prompt, question.tools) for question in questions}
    policies = {answer.policy for question in questions for answer in question.answers}
    policies.discard("")
    details = {
        "source": "review",
        "policies": dict.fromkeys(sorted(policies), ""),
        "review": path,
    }
    return Selection(questions, {"prompts": len(prompts)}, details)


def prompt_vectors(label: LabelConfig) -> Vectors | None:
    """What turns prompts into vectors, where ``label.choice`` makes clusters of them, else None.
    Raises UserError where a package is missing; so it is called before anything is generated.
    """
    for method in (ChoiceMethod.diversity, ChoiceMethod.uncertain_diverse):
        if label.choice.get(method.value):
            return text_vectors(label.vectors)
    return None


def select_answers(
    responses: Sequence[Response],
    label: LabelConfig,
    *,
    vectors: Vectors | None,
    seed: int,
) -> tuple[Gathered, list[Question]]:
    """The answers that can be compared, and the questions that ``label.choice`` takes of them.

    Raises UserError where there is nothing to ask, or where scores are needed and missing.
    """
    size = task_size(label)
    if label.ab.enabled:
        gathered = gather_two(responses, compared_policies(responses))
    else:
        gathered = gather(responses, least=size)
    candidates = gathered.candidates
    if not candidates:
        raise UserError(_nothing_to_ask(gathered.counts, size, label))
    if chosen_by_score(label):
        scores = (answer.score for entry in candidates for answer in entry.answers)
        require_scores(scores, f"label.choice={dict(label.choice)}")
    chosen = choose(
        candidates,
        kind=label.kind,
        budget=label.budget,
        shares={ChoiceMethod(name): share for name, share in label.choice.items()},
        group=label.group,
        vectors=vectors,
        across=label.ab.enabled,
        seed=seed,
    )
    return gathered, [_question(candidates[task.candidates], task) for task in chosen]


def _question(candidates: Candidates, task: Chosen) -> Question:
    answers = tuple(candidates.answers[i] for i in task.answers)
    return Question(candidates.prompt, answers, task.by.value, tools=candidates.tools)


def compared_policies(responses: Iterable[Response]) -> tuple[str, str]:
    """The two policies of an A/B comparison. Raises UserError for any other number."""
    policies = list(dict.fromkeys(response.policy for response in responses))
    if len(policies) != 2:
        raise UserError(
            f"label.ab.enabled=true compares two policies, not the {len(policies)} in "
            f"label.samples: {', '.join(policies[:8])}."
        )
    return policies[0], policies[1]


def _nothing_to_ask(counts: Mapping[str, int], size: int, label: LabelConfig) -> str:
    if label.ab.enabled:
        reason = (
            f"both policies gave the same answer to {counts['ties']} of {counts['prompts']} "
            f"prompts, {counts['empty']} got an empty answer, "
            f"and {counts['missing']} were answered by one policy only"
        )
    else:
        reason = (
            f"of {counts['responses']} responses to {counts['prompts']} prompts "
            f"{counts['empty']} are empty and {counts['duplicates']} repeat another"
        )
    return (
        f"There is nothing to ask: no prompt has {size} different answers ({reason}). Raise "
        "rollout.temperature or label.responses, or give other "
        "prompts or policies."
    )


def require_scores(scores: Iterable[float | None], option: str) -> None:
    """Every answer has a score, which `option` needs. Raises UserError."""
    values = list(scores)
    missing = sum(score is None for score in values)
    if missing:
        raise UserError(
            f"{option} needs a score of every answer, but {missing} of {len(values)} answers have "
            "none. Set reward.path=<a reward run>/model, or take "
            "samples of a run that has scores."
        )


def log_left_out(counts: Mapping[str, int], label: LabelConfig, max_response_length: int) -> None:
    """Log which responses are not shown, and how many are cut off at `max_response_length`
    tokens.
    """
    if counts["duplicates"] or (counts["empty"] and not label.ab.enabled):
        LOG.info(
            "%d responses repeat another and %d are empty: they are not shown.",
            counts["duplicates"],
            counts["empty"],
        )
    if counts["few"]:
        LOG.info(
            "%d of %d prompts have too few different answers.", counts["few"], counts["prompts"]
        )
    if counts["cut"]:
        LOG.warning(
            "%d of %d responses hit rollout.max_response_length=%d: people see them cut off there.",
            counts["cut"],
            counts["responses"],
            max_response_length,
        )


def gold_wanted(label: LabelConfig, tasks: int) -> int:
    """How many gold tasks ``label.gold_share`` asks for beside so many other `tasks`."""
    return 0 if label.gold_path is None else share_of(label.gold_share, tasks)


def draw_gold(
    pairs: Sequence[PreferencePair], main: Sequence[Question], label: LabelConfig, seed: int
) -> list[Question]:
    """Gold questions out of `pairs`, the rows of ``label.gold_path``: as many as their share asks
    for, or all where there are fewer. None of them is in `main` already.

    Raises UserError where no pair can be a gold question.
    """
    wanted = gold_wanted(label, len(main))
    size = task_size(label)
    with_tools = {question.tools is not None for question in main}
    usable, left_out = gold_questions(
        pairs, size=size, chat=is_chat(main[0].prompt), with_tools=with_tools
    )
    asked = {question.id for question in main}
    gold = [question for question in usable if question.id not in asked]
    reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
    if reasons:
        reasons = f" ({reasons})"
    if not gold:
        raise UserError(
            f"label.gold_path={label.gold_path}: none of its {len(pairs)} pairs can be a gold task"
            f"{reasons}. Expected prompts with {size} answers, the "
            "best of which is known."
        )
    if len(gold) < wanted:
        LOG.warning(
            "label.gold_share=%g asks for %d gold tasks, but %s gives %d%s.",
            label.gold_share,
            wanted,
            label.gold_path,
            len(gold),
            reasons,
        )
    return random.Random(f"{seed}:gold").sample(gold, min(wanted, len(gold)))
