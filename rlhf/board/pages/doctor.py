"""``/doctor``: what this machine can run. ``stage=doctor`` looks, in a process of its own."""

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from rlhf.board import OWN
from rlhf.board.app import Place
from rlhf.board.rendering import language_of, page, translator
from rlhf.board.units import time_text

LIMIT_S = 900.0
FOLDER = f"{OWN}/doctor"
_FINDINGS, _OUTPUT = "findings.json", "output.txt"


class Examination:
    """The last look at the machine, and the one that goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self.problem: str | None = None

    @property
    def going_on(self) -> bool:
        """Whether a look goes on."""
        return self._thread is not None and self._thread.is_alive()

    def begin(self) -> None:
        """Look, unless a look goes on."""
        with self._lock:
            if self.going_on:
                return
            self.problem = None
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until the look has ended."""
        if self._thread is not None:
            self._thread.join()

    def _look(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        findings = self.folder / _FINDINGS
        option = f'stage.findings="{findings}"'
        command = [sys.executable, "-m", "rlhf", "stage=doctor", option]
        findings.unlink(missing_ok=True)
        with (self.folder / _OUTPUT).open("wb") as output:
            try:
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=LIMIT_S,
                    check=False,  # 1: a check failed, which the findings say
                )
            except (subprocess.TimeoutExpired, OSError) as error:
                self.problem = str(error)
                return
        if not findings.is_file():
            text = (self.folder / _OUTPUT).read_text(encoding="utf-8", errors="replace")
            self.problem = text[-2000:].strip() or "no output"

    def findings(self) -> tuple[list[dict[str, Any]], float] | None:
        """What the last look found, and when (seconds since 1970); None before the first."""
        path = self.folder / _FINDINGS
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
            return content["findings"], path.stat().st_mtime
        return None


def routes(place: Place) -> Sequence[BaseRoute]:
    """``/doctor``"""
    examination = Examination(place.runs / FOLDER)

    def shown(request: Request) -> Response:
        last = examination.findings()
        findings, time = last if last else ([], 0.0)
        counts = {
            state: sum(finding["state"] == state for finding in findings)
            for state in ("fail", "warn", "ok", "info")
        }
        return page(
            request,
            "doctor.html",
            findings=findings,
            counts=counts,
            time=time_text(time) if findings else None,
            going_on=examination.going_on,
            problem=examination.problem,
        )

    def begin(request: Request) -> Response:
        examination.begin()
        return RedirectResponse("/doctor", 303)

    def live(request: Request) -> Response:
        t = translator(language_of(request))
        ended = not examination.going_on
        key = "doctor.ended" if ended else "doctor.going_on"
        return JSONResponse({"state": t(key), "ended": ended})

    return [
        Route("/doctor", shown),
        Route("/doctor", begin, methods=["POST"]),
        Route("/doctor/live", live),
    ]
