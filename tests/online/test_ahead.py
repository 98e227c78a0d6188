"""Responses that are written while the policy updates (stage.ahead): no token is staler than it may
be, prompts are the same as without, and nothing is trained twice or lost.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.choices import Advantage, PolicyLoss, RolloutBackend, Selection
from conf.model import RolloutConfig
from conf.online import STALE_CAP, OnlineStage
from conf.schedule import BatchGrowthConfig
from policy.losses import importance_weights
from rlhf.cli import config
from rlhf.online import loop as online
from rlhf.online.ahead import Ahead, Place, Writer, make_writer
from rlhf.online.collect import train_batch
from rlhf.run.context import RunContext
from rlhf.stages import online as online_stage
from rlhf.stages import rows as stage_rows
from rlhf.types import Prompt, Rollout, UserError
from rollout.hf import HFGenerator
from tests import toys
from tests.online.test_nonfinite import BAD_CALLS, CALLS
from tests.online.test_online import TINY, metrics
from tests.stages.test_resume import timeless

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [Prompt(str(i), str(i), (1,)) for i in range(40)]


class Slow:
    """A generator that takes its time, and says when it is not left alone meanwhile."""

    def __init__(self, seconds: float = 0.01, fails_at: int | None = None) -> None:
        self.version, self.seconds, self.fails_at = 0, seconds, fails_at
        self.calls: list[tuple[list[str], int | None, bool]] = []
        self.ended = threading.Event()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        self.calls.append(([prompt.id for prompt in prompts], seed, greedy))
        version = self.version
        self.ended.clear()
        time.sleep(self.seconds)
        if len(self.calls) == self.fails_at:
            raise ConnectionError("the line is dead")
        assert self.version == version, "weights changed while it wrote"
        self.ended.set()
        return [Rollout(p, "", [7], [0.0], "stop", version) for p in prompts for _ in range(n)]


def stage_of(**options: Any) -> OnlineStage:
    return OnlineStage(**{"steps": 6, "prompts_per_step": 4, "kl_coef": 0.0, **options})


def run_steps(
    writer: Writer, generator: Slow, stage: OnlineStage, further: Sequence[int] = ()
) -> list[list[Rollout]]:
    """The responses of each step, whose update takes as long as a draw. Steps in `further` take a
    second draw.
    """
    steps, draws, prompts = [], 0, 0
    assert stage.steps is not None
    for step in range(stage.steps):
        size = stage.step_size(step)
        writer.begin()
        taken: list[Rollout] = []
        for _ in range(2 if step in further else 1):
            taken += writer.take(Place(draws, prompts, size, step))
            draws, prompts = draws + 1, prompts + size
        steps.append(taken)
        time.sleep(generator.seconds)
        writer.pause()
        generator.version = step + 1
        writer.resume()
    return steps


def until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def described(steps: Sequence[Sequence[Rollout]]) -> list[list[str]]:
    return [[rollout.prompt.id for rollout in step] for step in steps]


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]


@pytest.mark.parametrize("ahead", [1, 2, 3])
@pytest.mark.parametrize("further", [(), (1, 4)], ids=["all", "unequal"])
def test_no_token_is_staler_and_draws_are_the_same(ahead: int, further: tuple[int, ...]) -> None:
    stage, generator, plain = stage_of(ahead=ahead), Slow(), Slow(0.0)
    writer = Ahead(generator, PROMPTS, stage, 3)  # type: ignore[arg-type]
    steps = run_steps(writer, generator, stage, further)
    writer.close()
    turns = stage_of()
    expected = run_steps(Writer(plain, PROMPTS, turns, 3), plain, turns, further)  # type: ignore[arg-type]
    assert described(steps) == described(expected)
    assert generator.calls == plain.calls, "the same prompts with the same seeds, and no others"
    behind = [{step - r.version for r in taken} for step, taken in enumerate(steps)]
    assert all(0 <= versions <= ahead for each in behind for versions in each)
    if ahead == 1 and not further:
        assert behind == [{0}, {1}, {1}, {1}, {1}, {1}]
    assert max(max(each) for each in behind) >= 1, "nothing was written ahead"


def test_a_step_that_grows_draws_what_it_would_without() -> None:
    """A second draw of step 2 has its size; what was written ahead for step 3 had another."""
    growth = BatchGrowthConfig(steps=[3])
    stage, generator, plain = stage_of(ahead=2, batch_growth=growth), Slow(), Slow(0.0)
    writer = Ahead(generator, PROMPTS, stage, 3)  # type: ignore[arg-type]
    steps = run_steps(writer, generator, stage, further=[2])
    writer.close()
    turns = stage_of(batch_growth=growth)
    expected = run_steps(Writer(plain, PROMPTS, turns, 3), plain, turns, further=[2])  # type: ignore[arg-type]
    assert [len(step) for step in steps] == [4, 4, 8, 8, 8, 8]
    assert described(steps) == described(expected)
    assert all(0 <= n - r.version <= 2 for n, step in enumerate(steps) for r in step)


def test_the_next_draw_is_written_while_the_caller_has_other_work() -> None:
    stage, generator = stage_of(ahead=1), Slow(0.05)
    writer = Ahead(generator, PROMPTS, stage, 0)  # type: ignore[arg-type]
    writer.begin()
    writer.take(Place(0, 0, 4, 0))
    until(lambda: len(generator.calls) == 2)  # the second draw began by itself
    writer.pause()
    assert generator.ended.is_set(), "pause waits for what is being written"
    writer.close()
    assert len(generator.calls) == 2
    idle = writer.idle()
    assert idle["ahead/trainer_idle_s"] >= 0.05
    assert writer.spent() >= 0.05


def test_nothing_is_written_between_pause_and_resume() -> None:
    stage, generator = stage_of(ahead=3), Slow(0.02)
    writer = Ahead(generator, PROMPTS, stage, 0)  # type: ignore[arg-type]
    writer.take(Place(0, 0, 4, 0))
    writer.pause()
    written = len(generator.calls)
    time.sleep(0.1)
    assert len(generator.calls) == written < 4
    writer.resume()
    for number in (1, 2, 3):
        writer.take(Place(number, 4 * number, 4, 1))
    assert len(generator.calls) >= 4
    writer.close()


def test_what_is_forgotten_is_written_anew() -> None:
    stage, generator = stage_of(ahead=2), Slow()
    writer = Ahead(generator, PROMPTS, stage, 0)  # type: ignore[arg-type]
    writer.take(Place(0, 0, 4, 0))
    until(lambda: len(generator.calls) >= 2)
    writer.forget()
    generator.version = 7
    taken = writer.take(Place(1, 4, 4, 1))
    assert {rollout.version for rollout in taken} == {7}
    writer.close()


@pytest.mark.parametrize("fails_at", [1, 3])
def test_the_first_cause_ends_the_run(fails_at: int) -> None:
    stage, generator = stage_of(ahead=1), Slow(fails_at=fails_at)
    writer = Ahead(generator, PROMPTS, stage, 0)  # type: ignore[arg-type]
    with pytest.raises(ConnectionError, match="the line is dead"):
        run_steps(writer, generator, stage)
    assert len(generator.calls) == fails_at, "nothing more is written"
    writer.close()


def test_greedy_responses_are_written_with_their_draws() -> None:
    stage = stage_of(ahead=1, advantage=Advantage.greedy, samples_per_prompt=2)
    generator = Slow()
    writer = Ahead(generator, PROMPTS, stage, 0)  # type: ignore[arg-type]
    for number in (0, 1):
        writer.begin()
        taken = writer.take(Place(number, 4 * number, 4, number))
        prompts = [rollout.prompt for rollout in taken[::2]]
        assert [rollout.prompt for rollout in writer.greedy(prompts)] == prompts
    writer.close()
    assert [greedy for _, _, greedy in generator.calls][:4] == [False, True] * 2


# ---- what corrects for it ----


def test_who_scores_hears_of_each_response(tmp_path: Path) -> None:
    """The loop tells the scorer's `begin` to a generator that can tell."""
    told: list[Rollout] = []
    generator = Slow()
    make_writer(generator, PROMPTS, stage_of(), 0, told.append)
    assert not hasattr(generator, "arrived"), "this one tells of nothing"
    generator.arrived = print
    make_writer(generator, PROMPTS, stage_of(), 0, told.append)
    response = Rollout(PROMPTS[0], "", [7], [0.0], "stop", 0)
    generator.arrived(response)
    assert told == [response]


