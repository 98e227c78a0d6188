"""``/data``: files of rows: sent here, looked at, and what can be trained on them."""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from rlhf.board.app import Place
from rlhf.board.forms.allowed import is_within
from rlhf.board.looking import LIMIT_S, look
from rlhf.board.paths import (
    NotHere,
    folders_of,
    in_address,
    run_directories,
    run_link,
    run_named,
    stage_file,
    upload,
)
from rlhf.board.registry import models
from rlhf.board.rendering import language_of, page, translator
from rlhf.board.units import size_text, time_text
from rlhf.board.uploads import TOGETHER, Refused, receive, used
from rlhf.cli.writing import override
from rlhf.data.opening import endings, kind_of
from rlhf.types import UserError

_LOOKS = ".looks"  # in the uploads: what was found in each file
REPORT = "report.html"
# What rows of each use can train.
STAGES = {
    "sft": ("sft",),
    "preference": ("reward", "dpo"),
    "unpaired": ("kto",),
    "prompt": ("ppo", "grpo"),
}
# A report is a file of its own: its style stands in it, and nothing in it runs.
_REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"


@dataclass(frozen=True, slots=True)
class _Row:
    """A file in the list."""

    name: str
    link: str
    size: str
    time: str
    held: dict[str, Any] | None  # what was found in it, where somebody looked


@dataclass(frozen=True, slots=True)
class _Report:
    run: str
    stage: str
    link: str
    time: str


def routes(place: Place) -> Sequence[BaseRoute]:
    """``/data``, ``/data/file/NAME`` with its deletion, ``/data/report/RUN/STAGE``."""

    async def files(request: Request) -> Response:
        return await run_in_threadpool(_listing, request, place, None)

    async def send(request: Request) -> Response:
        return await _receive(request, place)

    def one(request: Request) -> Response:
        return _one(request, place, upload(place, request.path_params["name"]))

    def ask(request: Request) -> Response:
        path = upload(place, request.path_params["name"])
        return page(request, "data_delete.html", name=path.name, link=_link(path.name))

    def delete(request: Request) -> Response:
        path = upload(place, request.path_params["name"])
        path.unlink(missing_ok=True)
        _look_file(path).unlink(missing_ok=True)
        return RedirectResponse("/data", 303)

    def begin_report(request: Request) -> Response:
        return _begin_report(place, upload(place, request.path_params["name"]))

    def report(request: Request) -> Response:
        path = stage_file(place, run_named(request), request.path_params["stage"], REPORT)
        headers = {"content-security-policy": _REPORT_POLICY}
        return FileResponse(path, media_type="text/html", headers=headers)

    return [
        Route("/data", files),
        Route("/data", send, methods=["POST"]),
        Route("/data/file/{name}", one),
        Route("/data/file/{name}/delete", ask),
        Route("/data/file/{name}/delete", delete, methods=["POST"]),
        Route("/data/file/{name}/report", begin_report, methods=["POST"]),
        Route("/data/report/{run}/{stage}", report),
    ]


# ---- sending ----


async def _receive(request: Request, place: Place) -> Response:
    """Keep the file, and show it; or the list, with what is wrong."""
    try:
        kind = request.headers.get("content-type", "")
        path = await receive(kind, request.stream(), place.uploads, place.upload_bytes)
    except ClientDisconnect:  # nobody reads the answer
        refused = Refused(400, "data.refused.torn")
    except Refused as error:
        refused = error
    else:
        return RedirectResponse(_link(path.name), 303)
    return await run_in_threadpool(_listing, request, place, refused)


def _listing(request: Request, place: Place, refused: Refused | None) -> Response:
    return page(
        request,
        "data.html",
        refused.status if refused else 200,
        files=_files(place),
        reports=_reports(place.runs),
        refused=refused,
        most=place.upload_bytes >> 20,
        together=size_text(TOGETHER * place.upload_bytes),
        used=size_text(used(place.uploads)),
        endings=endings(),
    )


def _files(place: Place) -> list[_Row]:
    """The uploads, the newest first."""
    found = []
    for path in place.uploads.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # deleted in between
            if path.is_file() and kind_of(path) and not path.name.startswith("."):
                found.append((path.stat(), path))
    found.sort(key=lambda pair: pair[0].st_mtime, reverse=True)
    return [
        _Row(
            path.name,
            _link(path.name),
            size_text(state.st_size),
            time_text(state.st_mtime),
            _kept_look(path),
        )
        for state, path in found
    ]


