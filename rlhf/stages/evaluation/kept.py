"""Answers of tasks, kept as they come, so that a killed evaluation goes on: a file for each policy
and task, a JSON line for each row. A line counts where its key, a digest of all that the answer
depends on, is that of a row that is asked now.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.tasks.figures import RowAnswer
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.stages.eval")


class KeptAnswers:
    """The answers of one policy to one task."""

    def __init__(self, path: Path) -> None:
        """Read what there is. A last line that a kill tore is cut off. Raises UserError for a line
        that can't be read.
        """
        self.path = path
        self.found: dict[str, RowAnswer] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            return
        content = path.read_bytes()
        whole, mark, torn = content.rpartition(b"\n")
        if torn:
            LOG.warning("%s: a last line of %d bytes was torn, and is cut off.", path, len(torn))
            with path.open("r+b") as file:
                file.truncate(len(whole) + len(mark))
        for number, line in enumerate(whole.splitlines(), start=1):
            self._read(number, line)

    def _read(
        self,
        number: int,
        line: bytes,
    ) -> None:
        try:
            row = json.loads(line)
            self.found[row["key"]] = _answer(row)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}, line {number}: no answer that an evaluation kept "
                f"({type(error).__name__}: {error}). Remove the file to have its rows answered "
                "again."
            ) from error

    def add(self, answers: Mapping[str, RowAnswer]) -> None:
        """Keep further answers, by their keys: they are on the disk when this returns."""
        self.found |= answers
        with self.path.open("ab") as file:
            for key, answer in answers.items():
                file.write(json.dumps(_row(key, answer), ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _row(key: str, answer: RowAnswer) -> dict[str, Any]:
    return {
        "key": key,
        "texts": list(answer.texts),
        "tokens": list(answer.tokens),
        "finished": list(answer.finished),
        "logprobs": list(answer.logprobs),
    }


def _answer(row: Mapping[str, Any]) -> RowAnswer:
    return RowAnswer(
        tuple(row["texts"]),
        tuple(row["tokens"]),
        tuple(row["finished"]),
        tuple(row["logprobs"]),
    )