def test_stale_tokens_are_corrected_unless_the_cap_says_otherwise() -> None:
    assert stage_of().correction_cap is None
    assert stage_of(ahead=1).correction_cap == STALE_CAP == 2.0
    assert stage_of(ahead=1, importance_cap=5.0).correction_cap == 5.0
    assert stage_of(importance_cap=5.0).correction_cap == 5.0
    pairs = stage_of(
        ahead=1,
        policy_loss=PolicyLoss.dpo,
        selection=Selection.best_worst,
        samples_per_prompt=2,
        advantage=Advantage.none,
    )
    assert pairs.correction_cap is None


def test_staleness_is_known_token_by_token() -> None:
    from rlhf.online.collect import Collected
    from rlhf.types import Scores

    whole = Rollout(PROMPTS[0], "", [7, 7], [0.0, 0.0], "stop", 3)
    mixed = Rollout(PROMPTS[1], "", [7, 7, 7], [0.0] * 3, "stop", 5, [3, 4, 5])
    collected = Collected(
        rollouts=[whole, mixed],
        scores=Scores([0.0, 0.0], {}),
        finals=torch.zeros(2),
        groups=[0, 1],
        rows=[0, 1],
        pairs=[],
        baselines=None,
        draws=1,
        clipped=0.0,
    )
    batch = train_batch(collected, 0, mask_truncated=False, version=5)
    assert batch.staleness is not None
    assert batch.staleness.tolist() == [[2.0, 2.0, 0.0], [2.0, 1.0, 0.0]]
    assert train_batch(collected, 0, mask_truncated=False).staleness is None


