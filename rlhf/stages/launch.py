"""What ``launch=local|torchrun|slurm|ray`` does with a stage: it plans which process runs where,
and starts them, or with run.dry_run=true prints the plan.

This process starts others and imports no torch; each of the others runs ``python -m rlhf`` with the
same options and ``launch.kind=none``.
"""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from conf.model import EngineConfig, RolloutConfig
from conf.run import LaunchConfig, LaunchKind, RunConfig
from conf.stages import ChainStage, DoctorStage, OnlineStage, SearchStage, TrainStage
from rlhf.launch import build, commands, local, machine, plan, ray, slurm, torchrun
from rlhf.launch.build import Meeting, Setup
from rlhf.launch.plan import Plan
from rlhf.run import console
from rlhf.types import UserError

_LOCALHOST = "127.0.0.1"
# Job scripts and logs of servers, in the directory that the stages of a project share.
_FOLDER = "launch"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A command line that is to be launched, and what of its configuration matters for that."""

    launch: LaunchConfig
    engine: EngineConfig
    rollout: RolloutConfig
    run: RunConfig
    stage: str
    argv: Sequence[str]

    @property
    def folder(self) -> Path:
        """``<run.dir>/<run.name>``, absolute: other processes may run elsewhere."""
        return (Path(self.run.dir).expanduser() / self.run.name).absolute()

    @property
    def python(self) -> str:
        return self.launch.python or sys.executable


def applies(stage: Any, kind: LaunchKind) -> bool:
    """Whether a stage is launched by `kind`. Stages of one process run in this one, but a SLURM job
    can have any. A chain launches each of its stages, a search those of its trials.
    """
    if kind is LaunchKind.none or isinstance(stage, (ChainStage, DoctorStage, SearchStage)):
        return False
    return isinstance(stage, TrainStage) or kind is LaunchKind.slurm


def check(launch: LaunchConfig, stage: Any) -> None:
    """Raises UserError where the launch can't be what was meant."""
    kind = launch.kind
    if kind is not LaunchKind.none and "RANK" in os.environ:
        raise UserError(
            f"launch={kind.value}, but another launcher (torchrun?) has started this process as "
            f"rank {os.environ['RANK']}: each rank would start ranks of its own. Set launch=none, "
            "or start it as python -m rlhf."
        )
    if isinstance(stage, ChainStage) and kind is LaunchKind.slurm and not launch.slurm.wait:
        raise UserError(
            "launch.slurm.wait=false with stage=chain: a stage would be submitted before the one "
            "that it builds on has ended. Set launch.slurm.wait=true, or submit stage by stage."
        )
    if isinstance(stage, SearchStage) and kind is LaunchKind.slurm and not launch.slurm.wait:
        raise UserError(
            "launch.slurm.wait=false with stage=search: a trial would seem to end when it is "
            "submitted. Set launch.slurm.wait=true."
        )


def start(
    launch: LaunchConfig,
    engine: EngineConfig,
    rollout: RolloutConfig,
    run: RunConfig,
    stage: Any,
    argv: Sequence[str],
) -> int:
    """Launch the stage and wait for it, where the launcher can; with run.dry_run print who would
    run where. Returns the number of ranks.

    Raises UserError for what doesn't fit, SystemExit with another exit code than 0.
    """
    commands.check_no_secrets(argv, launch.env)
    if not isinstance(stage, TrainStage):
        launch = dataclasses.replace(launch, nodes=1, ranks_per_node=1, server_nodes=0)
        engine = dataclasses.replace(engine, gpus=None)
    planned = plan.plan(launch, engine, rollout, generates=isinstance(stage, OnlineStage))
    request = Request(
        launch=launch, engine=engine, rollout=rollout, run=run, stage=stage.name, argv=argv
    )
    if run.dry_run:
        show(request, planned)
    else:
        code = _LAUNCHERS[launch.kind](request, planned)
        if code != 0:
            raise SystemExit(code)
    return len(planned.ranks)


