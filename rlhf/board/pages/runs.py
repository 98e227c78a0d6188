"""All runs: list, search, curves of several side by side, deletion."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from rlhf.board.app import Place
from rlhf.board.paths import NotHere, in_address, run_folder, run_named, stage_folder
from rlhf.board.rendering import language_of, page, translator
from rlhf.board.runs import deletion, drawing, pictures
from rlhf.board.runs.listing import LOOKS, Runs, Stage, search
from rlhf.board.runs.metrics import Readers, Series
from rlhf.board.units import folder_bytes, size_text, time_text
from rlhf.run.console import HEADLINES, duration
from rlhf.run.tracking.files import METRICS_FILE
from rlhf.types import UserError

A_PAGE = 100  # stages
COMPARED = drawing.LINES  # runs in one picture
_FIRST = [name for _, names in HEADLINES for name in names]  # metrics worth a first look


def delete_link(run: str) -> str:
    """The address of the page that asks before it deletes a run."""
    return f"/runs-delete/{in_address(run)}"


def shown(stage: Stage, t: Any) -> dict[str, Any]:
    """A stage as a row of the list."""
    figures = [f"{t('figure.' + label)} {value:.4g}" for label, value in stage.headlines()]
    return {
        "stage": stage,
        "look": LOOKS[stage.state],
        "state": t("state." + stage.state),
        "steps": "" if stage.steps is None else str(stage.steps),
        "time": "" if stage.seconds is None else duration(stage.seconds),
        "figures": "  ".join(figures),
        "changed": time_text(stage.changed),
        "delete": delete_link(stage.run),
    }


class _Pages:
    def __init__(self, place: Place) -> None:
        self.place = place
        self.runs = Runs(place)
        self.readers = Readers()

    # ---- the list ----

    def overview(self, request: Request) -> Response:
        """``/runs``"""
        t = translator(language_of(request))
        words = request.query_params.get("q", "")
        found = self._found(words, t)
        pages = max(1, -(-len(found) // A_PAGE))
        number = min(max(1, _number(request.query_params.get("page", "1"))), pages)
        part = found[(number - 1) * A_PAGE : number * A_PAGE]
        query = urlencode({"q": words})
        others = [job for job in self.place.jobs.jobs() if job.run is None or job.stage is None]
        return page(
            request,
            "runs.html",
            rows=[shown(stage, t) for stage in part],
            words=words,
            count=len(found),
            number=number,
            pages=pages,
            query=query,
            live="/runs-live?" + urlencode({"q": words, "page": number}),
            over=bool(self.place.jobs.over()),
            jobs=[(job, LOOKS[job.state], time_text(job.created)) for job in others[:20]],
        )

    def live(self, request: Request) -> Response:
        """``/runs-live``: what changes in the list."""
        t = translator(language_of(request))
        found = self._found(request.query_params.get("q", ""), t)
        number = max(1, _number(request.query_params.get("page", "1")))
        fields: dict[str, Any] = {}
        for stage in found[(number - 1) * A_PAGE : number * A_PAGE]:
            row = shown(stage, t)
            for name in ("state", "steps", "time", "figures", "changed"):
                fields[f"{stage.id}:{name}"] = row[name]
        fields["ended"] = not any(stage.is_live for stage in found)
        return JSONResponse(fields)

    def _found(self, words: str, t: Any) -> list[Stage]:
        return search(self.runs.stages(), words, {state: t("state." + state) for state in LOOKS})

    # ---- several side by side ----

    def compare(self, request: Request) -> Response:
        """``/runs-compare?run=a/sft&run=b/sft&metric=loss``"""
        t = translator(language_of(request))
        asked = request.query_params.getlist("run")
        chosen = self._chosen(asked)
        series = {name: self.readers.of(path).series() for name, path in chosen.items()}
        metrics = sorted({metric for held in series.values() for metric in held})
        metric = request.query_params.get("metric", "")
        if metric not in metrics:
            metric = next((name for name in _FIRST if name in metrics), "".join(metrics[:1]))
        lines = _lines(series, metric)
        names = [("run", name) for name in chosen]
        return page(
            request,
            "compare.html",
            chosen=list(chosen),
            metrics=metrics,
            metric=metric,
            left_out=max(0, len(asked) - COMPARED),
            most=COMPARED,
            source="/runs-compare.svg?" + urlencode([*names, ("metric", metric)]),
            alt=pictures.alternative(metric, lines, t),
            names=list(lines),
            rows=pictures.table(lines),
        )

    def picture(self, request: Request) -> Response:
        """``/runs-compare.svg``"""
        chosen = self._chosen(request.query_params.getlist("run"))
        metric = request.query_params.get("metric", "")
        series = {name: self.readers.of(path).series() for name, path in chosen.items()}
        return svg(request, _lines(series, metric), metric, "")

    def _chosen(self, ids: Sequence[str]) -> dict[str, Any]:
        """The metrics.jsonl of the stages that were ticked. Raises NotHere."""
        out = {}
        for id in list(dict.fromkeys(ids))[:COMPARED]:
            run, slash, stage = id.rpartition("/")
            if not slash:
                raise NotHere
            out[id] = stage_folder(self.place, run, stage) / METRICS_FILE
        return out

    # ---- deletion ----

    def ask(self, request: Request) -> Response:
        """``/runs-delete/<run>``: the page that asks."""
        return self._ask(request, None, 200)

    def _ask(self, request: Request, problem: str | None, status: int) -> Response:
        run = run_named(request)
        folder = run_folder(self.place, run)
        own = self._stages_in(folder)
        return page(
            request,
            "delete.html",
            status,
            run=run,
            folder=str(folder),
            size=size_text(folder_bytes(folder)),
            stages=[stage.folder.relative_to(folder).as_posix() for stage in own],
            problem=problem,
        )

    def delete(self, request: Request, form: FormData) -> Response:
        """The same, ticked and sent."""
        folder = run_folder(self.place, run_named(request))
        if form.get("confirm") != "yes":
            t = translator(language_of(request))
            return self._ask(request, t("runs.delete.tick"), 422)
        try:
            deletion.delete(self.place, folder, self._stages_in(folder))
        except UserError as error:
            return self._ask(request, str(error), 422)
        return RedirectResponse("/runs", 303)

    def _stages_in(self, folder: Path) -> Sequence[Stage]:
        """The stages that go with a folder: of its run, and of runs below it."""
        return [stage for stage in self.runs.stages() if folder in stage.folder.parents]


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 1


def _lines(series: Mapping[str, Mapping[str, Series]], metric: str) -> dict[str, Series]:
    """A metric of several runs, by their names."""
    return {name: held[metric] for name, held in series.items() if metric in held}


def svg(request: Request, series: Mapping[str, Series], title: str, unit: str) -> Response:
    """A picture of series."""
    t = translator(language_of(request))
    text = drawing.draw(
        series, title=title, unit=unit, steps=t("runs.step"), empty=t("runs.curve.empty")
    )
    headers = {"content-security-policy": drawing.POLICY}
    return Response(text, media_type="image/svg+xml", headers=headers)


def routes(place: Place) -> Sequence[BaseRoute]:
    """``/runs``, ``/runs-compare`` and ``/runs-delete``."""
    pages = _Pages(place)

    async def delete(request: Request) -> Response:
        from starlette.concurrency import run_in_threadpool

        return await run_in_threadpool(pages.delete, request, await request.form())

    return [
        Route("/runs", pages.overview),
        Route("/runs-live", pages.live),
        Route("/runs-compare", pages.compare),
        Route("/runs-compare.svg", pages.picture),
        Route("/runs-delete/{run}", pages.ask),
        Route("/runs-delete/{run}", delete, methods=["POST"]),
    ]
