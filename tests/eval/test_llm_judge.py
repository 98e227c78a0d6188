"""stage=eval with the judge llm: behind a server, here, and refused."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conf.judging import LLMJudgeConfig
from rlhf.cli import config
from rlhf.run.context import RunContext
from rlhf.stages import eval as stage
from rlhf.stages.evaluation.llm_judge import LocalJudge, check_llm_judge
from rlhf.types import Message, UserError
from tests.eval.scripted_judge import answers_in, judge_server
from tests.eval.test_eval import policies, run_eval  # noqa: F401 - a fixture

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def longer(question: str) -> str:
    first, second = answers_in(question)
    if len(first) == len(second):
        return "tie"
    return "[[A]]" if len(first) > len(second) else "[[B]]"


def report_of(folder: Path) -> dict[str, Any]:
    content: Any = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return {section["title"]: section for section in content["sections"]}


def test_a_server_judges_and_a_resumed_run_asks_nothing_twice(
    policies: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with judge_server(longer) as (url, seen):
        asked = [
            "stage.judges=[llm]",
            f"stage.llm_judge.url={url}",
            "stage.llm_judge.model=scripted",
        ]
        found = run_eval(policies, tmp_path, "start", "moved", *asked)
        first = len(seen)
        # killed before its end
        (tmp_path / "default" / "eval" / "summary.json").unlink()
        again = run_eval(policies, tmp_path, "start", "moved", *asked, "run.resume=true")
        assert len(seen) == first
    assert first == 2 * (found["eval/llm/pairs"] - found["eval/llm/identical"]) > 0
    assert found["eval/llm/consistency"] == 1.0 and found["eval/llm/longer_share"] == 1.0
    assert found["eval/llm/ranked"] == 1.0 and found["eval/llm/unread"] == 0.0
    rates = [found[f"eval/llm/{name}/win_rate"] for name in ("before", "after")]
    assert sum(rates) == pytest.approx(1.0)
    assert {name: again[name] for name in found} == pytest.approx(found)
    folder = tmp_path / "default" / "eval"
    lines = (folder / "judgements.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == found["eval/llm/pairs"]
    sections = report_of(folder)
    assert list(sections) == ["Before and after", "Judge: llm"]
    titles = [table["title"] for table in sections["Judge: llm"]["tables"]]
    assert "Who wins" in titles and "Each two policies" in titles


def test_any_number_of_policies(
    policies: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Three policies make three pairs for each prompt; before and after may be missing."""
    with judge_server(longer) as (url, _):
        asked = [
            "stage.judges=[llm]",
            f"stage.llm_judge.url={url}",
            "stage.llm_judge.model=scripted",
            f"+stage.policies.third={policies / 'moved'}",
        ]
        found = run_eval(policies, tmp_path, "start", "moved", *asked)
        assert found["eval/llm/pairs"] == 3 * 16
        # the same model, seed and prompts as after
        rates = [found[f"eval/llm/{name}/win_rate"] for name in ("after", "third")]
        assert rates[0] == rates[1]
        assert sum(rates) + found["eval/llm/before/win_rate"] == pytest.approx(1.5)
        assert found["eval/llm/identical"] >= 16
        cfg = config.compose(
            [
                "stage=eval",
                "rollout=hf",
                "tracking=none",
                f"run.dir={tmp_path}",
                "run.name=alone",
                f"data.eval_path={policies / 'prompts.jsonl'}",
                f"stage.before={policies / 'start'}",
                "rollout.max_response_length=8",
                "data.max_prompt_length=16",
                "stage.bootstrap=20",
                *asked,
            ]
        )
        assert isinstance(stage.check(cfg), list)
        stage.run(RunContext.open(cfg, ()))
        cfg.stage.before = None
        with pytest.raises(UserError, match="the only policy is third"):
            stage.check(cfg)
    summary = json.loads((tmp_path / "alone" / "eval" / "summary.json").read_text("utf-8"))
    alone = summary["metrics"]
    assert alone["eval/llm/third/win_rate"] == pytest.approx(1 - alone["eval/llm/before/win_rate"])
    assert list(report_of(tmp_path / "alone" / "eval")) == ["Judge: llm"]


