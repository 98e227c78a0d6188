"""The held-out judge, the kept weights, and a run that is stopped when it exploits its reward."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from conf.choices import Action
from conf.stages import WatchConfig
from reward.scorers.computed import CompositeScorer, Term
from rlhf.cli import config
from rlhf.online.judging import (
    RECORD,
    HeldOutJudge,
    Keeper,
    Watching,
    comparable,
    held_out,
    share_out,
)
from rlhf.online.watch import HeldOutScores
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.stages import online as online_stage
from rlhf.stages import rows as stage_rows
from rlhf.types import Prompt, Rollout, Scores
from tests import drawing, toys

pytestmark = pytest.mark.usefixtures("one_thread")


def prompt(name: str) -> Prompt:
    return Prompt(name, name, (1,))


class FakeGenerator:
    """Answers prompt "pN" with N tokens; keeps what it was asked."""

    version = 0

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int, int | None, bool]] = []

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        self.calls.append(([p.id for p in prompts], n, seed, greedy))
        return [
            Rollout(p, p.id, [7] * int(p.id[1:]), [0.0], "length" if p.id == "p3" else "stop", 0)
            for p in prompts
        ]


class Lengths:
    """Scores a response by its length, times `sign`."""

    def __init__(self, sign: float) -> None:
        self.sign = sign

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        return Scores([self.sign * len(r.token_ids) for r in rollouts], {})

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def write_number(value: list[int]) -> Any:
    """A save callback that writes value[0] as the weights."""

    def save(directory: Path) -> None:
        (directory / "model").mkdir(parents=True)
        (directory / "model" / "weights").write_text(str(value[0]))

    return save


def test_held_out_prompts_are_different_and_shared_out_in_order() -> None:
    kept = held_out([prompt(n) for n in ("p1", "p2", "p1", "p3", "p4")], 3)
    assert [p.id for p in kept] == ["p1", "p2", "p3"]
    for ranks in (1, 2, 3, 5):
        shares = [share_out(kept, rank, ranks) for rank in range(ranks)]
        assert [p for share in shares for p in share] == kept
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_judge_and_proxy_score_the_same_responses_with_the_same_seed_each_time() -> None:
    generator = FakeGenerator()
    judge = HeldOutJudge([prompt("p2"), prompt("p3")], Lengths(-1.0), Lengths(1.0), seed=5)
    expected = HeldOutScores([-2.0, -3.0], [2.0, 3.0], [2, 3], [False, True])
    assert judge(generator) == judge(generator) == expected
    assert generator.calls == [(["p2", "p3"], 1, 5, False)] * 2


def test_the_reward_is_judged_without_running_statistics() -> None:
    rollouts = FakeGenerator().generate([prompt("p2"), prompt("p4")])
    training = CompositeScorer(
        [Term("a", Lengths(1.0), weight=2.0, clip=3.0, normalise=True), Term("b", Lengths(-1.0))]
    )
    training.score(rollouts)
    before = training.state_dict()
    judged = comparable(training)
    assert (
        judged.score(rollouts).total == judged.score(rollouts).total == [2.0 * 2 - 2, 2.0 * 3 - 4]
    )
    assert training.state_dict() == before and training.score(rollouts).total != [2.0, 2.0]
    lengths = Lengths(1.0)
    assert comparable(lengths) is lengths


def test_a_judgement_is_the_same_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(f"p{i}") for i in range(1, 4)]
    whole = HeldOutJudge(prompts, Lengths(-1.0), Lengths(1.0), seed=5)(FakeGenerator())
    for ranks in (2, 5):  # with five, some have nothing to do
        sent: list[Any] = []
        judges = [
            HeldOutJudge(share_out(prompts, rank, ranks), Lengths(-1.0), Lengths(1.0), seed=5)
            for rank in range(ranks)
        ]
        monkeypatch.setattr(
            distributed, "gather", lambda mine, box=sent: box.append(mine) or [mine]
        )
        for judge in judges:
            judge(FakeGenerator())
        monkeypatch.setattr(distributed, "gather", lambda _, box=sent: box)
        assert all(judge(FakeGenerator()) == whole for judge in judges)


def test_the_keeper_holds_the_highest_and_of_equal_ones_the_later(tmp_path: Path) -> None:
    weights = [0]
    keeper = Keeper(tmp_path / "best", write_number(weights))
    saved = []
    for step, judge in ((0, 1.0), (4, 3.0), (8, 2.0), (12, 3.0), (16, -1.0)):
        weights[0] = step
        saved.append(keeper.consider(step, judge))
    assert saved == [True, True, False, True, False]
    assert keeper.best == (12, 3.0)
    assert (tmp_path / "best" / "model" / "weights").read_text() == "12"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best"], "nothing is left beside it"
    keeper.restore(tmp_path / "run")
    assert (tmp_path / "run" / "model" / "weights").read_text() == "12" and not (
        tmp_path / "run" / RECORD
    ).exists()


def test_the_keeper_goes_on_with_what_lies_there(tmp_path: Path) -> None:
    Keeper(tmp_path / "best", write_number([4])).consider(4, 3.0)
    again = Keeper(tmp_path / "best", write_number([6]))
    assert again.best == (4, 3.0) and not again.consider(6, 2.9) and again.consider(8, 3.1)
    assert Keeper(tmp_path / "best", write_number([0])).best == (8, 3.1)


def test_a_save_that_breaks_leaves_the_earlier_best(tmp_path: Path) -> None:
    Keeper(tmp_path / "best", write_number([4])).consider(4, 3.0)

    def broken(directory: Path) -> None:
        (directory / "model").mkdir(parents=True)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        Keeper(tmp_path / "best", broken).consider(8, 9.0)
    keeper = Keeper(tmp_path / "best", write_number([12]))
    assert keeper.best == (4, 3.0) and (tmp_path / "best" / "model" / "weights").read_text() == "4"
    (tmp_path / "best").rename(tmp_path / "best.old")  # killed between the two renames
    assert Keeper(tmp_path / "best", write_number([12])).best == (4, 3.0)
    assert keeper.consider(12, 4.0), "what the broken save left is no obstacle"


class Scripted:
    """A judge that says what it is told, one (judge, proxy) after the other, for three prompts a
    little apart.
    """

    def __init__(self, *said: tuple[float, float]) -> None:
        self.said = list(said)

    def __call__(self, generator: object) -> HeldOutScores:
        judge, proxy = self.said.pop(0)
        return HeldOutScores([judge, judge + 0.1, judge - 0.1], [proxy] * 3, [4] * 3, [False] * 3)


def watching(folder: Path, judge: Any, weights: list[int], **options: Any) -> Watching:
    keeper = Keeper(folder / "best", write_number(weights))
    return Watching(WatchConfig(judge_every=2, **options), 7, judge, keeper)


def follow(watch: Watching, weights: list[int], steps: int = 7) -> list[dict[str, float]]:
    """The loop, with the step as the weights."""
    generator: Any = FakeGenerator()
    out = [watch.begin(generator) if watch.judge is not None else {}]
    for step in range(1, steps + 1):
        weights[0] = step
        out.append(
            watch.after(
                step,
                {
                    "objective/kl": step / 2,
                    "objective/scores": 1.0,
                    "reward/truncated": 0.0,
                    "objective/entropy": 1.0,
                },
                generator,
            )
        )
        if watch.stopped is not None:
            break
    return out


def test_a_run_that_diverges_stops_with_the_weights_from_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = [0]
    script = Scripted((0.0, 0.0), (2.0, 1.0), (1.5, 2.0), (1.0, 3.0))
    watch = watching(tmp_path, script, weights, divergence=Action.stop, divergence_judgements=3)
    with caplog.at_level(logging.WARNING):
        lines = follow(watch, weights)
    assert len(lines) == 7 and watch.stopped == 6 and watch.keeps_best
    assert lines[6]["watch/divergence"] == 1.0 and lines[6]["judge/score"] == pytest.approx(1.0)
    assert [bool(line) for line in lines] == [True, False, True, False, True, False, True]
    assert (
        "step 6, stage.watch.divergence=stop: over the judgements of steps 2, 4, 6" in caplog.text
    )
    watch.keeper.restore(tmp_path)
    assert (tmp_path / "model" / "weights").read_text() == "2" == str(watch.watch.best_step)
    summary = watch.summary()
    assert summary["watch/stopped_step"] == 6.0 and summary["watch/best_step"] == 2.0
    assert (
        summary["judge/score_first"],
        summary["judge/score_best"],
        summary["judge/score"],
    ) == pytest.approx((0.0, 2.0, 1.0))
    assert summary["judge/proxy"] == 3.0
    assert watch.figures() == {
        "judge, first, best, last": "0.000, 2.000 at step 2, 1.000",
        "stopped by the watch": "after step 6; model/ holds the weights of step 2",
    }
    assert (
        watch.plot(tmp_path / "plots") == [tmp_path / "plots" / "frontier.png"]
        and (tmp_path / "plots" / "frontier.png").exists()
    )


def test_a_warning_does_not_stop_and_the_last_weights_are_judged(tmp_path: Path) -> None:
    weights = [0]
    script = Scripted((0.0, 0.0), (2.0, 1.0), (1.5, 2.0), (1.0, 3.0), (0.5, 4.0))
    watch = watching(tmp_path, script, weights, divergence=Action.warn)
    lines = follow(watch, weights)
    assert len(lines) == 8 and watch.stopped is None and not watch.keeps_best
    assert [step for step, line in enumerate(lines) if "judge/score" in line] == [0, 2, 4, 6, 7], (
        "step 7 is the last"
    )
    assert [step for step, line in enumerate(lines) if "watch/divergence" in line] == [6]
    assert watch.keeper.best == (2, 2.0) and "watch/stopped_step" not in watch.summary()


def test_without_a_judge_a_rule_stops_and_nothing_is_kept(tmp_path: Path) -> None:
    weights = [0]
    watch = watching(tmp_path, None, weights, kl=Action.stop, kl_max=1.9)
    assert [bool(line) for line in follow(watch, weights)] == [False] * 4 + [True]
    assert watch.stopped == 4 and not watch.keeps_best and not (tmp_path / "best").exists()
    assert watch.summary() == {"watch/stopped_step": 4.0}
    assert watch.figures() == {"stopped by the watch": "after step 4"}


def test_state_goes_through_json(tmp_path: Path) -> None:
    weights = [0]
    first = watching(
        tmp_path, Scripted((0.0, 0.0), (2.0, 1.0), (1.5, 2.0)), weights, divergence=Action.stop
    )
    follow(first, weights, steps=4)
    second = watching(tmp_path, Scripted((1.0, 3.0)), weights, divergence=Action.stop)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    kl = {
        "objective/kl": 1.0,
        "objective/scores": 1.0,
        "reward/truncated": 0.0,
        "objective/entropy": 1.0,
    }
    generator: Any = FakeGenerator()
    second.after(5, kl, generator)
    assert second.after(6, kl, generator)["watch/divergence"] == 1.0 and second.stopped == 6
    assert (
        second.summary()["judge/score_first"] == pytest.approx(0.0)
        and second.summary()["watch/best_step"] == 2.0
    )


TINY = [
    "model=tiny",
    "model.tiny.vocab_size=300",
    "model.tiny.hidden_size=32",
    "model.tiny.intermediate_size=48",
    "model.tiny.layers=2",
]
TINY += [
    "model.tiny.heads=1",
    "model.tiny.max_positions=64",
    "data.max_prompt_length=32",
    "rollout=hf",
    "rollout.max_response_length=8",
]
EXPLOIT = [
    "stage=grpo",
    *TINY,
    "tracking=none",
    "reward.function=tests.toys:even_tokens",
    "stage.watch.judge_function=tests.toys:mostly_even",
]
EXPLOIT += [
    "stage.kl_coef=0",
    "stage.learning_rate=1e-2",
    "stage.prompts_per_step=4",
    "stage.watch.judge_every=3",
    "stage.watch.judge_prompts=48",
]
EXPLOIT += ["stage.warmup_ratio=0", "stage.watch.length=off", "stage.watch.divergence_judgements=3"]


def run_online(folder: Path, *overrides: str) -> Path:
    """A random tiny policy that learns to write even token ids, watched by a judge that values
    three quarters of them most.
    """
    rows = [
        toys.write_jsonl(
            folder / f"{name}.jsonl",
            [{"prompt": f"{word} {i}"} for i in range(16) for word in words],
        )
        for name, words in WORDS
    ]
    cfg = config.compose(
        [
            *EXPLOIT,
            f"run.dir={folder}",
            f"data.path={rows[0]}",
            f"data.eval_path={rows[1]}",
            *overrides,
        ]
    )
    online_stage.run(RunContext.open(cfg, ()), stage_rows)
    return folder / cfg.run.name / "grpo"


WORDS = (("train", ("alpha", "beta", "gamma")), ("held_out", ("delta", "epsilon", "zeta")))


def lines(run: Path) -> list[dict[str, float]]:
    return [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@pytest.fixture(scope="module")
def exploited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with drawing.on():
        return run_online(
            tmp_path_factory.mktemp("exploited"),
            "stage.steps=60",
            "stage.watch.divergence=stop",
            "stage.save_steps=1",
            "run.keep_checkpoints=0",
        )


def test_a_policy_that_exploits_its_reward_is_stopped(exploited: Path) -> None:
    rows, summary = (
        lines(exploited),
        json.loads((exploited / "summary.json").read_text(encoding="utf-8")),
    )
    stopped, best = (
        int(summary["metrics"]["watch/stopped_step"]),
        int(summary["metrics"]["watch/best_step"]),
    )
    assert [row["step"] for row in rows] == list(range(stopped + 1)) and summary[
        "steps"
    ] == stopped < 60
    judged = {row["step"]: row for row in rows if "judge/score" in row}
    assert list(judged) == list(range(0, stopped + 1, 3))
    assert judged[stopped]["watch/divergence"] == 1.0 and [
        row["step"] for row in rows if "watch/divergence" in row
    ] == [stopped]
    assert 0 < best < stopped
    assert (
        judged[best]["judge/score"]
        == max(row["judge/score"] for row in judged.values())
        > judged[0]["judge/score"] + 0.05
    )
    assert (
        judged[stopped]["judge/score"] < judged[best]["judge/score"]
        and judged[stopped]["judge/proxy"] > judged[best]["judge/proxy"]
    )
    assert all(row["time/judge_s"] > 0 for row in judged.values())
    for name in ("frontier", "watch", "group"):
        assert (exploited / "plots" / f"{name}.png").exists()


def test_the_model_is_what_was_kept_bit_for_bit_and_not_the_last(exploited: Path) -> None:
    metrics = json.loads((exploited / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert (exploited / "model" / "model.safetensors").read_bytes() == (
        exploited / "best" / "model" / "model.safetensors"
    ).read_bytes()
    assert (exploited / "model" / "tokenizer.json").exists()
    model = list(
        AutoModelForCausalLM.from_pretrained(exploited / "model", dtype=torch.float32).parameters()
    )
    best, last = (
        trained(exploited, int(metrics[f"watch/{name}_step"])) for name in ("best", "stopped")
    )
    assert all(torch.equal(p, q) for p, q in zip(model, best, strict=True)), (
        "the weights of the step that the judge valued most"
    )
    assert not any(torch.equal(p, q) for p, q in zip(model, last, strict=True)), (
        "the last weights are others"
    )


def trained(run: Path, step: int) -> list[torch.Tensor]:
    """The policy's parameters after `step` updates, from its checkpoint."""
    state = torch.load(
        run / "checkpoints" / f"step-{step}" / "policy" / "engine.pt", weights_only=True
    )
    return list(state["masters"])


