"""Who runs where, the commands that follow from it, and what is refused before anything starts."""

import shlex
import socket
from collections.abc import Sequence

import pytest

from conf.run import LaunchKind
from conf.schema import Config
from conf.stages import ServeRolloutStage
from rlhf.cli import config
from rlhf.launch import commands, machine, ray, ready, torchrun
from rlhf.launch.plan import Plan, plan, rows
from rlhf.stages import launch as stage
from rlhf.types import UserError

PPO = ["stage=ppo", "model.path=m", "reward.path=r", "data.path=d", "engine=zero2"]
SERVER = [*PPO, "rollout=server"]


def planned(*overrides: str) -> Plan:
    return plan_of(config.compose(list(overrides)))


def plan_of(cfg: Config) -> Plan:
    return plan(cfg.launch, cfg.engine, cfg.rollout, generates=True)


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.usefixtures("four_devices")
def test_ranks_take_the_devices_that_servers_leave() -> None:
    plan = planned(*SERVER, "launch=local", "rollout.server.tensor_parallel=2")
    assert [rank.devices for rank in plan.ranks] == ["0,1", "0,1"]
    assert [server.devices for server in plan.servers] == ["2,3"]
    shown = {row["process"]: row["devices"] for row in rows(plan, {})}
    assert shown == {"server 0": "2,3", "rank 0": "0", "rank 1": "1"}


@pytest.mark.usefixtures("four_devices")
def test_devices_may_be_named_and_shared() -> None:
    shared = ["launch.devices='0,1'", "rollout.server.devices=['0,1']"]
    plan = planned(*SERVER, "launch=local", "launch.ranks_per_node=2", *shared)
    assert plan.ranks[0].devices == plan.servers[0].devices == "0,1"
    plan = planned(*SERVER, "launch=local", "rollout.server.devices=['1']")
    assert plan.ranks[0].devices == "0,2,3"
    assert len(plan.ranks) == 3


@pytest.mark.usefixtures("four_devices")
def test_ranks_that_share_rows_are_shown_by_their_groups() -> None:
    sft = ["stage=sft", "model.path=m", "data.path=d", "engine=zero2", "launch=local"]
    plan = planned(*sft, "engine.sequence_parallel=2")
    assert [row["rows"] for row in rows(plan, {})] == 2 * ["of group 0"] + 2 * ["of group 1"]
    assert all("rows" not in row for row in rows(planned(*sft), {}))
    with pytest.raises(UserError, match=r"engine\.sequence_parallel=3: 4 ranks"):
        planned(*sft, "engine.sequence_parallel=3")


@pytest.mark.usefixtures("no_device")
def test_without_devices_there_is_one_rank_and_servers_share_the_cores() -> None:
    plan = planned(*SERVER, "launch=local", "rollout.server.count=2")
    assert len(plan.ranks) == 1
    assert len(plan.servers) == 2
    assert {process.devices for process in plan.processes} == {None}


@pytest.mark.usefixtures("no_device")
def test_ranks_follow_from_cores_gpus_or_their_own_option() -> None:
    core = str(min(machine.os.sched_getaffinity(0)))
    assert len(planned(*PPO, "launch=local", f"launch.cores=['{core}','{core}']").ranks) == 2
    assert len(planned(*PPO, "launch=local", "engine.gpus=3").ranks) == 3
    assert len(planned(*PPO, "launch=slurm", "launch.nodes=2", "engine.gpus=16").ranks) == 16


def test_servers_have_the_last_nodes_or_share_the_first() -> None:
    on_nodes = ["launch=slurm", "launch.nodes=2", "launch.ranks_per_node=4"]
    apart = planned(*SERVER, *on_nodes, "launch.server_nodes=2", "rollout.server.count=4")
    assert [server.node for server in apart.servers] == [2, 2, 3, 3]
    assert [server.local for server in apart.servers] == [0, 1, 0, 1]
    assert [rank.node for rank in apart.ranks] == [0] * 4 + [1] * 4
    assert len(rows(apart, {})) == 12
    shared = planned(*SERVER, *on_nodes, "rollout.server.count=2")
    assert [server.node for server in shared.servers] == [0, 0]


def test_named_servers_and_other_generators_need_none() -> None:
    ranks = ["launch=ray", "launch.ranks_per_node=2"]
    assert planned(*SERVER, *ranks, "rollout.servers=[http://a:1]").servers == []
    assert planned(*PPO, *ranks, "rollout=hf").servers == []
    cfg = config.compose([*SERVER, *ranks])
    assert plan(cfg.launch, cfg.engine, cfg.rollout, generates=False).servers == []


