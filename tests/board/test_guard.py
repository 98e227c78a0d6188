"""Who gets in: the link once, this host's name, our own pages' forms."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HOST = "127.0.0.1:7860"
ORIGIN = {"origin": f"http://{HOST}"}


@pytest.fixture
def words() -> list[str]:
    return []


@pytest.fixture
def client(tmp_path: Path, words: list[str]) -> Iterator[Any]:
    from starlette.testclient import TestClient

    from rlhf.board.app import Place, create_app
    from rlhf.board.guard import Doors
    from rlhf.board.pages import start

    place = Place(tmp_path, tmp_path / "uploads", 1 << 20, False)
    doors = Doors(announce=words.append)
    words.append(doors.word)
    app = create_app(place, doors, [HOST], (start.routes,))
    with TestClient(app, base_url=f"http://{HOST}", follow_redirects=False) as made:
        yield made


def entered(client: Any, word: str) -> Any:
    answer = client.get(f"/?token={word}")
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    return answer


def test_the_link_opens_once_and_the_next_is_told(client: Any, words: list[str]) -> None:
    assert client.get("/").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    cookie = entered(client, words[0]).headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie
    assert client.get("/").status_code == 200
    assert len(words) == 2 and words[1] != words[0]
    client.cookies.clear()
    assert client.get(f"/?token={words[0]}").status_code == 401
    assert client.get("/").status_code == 401
    entered(client, words[1])


def test_a_word_of_the_user_opens_again_and_again(words: list[str]) -> None:
    from rlhf.board.guard import Doors

    doors = Doors("mine", words.append)
    first, second = doors.enter("mine"), doors.enter("mine")
    assert first and second and first != second and not words
    assert doors.knows(first) and not doors.knows("mine")
    assert doors.enter("Mine") is None and doors.enter("\uff4dine") is None


def test_another_host_is_refused_even_with_the_cookie(client: Any, words: list[str]) -> None:
    entered(client, words[0])
    assert client.get("/", headers={"host": "evil.example:7860"}).status_code == 421
    assert client.get("/", headers={"host": "127.0.0.1:1"}).status_code == 421
    assert client.get("/static/board.css", headers={"host": "evil.example"}).status_code == 421


@pytest.mark.parametrize(
    "headers", [{}, {"origin": "null"}, {"origin": "http://evil.example"}, {"origin": "http://"}]
)
def test_a_post_from_elsewhere_is_refused(
    client: Any, words: list[str], headers: dict[str, str]
) -> None:
    entered(client, words[0])
    assert client.post("/language/zh", headers=headers).status_code == 403


def test_a_post_without_the_cookie_is_refused(client: Any) -> None:
    assert client.post("/language/zh", headers=ORIGIN).status_code == 401


def test_every_answer_has_the_policy(client: Any, words: list[str]) -> None:
    answers = [client.get("/"), entered(client, words[0]), client.get("/"), client.get("/none")]
    answers.append(client.get("/static/board.js"))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "trusted-types 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        # with no-referrer a browser calls the origin of our own forms null
        assert answer.headers["referrer-policy"] == "same-origin"
    assert answers[3].status_code == 404


def test_the_language_is_kept_and_the_way_back_stays_here(client: Any, words: list[str]) -> None:
    entered(client, words[0])
    assert 'lang="en"' in client.get("/", headers={"accept-language": "fr"}).text
    assert 'lang="zh"' in client.get("/", headers={"accept-language": "zh-CN,en"}).text
    for back in ("//evil.example/", "https://evil.example/", "/\\evil.example"):
        answer = client.post("/language/zh", headers=ORIGIN, data={"back": back})
        assert answer.headers["location"] == "/"
    assert 'lang="zh"' in client.get("/").text
