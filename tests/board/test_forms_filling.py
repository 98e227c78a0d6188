"""A form as it comes back: presets that change, rows, and problems at their fields."""

from pathlib import Path
from typing import Any

import pytest

from rlhf.board.forms import base
from rlhf.board.forms.fields import form_of
from rlhf.board.forms.filling import Filled, as_rows, fill, named
from tests.board.entering import place_in


def filled(folder: Path, stage: str, sent: dict[str, Any], **values: Any) -> Filled:
    listed = {key: value if isinstance(value, list) else [value] for key, value in sent.items()}
    return fill(place_in(folder, **values), stage, listed)


def whole_form(made: Filled) -> dict[str, list[str]]:
    """What a browser sends of a form that nobody changed."""
    sent = {f"were.{group}": [name] for group, name in made.presets.chosen.items()}
    sent |= {group: [name] for group, name in made.presets.chosen.items()}
    sent |= made.texts
    for key, rows in made.rows.items():
        sent[f"{key}#"] = [""]
        for number, row in enumerate(rows):
            sent[f"{key}#{number}"] = [row.name]
            sent |= {f"{key}#{number}.{name}": texts for name, texts in row.texts.items()}
    return sent


@pytest.mark.parametrize("stage", ["sft", "ppo", "grpo", "eval", "data", "label", "export"])
def test_a_form_that_nobody_changed_changes_nothing(tmp_path: Path, stage: str) -> None:
    first = filled(tmp_path, stage, {})
    again = filled(tmp_path, stage, whole_form(first))
    assert again.is_whole and not again.changed and not again.unknown
    assert again.overrides == first.overrides


def test_a_new_preset_brings_its_values_and_keeps_what_was_changed(tmp_path: Path) -> None:
    sent = whole_form(filled(tmp_path, "sft", {}))
    sent |= {"adapter": ["lora"], "stage.batch_size": ["8"]}
    made = filled(tmp_path, "sft", sent)
    assert made.is_whole and made.changed == {"stage.batch_size": 8}
    assert made.cfg is not None and made.cfg.adapter.kind.value == "lora"
    full = filled(tmp_path, "sft", {})
    assert full.texts["stage.learning_rate"] != made.texts["stage.learning_rate"]
    back = whole_form(made) | {"adapter": ["none"]}
    assert filled(tmp_path, "sft", back).changed == {"stage.batch_size": 8}


def test_an_experiment_brings_its_presets(tmp_path: Path) -> None:
    sent = whole_form(filled(tmp_path, "ppo", {})) | {"experiment": ["smollm2"]}
    made = filled(tmp_path, "ppo", sent)
    assert made.presets.chosen["adapter"] == "lora"
    assert made.overrides[:2] == ["stage=ppo", "experiment=smollm2"] and not made.changed
    other = filled(tmp_path, "ppo", whole_form(made) | {"adapter": ["none"]})
    assert "adapter=none" in other.overrides and other.presets.chosen["adapter"] == "none"


def test_terms_of_a_preset_are_changed_and_others_added(tmp_path: Path) -> None:
    sent = whole_form(filled(tmp_path, "grpo", {"reward": "code"}))
    rows = [sent[key] for key in ("reward.terms#0", "reward.terms#1")]
    assert rows == [["passed"], ["brevity"]]
    sent |= {"reward.terms#1.weight": ["0.5"], "reward.terms#2": ["shape"]}
    sent |= {"reward.terms#2.kind": ["regex"], "reward.terms#2.pattern": ["a{1,2}=b"]}
    made = filled(tmp_path, "grpo", sent)
    assert made.changed == {
        "reward.terms.brevity.weight": 0.5,
        "reward.terms.shape.kind": "regex",
        "reward.terms.shape.pattern": "a{1,2}=b",
    }
    assert made.is_whole and made.cfg is not None
    assert set(made.cfg.reward.terms) == {"passed", "brevity", "shape"}
    sent.pop("reward.terms#0")  # no page offers that, and no command line could
    assert set(filled(tmp_path, "grpo", sent).cfg.reward.terms) == {"passed", "brevity", "shape"}  # type: ignore[union-attr]


