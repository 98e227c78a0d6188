"""The chat page: conversations, blind comparisons, rows; models in processes of their own."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf.board.talking import Chat
from rlhf.board.workers import Voice, Worker, Workers
from rlhf.serving.conversation import Conversation
from rlhf.types import UserError
from tests.board.rooms import board

A, B = Voice("model-a"), Voice("model-b")


class Scripted:
    """Answers with its model's name and a number; waits where it is told to."""

    def __init__(self, voice: Voice) -> None:
        self.voice, self.asked = voice, []  # type: ignore[var-annotated]
        self.gate: threading.Event | None = None
        self.cut_short = self.refuses = False

    def ask(self, messages: Any, seed: int, greedy: bool, tell: Any) -> tuple[str, bool]:
        if self.refuses:
            raise UserError("the conversation has 99 tokens")
        self.asked.append((messages, seed))
        tell(self.voice.path)
        if self.gate is not None:
            self.gate.wait(10)
        return f"{self.voice.path} {seed}", not self.cut_short

    def cut(self) -> None:
        self.cut_short = True
        if self.gate is not None:
            self.gate.set()


@pytest.fixture
def held() -> dict[Voice, Scripted]:
    return {voice: Scripted(voice) for voice in (A, B)}


def chat_of(folder: Path, *voices: Voice) -> Chat:
    return Chat(voices, folder / "rows", Conversation("Be kind."))


def say(chat: Chat, held: dict[Voice, Scripted], text: str, *, two: bool = False) -> None:
    getter: Any = held.__getitem__
    thread = chat.say(text, getter, two=two)
    assert thread is not None
    thread.join()


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_conversation_is_saved_undone_and_cleared(tmp_path: Path, held: Any) -> None:
    chat = chat_of(tmp_path, A)
    say(chat, held, "Hello")
    say(chat, held, "More")
    assert [turn["content"] for turn in chat.said.turns] == [
        "Hello",
        "model-a 1",
        "More",
        "model-a 2",
    ]
    chat.undo()
    chat.save()
    assert chat.saved is not None and chat.saved.training is not None
    [row] = rows(chat.saved.training)
    assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
    chat.clear("In verse.")
    assert chat.said.turns == [] and chat.said.system == "In verse."
    with pytest.raises(UserError):
        chat.undo()


def test_a_blind_choice_becomes_a_pair(tmp_path: Path, held: Any) -> None:
    chat = chat_of(tmp_path, A, B)
    firsts = set()
    for number in range(12):
        say(chat, held, f"Question {number}", two=True)
        assert chat.state == "choosing" and chat.told is None
        firsts.add(chat.shown[0].voice)
        wanted = [shown.voice for shown in chat.shown].index(B)
        chat.choose(wanted)
        assert chat.told is not None and set(chat.told) == {"model-a", "model-b"}
    assert firsts == {A, B}  # or the order would tell
    assert chat.votes == {"model-b": 12}
    chat.save()
    assert chat.saved is not None and chat.saved.preferences is not None
    pairs = rows(chat.saved.preferences)
    assert len(pairs) == 12
    assert all(pair["chosen"][0]["content"].startswith("model-b") for pair in pairs)
    assert all(pair["rejected"][0]["content"].startswith("model-a") for pair in pairs)


def test_neither_and_cut_answers_make_no_pair(tmp_path: Path, held: Any) -> None:
    chat = chat_of(tmp_path, A, B)
    say(chat, held, "Hello", two=True)
    chat.choose(None)
    assert chat.said.pairs == [] and chat.said.turns[-1]["content"].startswith("model-a")
    held[B].cut_short = True
    say(chat, held, "More", two=True)
    chat.choose([shown.voice for shown in chat.shown].index(B))
    assert chat.said.pairs == [] and chat.said.turns[-1]["train"] is False
    assert chat.note == "chat.cut.no_pair"


def test_two_answers_of_one_model_have_seeds_of_their_own(tmp_path: Path, held: Any) -> None:
    chat = chat_of(tmp_path, A)
    say(chat, held, "Hello", two=True)
    assert chat.state == "choosing"
    chat.undo()  # neither is said
    assert chat.state == "idle" and chat.said.turns == []
    say(chat, held, "Hello")
    again = chat.again(held.__getitem__)
    assert again is not None
    again.join()
    assert chat.state == "choosing" and chat.said.turns == []
    assert len({seed for _, seed in held[A].asked}) == 5


@pytest.mark.parametrize("error", [UserError("no room"), OSError("no process")])
def test_what_was_said_stays_where_no_second_answer_comes(
    tmp_path: Path, held: Any, error: Exception
) -> None:
    chat = chat_of(tmp_path, A)
    say(chat, held, "Hello")
    before = list(chat.said.turns)

    def fails(voice: Voice) -> Any:
        raise error

    thread = chat.again(fails)
    assert thread is not None
    thread.join()
    assert chat.state == "idle" and chat.problem == str(error) and chat.said.turns == before


