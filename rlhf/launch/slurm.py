"""launch=slurm: the job script of a run, and its way to sbatch.

A job has one component, or with launch.server_nodes two (a heterogeneous job): the first has the
ranks, the second the rollout servers. Ranks are tasks of one srun, with torchrun's variables. Not
tried on a cluster: the script has been run by stand-ins of sbatch and srun only.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.run import LaunchConfig
from rlhf.launch.commands import TOKEN_ENV, rank_arguments, server_arguments
from rlhf.launch.plan import Plan
from rlhf.types import UserError

# Shell words that the script leaves to the node that runs them.
_PORT_OF_SERVER = "RLHF_SERVER_PORT"
_URLS = "RLHF_SERVER_URLS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the script runs."""

    name: str
    run: str  # run.name
    argv: Sequence[str]  # the command line of the launch
    python: str  # the interpreter of all its processes
    folder: Path  # where it runs, and where its output goes
    log: Path
    start_limit_s: float  # of a server


def script(launch: LaunchConfig, plan: Plan, job: Job) -> str:
    """The text of the job script."""
    apart = plan.server_nodes > 0
    parts = ["#!/usr/bin/env bash", *_header(launch, plan, job)]
    if apart:
        parts += ["#SBATCH hetjob", *_component_of_servers(launch, plan)]
    parts += ["", "set -euo pipefail", f"cd {shlex.quote(str(job.folder))}"]
    for name, value in launch.env.items():
        parts.append(f"export {name}={shlex.quote(value)}")
    parts += launch.slurm.setup
    parts += _meeting_point(launch, apart)
    if plan.servers:
        parts += _start_servers(launch, plan, job)
    parts += _start_ranks(launch, plan, job)
    return "\n".join(parts) + "\n"


# ---- what sbatch reads ----


def _header(launch: LaunchConfig, plan: Plan, job: Job) -> list[str]:
    slurm = launch.slurm
    options = [
        f"--job-name={job.name}",
        f"--output={shlex.quote(str(job.log))}",
        # to this script alone, which passes it on to the ranks: servers have to outlive them
        f"--signal=B:TERM@{slurm.signal_s}",
    ]
    shared = 0 if plan.server_nodes else len(plan.servers)
    cpus = max(slurm.cpus_per_rank, slurm.cpus_per_server if shared else 0)
    options += _component(launch, plan.nodes, plan.ranks_per_node + shared, cpus)
    if slurm.gpus:
        devices = plan.ranks_per_node + shared * plan.devices_per_server
        options.append(f"--gpus-per-node={devices}")
    return [f"#SBATCH {option}" for option in options]


def _component_of_servers(launch: LaunchConfig, plan: Plan) -> list[str]:
    per_node = plan.servers_per_node
    options = _component(launch, plan.server_nodes, per_node, launch.slurm.cpus_per_server)
    if launch.slurm.gpus:
        options.append(f"--gpus-per-node={per_node * plan.devices_per_server}")
    return [f"#SBATCH {option}" for option in options]


def _component(launch: LaunchConfig, nodes: int, tasks: int, cpus: int) -> list[str]:
    slurm = launch.slurm
    out = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}"]
    named = {
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
    }
    out += [f"--{name}={value}" for name, value in named.items() if value is not None]
    return out + slurm.extra


# ---- what the job runs ----


def _meeting_point(launch: LaunchConfig, apart: bool) -> list[str]:
    """The nodes, and the ports that follow from the job's number unless they are given."""
    ranks = "SLURM_JOB_NODELIST_HET_GROUP_0" if apart else "SLURM_JOB_NODELIST"
    servers = "SLURM_JOB_NODELIST_HET_GROUP_1" if apart else "SLURM_JOB_NODELIST"
    port = str(launch.port or "$((10000 + SLURM_JOB_ID % 10000))")
    server_port = str(launch.server_port or "$((20000 + SLURM_JOB_ID % 10000))")
    return [
        "",
        f'rank_nodes=($(scontrol show hostnames "${ranks}"))',
        f'server_nodes=($(scontrol show hostnames "${servers}"))',
        "export MASTER_ADDR=${rank_nodes[0]}",
        f"export MASTER_PORT={port}",
        f"export {_PORT_OF_SERVER}={server_port}",
    ]


def _words(python: str, arguments: Sequence[str]) -> str:
    return shlex.join([python, "-m", "rlhf", *arguments])


def _task(name: str, lines: Sequence[str]) -> list[str]:
    """A shell variable `name` with what each task of an srun runs."""
    return ["", f"{name}=$(cat <<'TASK'", *lines, "TASK", ")"]


def _take_devices(first: str, count: int) -> list[str]:
    """Keep `count` of the devices that SLURM gave to the node, from number `first` on."""
    return [
        'IFS=, read -ra devices <<< "$CUDA_VISIBLE_DEVICES"',
        f'export CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${{devices[*]:{first}:{count}}}")',
    ]


