"""``stage=registry``: versions of models in one SQLite file, and what becomes of them.

It leaves no run directory. An export to W&B has one, ``<run.dir>/<run.name>/registry``, for the
tracker's own files.
"""

import getpass
from collections.abc import Mapping
from pathlib import Path

from conf.choices import TrackingKind
from conf.serving import RegistryAction, RegistryStage, RegistryTarget
from rlhf.process import distributed
from rlhf.process.files import json_value
from rlhf.registry import entries, mlflow
from rlhf.registry.files import changes, check_unchanged
from rlhf.registry.gate import Finding, gate_of
from rlhf.registry.records import Event, Figure, Version, Why
from rlhf.registry.store import Registry
from rlhf.run import console
from rlhf.run.models import model_path
from rlhf.run.tracking.files import artifact_name
from rlhf.stages.registered import registry_file
from rlhf.stages.taken import HasConfig, Options
from rlhf.types import UserError

_NONE = "-"


def check(cfg: Options) -> list[str]:
    """The rules can be read, and there is a registry to look at. Raises UserError."""
    stage: RegistryStage = cfg.stage
    distributed.require_one_process("stage=registry", "Run it without torchrun.")
    gate_of(stage.rules, stage.largest_drop, stage.largest_rise)
    if stage.action is not RegistryAction.register:
        Registry(registry_file(cfg.run, stage.file)).close()
    return []


def run(ctx: HasConfig) -> None:
    """Do what stage.action says. Raises UserError, also for a promotion that the gate withholds."""
    stage = ctx.cfg.stage_as(RegistryStage)
    file = registry_file(ctx.cfg.run, stage.file)
    with Registry(file, create=stage.action is RegistryAction.register) as registry:
        work = _Work(registry, stage, stage.model or ctx.cfg.run.name)
        match stage.action:
            case RegistryAction.register:
                work.register(ctx)
            case RegistryAction.measure:
                work.measure()
            case RegistryAction.promote:
                work.promote()
            case RegistryAction.rollback:
                work.rollback()
            case RegistryAction.list:
                work.overview()
            case RegistryAction.show:
                work.show()
            case RegistryAction.compare:
                work.compare()
            case RegistryAction.verify:
                work.verify()
            case RegistryAction.export:
                work.export(ctx)


class _Work:
    """The actions on one model of an open registry."""

    def __init__(self, registry: Registry, stage: RegistryStage, name: str) -> None:
        self.registry, self.stage, self.name = registry, stage, name

    def _why(self, default: str = "") -> Why:
        return Why(self.stage.who or getpass.getuser(), self.stage.reason or default)

    def _version(self) -> Version:
        return self.registry.version(self.name, self.stage.version)

    # ---- writing ----

    def register(self, ctx: HasConfig) -> None:
        """The model of model.path, or the newest policy of the run."""
        cfg = ctx.cfg
        path = cfg.model.path or model_path(cfg.model, cfg.run)
        draft = entries.draft_of(self.name, path, self.registry)
        figures = entries.run_figures(draft)
        figures += [entries.figures_from(place, draft) for place in self.stage.summaries]
        version, is_new = self.registry.register(draft, self._why(), figures)
        if not is_new:
            print(
                f"registry: these files are {version.label} already, and nothing was added; "
                "stage.action=measure adds figures"
            )
            return
        count = len(self.registry.figures(self.name, version.number))
        print(
            f"registry: {version.label}, {len(draft.files)} files, sha256 {draft.digest}, "
            f"{count} figures, card: {'yes' if draft.card else 'none in the directory'}"
        )

    def measure(self) -> None:
        """The figures of stage.summaries belong to the version too."""
        if not self.stage.summaries:
            raise UserError(
                "stage.action=measure needs stage.summaries=[RUN or FILE], whose figures belong to "
                "the version."
            )
        version = self._version()
        figures = [entries.figures_from(place, version.draft) for place in self.stage.summaries]
        self.registry.measure(version, self._why("measured"), figures)
        for source, values in figures:
            print(f"registry: {len(values)} figures of {version.label} from {source}")

    def promote(self) -> None:
        """The version gets the alias, if its files and the gate let it."""
        stage, version = self.stage, self._version()
        check_unchanged(version.draft, version.label)
        gate = gate_of(stage.rules, stage.largest_drop, stage.largest_rise)
        done, before, findings = self.registry.promote(
            version, stage.alias, self._why(), gate, force=stage.force
        )
        if findings:
            console.table(_shown(findings), title=f"The gate to {stage.alias}")
        failed = [finding.text for finding in findings if not finding.passed]
        if not done:
            raise UserError(
                f"{version.label} does not get {stage.alias}: {'; '.join(failed)}. Train a better "
                "one, measure what was not measured (stage.action=measure), or set "
                "stage.force=true with the reason in stage.reason, which the history keeps."
            )
        forced = f", in spite of the gate ({'; '.join(failed)})" if failed else ""
        print(
            f"registry: {version.label} holds {stage.alias}{forced}; before: "
            f"{_NONE if before is None else f'version {before}'}"
        )

    def rollback(self) -> None:
        """The alias goes back, if the files of that version are whole."""
        alias = self.stage.alias
        to = self.registry.target(self.name, alias)
        check_unchanged(to.draft, to.label)
        before = self.registry.rollback(self.name, alias, self._why(), to)
        print(f"registry: {to.label} holds {alias} again; version {before} lost it")

    # ---- looking ----

    def overview(self) -> None:
        """A row for each version of each model."""
        rows = []
        for name in self.registry.names():
            holders = self.registry.holders(name)
            for version in self.registry.versions(name):
                held = [alias for alias, number in holders.items() if number == version.number]
                rows.append(_row(version, held))
        console.table(rows, title=str(self.registry.path))

    def show(self) -> None:
        """A version: what it is made of, its figures, and the history of its model."""
        version = self._version()
        print(entries.as_json(version))
        figures = self.registry.figures(self.name, version.number)
        if figures:
            console.table(_figures(figures), title=f"Figures of {version.label}")
        events = [_event(event) for event in self.registry.history(self.name)]
        console.table(events, title=f"History of {self.name}")

    def compare(self) -> None:
        """The figures of two versions."""
        one = self._version()
        other = self.registry.version(self.name, self.stage.other)
        first = self.registry.figures(self.name, one.number)
        second = self.registry.figures(self.name, other.number)
        rows = []
        for name in sorted({*first, *second}):
            rows.append(_compared(name, first.get(name), second.get(name), one, other))
        console.table(rows, title=f"{one.label} and {other.label}")

    def verify(self) -> None:
        """All versions' files and the history. Raises UserError where something was changed."""
        problems = [f"the history: {text}" for text in self.registry.broken()]
        count = 0
        for name in self.registry.names():
            for version in self.registry.versions(name):
                count += 1
                problems += [f"{version.label}: {text}" for text in changes(version.draft)]
        if problems:
            raise UserError(f"{self.registry.path}: {'; '.join(problems)}.")
        print(f"registry: {count} versions are as they were registered, and the history is whole")

    # ---- export ----

    def export(self, ctx: HasConfig) -> None:
        """Write the version for MLflow, or log it to W&B."""
        version = self._version()
        check_unchanged(version.draft, version.label)
        figures = self.registry.figures(self.name, version.number)
        if self.stage.to is RegistryTarget.wandb:
            _to_wandb(ctx, version, figures, self._aliases(version))
            return
        place = f"mlflow/{self.name}-{version.number}"
        folder = Path(self.stage.folder or Path(ctx.cfg.run.dir) / place).expanduser()
        mlflow.write(version, figures, folder)
        print(f"registry: {version.label} as a model of MLflow: {folder}")

    def _aliases(self, version: Version) -> list[str]:
        holders = self.registry.holders(self.name)
        return [alias for alias, number in holders.items() if number == version.number]


