"""The registry's file: versions, aliases, a history that can't be changed, two writers at once."""

import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.registry import entries, names
from rlhf.registry.files import changes
from rlhf.registry.gate import Gate, gate_of, parse_rule
from rlhf.registry.records import Action, Why
from rlhf.registry.store import Registry
from rlhf.types import UserError
from tests.registry.made import WHY, finished, model, registered

FREE = Gate()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry.sqlite", create=True)


def test_versions_count_up_and_the_same_files_are_the_same_version(
    registry: Registry, tmp_path: Path
) -> None:
    first = registered(registry, finished(tmp_path / "a", {"eval/x": 1.0}, b"one"))
    second = registered(registry, finished(tmp_path / "b", {"eval/x": 2.0}, b"two"))
    assert (first.label, second.label) == ("mine@1", "mine@2")
    draft = entries.draft_of("mine", first.draft.path, registry)
    again, is_new = registry.register(draft, WHY)
    assert (again.number, is_new) == (1, False)
    other = registered(registry, Path(first.draft.path), "other")
    assert other.label == "other@1" and registry.names() == ["mine", "other"]
    assert registry.figures("mine", 2)["eval/x"].value == 2.0
    assert registry.version("mine").number == 2
    with pytest.raises(UserError, match=r"no version or alias '7'.*1 to 2"):
        registry.version("mine", "7")


def test_aliases_go_and_come_back(registry: Registry, tmp_path: Path) -> None:
    versions = [registered(registry, model(tmp_path / str(i), bytes([i]))) for i in range(3)]
    for version in versions:
        registry.promote(version, "production", WHY, FREE)
    registry.promote(versions[0], "staging", WHY, FREE)
    assert registry.holders("mine") == {"production": 3, "staging": 1}
    with pytest.raises(UserError, match="holds production already"):
        registry.promote(versions[2], "production", WHY, FREE)
    for expected in (2, 1):  # each rollback goes one further back, not to and fro
        to = registry.target("mine", "production")
        registry.rollback("mine", "production", WHY, to)
        assert registry.holders("mine")["production"] == expected
    with pytest.raises(UserError, match="nothing to go back to"):
        registry.target("mine", "production")
    said = [(e.action, e.number, e.detail["previous"]) for e in registry.history("mine")[-2:]]
    assert said == [(Action.rollback, 2, 3), (Action.rollback, 1, 2)]
    assert registry.broken() == []


def test_a_rollback_that_comes_too_late_is_refused(registry: Registry, tmp_path: Path) -> None:
    versions = [registered(registry, model(tmp_path / str(i), bytes([i]))) for i in range(3)]
    registry.promote(versions[0], "production", WHY, FREE)
    registry.promote(versions[1], "production", WHY, FREE)
    to = registry.target("mine", "production")
    registry.promote(versions[2], "production", WHY, FREE)
    with pytest.raises(UserError, match="moved by someone else"):
        registry.rollback("mine", "production", WHY, to)
    assert registry.holders("mine")["production"] == 3


# ---- the history stays ----


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE history SET who = 'bob'",
        "UPDATE versions SET path = '/elsewhere'",
        "DELETE FROM history",
        "DELETE FROM versions",
        "INSERT OR REPLACE INTO history SELECT id, time, 'bob', reason, action, name, number,"
        " alias, detail, chain FROM history WHERE id = 1",
        "REPLACE INTO versions SELECT name, number, 'x', path, files, weights, lineage, card, time,"
        " who FROM versions",
        "INSERT INTO history SELECT 99, time, who, reason, action, name, number, alias, detail,"
        " chain FROM history WHERE id = 1",
    ],
)
def test_no_program_changes_what_happened(
    registry: Registry, tmp_path: Path, statement: str
) -> None:
    registered(registry, model(tmp_path / "a"))
    registry.close()
    other = sqlite3.connect(registry.path)  # a program of its own, without our settings
    before = other.execute("SELECT * FROM history").fetchall()
    with pytest.raises(sqlite3.IntegrityError, match="can not be"):
        other.execute(statement)
    assert other.execute("SELECT * FROM history").fetchall() == before


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("UPDATE history SET reason = 'better' WHERE id = 2", "event 2 .* was changed"),
        ("DELETE FROM history WHERE id = 2", "before event 3 some are missing"),
        ("UPDATE versions SET path = '/elsewhere'", "version mine@1 was changed"),
    ],
)
def test_a_change_without_the_triggers_breaks_the_chain(
    registry: Registry, tmp_path: Path, statement: str, told: str
) -> None:
    version = registered(registry, finished(tmp_path / "a", {"x": 1.0}))
    registry.promote(version, "staging", WHY, FREE)
    other = sqlite3.connect(registry.path)
    for (name,) in other.execute(
        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    ).fetchall():
        other.execute(f"DROP TRIGGER {name}")
    assert registry.broken() == []
    other.execute(statement)
    other.commit()
    (found,) = registry.broken()
    assert re.search(told, found)