def test_watching_changes_nothing_of_the_training(exploited: Path, tmp_path: Path) -> None:
    alone = run_online(tmp_path, "stage.steps=6", "stage.watch.judge_function=null")
    names = ("objective/scores", "loss/policy", "reward/length_correlation")
    assert not (alone / "best").exists() and "judge/score" not in lines(alone)[-1]
    for ours, theirs in zip(lines(alone), lines(exploited)[1:7], strict=True):
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
        # Two units of a float32's last place, once seen to differ: the order in which a sum is
        # taken depends on where in memory its numbers lie.
        kl = theirs["objective/kl"]
        assert ours["objective/kl"] == pytest.approx(kl, rel=2.4e-7, abs=0)


def test_a_resumed_run_stops_where_the_straight_one_did(exploited: Path, tmp_path: Path) -> None:
    """As a kill in the middle leaves it: the checkpoint of a step after the first judgements, and a
    best that may be later.
    """
    stopped = int(
        json.loads((exploited / "summary.json").read_text(encoding="utf-8"))["metrics"][
            "watch/stopped_step"
        ]
    )
    folder = tmp_path / "again"
    shutil.copytree(exploited.parents[1], folder)
    broken = folder / "default" / "grpo"
    for step in range(stopped - 3, stopped + 1):
        shutil.rmtree(broken / "checkpoints" / f"step-{step}")
    shutil.rmtree(broken / "model")
    (broken / "summary.json").unlink()
    again = run_online(folder, "stage.steps=60", "stage.watch.divergence=stop", "run.resume=true")
    for ours, theirs in zip(lines(again), lines(exploited), strict=True):
        assert {k: v for k, v in ours.items() if "judge/" in k or "watch/" in k} == {
            k: v for k, v in theirs.items() if "judge/" in k or "watch/" in k
        }
    ours, theirs = (
        json.loads((run / "summary.json").read_text(encoding="utf-8"))["metrics"]
        for run in (again, exploited)
    )
    assert {k: v for k, v in ours.items() if "judge/" in k or "watch/" in k} == {
        k: v for k, v in theirs.items() if "judge/" in k or "watch/" in k
    }
    assert (again / "model" / "model.safetensors").read_bytes() == (
        exploited / "model" / "model.safetensors"
    ).read_bytes()
