"""Simulated users of a gateway: they ask about topics, choose between two answers, give thumbs, and
like what no program knows. One choice in ten is wrong, one user in ten gives no consent.
"""

import random
from typing import Any

import httpx

from benchmarks.gateway import TOKEN

_CLIENT = {"authorization": f"Bearer {TOKEN}"}
_THINGS = ("tea", "rain", "music", "bread", "chess", "snow", "the sea", "old films", "maps", "cats")
_WHERE = ("at home", "in town", "at night", "in spring", "with friends", "alone", "on trains")
WRONG, SILENT = 0.1, 0.1  # of choices; of users


def questions() -> tuple[list[str], list[str]]:
    """Topics that users ask about, and held-out ones: no pair of thing and place is in both."""
    every = [f"{thing} {where}" for thing in _THINGS for where in _WHERE]
    random.Random(0).shuffle(every)
    return every[:-20], every[-20:]


def asked(topic: str) -> list[dict[str, str]]:
    """The conversation of a question."""
    return [{"role": "user", "content": f"say something about {topic}"}]


def preferred(text: str) -> bool:
    """What the users like, which nothing else knows."""
    return text.startswith("gladly")


def on_topic(topic: str, text: str) -> bool:
    """Whether an answer names what was asked about: what training may not lose."""
    return topic.rsplit(maxsplit=1)[-1] in text and topic.split(maxsplit=1)[0] in text


class Users:
    """Simulated users of the model `name` behind a gateway."""

    def __init__(self, url: str, name: str, seed: int) -> None:
        self._client = httpx.Client(base_url=url, headers=_CLIENT, trust_env=False, timeout=60)
        self.name = name
        self._drawn = random.Random(f"users/{seed}")
        self.failed = 0

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.post(path, json=body)
        if answer.status_code != httpx.codes.OK:
            self.failed += 1
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text}")
        content: dict[str, Any] = answer.json()
        return content

    def ask(self, user: str, count: int = 1) -> tuple[str, list[str]]:
        """An answer's id and its choices."""
        topic = self._drawn.choice(questions()[0])
        body = {"model": self.name, "messages": asked(topic), "user": user, "n": count}
        content = self._post("/v1/chat/completions", body)
        return content["id"], [choice["message"]["content"] for choice in content["choices"]]

    def _says(self, liked: bool) -> bool:
        return liked != (self._drawn.random() < WRONG)

    def choose(self, user: str) -> None:
        """The better of two answers, where the user sees a difference."""
        answer, texts = self.ask(user, 2)
        likes = [preferred(text) for text in texts]
        if likes[0] == likes[1]:
            return
        better = likes.index(self._says(True))
        said = {"answer": answer, "user": user, "index": better, "over": {"index": 1 - better}}
        said["consent"] = self._drawn.random() >= SILENT
        self._post("/v1/feedback", said)

    def judge(self, user: str) -> None:
        """A thumb."""
        answer, (text,) = self.ask(user)
        thumb = "up" if self._says(preferred(text)) else "down"
        self._post("/v1/feedback", {"answer": answer, "user": user, "thumb": thumb})

    def state(self) -> dict[str, Any]:
        """What the operator sees."""
        content: dict[str, Any] = self._client.get("/operator/state").json()
        return content

    def arms(self, arms: dict[str, Any]) -> None:
        """Other arms."""
        answer = self._client.put("/operator/arms", json=arms)
        if answer.status_code != httpx.codes.OK:
            raise RuntimeError(answer.text)
