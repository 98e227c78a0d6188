"""Where the questions of an export come from: a review queue, samples that runs wrote, or
policies that answer now.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.labelling import LabelConfig
from conf.schema import Config, DataConfig, ModelConfig, RewardConfig
from reward.base import model_paths
from rlhf.data import reading, sources
from rlhf.data.formats import Use
from rlhf.data.loading import DataRequest
from rlhf.data.telling import refuse_pictures
from rlhf.labels import ab_export, selection
from rlhf.labels.asking import Question
from rlhf.labels.candidates import Response, first_prompts
from rlhf.labels.checks_export import chosen_by_score, policies_of
from rlhf.labels.records import as_text
from rlhf.labels.samples import read_samples
from rlhf.labels.selection import Selection
from rlhf.models.loading import load_tokenizer
from rlhf.process.supervision import Clock
from rlhf.stages.labelling import answers
from rlhf.stages.labelling.scoring import score_questions
from rlhf.types import Tools, UserError

LOG = logging.getLogger("rlhf.stages.label")


@dataclass(frozen=True, slots=True)
class Answered:
    """Responses, and where they come from."""

    responses: list[Response]
    truncated: int  # responses that reached the length limit
    details: dict[str, Any]  # for the ledger


def select(cfg: Config, folder: Path, clock: Clock) -> Selection:
    """The questions of an export, gold and repeated ones not counted. `folder` is the run
    directory. Raises UserError where there is nothing to ask.
    """
    label = cfg.label
    if label.review is not None:
        return selection.select_review(label.review, label.kind)
    vectors = selection.prompt_vectors(label)
    planned = ab_export.plan_comparison(label.ab, label.budget) if label.ab.enabled else None
    if label.samples:
        answered = _from_samples(label, DataRequest.of(cfg), cfg.model)
    else:
        writers = policies_of(label, cfg.model.path)
        count = _responses_each(label)
        responses, truncated = answers.write_answers(cfg, folder, writers, count, clock)
        details = {
            "source": "policies",
            "policies": writers,
            "data": sources.given(cfg.data),
            "rewards": reward_names(cfg.reward),
        }
        answered = Answered(responses, truncated, details)
    with clock.phase("choose"):
        gathered, questions = selection.select_answers(
            answered.responses, label, vectors=vectors, seed=cfg.run.seed
        )
    counts = gathered.counts | {"cut": answered.truncated}
    details = answered.details
    if planned is not None:
        policies = selection.compared_policies(answered.responses)
        comparison = (planned, gathered, policies, len(questions))
        details = details | {"ab": ab_export.comparison_details(*comparison)}
        ab_export.log_comparison(*comparison)
    selection.log_left_out(counts, label, cfg.rollout.max_response_length)
    return Selection(questions, counts, details)


def _responses_each(label: LabelConfig) -> int:
    """How many responses a policy writes to a prompt."""
    if not label.ab.enabled:
        return label.responses
    if label.responses > 1:
        LOG.info(
            "label.ab.enabled=true: one response of each policy to each prompt, so that no two "
            "pairs share a prompt."
        )
    return 1


def reward_names(reward: RewardConfig) -> list[str]:
    """What scores the answers: the directories of models, the names of functions."""
    functions = [reward.function, *(term.function for term in reward.terms.values())]
    paths = [path for _, path in model_paths(reward)]
    return paths + [function for function in functions if function is not None]


def _from_samples(label: LabelConfig, request: DataRequest, model: ModelConfig) -> Answered:
    """What runs wrote. With data.path only the prompts of that file, as it has them: a run's
    samples have the text that its policy read.
    """
    samples = read_samples(label.samples)
    if not samples.comparable and (chosen_by_score(label) or label.prelabel):
        LOG.warning(
            "label.samples: the scores come from different rewards, or from statistics that "
            "moved: answers of two runs are not comparable by them."
        )
    responses = list(samples.responses)
    if sources.given(request.data) is not None:
        responses = _with_own_prompts(responses, request, model)
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
    policies = dict.fromkeys((response.policy for response in responses), "")
    details = {"source": "samples", "policies": policies, "samples": list(label.samples)}
    return Answered(responses, 0, details)


def _with_own_prompts(
    responses: Sequence[Response], request: DataRequest, model: ModelConfig
) -> list[Response]:
    """Responses with their prompts as data.path has them; responses to other prompts are left out.
    Raises UserError where all are.
    """
    source = sources.given(request.data)
    loaded = reading.distinct_prompts(request, None)
    texts = [record.value for record in loaded.records if isinstance(record.value, str)]
    prompts: dict[str, tuple[Any, Tools | None]] = {text: (text, None) for text in texts}
    if model.path is not None:
        policy = answers.model_of(model, model.path)
        tokenizer = load_tokenizer(policy, request.data.chat_template)
        for prompt in reading.tokenised(tokenizer, loaded, request):
            own = (prompt.source, prompt.tools)
            for text in (prompt.text, tokenizer.decode(prompt.token_ids)):
                _refuse_second(prompts.setdefault(text, own), own, source)
    kept = []
    for response in responses:
        if response.prompt in prompts:
            prompt_of, tools = prompts[response.prompt]
            kept.append(replace(response, prompt=prompt_of, tools=tools))
    if not kept:
        raise UserError(
            f"label.samples: not one of the {len(responses)} responses answers a prompt of "
            f"{source}; the first is to "
            f"{responses[0].prompt[:120]!r}. Set model.path to the run's policy (and "
            "data.chat_template as it was), whose template made the text."
        )
    if len(kept) < len(responses):
        LOG.warning(
            "label.samples: %d of %d responses answer no prompt of %s: left out.",
            len(responses) - len(kept),
            len(responses),
            source,
        )
    return kept


def _refuse_second(
    first: tuple[Any, Tools | None], second: tuple[Any, Tools | None], source: str | None
) -> None:
    """Raises UserError for two prompts of `source` that are one text to the policy, so that nobody
    can say which of them an answer is to. Each is a prompt and its functions.
    """
    if first != second:
        raise UserError(
            f"label.samples: two prompts of {source} are the same text to the policy: "
            f"{as_text(first[0])[:120]!r} and {as_text(second[0])[:120]!r}. Their tools are not "
            "in its template, or data.truncate_prompts cuts them alike. Leave one of them out."
        )


def select_gold(
    main: Sequence[Question],
    label: LabelConfig,
    request: DataRequest,
    model: ModelConfig,
    reward: RewardConfig,
) -> list[Question]:
    """Questions whose answer is known, to go out among the `main` ones. With label.prelabel their
    answers get scores, as those of the first policy. Raises UserError where label.gold_path has
    none.
    """
    if label.gold_path is None or not selection.gold_wanted(label, len(main)):
        return []
    source = sources.one_source(label.gold_path, "label.gold_path")
    # the options about data.path, such as a chat template, are not about this file
    plain = replace(request, data=DataConfig(max_bad_rows=request.data.max_bad_rows))
    loaded = reading.load(plain, [source], Use.preference)
    why = "stage=label shows people texts alone. Give it pairs of texts"
    refuse_pictures(loaded.keys, loaded.name, why)
    gold = selection.draw_gold(loaded.values(), main, label, request.seed)
    if not label.prelabel:
        return gold
    # A suggestion that gold tasks lack would give them away.
    first = next(iter(policies_of(label, model.path).values()))
    policy = answers.model_of(model, first)
    return score_questions(gold, policy, request.data.chat_template, reward)