def show(request: Request, planned: Plan) -> None:
    """Print which process would run where, and what starts it."""
    console.table(plan.rows(planned, _addresses(request, planned)), title="who runs where")
    if planned.kind is LaunchKind.slurm:
        print(slurm.script(request.launch, planned, _job(request)))
    elif planned.kind is LaunchKind.torchrun:
        print(f"launcher: {shlex.join(_torchrun_words(request, planned))}")


def _addresses(request: Request, planned: Plan) -> dict[str, str]:
    """Where processes listen, as far as ports are given."""
    out = {}
    if request.launch.port:
        out["rank 0"] = f"port {request.launch.port}"
    if request.launch.server_port:
        for server in planned.servers:
            out[server.name] = f"port {request.launch.server_port + server.local}"
    return out


# ---- local ----


def _setup(request: Request, planned: Plan) -> Setup:
    return Setup(
        argv=request.argv,
        run=request.run.name,
        stage=request.stage,
        python=request.python,
        logs=request.folder / _FOLDER,
        working_directory=str(Path.cwd()),
        environment=request.launch.env,
        threads=request.engine.threads,
        token=commands.token() if planned.servers else None,
    )


def _limits(request: Request) -> local.Limits:
    start_s = request.rollout.server.start_limit_s
    return local.Limits(start_s=start_s, grace_s=request.launch.grace_s)


def _run_local(request: Request, planned: Plan) -> int:
    setup = _setup(request, planned)
    ports = machine.Ports()
    servers = []
    try:
        for process in planned.servers:
            wished = request.launch.server_port and request.launch.server_port + process.local
            port = ports.keep("launch.server_port", wished)
            command = build.server_command(setup, process, _LOCALHOST, port)
            servers.append(local.Server(command, f"http://{_LOCALHOST}:{port}"))
        urls = ",".join(server.url for server in servers) or None
        meeting = Meeting(
            address=_LOCALHOST, port=ports.keep("launch.port", request.launch.port), urls=urls
        )
        with TemporaryDirectory(prefix="rlhf-launch-") as failures:
            ranks = [
                build.rank_command(setup, planned, process, meeting, Path(failures))
                for process in planned.ranks
            ]
            return local.run(servers, ranks, _limits(request))
    finally:
        ports.close()


# ---- ray ----


def _run_ray(request: Request, planned: Plan) -> int:
    setup = _setup(request, planned)
    saved = request.folder / request.stage
    return ray.run(request.launch, planned, setup, _limits(request), saved)


# ---- torchrun ----


def _torchrun_words(request: Request, planned: Plan) -> list[str]:
    run_id = re.sub(r"[^\w-]", "-", f"{request.run.name}-{request.stage}")
    arguments = commands.rank_arguments(request.argv, None)
    return torchrun.command(request.launch, planned, run_id, arguments)


def _run_torchrun(request: Request, planned: Plan) -> int:
    words = _torchrun_words(request, planned)
    torchrun.run(planned, words, request.launch.env, request.launch.start)
    return 0


# ---- slurm ----


def _job(request: Request) -> slurm.Job:
    name = re.sub(r"[^\w.-]", "-", f"{request.run.name}-{request.stage}")
    return slurm.Job(
        name=name,
        run=request.run.name,
        argv=request.argv,
        python=request.python,
        folder=Path.cwd(),
        log=request.folder / _FOLDER / f"{request.stage}-%j.log",
        start_limit_s=request.rollout.server.start_limit_s,
    )


def _run_slurm(request: Request, planned: Plan) -> int:
    text = slurm.script(request.launch, planned, _job(request))
    path = request.folder / _FOLDER / f"{request.stage}.sh"
    if request.launch.slurm.script is not None:
        path = Path(request.launch.slurm.script).expanduser().absolute()
    slurm.write(path, text)
    if not request.launch.start:
        print(f"job script: {path}", flush=True)
        return 0
    # sbatch does not make the directory of the job's output
    (request.folder / _FOLDER).mkdir(parents=True, exist_ok=True)
    return slurm.submit(path, request.launch.slurm.wait)


_LAUNCHERS: dict[LaunchKind, Callable[[Request, Plan], int]] = {
    LaunchKind.local: _run_local,
    LaunchKind.torchrun: _run_torchrun,
    LaunchKind.slurm: _run_slurm,
    LaunchKind.ray: _run_ray,
}
