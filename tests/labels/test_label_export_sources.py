"""label.mode=export of runs' samples and review queues, and what can't be asked at all."""

import json
from collections import Counter
from pathlib import Path

import pytest

from conf.schema import ModelConfig
from rlhf.labels.checks_export import instructions_text
from rlhf.labels.ledger import task_row
from rlhf.labels.records import Answer, Role, Task
from rlhf.models.loading import load_tokenizer, train_tokenizer
from rlhf.types import UserError
from tests import toys
from tests.checking import check
from tests.labels.label_steps import (
    GOLD,
    Tiny,
    configured,
    run_export,
    sample_rows,
    samples_of,
    two,
)
from tests.reward.test_scorer import save_reward_model

pytestmark = pytest.mark.usefixtures("one_thread")


# --- runs' samples and review queues
# -----------------------------------------------------------------------------------------


def test_a_runs_samples_are_compared_across_its_steps(tmp_path: Path) -> None:
    place = samples_of(tmp_path / "alpha/ppo")
    directory, export = run_export(
        tmp_path,
        f"label.samples=[{place}]",
        "label.choice={uncertainty: 1.0}",
        "label.budget=4",
        prompts=False,
    )
    assert sorted(task.prompt for task in export.tasks) == ["p0", "p1", "p2", "p3"]
    assert all(
        abs((t.answers[0].score or 0) - (t.answers[1].score or 0)) == pytest.approx(0.4)
        for t in export.tasks
    )
    assert {answer.policy for task in export.tasks for answer in task.answers} <= {
        "alpha/1",
        "alpha/5",
        "alpha/9",
    }
    metrics = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert (metrics["label/responses"], metrics["label/duplicates"], metrics["label/empty"]) == (
        14,
        1,
        1,
    )
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["parents"][0] == {
        "kind": "samples",
        "path": str(place.parent),
        "summary_sha256": None,
    }
    assert [entry["path"] for entry in manifest["data"]] == [str(place)]


def test_templated_samples_get_the_prompts_of_the_data(
    tmp_path: Path, tiny_model: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("hello", "bye")]
    rows = [
        {
            "step": step,
            "prompt": f"<|im_start|>user\n{chat[0]['content']}<|im_end|>\n<|im_start|>assistant\n",
            "response": f"r{step}",
        }
        for step in (1, 2)
        for chat in chats
    ]
    place = samples_of(
        tmp_path / "alpha/ppo", [*rows, {"step": 1, "prompt": "other", "response": "r"}]
    )
    _, plain = run_export(tmp_path, f"label.samples=[{place}]", prompts=False)
    assert "4 of 5 responses hold marks" in caplog.text and plain.tasks[0].prompt.startswith(
        "<|im_start|>user"
    )
    data = toys.write_jsonl(tmp_path / "chats.jsonl", [{"prompt": chat} for chat in chats])
    chosen = [
        f"label.samples=[{place}]",
        f"data.path={data}",
        f"model.path={tiny_model()}",
        "data.chat_template=chatml",
        "run.name=own",
    ]
    _, export = run_export(tmp_path, *chosen, "data.max_prompt_length=60", prompts=False)
    assert sorted(task.prompt[0]["content"] for task in export.tasks) == ["bye", "hello"]
    assert "1 of 5 responses answer no prompt" in caplog.text
    with pytest.raises(
        UserError,
        match=r"label.samples: not one of the 5 responses.*data.path=.*the first is to "
        r"'<\|im_start",
    ):
        run_export(
            tmp_path,
            *chosen,
            "data.chat_template=llama-3",
            "data.max_prompt_length=200",
            "run.name=wrong",
            prompts=False,
        )


def test_an_evaluations_samples_are_two_policies(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {
            "step": 0,
            "prompt": f"p{i}",
            "response_before": f"old {i}",
            "response": "old 1" if i == 1 else f"new {i}",
        }
        for i in range(4)
    ]
    _, export = run_export(
        tmp_path,
        f"label.samples=[{samples_of(tmp_path / 'alpha/eval', rows)}]",
        "label.ab.enabled=true",
        prompts=False,
    )
    assert len(export.tasks) == 3 and export.details["ab"]["identical"] == 1
    assert {answer.policy for task in export.tasks for answer in task.answers} == {
        "alpha/before",
        "alpha/after",
    }
    place = samples_of(tmp_path / "beta/ppo")
    with pytest.raises(UserError, match=r"4 in label.samples: alpha/1, alpha/5"):
        run_export(
            tmp_path,
            f"label.samples=[{place}]",
            "label.ab.enabled=true",
            "run.name=more",
            prompts=False,
        )


def test_scores_of_two_rewards_are_said_to_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = samples_of(tmp_path / "alpha/ppo"), samples_of(tmp_path / "beta/ppo")
    other.with_name("config.yaml").write_text(
        "run: {name: beta}\nreward: {path: another}\n", encoding="utf-8"
    )
    run_export(
        tmp_path, f"label.samples=[{one},{other}]", "label.choice={uncertainty: 1.0}", prompts=False
    )
    assert "the scores come from different rewards" in caplog.text


