"""A job by itself: its output whole, stopping it, and the page of one that writes no run
directory.
"""

from collections.abc import Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from rlhf.board.app import Place
from rlhf.board.jobs.records import OUTPUT_FILE
from rlhf.board.jobs.store import Job
from rlhf.board.paths import NotHere, run_link
from rlhf.board.rendering import language_of, page, translator
from rlhf.board.runs import facts, output
from rlhf.board.runs.listing import LOOKS
from rlhf.board.units import folder_bytes, size_text, time_text


def target(job: Job) -> str:
    """The page of a job: of the run directory that it writes, or its own."""
    if job.run is None or job.stage is None:
        return f"/jobs/{job.id}"
    return run_link(job.run, job.stage)


class _Pages:
    def __init__(self, place: Place) -> None:
        self.place = place

    def _job(self, request: Request) -> Job:
        try:
            return self.place.jobs.job(request.path_params["id"])
        except KeyError:
            raise NotHere from None

    def show(self, request: Request) -> Response:
        """``/jobs/<id>``"""
        job = self._job(request)
        if job.run is not None and job.stage is not None:
            return RedirectResponse(target(job), 303)
        t = translator(language_of(request))
        return page(
            request,
            "job.html",
            job=job,
            look=LOOKS[job.state],
            created=time_text(job.created),
            command=facts.command(job.argv),
            live=self._live(job, t),
        )

    def live(self, request: Request) -> Response:
        """``/jobs/<id>/live``"""
        return JSONResponse(self._live(self._job(request), translator(language_of(request))))

    def _live(self, job: Job, t: Any) -> dict[str, Any]:
        log = output.tail(self.place.jobs, job)
        return {
            "state": t("state." + job.state),
            "log": log,
            "problem": output.problem(log) if job.state == "failed" else "",
            "ended": not job.is_active,
        }

    def ask_to_forget(self, request: Request) -> Response:
        """``/jobs-over``: jobs that have ended and that no run's page shows."""
        jobs = self.place.jobs.over()
        size = size_text(sum(folder_bytes(job.folder) for job in jobs))
        rows = [(job, time_text(job.created)) for job in jobs]
        return page(request, "jobs_over.html", rows=rows, size=size)

    def forget(self, request: Request, form: FormData) -> Response:
        """The same, sent with the jobs that it showed: none that ended since goes with them."""
        asked = {str(id) for id in form.getlist("job")}
        self.place.jobs.forget([job for job in self.place.jobs.over() if job.id in asked])
        return RedirectResponse("/runs", 303)

    def log(self, request: Request) -> Response:
        """``/jobs/<id>/log``: all that it printed."""
        path = self._job(request).folder / OUTPUT_FILE
        if not path.is_file():
            raise NotHere
        return FileResponse(path, media_type="text/plain; charset=utf-8")

    def ask(self, request: Request) -> Response:
        """``/jobs/<id>/stop`` and ``/jobs/<id>/kill``: the page that asks."""
        job = self._job(request)
        if not job.is_active:
            return RedirectResponse(target(job), 303)
        return page(request, "stop.html", job=job, how=request.path_params["how"], back=target(job))

    def stop(self, request: Request) -> Response:
        """The same, sent."""
        job = self._job(request)
        if request.path_params["how"] == "kill":
            self.place.jobs.kill(job.id)
        else:
            self.place.jobs.stop(job.id)
        return RedirectResponse(target(job), 303)


def routes(place: Place) -> Sequence[BaseRoute]:
    """``/jobs/<id>`` and what lies below it."""
    pages = _Pages(place)

    async def forget(request: Request) -> Response:
        return await run_in_threadpool(pages.forget, request, await request.form(max_fields=50_000))

    out: list[BaseRoute] = [
        Route("/jobs-over", pages.ask_to_forget),
        Route("/jobs-over", forget, methods=["POST"]),
        Route("/jobs/{id}", pages.show),
        Route("/jobs/{id}/live", pages.live),
        Route("/jobs/{id}/log", pages.log),
    ]
    for how in ("stop", "kill"):
        path = "/jobs/{id}/" + how
        out.append(Route(path, _with(pages.ask, how)))
        out.append(Route(path, _with(pages.stop, how), methods=["POST"]))
    return out


def _with(handler: Any, how: str) -> Any:
    """The handler for one of the two ways to end a job."""

    def answer(request: Request) -> Response:
        request.path_params["how"] = how
        answered: Response = handler(request)
        return answered

    return answer