def _start_servers(launch: LaunchConfig, plan: Plan, job: Job) -> list[str]:
    """Start the servers, and wait until they answer."""
    port = "RLHF_THIS_PORT"
    number = "SLURM_PROCID"
    arguments = server_arguments(job.argv, job.run, f"@{number}@", "0.0.0.0", f"@{port}@")
    words = _words(job.python, arguments)
    for variable in (port, number):
        words = words.replace(f"@{variable}@", f"${variable}")
    lines = [f"{port}=$(({_PORT_OF_SERVER} + SLURM_LOCALID))"]
    if launch.slurm.gpus:
        first = 0 if plan.server_nodes else plan.ranks_per_node
        size = plan.devices_per_server
        lines += _take_devices(f"{first} + SLURM_LOCALID * {size}", size)
    lines.append(f"exec {words}")
    count, nodes = len(plan.servers), max(1, plan.server_nodes)
    per_node = plan.servers_per_node
    where = ["--het-group=1"] if plan.server_nodes else ['--nodelist="${server_nodes[0]}"']
    options = [
        *where,
        f"--nodes={nodes}",
        f"--ntasks={count}",
        f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={launch.slurm.cpus_per_server}",
        "--kill-on-bad-exit=0",
    ]
    ready = [job.python, "-m", "rlhf.launch.ready", "--limit-s", f"{job.start_limit_s:g}"]
    made = f"{shlex.quote(job.python)} -c 'import secrets; print(secrets.token_urlsafe(32))'"
    return [
        "",
        "# made here, so that it stands in no file and on no command line",
        f"export {TOKEN_ENV}=${{{TOKEN_ENV}:-$({made})}}",
        "urls=()",
        f'for node in "${{server_nodes[@]:0:{nodes}}}"; do',
        f"  for local in $(seq 0 {per_node - 1}); do",
        f'    urls+=("http://$node:$(({_PORT_OF_SERVER} + local))")',
        "  done",
        "done",
        f'export {_URLS}=$(IFS=,; echo "${{urls[*]}}")',
        *_task("server", lines),
        f'{_srun(launch, options)} bash -c "$server" &',
        "servers=$!",
        "trap 'kill -TERM \"$servers\" 2>/dev/null || true' EXIT",
        f'{shlex.join(ready)} --pid "$servers" "${{urls[@]}}"',
    ]


def _srun(launch: LaunchConfig, options: Sequence[str]) -> str:
    """srun with options that stand in the script as they are, and those of the user, quoted.
    Steps of a job that run side by side have to be allowed to overlap.
    """
    return " ".join(["srun", "--overlap", *options, *map(shlex.quote, launch.slurm.srun)])


def _start_ranks(launch: LaunchConfig, plan: Plan, job: Job) -> list[str]:
    """Start the ranks, pass the signal of the time limit on to them, and end with their code."""
    ranks, per_node = len(plan.ranks), plan.ranks_per_node
    urls = f"@{_URLS}@" if plan.servers else None
    words = _words(job.python, rank_arguments(job.argv, urls))
    if urls is not None:
        # out of shlex's single quotes and into them again
        words = words.replace(urls, f"'\"${_URLS}\"'")
    lines = [
        f"export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE={ranks}",
        f"export LOCAL_WORLD_SIZE={per_node}",
    ]
    if launch.slurm.gpus and plan.servers and not plan.server_nodes:
        lines += _take_devices("0", per_node)
    lines.append(f"exec {words}")
    options = [
        f"--nodes={plan.nodes}",
        f"--ntasks={ranks}",
        f"--ntasks-per-node={per_node}",
        f"--cpus-per-task={launch.slurm.cpus_per_rank}",
        "--kill-on-bad-exit=1",
        "--label",
    ]
    if plan.server_nodes:
        options.insert(0, "--het-group=0")
    return [
        *_task("rank", lines),
        f'{_srun(launch, options)} bash -c "$rank" &',
        "ranks=$!",
        "# the ranks save and end; then this script does",
        "trap 'kill -TERM \"$ranks\" 2>/dev/null || true' TERM",
        "code=0",
        'wait "$ranks" || code=$?',
        "# a wait that a signal cut short is no end",
        'while kill -0 "$ranks" 2>/dev/null; do',
        '  code=0; wait "$ranks" || code=$?',
        "done",
        'exit "$code"',
    ]


def write(path: Path, text: str) -> None:
    """Write the script, for this user alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o700)


def submit(path: Path, wait: bool, environment: Mapping[str, str] | None = None) -> int:
    """Hand the script to sbatch, and return sbatch's exit code, with `wait` the job's.

    Raises UserError, which says where the script is, where there is no sbatch.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError(
            f"launch=slurm: there is no sbatch on this machine. The script is {path}: submit it "
            f"where there is one (sbatch {shlex.quote(str(path))}), or set launch.start=false "
            "to only write it."
        )
    words = [sbatch, *(["--wait"] if wait else []), str(path)]
    print(f"submitting {path}", flush=True)
    done = subprocess.run(words, env=dict(environment or os.environ), check=False)
    if done.returncode != 0 and not wait:
        print(f"error: sbatch ended with exit code {done.returncode}.", file=sys.stderr)
    return done.returncode
