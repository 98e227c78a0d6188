"""The faults that benchmarks.chaos puts into runs."""

from benchmarks.chaos.child import ENGINES
from benchmarks.chaos.kinds import EVERY, KILLED, Disk, Fault, Kind, tear_newest
from rlhf.process.supervision import EXIT_HUNG

_NO_SERVER = {
    "WANDB_API_KEY": "0" * 40,
    "WANDB_BASE_URL": "http://127.0.0.1:9",
    "WANDB_INIT_TIMEOUT": "10",
}
# a busy machine takes its time to build the models
_LIMITED = ("tracking=none", "run.phase_timeout_s=90")
_FULL = r"No space left on device"
_NO_ROOM = r"could not be written: .*\(0\.0 MiB were free there\)"
# "sync" comes once before the first step; "update" 4 is in step 4, between the checkpoints of steps
# 2 and 4.
_PHASES = (("rollout", 4), ("score", 4), ("update", 4), ("sync", 5))
_KILLS = (
    *(Fault(f"kill -9 in {phase}", KILLED, phase, times, "kill") for phase, times in _PHASES),
    Fault("kill -9 in save", KILLED, "seal", 2, "kill_now"),
    Fault("kill -9 inside a line of metrics.jsonl", KILLED, "metrics.jsonl", 4, "tear"),
    Fault("kill -9 before the first checkpoint", KILLED, "update", 2, "kill"),
    Fault("kill -9 in the end, model saved in part", KILLED, "finish", 1, "kill", lost=0),
)
_SIGNALS = (
    Fault("SIGTERM", 143, "update", 3, "terminate", says="stopped by SIGTERM after step 3", lost=0),
    Fault("Ctrl-C twice", 130, "update", 4, "interrupt_twice", says="ended at once"),
)
_DISKS = (
    Fault("torn checkpoint", KILLED, "update", 6, "kill", after=tear_newest, lost=2 * EVERY - 1),
    Fault("files that may not grow", 1, "save", 2, "limit_files", says="could not be written"),
    Fault(
        "full disk at a checkpoint",
        1,
        disk=Disk.small,
        says=rf"checkpoint .*step-4 {_NO_ROOM}.*whole .* is .*step-2",
    ),
    Fault(
        "full disk at metrics.jsonl",
        1,
        "metrics.jsonl",
        3,
        "fill",
        disk=Disk.roomy,
        says=rf"metrics.jsonl can't be written: .*{_FULL}",
    ),
    Fault(
        "full disk at samples.jsonl",
        1,
        "samples.jsonl",
        3,
        "fill",
        disk=Disk.roomy,
        says=rf"samples.jsonl can't be written: .*{_FULL}",
    ),
    Fault(
        "full disk at the model",
        1,
        "finish",
        1,
        "fill",
        disk=Disk.roomy,
        says=rf"takes no more: .*{_FULL}",
        lost=0,
    ),
    Fault(
        "disk turns read-only",
        1,
        "rollout",
        4,
        "read_only",
        disk=Disk.roomy,
        says="Read-only file system",
    ),
    Fault(
        "full disk from the start",
        1,
        disk=Disk.full,
        says=rf"the run directory .* can't be written: .*{_FULL}",
    ),
    Fault(
        "read-only disk from the start",
        1,
        disk=Disk.sealed,
        says="can't be written: .*Read-only file system",
    ),
)
_REST = (
    Fault(
        "hang",
        EXIT_HUNG,
        "rollout",
        4,
        "hang",
        options=_LIMITED,
        says="rank 0: phase rollout took longer",
    ),
    Fault(
        "tracker down",
        0,
        options=("tracking=wandb", "tracking.mode=auto"),
        environment=_NO_SERVER,
        says="tracked offline instead",
        lost=0,
    ),
    Fault(
        "NaN, rewound",
        0,
        "reward",
        4,
        "nan",
        options=("tracking=none", "stage.on_nonfinite=rewind"),
        same=2,
        lost=0,
        dumped=True,
    ),
    Fault(
        "NaN, left out",
        0,
        "reward",
        4,
        "nan",
        options=("tracking=none", "stage.on_nonfinite=skip"),
        same=3,
        lost=0,
        dumped=True,
    ),
    Fault("NaN, stopped", 1, "reward", 4, "nan", says="returned nan", dumped=True),
)
_OFFLINE = (
    Fault("sft: kill -9 in a step", KILLED, "step", 4, "kill", kind=Kind.sft),
    Fault("sft: kill -9 in save", KILLED, "seal", 2, "kill_now", kind=Kind.sft),
    Fault(
        "sft: SIGTERM",
        143,
        "step",
        3,
        "terminate",
        kind=Kind.sft,
        says="stopped by SIGTERM after step 3",
        lost=0,
    ),
    Fault(
        "sft: full disk at a checkpoint",
        1,
        kind=Kind.sft,
        disk=Disk.small,
        says=rf"checkpoint .*-4 {_NO_ROOM}",
    ),
)
_VLLM = (
    Fault(
        "vLLM: kill -9 in rollout",
        KILLED,
        "rollout",
        4,
        "kill_engine",
        kind=Kind.vllm,
        says=f"{ENGINES}0",
    ),
)
_SERVERS = (
    Fault(
        "server: killed in generation",
        0,
        "rollout",
        4,
        "kill_server",
        kind=Kind.server,
        says=r"no answer to /inference[\s\S]*restart",
        lost=0,
    ),
    Fault(
        "server: killed in sync",
        0,
        "sync",
        5,
        "kill_server",
        kind=Kind.server,
        says="restart",
        lost=0,
    ),
    Fault(
        "server: hangs in generation",
        0,
        "rollout",
        4,
        "stop_server",
        kind=Kind.server,
        says=r"no answer to /inference[^ ]* within[\s\S]*restart",
        lost=0,
    ),
    Fault(
        "server: hangs in sync",
        0,
        "sync",
        5,
        "stop_server",
        kind=Kind.server,
        says="restart",
        lost=0,
    ),
    Fault(
        "server: wrong weights",
        1,
        "sync",
        5,
        "spoil_weights",
        kind=Kind.server,
        says=r"does not hold what the trainer sent for .*down_proj\.weight",
    ),
    Fault(
        "server: kill -9 of the trainer in generation",
        KILLED,
        "rollout",
        4,
        "kill",
        kind=Kind.server,
    ),
    Fault(
        "server: its link is cut",
        1,
        "rollout",
        4,
        "cut_link",
        kind=Kind.server,
        link=True,
        says=r"no server is left of .*10\.77\.0\.2",
    ),
    Fault(
        "one ahead: kill -9 of the trainer with responses in flight",
        KILLED,
        "update",
        4,
        "kill",
        kind=Kind.ahead,
        same=2,  # those of step 3 are written anew, by newer weights
    ),
    Fault(
        "one ahead: server killed in generation",
        0,
        "update",
        4,
        "kill_server",
        kind=Kind.ahead,
        says="restart",
        same=3,
        lost=0,
    ),
)
_SIGKILLED = r"rank +: 1 [\s\S]*Signal 9 \(SIGKILL\)"
_RANKS = (
    *(
        Fault(
            f"2 ranks: kill -9 of one in {phase}",
            1,
            phase,
            times,
            "kill",
            rank=1,
            kind=Kind.ranks,
            cause=_SIGKILLED,
        )
        for phase, times in (*_PHASES, ("save", 2))
    ),
    Fault(
        "2 ranks: kill -9 of the one that seals",
        1,
        "seal",
        2,
        "kill_now",
        kind=Kind.ranks,
        cause=r"rank +: 0 [\s\S]*Signal 9 \(SIGKILL\)",
    ),
    Fault(
        "2 ranks: SIGTERM to torchrun",
        1,
        "update",
        3,
        "terminate_launcher",
        kind=Kind.ranks,
        says="stopped by SIGTERM after step 3",
        lost=0,
    ),
    Fault(
        "2 ranks: SIGTERM to one",
        1,
        "update",
        3,
        "terminate",
        1,
        Kind.ranks,
        cause="stopped by SIGTERM after step 3",
        lost=0,
    ),
    Fault(
        "2 ranks: one hangs",
        1,
        "rollout",
        4,
        "hang",
        1,
        Kind.ranks,
        _LIMITED,
        cause=r"rank +: 1 [\s\S]*rank 1: phase rollout took longer",
    ),
    Fault(
        "2 ranks: the reward of one raises",
        1,
        "reward",
        4,
        "raise",
        1,
        Kind.ranks,
        cause="step 4: .*the reward of rank 1 is broken",
        dumped=True,
    ),
    Fault(
        "2 ranks: NaN in one's reward",
        1,
        "reward",
        4,
        "nan",
        1,
        Kind.ranks,
        cause="step 4: .*returned nan",
        dumped=True,
    ),
    Fault(
        "2 ranks: an error in one",
        1,
        "update",
        4,
        "raise",
        1,
        Kind.ranks,
        cause=r"rank +: 1 [\s\S]*Broken: rank 1 is broken",
    ),
)
FAULTS = (*_KILLS, *_SIGNALS, *_DISKS, *_REST, *_OFFLINE, *_VLLM, *_SERVERS, *_RANKS)
