"""``/chat``: talk with one model, or with two side by side without knowing which is which."""

import atexit
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from rlhf.board import OWN
from rlhf.board.app import Place
from rlhf.board.asked import fields
from rlhf.board.forms.allowed import is_within
from rlhf.board.paths import NotHere, folders_of, is_run_directory
from rlhf.board.registry import policies
from rlhf.board.rendering import language_of, page, translator
from rlhf.board.talking import Chat, Chats
from rlhf.board.workers import Voice, Workers
from rlhf.models.directories import contents
from rlhf.models.templates import NAMES as TEMPLATES
from rlhf.run.models import is_classifier
from rlhf.serving.conversation import Conversation
from rlhf.types import UserError

_ROWS = "chats"  # beside a run's stages, as stage=chat has it
_RANGES = {  # smallest and largest
    "temperature": (0.01, 5.0),
    "top_p": (0.01, 1.0),
    "max_response_length": (1, 4096),
}
_WHOLE = ("max_response_length",)  # numbers without a fraction


class Rooms:
    """What all requests of the chat page share."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.chats = Chats()
        self.workers = Workers(place.runs / OWN / "chat")
        atexit.register(self.workers.close)

    def chat(self, request: Request) -> Chat:
        """The conversation that the path names. Raises NotHere."""
        chat = self.chats.get(request.path_params["chat"])
        if chat is None:
            raise NotHere
        return chat


def routes(place: Place) -> Sequence[BaseRoute]:
    """``/chat``, ``/chat/ID`` and what can be done there."""
    rooms = Rooms(place)

    def start(request: Request) -> Response:
        given = {"model": request.query_params.get("model", "")}
        return _start(request, rooms, given, {})

    async def begin(request: Request) -> Response:
        given = await fields(request)
        return await run_in_threadpool(_begin, request, rooms, given)

    async def unload(request: Request) -> Response:
        await run_in_threadpool(rooms.workers.unload)
        return RedirectResponse("/chat", 303)

    def one(request: Request) -> Response:
        return _one(request, rooms.chat(request))

    def live(request: Request) -> Response:
        return JSONResponse(_live(rooms.chat(request), translator(language_of(request))))

    async def act(request: Request) -> Response:
        given = await fields(request)
        return await run_in_threadpool(_act, request, rooms, given)

    return [
        Route("/chat", start),
        Route("/chat", begin, methods=["POST"]),
        Route("/chat/unload", unload, methods=["POST"]),
        Route("/chat/{chat}", one),
        Route("/chat/{chat}/live", live),
        Route("/chat/{chat}/{act}", act, methods=["POST"]),
    ]


# ---- beginning ----


def _start(
    request: Request, rooms: Rooms, given: dict[str, str], errors: dict[str, str]
) -> Response:
    return page(
        request,
        "chat.html",
        422 if errors else 200,
        known=policies(rooms.place.runs),
        given={"temperature": "0.7", "max_response_length": "256", "top_p": "1"} | given,
        errors=errors,
        chats=rooms.chats.all(),
        loaded=rooms.workers.loaded(),
        names=_names,
        templates=TEMPLATES,
    )


def _begin(request: Request, rooms: Rooms, given: dict[str, str]) -> Response:
    t = translator(language_of(request))
    errors: dict[str, str] = {}
    numbers = {name: _number(name, given, errors, t) for name in _RANGES}
    for name in ("model", "other"):
        path = given.get(name, "")
        problem = _unfit(path) if path else None
        if path and not is_within("model.path", path, folders_of(rooms.place)):
            problem = t("forms.error.outside", text=path)
        if name == "model" and not path:
            problem = t("chat.model.missing")
        if problem:
            errors[name] = problem
    if given.get("template", "") not in ("", *TEMPLATES):
        errors["template"] = t("chat.template.unknown")
    if errors:
        return _start(request, rooms, given, errors)
    paths = [given["model"]]
    if given.get("other", "") not in ("", given["model"]):
        paths.append(given["other"])
    voices = tuple(
        Voice(
            path,
            max_response_length=int(numbers["max_response_length"]),
            temperature=numbers["temperature"],
            top_p=numbers["top_p"],
            chat_template=given.get("template") or None,
        )
        for path in paths
    )
    said = Conversation(given.get("system", "") or None)
    folder = _folder(rooms.place.runs, Path(paths[0]))
    chat = Chat(voices, folder, said, greedy="greedy" in given)
    rooms.chats.add(chat)
    return RedirectResponse(f"/chat/{chat.id}", 303)


def _number(name: str, given: dict[str, str], errors: dict[str, str], t: Any) -> float:
    least, most = _RANGES[name]
    try:
        value = float(given.get(name, ""))
        if least <= value <= most and (name not in _WHOLE or value == int(value)):
            return value
    except (ValueError, OverflowError):
        pass
    errors[name] = t("chat.number", least=least, most=most)
    return 0.0


def _unfit(path: str) -> str | None:
    """Why the model of that directory can't talk; None where nothing speaks against it."""
    folder = Path(path).expanduser()
    try:
        if not folder.is_dir():
            raise UserError(f"{path}: no such directory.")
        if is_classifier(folder):
            raise UserError(f"{path} is a reward model, which writes no text.")
        contents(path)
    except (UserError, OSError, ValueError) as error:
        return str(error)
    return None


