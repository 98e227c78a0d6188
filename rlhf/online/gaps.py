"""Bounds of the differences between the generator's and the trainer's logprobs: fixed ones where
rounding explains next to nothing, calibrated ones in half precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from policy.rounding import Spread
from rlhf.types import Generator, Prompt

# The largest gap that rounding explains in float32, nats.
_FLOAT32_GAP = 1e-4
# At the start a generator may be so many times as far off as rounding moves the trainer (a 135M
# model in bfloat16 under vLLM: 0.8 times). Another function is off by tens of times.
_START = 4.0
# A step's own tokens are others than the probes', and often few: they may be twice as far off.
_STEP = 2.0
_SEQUENCES = 8  # that a probe's tokens are shared out among
_RARE = 0.01  # share of tokens that may be above a bound of the tail; one token always may


@dataclass(frozen=True, slots=True)
class Probe:
    """Token ids whose logprobs are compared, from position `first` on."""

    token_ids: tuple[int, ...]
    first: int = 1


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far sampler and trainer may be apart on the tokens of a step, nats."""

    mean: float
    tail: float
    share: float  # of tokens that may be above `tail`; 0: none at all

    def fault(self, mean: float, above: float, tokens: float) -> str | None:
        """What is wrong with a mean gap of `mean` nats over `tokens` tokens, `above` of which are
        above `tail`; None where nothing is.
        """
        allowed = max(1.0, self.share * tokens) if self.share else 0.0
        if above > allowed:
            return f"{above:.0f} of {tokens:.0f} tokens are above {self.tail:.1e} nats"
        if not mean <= self.mean:
            return f"the mean of {tokens:.0f} tokens is {mean:.1e} nats, above {self.mean:.1e}"
        return None


def gap_tolerance(configured: float | None, dtype: torch.dtype) -> float | None:
    """The largest gap in nats that is accepted: rollout.gap_tolerance where it is `configured`,
    else what rounding explains in float32. None: half precision, where it is calibrated.
    """
    if configured is not None or dtype is not torch.float32:
        return configured
    return _FLOAT32_GAP


def sampled_probes(
    generator: Generator, prompts: Sequence[Prompt], tokens: int
) -> tuple[Probe, ...]:
    """The beginnings of some responses, sampled as in every step: up to `tokens` tokens
    together.
    """
    chosen = prompts[:_SEQUENCES]
    each = -(-tokens // _SEQUENCES)
    written = generator.generate(chosen, n=-(-_SEQUENCES // len(chosen)), seed=0)
    probes: list[Probe] = []
    for rollout in written:
        ids = (*rollout.prompt.token_ids, *rollout.token_ids[:each])
        probes.append(Probe(ids, len(rollout.prompt.token_ids)))
    return tuple(probes[:_SEQUENCES])


def fixed_bounds(tolerance: float) -> Bounds:
    return Bounds(tolerance, tolerance, share=0.0)


@dataclass(slots=True)
class Calibration:
    """Gaps in units of what rounding explains. The first ones say how far this generator is off;
    all later ones are held to `factor` times as much.
    """

    factor: float
    mean: float | None = None
    tail: float | None = None

    def fault(self, gaps: Spread, noise: Spread) -> str | None:
        """What is wrong with the gaps of a sync; None where nothing is. The first call calibrates.

        `noise`: what rounding alone does to the same tokens (rounding.rounding_spread).
        """
        found = {"mean": gaps.mean / noise.mean, "99th percentile": gaps.tail / noise.tail}
        limits = self._limits()
        for (name, ratio), limit in zip(found.items(), limits, strict=True):
            if not ratio <= limit:
                return (
                    f"their {name} is {ratio:.1f} times what rounding explains, above {limit:.1f} "
                    "times"
                )
        if self.mean is None:
            self.mean, self.tail = (max(1.0, ratio) for ratio in found.values())
        return None

    def bounds(self, noise: Spread) -> Bounds:
        """For a step's own tokens, sampled by the weights that `noise` was measured on."""
        mean, tail = self._limits()
        return Bounds(_STEP * mean * noise.mean, _STEP * tail * noise.tail, share=_RARE)

    def _limits(self) -> tuple[float, float]:
        if self.mean is None or self.tail is None:
            return _START, _START
        return self.factor * self.mean, self.factor * self.tail