def test_under_torchrun_the_first_rank_starts_its_servers_itself() -> None:
    plan = planned(*SERVER, "launch=torchrun", "launch.ranks_per_node=2")
    assert plan.servers == []


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["launch=slurm"], "launch.ranks_per_node", "engine.gpus"),
        (["launch=local", "launch.ranks_per_node=5"], "launch.ranks_per_node", "5 ranks"),
        (
            ["launch=slurm", "launch.ranks_per_node=2", "launch.server_nodes=1", "rollout=hf"],
            "launch.server_nodes",
            "1",
        ),
        (
            [
                *("launch=slurm", "launch.ranks_per_node=2", "launch.server_nodes=2"),
                "rollout.server.count=3",
            ],
            "rollout.server.count",
            "3",
        ),
        (
            ["launch=slurm", "engine.gpus=4", "launch.ranks_per_node=3"],
            "engine.gpus",
            "4",
        ),
        (["launch=slurm", "engine.gpus=5", "launch.nodes=2"], "engine.gpus", "5"),
        (["launch=local", "engine=torch", "launch.ranks_per_node=2"], "engine=torch", "2"),
        (["launch=local", "launch.cores=['9999']"], "launch.cores", "9999"),
        (["launch=local", "launch.cores=['a']"], "launch.cores", "a"),
        (
            ["launch=local", "launch.devices='0'", "launch.ranks_per_node=2"],
            "launch.devices",
            "'0'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(overrides: list[str], key: str, value: str) -> None:
    with pytest.raises(UserError) as raised:
        planned(*SERVER, *overrides)
    assert key in str(raised.value)
    assert value in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["launch=local", "launch.nodes=2"], "launch.nodes"),
        (["launch=local", "launch.server_nodes=1"], "launch.server_nodes"),
        (["launch=slurm", "launch.cores=['0']"], "launch.cores"),
        (["launch=ray", "launch.devices='0'"], "launch.devices"),
        (["launch=slurm", "launch.slurm.extra=[constraint]"], "launch.slurm.extra"),
        (["launch=local", "launch.ranks_per_node=3", "launch.cores=['0']"], "launch.cores"),
    ],
)
def test_options_of_another_launcher_are_refused(overrides: list[str], key: str) -> None:
    with pytest.raises(UserError) as raised:
        config.compose([*PPO, *overrides])
    assert key in str(raised.value)


def test_a_rank_is_told_all_but_the_launch() -> None:
    given = ["stage=ppo", "launch=slurm", "launch.nodes=2", "+launch.env.A=1", "engine=zero3"]
    told = commands.rank_arguments(given, None)
    assert told == ["stage=ppo", "engine=zero3", "launch.kind=none"]
    told = commands.rank_arguments([*given, "rollout.servers=[]"], "http://a:1,http://b:2")
    assert [word for word in told if word.startswith("rollout.servers")] == [
        "rollout.servers=[http://a:1,http://b:2]"
    ]
    config.compose([*told, *PPO[1:4], "rollout=server"])


def test_a_server_is_told_nothing_of_the_trainers_stage() -> None:
    given = [*SERVER, "stage.steps=3", "run.resume=true", "rollout.server.count=2"]
    told = commands.server_arguments(given, "mine", "1", "0.0.0.0", "8200", "0-3")
    assert told[0] == "stage=serve_rollout"
    assert {"stage.port=8200", "rollout.server.cores=['0-3']", "run.name=mine/server-1"} <= set(
        told
    )
    assert f"rollout.server.token_env={commands.TOKEN_ENV}" in told
    assert "launch.kind=none" in told
    assert not {"stage=ppo", "stage.steps=3", "run.resume=true"} & set(told)
    cfg = config.compose(told)
    stage = cfg.stage_as(ServeRolloutStage)
    assert (stage.host, stage.port, stage.servers_of) == ("0.0.0.0", 8200, "mine")
    assert cfg.rollout.server.cores == ["0-3"] and cfg.rollout.server.count == 1
    assert cfg.model.path == "m" and not cfg.rollout.servers


def test_secrets_are_not_written_into_commands() -> None:
    secret = "hf_" + "b" * 24
    with pytest.raises(UserError) as raised:
        commands.check_no_secrets([f"model.path={secret}"], {})
    assert secret not in str(raised.value)
    with pytest.raises(UserError, match=r"launch\.env\.MY_API_KEY"):
        commands.check_no_secrets([], {"MY_API_KEY": "something"})
    commands.check_no_secrets(["model.path=m"], {"NCCL_DEBUG": "INFO"})


