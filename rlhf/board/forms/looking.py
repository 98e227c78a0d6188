"""The look before a start: the dry run of a command in a process of its own, which may load torch,
and what it said.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.process import redaction

FACTS_FILE = "RLHF_DRY_RUN_FACTS"  # rlhf/stages/dry_run.py writes what it shows there, too
_LIMIT_S = 600.0
_MOST_LINES = 60
_ONE = threading.Lock()  # a look loads a tokenizer and torch: one at a time


@dataclass(frozen=True)
class Look:
    """What a dry run found; `error` where the stage would not start."""

    error: str | None = None
    warnings: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)  # as rlhf/stages/dry_run.py has them


def look(overrides: Sequence[str], limit_s: float = _LIMIT_S) -> Look:
    """Run ``python -m rlhf ... run.dry_run=true`` and read what it wrote."""
    with _ONE, tempfile.TemporaryDirectory(prefix="rlhf-look-") as folder:
        facts = Path(folder) / "facts.json"
        argv = [sys.executable, "-m", "rlhf", *overrides, "run.dry_run=true"]
        environment = {**os.environ, FACTS_FILE: str(facts)}
        try:
            done = subprocess.run(
                argv,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Look(error=f"The dry run took longer than {limit_s:g} s.")
        said = redaction.text(done.stderr.decode("utf-8", "replace")).splitlines()
        if done.returncode != 0:
            return Look(error=_error(said, done.returncode), warnings=_warnings(said))
        found = json.loads(facts.read_text(encoding="utf-8"))
        return Look(warnings=_warnings(said), facts=found)


def _warnings(lines: Sequence[str]) -> list[str]:
    """The warnings of our own log."""
    found = []
    for line in lines:
        level, _, rest = line.partition(" ")
        name, colon, text = rest.partition(": ")
        if level == "WARNING" and colon and name.split(".")[0] == "rlhf":
            found.append(text)
    return list(dict.fromkeys(found))[:_MOST_LINES]


def _error(lines: Sequence[str], code: int) -> str:
    """The message of a refusal, or the end of a traceback."""
    for number, line in enumerate(lines):
        if line.startswith("error: "):
            rest = "\n".join(lines[number : number + _MOST_LINES])
            return rest.removeprefix("error: ")
    last = "\n".join(lines[-5:])
    return f"The dry run ended with exit code {code}:\n{last}"
