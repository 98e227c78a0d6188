"""A judge's replies in a file, so that a killed evaluation asks nothing twice."""

import json
from collections.abc import Sequence
from pathlib import Path

from eval.pairwise.asking import Judge
from rlhf.process.files import digest
from rlhf.types import Message, UserError

BLOCK = 256  # questions after which replies are written


class KeptReplies:
    """A judge that remembers. A line of the file is {"key", "reply"}: a digest of who was asked and
    what, and what it said, null for a question that it could not read.
    """

    def __init__(self, judge: Judge, path: Path, identity: object) -> None:
        """`identity`: a JSON value that changes whenever the replies may. Raises UserError for a
        damaged file; a last line that a kill tore is asked again.
        """
        self._judge, self._path, self._identity = judge, path, identity
        self._replies: dict[str, str | None] = {}
        if path.exists():
            self._read()

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole, _, torn = content.rpartition(b"\n")
        if torn:
            self._path.write_bytes(whole + b"\n" if whole else b"")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                self._replies[row["key"]] = row["reply"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}, line {number}: expected key and reply as a run writes them. "
                    "Restore it, or remove it to ask the judge again."
                ) from error

    def ask(self, questions: Sequence[list[Message]]) -> list[str | None]:
        """As the judge's own; only what the file does not hold is asked."""
        keys = [digest([self._identity, list(question)]) for question in questions]
        by_key = dict(zip(keys, questions, strict=True))
        missing = [key for key in by_key if key not in self._replies]
        for start in range(0, len(missing), BLOCK):
            block = missing[start : start + BLOCK]
            replies = self._judge.ask([by_key[key] for key in block])
            self._write(dict(zip(block, replies, strict=True)))
        return [self._replies[key] for key in keys]

    def _write(self, replies: dict[str, str | None]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            for key, reply in replies.items():
                # escaped: a reply may hold halves of characters
                file.write(json.dumps({"key": key, "reply": reply}) + "\n")
        self._replies |= replies
