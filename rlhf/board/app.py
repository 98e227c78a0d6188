"""The board as an ASGI application: pages, style and script, behind the guard."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from rlhf.board.guard import ANNOTATE, Doors, Guard
from rlhf.board.jobs.store import Jobs
from rlhf.board.rendering import LANGUAGE_COOKIE, LANGUAGES, page
from rlhf.types import UserError


@dataclass(frozen=True, slots=True)
class Place:
    """Where the board works, and what it may do there."""

    runs: Path  # run.dir, absolute
    uploads: Path
    upload_bytes: int  # of one file
    remote_code: bool  # whether a form may set model.trust_remote_code
    at_once: int = 1  # runs at a time where there is no CUDA device
    folders: tuple[Path, ...] = ()  # further ones whose files a form may name
    jobs: Jobs = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "jobs", Jobs(self.runs, self.at_once))


# Each page's routes, made from what all pages share.
Pages = Sequence[Callable[[Place], Sequence[BaseRoute]]]


def create_app(place: Place, doors: Doors, hosts: Sequence[str], pages: Pages) -> Any:
    """The ASGI application. hosts: as `Guard`."""
    web = resources.files("rlhf.board") / "web"
    routes: list[BaseRoute] = [
        Mount("/static", StaticFiles(directory=str(web)), name="static"),
        Route("/language/{name}", _choose_language, methods=["POST"]),
    ]
    for make in pages:
        routes.extend(make(place))
    handlers: dict[Any, Any] = {UserError: _bad_input, 404: _missing, 500: _broken}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(app, doors, hosts, public=(ANNOTATE,))


async def _choose_language(request: Request) -> Response:
    """Keep the language in a cookie, and go back to the page that asked."""
    form = await request.form()
    back = str(form.get("back", "/"))
    if not back.startswith("/") or back.startswith(("//", "/\\")):
        back = "/"
    answer = RedirectResponse(back, 303)
    name = request.path_params["name"]
    if name in LANGUAGES:
        answer.set_cookie(LANGUAGE_COOKIE, name, samesite="strict", httponly=True)
    return answer


async def _bad_input(request: Request, error: Exception) -> Response:
    return page(request, "problem.html", 422, problem=str(error))


async def _missing(request: Request, _: Exception) -> Response:
    return page(request, "problem.html", 404, problem=None)


async def _broken(request: Request, error: Exception) -> Response:
    """A bug: the log has its traceback."""
    return page(request, "problem.html", 500, problem=type(error).__name__)