_WRITER = """
import sys
import time
from pathlib import Path
from rlhf.registry.gate import Gate
from rlhf.registry.records import Why
from rlhf.registry.store import Registry
registry = Registry(Path(sys.argv[1]))
versions = [registry.version("mine", number) for number in sys.argv[2].split(",")]
print("ready", flush=True)
sys.stdin.readline()
end = time.monotonic() + 1
number = 0
while time.monotonic() < end or number < 3:
    number += 1
    why = Why(sys.argv[2], f"number {number}")
    registry.promote(versions[number % 2], "production", why, Gate())
print(number)
"""


def test_two_processes_promote_at_once(registry: Registry, tmp_path: Path) -> None:
    """Each promotion knows who held the alias before, and no event is lost."""
    for number in range(4):
        registered(registry, model(tmp_path / str(number), bytes([number])))
    command = [sys.executable, "-c", _WRITER, str(registry.path)]
    writers = [
        subprocess.Popen(
            [*command, numbers], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for numbers in ("1,2", "3,4")
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == "ready\n"
    for writer in writers:  # both at once
        assert writer.stdin is not None
        writer.stdin.write("go\n")
        writer.stdin.flush()
    promoted = 0
    for writer in writers:
        promoted += int(writer.communicate(timeout=60)[0])
        assert writer.returncode == 0
    moves = [event for event in registry.history("mine") if event.action is Action.promote]
    assert len(moves) == promoted
    held = None
    for event in moves:
        assert event.detail["previous"] == held and event.number != held
        held = event.number
    assert {event.number for event in moves} == {1, 2, 3, 4}
    assert registry.holders("mine")["production"] == held and registry.broken() == []


def test_another_file_is_no_registry(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    with pytest.raises(UserError, match="there is no registry"):
        Registry(path)
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE mine (x)")
    other.commit()
    with pytest.raises(UserError, match="it holds other tables"):
        Registry(path)
    (tmp_path / "text").write_text("text" * 1000)
    with pytest.raises(UserError, match="not a database"):
        Registry(tmp_path / "text")


# ---- the gate ----


def test_the_gate_names_the_figures(registry: Registry, tmp_path: Path) -> None:
    old = registered(
        registry, finished(tmp_path / "a", {"eval/score": 0.5, "safety": 0.99, "toxic": 0.1}, b"a")
    )
    new = registered(
        registry, finished(tmp_path / "b", {"eval/score": 0.7, "safety": 0.90, "toxic": 0.3}, b"b")
    )
    first = gate_of(["eval/score >= 0.4"], {"safety": 0.02}, {})
    done, before, findings = registry.promote(old, "production", WHY, first)
    assert done and before is None and all(f.passed for f in findings)
    assert "nothing is compared" in findings[1].text
    gate = gate_of(
        ["eval/score > 0.7", "eval/score >= 0.7", "eval/other < 1"],
        {"safety": 0.02, "eval/score": 0.0},
        {"toxic": 0.1},
    )
    done, before, findings = registry.promote(new, "production", WHY, gate)
    assert not done and before == 1 and registry.holders("mine")["production"] == 1
    assert [f.passed for f in findings] == [False, True, False, False, True, False]
    assert "it is 0.7" in findings[0].text and "was not measured" in findings[2].text
    assert "it went from 0.99 to 0.9" in findings[3].text
    assert "it went from 0.1 to 0.3" in findings[5].text
    withheld = registry.history("mine")[-1]
    assert withheld.action is Action.withheld and not withheld.detail["gate"][0]["passed"]
    why = Why("bob", "the old one answers nobody")
    done, _, _ = registry.promote(new, "production", why, gate, force=True)
    forced = registry.history("mine")[-1]
    assert done and forced.detail["forced"] and forced.why == why
    assert registry.holders("mine")["production"] == 2


@pytest.mark.parametrize("text", ["eval/x", "eval/x = 3", ">= 3", "eval/x >= three", "x >= 1.2.3"])
def test_what_is_no_rule_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no rule"):
        parse_rule(text)


def test_a_safety_figure_that_only_one_version_has_withholds(
    registry: Registry, tmp_path: Path
) -> None:
    old = registered(registry, finished(tmp_path / "a", {"x": 1.0}, b"a"))
    new = registered(registry, finished(tmp_path / "b", {"x": 1.0, "safety": 1.0}, b"b"))
    registry.promote(old, "production", WHY, FREE)
    done, _, (finding,) = registry.promote(new, "production", WHY, gate_of([], {"safety": 0.1}, {}))
    assert not done and "was not measured of the version that holds" in finding.text


# ---- files ----


def test_changed_files_are_named(registry: Registry, tmp_path: Path) -> None:
    path = finished(tmp_path / "a", {})
    version = registered(registry, path)
    file = registry.path
    registry.promote(version, "production", WHY, FREE)
    name = "registry:mine@production"
    assert names.directory_of(name, "model.path", file) == str(path)
    (path / "model.safetensors").write_bytes(b"WEIGHTS")  # of the same length
    (path / "code.py").write_text("")
    assert changes(version.draft) == ["model.safetensors was changed", "code.py is new"]
    with pytest.raises(UserError, match=r"model.path.*mine@1.*model.safetensors was changed"):
        names.directory_of(name, "model.path", file)
    (path / "config.json").unlink()
    assert "config.json is gone" in changes(version.draft)


def test_an_adapter_stands_on_its_base(registry: Registry, tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"base_model_name_or_path": str(base), "peft_type": "LORA", "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"a")
    version = registered(registry, folder)
    assert changes(version.draft) == []
    (base / "model.safetensors").write_bytes(b"other")
    assert changes(version.draft) == [f"its base {base} was changed or is gone"]


# ---- where it comes from ----


def test_lineage_names_the_versions_before(registry: Registry, tmp_path: Path) -> None:
    first = registered(registry, finished(tmp_path / "a", {}, b"a"))
    feedback = tmp_path / "gateway"
    feedback.mkdir()
    parent = {"kind": "policy", "path": "x", "registry": ["other@4"]}
    content = {"stage": "gateway", "parents": [parent], "data": []}
    (feedback / "manifest.json").write_text(json.dumps(content))
    read = [
        {"path": "rows.jsonl", "sha256": "0", "from": {"run": "../gateway", "stage": "gateway"}}
    ]
    trained = [{"kind": "policy", "path": first.draft.path, "weights": first.draft.weights}]
    path = finished(tmp_path / "b", {}, b"b", parents=trained, data=read)
    second = registered(registry, path)
    assert second.draft.lineage["ancestors"] == ["mine@1", "other@4"]
    assert second.draft.lineage["run"] == str(tmp_path / "b")


def test_figures_of_another_model_are_refused(registry: Registry, tmp_path: Path) -> None:
    version = registered(registry, finished(tmp_path / "a", {}, b"a"))
    other = {"kind": "before", "path": "elsewhere", "weights": "f" * 16}
    finished(tmp_path / "eval", {"eval/x": 1.0}, b"e", parents=[other])
    with pytest.raises(UserError, match=r"did not read the model.*elsewhere"):
        entries.figures_from(str(tmp_path / "eval"), version.draft)
    own = {"kind": "after", "path": "moved", "weights": version.draft.weights}
    finished(tmp_path / "mine", {"eval/x": 1.0, "text": 2.0}, b"m", parents=[own])
    source, figures = entries.figures_from(str(tmp_path / "mine"), version.draft)
    assert figures == {"eval/x": 1.0, "text": 2.0} and source.endswith("mine/summary.json")
    (tmp_path / "empty.json").write_text('{"metrics": {"x": null}}')
    with pytest.raises(UserError, match="holds no figures"):
        entries.figures_from(str(tmp_path / "empty.json"), version.draft)
