"""The memory plan of a run with rollout=server against what its processes took, on a CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from reward.terms import scoring_models
from rlhf.checks.memory.moments import Machine
from rlhf.checks.memory.plan import plan
from rlhf.checks.memory.shapes import shapes_of
from rlhf.checks.memory.states import GIB
from rlhf.cli import config
from tests import toys
from tests.checks.test_memory_measured import ROOT, big_models

CPU = Machine(ranks=1, cuda=False, device_gib=64.0, host_gib=64.0)


def held_below(process: psutil.Process) -> float:
    """Bytes of all processes that `process` started, each shared page counted once."""
    found = 0.0
    for child in process.children(recursive=True):
        try:
            found += child.memory_full_info().pss
        except psutil.Error:  # it has ended
            continue
    return found


def finished(command: list[str], folder: Path) -> tuple[float, str]:
    """Run `command`; the most that its children took, in bytes, and what it wrote."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "TORCH_EXTENSIONS_DIR": str(folder / "ext"),
    }
    log = folder / "log"
    most = 0.0
    with log.open("wb") as out:
        run = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
        process = psutil.Process(run.pid)
        try:
            while run.poll() is None:
                most = max(most, held_below(process))
                time.sleep(0.5)
        finally:
            run.kill()
    return most, log.read_text(encoding="utf-8", errors="replace")


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("transfer", ["file", "gloo"])
def test_a_run_with_a_server_takes_what_its_plan_says(transfer: str, tmp_path: Path) -> None:
    """stage=grpo: policy, reference and reward model of 60M parameters in the trainer, against
    memory/peak_rss_mb, and the same policy in a server.
    """
    big_models(tmp_path)
    toys.write_jsonl(tmp_path / "p.jsonl", [{"prompt": f"the film is {i}"} for i in range(64)])
    options = ["stage=grpo", "rollout=server", f"rollout.server.transfer={transfer}"]
    options += ["tracking=none", f"run.dir={tmp_path / 'runs'}", "rollout.kv_cache_gib=0.5"]
    options += [f"model.path={tmp_path / 'policy'}", f"reward.path={tmp_path / 'reward'}"]
    options += [f"data.path={tmp_path / 'p.jsonl'}", "stage.steps=2", "stage.prompts_per_step=4"]
    options += ["stage.samples_per_prompt=4", "data.max_prompt_length=96"]
    options += ["rollout.max_response_length=32", "engine.micro_tokens=512"]
    options += ["reward.batch_tokens=512"]
    children, text = finished([sys.executable, "-m", "rlhf", *options], tmp_path)
    metrics = tmp_path / "runs" / "default" / "grpo" / "metrics.jsonl"
    assert metrics.is_file(), text[-3000:]
    last = metrics.read_text(encoding="utf-8").splitlines()[-1]
    trainer = json.loads(last)["memory/peak_rss_mb"] / 1024
    cfg = config.compose(options)
    models, _ = shapes_of(cfg.model, scoring_models(cfg.reward, cfg.stage.watch))
    planned = plan(cfg, models, CPU)
    assert planned.servers is not None
    server, own = planned.servers.total / GIB, planned.device_gib
    # the server maps the file, so its pages are measured there
    if transfer == "file":
        server += planned.servers.kept / GIB
    else:
        own += planned.servers.kept / GIB
    print(
        f"transfer={transfer}: trainer measured {trainer:.2f} GiB, planned "
        f"{own:.2f}; server {children / GIB:.2f}, planned {server:.2f}"
    )
    assert own == pytest.approx(trainer, rel=0.15)
    assert server == pytest.approx(children / GIB, rel=0.15)
