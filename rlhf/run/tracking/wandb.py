"""Weights & Biases as a tracking backend. The only file that imports wandb."""

import logging
import os
import secrets
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.choices import WandbMode
from conf.schema import TrackingConfig
from rlhf.process.redaction import redact, redacted_arguments
from rlhf.run.tracking.files import table_cells
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.run.tracking")
RUN_ID_FILE = "run_id"


def wandb_login() -> bool:
    """True where W&B has credentials: WANDB_API_KEY, an identity token, netrc or its settings.

    Uses no network. Raises UserError when the credentials have an invalid form.
    """
    from wandb import Settings
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth

    settings = Settings()
    settings.update_from_env_vars(os.environ)
    try:
        login = wbauth.authenticate_session(
            host=settings.base_url, source="rlhf", prompt=False, update_session=False
        )
    except AuthenticationError as error:
        raise UserError(
            f"tracking=wandb: the W&B login is invalid: {error}. Run `wandb login` again, or set "
            "tracking.mode=offline."
        ) from error
    return login is not None


def _automatic_mode() -> WandbMode:
    """WANDB_MODE where it is set; else online where a login exists, else offline."""
    chosen = os.environ.get("WANDB_MODE", "").strip().lower()
    if not chosen:
        return WandbMode.online if wandb_login() else WandbMode.offline
    if chosen not in (WandbMode.online.value, WandbMode.offline.value):
        raise UserError(
            f"WANDB_MODE={chosen} does not go with tracking=wandb: expected online or "
            "offline (or set tracking=none)."
        )
    return WandbMode(chosen)


def wandb_mode(tracking: TrackingConfig) -> WandbMode:
    """The mode that a run will use, online or offline.

    Raises UserError for ``online`` without a login, and for a WANDB_MODE that is neither online
    nor offline.
    """
    mode = tracking.mode
    if mode is WandbMode.auto:
        mode = _automatic_mode()
    if mode is WandbMode.online and not wandb_login():
        raise UserError(
            "tracking.mode=online, but W&B finds no login: run `wandb login` or set "
            "WANDB_API_KEY, or set tracking.mode=offline."
        )
    return mode


class WeightsAndBiases:
    """One W&B run per stage, without console output; its files lie in ``<run directory>/wandb``."""

    def __init__(
        self,
        tracking: TrackingConfig,
        run_name: str,
        stage: str,
        config: Mapping[str, Any],
        directory: Path,
        resume: bool,
    ) -> None:
        """`config`: what W&B shows as the run's configuration, without secrets."""
        # vLLM imports clients of language-model services; W&B would then advertise its tracer.
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")
        import wandb

        self._wandb = wandb
        self._mode = wandb_mode(tracking)
        self._used: set[str] = set()
        self._home = directory / "wandb"
        self._home.mkdir(parents=True, exist_ok=True)
        options = {
            **self._names(tracking, run_name, stage),
            "id": self._run_id(resume),
            "dir": str(directory),
            "config": dict(config),
            "settings": wandb.Settings(silent=True, console="off"),
        }
        if self._mode is WandbMode.online and resume:
            # Offline runs of the same id are joined by W&B when they are synced.
            options["resume"] = "allow"
        self._run = self._start_or_go_offline(tracking, options)

    def _run_id(self, resume: bool) -> str:
        """The run's id at W&B; a resumed run keeps the one that it had."""
        id_file = self._home / RUN_ID_FILE
        if resume and id_file.exists():
            run_id = id_file.read_text(encoding="utf-8").strip()
        else:
            run_id = secrets.token_hex(4)
        id_file.write_text(run_id, encoding="utf-8")
        return run_id

    @staticmethod
    def _names(tracking: TrackingConfig, run_name: str, stage: str) -> dict[str, Any]:
        """The arguments of wandb.init that name the run, without secrets."""
        return {
            "project": redact("", tracking.project),
            "entity": redact("", tracking.entity),
            "group": redact("", tracking.group or run_name),
            "tags": redact("", list(tracking.tags)) or None,
            "name": redact("", f"{run_name}/{stage}"),
            "job_type": stage,
        }

    def _start_or_go_offline(self, tracking: TrackingConfig, options: Mapping[str, Any]) -> Any:
        try:
            return self._start(options)
        except self._wandb.errors.Error as error:
            if tracking.mode is WandbMode.online or self._mode is WandbMode.offline:
                raise UserError(
                    f"tracking=wandb could not start: {error}. Set tracking.mode=offline, or "
                    "tracking=none."
                ) from error
            # The user asked for `auto`, and the metrics are safe in files.
            LOG.warning(
                "W&B could not start online (%s); this run is tracked offline instead.", error
            )
            self._mode = WandbMode.offline
            # Without it W&B's service would take the id for that of a run that goes on.
            self._wandb.teardown()
            return self._start(options)

    def _start(self, options: Mapping[str, Any]) -> Any:
        with redacted_arguments():  # W&B records the command line
            if self._mode is WandbMode.online:
                return self._wandb.init(mode="online", **options)
            return self._wandb.init(mode="offline", **options)

    @property
    def sync_command(self) -> str | None:
        """What uploads an offline run, the parts before a resume included; None when online."""
        if self._mode is WandbMode.online:
            return None
        folders = sorted(self._home.glob("offline-run-*"))
        return "wandb sync " + " ".join(shlex.quote(str(folder)) for folder in folders)

    @property
    def identity(self) -> dict[str, Any]:
        """Where the run is, for those who read its manifest."""
        return {
            "project": self._run.project,
            "entity": self._run.entity or None,
            "run_id": self._run.id,
            "mode": self._mode.value,
        }

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        columns, cells = table_cells(rows)
        self._run.log({name: self._wandb.Table(columns=columns, data=cells)}, step=step)

    def images(self, paths: Sequence[Path]) -> None:
        self._run.log({f"plots/{path.stem}": self._wandb.Image(str(path)) for path in paths})

    def artifact(
        self,
        name: str,
        kind: str,
        files: Mapping[str, Path],
        metadata: Mapping[str, Any],
        alias: str,
    ) -> None:
        artifact = self._wandb.Artifact(name, type=kind, metadata=dict(metadata))
        for inside, path in files.items():
            # immutable and skip_cache: no second copy of the weights in the user's home
            artifact.add_file(str(path.resolve()), name=inside, policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=["latest", alias])

    def use(self, name: str, alias: str, run: Mapping[str, Any]) -> None:
        owner = [str(run[key]) for key in ("entity", "project") if run.get(key)]
        reference = "/".join([*owner, f"{name}:{alias}"])
        # W&B can't look an artifact up offline.
        if self._mode is WandbMode.offline or reference in self._used:
            return
        self._used.add(reference)
        try:
            self._run.use_artifact(reference)
        except (self._wandb.errors.Error, ValueError, OSError) as error:
            LOG.warning(
                "W&B does not know the artifact %s (%s): the lineage is in manifest.json only. "
                "Was its run synced?",
                reference,
                error,
            )

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        for name, value in summary.items():
            self._run.summary[name] = value
        self._run.finish(exit_code=exit_code)
