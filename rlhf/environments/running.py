"""Running tools in the sandbox of reward/sandbox: one for all episodes of a process."""

import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conf.choices import Isolation
from reward.sandbox.calls import Call, Sandbox
from reward.sandbox.run import Limits, SandboxError, isolation
from rlhf.environments.schemas import Tool
from rlhf.types import UserError

# Kept apart by namespaces alone, since it starts programs.
SHELL = "shell"
_MOST_FILES = 1 << 30  # bytes of environment.files
_BYTES = 4  # of a character in UTF-8, at most


class Runner:
    """Runs tools. The sandbox starts, and the files are copied, with the first call."""

    def __init__(self, tools: Mapping[str, Tool], files: str | None, cpu_s: float) -> None:
        """`files`: the directory ``environment.files``. `cpu_s`: CPU seconds of a call. Raises
        UserError where the sandbox doesn't work here, or where `files` can't be given.
        """
        self._limits = Limits(time_s=cpu_s)
        try:
            self._namespaces = isolation(Isolation.auto)
        except SandboxError as error:
            raise UserError(f"environment=tools: the sandbox does not work: {error}") from error
        if SHELL in tools and not tools[SHELL].own and not self._namespaces:
            raise UserError(
                "environment.tools=[shell]: a shell needs namespaces, which this machine does not "
                "give. Run as root or outside of a container, or leave it out."
            )
        self._files = None if files is None else _directory(files)
        self._lock = threading.Lock()
        self._sandbox: Sandbox | None = None
        for tool in tools.values():
            if tool.own:
                self._check(tool)

    def run(
        self, tool: Tool, arguments: Mapping[str, Any], wall_s: float, characters: int
    ) -> tuple[bool, str]:
        """Whether a call ended as it should, and what it says, cut to so many characters. Raises
        SandboxError where the sandbox itself fails.
        """
        shell = tool.name == SHELL and not tool.own
        call = Call(
            tool.source,
            tool.name,
            arguments,
            wall_s,
            hook=not shell,
            output_bytes=_BYTES * (characters + 1),
        )
        result = self._started().run(call)
        text = result.output.rstrip("\n")
        if len(text) > characters:
            text = f"{text[:characters]} ... (cut)"
        passed = result.status == "passed"
        if not passed:
            text = f"{text}\nerror: {result.detail}".lstrip("\n")
        return passed, text

    def _check(self, tool: Tool) -> None:
        """The sandbox can load a function of the user's. Raises UserError."""
        limits = Limits(time_s=max(5.0, self._limits.time_s))
        check = f"{tool.source}\ndef _there() -> None:\n    assert callable({tool.name})\n"
        sandbox = Sandbox(limits, namespaces=self._namespaces)
        try:
            result = sandbox.run(Call(check, "_there", {}, limits.wall_s))
        finally:
            sandbox.close()
        if result.status != "passed":
            raise UserError(
                f"environment.tools: {tool.name} can't be loaded in the sandbox: {result.detail}. "
                "Its file may import the standard library alone; what needs more is an "
                "environment of your own (environment=python)."
            )

    def _started(self) -> Sandbox:
        with self._lock:
            if self._sandbox is None:
                files = None if self._files is None else self._copied(self._files)
                limits, namespaces = self._limits, self._namespaces
                self._sandbox = Sandbox(limits, namespaces=namespaces, files=files)
            return self._sandbox

    def _copied(self, files: Path) -> str:
        """A copy of the files that the sandbox's user, whom nobody knows, can read."""
        copy = Path(tempfile.mkdtemp(prefix="rlhf-tool-files-"))
        weakref.finalize(self, shutil.rmtree, copy, ignore_errors=True)
        try:
            shutil.copytree(files, copy / "files")
        except (OSError, shutil.Error) as error:
            raise UserError(f"environment.files={files}: can't be copied: {error}.") from error
        for folder, _, names in os.walk(copy):
            Path(folder).chmod(0o755)
            for name in names:
                (Path(folder) / name).chmod(0o644)
        return str(copy / "files")


def _directory(files: str) -> Path:
    path = Path(files).expanduser()
    if not path.is_dir():
        raise UserError(f"environment.files={files}: there is no such directory.")
    size = 0
    for folder, _, names in os.walk(path):
        size += sum((Path(folder) / name).stat().st_size for name in names)
    if size > _MOST_FILES:
        raise UserError(
            f"environment.files={files}: {size / 1e9:.1f} GB, of which each process makes a copy; "
            f"at most {_MOST_FILES / 1e9:.1f} GB."
        )
    return path
