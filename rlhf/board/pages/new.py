"""``/new``: what can be started. ``/new/<stage>``: its form beside the command and the file that it
stands for, the look before a start, the start.
"""

import functools
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from conf.stages import FAMILIES, ServeStage
from rlhf.board.app import Place
from rlhf.board.forms import rows, standing
from rlhf.board.forms.basic import stages
from rlhf.board.forms.costs import costs
from rlhf.board.forms.filling import Filled, fill, place_problem
from rlhf.board.forms.looking import Look, look
from rlhf.board.forms.offers import offers
from rlhf.board.forms.values import Problem
from rlhf.board.forms.view import View, preview, summaries
from rlhf.board.paths import run_link
from rlhf.board.rendering import language_of, page, translator
from rlhf.board.runs.pace import Estimate, estimate, work_of
from rlhf.cli import presets
from rlhf.run.console import duration
from rlhf.run.directory import run_directory

_MOST_BYTES = 4 << 20  # of a form
_MOST_FIELDS = 50_000
_KEY = "BOARD_SERVE_KEY"  # the environment variable of a server with its key
_KEPT = 200  # checks that can still be started
_FOLDER, _FILE = "experiments", "mine"  # where the page proposes to save the YAML

Sent = dict[str, list[str]]


@dataclass(frozen=True)
class Checked:
    """What a dry run has looked at, and what a start would run."""

    stage: str
    overrides: Sequence[str]
    run: str
    folder: str  # of the stage in the run's directory
    work: Mapping[str, Any] | None  # what it has to do, where the dry run said so
    serves: ServeStage | None  # of stage=serve, which writes no run directory


def routes(place: Place) -> Sequence[BaseRoute]:
    """``/new`` and what is below it."""
    return Pages(place).routes()


