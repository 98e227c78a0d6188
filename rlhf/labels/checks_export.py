"""What can be known of label.mode=export before anything loads."""

import importlib.util
import os
import re
from pathlib import Path

from conf.choices import ChoiceMethod, LabelKind, LabelTarget
from conf.labelling import LabelConfig
from conf.schema import Config
from rlhf.data import mixture, reading
from rlhf.data.formats import Use
from rlhf.labels.samples import check_review, check_samples
from rlhf.models.loading import check_model_path
from rlhf.models.templates import template_text
from rlhf.types import UserError

_BY_SCORE = (ChoiceMethod.uncertainty, ChoiceMethod.uncertain_diverse)
_TEXT_FILES = (".md", ".txt")
_SCORE_REMEDY = (
    "Set reward.path=<a reward run>/model, or reward.terms.<name>.paths=[...] for an ensemble"
)


def policies_of(cfg: Config) -> dict[str, str]:
    """The policies that write answers: names and model directories; none where the answers are
    there already.
    """
    label = cfg.label
    if label.samples or label.review is not None:
        return {}
    if label.policies:
        return {str(name): str(path) for name, path in label.policies.items()}
    return {} if cfg.model.path is None else {"policy": cfg.model.path}


def chosen_by_score(label: LabelConfig) -> bool:
    """Whether a part of the budget goes by what the reward model is unsure of."""
    return any(label.choice.get(method.value) for method in _BY_SCORE)


def instructions_text(given: str) -> str:
    """label.instructions, or what the .md or .txt file of that name says. Raises UserError for a
    file that isn't there or isn't UTF-8.
    """
    if "\n" in given or not given.strip().lower().endswith(_TEXT_FILES):
        return given
    place = Path(given.strip()).expanduser()
    if not place.is_file():
        raise UserError(
            f"label.instructions={given}: no such file. Give a text, or a .md or .txt file with "
            "what annotators are to know."
        )
    try:
        return place.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"label.instructions={given}: byte {error.start + 1} is not UTF-8. Save the file as "
            "UTF-8."
        ) from error


def check_export(cfg: Config) -> None:
    """Raises UserError."""
    label = cfg.label
    if label.review is not None:
        _check_review(cfg)
        scored = True  # as far as it can be known: read_review's tasks carry their scores
    elif label.samples:
        scored = _check_samples(cfg)
    else:
        _check_policies(cfg)
        scored = (
            cfg.reward.path is not None or cfg.reward.function is not None or bool(cfg.reward.terms)
        )
    remedy = "Choose samples of a run that has scores" if label.samples else _SCORE_REMEDY
    if chosen_by_score(label) and not scored:
        raise UserError(
            f"label.choice={dict(label.choice)} needs scores of the answers, but there are none. "
            f"{remedy}, or choose random or diversity."
        )
    if label.prelabel and not scored:
        raise UserError(
            "label.prelabel=true suggests what the reward model prefers, but there are no "
            f"scores. {remedy}, or set label.prelabel=false."
        )
    if label.ab.enabled and chosen_by_score(label):
        raise UserError(
            f"label.ab.enabled=true with label.choice={dict(label.choice)}: pairs chosen for "
            "being close say nothing of a win rate. "
            "Leave label.choice empty (random)."
        )
    _check_gold(cfg)
    instructions_text(label.instructions)
    _check_tools(label)


def _check_policies(cfg: Config) -> None:
    label, policies = cfg.label, policies_of(cfg)
    if not policies:
        raise UserError(
            "stage=label label.mode=export needs answers: set label.policies={NAME: MODEL "
            "DIRECTORY}, model.path, "
            "label.samples=[a run's samples.jsonl] or label.review=an import's review.jsonl; "
            "found none."
        )
    for name, path in policies.items():
        check_model_path(path, f"label.policies.{name}" if label.policies else "model.path")
    if label.ab.enabled and len(policies) != 2:
        raise UserError(
            f"label.ab.enabled=true compares two policies, found {len(policies)}: set "
            "label.policies with two model directories."
        )
    answers = len(policies) * label.responses
    of = "1 policy" if len(policies) == 1 else f"{len(policies)} policies"
    wanted, what = (
        (label.group, f"label.group={label.group}")
        if label.kind is LabelKind.ranking
        else (2, "a pair")
    )
    if answers < wanted and not label.ab.enabled:
        raise UserError(
            f"label.responses={label.responses} of {of} give {answers} "
            f"{'answer' if answers == 1 else 'answers'} to a prompt, "
            f"but {what} needs {wanted}. Set label.responses={-(-wanted // len(policies))} or more."
        )
    if cfg.data.chat_template is not None:
        template_text(cfg.data.chat_template)
    reading.required_sources(cfg)
    reading.check_first_rows(cfg, Use.prompt)