def test_torchruns_command_on_one_and_on_several_nodes() -> None:
    words = torchrun_words("launch.ranks_per_node=2")
    assert words[1:] == [
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        *("-m", "rlhf", "stage=ppo"),
    ]
    several = ["launch.ranks_per_node=4", "launch.nodes=2", "launch.host=head", "launch.port=7"]
    text = shlex.join(torchrun_words(*several))
    assert "--nnodes 2" in text and "--rdzv_endpoint head:7" in text and "--rdzv_id job" in text


def torchrun_words(*overrides: str) -> Sequence[str]:
    cfg = config.compose([*PPO, "launch=torchrun", *overrides])
    return torchrun.command(cfg.launch, plan_of(cfg), "job", ["stage=ppo"])


def test_bundles_of_a_ray_cluster_and_its_devices() -> None:
    cfg = config.compose(
        [
            *(*SERVER, "launch=ray", "launch.ranks_per_node=2", "launch.nodes=1"),
            *("launch.ray.cpus_per_rank=3", "launch.ray.cpus_per_server=5"),
            *("launch.server_nodes=1", "rollout.server.tensor_parallel=4"),
        ]
    )
    plan = plan_of(cfg)
    assert ray.bundles(cfg.launch.ray, plan, gpus=True) == [
        {"CPU": 6.0, "GPU": 2.0},
        {"CPU": 5.0, "GPU": 4.0},
    ]
    assert ray.bundles(cfg.launch.ray, plan, gpus=False) == [{"CPU": 6.0}, {"CPU": 5.0}]
    reserved = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    (server,) = ray.on_reserved_devices(plan, 1, reserved)
    assert server.devices == "4,5,6,7"
    together = plan_of(config.compose([*SERVER, "launch=ray", "launch.ranks_per_node=2"]))
    devices = {
        process.name: process.devices
        for process in ray.on_reserved_devices(together, 0, {"CUDA_VISIBLE_DEVICES": "2,3,5"})
    }
    assert devices == {"server 0": "5", "rank 0": "2,3", "rank 1": "2,3"}


def test_what_is_launched() -> None:
    cfg = config.compose([*PPO])
    chain = config.compose(["stage=chain"]).stage
    assert stage.applies(cfg.stage, LaunchKind.local)
    assert not stage.applies(cfg.stage, LaunchKind.none)
    assert not stage.applies(chain, LaunchKind.local), "it launches its stages"
    evaluation = config.compose(["stage=eval"]).stage
    assert not stage.applies(evaluation, LaunchKind.local)
    assert stage.applies(evaluation, LaunchKind.slurm)
    waits = config.compose(["stage=chain", "launch=slurm", "launch.slurm.wait=true"])
    stage.check(waits.launch, waits.stage)
    waits.launch.slurm.wait = False
    with pytest.raises(UserError, match=r"launch\.slurm\.wait"):
        stage.check(waits.launch, waits.stage)


def test_ports_are_kept_for_who_reuses_the_address() -> None:
    ports = machine.Ports()
    port = ports.keep("launch.port")
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ours.bind(("", port))
        ours.listen()
        with pytest.raises(UserError, match=r"launch\.port"):
            machine.Ports().keep("launch.port", port)
    ports.close()


def test_waiting_for_a_server_that_never_answers_ends(capsys: pytest.CaptureFixture[str]) -> None:
    ports = machine.Ports()
    url = f"http://127.0.0.1:{ports.keep('port')}"
    assert ready.main(["--limit-s", "0.2", url]) == 1
    assert url in capsys.readouterr().err
    ports.close()
    assert ready.wait([url], 60.0, lambda: False) == [url], "nobody waits for what has ended"


@pytest.mark.parametrize(
    ("kind", "shown"),
    [
        ("local", ["this machine"]),
        ("slurm", ["node 1", "#SBATCH hetjob", "port 7000"]),
        ("torchrun", ["torch.distributed.run"]),
        ("ray", ["node 0"]),
    ],
)
def test_a_dry_run_shows_who_runs_where(
    capsys: pytest.CaptureFixture[str], kind: str, shown: list[str]
) -> None:
    on_nodes = ["launch.server_nodes=1", "launch.server_port=7000"] if kind == "slurm" else []
    given = [*SERVER, f"launch={kind}", "launch.ranks_per_node=2", "run.dry_run=true", *on_nodes]
    cfg = config.compose(given)
    ranks = stage.start(cfg.launch, cfg.engine, cfg.rollout, cfg.run, cfg.stage, given)
    assert ranks == 2
    out = capsys.readouterr().out
    processes = ["rank 0", "rank 1", *(["server 0"] if kind != "torchrun" else [])]
    assert [name for name in [*processes, *shown] if name not in out] == []
