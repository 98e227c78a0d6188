"""Unknown keys and presets are refused with the nearest valid one; what Hydra's grammar can't read
is refused with the quoting that works.
"""

import re
import shlex

import pytest

from rlhf.cli import config
from rlhf.cli.command import check_shell
from rlhf.cli.config import check_overrides, prepare
from rlhf.types import UserError


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stage=ppo", "stage.kl_coeff=1"], "Nearest: stage.kl_coef."),
        (["stage=ppo", "+stage.kl_coeff=1"], "Nearest: stage.kl_coef."),
        (["stage=ppo", "++modle.path=x"], "Nearest: model.path."),
        (["stage=sft", "stage.kl_coef=1"], "stage.kl_coef: no such option of stage=sft."),
        (["stage=pp"], "Nearest: stage=ppo."),
        (["stage=ppo", "engine=zero4"], "Nearest: engine=zero3."),
        (["stage=ppo", "engien=zero3"], "Nearest: engine."),
        (["stage=ppo", "~model"], "can't be deleted"),
        (["stage=ppo", "stage.steps=many"], "could not be converted to Integer"),
        (["stage=ppo", "stage.kl_controller=adaptiv"], "adaptive"),
        (["stage=ppo", "reward.terms.brevity.kidn=length"], "reward.terms.brevity.kind"),
        (["stage=ppo", "reward.terms={brevity: {kidn: length}}"], "reward.terms.brevity.kind"),
    ],
)
def test_bad_overrides_name_the_key_and_the_nearest_valid_one(
    overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        config.compose(overrides)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        "label.title=Which is better? (A or B)",
        "label.title=Better: A (or B)",
        'label.instructions=Say "better" (or not)',
    ],
)
def test_a_text_that_the_grammar_cannot_read_comes_with_its_quoting(given: str) -> None:
    with pytest.raises(UserError) as error:
        check_overrides(["stage=label", given])
    words = shlex.split(str(error.value).rpartition("shell: ")[2])
    assert len(words) == 1
    key, _, value = given.partition("=")
    cfg = config.compose(["stage=label", *words])
    assert getattr(cfg.label, key.removeprefix("label.")) == value


ENGLISH = {"prompt": "Question (English)"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{prompt: Question (English)}", ENGLISH),
        (
            "{prompt: a=b, completion: user's answer}",
            {"prompt": "a=b", "completion": "user's answer"},
        ),
        ("{prompt: a, b}", {"prompt": "a, b"}),
        ('{"prompt": "q"}', {"prompt": "q"}),
        ("{prompt: 问题, completion: $x}", {"prompt": "问题", "completion": "$x"}),
    ],
)
def test_a_dictionary_stays_one_when_its_texts_are_quoted(
    value: str, expected: dict[str, str]
) -> None:
    with pytest.raises(UserError) as error:
        check_overrides(["stage=sft", f"data.columns={value}"])
    words = shlex.split(str(error.value).rpartition("shell: ")[2])
    assert config.compose(["stage=sft", *words]).data.columns == expected


@pytest.mark.parametrize(
    ("line", "key", "expected"),
    [
        ("data.columns={prompt: question}", "columns", {"prompt": "question"}),
        ("data.columns={prompt: the question, completion: a} -m", "columns", None),
        ("data.columns={prompt:q,completion:a}", "columns", {"prompt": "q", "completion": "a"}),
        ("data.columns={prompt:q,completion:qa}", "columns", {"prompt": "q", "completion": "qa"}),
        ("data.path=my rows (1).jsonl run.name=x", "path", "my rows (1).jsonl"),
        ("data.pipeline=[repair, {step: length}]", "pipeline", ["repair", {"step": "length"}]),
        (
            "data.pipeline=[repair,{step:length,low:10},split]",
            "pipeline",
            ["repair", {"step": "length", "low": 10}, "split"],
        ),
    ],
)
def test_what_a_shell_took_apart_comes_with_its_quoting(
    line: str, key: str, expected: object
) -> None:
    arguments = ["stage=data", *in_bash(line)]
    assert len(arguments) > 2
    with pytest.raises(UserError) as error:
        check_shell(arguments)
    words = shlex.split(str(error.value).rpartition("shell: ")[2])
    assert len(words) == 1
    read = getattr(config.compose(["stage=data", *words]).data, key)
    assert read == (expected or {"prompt": "the question", "completion": "a"})


def in_bash(line: str) -> list[str]:
    """The words that bash makes of a line without quotes."""
    words: list[str] = []
    for word in line.split():
        inside = re.fullmatch(r"(.*)\{([^{}]*,[^{}]*)\}(.*)", word)
        if inside is None:
            words.append(word)
        else:
            words += [inside[1] + item + inside[3] for item in inside[2].split(",")]
    return words


@pytest.mark.parametrize(
    "arguments",
    [
        ["stage=sft", "--cfg", "job", "data.path=a.jsonl"],
        ["stage=sft,dpo", "-m", "run.name=a:b", "run.name=c:d"],
        ["--help", "stage=sft"],
        ["sft"],
    ],
)
def test_a_whole_command_line_is_left_alone(arguments: list[str]) -> None:
    check_shell(arguments)


def test_no_quoting_is_offered_where_none_would_help() -> None:
    with pytest.raises(UserError) as error:
        check_overrides(["stage=ppo", "stage.kl coef=1"])
    assert "shell: " not in str(error.value)


def test_several_values_need_a_list_a_text_or_a_sweep() -> None:
    given = ["stage=ppo", "stage.kl_coef=0.1,0.2"]
    with pytest.raises(UserError) as error:
        check_overrides(given)
    for remedy in ("stage.kl_coef=[0.1,0.2]", "'stage.kl_coef=\"0.1,0.2\"'", "-m"):
        assert remedy in str(error.value)
    check_overrides([*given, "-m"])
    check_overrides(["stage=ppo,grpo", "--multirun"])


@pytest.mark.parametrize(
    ("given", "prepared"),
    [
        ("model.params=7b", "model.params=7e9"),
        ("model.params=1.5B", "model.params=1.5e9"),
        ("data.path=rows.jsonl#500", 'data.path="rows.jsonl#500"'),
        ("data.path=rows.jsonl", "data.path=rows.jsonl"),
        ("data.path=~/a=(1) 数据.jsonl", 'data.path="~/a=(1) 数据.jsonl"'),
        ("model.path=a=b", 'model.path="a=b"'),
        ("model.path=${run.dir}/(a)", "model.path=${run.dir}/(a)"),
        ("+reward.terms.b.kind=length", "++reward.terms={b:{kind:length}}"),
        ("reward.terms.b.low=1,2", "++reward.terms={b:{low:1}},{b:{low:2}}"),
        ("+data.gym.options.lcm.max=3", "++data.gym.options.lcm.max=3"),
        ("data.gym.options={lcm: {max: 3}}", "++data.gym.options={lcm: {max: 3}}"),
        ("stage.kl_coef=1", "stage.kl_coef=1"),
        ("--cfg", "--cfg"),
    ],
)
def test_arguments_in_the_form_that_hydra_takes(given: str, prepared: str) -> None:
    assert prepare([given]) == [prepared]
