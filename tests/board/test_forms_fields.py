"""The fields of every stage's form: all options have one, or a reason why not."""

import pytest

from conf.stages import FAMILIES, GROUPS_OF
from rlhf.board.forms import allowed
from rlhf.board.forms.basic import BASIC, TERMS, stages
from rlhf.board.forms.fields import Scalar, Widget, form_of, step_fields
from rlhf.board.rendering import LANGUAGES, words
from rlhf.cli.options import ANYTHING, NAME, valid_keys
from rlhf.cli.presets import stage_schema

# Stages that train or make something: the others run until they are stopped, or have other pages.
_NO_FORM = {"migrate", "chat", "serve_reward", "serve_rollout", "board", "chain", "doctor"}
_NO_FORM |= {"registry", "search"}
_NO_FORM |= {"gateway"}


def test_every_stage_that_makes_something_has_a_form() -> None:
    schemas = {schema for members in FAMILIES.values() for schema in members}
    assert set(BASIC) == schemas - _NO_FORM
    assert {"sft", "ppo", "grpo", "rloo", "dapo", "export", "label", "data"} <= set(stages())


@pytest.mark.parametrize("schema", BASIC)
def test_every_option_has_a_field_or_a_reason(schema: str) -> None:
    form = form_of(schema, True)
    shown = {each.key for each in form.options}
    for each in form.options:
        shown |= {f"{each.key}.{NAME}.{inner.key}" for inner in each.inner}
    groups = ("stage", *(name for name in GROUPS_OF[schema] if name != "launch"))
    missing = set()
    for key in valid_keys([schema]):
        is_group = any(other.startswith(f"{key}.") and "<" not in other for other in shown)
        whole = key.removesuffix(f".{NAME}").removesuffix(f".{ANYTHING}")
        if key.split(".")[0] in groups and not is_group and whole not in shown:
            missing.add(key)
    reasons = {key for key in missing if not allowed.may_set(key, remote_code=True)}
    assert missing - reasons <= {*groups, "stage.name"}


@pytest.mark.parametrize("stage", stages())
def test_basic_fields_are_few_and_explained_in_both_languages(stage: str) -> None:
    form = form_of(stage, False)
    assert 6 <= len(form.basic) <= 13
    assert len(form.basic) == len(BASIC[form.schema])  # none was misspelt
    for field in form.basic:
        for language in LANGUAGES:
            assert f"forms.label.{field.key}" in words(language)
        if field.widget is Widget.preset:
            assert all(f"forms.preset.{field.key}" in words(name) for name in LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_words_of_stages_groups_families_and_terms(language: str) -> None:
    held = words(language)
    for stage in stages():
        form = form_of(stage, True)
        assert f"forms.stage.{stage}" in held
        assert all(f"forms.group.{group.name}" in held for group in form.groups)
        family = next(name for name, them in FAMILIES.items() if stage_schema(stage) in them)
        assert f"forms.family.{family}" in held
    for term in {term for terms in TERMS.values() for term in terms}:
        assert f"forms.term.{term}" in held and f"forms.term.{term}.text" in held


def test_widgets_follow_from_types() -> None:
    by_key = {field.key: field for field in form_of("ppo", False)}
    assert by_key["adapter"].widget is Widget.preset and "lora" in by_key["adapter"].choices
    assert by_key["stage.kl_coef"].scalar is Scalar.number
    assert by_key["stage.steps"].scalar is Scalar.whole and by_key["stage.steps"].nullable
    assert by_key["stage.dropout"].widget is Widget.check
    share = by_key["engine.share_prompts"]
    assert share.nullable and share.choices == ("true", "false")
    assert by_key["reward.terms"].widget is Widget.items
    assert by_key["data.columns"].widget is Widget.table
    assert by_key["data.pipeline"].widget is Widget.steps
    assert by_key["stage.dpo_losses"].widget is Widget.lines  # weights belong to them by order
    assert {field.key for field in form_of("eval", False) if field.widget is Widget.many} == {
        "stage.judges"
    }
    assert "adapter.kind" not in by_key and "launch.kind" not in by_key
    assert [field.key for field in step_fields("repair")][:2] == ["encoding", "nfkc"]


def test_remote_code_is_a_field_only_where_it_is_allowed() -> None:
    assert "model.trust_remote_code" not in {field.key for field in form_of("sft", False)}
    assert "model.trust_remote_code" in {field.key for field in form_of("sft", True)}
