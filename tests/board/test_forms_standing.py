"""The command and the file beside a form give the form's own configuration."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.board.forms import standing
from rlhf.board.forms.basic import stages
from rlhf.board.forms.filling import Filled, fill
from rlhf.cli import config
from rlhf.cli.command import check_shell
from rlhf.cli.presets import stage_schema
from tests.board.entering import place_in

_TRAIN = {"tracking": "none", "adapter": "lora", "stage.adam_eps": "1e-7", "run.seed": "7"}
_MODEL = {"model.path": "owner/name", "model.attn_implementation": 'it\'s, "x" = {1}'}
_TEXT = "日本語 {a: b}, c=d; \\ $HOME \\"
_ROWS = {"data.max_rows": "5", "data.system": _TEXT, "data.subset": "1e5"}
_SENT: dict[str, dict[str, Any]] = {
    "sft": {**_TRAIN, **_MODEL, **_ROWS, "adapter.targets": "q_proj\nv,proj\n'k'", "model": "tiny"},
    "reward": {**_TRAIN, **_ROWS, "adapter.rank_pattern.q_proj": "4", "data.split": "null"},
    "dpo": {**_TRAIN, "stage.losses": "ipo\nsft", "stage.weights": "1\n.5", "data.subset": "007"},
    "kto": {**_TRAIN, "stage.train.modules": "(a|b)[0-3]\n.*x, y", "data.columns.prompt": "q"},
    "cpo": {**_TRAIN, "experiment": "smollm2", "data.system": "[a, b]"},
    "orpo": {**_TRAIN, "engine": "zero3", "data.subset": " blanks "},
    "ppo": {
        **_TRAIN,
        "reward": "code",
        "reward.terms.brevity.weight": "0.25",
        "reward.terms.shape.kind": "regex",
        "reward.terms.shape.pattern": "^\\{\"a\": [1-9],? 'b'\\}$ = (\\d+)",
        "environment": "reasoning_gym",
        "environment.game": "chain_sum",
        "environment.options.min_terms": "3",
        "environment.options.note": "a, b: {c}",
    },
    "eval": {"stage.before": "a/b", "stage.after": "c/d", "stage.judges": ["", "lexicon"]},
    "eval_reward": {"stage.models.one": "owner/one", "stage.bins": "12", "run.seed": "7"},
    "serve": {"stage.model_name": "日本 'x'=1", "stage.adapters.a": "owner/a", "stage.port": "0"},
    "export": {"stage.title": "日本 'x' = 1, {2}", "stage.license": "yes", "stage.gguf": "f16"},
    "data": {
        "data": "clean",
        "data.columns.prompt": "die Frage, {1}: 'x'=\"y\"",
        "data.sources.a.path": "owner/set",
        "data.sources.a.columns": "prompt=q: 1\nanswer=a, b",
        "data.pipeline#0": "length",
        "data.pipeline#0.low": "3",
        "data.pipeline#1": "exact_duplicates",
    },
    "label": {
        "label.policies.one": "owner/one",
        "label.policies.two": "owner/two",
        "label.choice.random": "0.25",
        "label.choice.uncertainty": "0.75",
        "label.title": 'Which "one", {a} or [b]?',
        "label.instructions": "= 日本語 \\",
    },
}


def filled(tmp_path: Path, stage: str, sent: dict[str, Any]) -> tuple[Any, Filled]:
    place = place_in(tmp_path, folders=())
    listed = {key: value if isinstance(value, list) else [value] for key, value in sent.items()}
    made = fill(place, stage, {"run.name": ["läufe 'x', {y}=1"], **listed})
    assert made.is_whole, (made.problems, made.top)
    return place, made


@pytest.mark.parametrize("stage", stages())
def test_command_and_file_compose_to_the_same_text(tmp_path: Path, stage: str) -> None:
    sent = _SENT[stage_schema(stage)]
    if stage in ("ipo", "simpo"):
        sent = {key: value for key, value in sent.items() if key not in _LOSSES}
    place, made = filled(tmp_path, stage, sent)
    wanted = config.to_yaml(made.cfg)
    words = shlex.split(standing.command(made.overrides))
    assert words[:3] == ["python", "-m", "rlhf"]
    check_shell(words[3:])
    assert config.to_yaml(config.compose(words[3:])) == wanted
    text = standing.experiment(stage, made.presets, made.changed, place.runs)
    folder = tmp_path / "with blank"
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    again = shlex.split(standing.command_of_file(stage, folder, "mine"))[3:]
    assert config.to_yaml(config.compose(again)) == wanted


_LOSSES = ("stage.losses", "stage.weights")


def test_only_what_differs_is_written(tmp_path: Path) -> None:
    place, made = filled(tmp_path, "grpo", {"stage.kl_coef": "0.04", "rollout.top_p": "1"})
    assert [text.split("=")[0] for text in made.overrides] == ["stage", "run.dir", "run.name"]
    text = standing.experiment("grpo", made.presets, made.changed, place.runs)
    assert "defaults" not in text and yaml.safe_load(text)["run"]["dir"] == str(place.runs)


@pytest.mark.parametrize("text", ["yes", "1e5", "0x1", "~", ".inf", "nan", "2024-1-1", "a: b", ""])
def test_texts_stay_texts_in_the_file(text: str) -> None:
    from omegaconf import OmegaConf

    dumped = standing.experiment(
        "sft", _no_presets(), {"data.system": text, "data.x": [text]}, Path("r")
    )
    read = OmegaConf.create(dumped)
    assert read.data.system == text and list(read.data.x) == [text]


def _no_presets() -> Any:
    from rlhf.board.forms.base import Presets, given_presets

    given = given_presets("sft", "null")
    return Presets(given, given)
