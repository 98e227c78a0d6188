"""An export in its run directory: written and read back, refused when it was changed."""

import json
from pathlib import Path

import pytest

from conf.choices import LabelKind
from rlhf.labels.ledger import read_export
from rlhf.labels.records import Answer
from rlhf.types import UserError
from tests.labels.labels import export_of, on_disk, pairs

CHAT = [
    {"role": "system", "content": "Be \u2028 brief"},
    {"role": "user", "content": "Hi\r\nthere"},
]


def test_an_export_comes_back_as_it_was(tmp_path: Path) -> None:
    questions = [
        {
            "prompt": "Hi",
            "answers": [Answer("a", "policy-1", 0.5, 0.1), Answer("b\x0b\u2029", "policy-2", -1.0)],
        },
        {"prompt": CHAT, "answers": ["<script>", ""], "role": "gold", "best": "<script>"},
        {"prompt": "Hi", "answers": ["a", "b\x0b\u2029"], "role": "repeat", "repeats": 0},
    ]
    export = export_of(
        questions, ratings=True, prelabel=True, overlap=3, details={"ab": {"pairs": 4}}
    )
    assert read_export(on_disk(export, tmp_path)) == export
    ranking = export_of([{"prompt": "q", "answers": list("abcd")}], kind=LabelKind.ranking)
    assert read_export(on_disk(ranking, tmp_path / "r")) == ranking


def test_a_changed_ledger_is_refused(tmp_path: Path) -> None:
    on_disk(pairs(3), tmp_path)
    tasks = tmp_path / "tasks.jsonl"
    whole = tasks.read_bytes()
    tasks.write_bytes(whole.replace(b"good answer 1", b"good answer 7"))
    with pytest.raises(UserError, match=r"tasks\.jsonl was changed since export\.json"):
        read_export(tmp_path)
    tasks.write_bytes(whole)
    read_export(tmp_path)
    header = json.loads((tmp_path / "export.json").read_text())
    (tmp_path / "export.json").write_text(json.dumps({**header, "version": 9}))
    with pytest.raises(UserError, match="version 9, expected 1"):
        read_export(tmp_path)
    (tmp_path / "export.json").write_text(
        json.dumps({k: v for k, v in header.items() if k != "overlap"})
    )
    with pytest.raises(UserError, match="KeyError: 'overlap'"):
        read_export(tmp_path)
    tasks.unlink()
    with pytest.raises(UserError, match=r"no such file.*label\.export=DIRECTORY"):
        read_export(tmp_path)