def test_a_review_goes_out_again_with_sides_drawn_anew(tmp_path: Path) -> None:
    answers = [(Answer(f"a{i}", "north", 1.0), Answer(f"b{i}", "south", 2.0)) for i in range(8)]
    old = [
        Task(
            f"old-{i}",
            f"p{i}",
            tuple(sorted(pair, key=lambda a: a.id)),
            (0, 1),
            Role.main,
            "random",
        )
        for i, pair in enumerate(answers)
    ]
    place = toys.write_jsonl(
        tmp_path / "review.jsonl", [task_row(task) | {"labels": []} for task in old]
    )
    _, export = run_export(
        tmp_path, f"label.review={place}", "label.budget=2", "label.prelabel=true", prompts=False
    )
    assert len(export.tasks) == 8 and {task.chosen_by for task in export.tasks} == {"review"}
    known = {task.id: task for task in old}
    assert sorted(export.details["origins"].values()) == sorted(known)
    for task in export.tasks:
        assert task.answers == known[export.details["origins"][task.id]].answers
    assert Counter(task.answers[task.order[0]].policy for task in export.tasks) == {
        "north": 4,
        "south": 4,
    }


# --- what can't be asked
# ------------------------------------------------------------------------------------------


def test_gold_that_is_too_little_is_said(
    tmp_path: Path, tiny_model: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    gold = toys.write_jsonl(tmp_path / "gold.jsonl", GOLD[:2])
    chosen = [
        f"model.path={tiny_model()}",
        f"label.gold_path={gold}",
        "label.gold_share=0.5",
        "label.budget=8",
    ]
    _, export = run_export(tmp_path, *chosen)
    assert sum(task.role is Role.gold for task in export.tasks) == 2
    assert "label.gold_share=0.5 asks for 4" in caplog.text and "gives 2" in caplog.text
    same = toys.write_jsonl(
        tmp_path / "same.jsonl", [{"prompt": "p", "chosen": "x", "rejected": " x"}]
    )
    with pytest.raises(UserError, match=r"none of its 1 pairs .*\(1 pairs of the same text\)"):
        run_export(
            tmp_path, f"model.path={tiny_model()}", f"label.gold_path={same}", "run.name=none"
        )


def test_nothing_to_ask_has_a_reason(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": i, "prompt": "p", "response": text}
        for i, text in enumerate(("x", " x", "", "x\n"))
    ]
    place = samples_of(tmp_path / "alpha/ppo", rows)
    with pytest.raises(
        UserError,
        match=r"2 different answers \(.*4 responses to 1 prompts 1 .* 2 repeat another\)",
    ):
        run_export(tmp_path, f"label.samples=[{place}]", prompts=False)


def test_samples_with_holes_in_their_scores_are_refused(tmp_path: Path) -> None:
    rows = sample_rows()
    rows[3] = rows[3] | {"score": None}
    place = samples_of(tmp_path / "alpha/ppo", rows)
    with pytest.raises(
        UserError,
        match=r"label.choice=.*, but 1 of 12 answers have none",
    ):
        run_export(
            tmp_path, f"label.samples=[{place}]", "label.choice={uncertainty: 1.0}", prompts=False
        )


def test_a_policy_that_cannot_read_the_prompts_is_named(tmp_path: Path, tiny_model: Tiny) -> None:
    chats = toys.write_jsonl(
        tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}]
    )
    with pytest.raises(
        UserError, match=r"policy northern \(.*\): .*the tokenizer has no chat template"
    ):
        run_export(tmp_path, *two(tiny_model), f"data.path={chats}", prompts=False)


