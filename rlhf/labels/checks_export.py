"""Checks of the options of ``label.mode=export``, made before anything loads.

What the data, the models and the reward must be like is checked by the stage, which reads them
(rlhf/stages/label.py).
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path

from conf.choices import ChoiceMethod, LabelKind, LabelTarget
from conf.labelling import LabelConfig
from rlhf.types import UserError

_BY_SCORE = (ChoiceMethod.uncertainty, ChoiceMethod.uncertain_diverse)
_TEXT_FILES = (".md", ".txt")
_SCORE_REMEDY = (
    "Set reward.path=<a reward run>/model, or reward.terms.<name>.paths=[...] for an ensemble"
)


def policies_of(label: LabelConfig, model_path: str | None) -> dict[str, str]:
    """The policies that write answers: model directories by name. Empty where the answers exist
    already. Without ``label.policies`` the only policy is `model_path` (``model.path``).
    """
    if label.samples or label.review is not None:
        return {}
    if label.policies:
        return {str(name): str(path) for name, path in label.policies.items()}
    if model_path is None:
        return {}
    return {"policy": model_path}


def chosen_by_score(label: LabelConfig) -> bool:
    """Whether a part of the budget goes to pairs that the reward model is unsure of."""
    return any(label.choice.get(method.value) for method in _BY_SCORE)


def instructions_text(given: str) -> str:
    """``label.instructions``, or the content of the .md or .txt file that it names. Raises
    UserError for a file that does not exist or is not UTF-8.
    """
    if "\n" in given or not given.strip().lower().endswith(_TEXT_FILES):
        return given
    path = Path(given.strip()).expanduser()
    if not path.is_file():
        raise UserError(
            f"label.instructions={given}: no such file. Give a text, or a .md or .txt file with "
            "what annotators are to know."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"label.instructions={given}: byte {error.start + 1} is not UTF-8. Save the file as "
            "UTF-8."
        ) from error


def check_policies(label: LabelConfig, policies: Mapping[str, str]) -> None:
    """There is a policy, and enough answers to compare. Raises UserError."""
    if not policies:
        raise UserError(
            "stage=label label.mode=export needs answers: set label.policies={NAME: MODEL "
            "DIRECTORY}, model.path, "
            "label.samples=[a run's samples.jsonl] or label.review=an import's review.jsonl; "
            "none of them is set."
        )
    if label.ab.enabled:
        if len(policies) != 2:
            raise UserError(
                f"label.ab.enabled=true compares two policies, not {len(policies)}: set "
                "label.policies with two model directories."
            )
        return
    _check_answer_count(label, len(policies))


def _check_answer_count(label: LabelConfig, policies: int) -> None:
    """The policies together write as many answers to a prompt as a task shows."""
    answers = policies * label.responses
    needed, what = 2, "a pair"
    if label.kind is LabelKind.ranking:
        needed, what = label.group, f"label.group={label.group}"
    if answers >= needed:
        return
    of = "1 policy" if policies == 1 else f"{policies} policies"
    noun = "answer" if answers == 1 else "answers"
    raise UserError(
        f"label.responses={label.responses} of {of} give {answers} {noun} to a prompt, "
        f"but {what} needs {needed}. Set label.responses={-(-needed // policies)} or more."
    )


def check_review_options(label: LabelConfig) -> None:
    """Nothing is chosen among the tasks of a review queue. Raises UserError."""
    for key, given in (
        ("label.choice", bool(label.choice)),
        ("label.prompts", label.prompts is not None),
    ):
        if given:
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


def check_scores(label: LabelConfig, *, scored: bool) -> None:
    """Options that need scores of the answers have them (`scored`). Raises UserError."""
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


def check_gold_options(label: LabelConfig, policies: Mapping[str, str]) -> None:
    """Some gold tasks are asked for, and nothing tells them from the others. Raises UserError."""
    if label.gold_path is None:
        return
    if label.gold_share == 0:
        raise UserError(
            f"label.gold_path={label.gold_path} is set, but label.gold_share=0 asks for no gold "
            "task. Set a share, such as 0.1."
        )
    if label.prelabel and not policies:
        key = "label.samples" if label.samples else "label.review"
        raise UserError(
            f"label.prelabel=true with label.gold_path and {key}: nothing scores the gold "
            "answers, and a task without a suggestion would be known. "
            "Set label.prelabel=false, or leave label.gold_path out."
        )


def check_tools(label: LabelConfig) -> None:
    """The tools can show what is asked for, and the server can be reached. Raises UserError."""
    label_studio = label.push or LabelTarget.label_studio in label.targets
    if label.ratings and label.kind is LabelKind.ranking and label_studio:
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
    access_token(label.token_env, "label.push=true")


def check_address(url: str) -> None:
    """`url` is the address of a server and holds no password, since manifests and error messages
    show it. Raises UserError, which quotes no password.
    """
    expected = "expected the address of a Label Studio server, such as http://localhost:8080"
    if "@" in url.partition("://")[2].partition("/")[0]:
        raise UserError(
            f"label.url holds a user: {expected}. An access token goes into the environment "
            "variable that label.token_env names."
        )
    if not url.startswith(("http://", "https://")):
        raise UserError(f"label.url={url}: {expected}.")


def access_token(variable: str, wanted_by: str) -> str:
    """The server's access token, from the environment `variable`. `wanted_by`: the option that
    needs it.

    Raises UserError. It quotes no `variable` that may be the token itself.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise UserError(
            "label.token_env is no environment variable's name of capital letters, digits and "
            "underscores. Put the access token into a variable, "
            "such as LABEL_STUDIO_API_KEY, and give its name."
        )
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(
            f"{wanted_by} needs an access token in the environment variable {variable} "
            "(label.token_env), which is not set. "
            "Label Studio shows it under Account & Settings."
        )
    return token
