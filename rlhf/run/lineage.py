"""What a run was made of, followed back over the manifests of runs: from a reward model to the
prompts. It reads manifest.json alone: no network, no tracker.

    python -m rlhf.run.lineage runs/x/reward            a tree; each input is checked against the
                                                        hash that was recorded
    python -m rlhf.run.lineage runs/x/reward --json     the same for programs

A manifest names models and directories under ``parents`` and files under ``data``. An entry that
lies in a run of ours has ``from``:

    run         that run's directory, relative to the directory of the manifest, so that runs may be
                moved together
    stage       its stage
    artifacts   name, kind and digest of the published artifacts that the entry is part of
                (`RunContext.publish`)
    wandb       project, entity, run_id and mode, where W&B tracked it
    changed     true where the file was no longer as published when it was read
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.process.files import sha256
from rlhf.run.manifest import (
    MANIFEST_FILE,
    Entry,
    artifact_digest,
    read_manifest,
    run_of,
    segments,
)
from rlhf.types import UserError

AGAIN = "as above"


@dataclass(frozen=True, slots=True)
class Node:
    """A run, or an input that no run of ours made."""

    path: str  # the run directory, or the input as the manifest names it
    # What was taken of it: "policy runs/x/sft/model", "data runs/x/data/train.jsonl"; () for the
    # run that the tree begins with.
    via: tuple[str, ...]
    stage: str | None = None  # None: no run of ours
    artifacts: tuple[str, ...] = ()  # name@digest of what was taken
    notes: tuple[str, ...] = ()  # what is no longer as it was
    parents: tuple["Node", ...] = ()

    def figures(self) -> Entry:
        """The node as JSON values."""
        parents = [parent.figures() for parent in self.parents]
        return {**dataclasses.asdict(self), "parents": parents}


def _entries(manifest: Mapping[str, Any]) -> list[Entry]:
    """Parents and data files alike: kind, path, from, sha256 of files; and steps, where a resumed
    run was not trained on them throughout.
    """
    data = [{"kind": "data", **entry} for entry in manifest["data"]]
    entries = [*manifest["parents"], *data]
    resumed = segments(manifest) if len(manifest.get("starts", [])) > 1 else []
    if len(resumed) < 2 or not all("data" in start for start, _ in resumed):
        return entries  # one segment, or a manifest from before starts had inputs of their own
    return [{**entry, "steps": _steps(entry, resumed)} for entry in entries]


def _steps(entry: Entry, resumed: Sequence[tuple[Entry, int | None]]) -> str:
    """At which steps of a resumed run an input was read; "" for all of them."""
    bare = {key: value for key, value in entry.items() if key != "kind"}
    parts = []
    for start, until in resumed:
        if entry in start["parents"] or bare in start["data"]:
            first = start["step"] + 1
            parts.append(f"{first} to {until}" if until is not None else f"from {first}")
    return "" if len(parts) == len(resumed) else ", ".join(parts)


def _via(entry: Entry) -> str:
    """What was taken, for a node."""
    steps = entry.get("steps")
    taken = f"{entry['kind']} {entry['path']}"
    return f"{taken} (steps {steps})" if steps else taken


def _artifacts(entry: Entry) -> list[Entry]:
    """The published artifacts that an entry is part of."""
    artifacts: list[Entry] = entry.get("from", {}).get("artifacts", [])
    return artifacts


def _run_behind(entry: Entry, directory: Path) -> Path | None:
    """The run that an entry comes from, None where no run made it.

    That is the recorded run, or (an older manifest, a run that was moved) the run in which the
    entry's path lies.
    """
    if "from" in entry:
        recorded: Path = directory / entry["from"]["run"]
        if read_manifest(recorded) is not None:
            return recorded.resolve()
    path = Path(entry["path"]).expanduser()
    run = run_of(path) if path.exists() else None
    return run if run != directory.resolve() else None


def _notes(entry: Entry, run: Path | None) -> list[str]:
    """What shows that an input is no longer what was read."""
    path = Path(entry["path"]).expanduser()
    name = path.name
    notes = []
    if entry["kind"] == "data":
        is_there = path.is_file()
        if not is_there and run is not None and "from" in entry:
            return [f"{name}: not found from here"]
        if not is_there:
            notes.append(f"{name} is gone")
        elif sha256(path) != entry["sha256"]:
            notes.append(f"{name} was changed since")
    if entry.get("from", {}).get("changed"):
        notes.append(f"{name} was no longer as published")
    if "from" in entry and run is None:
        notes.append(f"its run ({entry['from']['stage']}) is gone")
    if run is not None:
        manifest = read_manifest(run) or {}
        present = {artifact_digest(artifact) for artifact in manifest.get("artifacts", [])}
        for artifact in _artifacts(entry):
            if artifact["digest"] not in present:
                notes.append(f"{artifact['name']} was replaced since")
    return notes


def _node(directory: Path, via: Sequence[Entry], notes: Sequence[str], seen: set[Path]) -> Node:
    """A run with all runs before it; a run that the tree has already is not followed again."""
    manifest = read_manifest(directory)
    assert manifest is not None
    artifacts: dict[str, None] = {}
    for entry in via:
        for artifact in _artifacts(entry):
            artifacts[f"{artifact['name']}@{artifact['digest']}"] = None
    parents: tuple[Node, ...] = ()
    if directory in seen:
        notes = [*notes, AGAIN]
    else:
        seen.add(directory)
        parents = _parents(directory, manifest, seen)
    return Node(
        path=_short(directory),
        via=tuple(map(_via, via)),
        stage=manifest["stage"],
        artifacts=tuple(artifacts),
        notes=tuple(notes),
        parents=parents,
    )


def _parents(directory: Path, manifest: Entry, seen: set[Path]) -> tuple[Node, ...]:
    by_run: dict[Path, list[Entry]] = {}
    leaves = []
    for entry in _entries(manifest):
        run = _run_behind(entry, directory)
        if run is None:
            notes = _notes(entry, None)
            if entry.get("steps"):
                notes.insert(0, f"steps {entry['steps']}")
            leaves.append(Node(entry["path"], (entry["kind"],), notes=tuple(notes)))
        else:
            by_run.setdefault(run, []).append(entry)
    nodes = []
    for run, entries in by_run.items():
        notes = [note for entry in entries for note in _notes(entry, run)]
        nodes.append(_node(run, entries, notes, seen))
    return (*nodes, *leaves)


def _short(directory: Path) -> str:
    """Relative to the working directory where it lies in it."""
    here = Path.cwd()
    return str(directory.relative_to(here)) if directory.is_relative_to(here) else str(directory)


def lineage(run_dir: Path) -> Node:
    """The run and, as its parents, all that it was made of, back to what no run of ours made.

    Raises UserError where there is no run.
    """
    directory = run_of(run_dir)
    if directory is None:
        raise UserError(
            f"{run_dir}: expected a run directory (it holds {MANIFEST_FILE}) or something in "
            "one, found neither."
        )
    return _node(directory, (), (), set())


def tree(node: Node) -> Any:
    """The tree for the terminal, a rich.tree.Tree."""
    from rich.tree import Tree

    def grow(branch: Any, node: Node) -> Any:
        for parent in node.parents:
            grow(branch.add(_label(parent)), parent)
        return branch

    return grow(Tree(_label(node)), node)


def _label(node: Node) -> Any:
    """A node's lines in the tree, a rich.text.Text."""
    from rich.text import Text

    text = Text(f"{node.stage or node.via[0]}  ", style="bold").append(node.path, style="default")
    details = [*node.via, *node.artifacts] if node.stage else node.artifacts
    for detail in details:
        text.append(f"\n  {detail}", style="dim")
    for note in node.notes:
        mark = "" if note == AGAIN else "! "
        text.append(f"\n  {mark}{note}", style="yellow")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tree. 1 where there is no run."""
    from rlhf.run.console import console

    parser = argparse.ArgumentParser(
        prog="python -m rlhf.run.lineage",
        description="What a run was made of, back to the prompts.",
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    try:
        node = lineage(options.run_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(node.figures(), indent=2, ensure_ascii=False))
    else:
        console().print(tree(node))
    return 0


if __name__ == "__main__":
    sys.exit(main())