def test_instructions_are_a_text_or_a_file(tmp_path: Path) -> None:
    assert (
        instructions_text("Judge by the sound.\nSee notes.md")
        == "Judge by the sound.\nSee notes.md"
        and instructions_text("") == ""
    )
    (tmp_path / "guide.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="byte 4 is not UTF-8"):
        instructions_text(str(tmp_path / "guide.txt"))
    with pytest.raises(UserError, match=r"label.instructions=.*guide.md: no such file"):
        instructions_text(str(tmp_path / "guide.md"))


POLICY = "model.path={tied}"


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (
            [],
            r"needs answers: set label.policies=\{NAME: MODEL DIRECTORY\}, model.path, "
            r"label.samples",
        ),
        (
            ["label.policies={a: /no/such/place}"],
            r"label.policies.a=/no/such/place: no such directory",
        ),
        (["model.path=/no/such/place"], r"model.path=/no/such/place: no such directory"),
        ([POLICY, "data.path=null"], r"data.path is not set: stage=label"),
        (
            [POLICY, "label.responses=1"],
            r"label.responses=1 of 1 policy give 1 answer.* Set label.responses=2",
        ),
        (
            [POLICY, "label.kind=ranking", "label.group=5"],
            r"give 4 answers.*label.group=5 needs 5. Set label.responses=5",
        ),
        (
            [POLICY, "label.ab.enabled=true"],
            r"label.ab.enabled=true compares two policies",
        ),
        (
            [POLICY, "label.choice={uncertainty: 0.5, random: 0.5}"],
            r"label.choice=.* needs scores of the answers.*Set reward.path",
        ),
        ([POLICY, "label.choice={uncertain_diverse: 1.0}"], r"needs scores of the answers"),
        (
            [POLICY, "label.prelabel=true"],
            r"label.prelabel=true .*there are no scores",
        ),
        (
            [
                "label.policies={a: {tied}, b: {untied}}",
                "label.ab.enabled=true",
                "label.choice={uncertainty: 1.0}",
                "reward.function=tests.toys:constant",
            ],
            r"label.ab.enabled=true with label.choice=.*uncertainty.*Leave label.choice empty",
        ),
        (
            [POLICY, "label.gold_path=/no/gold.jsonl"],
            r"label.gold_path=/no/gold.jsonl: no such file",
        ),
        (
            [POLICY, "label.gold_path={prompts}"],
            r"chosen and a rejected answer.*\(prompt\)",
        ),
        (
            [POLICY, "label.gold_path={gold}", "label.gold_share=0"],
            r"label.gold_share=0 asks for no gold task",
        ),
        (
            [POLICY, "label.instructions=/no/guide.md"],
            r"label.instructions=/no/guide.md: no such file",
        ),
        (
            [
                POLICY,
                "label.kind=ranking",
                "label.ratings=true",
                "label.targets=[page,label_studio]",
            ],
            r"label.ratings=true with label.kind=ranking: Label Studio.*label.targets",
        ),
        (
            [POLICY, "label.push=true", "label.url=http://x"],
            r"environment variable LABEL_STUDIO_API_KEY",
        ),
        (
            [POLICY, "label.push=true", "label.url=localhost:80"],
            r"label.url=localhost:80: expected the address",
        ),
        ([POLICY, "reward.path=/no/rm"], r"reward.path=/no/rm"),
        (
            ["label.policies={a: {tied}, b: {far}}", "reward.path={reward}"],
            r"another tokenizer than the policy.*chat template",
        ),
        ([POLICY, "reward.function=tests.toys:nothing"], r"tests.toys has no function nothing"),
        (
            [POLICY, "rollout.max_response_length=60"],
            r"are more than the model reads \(policy=.* = 64\)",
        ),
        ([POLICY, "data.chat_template=nobody"], r"data.chat_template=nobody: no such file"),
        (["label.samples=[{prompts}]"], r"row 1: key 'response': expected, but missing"),
        (
            ["label.samples=[{samples}]", "label.prelabel=true"],
            r"label.prelabel=true.*no scores. Choose samples of a run",
        ),
        (
            ["label.samples=[{samples}]", "reward.path=x"],
            r"reward.path is set.*label.samples",
        ),
        (
            ["label.samples=[{scored}]", "label.prelabel=true", "label.gold_path={gold}"],
            r"nothing scores the gold answers",
        ),
        (["label.review={prompts}"], r"row 1: no key 'id'.*review.jsonl"),
        (
            ["label.review={review}", "label.choice={random: 1.0}"],
            r"label.choice is set.*label.review=.*review.jsonl",
        ),
        (
            ["label.review={review}", "label.prompts=3"],
            r"label.prompts is set.*label.review=.*review.jsonl",
        ),
        (
            ["label.review={review}", "label.ab.enabled=true"],
            r"label.ab.enabled=true with label.review",
        ),
        (
            ["label.review={review}", "label.prelabel=true", "label.gold_path={gold}"],
            r"with label.gold_path and label.review: nothing scores",
        ),
    ],
)
def test_preflight_says_what_is_missing(
    tmp_path: Path,
    tiny_model: Tiny,
    monkeypatch: pytest.MonkeyPatch,
    chosen: list[str],
    message: str,
) -> None:
    monkeypatch.delenv("LABEL_STUDIO_API_KEY", raising=False)
    task = Task("old", "p", (Answer("a"), Answer("b")), (0, 1))
    if "{reward}" in "".join(chosen):
        save_reward_model(tmp_path / "rm", load_tokenizer(ModelConfig(path=str(tiny_model()))))
        train_tokenizer(["alpha beta gamma"], 300, 64).save_pretrained(tmp_path / "far")
        (tmp_path / "far/config.json").write_text("{}", encoding="utf-8")
    places = {
        "{reward}": tmp_path / "rm",
        "{far}": tmp_path / "far",
        "{tied}": tiny_model(),
        "{untied}": tiny_model(tied=False),
        "{prompts}": tmp_path / "prompts.jsonl",
        "{gold}": toys.write_jsonl(tmp_path / "gold.jsonl", GOLD),
        "{samples}": toys.write_jsonl(
            tmp_path / "samples.jsonl", [{"step": 1, "prompt": "p", "response": "x"}]
        ),
        "{scored}": toys.write_jsonl(tmp_path / "scored.jsonl", sample_rows()),
        "{review}": toys.write_jsonl(tmp_path / "review.jsonl", [task_row(task)]),
    }
    text = "\n".join(chosen)
    for name, place in places.items():
        text = text.replace(name, str(place))
    with pytest.raises(UserError, match=message):
        check(configured(tmp_path, *text.splitlines()))
    assert not (tmp_path / "default").exists()