def test_a_model_here_that_gives_no_verdict_ranks_nobody(
    policies: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A random tiny model writes no verdict: every pair is counted as unread, none as a tie."""
    judge = tmp_path / "judge"
    shutil.copytree(policies / "start", judge)
    (judge / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    asked = [
        "stage.judges=[llm]",
        f"stage.llm_judge.path={judge}",
        "stage.llm_judge.template='{prompt} {first} {second}'",
        "stage.llm_judge.max_prompt_length=56",
        "stage.llm_judge.max_tokens=4",
    ]
    with caplog.at_level(logging.WARNING):
        found = run_eval(policies, tmp_path, "start", "moved", *asked)
    assert found["eval/llm/ranked"] == 0.0
    assert found["eval/llm/unread"] == found["eval/llm/pairs"] - found["eval/llm/identical"]
    assert not [name for name in found if "win_rate" in name]
    assert "ranks nobody: 100% of the pairs have no clear verdict" in caplog.text
    text = report_of(tmp_path / "default" / "eval")["Judge: llm"]["text"]
    assert text[1].startswith("NOT RANKED")


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_judges_as_hugging_face_does(
    policies: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The policies write by vLLM; then the judge gets an engine of its own. It replies to each
    question what Hugging Face's generation replies.
    """
    judge = tmp_path / "judge"
    shutil.copytree(policies / "start", judge)
    (judge / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    shape = AutoConfig.from_pretrained(judge)
    shape.max_position_embeddings = 512  # a policy's 64 hold no question
    shape.initializer_range = 0.5  # so that a reply depends on what is asked
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(shape).save_pretrained(judge)
    asked: list[list[Message]] = []
    replied: list[str | None] = []
    judging = LocalJudge.ask

    def ask(self: LocalJudge, questions: Sequence[list[Message]]) -> list[str | None]:
        replies = judging(self, questions)
        asked.extend(questions)
        replied.extend(replies)
        return replies

    monkeypatch.setattr(LocalJudge, "ask", ask)
    options = [
        "stage.judges=[llm]",
        f"stage.llm_judge.path={judge}",
        "stage.llm_judge.template='{prompt} {first} {second}'",
        "stage.llm_judge.max_prompt_length=500",
        "stage.llm_judge.max_tokens=4",
    ]
    found = run_eval(policies, tmp_path, "start", "moved", *options, "rollout=vllm")
    assert len(asked) == 2 * (found["eval/llm/pairs"] - found["eval/llm/identical"]) > 0
    assert found["eval/llm/ranked"] == 0.0  # a random model has no verdict
    written = config.compose(["stage=eval", "rollout=hf", *options])
    alone = LocalJudge(SimpleNamespace(cfg=written, dir=tmp_path), written.stage.llm_judge)
    by_hf = judging(alone, asked)
    alone.close()
    assert replied == by_hf and len({reply for reply in replied if reply}) > 1


def test_a_judge_that_cannot_be_asked_is_refused_before_weights_load(
    policies: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message):
            check_llm_judge(LLMJudgeConfig(**options))

    refused(r"neither stage\.llm_judge\.path nor stage\.llm_judge\.url is set")
    refused(r"stage\.llm_judge\.url.*has no scheme", url="127.0.0.1:8000", model="m")
    monkeypatch.delenv("JUDGE_TOKEN", raising=False)
    server = {"url": "http://127.0.0.1:1/v1", "model": "m"}
    refused(r"stage\.llm_judge\.token_env=JUDGE_TOKEN.*not set", token_env="JUDGE_TOKEN", **server)
    refused(r"stage\.llm_judge\.path=.*no chat template", path=str(policies / "start"))
    check_llm_judge(LLMJudgeConfig(**server))
    overrides = [
        "stage=eval",
        f"stage.before={policies / 'start'}",
        f"stage.after={policies / 'start'}",
        f"data.eval_path={policies / 'prompts.jsonl'}",
        "stage.judges=[llm]",
        "data.max_prompt_length=16",
        "rollout=hf",
        "rollout.max_response_length=8",
    ]
    with pytest.raises(UserError, match=r"stage\.llm_judge"):
        stage.check(config.compose(overrides))


def test_a_question_longer_than_the_judge_reads_is_named(
    policies: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    judge = tmp_path / "judge"
    shutil.copytree(policies / "start", judge)
    (judge / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    with pytest.raises(UserError, match=r"max_prompt_length=60 .*max_tokens=32 = 92.*\(64\)"):
        check_llm_judge(LLMJudgeConfig(path=str(judge), max_prompt_length=60))
