"""What a run was made of, walked back over the manifests of runs: from a reward model to the
prompts. No network, no tracker: manifest.json alone.

    python -m rlhf.run.lineage runs/x/reward            a tree, each input checked against the hash
    that was recorded
    python -m rlhf.run.lineage runs/x/reward --json     the same for programs

A manifest names models and directories under ``parents`` and files under ``data``. An entry that
lies in a run of ours has ``from``:

    run         that run's directory, relative to the directory of the manifest, so that runs may be
    moved together
    stage       what it was
    artifacts   name, kind and digest of the published artifacts that the entry is part of
    (`RunContext.publish`)
    wandb       project, entity, run_id and mode, where it was tracked by W&B
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

from rlhf.process.hashing import sha256
from rlhf.run.manifest import MANIFEST_FILE, Entry, artifact_digest, read_manifest, run_of
from rlhf.types import UserError


@dataclass(frozen=True, slots=True)
class Node:
    """A run, or an input that no run of ours made."""

    path: str  # the run directory, or the input as the manifest names it
    # what was taken of it: "policy runs/x/sft/model", "data runs/x/data/train.jsonl"; none of the
    # first run
    via: tuple[str, ...]
    stage: str | None = None  # None: no run of ours
    artifacts: tuple[str, ...] = ()  # name@digest of what was taken
    notes: tuple[str, ...] = ()  # what is no longer as it was
    parents: tuple["Node", ...] = ()

    def figures(self) -> Entry:
        """As JSON has it."""
        return {
            **dataclasses.asdict(self),
            "parents": [parent.figures() for parent in self.parents],
        }


def _entries(manifest: Mapping[str, Any]) -> list[Entry]:
    """Parents and data files alike: kind, path, from, sha256 of files."""
    return [*manifest["parents"], *({"kind": "data", **entry} for entry in manifest["data"])]


def _where(entry: Entry, directory: Path) -> Path | None:
    """The run that an entry comes from: as recorded, else (an older manifest, a moved run) as its
    path says; None for none.
    """
    recorded = directory / entry["from"]["run"] if "from" in entry else None
    if recorded is not None and read_manifest(recorded) is not None:
        return recorded.resolve()
    found = (
        run_of(Path(entry["path"]).expanduser())
        if Path(entry["path"]).expanduser().exists()
        else None
    )
    return found if found != directory.resolve() else None


def _notes(entry: Entry, run: Path | None) -> list[str]:
    """What tells that an input is no longer what was read."""
    out = []
    place = Path(entry["path"]).expanduser()
    if entry["kind"] == "data":
        if run is not None and not place.is_file() and "from" in entry:
            return [f"{place.name}: not found from here"]
        out += (
            [f"{place.name} is gone"]
            if not place.is_file()
            else [f"{place.name} was changed since"]
            if sha256(place) != entry["sha256"]
            else []
        )
    if entry.get("from", {}).get("changed"):
        out.append(f"{place.name} was no longer as published")
    if "from" in entry and run is None:
        out.append(f"its run ({entry['from']['stage']}) is gone")
    if run is not None:
        there = {
            artifact_digest(artifact)
            for artifact in (read_manifest(run) or {}).get("artifacts", [])
        }
        out += [
            f"{a['name']} was replaced since"
            for a in entry.get("from", {}).get("artifacts", [])
            if a["digest"] not in there
        ]
    return out


def _node(directory: Path, via: Sequence[Entry], notes: Sequence[str], seen: set[Path]) -> Node:
    """A run with all before it; a run that stands in the tree already is named again and not walked
    again.
    """
    manifest = read_manifest(directory)
    assert manifest is not None
    artifacts = dict.fromkeys(
        f"{a['name']}@{a['digest']}"
        for entry in via
        for a in entry.get("from", {}).get("artifacts", [])
    )
    shown = tuple(f"{entry['kind']} {entry['path']}" for entry in via)
    again = directory in seen
    seen.add(directory)
    parents = () if again else _parents(directory, manifest, seen)
    return Node(
        _short(directory),
        shown,
        manifest["stage"],
        tuple(artifacts),
        (*notes, *(["as above"] if again else [])),
        parents,
    )


def _parents(directory: Path, manifest: Entry, seen: set[Path]) -> tuple[Node, ...]:
    by_run: dict[Path, list[Entry]] = {}
    leaves = []
    for entry in _entries(manifest):
        run = _where(entry, directory)
        if run is None:
            leaves.append(Node(entry["path"], (entry["kind"],), notes=tuple(_notes(entry, None))))
        else:
            by_run.setdefault(run, []).append(entry)
    runs = [
        _node(run, entries, [note for entry in entries for note in _notes(entry, run)], seen)
        for run, entries in by_run.items()
    ]
    return (*runs, *leaves)


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
    """For the terminal, as rich.tree.Tree."""
    from rich.text import Text
    from rich.tree import Tree

    def label(one: Node) -> Text:
        text = Text(f"{one.stage or one.via[0]}  ", style="bold").append(one.path, style="default")
        for extra in (*(one.via if one.stage else ()), *one.artifacts):
            text.append(f"\n  {extra}", style="dim")
        for note in one.notes:
            text.append(f"\n  ! {note}" if note != "as above" else "\n  as above", style="yellow")
        return text

    def grow(branch: Tree, one: Node) -> Tree:
        for parent in one.parents:
            grow(branch.add(label(parent)), parent)
        return branch

    return grow(Tree(label(node)), node)


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