class Pages:
    """The pages of one board; it keeps what was checked until it is started."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._checked: OrderedDict[str, Checked] = OrderedDict()

    def routes(self) -> list[BaseRoute]:
        """The routes."""
        return [
            Route("/new", _list),
            Route("/new/{stage}", self._show),
            Route("/new/{stage}", self._again, methods=["POST"]),
            Route("/new/{stage}/preview", self._preview, methods=["POST"]),
            Route("/new/{stage}/check", self._check, methods=["POST"]),
            Route("/new/{stage}/start", self._start, methods=["POST"]),
            # the way back of a choice of language
            Route("/new/{stage}/{step:str}", _to_form),
        ]

    def _show(self, request: Request) -> Response:
        stage = _stage_of(request)
        sent = _as_lists(request.query_params.multi_items())
        return self._form(request, fill(self._place, stage, sent))

    async def _again(self, request: Request) -> Response:
        stage, sent = _stage_of(request), await _sent(request)
        action = sent.pop("do", ["show"])[-1]
        removed = action.removeprefix("remove:")
        if removed != action:
            sent = {name: value for name, value in sent.items() if not _is_of(name, removed)}
        filled = await run_in_threadpool(fill, self._place, stage, sent)
        added = action.removeprefix("add:")
        if added != action:
            _add_row(filled, added)
        opened = action.partition(":")[2]
        return self._form(request, filled, opened=opened)

    async def _preview(self, request: Request) -> Response:
        stage, sent = _stage_of(request), await _sent(request)
        filled = await run_in_threadpool(fill, self._place, stage, sent)
        language = language_of(request)
        t = translator(language)
        shown = self._stands(filled)
        shown["errors"] = preview(View(filled, language, t), t)
        return JSONResponse(shown)

    async def _check(self, request: Request) -> Response:
        stage, sent = _stage_of(request), await _sent(request)
        filled = await run_in_threadpool(fill, self._place, stage, sent)
        if not filled.is_whole:
            return self._form(request, filled, 422)
        found = await run_in_threadpool(look, filled.overrides)
        if found.error is not None:
            place_problem(filled, found.error)
            return self._form(request, filled, 422, warnings=found.warnings)
        return self._pass(request, filled, found, sent)

    def _pass(self, request: Request, filled: Filled, found: Look, sent: Sent) -> Response:
        cfg = filled.cfg
        assert cfg is not None
        directory = run_directory(cfg)
        key = secrets.token_urlsafe(16)
        stage = filled.form.stage
        work = work_of(found.facts)
        serves = cfg.stage if isinstance(cfg.stage, ServeStage) else None
        self._checked[key] = Checked(
            stage, filled.overrides, cfg.run.name, directory.name, work, serves
        )
        while len(self._checked) > _KEPT:
            self._checked.popitem(last=False)
        return page(
            request,
            "checked.html",
            stage=stage,
            warnings=found.warnings,
            facts=_NO_FACTS | dict(found.facts),
            costs=costs(cfg),
            takes=self._takes(work),
            command=standing.command(filled.overrides),
            checked=key,
            duration=duration,
            sent=[(name, value) for name, values in sent.items() for value in values],
        )

    def _takes(self, work: Mapping[str, Any] | None) -> Estimate | None:
        """How long it may take, where an earlier run tells."""
        if work is None:
            return None
        return estimate(work, self._place.jobs.jobs(), self._place.runs)

    async def _start(self, request: Request) -> Response:
        stage, sent = _stage_of(request), await _sent(request)
        checked = self._checked.pop(sent.get("checked", [""])[-1], None)
        if checked is None or checked.stage != stage:
            filled = await run_in_threadpool(fill, self._place, stage, {})
            filled.top.append(Problem("forms.again"))
            return self._form(request, filled, 422)
        title = f"{stage}: {checked.run}"
        if checked.serves is not None:
            return await run_in_threadpool(self._serve, request, checked, checked.serves, title)
        await run_in_threadpool(
            self._place.jobs.submit,
            checked.overrides,
            title=title,
            run=checked.run,
            stage=checked.folder,
            work=checked.work,
        )
        return RedirectResponse(run_link(checked.run, checked.folder), 303)

    def _serve(
        self, request: Request, checked: Checked, served: ServeStage, title: str
    ) -> Response:
        """Start a server with a key that this answer alone holds."""
        key = secrets.token_urlsafe(32)
        argv = [*checked.overrides, f"stage.token_env={_KEY}"]
        job = self._place.jobs.submit(argv, title=title, run=None, stage=None, secret={_KEY: key})
        return page(
            request,
            "served.html",
            title=title,
            names=[served.model_name or checked.run, *served.adapters],
            url=f"http://{served.host}:{served.port}/v1" if served.port else None,
            key=key,
            job=f"/jobs/{job.id}",
        )

    def _stands(self, filled: Filled) -> dict[str, str]:
        """The command and the file; empty where something stands against them."""
        folder = self._place.runs / _FOLDER
        shown = dict.fromkeys(("command", "yaml", "file_command"), "")
        if filled.overrides:
            stage, runs = filled.form.stage, self._place.runs
            shown["command"] = standing.command(filled.overrides)
            shown["yaml"] = standing.experiment(stage, filled.presets, filled.changed, runs)
            shown["file_command"] = standing.command_of_file(stage, folder, _FILE)
        return shown

    def _form(
        self,
        request: Request,
        filled: Filled,
        status: int = 200,
        *,
        warnings: Sequence[str] = (),
        opened: str = "",
    ) -> Response:
        stage, language = filled.form.stage, language_of(request)
        t = translator(language)
        view = View(filled, language, t)
        return page(
            request,
            "new.html",
            status,
            stage=stage,
            summary=presets.summary("stage", stage),
            view=view,
            here=f"/new/{stage}",
            chosen=filled.presets.chosen,
            taken=filled.is_taken,
            unknown=filled.unknown,
            warnings=warnings,
            summaries=functools.partial(summaries, language=language),
            offers=offers(self._place.runs, self._place.uploads),
            open=opened.partition(".")[0],
            errors=preview(view, t),
            file=str(self._place.runs / _FOLDER / "experiment" / f"{_FILE}.yaml"),
            **self._stands(filled),
        )


# What a dry run writes of a stage that trains; a stage that doesn't has none of it.
_NO_FACTS: dict[str, Any] = {"figures": None, "memory": None, "previews": ()}


def _list(request: Request) -> Response:
    families = []
    for family, schemas in FAMILIES.items():
        members = [name for name in stages() if presets.stage_schema(name) in schemas]
        if members:
            summary = [(name, presets.summary("stage", name)) for name in members]
            families.append((family, summary))
    return page(request, "new_list.html", families=families)


def _to_form(request: Request) -> Response:
    return RedirectResponse(f"/new/{_stage_of(request)}", 303)


def _stage_of(request: Request) -> str:
    stage = str(request.path_params["stage"])
    if stage not in stages():
        raise HTTPException(404)
    return stage


async def _sent(request: Request) -> Sent:
    """The fields of a form. Raises HTTPException for one that is too large."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            raise HTTPException(413)
    text = body.decode("utf-8", "replace")
    try:
        pairs = parse_qsl(text, keep_blank_values=True, max_num_fields=_MOST_FIELDS)
    except ValueError as error:
        raise HTTPException(413) from error
    return _as_lists(pairs)


def _as_lists(pairs: Sequence[tuple[str, str]]) -> Sent:
    result: Sent = {}
    for name, value in pairs:
        result.setdefault(name, []).append(value)
    return result


def _is_of(name: str, row: str) -> bool:
    return name == row or name.startswith(f"{row}.")


def _add_row(filled: Filled, key: str) -> None:
    for each in filled.form.options:
        if each.key == key and each.widget in rows.ROWS:
            filled.rows[key].append(rows.blank(each))
