"""What clients may say of an answer, read from a request's body.

    {"answer": ID, "user": NAME, "consent": true,
     "index": 0,                    which choice of the answer (0)
     "thumb": "up" or "down",
     "over": {"answer": ID, "index": 1},   the choice that this one is better than
     "edit": TEXT,                  what the answer should have been
     "reason": TEXT}                why

At least one of the last four. An edit and a reason are texts of the user's own, so they are kept
only with consent.
"""

from collections.abc import Mapping
from typing import Any

from rlhf.gateway.records import Answered, Refused, Said

_KEYS = ("answer", "user", "consent", "index", "thumb", "over", "edit", "reason")
_THUMBS = {"up": True, "down": False}
MOST_TEXT = 100_000  # characters of an edit or a reason


def parse(body: Mapping[str, Any], user: str) -> Said:
    """Feedback of the user with that pseudonym. Raises Refused, naming the key."""
    unknown = [key for key in body if key not in _KEYS]
    if unknown:
        raise Refused(400, f"unknown keys: {', '.join(map(str, unknown))}; known: {_KEYS}")
    consent = body.get("consent", False)
    if not isinstance(consent, bool):
        raise Refused(400, "consent: expected true or false")
    thumb = body.get("thumb")
    if thumb is not None and thumb not in _THUMBS:
        raise Refused(400, "thumb: expected up or down")
    edit, reason = _text(body, "edit"), _text(body, "reason")
    over = _over(body)
    if thumb is None and over is None and edit is None and reason is None:
        raise Refused(400, "expected one of thumb, over, edit, reason")
    if not consent and (edit is not None or reason is not None):
        raise Refused(400, "edit, reason: texts are kept only with consent: true")
    name = body.get("answer")
    if not isinstance(name, str):
        raise Refused(400, "answer: expected the id of an answer")
    voted = None if thumb is None else _THUMBS[thumb]
    return Said(name, _index(body, "index"), user, consent, voted, over, edit, reason)


def _text(body: Mapping[str, Any], key: str) -> str | None:
    value = body.get(key)
    if value is None:
        return None
    if not isinstance(value, str) or not value.strip() or len(value) > MOST_TEXT:
        raise Refused(400, f"{key}: expected a text of at most {MOST_TEXT} characters")
    return value


def _index(body: Mapping[str, Any], key: str) -> int:
    value = body.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise Refused(400, f"{key}: expected the number of a choice, from 0")
    return value


def _over(body: Mapping[str, Any]) -> tuple[str, int] | None:
    value = body.get("over")
    if value is None:
        return None
    if not isinstance(value, dict) or set(value) - {"answer", "index"}:
        raise Refused(400, "over: expected {answer: ID, index: NUMBER}")
    name = value.get("answer", body.get("answer"))
    if not isinstance(name, str):
        raise Refused(400, "over.answer: expected the id of an answer")
    return name, _index(value, "index")


def check(said: Said, answered: Answered | None, over: Answered | None) -> None:
    """The answers are this user's, and have these choices; two that are compared are of one prompt,
    where both are known. Raises Refused.
    """
    if answered is None or answered.user != said.user:
        raise Refused(404, "no such answer of this user is kept")
    if said.index >= answered.count:
        raise Refused(400, f"index: the answer has {answered.count} choices")
    if said.over is None:
        return
    if over is None or over.user != said.user:
        raise Refused(404, "over: no such answer of this user is kept")
    if said.over[1] >= over.count:
        raise Refused(400, f"over.index: the answer has {over.count} choices")
    if said.over == (said.answer, said.index):
        raise Refused(400, "over: a choice is not better than itself")
    both = answered.messages is not None and over.messages is not None
    if both and answered.messages != over.messages:
        raise Refused(400, "over: the two answers are to different prompts")
