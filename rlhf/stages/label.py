"""``stage=label``: tasks for people go out (label.mode=export), their labels come back as
preference data (label.mode=import).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from conf.choices import LabelMode
from conf.labelling import LabelConfig
from conf.schema import Config, ModelConfig, RewardConfig
from reward.base import is_set, model_paths
from reward.terms import check_reward, check_reward_model, check_rows
from rlhf.checks import inputs, launch
from rlhf.data import reading, sources
from rlhf.data.formats import Use
from rlhf.labels import checks_export
from rlhf.labels.checks_import import check_import
from rlhf.labels.ledger import read_resumable
from rlhf.labels.samples import check_review, check_samples
from rlhf.models.directories import check_model_path
from rlhf.models.templates import template_text
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.run.directory import run_directory
from rlhf.stages.labelling.exporting import export, options_of
from rlhf.stages.labelling.importing import import_labels
from rlhf.types import UserError


def run(ctx: RunContext) -> None:
    """Export or import. Raises UserError for what does not fit."""
    with ctx.closing():
        if ctx.cfg.label.mode is LabelMode.export:
            export(ctx)
        else:
            import_labels(ctx)


def check(cfg: Config) -> list[str]:
    """Answers or labels have a source, and what is asked for can be done. Returns notes worth a
    warning. Raises UserError.
    """
    distributed.require_one_process("stage=label", "Run it without torchrun.")
    if cfg.label.mode is not LabelMode.export:
        check_import(cfg.label, Path(cfg.run.dir).expanduser() / cfg.run.name)
        return []
    request = reading.DataRequest.of(cfg)
    check_export(cfg.label, request, cfg.model, cfg.reward)
    if cfg.run.resume and distributed.is_main():
        read_resumable(run_directory(cfg), options_of(cfg))
    policies = checks_export.policies_of(cfg.label, cfg.model.path)
    if not policies:
        return []
    notes = launch.check_backend(cfg.rollout.backend)
    inputs.refuse_running_servers(cfg.rollout, "label")
    inputs.check_native(policies.values(), cfg.rollout.backend)
    notes += check_readers(policies, request, cfg.model, cfg.reward)
    readers = inputs.directory_positions([*policies.items(), *model_paths(cfg.reward)])
    prompt, response = cfg.data.max_prompt_length, cfg.rollout.max_response_length
    inputs.check_sequence_length(prompt, response, readers)
    return notes


def check_readers(
    policies: Mapping[str, str],
    request: reading.DataRequest,
    policy_model: ModelConfig,
    reward: RewardConfig,
) -> list[str]:
    """Where the answers of `policies` (name and directory) are scored, the reward's models can read
    them. Returns notes worth a warning. Raises UserError.
    """
    if not is_set(reward):
        return []
    check_reward(reward)
    notes = []
    for key, path in model_paths(reward):
        for directory in policies.values():
            model = dataclasses.replace(policy_model, path=directory)
            tokenizer = inputs.policy_tokenizer(model, request.data.chat_template)
            notes += check_reward_model(key, path, tokenizer)
    if reward.terms:
        check_rows(reward, reading.first_fields(request))
    return notes


def check_export(
    label: LabelConfig, request: reading.DataRequest, model: ModelConfig, reward: RewardConfig
) -> None:
    """The answers, and the options about them. Raises UserError."""
    policies = checks_export.policies_of(label, model.path)
    if label.review is not None:
        refuse_reward(reward, "label.review")
        checks_export.check_review_options(label)
        check_review(label.review, label.kind)
        scored = True  # nothing more can be known yet: the tasks hold their scores
    elif label.samples:
        refuse_reward(reward, "label.samples")
        scores = [check_samples(path) for path in label.samples]
        scored = all(scores)
        if sources.given(request.data) is not None:
            reading.check_first_rows(request, Use.prompt)
            if model.path is not None:
                check_model_path(model.path)
    else:
        for name, path in policies.items():
            check_model_path(path, f"label.policies.{name}" if label.policies else "model.path")
        checks_export.check_policies(label, policies)
        if request.data.chat_template is not None:
            template_text(request.data.chat_template)
        reading.required_sources(request)
        reading.check_first_rows(request, Use.prompt)
        scored = bool(given_rewards(reward))
    checks_export.check_scores(label, scored=scored)
    checks_export.check_gold_options(label, policies)
    if label.gold_path is not None:
        gold = sources.one_source(label.gold_path, "label.gold_path")
        reading.check_sources(request, [gold], Use.preference)
    checks_export.instructions_text(label.instructions)
    checks_export.check_tools(label)


def given_rewards(reward: RewardConfig) -> list[str]:
    """Which of the options that score answers are set."""
    return [name for name in ("path", "function", "terms") if getattr(reward, name)]


def refuse_reward(reward: RewardConfig, key: str) -> None:
    """No reward scores the answers of `key`, which have scores already. Raises UserError."""
    given = given_rewards(reward)
    if given:
        raise UserError(
            f"reward.{given[0]} is set, but the answers of {key} have the scores of the run that "
            f"wrote them. Leave reward.{given[0]} out."
        )
