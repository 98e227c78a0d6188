"""What stage=label asks about: answers of policies, of runs or of a review queue, the pairs of them
that are worth asking, and gold questions.
"""

import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conf.choices import ChoiceMethod, LabelKind
from conf.labelling import LabelConfig
from conf.schema import Config, DataConfig
from reward.base import model_paths
from rlhf.data import mixture, reading
from rlhf.data.formats import Use
from rlhf.labels.asking import Question, gold_questions, share_of
from rlhf.labels.candidates import Gathered, Response, first_prompts, gather, gather_two
from rlhf.labels.checks_export import chosen_by_score, policies_of
from rlhf.labels.samples import read_review, read_samples
from rlhf.models.encoding import is_chat
from rlhf.models.loading import load_tokenizer
from rlhf.process.hashing import digest
from rlhf.run.context import RunContext
from rlhf.stages.labelling import answers as label_answers
from rlhf.stages.labelling.answers import Clock
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.label")


@dataclass(slots=True)
class Found:
    """What there is to ask, and how it came about."""

    questions: list[Question]
    counts: dict[str, int]
    details: dict[str, Any]


def review(cfg: Config) -> Found:
    """The tasks of a review queue: all of them, with the same answers."""
    assert cfg.label.review is not None
    questions = read_review(cfg.label.review, cfg.label.kind)
    prompts = {digest(question.prompt) for question in questions}
    policies = sorted(
        {answer.policy for question in questions for answer in question.answers if answer.policy}
    )
    return Found(
        questions,
        {"prompts": len(prompts)},
        {"source": "review", "policies": dict.fromkeys(policies, ""), "review": cfg.label.review},
    )


def answered(ctx: RunContext, clock: Clock) -> Found:
    """Answers of policies or of runs, and those of their pairs (or groups) that the choice takes.
    Raises UserError where there is none.
    """
    from rlhf.labels.choice import choose

    cfg, label = ctx.cfg, ctx.cfg.label
    vectors, planned = _vectors(label), _plan(label)
    responses, cut, details = _from_samples(cfg) if label.samples else _from_policies(ctx, clock)
    policies = list(dict.fromkeys(response.policy for response in responses))
    if label.ab.enabled and len(policies) != 2:
        raise UserError(
            f"label.ab.enabled=true compares two policies, found {len(policies)} in "
            f"label.samples: {', '.join(policies[:8])}."
        )
    size = label.group if label.kind is LabelKind.ranking else 2
    gathered = (
        gather_two(responses, (policies[0], policies[1]))
        if label.ab.enabled
        else gather(responses, least=size)
    )
    if not gathered.candidates:
        raise UserError(_nothing(gathered, size, label))
    if chosen_by_score(label):
        require_scores(
            (a.score for one in gathered.candidates for a in one.answers),
            f"label.choice={dict(label.choice)}",
        )
    with clock.phase("choose"):
        chosen = choose(
            gathered.candidates,
            kind=label.kind,
            budget=label.budget,
            shares={ChoiceMethod(name): share for name, share in label.choice.items()},
            group=label.group,
            vectors=vectors,
            across=label.ab.enabled,
            seed=cfg.run.seed,
        )
    candidates = gathered.candidates
    questions = [
        Question(
            candidates[c.candidates].prompt,
            tuple(candidates[c.candidates].answers[i] for i in c.answers),
            c.by.value,
        )
        for c in chosen
    ]
    counts = gathered.counts | {"cut": cut}
    if planned is not None:
        details["ab"] = planned.figures() | {
            "policies": policies,
            "asked": len(questions),
            **_alike(gathered, len(questions)),
        }
        _say_plan(planned.pairs, len(questions), gathered, policies)
    _say_lost(gathered.counts | {"cut": cut}, cfg)
    return Found(questions, counts, details)


def _alike(gathered: Gathered, asked: int) -> dict[str, int]:
    """What nobody has to be asked about. Where the budget takes a part of the pairs, `identical` is
    as large a part of the prompts answered alike: all of them beside a sample of the others would
    pull the win rate towards 1/2.
    """
    counts = gathered.counts
    return {
        "identical": round(counts["ties"] * asked / len(gathered.candidates)),
        "identical_of_all_prompts": counts["ties"],
        "empty": counts["empty"],
        "missing": counts["missing"],
    }


