"""The first page: what do you want to do?"""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from rlhf.board.app import Place
from rlhf.board.rendering import page

# What people want, and where it is done. The words are start.<name> and start.<name>.text.
WISHES = (
    ("examples", "/new/sft"),
    ("preferences", "/new/dpo"),
    ("judge", "/new/reward"),
    ("reinforce", "/new/ppo"),
    ("evaluate", "/new/eval"),
    ("weigh", "/new/eval_reward"),
    ("label", "/labels"),
    ("chat", "/chat"),
    ("export", "/models"),
)


def routes(_: Place) -> Sequence[BaseRoute]:
    """``/``"""

    async def start(request: Request) -> Response:
        return page(request, "start.html", wishes=WISHES)

    return [Route("/", start)]