def _check_samples(cfg: Config) -> bool:
    """Whether the first rows have scores."""
    _no_reward(cfg, "label.samples")
    scored = [check_samples(path) for path in cfg.label.samples]
    if mixture.given(cfg.data) is not None:
        reading.check_first_rows(cfg, Use.prompt)
        if cfg.model.path is not None:
            check_model_path(cfg.model.path)
    return all(scored)


def _check_review(cfg: Config) -> None:
    label = cfg.label
    assert label.review is not None
    _no_reward(cfg, "label.review")
    for key, is_set in (
        ("label.choice", bool(label.choice)),
        ("label.prompts", label.prompts is not None),
    ):
        if is_set:
            raise UserError(
                f"{key} is set, but the tasks of label.review={label.review} all go out again, "
                f"so nothing is chosen. Leave {key} out."
            )
    if label.ab.enabled:
        raise UserError(
            "label.ab.enabled=true with label.review: what annotators disagreed on is no sample "
            "of the policies' answers, so it can't decide between "
            "them. Set label.ab.enabled=false; the import of the first export decides."
        )
    check_review(label.review, label.kind)


def _no_reward(cfg: Config, key: str) -> None:
    given = next(
        (name for name in ("path", "function", "terms") if getattr(cfg.reward, name)), None
    )
    if given is not None:
        raise UserError(
            f"reward.{given} is set, but the answers of {key} have the scores of the run that "
            f"wrote them. Leave reward.{given} out."
        )


def _check_gold(cfg: Config) -> None:
    label = cfg.label
    if label.gold_path is None:
        return
    if label.gold_share == 0:
        raise UserError(
            f"label.gold_path={label.gold_path} is set, but label.gold_share=0 asks for no gold "
            "task. Set a share, such as 0.1."
        )
    if label.prelabel and not policies_of(cfg):
        key = "label.samples" if label.samples else "label.review"
        raise UserError(
            f"label.prelabel=true with label.gold_path and {key}: nothing scores the gold "
            "answers, and a task without a suggestion would be known. "
            "Set label.prelabel=false, or leave label.gold_path out."
        )
    reading.check_sources(
        cfg, [mixture.one_source(label.gold_path, "label.gold_path")], Use.preference
    )


def _check_tools(label: LabelConfig) -> None:
    if (
        label.ratings
        and label.kind is LabelKind.ranking
        and (label.push or LabelTarget.label_studio in label.targets)
    ):
        raise UserError(
            "label.ratings=true with label.kind=ranking: Label Studio can't ask for ratings "
            "beside a ranking. Set label.ratings=false, or leave "
            "label_studio out of label.targets (and label.push=false)."
        )
    if not label.push:
        return
    if importlib.util.find_spec("label_studio_sdk") is None:
        raise UserError(
            "label.push=true needs the package label-studio-sdk, which is not installed: `pip "
            "install label-studio-sdk`, or label.push=false."
        )
    check_address(str(label.url))
    access_token(label, "label.push=true")


def check_address(url: str) -> None:
    """The server's address, which manifests and error messages show. Raises UserError, never
    quoting a password in it.
    """
    expected = "expected the address of a Label Studio server, such as http://localhost:8080"
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise UserError(
            f"label.url holds a user: {expected}. An access token goes into the environment "
            "variable that label.token_env names."
        )
    if not url.startswith(("http://", "https://")):
        raise UserError(f"label.url={url}: {expected}.")


def access_token(label: LabelConfig, wanted_by: str) -> str:
    """Of the server, from the environment. Raises UserError, not quoting what may be the token
    itself in place of the variable's name.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", label.token_env):
        raise UserError(
            "label.token_env is no environment variable's name of capital letters, digits and "
            "underscores. Put the access token into a variable, "
            "such as LABEL_STUDIO_API_KEY, and give its name."
        )
    token = os.environ.get(label.token_env, "").strip()
    if not token:
        raise UserError(
            f"{wanted_by} needs an access token in the environment variable {label.token_env} "
            "(label.token_env), which is not set. "
            "Label Studio shows it under Account & Settings."
        )
    return token