def test_a_preset_that_is_left_takes_its_terms_with_it(tmp_path: Path) -> None:
    sent = whole_form(filled(tmp_path, "grpo", {"reward": "code"})) | {"reward": ["math"]}
    made = filled(tmp_path, "grpo", sent)
    assert made.is_whole and not made.changed
    assert [row.name for row in made.rows["reward.terms"]] == ["correct", "format"]


@pytest.mark.parametrize(
    ("stage", "sent", "field"),
    [
        ("ppo", {"stage.kl_coef": "-1"}, "stage.kl_coef"),
        ("ppo", {"stage.minibatches": "3", "stage.prompts_per_step": "64"}, "stage.minibatches"),
        (
            "ppo",
            {"stage.samples_per_prompt": "1", "stage.advantage": "group"},
            "stage.samples_per_prompt",
        ),
        ("sft", {"adapter": "vera"}, "stage.learning_rate"),
        (
            "sft",
            {"adapter": "lora", "adapter.adalora.initial_rank": "3"},
            "adapter.adalora.initial_rank",
        ),
        ("sft", {"adapter": "nosuch"}, "adapter"),
        ("sft", {"run.resume": "true", "run.overwrite": "true"}, "run.overwrite"),
        ("sft", {"data.eval_fraction": "1"}, "data.eval_fraction"),
        ("sft", {"run.name": "../x"}, "run.name"),
        ("sft", {"run.name": ".board"}, "run.name"),
        ("sft", {"data.path": "/etc/passwd"}, "data.path"),
        ("sft", {"data.columns#0": "a", "data.columns#1": "a"}, "data.columns#0.value"),
        ("ppo", {"reward.terms#0": "", "reward.terms#0.kind": "math"}, "reward.terms#0"),
        ("ppo", {"reward.terms.step.kind": "math"}, "reward.terms"),
        ("ppo", {"reward.terms.x.weight": "1"}, "reward.terms#0.kind"),
        ("ppo", {"reward.terms.x.kind": "function"}, "reward.terms#0.kind"),
        (
            "ppo",
            {"reward.terms.x.kind": "choice", "reward.terms.x.letters": "a"},
            "reward.terms#0.letters",
        ),
        ("ppo", {"reward.terms.true.kind": "math"}, "reward.terms#0"),
        ("ppo", {"reward.terms.x.paths": "/etc"}, "reward.terms#0.paths"),
        ("ppo", {"environment": "tools", "environment.tools": "os:system"}, "environment.tools"),
        ("ppo", {"environment": "python"}, "environment"),
        ("label", {"label.choice.random": "0.5"}, "label.choice"),
        ("label", {"label.policies.x": "/etc"}, "label.policies#0.value"),
        ("data", {"data.pipeline#0": "nosuch"}, "data.pipeline#0"),
        ("data", {"data.pipeline#0": "length", "data.pipeline#0.low": "x"}, "data.pipeline#0.low"),
        (
            "data",
            {"data.pipeline#0": "back_translate", "data.pipeline#0.translator": "os:system"},
            "data.pipeline#0.translator",
        ),
        (
            "data",
            {"data.pipeline#0": "patterns", "data.pipeline#0.words": "/etc/passwd"},
            "data.pipeline#0.words",
        ),
    ],
)
def test_a_problem_stands_at_its_field(
    tmp_path: Path, stage: str, sent: dict[str, str], field: str
) -> None:
    made = filled(tmp_path, stage, sent)
    assert field in made.problems, (made.problems, made.top)
    assert not made.is_whole