def _reports(runs: Path) -> list[_Report]:
    """The reports of stage=data, the newest first."""
    found = []
    for run, stage, folder in run_directories(runs):
        if (folder / REPORT).is_file():
            found.append(((folder / REPORT).stat().st_mtime, run, stage))
    out = []
    for at, run, stage in sorted(found, reverse=True):
        out.append(_Report(run, stage, report_link(run, stage), time_text(at)))
    return out


def _link(name: str) -> str:
    return f"/data/file/{quote(name, safe='')}"


# ---- one file ----


def _one(request: Request, place: Place, path: Path) -> Response:
    """What the file holds, as the model of the query reads it where there is one."""
    model = request.query_params.get("model", "").strip() or None
    held: dict[str, Any] = {}
    problem = None
    try:
        if model is not None and not is_within("model.path", model, folders_of(place)):
            t = translator(language_of(request))
            raise UserError(t("forms.error.outside", text=model))
        held = _look(path, model)
    except UserError as error:
        problem = str(error)
        if model is not None:
            with contextlib.suppress(UserError):
                held = _look(path, None)
    return page(
        request,
        "data_file.html",
        422 if problem else 200,
        name=path.name,
        path_text=str(path),
        link=_link(path.name),
        size=size_text(path.stat().st_size),
        held=held,
        problem=problem,
        model=model or "",
        known=[str(made.path) for made in models(place.runs)],
        ways=_ways(path, held),
        prepare="/new/data?" + urlencode({"data.path": str(path)}),
        limit=int(LIMIT_S),
    )


def _begin_report(place: Place, path: Path) -> Response:
    """Start stage=data data.report=true on a file, in a run of its own; its page leads to the
    report.
    """
    stem = re.sub(r"[^\w.-]", "-", path.stem).strip(".")[:50]
    name, number = f"report-{stem}", 1
    while (place.runs / name).exists() or place.jobs.of_run(name, "data") is not None:
        number += 1
        name = f"report-{stem}-{number}"
    overrides = [
        "stage=data",
        override("run.name", name),
        override("run.dir", str(place.runs)),
        override("data.path", str(path)),
        "data.report=true",
        "tracking=none",
    ]
    place.jobs.submit(overrides, title=f"data: {name}", run=name, stage="data")
    return RedirectResponse(run_link(name, "data"), 303)


def report_link(run: str, stage: str) -> str:
    """The address of a report of stage=data."""
    return f"/data/report/{in_address(run)}/{quote(stage, safe='')}"


def _ways(path: Path, held: dict[str, Any]) -> list[tuple[str, str]]:
    """What the file's rows can train: a stage and the link to its form each; what the rows are by
    themselves comes first.
    """
    uses = [use["use"] for use in held.get("uses", []) if use["rows"]]
    uses.sort(key=lambda use: use != held.get("natural"))
    query = urlencode({"data.path": str(path)})
    stages = [stage for use in uses for stage in STAGES[use]]
    return [(stage, f"/new/{stage}?{query}") for stage in stages]


def _look(path: Path, model: str | None) -> dict[str, Any]:
    """What is in the file. Raises UserError."""
    if model is None:
        kept = _kept_look(path)
        if kept is not None:
            return kept
    mark = _mark(path)
    held = look(path, model)
    if model is None:
        kept_file = _look_file(path)
        kept_file.parent.mkdir(exist_ok=True)
        beside = kept_file.with_suffix(".part")
        beside.write_text(json.dumps({"mark": mark, "held": held}), encoding="utf-8")
        beside.replace(kept_file)
    return held


def _look_file(path: Path) -> Path:
    return path.parent / _LOOKS / f"{path.name}.json"


def _mark(path: Path) -> list[int]:
    """Tells one content of a file from another."""
    try:
        state = path.stat()
    except FileNotFoundError as gone:
        raise NotHere from gone
    return [state.st_size, state.st_mtime_ns]


def _kept_look(path: Path) -> dict[str, Any] | None:
    """What an earlier look found, where the file is still the same."""
    try:
        content = json.loads(_look_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    held = content.get("held")
    return held if content.get("mark") == _mark(path) and isinstance(held, dict) else None