def _to_wandb(
    ctx: HasConfig, version: Version, figures: Mapping[str, Figure], aliases: list[str]
) -> None:
    """An artifact of W&B, with the digest as its alias. Raises UserError without tracking=wandb."""
    from rlhf.run.tracking.tracker import Tracker

    cfg = ctx.cfg
    if cfg.tracking.kind is not TrackingKind.wandb:
        raise UserError("stage.to=wandb needs tracking=wandb (tracking.mode=offline works too).")
    folder = Path(cfg.run.dir).expanduser() / cfg.run.name / "registry"
    root = Path(version.draft.path)
    files = [root / file.path for file in version.draft.files]
    metadata = {
        "version": version.label,
        "sha256": version.draft.digest,
        "aliases": aliases,
        "figures": {name: figure.value for name, figure in figures.items()},
        "lineage": json_value(version.draft.lineage),
    }
    tracker = Tracker(cfg, folder, "registry", resume=folder.is_dir())
    name = artifact_name(f"registry-{version.draft.name}")
    tracker.artifact(name, "model", files, metadata, root, f"version-{version.number}")
    command = tracker.sync_command
    tracker.finish()
    print(f"registry: {version.label} as the artifact {name}:version-{version.number}")
    if command:
        print(f"tracked offline; upload with: {command}")


# ---- tables ----


def _shown(findings: list[Finding]) -> list[dict[str, str]]:
    return [
        {"": "passed" if finding.passed else "NOT passed", "rule": finding.text}
        for finding in findings
    ]


def _row(version: Version, held: list[str]) -> dict[str, str]:
    lineage = version.draft.lineage
    return {
        "version": version.label,
        "aliases": ", ".join(held) or _NONE,
        "stage": str(lineage.get("stage", _NONE)),
        "from": ", ".join(lineage.get("ancestors", [])) or _NONE,
        "sha256": version.draft.digest[:16],
        "registered": version.time,
        "by": version.who,
    }


def _figures(figures: Mapping[str, Figure]) -> list[dict[str, str]]:
    return [
        {"figure": name, "value": f"{figure.value:.6g}", "source": figure.source}
        for name, figure in sorted(figures.items())
    ]


def _compared(
    name: str, first: Figure | None, second: Figure | None, one: Version, other: Version
) -> dict[str, str]:
    difference = _NONE
    if first is not None and second is not None:
        difference = f"{first.value - second.value:+.6g}"
    return {
        "figure": name,
        one.label: _NONE if first is None else f"{first.value:.6g}",
        f"{other.label} ": _NONE if second is None else f"{second.value:.6g}",
        "difference": difference,
    }


def _event(event: Event) -> dict[str, str]:
    detail = event.detail
    more = ""
    if "previous" in detail:
        more = f"before: {detail['previous'] or _NONE}"
    if detail.get("forced"):
        more += ", forced"
    if "source" in detail:
        more = f"{len(detail['figures'])} figures from {detail['source']}"
    return {
        "time": event.time,
        "who": event.why.who,
        "what": event.action.value,
        "version": str(event.number),
        "alias": event.alias or _NONE,
        "why": event.why.reason,
        "more": more,
    }
