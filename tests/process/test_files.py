"""Hashes: equal for the same content whatever its line ends, different for anything else. Folders
that end with their process, however it ends.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.process.files import OwnFolder, delete_orphans, digest, sha256


def test_line_ends_are_all_one_and_a_backslash_is_a_backslash() -> None:
    assert digest("a\r\nb") == digest("a\nb") == digest("a\rb")
    assert digest([{"content": "a\r\nb"}]) == digest([{"content": "a\nb"}])
    assert digest("C:\\root") != digest("C:\\noot")
    assert digest("a\\r\\nb") != digest("a\\nb")


@pytest.mark.parametrize(
    ("one", "other"),
    [("a", "b"), (["a"], "a"), ([], None), ({"a": 1}, {"a": 2}), ("\ud800", "\ud801")],
)
def test_other_content_is_another_digest(one: object, other: object) -> None:
    assert digest(one) != digest(other)
    assert digest(one) == digest(one)


def test_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert (
        sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


ROOT = Path(__file__).resolve().parents[2]
# a process with a folder in sys.argv[1], which it fills and keeps until it is killed
OWNER = """
import sys, time
from pathlib import Path
from rlhf.process.files import OwnFolder

folder = OwnFolder("weights", Path(sys.argv[1]))
(folder.path / "model").write_text("weights")
print(folder.path, flush=True)
if sys.argv[2] == "stays":
    time.sleep(600)
"""


def owner(place: Path, does: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", OWNER, str(place), does]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_folder_ends_with_its_process(tmp_path: Path) -> None:
    with owner(tmp_path, "ends") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
    assert process.returncode == 0 and list(tmp_path.iterdir()) == []


def test_what_a_killed_process_leaves_is_deleted_by_the_next(tmp_path: Path) -> None:
    foreign = tmp_path / "rlhf-weights-of-someone"
    foreign.mkdir()
    with owner(tmp_path, "stays") as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().strip())
        ours = OwnFolder("adapter", tmp_path)
        assert theirs.is_dir(), "its process lives"
        process.kill()
    assert (theirs / "model").read_text() == "weights"
    later = OwnFolder("adapter", tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([foreign, ours.path, later.path])
    ours.close()
    delete_orphans(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([foreign, later.path])
    later.close()


def test_without_locks_a_folder_is_nobodys_orphan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as without:
        without.setattr("fcntl.flock", refuse)
        folder = OwnFolder("weights", tmp_path)
    delete_orphans(tmp_path)
    assert folder.path.is_dir()
    folder.close()
    assert list(tmp_path.iterdir()) == []
