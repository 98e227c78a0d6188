"""The held-out judge, the kept weights, and a run that is stopped when it exploits its reward."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Action, Config, OnlineStage, WatchConfig
from rlhf import distributed
from rlhf.stages.watching import RECORD, HeldOutJudge, Keeper, Watching, held_out, share_out
from rlhf.types import Prompt, Rollout, Scores
from rlhf.watch import Judgement


def prompt(name: str) -> Prompt:
    return Prompt(name, name, (1,))


class FakeGenerator:
    """Answers prompt "pN" with N tokens; keeps what it was asked."""

    version = 0

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int, int | None, bool]] = []

    def generate(self, prompts: Sequence[Prompt], *, n: int = 1, seed: int | None = None, greedy: bool = False) -> list[Rollout]:
        self.calls.append(([p.id for p in prompts], n, seed, greedy))
        return [Rollout(p, p.id, [7] * int(p.id[1:]), [0.0], "length" if p.id == "p3" else "stop", 0) for p in prompts]


class Lengths:
    """Scores a response by its length, times `sign`."""

    def __init__(self, sign: float) -> None:
        self.sign = sign
        self.scored = 0  # responses: the state that training's statistics are made of

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        self.scored += len(rollouts)
        return Scores([self.sign * len(r.token_ids) for r in rollouts], {})

    def state_dict(self) -> dict[str, object]:
        return {"scored": self.scored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scored = state["scored"]


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
    expected = Judgement([-2.0, -3.0], [2.0, 3.0], [2, 3], [False, True])
    assert judge(generator) == judge(generator) == expected
    assert generator.calls == [(["p2", "p3"], 1, 5, False)] * 2
    assert judge.proxy.state_dict() == {"scored": 0}, "judging leaves training's statistics as they are"


def test_a_judgement_is_the_same_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt(f"p{i}") for i in range(1, 4)]
    whole = HeldOutJudge(prompts, Lengths(-1.0), Lengths(1.0), seed=5)(FakeGenerator())
    for ranks in (2, 5):  # with five, some have nothing to do
        sent: list[Any] = []
        judges = [HeldOutJudge(share_out(prompts, rank, ranks), Lengths(-1.0), Lengths(1.0), seed=5) for rank in range(ranks)]
        monkeypatch.setattr(distributed, "gather", lambda mine, box=sent: box.append(mine) or [mine])
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
    assert (tmp_path / "run" / "model" / "weights").read_text() == "12" and not (tmp_path / "run" / RECORD).exists()


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
    """A judge that says what it is told, one (judge, proxy) after the other, for three prompts a little apart."""

    def __init__(self, *said: tuple[float, float]) -> None:
        self.said = list(said)

    def __call__(self, generator: object) -> Judgement:
        judge, proxy = self.said.pop(0)
        return Judgement([judge, judge + 0.1, judge - 0.1], [proxy] * 3, [4] * 3, [False] * 3)


def watching(folder: Path, judge: Any, weights: list[int], **options: Any) -> Watching:
    cfg = Config(stage=OnlineStage(steps=7, watch=WatchConfig(judge_every=2, **options)))
    return Watching(cfg, judge, Keeper(folder / "best", write_number(weights)))


def follow(watch: Watching, weights: list[int], steps: int = 7) -> list[dict[str, float]]:
    """The loop, with the step as the weights."""
    generator: Any = FakeGenerator()
    out = [watch.begin(generator) if watch.judge is not None else {}]
    for step in range(1, steps + 1):
        weights[0] = step
        out.append(
            watch.after(step, {"objective/kl": step / 2, "objective/scores": 1.0, "reward/truncated": 0.0, "objective/entropy": 1.0}, generator)
        )
        if watch.stopped is not None:
            break
    return out


def test_a_run_that_diverges_stops_with_the_weights_from_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = [0]
    script = Scripted((0.0, 0.0), (2.0, 1.0), (1.5, 2.0), (1.0, 3.0))
    watch = watching(tmp_path, script, weights, divergence=Action.stop, divergence_judgements=3)
    with caplog.at_level(logging.WARNING):
        lines = follow(watch, weights)
    assert len(lines) == 7 and watch.stopped == 6 and watch.keeps_best
    assert lines[6]["watch/divergence"] == 1.0 and lines[6]["judge/score"] == pytest.approx(1.0)
    assert [bool(line) for line in lines] == [True, False, True, False, True, False, True]
    assert "step 6, stage.watch.divergence=stop: over the judgements of steps 2, 4, 6" in caplog.text
    watch.keeper.restore(tmp_path)
    assert (tmp_path / "model" / "weights").read_text() == "2" == str(watch.watch.best_step)
    summary = watch.summary()
    assert summary["watch/stopped_step"] == 6.0 and summary["watch/best_step"] == 2.0
    assert (summary["judge/score_first"], summary["judge/score_best"], summary["judge/score"]) == pytest.approx((0.0, 2.0, 1.0))
    assert summary["judge/proxy"] == 3.0
    assert watch.figures() == {
        "judge, first, best, last": "0.000, 2.000 at step 2, 1.000",
        "stopped by the watch": "after step 6; model/ holds the weights of step 2",
    }
    assert watch.plot(tmp_path / "plots") == [tmp_path / "plots" / "frontier.png"] and (tmp_path / "plots" / "frontier.png").exists()


def test_a_warning_does_not_stop_and_the_last_weights_are_judged(tmp_path: Path) -> None:
    weights = [0]
    script = Scripted((0.0, 0.0), (2.0, 1.0), (1.5, 2.0), (1.0, 3.0), (0.5, 4.0))
    watch = watching(tmp_path, script, weights, divergence=Action.warn)
    lines = follow(watch, weights)
    assert len(lines) == 8 and watch.stopped is None and not watch.keeps_best
    assert [step for step, line in enumerate(lines) if "judge/score" in line] == [0, 2, 4, 6, 7], "step 7 is the last"
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
    first = watching(tmp_path, Scripted((0.0, 0.0), (2.0, 1.0), (1.5, 2.0)), weights, divergence=Action.stop)
    follow(first, weights, steps=4)
    second = watching(tmp_path, Scripted((1.0, 3.0)), weights, divergence=Action.stop)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    kl = {"objective/kl": 1.0, "objective/scores": 1.0, "reward/truncated": 0.0, "objective/entropy": 1.0}
    generator: Any = FakeGenerator()
    second.after(5, kl, generator)
    assert second.after(6, kl, generator)["watch/divergence"] == 1.0 and second.stopped == 6
    assert second.summary()["judge/score_first"] == pytest.approx(0.0) and second.summary()["watch/best_step"] == 2.0


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
