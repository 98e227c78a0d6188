"""Stand-ins of sbatch, srun and scontrol, as far as a job script of launch=slurm needs them.

FAKE_NODES: a JSON object of the nodes' names, each with the words that stand before a command which
is to run on that node. FAKE_COMPONENTS: JSON lists of the nodes of each component of a job.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SRUN = """\
#!{python}
import json, os, signal, subprocess, sys

given = sys.argv[1:]
at = next(i for i, word in enumerate(given) if not word.startswith("--"))
options = dict(word[2:].partition("=")[::2] for word in given[:at])
group = options.get("het-group")
name = "SLURM_JOB_NODELIST" + ("" if group is None else f"_HET_GROUP_{{group}}")
nodes = options.get("nodelist", os.environ[name]).split(",")
tasks, each = int(options["ntasks"]), int(options["ntasks-per-node"])
before = json.loads(os.environ["FAKE_NODES"])
processes = []
for number in range(tasks):
    node, local = divmod(number, each)
    env = os.environ | {{
        "SLURM_PROCID": str(number), "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node), "SLURM_NTASKS": str(tasks),
    }}
    command = [*before[nodes[node]], *given[at:]]
    processes.append(subprocess.Popen(command, env=env))
def forward(number, frame):
    for process in processes:
        process.send_signal(number)
signal.signal(signal.SIGTERM, forward)
codes = []
for process in processes:
    code = process.wait()
    codes.append(128 - code if code < 0 else code)
    if code and options.get("kill-on-bad-exit") == "1":
        forward(signal.SIGTERM, None)
sys.exit(next((code for code in codes if code), 0))
"""

SBATCH = """\
#!{python}
import json, os, shutil, subprocess, sys

wait = sys.argv[1] == "--wait"
script = sys.argv[-1]
shutil.copy(script, os.path.join(os.environ["STAND_IN_OUT"], "submitted.sh"))
components = json.loads(os.environ["FAKE_COMPONENTS"])
names = {{"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": ",".join(components[0])}}
for number, nodes in enumerate(components):
    names[f"SLURM_JOB_NODELIST_HET_GROUP_{{number}}"] = ",".join(nodes)
print("Submitted batch job 77", flush=True)
if wait:
    before = json.loads(os.environ["FAKE_NODES"])[components[0][0]]
    command = [*before, "bash", script]
    os.execvpe(command[0], command, os.environ | names)
"""

SCONTROL = """\
#!/bin/bash
[ "$1 $2" = "show hostnames" ] && tr , "\\n" <<< "$3"
"""


def fake_slurm(
    folder: Path, nodes: Mapping[str, Sequence[str]], components: Sequence[Sequence[str]]
) -> dict[str, str]:
    """The environment in which the stand-ins are found before anything else."""
    place = folder / "bin"
    place.mkdir()
    for name, text in (("srun", SRUN), ("sbatch", SBATCH)):
        (place / name).write_text(text.format(python=sys.executable), encoding="utf-8")
    (place / "scontrol").write_text(SCONTROL, encoding="utf-8")
    for path in place.iterdir():
        path.chmod(0o700)
    return {
        "PATH": f"{place}:{os.environ['PATH']}",
        "FAKE_NODES": json.dumps(nodes),
        "FAKE_COMPONENTS": json.dumps(components),
    }


def slurm_here(folder: Path) -> dict[str, str]:
    """A cluster whose one node is this machine; it is in both components of a job."""
    return fake_slurm(folder, {"localhost": []}, [["localhost"], ["localhost"]])
