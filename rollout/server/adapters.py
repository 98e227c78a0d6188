"""LoRA adapters on their way to servers. Each version has a name and a folder of its own, so that
responses which are being written keep the adapter that they began with.
"""

import contextlib
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlhf.types import AdapterWeights
from rollout.server.client import Server, ServerFault
from rollout.vllm_private import sent_checksums
from rollout.weights import AdapterFiles

_KEPT = 2  # versions of an adapter whose files stay


class Adapters:
    """The adapters of a run, by their own names and versions."""

    def __init__(self, run: str, place: Path | None) -> None:
        """`run`: what sets their names at servers apart from those of other runs. `place`: of their
        files; None: in memory.
        """
        self._run = run
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
        self._files = AdapterFiles(place)
        self._served: dict[str, deque[str]] = {}  # names at servers, the latest last
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the latest one's tensors

    def served_name(self, name: str, version: int) -> str:
        return f"{name}-{self._run}-{version}"

    def write(
        self, weights: AdapterWeights, version: int, dtype: torch.dtype
    ) -> tuple[str, dict[str, str]]:
        """Write the files; returns the adapter's name at servers and the checksums that engines of
        `dtype` have to hold. Raises SyncError for tensors unlike those of the version before.
        """
        tensors = self._files.write(weights, version)
        self.shapes = {name: spec.shape for name, spec in self._files.specs.items()}
        served = self.served_name(weights.name, version)
        folder = self._folder(served)
        folder.mkdir(exist_ok=True)
        for file in self._files.folder(weights.name).iterdir():
            file.replace(folder / file.name)
        config: Mapping[str, Any] = weights.config
        self._served.setdefault(weights.name, deque()).append(served)
        return served, sent_checksums(tensors, config, dtype)

    def load(self, server: Server, served: str, limit_s: float) -> None:
        """Have a server load one that it does not hold. Raises ServerFault."""
        if served in server.adapters():
            return
        body = {"lora_name": served, "lora_path": str(self._folder(served))}
        server.post("/v1/load_lora_adapter", body, limit_s=limit_s)

    def load_latest(self, server: Server, limit_s: float) -> None:
        """Have a server that was started anew load the latest of each name. Raises ServerFault."""
        for names in self._served.values():
            self.load(server, names[-1], limit_s)

    def outdated(self) -> list[str]:
        """Forget all but the latest versions; returns the names of those that are forgotten."""
        names = []
        for served in self._served.values():
            while len(served) > _KEPT:
                names.append(served.popleft())
                shutil.rmtree(self._folder(names[-1]), ignore_errors=True)
        return names

    def close(self) -> None:
        """Delete the files."""
        self._files.close()

    def _folder(self, served: str) -> Path:
        return self._files.folder(served)


def unload(server: Server, served: str, limit_s: float) -> None:
    """Have a server forget an adapter, where it has it."""
    with contextlib.suppress(ServerFault):
        server.post("/v1/unload_lora_adapter", {"lora_name": served}, limit_s=limit_s)
