"""Starting the runs that benchmarks.chaos breaks, and finding what they leave behind."""

import contextlib
import json
import os
import subprocess
import time
from pathlib import Path

from benchmarks.chaos import network
from benchmarks.chaos.child import FAULT
from benchmarks.chaos.kinds import Fault
from benchmarks.chaos.network import Host
from benchmarks.shared import environment, module, write_rows

_TIMEOUT_S = 600
_LOOK_S = 0.5  # between two looks at a run's processes
RUN = "RLHF_CHAOS_RUN"  # in the environment of every process of a run
# process ids that runs were seen to have, by `RUN`: one that has ended has no environment
_SEEN: dict[str, set[int]] = {}


def write_data(folder: Path) -> None:
    """The rows that the runs read."""
    words = ("alpha", "beta", "gamma", "delta")
    numbered = [(word, number) for number in range(8) for word in words]
    write_rows(
        folder / "prompts.jsonl", [{"prompt": f"{word} {number}"} for word, number in numbered]
    )
    texts = [
        {"prompt": f"{word} {number}", "completion": f" {word} follows {number + 1}"}
        for word, number in numbered
    ]
    write_rows(folder / "texts.jsonl", texts)


def _environment(folder: Path, name: str, fault: Fault, *, resume: bool) -> dict[str, str]:
    env = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | fault.environment
    env |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), RUN: str(folder / name)}
    if fault.action and not resume:
        chosen = {
            "point": fault.point,
            "times": fault.times,
            "action": fault.action,
            "rank": fault.rank,
            "place": str(folder / name),
        }
        env[FAULT] = json.dumps(chosen)
    return environment(extra=env)


def _command(folder: Path, name: str, fault: Fault, *, resume: bool) -> list[str]:
    options = [*fault.kind.options, *fault.options]
    options += [
        f"run.dir={folder}",
        f"run.name={name}",
        f"data.path={folder / fault.kind.data}",
    ]
    if resume:
        options.append("run.resume=true")
    ranks = fault.kind.count
    if ranks == 1:
        return module("benchmarks.chaos.child", *options)
    launcher = ["--standalone", f"--nproc_per_node={ranks}", "-m", "benchmarks.chaos.child"]
    return module("torch.distributed.run", *launcher, *options)


def launch(
    folder: Path, name: str, fault: Fault, *, resume: bool, host: Host | None = None
) -> tuple[int | None, str]:
    """Start the run, with the fault unless it resumes, and wait for its end; on a host of its own
    where the fault is in its link to another. Returns the exit code (None where it did not end
    within _TIMEOUT_S) and the output.
    """
    log = folder / f"{name}{'.resumed' if resume else ''}.log"
    command = _command(folder, name, fault, resume=resume)
    variables = _environment(folder, name, fault, resume=resume)
    if host is not None:
        command = [*host.prefix(), *command, *network.run_options()]
        variables |= network.variables()
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=variables,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        code = _watched(process, str(folder / name))
    return code, log.read_text(encoding="utf-8", errors="replace")


def _watched(process: "subprocess.Popen[bytes]", token: str) -> int | None:
    """The exit code of the run `token`, whose processes are noted; None where it took too long."""
    deadline = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline:
        _SEEN.setdefault(token, set()).update(_living(token))
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(_LOOK_S)
    process.kill()
    process.wait()
    return None


def _living(token: str) -> dict[int, str]:
    """Command line by process id of every process of the run `token`."""
    wanted = f"{RUN}={token}".encode()
    commands = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # a process that has just ended, or another user's
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                commands[int(process.name)] = words.decode(errors="replace").strip()
    return commands


def _zombies(processes: set[int]) -> list[int]:
    """Those that have ended and that nobody has waited for."""
    found = []
    for process in processes:
        with contextlib.suppress(OSError):
            # the state follows the name, which is in brackets and may hold any character
            text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
            if text.rpartition(")")[2].split()[0] == "Z":
                found.append(process)
    return found


def left_behind(token: str, patience: float) -> list[str]:
    """Command lines of the processes of a run that still live after `patience` seconds, which are
    killed, and its zombies.
    """
    deadline = time.monotonic() + patience
    while True:
        processes, zombies = _living(token), _zombies(_SEEN.get(token, set()))
        if not (processes or zombies) or time.monotonic() >= deadline:
            break
        time.sleep(0.2)
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, 9)
    return [*processes.values(), *(f"zombie {process}" for process in zombies)]
