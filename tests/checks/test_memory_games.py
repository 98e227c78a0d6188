"""What games in processes of their own take, in the memory plan and by measurement."""

from collections.abc import Mapping

import psutil
import pytest

from conf.reward import EnvironmentConfig, EnvironmentKind
from rlhf.checks.memory.generator import Asked, games_memory
from rlhf.checks.memory.moments import Machine, Phase, Plan
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import Shapes, read_shape
from rlhf.checks.memory.states import GIB, Bytes
from rlhf.cli import config
from rlhf.environments import gymnasium

CPU = Machine(ranks=1, cuda=False, device_gib=8.0, host_gib=8.0)
EPISODES = 24


def asked(responses: int) -> Asked:
    return Asked(half=False, prompt=16, response=16, responses=responses, at_once=256, whole=True)


def planned(*overrides: str) -> Plan:
    cfg = config.compose(
        [
            "stage=grpo",
            "model=tiny",
            "rollout=hf",
            "stage.prompts_per_step=4",
            "stage.samples_per_prompt=6",
            *overrides,
        ]
    )
    return plan(cfg, Shapes(read_shape(cfg.model)), CPU)


def games_at(found: Plan) -> Mapping[tuple[Phase, str], Bytes]:
    return {
        (moment.phase, moment.name): moment.roles["games"]
        for moment in found.moments
        if "games" in moment.roles
    }


def test_games_are_there_while_responses_are_written() -> None:
    found = games_at(planned("environment=gymnasium", "environment.game=FrozenLake-v1"))
    assert list(found) == [(Phase.rollout, "responses")]
    assert found[Phase.rollout, "responses"].device == pytest.approx(0.46 * GIB)


def test_games_stay_while_the_trainer_works_where_the_next_step_is_played_ahead() -> None:
    options = ["environment=gymnasium", "environment.game=FrozenLake-v1", "stage.ahead=1"]
    phases = {phase for phase, _ in games_at(planned(*options))}
    assert {Phase.rollout, Phase.score, Phase.update, Phase.sync} <= phases


def test_an_environment_in_the_run_s_own_process_takes_nothing() -> None:
    assert not games_at(planned("environment=tools", "environment.tools=[calculator]"))


def test_ranks_share_the_episodes_and_a_gpu_s_host_holds_them() -> None:
    machine = Machine(ranks=4, cuda=True, device_gib=80.0, host_gib=64.0)
    found = games_memory(EnvironmentKind.gymnasium, asked(4 * EPISODES), machine)["games"]
    alone = games_memory(EnvironmentKind.gymnasium, asked(EPISODES), CPU)["games"]
    assert (found.device, found.host) == (0.0, alone.device)


def test_the_processes_of_a_game_take_what_is_planned() -> None:
    pytest.importorskip("gymnasium")
    limits = EnvironmentConfig(kind=EnvironmentKind.gymnasium, game="FrozenLake-v1")
    make = gymnasium.make(limits)
    here = psutil.Process()
    before = {child.pid for child in here.children(recursive=True)}
    episodes = [make() for _ in range(EPISODES)]
    try:
        for seed, episode in enumerate(episodes):
            episode.reset({}, seed)
        children = [c for c in here.children(recursive=True) if c.pid not in before]
        taken = sum(child.memory_full_info().pss for child in children)
    finally:
        for episode in episodes:
            episode.close()
    expected = games_memory(EnvironmentKind.gymnasium, asked(EPISODES), CPU)["games"].device
    assert len(children) >= EPISODES
    assert 0.5 * expected < taken < 1.2 * expected
