"""Environments of the tests, and a generator that writes what it is told; environment=python with
environment.path=tests.acting:... reaches them by name.
"""

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rlhf.models.encoding import is_chat
from rlhf.models.turns import end_ids, response_text
from rlhf.types import AdapterWeights, FullWeights, Message, Observation, Prompt, Rollout, Step


def turning_policy(folder: Path) -> Path:
    """A directory of a tiny random policy that ends a turn after five tokens or so: the first
    hidden feature is the same at every position, so its column of the head acts as a bias.
    """
    import torch

    from conf.choices import ModelKind
    from conf.schema import ModelConfig, TinyConfig
    from rlhf.models.loading import load_causal_lm, train_tokenizer

    tokenizer = train_tokenizer(["say a b c d go on no 1 2 3"], 300, 128)
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 1}
    tiny = TinyConfig(vocab_size=300, max_positions=128, tie_embeddings=False, **shape)
    torch.manual_seed(0)
    model = load_causal_lm(ModelConfig(kind=ModelKind.tiny, tiny=tiny), tokenizer)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 1.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] += math.log(300 / 4) / math.sqrt(32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Counting:
    """Answers with the number of the turn, and rewards it; done after as many turns as the row
    says.
    """

    made: ClassVar[list["Counting"]] = []

    def __init__(self, opening: str = "") -> None:
        self.opening, self.turn, self.closed = opening, 0, 0
        self.seed: int | None = None
        self.said: list[str] = []
        self.row: Mapping[str, object] = {}
        Counting.made.append(self)

    def reset(self, row: Mapping[str, object], seed: int) -> str:
        self.row, self.seed = row, seed
        return self.opening

    def step(self, text: str) -> Step:
        self.turn += 1
        self.said.append(text)
        done = self.turn == self.row.get("turns", 3)
        info: dict[str, object] = {"letters": np.int64(len(text))}
        if done:
            info["success"] = True
        return Step(f"no {self.turn}", 0.5 * self.turn, done, info)

    def close(self) -> None:
        self.closed += 1


class Async(Counting):
    """The same by coroutines, which take a while where the row says so."""

    lock: asyncio.Lock

    async def reset(self, row: Mapping[str, object], seed: int) -> str:  # type: ignore[override]
        self.lock = asyncio.Lock()
        return super().reset(row, seed)

    async def step(self, text: str) -> Step:  # type: ignore[override]
        async with self.lock:  # of the loop that began the episode
            await asyncio.sleep(float(str(self.row.get("slow", 0))))
            return super().step(text)


class Slow(Counting):
    """Its steps take a while."""

    def step(self, text: str) -> Step:
        time.sleep(float(str(self.row.get("slow", 0))))
        return super().step(text)


class Broken(Counting):
    """Raises in the turn that the row names, or at the beginning."""

    def reset(self, row: Mapping[str, object], seed: int) -> str:
        if row.get("broken") == 0:
            raise RuntimeError("no board")
        return super().reset(row, seed)

    def step(self, text: str) -> Step:
        if self.row.get("broken") == self.turn + 1:
            raise RuntimeError("the board fell")
        return super().step(text)


class EvenTokens(Counting):
    """Rewards a turn by how many of its characters have even codes; two turns."""

    def step(self, text: str) -> Step:
        self.turn += 1
        even = sum(ord(letter) % 2 == 0 for letter in text)
        reward = even / max(1, len(text))
        return Step("go on", reward, self.turn == 2, {"success": reward > 0.5})


class Tool(Counting):
    """Answers in the role tool."""

    def step(self, text: str) -> Step:
        step = super().step(text)
        answer: list[Message] = [{"role": "tool", "name": "f", "content": str(step.observation)}]
        observation: Observation = answer
        return Step(observation, step.reward, step.done, step.info)


class Scripted:
    """A generator whose turns `write` gives: token ids of (prompt's id, number of the turn)."""

    def __init__(self, tokenizer: Any, write: Callable[[str, int], list[int]]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.version = 0
        self.calls: list[tuple[list[Prompt], int | None, bool]] = []
        self.turns: dict[str, int] = {}
        self._counting = threading.Lock()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        assert n == 1
        with self._counting:
            self.calls.append((list(prompts), seed, greedy))
            return [self._rollout(prompt) for prompt in prompts]

    def _rollout(self, prompt: Prompt) -> Rollout:
        turn = self.turns[prompt.id] = self.turns.get(prompt.id, -1) + 1
        ids = self.write(prompt.id, turn)[: prompt.limit]
        reason = "stop" if ids[-1] in end_ids(self.tokenizer) else "length"
        text = response_text(self.tokenizer, ids, chat=is_chat(prompt.source))
        logprobs = [-0.5 - turn] * len(ids)
        return Rollout(prompt, text, ids, logprobs, reason, self.version)

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        raise NotImplementedError

    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        self.version = version

    def close(self) -> None:
        pass


class ScriptedServer(Scripted):
    """The same for several threads at once."""

    @contextmanager
    def session(self) -> Iterator[Callable[..., list[Rollout]]]:
        yield self.generate
