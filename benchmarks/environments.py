"""How fast episodes are written: 64 of 4 turns against 64 responses of one turn that are as long,
by one engine in turns. python -m benchmarks.environments [rounds] [hf|vllm] [tokens of a turn]

The policy has 5M random weights, so that it would end a turn only by chance: here each turn is as
long as it may be, and counts as ended. With `uneven` a turn's length is drawn between half and one
and a half of that. The environment takes no time. Tokens that the environment writes are not
counted.
"""

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.choices import RolloutBackend
from conf.reward import EnvironmentConfig, EnvironmentKind
from conf.schema import Config, DataConfig, RolloutConfig, TinyConfig
from conf.stages import OnlineStage
from rlhf.models.encoding import prompt_ids
from rlhf.types import AdapterWeights, FullWeights, Generator, Message, Prompt, Rollout, Step
from rollout import make_generator
from rollout.episodes import EpisodeGenerator

EPISODES, TURNS, TURN_TOKENS = 64, 4, 64
SHAPE = TinyConfig(
    vocab_size=8000, hidden_size=256, intermediate_size=704, layers=4, heads=4, max_positions=1024
)
PROMPT_TOKENS = 96
TARGET = 0.8
_ANSWER = 32  # most tokens of what the environment says
# The policy's tokenizer has a token for each of these words and marks, as chat models' have.
WORDS = ["user", "assistant", "Guess what I think of.", "That is not it, try again."]
MARKS = ["<|im_start|>", "<|im_end|>"]


class Answering:
    """Answers each turn with a sentence."""

    def reset(self, row: Mapping[str, object], seed: int) -> str:
        """Nothing beside the prompt."""
        return ""

    def step(self, text: str) -> Step:
        """A short answer."""
        return Step("That is not it, try again.")

    def close(self) -> None:
        """Nothing is held."""


@dataclass(slots=True)
class Whole:
    """A generator whose responses are as long as they may be, and count as ended."""

    inner: Generator
    turn_tokens: int
    uneven: random.Random | None = None

    @property
    def version(self) -> int:
        return self.inner.version

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        n: int = 1,
        seed: int | None = None,
        greedy: bool = False,
    ) -> list[Rollout]:
        """As the generator inside."""
        if self.uneven is not None:
            prompts = [replace(prompt, limit=self._length()) for prompt in prompts]
        written = self.inner.generate(prompts, n=n, seed=seed, greedy=greedy)
        for rollout in written:
            rollout.finish_reason = "stop"
        return written

    def _length(self) -> int:
        assert self.uneven is not None
        return self.uneven.randint(self.turn_tokens // 2, self.turn_tokens * 3 // 2)

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """As the generator inside."""
        return self.inner.logprobs(token_ids)

    def sync(self, weights: FullWeights | AdapterWeights, version: int) -> None:
        """As the generator inside."""
        self.inner.sync(weights, version)

    def close(self) -> None:
        """As the generator inside."""
        self.inner.close()


def start(folder: Path, backend: RolloutBackend, limits: EnvironmentConfig) -> tuple[Any, Any]:
    """An engine of a policy with random weights, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    from rlhf.models.loading import tiny_config, train_tokenizer
    from rlhf.models.templates import template_text

    tokenizer = train_tokenizer(WORDS * 4, 8000, SHAPE.max_positions)
    tokenizer.chat_template = template_text("chatml")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(SHAPE, tokenizer), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rollout = RolloutConfig(
        backend=backend,
        max_response_length=limits.max_tokens,
        kv_cache_gib=0.25,
        max_num_seqs=EPISODES,
    )
    cfg = Config(
        stage=OnlineStage(),
        rollout=rollout,
        environment=limits,
        data=DataConfig(max_prompt_length=PROMPT_TOKENS),
    )
    engine = make_generator(
        cfg,
        model_path=str(folder),
        tokenizer=tokenizer,
        model_factory=lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    return engine, tokenizer


def tokens_a_second(generator: Generator, prompts: Sequence[Prompt], seed: int) -> float:
    """Written tokens a second of one call."""
    began = time.perf_counter()
    rollouts = generator.generate(prompts, seed=seed)
    return sum(rollout.length for rollout in rollouts) / (time.perf_counter() - began)


def measure(rounds: int, backend: RolloutBackend, turn_tokens: int) -> dict[str, list[float]]:
    """Written tokens a second of each way, by turns."""
    limits = EnvironmentConfig(
        kind=EnvironmentKind.python,
        max_turns=TURNS,
        max_tokens=TURNS * (turn_tokens * 3 // 2 + _ANSWER),
    )
    source: list[Message] = [{"role": "user", "content": "Guess what I think of."}]
    with tempfile.TemporaryDirectory() as folder:
        engine, tokenizer = start(Path(folder), backend, limits)
        ids = tuple(prompt_ids(tokenizer, source))
        prompts = [Prompt(str(i), "", ids, source) for i in range(EPISODES)]
        # a single turn of as many tokens
        single = [replace(prompt, limit=TURNS * turn_tokens) for prompt in prompts]
        even, uneven = (
            EpisodeGenerator(
                Whole(engine, turn_tokens, drawn),
                tokenizer,
                limits,
                Answering,
                max_prompt=PROMPT_TOKENS,
                max_turn=turn_tokens * (2 if drawn else 1),
            )
            for drawn in (None, random.Random(0))
        )
        ways = {"single": (engine, single), "episodes": (even, prompts)}
        ways["uneven"] = (uneven, prompts)
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, (generator, asked) in ways.items():
                speed = tokens_a_second(generator, asked, number)
                if number:  # the first warms up
                    speeds[name].append(speed)
        engine.close()
    return speeds


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    rounds = int(arguments[0]) if arguments else 7
    backend = RolloutBackend(arguments[1] if len(arguments) > 1 else "vllm")
    turn_tokens = int(arguments[2]) if len(arguments) > 2 else TURN_TOKENS
    speeds = measure(rounds, backend, turn_tokens)
    single = speeds["single"]
    print(f"{backend.value}, {EPISODES} x {TURNS} turns of {turn_tokens} tokens, {rounds} rounds")
    for name, values in speeds.items():
        shares = [value / base for value, base in zip(values, single, strict=True)]
        low, middle, high = min(shares), statistics.median(shares), max(shares)
        print(
            f"  {name:<9} {statistics.median(values):8.0f} written tokens/s, "
            f"{middle:.2f} [{low:.2f}, {high:.2f}] of a single turn (target {TARGET:g})"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