def _nothing(gathered: Gathered, size: int, label: LabelConfig) -> str:
    counts = gathered.counts
    found = (
        f"of {counts['responses']} responses to {counts['prompts']} prompts "
        f"{counts['empty']} are empty and {counts['duplicates']} repeat another"
    )
    if label.ab.enabled:
        found = (
            f"both policies said the same to {counts['ties']} of {counts['prompts']} "
            f"prompts, {counts['empty']} got an empty answer, "
        )
        found += f"and {counts['missing']} were answered by one policy only"
    return (
        f"There is nothing to ask: no prompt has {size} different answers ({found}). Raise "
        "rollout.temperature or label.responses, or give other "
        "prompts or policies."
    )


def require_scores(scores: Iterable[float | None], what: str) -> None:
    values = list(scores)
    missing = sum(score is None for score in values)
    if missing:
        raise UserError(
            f"{what} needs a score of every answer, but {missing} of {len(values)} answers have "
            "none. Set reward.path=<a reward run>/model, or take "
            "samples of a run that has scores."
        )


def _vectors(label: LabelConfig) -> Callable[[Sequence[str]], Any] | None:
    """What clusters prompts, where the choice has clusters; made before anything is generated,
    since it may be that its package is missing.
    """
    from rlhf.labels.choice import text_vectors

    clustered = any(
        label.choice.get(method.value)
        for method in (ChoiceMethod.diversity, ChoiceMethod.uncertain_diverse)
    )
    return text_vectors(label.vectors) if clustered else None


def _plan(label: LabelConfig) -> Any:
    """How many pairs an A/B comparison needs, said before anything is generated; None
    without one.
    """
    if not label.ab.enabled:
        return None
    from rlhf.labels.ab import plan

    planned = plan(label.ab.effect, label.ab.alpha, label.ab.power, label.ab.ties)
    LOG.info(
        "A/B comparison: %d pairs are planned, to find a win rate of %g with power %g.",
        planned.pairs,
        0.5 + label.ab.effect,
        label.ab.power,
    )
    if label.budget < planned.pairs:
        LOG.warning(
            "label.budget=%d is less than the %d pairs that label.ab plans: the comparison may "
            "end undecided.",
            label.budget,
            planned.pairs,
        )
    return planned


def _say_plan(pairs: int, asked: int, gathered: Gathered, policies: Sequence[str]) -> None:
    if asked < pairs:
        LOG.warning(
            "A/B comparison: %d pairs are planned, but %d go out: give more prompts, or expect "
            "no decision.",
            pairs,
            asked,
        )
    counts = gathered.counts
    if counts["ties"]:
        LOG.info(
            "A/B comparison: both policies said the same to %d of %d prompts: ties without a label.",
            counts["ties"],
            counts["prompts"],
        )
    for name, reason in (
        ("empty", "one of the answers is empty"),
        ("missing", "only one policy answered"),
    ):
        if counts[name]:
            LOG.warning(
                "A/B comparison of %s: %d prompts are left out, since %s.",
                " and ".join(policies),
                counts[name],
                reason,
            )


def _say_lost(counts: Mapping[str, int], cfg: Config) -> None:
    if counts["duplicates"] or (counts["empty"] and not cfg.label.ab.enabled):
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
        limit = cfg.rollout.max_response_length
        LOG.warning(
            "%d of %d responses hit rollout.max_response_length=%d: people see them cut off there.",
            counts["cut"],
            counts["responses"],
            limit,
        )


def _from_policies(ctx: RunContext, clock: Clock) -> tuple[list[Response], int, dict[str, Any]]:
    cfg = ctx.cfg
    policies = policies_of(cfg.label, cfg.model.path)
    count = 1 if cfg.label.ab.enabled else cfg.label.responses
    if count < cfg.label.responses:
        LOG.info(
            "label.ab.enabled=true: one response of each policy to each prompt, so that no two "
            "pairs share a prompt."
        )
    responses, cut = label_answers.write_answers(ctx, policies, count, clock)
    return (
        responses,
        cut,
        {
            "source": "policies",
            "policies": policies,
            "data": mixture.given(cfg.data),
            "rewards": _rewards(cfg),
        },
    )


def _rewards(cfg: Config) -> list[str]:
    """What scored the answers, by name."""
    functions = [cfg.reward.function, *(term.function for term in cfg.reward.terms.values())]
    return [
        *(path for _, path in model_paths(cfg.reward)),
        *(function for function in functions if function is not None),
    ]


