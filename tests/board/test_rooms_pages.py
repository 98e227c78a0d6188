"""Every page of the rooms in both languages, while there is nothing yet."""

from pathlib import Path

import pytest

from tests.board.rooms import board


@pytest.mark.parametrize("path", ["/data", "/labels", "/chat", "/models", "/doctor"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_pages_of_an_empty_board(tmp_path: Path, path: str, language: str) -> None:
    with board(tmp_path) as client:
        client.post(f"/language/{language}", data={"back": path})
        answer = client.get(path)
        assert answer.status_code == 200, answer.text
        assert f'lang="{language}"' in answer.text and "<h1>" in answer.text


def test_names_lead_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "secret.jsonl").write_text('{"text": "x"}\n')
    with board(tmp_path) as client:
        for name in ("..%2Fsecret.jsonl", "%2e%2e", ".looks", "none.csv", "a%00b.csv"):
            assert client.get(f"/data/file/{name}").status_code == 404
            assert client.post(f"/data/file/{name}/delete").status_code == 404
        assert client.get("/data/report/..%2F../x").status_code == 404
        assert client.get("/labels/../x").status_code == 404
        assert client.get("/chat/none").status_code == 404
        assert client.get("/annotate/none").status_code == 404
    assert (tmp_path / "secret.jsonl").is_file()
