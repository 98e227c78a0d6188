"""``/labels``: exports for people to label, a link for each annotator, and what came back.
``/annotate/TOKEN`` is an annotator's own page, which opens nothing else.
"""

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from rlhf.board import asked
from rlhf.board.app import Place
from rlhf.board.labelling import MOST, Annotator, Desk, by_token, exports, kept_labels, save
from rlhf.board.paths import in_address, run_link, run_named
from rlhf.board.rendering import language_of, page, translator
from rlhf.board.units import time_text
from rlhf.cli.writing import override
from rlhf.labels.targets import page as label_page
from rlhf.types import UserError


def routes(place: Place) -> Sequence[BaseRoute]:
    """``/labels``, ``/labels/RUN/STAGE``, ``/annotate/TOKEN``."""

    def listing(request: Request) -> Response:
        rows = [(known, _link(known.run, known.stage)) for known in exports(place.runs)]
        return page(request, "labels.html", exports=rows, time_text=time_text)

    def desk_of(request: Request) -> Desk:
        return Desk(place, run_named(request), request.path_params["stage"])

    def one(request: Request) -> Response:
        return _one(request, desk_of(request))

    async def add(request: Request) -> Response:
        given = await asked.fields(request)
        return await run_in_threadpool(_add, request, desk_of, given)

    def renew(request: Request) -> Response:
        desk = desk_of(request)
        desk.renew(request.path_params["number"])
        return RedirectResponse(_link(desk.run, desk.stage), 303)

    def take_in(request: Request) -> Response:
        return _import(request, place, desk_of(request))

    def annotate(request: Request) -> Response:
        return _annotate(*by_token(place, request.path_params["token"]))

    async def keep(request: Request) -> Response:
        text = await asked.body(request, MOST)
        token = request.path_params["token"]
        known = request.query_params.get("known", "")
        return await run_in_threadpool(_keep, place, token, text, known)

    return [
        Route("/labels", listing),
        Route("/labels/{run}/{stage}", one),
        Route("/labels/{run}/{stage}/annotators", add, methods=["POST"]),
        Route("/labels/{run}/{stage}/renew/{number:int}", renew, methods=["POST"]),
        Route("/labels/{run}/{stage}/import", take_in, methods=["POST"]),
        Route("/annotate/{token}", annotate),
        Route("/annotate/{token}", keep, methods=["POST"]),
    ]


def _link(run: str, stage: str) -> str:
    return f"/labels/{in_address(run)}/{quote(stage, safe='')}"


# ---- the owner's page ----


def _one(request: Request, desk: Desk, name: str = "", error: str | None = None) -> Response:
    annotators = desk.annotators()
    base = f"{request.url.scheme}://{request.headers['host']}"
    return page(
        request,
        "labels_one.html",
        422 if error else 200,
        desk=desk,
        link=_link(desk.run, desk.stage),
        annotators=annotators,
        base=base,
        total=len(desk.export.tasks),
        labelled=sum(annotator.labels for annotator in annotators),
        time_text=time_text,
        given=name,
        error=error,
    )


def _add(request: Request, desk_of: Any, given: dict[str, str]) -> Response:
    desk = desk_of(request)
    name = given.get("name", "")
    try:
        desk.add(name)
    except ValueError as error:
        t = translator(language_of(request))
        return _one(request, desk, name, t(str(error)))
    return RedirectResponse(_link(desk.run, desk.stage), 303)


def _import(request: Request, place: Place, desk: Desk) -> Response:
    """Start stage=label label.mode=import with the files of all annotators."""
    if not any(annotator.labels for annotator in desk.annotators()):
        t = translator(language_of(request))
        return _one(request, desk, error=t("labels.import.none"))
    overrides = [
        "stage=label",
        "label.mode=import",
        override("run.name", desk.run),
        override("run.dir", str(place.runs)),
        override("label.export", str(place.runs / desk.run / desk.stage)),
        override("label.files", [f"{desk.files}/*.json"]),
    ]
    place.jobs.submit(overrides, title=f"label: {desk.run}", run=desk.run, stage="labels")
    return RedirectResponse(run_link(desk.run, "labels"), 303)


# ---- the annotator's page ----


def _annotate(desk: Desk, annotator: Annotator) -> Response:
    served = label_page.Served(
        annotator.name, annotator.link, kept_labels(desk.file(annotator.number))
    )
    text = label_page.render(desk.export, served)
    policy = f"{label_page.policy(served)}; frame-ancestors 'none'"
    return HTMLResponse(text, headers={"content-security-policy": policy})


def _keep(place: Place, token: str, text: bytes, known: str) -> Response:
    desk, annotator = by_token(place, token)
    try:
        kept = save(desk, annotator, text, known)
    except UserError as error:
        return JSONResponse({"error": str(error)}, 422)
    if kept is not None:
        return JSONResponse({"kept": kept}, 409)
    return JSONResponse({})
