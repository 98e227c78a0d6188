"""Pages from templates, in the reader's language. Every value is text: templates escape it."""

import functools
import json
from collections.abc import Callable
from importlib import resources
from typing import Any

import jinja2
from starlette.requests import Request
from starlette.responses import HTMLResponse

from rlhf.board.said import said

LANGUAGES = {"en": "English", "zh": "中文"}
LANGUAGE_COOKIE = "board_language"
# The words of one part of the page each: words/<part>.<language>.json
PARTS = ("shell", "runs", "forms", "rooms")


def language_of(request: Request) -> str:
    """As the cookie says, else the first language of the browser that there is."""
    chosen = request.cookies.get(LANGUAGE_COOKIE, "")
    if chosen in LANGUAGES:
        return chosen
    for wish in request.headers.get("accept-language", "").lower().split(","):
        name = wish.strip()[:2]
        if name in LANGUAGES:
            return name
    return "en"


@functools.cache
def words(language: str) -> dict[str, str]:
    """Every text of the page by its key."""
    folder = resources.files("rlhf.board") / "words"
    together: dict[str, str] = {}
    for part in PARTS:
        text = (folder / f"{part}.{language}.json").read_text(encoding="utf-8")
        together.update(json.loads(text))
    return together


def translator(language: str) -> Callable[..., str]:
    """``t("runs.title", count=3)``. Raises KeyError for a key that the language lacks."""
    held = words(language)

    def translate(key: str, /, **values: Any) -> str:
        text = held[key]
        return text.format(**values) if values else text

    return translate


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("rlhf.board", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """The template `template` with `values`, in the reader's language."""
    language = language_of(request)
    text = (
        _environment()
        .get_template(template)
        .render(
            t=translator(language),
            say=functools.partial(said, language=language),
            language=language,
            languages=LANGUAGES,
            path=request.url.path,
            **values,
        )
    )
    return HTMLResponse(text, status)
