"""``stage=doctor``: what this machine and environment can run, and why not the rest.

Each check returns findings; nothing is changed, and no weights load.
"""

import dataclasses
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from conf.schema import Config
from conf.stages import DoctorStage
from rlhf.process import redaction
from rlhf.stages.examination import agreement, backends, environment, machine, memory, tokenizers
from rlhf.stages.examination.findings import Finding, State, as_text, print_table, write
from rlhf.types import UserError

LOCK = Path(__file__).resolve().parents[2] / "requirements" / "lock-cpu-py311.txt"


def examine(cfg: Config) -> list[Finding]:
    """Every finding but that of the memory plan, in the report's order."""
    installed = environment.installed_versions()
    lock = None
    if LOCK.is_file():
        lock = environment.read_lock(LOCK.read_text(encoding="utf-8"))
    with ThreadPoolExecutor() as pool:  # each imports for many seconds in a process of its own
        probes = [
            pool.submit(backends.check_transformers),
            pool.submit(backends.check_vllm, cfg.rollout.backend),
            pool.submit(backends.check_deepspeed, cfg.engine.kind),
            pool.submit(backends.check_extensions, cfg.engine),
        ]
    return [
        environment.check_python(sys.version_info[:3]),
        *environment.check_versions(installed, lock, environment.own_requirements()),
        *machine.check_machine(cfg.run.dir),
        *machine.check_torch(installed),
        *(probe.result() for probe in probes),
        backends.check_wandb(cfg.tracking),
        *tokenizers.check_tokenizers(cfg.model, cfg.reward, cfg.data.chat_template),
        *agreement.check_rows(cfg.model, cfg.data, cfg.run.seed),
    ]


class HasConfig(Protocol):
    """All that this stage takes of a run: it trains nothing, so it needs no run directory and
    writes none.
    """

    cfg: Config


def check(cfg: Config) -> list[str]:
    """Nothing: the stage is made of checks."""
    return []


def run(ctx: HasConfig) -> None:
    """Print the table and the text for a bug report; raise UserError (exit code 1) naming what
    failed.
    """
    stage = ctx.cfg.stage_as(DoctorStage)
    plan, finding = memory.check_plan(ctx.cfg)
    if plan is not None:
        memory.print_plan(plan)  # first: the backends take half a minute to try
    findings = [without_secrets(f) for f in (*examine(ctx.cfg), finding)]
    if stage.findings is not None:
        write(findings, Path(stage.findings).expanduser())
    print_table(findings)
    print("\nFor a bug report (home paths and secrets removed):\n")
    print(redaction.report(as_text(findings), home=str(Path.home())))
    failed = [f"{f.name}: {f.found}. {f.remedy}." for f in findings if f.state is State.fail]
    if failed:
        raise UserError(f"{len(failed)} of {len(findings)} checks failed.\n" + "\n".join(failed))


def without_secrets(finding: Finding) -> Finding:
    """The finding for the terminal, where it may quote an error of a library."""
    found, remedy = redaction.text(finding.found), redaction.text(finding.remedy)
    return dataclasses.replace(finding, found=found, remedy=remedy)