def _from_samples(cfg: Config) -> tuple[list[Response], int, dict[str, Any]]:
    """What runs wrote; with data.path only the prompts of that file, as it has them (a run's
    samples have the text that its policy read).
    """
    label = cfg.label
    samples = read_samples(label.samples)
    if not samples.comparable and (chosen_by_score(label) or label.prelabel):
        LOG.warning(
            "label.samples: the scores come from different rewards, or from statistics that "
            "moved: answers of two runs are not comparable by them."
        )
    responses = list(samples.responses)
    if mixture.given(cfg.data) is not None:
        responses = _own_prompts(cfg, responses)
    elif samples.templated:
        LOG.warning(
            "label.samples: the prompts of %d of %d responses hold marks of a chat template. "
            "People will see them, and labels will carry them: give "
            "data.path (and model.path, whose template it is), so that prompts are shown as the "
            "data has them.",
            samples.templated,
            len(responses),
        )
    responses = first_prompts(responses, label.prompts)
    policies = dict.fromkeys(response.policy for response in responses)
    return (
        responses,
        0,
        {
            "source": "samples",
            "policies": dict.fromkeys(policies, ""),
            "samples": list(label.samples),
        },
    )


def _own_prompts(cfg: Config, responses: Sequence[Response]) -> list[Response]:
    """Responses with their prompts as data.path has them. Raises UserError where not one is among
    its prompts.
    """
    loaded = reading.distinct_prompts(cfg, None)
    known: dict[str, Any] = {
        record.value: record.value for record in loaded.records if isinstance(record.value, str)
    }
    if cfg.model.path is not None:
        tokenizer = load_tokenizer(
            label_answers.model_of(cfg, cfg.model.path), cfg.data.chat_template
        )
        for prompt in reading.tokenised(tokenizer, loaded, cfg.data):
            known |= {prompt.text: prompt.source, tokenizer.decode(prompt.token_ids): prompt.source}
    out = [
        replace(response, prompt=known[response.prompt])
        for response in responses
        if response.prompt in known
    ]
    if not out:
        raise UserError(
            f"label.samples: not one of the {len(responses)} responses answers a prompt of "
            f"{mixture.given(cfg.data)}; the first is to "
            f"{responses[0].prompt[:120]!r}. Set model.path to the run's policy (and "
            "data.chat_template as it was), whose template made the text."
        )
    if len(out) < len(responses):
        LOG.warning(
            "label.samples: %d of %d responses answer no prompt of %s: left out.",
            len(responses) - len(out),
            len(responses),
            mixture.given(cfg.data),
        )
    return out


def gold_tasks(cfg: Config, main: Sequence[Question]) -> list[Question]:
    """Questions whose answer is known, as many as their share asks for where there are so many.
    Raises UserError where there is none.
    """
    label = cfg.label
    wanted = share_of(label.gold_share, len(main))
    if label.gold_path is None or not wanted:
        return []
    plain = replace(cfg, data=DataConfig(max_bad_rows=cfg.data.max_bad_rows))
    pairs = reading.load(
        plain, [mixture.one_source(label.gold_path, "label.gold_path")], Use.preference
    ).values()
    size = label.group if label.kind is LabelKind.ranking else 2
    there, left_out = gold_questions(pairs, size=size, chat=is_chat(main[0].prompt))
    asked = {question.id for question in main}
    gold = [question for question in there if question.id not in asked]
    reasons = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not gold:
        raise UserError(
            f"label.gold_path={label.gold_path}: none of its {len(pairs)} pairs can be a gold task"
            f"{f' ({reasons})' if reasons else ''}. Expected prompts with {size} answers, the "
            "best of which is known."
        )
    if len(gold) < wanted:
        LOG.warning(
            "label.gold_share=%g asks for %d gold tasks, but %s gives %d%s.",
            label.gold_share,
            wanted,
            label.gold_path,
            len(gold),
            reasons and f" ({reasons})",
        )
    drawn = random.Random(f"{cfg.run.seed}:gold").sample(gold, min(wanted, len(gold)))
    if not label.prelabel:
        return drawn
    # A suggestion that gold tasks lack would give them away.
    return label_answers.score_questions(
        cfg, drawn, next(iter(policies_of(cfg.label, cfg.model.path).values()))
    )