def _folder(runs: Path, model: Path) -> Path:
    """Where rows of a conversation with the model are saved."""
    real = model.expanduser().resolve()
    for folder in real.parents:
        if folder.is_relative_to(runs) and is_run_directory(folder):
            return folder.parent / _ROWS
    if real.is_relative_to(runs):
        inside = real.relative_to(runs).parts
        if len(inside) > 1 and not inside[0].startswith("."):
            return runs / inside[0] / _ROWS
    return runs / OWN / _ROWS


# ---- one conversation ----


def _names(chat: Chat) -> list[str]:
    """The models' directories."""
    return [voice.path for voice in chat.voices]


def _one(request: Request, chat: Chat, problem: str | None = None) -> Response:
    saved = chat.saved
    rows = [] if saved is None else [path for path in (saved.training, saved.preferences) if path]
    links = [
        (path, f"/new/{stage}?" + urlencode({"data.path": str(path)}))
        for path in rows
        for stage in (("sft",) if saved and path == saved.training else ("dpo",))
    ]
    return page(
        request,
        "chat_one.html",
        422 if problem else 200,
        chat=chat,
        names=_names(chat),
        turns=list(chat.said.turns),
        system=chat.said.system or "",
        shown=list(chat.shown),
        problem=problem or chat.problem,
        saved=saved,
        links=links,
        pairs=len(chat.said.pairs),
    )


def _live(chat: Chat, t: Any) -> dict[str, Any]:
    """What the page asks for while answers grow."""
    shown = list(chat.shown)
    texts = {f"answer-{number}": answer.text for number, answer in enumerate(shown)}
    waiting = chat.state == "answering" and not any(answer.text for answer in shown)
    return {
        **texts,
        "state": t("chat.loading") if waiting else t(f"chat.state.{chat.state}"),
        "ended": chat.state != "answering",
    }


def _act(request: Request, rooms: Rooms, given: dict[str, str]) -> Response:
    """One thing that the reader does, and back to the conversation."""
    chat, get = rooms.chat(request), rooms.workers.get
    name = request.path_params["act"]
    try:
        if name == "say":
            chat.say(given.get("message", ""), get, two=len(chat.voices) == 2 or "two" in given)
        elif name == "again":
            chat.again(get)
        elif name == "choose":
            chat.choose({"1": 0, "2": 1}.get(given.get("which", "")))
        elif name == "cut":
            chat.cut()
        elif name == "undo":
            chat.undo()
        elif name == "clear":
            chat.clear(given.get("system") or None)
        elif name == "save":
            chat.save()
        else:
            raise NotHere
    except UserError as error:
        return _one(request, chat, str(error))
    return RedirectResponse(f"/chat/{chat.id}#end", 303)
