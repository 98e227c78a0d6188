"""``stage=gateway``: an OpenAI-compatible server before several served models, until SIGTERM or
Ctrl-C; and its feedback as rows for training.

``<run.dir>/<run.name>/gateway`` holds the key of the split, feedback.sqlite, and after an export
feedback/ with the rows and a manifest, by which later runs and the registry know where they come
from.
"""

import sys
from pathlib import Path
from typing import Any

from conf.run import RunConfig
from conf.serving import ArmConfig, GatewayAction, GatewayStage
from rlhf.process import distributed
from rlhf.process.http import bearer_token, is_loopback
from rlhf.process.libraries import require
from rlhf.process.listening import address, ignoring_signals, listen
from rlhf.registry.entries import REGISTRY_KEY
from rlhf.registry.names import split_name
from rlhf.registry.store import Registry
from rlhf.run import console
from rlhf.run.manifest import MANIFEST_FILE, Manifest, artifact_digest, read_manifest
from rlhf.stages.registered import registry_file
from rlhf.stages.taken import HasConfig, Options
from rlhf.types import UserError

FOLDER, ROWS = "gateway", "feedback"


def check(cfg: Options) -> list[str]:
    """The arms, the keys and the libraries will do. Raises UserError."""
    from rlhf.gateway.arms import made

    stage: GatewayStage = cfg.stage
    distributed.require_one_process("stage=gateway", "Run it without torchrun.")
    if stage.action is not GatewayAction.serve:
        if not _file(cfg.run).is_file():
            raise UserError(f"{_file(cfg.run)}: no such file, so no gateway has run here.")
        return []
    if not stage.arms:
        raise UserError(
            "stage.arms is empty: expected at least one arm, such as "
            "'+stage.arms.first={url: \"http://127.0.0.1:8000\", model: mine}'."
        )
    for library in ("starlette", "uvicorn"):
        require(library, "serve")
    for name, arm in stage.arms.items():
        made(name, fields_of(arm))
        if arm.version is not None:
            Registry(registry_file(cfg.run, stage.registry)).close()
            split_name(arm.version, f"stage.arms.{name}.version")
    for key in ("token_env", "operator_env"):
        variable = getattr(stage, key)
        if variable is not None:
            bearer_token(variable, f"stage.{key}")
        elif not is_loopback(stage.host):
            raise UserError(
                f"stage.host={stage.host} needs stage.{key}, the name of an environment variable "
                "with a key: other machines reach the gateway there."
            )
    return []


def _folder(run: RunConfig) -> Path:
    return Path(run.dir).expanduser() / run.name / FOLDER


def _file(run: RunConfig) -> Path:
    from rlhf.gateway.store import FILE

    return _folder(run) / FILE


def fields_of(arm: ArmConfig) -> dict[str, Any]:
    """An arm's options as the gateway reads them."""
    return {
        "url": arm.url,
        "model": arm.model,
        "weight": arm.weight,
        "token_env": arm.token_env,
        "version": arm.version,
    }


def run(ctx: HasConfig) -> None:
    """Do what stage.action says. Raises UserError."""
    stage = ctx.cfg.stage_as(GatewayStage)
    match stage.action:
        case GatewayAction.serve:
            _serve(ctx, stage)
        case GatewayAction.export:
            _export(ctx.cfg.run, stage)
        case GatewayAction.forget:
            _forget(ctx.cfg.run, str(stage.user))


# ---- serve ----


def _serve(ctx: HasConfig, stage: GatewayStage) -> None:
    import uvicorn

    from rlhf.gateway.build import Keys, build
    from rlhf.gateway.store import alone

    cfg = ctx.cfg
    keys = Keys.of(stage.token_env, stage.operator_env)
    folder = _folder(cfg.run)
    with alone(folder), listen(stage.host, stage.port) as listener:
        listener.listen()
        arms = {name: fields_of(arm) for name, arm in stage.arms.items()}
        registry = registry_file(cfg.run, stage.registry)
        app = build(stage, arms, folder, registry, stage.model_name or cfg.run.name, keys)
        _announce(f"{address(listener)}", stage, keys)
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=30,
        )
        with ignoring_signals():
            uvicorn.Server(config).run(sockets=[listener])
    print("gateway: stopped", flush=True)


def _announce(url: str, stage: GatewayStage, keys: Any) -> None:
    """Print where the gateway is; keys that were made appear here and nowhere else."""
    figures = {
        "arms": ", ".join(stage.arms),
        "url": f"export OPENAI_BASE_URL={url}/v1",
        "key": _shown(stage.token_env, f"export OPENAI_API_KEY={keys.client}"),
        "operator": f"{url}/operator",
        "its key": _shown(stage.operator_env, keys.operator),
    }
    console.closing_panel(f"gateway: ready at {url}, Ctrl-C stops it", figures, {}, None)


def _shown(variable: str | None, made: str) -> str:
    return made if variable is None else f"in the environment variable {variable}"


# ---- rows ----


def _export(run: RunConfig, stage: GatewayStage) -> None:
    """Write the feedback with consent as rows, and say aloud what became of it."""
    from rlhf.gateway import export

    folder = _folder(run)
    found = export.export(_file(run), folder / ROWS, stage.names)
    if not found.files:
        raise UserError(
            f"{_file(run)} holds no feedback with consent that makes a row. "
            f"Left out: {dict(found.rows.left) or 'nothing'}."
        )
    registry = registry_file(run, stage.registry)
    _write_manifest(folder / ROWS, found, registry, run.seed)
    console.table(export.table(found), title="Feedback as rows")
    for line in export.told(found):
        print(line)


def _write_manifest(folder: Path, found: Any, registry: Path, seed: int) -> None:
    """manifest.json: the versions that were judged, and the files with their hashes."""
    manifest = Manifest.start(
        folder,
        stage="gateway",
        seed=seed,
        argv=sys.argv[1:],
        resume_from=None,
        earlier=read_manifest(folder) or {},
        keep_entries=False,
    )
    for label in found.rows.versions:
        manifest.add("parents", _parent(label, registry))
    files = [manifest.describe(path) for path in found.files.values()]
    artifact: dict[str, Any] = {
        "name": "feedback",
        "kind": "dataset",
        "files": files,
        "metadata": {"rows": {name: len(rows) for name, rows in found.rows.files.items()}},
    }
    artifact["digest"] = artifact_digest(artifact)
    manifest.add("artifacts", artifact)
    assert (folder / MANIFEST_FILE).is_file()


def _parent(label: str, registry: Path) -> dict[str, Any]:
    """A version as an entry of a manifest."""
    entry: dict[str, Any] = {"kind": "policy", "path": label, "summary_sha256": None}
    name, at, number = label.partition("@")
    if not at or not registry.is_file():
        return entry
    with Registry(registry) as known:
        draft = known.version(name, number).draft
    entry |= {"path": draft.path, REGISTRY_KEY: [label]}
    return entry if draft.weights is None else {**entry, "weights": draft.weights}


def _forget(run: RunConfig, user: str) -> None:
    """Delete all that is kept of a user. Raises UserError while a gateway runs: it has answers in
    memory too.
    """
    from rlhf.gateway.export import forget
    from rlhf.gateway.store import alone

    with alone(_folder(run)):
        gone = forget(_folder(run), user)
    shown = ", ".join(f"{count} {table}" for table, count in gone.items())
    print(f"gateway: deleted of the user: {shown}")
