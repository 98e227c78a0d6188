"""Hashes: equal for the same content whatever its line ends, different for anything else."""

from pathlib import Path

import pytest

from rlhf.process.files import digest, sha256


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
