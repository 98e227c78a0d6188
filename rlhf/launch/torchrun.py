"""launch=torchrun: torchrun's command, printed or run in place of this process."""

import os
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence

from conf.run import LaunchConfig
from rlhf.launch.plan import Plan

DEFAULT_PORT = 29400  # torchrun's own, where several nodes have to agree on one


def command(launch: LaunchConfig, plan: Plan, run_id: str, arguments: Sequence[str]) -> list[str]:
    """torchrun's command line for ``python -m rlhf`` with `arguments`, the same on each node.

    run_id: what the nodes of this run have in common, and those of others do not.
    """
    out = [launch.python or sys.executable, "-m", "torch.distributed.run"]
    if plan.nodes == 1:
        out.append("--standalone")
    else:
        host = launch.host or socket.gethostname()
        out += ["--nnodes", str(plan.nodes), "--rdzv_backend", "c10d"]
        out += ["--rdzv_endpoint", f"{host}:{launch.port or DEFAULT_PORT}", "--rdzv_id", run_id]
    out += ["--nproc_per_node", str(plan.ranks_per_node)]
    return [*out, "-m", "rlhf", *arguments]


def run(plan: Plan, words: Sequence[str], environment: Mapping[str, str], start: bool) -> None:
    """Print the command, and with `start` become it. It doesn't return then."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    where = "on each node" if plan.nodes > 1 else "here"
    print(f"to be run {where}:\n{' '.join([*variables, shlex.join(words)])}", flush=True)
    if start:
        os.execvpe(words[0], list(words), os.environ | dict(environment))