# ---- whole runs ----

SHORT = [
    "stage.steps=4",
    "stage.prompts_per_step=4",
    "rollout.max_response_length=3",
    "stage.save_steps=2",
    "stage.learning_rate=3e-3",
    "stage.critic_learning_rate=3e-3",
    "stage.samples_kept=4",
    "run.keep_checkpoints=0",
]
STILL = "stage.learning_rate=1e-30"  # moves no weight


def options(folder: Path, name: str, *overrides: str) -> list[str]:
    rows = toys.write_jsonl(folder / "prompts.jsonl", toys.prompt_rows())
    held_out = toys.write_jsonl(
        folder / "held_out.jsonl", [{"prompt": "omega 1"}, {"prompt": "omega 2"}]
    )
    preset = [e for e in overrides if e.startswith("stage=")] or ["stage=ppo"]
    others = [e for e in overrides if e not in preset]
    given = [*preset, *TINY, "rollout=hf", "tracking=none", f"run.dir={folder}"]
    given += [f"run.name={name}", f"data.path={rows}", f"data.eval_path={held_out}"]
    given += ["stage.critic_init=policy", "reward.function=tests.toys:even_tokens"]
    return [*given, *SHORT, *others]


def compose(folder: Path, name: str, *overrides: str) -> Any:
    return config.compose(options(folder, name, *overrides))


def run(folder: Path, name: str, *overrides: str) -> Path:
    ctx = RunContext.open(compose(folder, name, *overrides), ())
    online_stage.run(ctx, stage_rows)
    return ctx.dir


def samples(folder: Path) -> dict[int, list[str]]:
    """The prompts of each step."""
    found: dict[int, list[str]] = {}
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.setdefault(row["step"], []).append(row["prompt"])
    return found


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[str]]:
    """The generator is used by one thread at a time. Returns the weights that wrote, by the version
    that responses say.
    """
    wrote: dict[int, set[str]] = {}
    using = threading.Lock()

    def alone(name: str) -> None:
        real = getattr(HFGenerator, name)

        def method(self: HFGenerator, *args: Any, **kwargs: Any) -> Any:
            assert using.acquire(blocking=False), f"{name} beside another call"
            try:
                result = real(self, *args, **kwargs)
                if name == "generate":
                    weights = json.dumps(self.checksums(), sort_keys=True)
                    for version in {rollout.version for rollout in result}:
                        wrote.setdefault(version, set()).add(weights)
                return result
            finally:
                using.release()

        monkeypatch.setattr(HFGenerator, name, method)

    for name in ("generate", "sync", "logprobs"):
        alone(name)
    return wrote


