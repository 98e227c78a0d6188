"""The proof of environments: its conversations are what they claim, its template joins turns, its
commands compose, and it fails on every figure that is off.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks.proofs import environments as proof
from benchmarks.proofs.environments import TASKS, ProofRuns
from rlhf.cli import config
from rlhf.environments import factory
from rlhf.environments.calls import Call, read_calls
from rlhf.environments.tables import table, value
from rlhf.models.encoding import answer_ids, prompt_ids
from rlhf.models.joining import Joiner
from rlhf.models.loading import train_tokenizer
from rlhf.models.templates import template_text
from rlhf.models.turns import text_of
from rlhf.types import Message
from tests.benchmarks.test_proofs import change_summary

GOOD = {"eval/success_before": 0.3, "eval/success_after": 0.9}
CHANCE = {"eval/success_before": 0.0, "eval/success_after": 0.004}


def test_the_table_is_drawn_once_for_all() -> None:
    values = [table(f"{key:03d}") for key in range(1000)]
    assert values[:3] == [value("000"), value("001"), value("002")]
    assert 600 < len(set(values)) < 700, "of 1,000 draws of 1,000, 632 differ on average"
    assert value("000", "other") != value("000")
    for bad in ("1", "abc", "1234", ""):
        with pytest.raises(ValueError, match="digits"):
            table(bad)


def test_demonstrations_look_up_at_their_share() -> None:
    rng = random.Random(1)
    rows = [proof.looked_up(rng, 1)["messages"] for _ in range(2000)]
    looked = [messages for messages in rows if len(messages) == 4]
    assert len(looked) / 2000 == pytest.approx(proof.LOOKS_UP, abs=0.04)
    for key, asked, told, said in looked:
        assert asked["tool_calls"][0]["function"]["arguments"] == {"key": key["content"]}
        assert told["content"] == said["content"]
    others = [messages for messages in rows if len(messages) == 2]
    known = sum(said["content"] == value(key["content"]) for key, said in others)
    assert known < 10, "no demonstration knows the table"


def test_demonstrated_games_are_answered_rightly() -> None:
    rng = random.Random(1)
    rows = [proof.guessed(rng, 1)["messages"] for _ in range(2000)]
    assert {len(messages) for messages in rows} == {2, 4, 6}
    for messages in rows:
        guesses = [int(message["content"]) for message in messages[1::2]]
        low, high = proof.LOW, proof.HIGH
        for guess, answer in zip(guesses, messages[2::2], strict=False):
            if answer["content"] == "higher":
                low = max(low, guess + 1)
            else:
                high = min(high, guess - 1)
        assert low <= high, "the answers contradict each other"


def test_no_held_out_prompt_trains(tmp_path: Path) -> None:
    for task in TASKS:
        plan = ProofRuns(tmp_path, 0, task)
        plan.write()
        folder = plan.root / f"{task}-data"
        files = {}
        for name in ("prompts", "prompts_eval"):
            lines = (folder / f"{name}.jsonl").read_text().splitlines()
            files[name] = {json.loads(line)["prompt"][0]["content"] for line in lines}
        assert len(files["prompts_eval"]) == proof.HELD_OUT
        assert len(files["prompts"]) > 700
        assert not files["prompts"] & files["prompts_eval"]


@pytest.mark.parametrize("task", TASKS)
def test_commands_compose_and_their_environment_begins(task: str, tmp_path: Path) -> None:
    plan = ProofRuns(tmp_path, 0, task, ("rollout=hf",))
    commands = list(plan.commands())
    assert len(commands) == 1 + 2 * len(TASKS[task].runs)
    for command in commands:
        assert command[1:3] == ["-m", "rlhf"]
        cfg = config.compose(command[3:])
        assert cfg.data.chat_template == str(proof.TEMPLATE)
        factory.check(cfg.environment)
    names = [command[3] for command in commands]
    assert names[0] == "stage=sft" and names[2::2] == ["stage=eval"] * len(TASKS[task].runs)


@pytest.mark.parametrize("task", TASKS)
def test_the_template_joins_turns_as_it_writes_conversations(task: str) -> None:
    rng = random.Random(2)
    rows = [TASKS[task].demonstrate(rng, 0)["messages"] for _ in range(20)]
    tokenizer = train_tokenizer([str(row) for row in rows], 260, 160)
    tokenizer.chat_template = template_text(str(proof.TEMPLATE))
    joiner = Joiner(tokenizer, None)
    assert joiner.check(rows[0][:1]) is not None
    longest: list[Message] = max(rows, key=len)
    ids = prompt_ids(tokenizer, longest[:1])
    for at in range(1, len(longest), 2):
        written = answer_ids(tokenizer, longest[:at], longest[at], None)
        calls = read_calls(text_of(tokenizer, written[:-1]))
        assert bool(calls) == ("tool_calls" in longest[at])
        assert all(isinstance(call, Call) and call.name == "table" for call in calls)
        ids = [*ids, *written]
        if at + 1 < len(longest):
            ids += joiner.observation_ids(longest[:1], longest[at + 1 : at + 2])
    rendered = tokenizer.apply_chat_template(longest, tokenize=False)
    assert text_of(tokenizer, ids) + "\n" == rendered


def write_run(folder: Path, metrics: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    summary = {"stage": folder.name, "steps": 9, "wall_s": 100.0, "peak_rss_mb": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary | {"metrics": metrics}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "rollout/logprob_gap": 1e-5}\n')


def write_all(runs: Path) -> None:
    """The runs of a proof that passes."""
    for task, options in TASKS.items():
        root = ProofRuns(runs, 0, task).root
        write_run(root / f"{task}-sft" / "sft", {})
        for name, (stage, *_) in options.runs.items():
            write_run(root / f"{task}-{name}" / stage, {})
            write_run(root / f"{task}-{name}" / "eval", CHANCE if name == "without" else GOOD)


def check_only(runs: Path) -> int:
    return proof.main(["--check-only", "--runs", str(runs), "--seeds", "0"])


def test_good_runs_pass(tmp_path: Path) -> None:
    write_all(tmp_path)
    assert check_only(tmp_path) == 0


@pytest.mark.parametrize(
    ("run", "figure", "value"),
    [
        ("lookup-grpo", "eval/success_after", 0.45),
        ("lookup-ppo", "eval/success_after", 0.45),
        ("lookup-without", "eval/success_after", 0.03),
        ("guess-grpo", "eval/success_before", 0.85),
        ("guess-grpo", "eval/success_after", None),
    ],
)
def test_a_figure_that_is_off_fails(
    tmp_path: Path, run: str, figure: str, value: float | None
) -> None:
    write_all(tmp_path)
    change_summary(ProofRuns(tmp_path, 0, "lookup").root / run, "eval", figure, value)
    assert check_only(tmp_path) == 1


def test_a_slow_run_fails(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = ProofRuns(tmp_path, 0, "guess").root / "guess-sft" / "sft" / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"wall_s": 701.0}))
    assert check_only(tmp_path) == 1


def test_a_gap_between_sampler_and_trainer_fails(tmp_path: Path) -> None:
    write_all(tmp_path)
    path = ProofRuns(tmp_path, 0, "guess").root / "guess-grpo" / "grpo" / "metrics.jsonl"
    path.write_text('{"step": 1, "rollout/logprob_gap": 0.01}\n')
    assert check_only(tmp_path) == 1