def test_an_answer_can_be_cut(tmp_path: Path, held: Any) -> None:
    held[A].gate = threading.Event()
    chat = chat_of(tmp_path, A)
    thread = chat.say("Hello", held.__getitem__, two=False)
    assert thread is not None and chat.say("Again", held.__getitem__, two=False) is None
    while not chat.shown[0].text:
        time.sleep(0.01)
    chat.cut()
    thread.join()
    assert chat.said.turns[-1]["train"] is False and chat.state == "idle"


def test_what_can_not_be_answered_is_told(tmp_path: Path, held: Any) -> None:
    held[A].refuses = True
    chat = chat_of(tmp_path, A)
    say(chat, held, "Hello")
    assert chat.problem == "the conversation has 99 tokens" and chat.state == "idle"
    assert chat.said.turns == []


# ---- real workers ----


@pytest.fixture(scope="module")
def talking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.acting import turning_policy

    return turning_policy(tmp_path_factory.mktemp("model"))


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Callable[..., Workers]]:
    made: list[Workers] = []

    def make(**named: Any) -> Workers:
        made.append(Workers(tmp_path / "logs", **named))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_model_answers_from_its_process(talking_model: Path, workers: Any) -> None:
    pool = workers()
    voice = Voice(
        str(talking_model), max_prompt_length=60, max_response_length=12, chat_template="plain"
    )
    worker = pool.get(voice)
    assert pool.get(voice) is worker and pool.loaded() == [str(talking_model)]
    pieces: list[str] = []
    ask = [{"role": "user", "content": "the cat"}]
    first = worker.ask(ask, 1, False, pieces.append)
    assert "".join(pieces) == first[0]
    assert first == worker.ask(ask, 1, False, str)
    with pytest.raises(UserError, match="tokens"):
        worker.ask([{"role": "user", "content": "the cat " * 200}], 1, False, str)
    assert worker.ask(ask, 1, False, str) == first  # it goes on
    process = worker._process
    process.kill()
    process.wait()
    with pytest.raises(UserError, match="does not answer"):
        worker.ask(ask, 1, False, str)
    assert pool.get(voice) is not worker


def test_models_are_unloaded(talking_model: Path, workers: Any) -> None:
    pool = workers(idle_s=0.2, most=1)
    voices = [Voice(str(talking_model), max_response_length=n) for n in (3, 4)]
    first: Worker = pool.get(voices[0])
    pool.get(voices[1])
    assert not first.alive and len(pool.loaded()) == 1
    end = time.monotonic() + 20
    while pool.loaded() and time.monotonic() < end:
        time.sleep(0.05)
    assert pool.loaded() == []


def test_a_directory_that_is_no_model(tmp_path: Path, workers: Any) -> None:
    worker = workers().get(Voice(str(tmp_path / "none")))
    with pytest.raises(UserError, match="none"):
        worker.ask([{"role": "user", "content": "x"}], 1, False, str)


# ---- the page ----


def test_the_page_end_to_end(tmp_path: Path, talking_model: Path) -> None:
    with board(tmp_path, models=talking_model) as client:
        refused = client.post("/chat", data={"model": "", "temperature": "-1", "template": "x"})
        assert refused.status_code == 422 and refused.text.count('aria-invalid="true"') == 5
        assert "outside" in client.post("/chat", data={"model": str(tmp_path)}).text
        asked = {
            "model": str(talking_model),
            "temperature": "1",
            "top_p": "1",
            "max_response_length": "60",
            "template": "plain",
            "system": "Be <b>kind</b>.",
        }
        link = client.post("/chat", data=asked).headers["location"]
        assert "Be &lt;b&gt;kind" in client.get(link).text
        client.post(f"{link}/say", data={"message": "the <i>cat</i>"})
        wait(client, link)
        page = client.get(link).text
        assert "the &lt;i&gt;cat" in page and page.count('class="turn assistant"') == 1
        client.post(f"{link}/say", data={"message": "the dog", "two": "1"})
        wait(client, link)
        assert client.post(f"{link}/choose", data={"which": "2"}).status_code == 303
        client.post(f"{link}/save")
        page = client.get(link).text
        saved = re.findall(r"<code>([^<]+\.jsonl)</code>", page)
        assert saved and all(Path(path).is_file() for path in saved)
        assert client.post(f"{link}/clear", data={"system": ""}).status_code == 303
        assert client.post(f"{link}/undo").status_code == 422
        assert client.post(f"{link}/other").status_code == 404
        assert str(talking_model) in client.get("/chat").text
        client.post("/chat/unload")


def wait(client: Any, link: str) -> None:
    end = time.monotonic() + 60
    while not client.get(f"{link}/live").json()["ended"]:
        assert time.monotonic() < end
        time.sleep(0.05)
