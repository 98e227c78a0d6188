"""Answers piece by piece, by transformers and by a server: the same tokens as elsewhere."""

import json
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from rlhf.export.answers import most_likely
from rlhf.models.encoding import prompt_ids
from rlhf.models.turns import end_ids, response_text
from rlhf.serving.talkers import HFTalker, ServerTalker
from rlhf.types import Message, UserError
from rollout.sampling import Sampling
from tests.export.made import CHATML, language_model
from tests.models import families

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED: list[Message] = [{"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    tokenizer = families.made(template=CHATML)
    return language_model("llama", tokenizer), tokenizer


def talker(parts: tuple[Any, Any], longest: int = 256, **sampling: Any) -> HFTalker:
    return HFTalker("toy", *parts, Sampling(24, **sampling), longest)


def text_of(talker: Any, seed: int = 0, *, greedy: bool = False) -> str:
    return "".join(talker.stream(ASKED, seed, greedy=greedy))


def test_greedy_answers_are_the_most_likely(parts: tuple[Any, Any]) -> None:
    model, tokenizer = parts
    toy = talker(parts)
    ids = most_likely(model, tokenizer, prompt_ids(tokenizer, ASKED), 24)
    assert text_of(toy, greedy=True) == response_text(tokenizer, ids, chat=True)
    assert toy.finished is (ids[-1] in end_ids(tokenizer))


def test_a_seed_gives_an_answer(parts: tuple[Any, Any]) -> None:
    toy = talker(parts, temperature=2.0)
    assert text_of(toy, 1) == text_of(toy, 1) != text_of(toy, 2)


def test_it_ends_at_an_end_token(parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two characters of which one takes two tokens, then an end token that is not the tokenizer's
    own: no piece shows half a character.
    """
    tokenizer = parts[1]
    toy = talker(parts)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    ids = [*tokenizer("a\u00e9", add_special_tokens=False)["input_ids"], end]
    assert len(ids) == 4 and end != tokenizer.eos_token_id
    wanted = iter(ids)

    def next_token(given: Any, cache: Any) -> Any:
        return torch.nn.functional.one_hot(torch.tensor([next(wanted)]), 400).float(), None

    monkeypatch.setattr(toy, "_next", next_token)
    assert list(filter(None, toy.stream(ASKED, 0, greedy=True))) == ["a", "\u00e9"]
    assert toy.finished


def test_a_conversation_without_room_is_refused(parts: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match=r"rollout\.max_response_length"):
        text_of(talker(parts, longest=30))


# ---- a server ----


def served(parts: tuple[Any, Any], answer: Any) -> ServerTalker:
    """A talker whose server is the function `answer` of a request."""
    server: Any = SimpleNamespace(url="http://server", token="key", log="log", stop=lambda: None)
    made = ServerTalker("toy", server, parts[1], Sampling(24, temperature=0.5, top_k=3), 256)
    made._client = httpx.Client(transport=httpx.MockTransport(answer))
    return made


def event(text: str, reason: str | None = None) -> str:
    choices = [{"index": 0, "text": text, "finish_reason": reason}]
    return f"data: {json.dumps({'choices': choices})}\n\n"


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_events_become_pieces(parts: tuple[Any, Any], reason: str) -> None:
    bodies: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(200, text=event("It ") + event("is", reason) + "data: [DONE]\n\n")

    toy = served(parts, answer)
    assert list(toy.stream(ASKED, 7, greedy=False)) == ["It ", "is"]
    assert toy.finished is (reason == "stop")
    (body,) = bodies
    assert body["prompt"] == prompt_ids(parts[1], ASKED)
    assert body["stop_token_ids"] == list(end_ids(parts[1]))
    assert (body["model"], body["seed"], body["max_tokens"]) == ("toy", 7, 24)
    assert (body["temperature"], body["top_k"]) == (0.5, 3)
    list(toy.stream(ASKED, 7, greedy=True))
    assert bodies[1]["temperature"] == 0


def test_what_a_server_refuses_is_told(parts: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match="400"):
        text_of(served(parts, lambda _: httpx.Response(400, text="too long")))

    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(UserError, match="log"):
        text_of(served(parts, gone))