@pytest.mark.parametrize("ahead", [1, 2])
def test_versions_of_a_run(tmp_path: Path, ahead: int, one_at_a_time: dict[int, set[str]]) -> None:
    rows = metrics(run(tmp_path, "run", f"stage.ahead={ahead}"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["ahead/staleness_max"] == 0 and rows[0]["rollout/logprob_gap"] < 1e-4
    for row in rows[1:]:
        assert 0 < row["ahead/staleness"] <= row["ahead/staleness_max"] <= ahead
        assert row["ahead/moved"] > 1e-4, "the policy moved since it wrote"
        assert row["ahead/weight_max"] > 1.0001 and 0 < row["ahead/ess"] < 1
        assert 0 <= row["ahead/weight_cut"] <= 1
        assert row["policy/importance_weight"] == pytest.approx(row["ahead/weight"])
        fresh = row["ahead/fresh_tokens"]
        assert ("rollout/logprob_gap" in row) == (fresh > 0)
    if ahead == 1:
        assert {row["ahead/staleness"] for row in rows[1:]} == {1}
    # what a response says of its weights is true: one set of weights for each version
    assert all(len(weights) == 1 for weights in one_at_a_time.values())
    assert len(set().union(*one_at_a_time.values())) == len(one_at_a_time) >= 4 - ahead
    assert all("ahead/" not in key for row in metrics(run(tmp_path, "turns")) for key in row)


ALGORITHMS = {
    "ppo": ["stage.watch.judge_function=tests.toys:mostly_even", "stage.watch.judge_every=1"],
    "remax": ["stage=remax", "stage.samples_per_prompt=2"],
    "dapo": ["stage=dapo", "stage.minibatches=2", "stage.overlong_buffer=1"],
    "online_dpo": ["stage=online_dpo"],
    "growing": ["stage=grpo", "stage.batch_growth.steps=[2]", "stage.minibatches=1"],
}
EACH = "stage.samples_per_prompt=2"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_policy_that_does_not_move_sees_no_difference(tmp_path: Path, algorithm: str) -> None:
    """Draws, scores, baselines and judgements are those of ahead=0."""
    options = [EACH, *ALGORITHMS[algorithm], STILL]
    options += ["stage.watch.judge_prompts=2"] if algorithm == "ppo" else []
    turns, ahead = (
        run(tmp_path, "turns", *options),
        run(tmp_path, "ahead", *options, "stage.ahead=2"),
    )
    assert samples(turns) == samples(ahead)
    for ours, theirs in zip(metrics(ahead), metrics(turns), strict=True):
        for name, value in timeless(theirs).items():
            if name.startswith(("rollout/logprob_gap", "rollout/probe")):
                continue
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_killed_run_draws_what_it_would_have(tmp_path: Path) -> None:
    """Killed while responses are written, a run draws them again: each prompt trains once."""
    straight = run(tmp_path, "straight", "stage.ahead=2")
    ctx = RunContext.open(compose(tmp_path, "broken", "stage.ahead=2"), ())
    log = ctx.tracker.log

    def killed(step: int, figures: Any) -> None:
        if step == 4:
            raise KeyboardInterrupt
        log(step, figures)

    ctx.tracker.log = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        online_stage.run(ctx, stage_rows)
    assert not [thread for thread in threading.enumerate() if thread.name == "rollouts"]
    broken = run(tmp_path, "broken", "stage.ahead=2", "run.resume=true")
    assert samples(broken) == samples(straight)
    rows = metrics(broken)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[2]["ahead/staleness_max"] == 0, "what was in flight is written anew"


@pytest.mark.full  # importing vLLM takes longer than all other tests of this file
def test_an_engine_in_this_process_writes_in_the_thread(tmp_path: Path) -> None:
    engine = ["rollout=vllm", "rollout.kv_cache_gib=0.2", "rollout.max_num_seqs=16"]
    still = run(tmp_path, "still", *engine, STILL, EACH, "stage=grpo", "stage.ahead=1")
    turns = run(tmp_path, "turns", *engine, STILL, EACH, "stage=grpo")
    assert samples(still) == samples(turns)
    scores = [[row["objective/scores"] for row in metrics(each)] for each in (still, turns)]
    assert scores[0] == scores[1]
    moved = metrics(run(tmp_path, "moved", *engine, EACH, "stage=grpo", "stage.ahead=1"))
    assert [row["ahead/staleness"] for row in moved] == [0, 1, 1, 1]
    assert all(row["rollout/probe_gap"] < 1e-4 for row in moved)
    assert moved[-1]["ahead/moved"] > 1e-4


@pytest.mark.full  # a process of its own, which imports vLLM
def test_the_thread_writes_with_the_threads_that_torch_was_given(tmp_path: Path) -> None:
    """OpenMP gives a new thread as many as the machine has, and vLLM refuses to change."""
    engine = ["rollout=vllm", "rollout.kv_cache_gib=0.2", "rollout.max_num_seqs=16"]
    given = options(tmp_path, "one", *engine, "stage=grpo", "stage.ahead=1", "engine.threads=1")
    given = [option for option in given if "reward.function" not in option]
    given += ["reward.terms.short.kind=length", "reward.terms.short.high=2"]
    done = subprocess.run(
        [sys.executable, "-m", "rlhf", *given],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(metrics(tmp_path / "one" / "grpo")) == 4


@pytest.fixture
def bad_reward() -> Iterator[None]:
    """The third step's scores are no numbers."""
    CALLS.clear()
    BAD_CALLS.clear()
    BAD_CALLS.add(3)
    yield
    CALLS.clear()
    BAD_CALLS.clear()


@pytest.mark.usefixtures("bad_reward")
@pytest.mark.parametrize("remedy", ["skip", "rewind"])
def test_a_bad_step_costs_its_prompts_only(tmp_path: Path, remedy: str) -> None:
    options = ["reward.function=tests.online.test_nonfinite:sometimes"]
    options.append(f"stage.on_nonfinite={remedy}")
    turns = run(tmp_path, "turns", *options)
    CALLS.clear()
    ahead = run(tmp_path, "ahead", *options, "stage.ahead=2")
    assert samples(ahead) == samples(turns)
    rows = [row for row in metrics(ahead) if "ahead/staleness_max" in row]
    assert all(row["ahead/staleness_max"] <= 2 for row in rows)
    assert len(rows) == (3 if remedy == "skip" else 4)
    if remedy == "rewind":
        assert rows[2]["ahead/staleness_max"] == 0, "written by weights that were given up"


def test_a_generator_that_fails_ahead_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = HFGenerator.generate, []

    def fails(self: HFGenerator, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "rollouts":
            calls.append(kwargs["seed"])
            if len(calls) == 3:
                raise ConnectionError("the line is dead")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(HFGenerator, "generate", fails)
    with pytest.raises(ConnectionError, match="the line is dead"):
        run(tmp_path, "run", "stage.ahead=1")


def test_the_gap_of_stale_tokens_may_be_any_but_infinite() -> None:
    bounds = online.Bounds(1e-4, 1e-4, share=0.0)
    stale = {"ahead/moved": 3.0, "ahead/fresh_tokens": 0.0, "rollout/trained_tokens": 9.0}
    assert online.gap_fault(stale, bounds, exact=True) is None
    assert online.gap_fault(stale | {"ahead/moved": float("inf")}, bounds, exact=True)
    fresh = stale | {
        "ahead/fresh_tokens": 2.0,
        "rollout/logprob_gap": 1.0,
        "rollout/logprob_gap_mean": 0.5,
        "rollout/logprob_gap_above": 0.5,
    }
    fault = online.gap_fault(fresh, bounds, exact=True)
    assert fault is not None and "1 of 2 tokens" in fault
    assert online.gap_fault(fresh, bounds, exact=False) is None


def test_a_weight_of_a_stale_token_by_hand() -> None:
    """Half as likely now: 1/2. Three times as likely: cut to the cap."""
    old, sampled = torch.tensor([[0.5, 0.9]]).log(), torch.tensor([[1.0, 0.3]]).log()
    weights = importance_weights(old, sampled, STALE_CAP)
    assert weights.tolist()[0] == pytest.approx([0.5, 2.0])


def test_weights_change_in_flight_only_where_something_is_in_flight() -> None:
    rollout = RolloutConfig(backend=RolloutBackend.server, in_flight=True)
    online_stage.check_ahead(stage_of(ahead=1), rollout)
    with pytest.raises(UserError, match=r"rollout\.in_flight=true.*stage\.ahead=0"):
        online_stage.check_ahead(stage_of(), rollout)
    with pytest.raises(ValueError, match=r"rollout\.in_flight.*rollout=hf"):
        RolloutConfig(backend=RolloutBackend.hf, in_flight=True)


def test_an_engine_that_writes_ahead_does_not_sleep() -> None:
    rollout = RolloutConfig(backend=RolloutBackend.vllm, sleep=True)
    online_stage.check_ahead(stage_of(), rollout)
    with pytest.raises(UserError, match=r"rollout\.sleep=true.*stage\.ahead=2"):
        online_stage.check_ahead(stage_of(ahead=2), rollout)
