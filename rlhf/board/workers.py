"""Models that answer in processes of their own (rlhf/serving/worker.py), loaded when asked,
unloaded when nobody asked for a while. The board's own process loads no weights.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.types import Message, UserError

MOST = 2  # models that are loaded at a time
IDLE_S = 900.0  # after which a model is unloaded
_GRACE_S = 5.0


@dataclass(frozen=True, slots=True)
class Voice:
    """A model's directory, and how it draws its tokens."""

    path: str
    max_prompt_length: int = 2048  # tokens
    max_response_length: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    chat_template: str | None = None  # name of one of ours; None: the tokenizer's own


class Worker:
    """One loaded model. It answers one question at a time."""

    def __init__(self, voice: Voice, log: Path) -> None:
        self.voice, self.log = voice, log
        self.used = time.monotonic()
        self._turn = threading.Lock()
        self._ready = False
        command = [sys.executable, "-m", "rlhf.serving.worker", json.dumps(asdict(voice))]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as err:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C at the board is not for it
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
            )

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def busy(self) -> bool:
        """Whether it loads, or answers."""
        return self._turn.locked()

    def ask(
        self, messages: list[Message], seed: int, greedy: bool, tell: Callable[[str], None]
    ) -> tuple[str, bool]:
        """The answer, and whether it ended by itself; `tell` gets its pieces. Raises UserError
        where there is none.
        """
        with self._turn:
            self.used = time.monotonic()
            if not self._ready:
                self._read()
                self._ready = True
            asked = {"messages": messages, "seed": seed, "greedy": greedy}
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(asked) + "\n")
                self._process.stdin.flush()
            except OSError as error:
                raise self._gone() from error
            pieces: list[str] = []
            while "done" not in (said := self._read()):
                pieces.append(said["piece"])
                tell(said["piece"])
            self.used = time.monotonic()
            return "".join(pieces), bool(said["whole"])

    def _read(self) -> dict[str, Any]:
        """The next thing that it says. Raises UserError."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._gone()
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise UserError(str(said["error"]))
        return said

    def _gone(self) -> UserError:
        self._process.wait()
        code = self._process.returncode
        why = f"its process ended with exit code {code}; its log: {self.log}"
        return UserError(f"{self.voice.path} does not answer: {why}.")

    def cut(self) -> None:
        """Let the answer end here."""
        if self.alive and self.busy:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGINT)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.terminate()
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                stream.close()


class Workers:
    """The loaded models by voice: no more than MOST, the one that was idle longest goes first."""

    def __init__(self, logs: Path, idle_s: float = IDLE_S, most: int = MOST) -> None:
        """logs: the folder of what the processes print."""
        self._logs, self._idle_s, self._most = logs, idle_s, most
        self._held: dict[Voice, Worker] = {}
        self._lock = threading.Lock()
        self._count = 0
        self._sweeping = False

    def get(self, voice: Voice) -> Worker:
        """The model, loading where it is new. Raises UserError while all others answer."""
        with self._lock:
            worker = self._held.get(voice)
            if worker is not None and worker.alive:
                worker.used = time.monotonic()
                return worker
            self._drop([voice] if worker is not None else [])
            while len(self._held) >= self._most:
                idle = [held for held in self._held.items() if not held[1].busy]
                if not idle:
                    raise UserError(
                        f"{self._most} models are answering: expected fewer before another loads. "
                        "Wait until they end, or cut them short."
                    )
                oldest = min(idle, key=lambda held: held[1].used)
                self._drop([oldest[0]])
            self._count += 1
            worker = Worker(voice, self._logs / f"model-{self._count}.log")
            self._held[voice] = worker
            self._sweep_later()
            return worker

    def loaded(self) -> list[str]:
        """The directories of models in memory."""
        with self._lock:
            return [voice.path for voice, worker in self._held.items() if worker.alive]

    def unload(self) -> None:
        """End those that don't answer just now."""
        with self._lock:
            self._drop([voice for voice, worker in self._held.items() if not worker.busy])

    def sweep(self) -> None:
        """End those that nobody asked for a while, and those that died."""
        with self._lock:
            now = time.monotonic()
            old = [
                voice
                for voice, worker in self._held.items()
                if not worker.busy and (not worker.alive or now - worker.used > self._idle_s)
            ]
            self._drop(old)

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._drop(list(self._held))

    def _drop(self, voices: list[Voice]) -> None:
        for voice in voices:
            self._held.pop(voice).close()

    def _sweep_later(self) -> None:
        """Look again while a model is loaded; called with the lock held."""
        if self._sweeping:
            return
        self._sweeping = True
        timer = threading.Timer(max(0.05, self._idle_s / 4), self._swept)
        timer.daemon = True
        timer.start()

    def _swept(self) -> None:
        self.sweep()
        with self._lock:
            self._sweeping = False
            if self._held:
                self._sweep_later()