def test_a_problem_of_no_field_stands_on_top(tmp_path: Path) -> None:
    made = filled(tmp_path, "sft", {"data.path": "a/b", "data.sources.x.path": "c/d"})
    assert not made.problems and "one of path, sources and dataset" in str(made.top[0].values)


@pytest.mark.parametrize(
    "key",
    [
        "run.dir",
        "reward.function",
        "launch.python",
        "label.url",
        "model.trust_remote_code",
        "no.such",
    ],
)
def test_what_the_page_does_not_set_is_named_and_not_taken(tmp_path: Path, key: str) -> None:
    made = filled(tmp_path, "ppo", {key: "os:system"})
    assert made.unknown == [key]
    assert not any("os:system" in text for text in made.overrides)
    made = filled(tmp_path, "ppo", {"reward.terms.x.kind": "math", "reward.terms.x.url": "u"})
    assert made.is_whole and not any("url" in text for text in made.overrides)


def test_remote_code_where_the_board_was_started_with_it(tmp_path: Path) -> None:
    sent = {"model.trust_remote_code": "true"}
    made = filled(tmp_path, "sft", sent, remote_code=True)
    assert "model.trust_remote_code=true" in made.overrides
    assert "model.trust_remote_code" in filled(tmp_path, "sft", sent).unknown


def test_a_run_that_is_there_is_said_at_its_name(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    (place.runs / "mine" / "sft").mkdir(parents=True)
    assert filled(tmp_path, "sft", {"run.name": "mine"}).is_whole  # it is empty
    (place.runs / "mine" / "sft" / "config.yaml").write_text("x")
    made = filled(tmp_path, "sft", {"run.name": "mine"})
    assert made.is_taken and made.problems["run.name"].word == "forms.error.taken"
    assert filled(tmp_path, "reward", {"run.name": "mine"}).is_whole
    for decision in ("run.resume", "run.overwrite"):
        assert filled(tmp_path, "sft", {"run.name": "mine", decision: "true"}).is_whole


def test_a_run_that_is_a_link_leads_nowhere_else(tmp_path: Path) -> None:
    place = place_in(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (place.runs / "mine").symlink_to(tmp_path / "elsewhere")
    assert "run.name" in filled(tmp_path, "sft", {"run.name": "mine"}).problems


def test_folders_of_the_boards_start_may_be_named(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("{}")
    sent = {"data.path": str(folder / "rows.jsonl")}
    assert not filled(tmp_path, "sft", sent).is_whole
    assert filled(tmp_path, "sft", sent, folders=(folder,)).is_whole


def test_rows_of_a_link(tmp_path: Path) -> None:
    sent = {"reward.terms.x.kind": ["math"], "data.columns.prompt": ["q"], "run.name": ["a"]}
    rows = as_rows(form_of("ppo", False), sent)
    assert rows == {
        "reward.terms#1000": ["x"],
        "reward.terms#1000.kind": ["math"],
        "data.columns#1000": ["prompt"],
        "data.columns#1000.value": ["q"],
        "run.name": ["a"],
    }


def test_the_key_that_a_message_names_first(tmp_path: Path) -> None:
    made = filled(tmp_path, "ppo", {"reward.terms.x.kind": "math"})
    message = "conf/x.py: engine.offload='cpu' is out of range: expected none with stage.steps"
    assert named(message, made)[0] == "engine.offload"
    assert named("reward.terms.x.high=3 is out of range", made) == ["reward.terms.x.high"]
    assert named("run.dir is full", made) == []


def test_presets_that_contradict_each_other_are_said_on_top(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.types import UserError

    composing = base.compose

    def compose(overrides: Any) -> Any:
        if "engine=zero2" in overrides:
            raise UserError("engine and adapter: no")
        return composing(overrides)

    monkeypatch.setattr(base, "compose", compose)
    base._base.cache_clear()
    made = filled(tmp_path, "orpo", {"engine": "zero2"})
    assert not made.is_whole and "no" in str(made.top[0].values)
