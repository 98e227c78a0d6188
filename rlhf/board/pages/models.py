"""``/models``: what runs left, what it was made of, and where it can go."""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from rlhf.board.app import Place
from rlhf.board.paths import run_link
from rlhf.board.registry import Made, models
from rlhf.board.rendering import page
from rlhf.board.units import size_text, time_text


def routes(place: Place) -> Sequence[BaseRoute]:
    """``/models``"""

    def listing(request: Request) -> Response:
        return page(
            request,
            "models.html",
            models=models(place.runs),
            size_text=size_text,
            time_text=time_text,
            run_link=run_link,
            ways=ways,
        )

    return [Route("/models", listing)]


def ways(made: Made) -> list[tuple[str, str]]:
    """What can be done with a model: the key of the words and the link each."""
    path = str(made.path)
    if made.is_reward:
        return [("ppo", _form("ppo", {"reward.path": path}))]
    return [
        ("export", _form("export", {"model.path": path, "run.name": made.run})),
        ("chat", "/chat?" + urlencode({"model": path})),
        ("serve", _form("serve", {"model.path": path, "run.name": made.run})),
        ("eval", _form("eval", _before_and_after(made))),
    ]


def _before_and_after(made: Made) -> dict[str, str]:
    """The model after, and before it the policy that it was trained from."""
    out = {"stage.after": str(made.path)}
    for parent in made.parents:
        before = Path(parent.path)
        if parent.kind == "policy" and before.is_dir():
            out["stage.before"] = parent.path
    return out


def _form(stage: str, options: dict[str, str]) -> str:
    return f"/new/{stage}?" + urlencode(options)
