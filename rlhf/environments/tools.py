"""kind=tools: the policy calls functions, and reads what they return. An answer without a call ends
the episode.

A call that can't be read, names no tool, or whose arguments don't fit, and one that fails or takes
too long, is answered with an error, and counted.
"""

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from conf.reward import EnvironmentConfig
from rlhf.environments import calls, schemas
from rlhf.environments.calls import Broken, Call, Read, Reader
from rlhf.environments.running import Runner
from rlhf.environments.schemas import Tool
from rlhf.types import Environment, Step, Tools, UserError

_MOST_CALLS = 8  # in one turn; further ones are errors
_SHARE = 0.8  # of environment.step_limit_s for a turn's calls
_WALL = 4.0  # wall time of a call, in its CPU times, as in the rewards' sandbox
_OPTIONS = ("answer",)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:[eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class Toolbox:
    """What all episodes share."""

    tools: Mapping[str, Tool]
    read: Reader
    runner: Runner
    cpu_s: float
    step_s: float  # wall time for all calls of a turn
    characters: int  # of a call's result
    column: str | None  # of the answer that ends an episode well


def make(environment: EnvironmentConfig, tokenizer: Any = None) -> Callable[[], Environment]:
    """What makes an environment of ``environment.tools``. Raises UserError for tools that can't be
    loaded, and where the sandbox doesn't work.
    """
    unknown = sorted(set(environment.options) - set(_OPTIONS))
    if unknown:
        raise UserError(
            f"environment.options.{unknown[0]}: environment=tools takes {', '.join(_OPTIONS)}: "
            "the column of the answer that ends an episode well."
        )
    tools = schemas.load(environment.tools)
    for name in ("lookup",):
        if name in tools and not tools[name].own and environment.files is None:
            raise UserError(
                f"environment.tools=[{name}] reads environment.files, which is not set. Give a "
                "directory."
            )
    box = Toolbox(
        tools=tools,
        read=calls.make_reader(tokenizer, schemas.schemas(tools)),
        runner=Runner(tools, environment.files, environment.tool_limit_s),
        cpu_s=environment.tool_limit_s,
        step_s=_SHARE * environment.step_limit_s,
        characters=environment.tool_output,
        column=environment.options.get("answer"),
    )
    return lambda: ToolEnvironment(box)


def tools_of(environment: EnvironmentConfig) -> Tools:
    """The functions' schemas. Raises UserError."""
    return schemas.schemas(schemas.load(environment.tools))


@dataclass(slots=True)
class ToolEnvironment:
    """One episode."""

    box: Toolbox
    answer: str | None = None  # that ends it well
    plain: bool = False  # the prompt is a text, which no template renders

    def reset(self, row: Mapping[str, object], seed: int) -> str:
        """Raises ValueError for a row without its answer."""
        self.plain = isinstance(row.get("prompt"), str)
        if self.box.column is not None:
            value = row.get(self.box.column)
            if value is None:
                raise ValueError(f"the row has no column {self.box.column!r}, expected its answer")
            self.answer = str(value).strip()
        return ""

    def step(self, text: str) -> Step:
        """Raises SandboxError where the sandbox fails by itself."""
        found = self.box.read(text)
        if not found:
            return self._end(text)
        deadline = time.monotonic() + self.box.step_s
        counts = {"calls": float(len(found)), "broken_calls": 0.0, "failed_calls": 0.0}
        messages = []
        for at, read in enumerate(found):
            complaint = self._complaint(read, at)
            counts["broken_calls"] += complaint is not None
            if isinstance(read, Broken) or complaint is not None:
                messages.append(calls.complain(read, complaint or ""))
                continue
            passed, result = self._run(read, deadline)
            counts["failed_calls"] += not passed
            messages.append(calls.answer(read.name, result))
        info: dict[str, object] = dict(counts)
        if self.answer is not None:
            info["success"] = False  # as long as it doesn't end with the answer
        return Step(calls.as_text(messages) if self.plain else messages, info=info)

    def _end(self, text: str) -> Step:
        info: dict[str, object] = {"calls": 0.0, "broken_calls": 0.0, "failed_calls": 0.0}
        right = False
        if self.answer is not None:
            right = ends_with(text, self.answer)
            info["success"] = right
        return Step("", reward=float(right), done=True, info=info)

    def _run(self, call: Call, deadline: float) -> tuple[bool, str]:
        """Whether a call ended as it should, and what it says."""
        left = deadline - time.monotonic()
        if left <= 0:
            return False, "error: no time was left for this call"
        wall_s = min(_WALL * self.box.cpu_s, left)
        tool = self.box.tools[call.name]
        return self.box.runner.run(tool, call.arguments, wall_s, self.box.characters)

    def _complaint(self, read: Read, at: int) -> str | None:
        """Why a call is not made; None where it is."""
        if at >= _MOST_CALLS:
            return f"more than {_MOST_CALLS} calls in one turn"
        if isinstance(read, Broken):
            return read.reason
        if read.name not in self.box.tools:
            return f"no function {read.name[:64]!r}; there are {', '.join(self.box.tools)}"
        return schemas.misfit(self.box.tools[read.name], read.arguments)

    def close(self) -> None:
        """Nothing is held: the sandbox serves all episodes."""


def ends_with(text: str, answer: str) -> bool:
    """Whether a text's last words are the answer, or its last number equals it (whole numbers
    exactly, others to 6 digits); upper and lower case are equal, and so are stops behind it.
    """
    said = text.strip().rstrip(".!*`").rstrip().casefold()
    if re.search(rf"(?<![\w.-]){re.escape(answer.casefold())}\Z", said):
        return True
    numbers = _NUMBER.findall(said[-200:])
    if not numbers or not _NUMBER.fullmatch(answer):
        return False
    last, wanted = _number(numbers[-1]), _number(answer)
    if isinstance(last, int) and isinstance(wanted, int):
        return last == wanted
    return math.isclose(last, wanted, rel_tol=1e-6, abs_tol=1e-9)


def _number(text: str) -> int | float:
    text = text.replace(",", "")
    return int(text) if text.lstrip("-").isdigit() else float(text)
