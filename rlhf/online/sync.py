"""Sending weights from the trainer to the generator, and the proof that they arrived: what the
generator holds is what the trainer sent, and both give the same logprobs of some tokens (probes).

In float32 the two may be apart by a fixed bound, since rounding explains next to nothing; in half
precision by one that is calibrated on what rounding does (policy/agreement.py).
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from conf.schema import RolloutConfig
from policy.agreement import FLOAT32_GAP, Spread, rounding_spread, spread
from policy.batching import collate
from policy.forward import Layout, policy_logprobs
from policy.model import Gather
from rlhf.process import distributed
from rlhf.types import AdapterWeights, FullWeights, Generator, Prompt, SyncError

log = logging.getLogger(__name__)

# At the start a generator may be so many times as far off as rounding moves the trainer (a 135M
# model in bfloat16 under vLLM: 0.8 times). Another function is off by tens of times.
_START = 4.0
# A step's own tokens are others than the probes', and often few: they may be twice as far off.
_STEP = 2.0
_SEQUENCES = 8  # that a probe's tokens are shared out among
# Every weight has a part in each logprob but unused rows of the embedding, which are compared by
# checksum.
_PROBE_TOKENS = 24
_RARE = 0.01  # share of tokens that may be above a bound of the tail; one token always may


@runtime_checkable
class Checked(Protocol):
    """A generator that knows the checksum of each tensor it was sent, and those of the tensors it
    holds as far as it can read them.
    """

    sent: dict[str, str]

    def checksums(self) -> dict[str, str]: ...


@runtime_checkable
class Several(Protocol):
    """A generator of several engines, each of which holds the weights."""

    def logprobs_of_each(self, token_ids: Sequence[int]) -> list[list[float]]: ...


def logprobs_of_each(generator: Generator, token_ids: Sequence[int]) -> list[list[float]]:
    """`Generator.logprobs` by each of its engines."""
    if isinstance(generator, Several):
        return generator.logprobs_of_each(token_ids)
    return [generator.logprobs(token_ids)]


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

        `noise`: what rounding alone does to the same tokens (`rounding_spread`).
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


@dataclass(slots=True)
class Proof:
    """Shows that a generator computes what the trainer computes, and how far the two are apart."""

    probes: tuple[Probe, ...]
    tolerance: float | None  # nats; None: calibrated, for half precision
    calibration: Calibration
    bounds: Bounds = field(init=False)  # of a step's tokens, sampled by the weights proved last
    figures: dict[str, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.bounds = fixed_bounds(math.inf if self.tolerance is None else self.tolerance)

    def check(
        self, generator: Generator, model: Any, logprobs: Callable[[], list[float]], version: int
    ) -> None:
        """Compare versions, checksums and logprobs. Raises SyncError. A collective.

        `logprobs`: those of `model`, the trainer's, of the probes' compared tokens at temperature
        1; in half precision they are computed twice.
        """
        told, theirs = self._both(generator, logprobs)
        check_held(generator, version)
        if self.tolerance is not None:
            (probe,), (engines,) = self.probes, told
            gap = compare(engines, probe.token_ids, theirs, self.tolerance, version)
            self.figures = {"rollout/probe_gap": gap}
            return
        gaps: list[float] = []
        spreads = []
        for ours in self._compared(told):
            own = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
            gaps += own
            spreads.append(spread(own))
        mean = max((found.mean for found in spreads), key=_nan_last)
        tail = max((found.tail for found in spreads), key=_nan_last)
        found = _largest(Spread(mean, tail))
        noise = _largest(rounding_spread(model, theirs, logprobs))
        fault = self.calibration.fault(found, noise)
        if fault is not None:
            raise SyncError(
                f"weight sync {version}: the generator's logprobs of {len(gaps)} tokens are "
                f"{found.mean:.1e} nats from the trainer's in the mean: {fault} "
                "(rollout.gap_factor; rollout.gap_tolerance sets a bound of its own). The "
                "generator does not hold the trainer's weights, or computes something else."
            )
        self.bounds = self.calibration.bounds(noise)
        self.figures = {
            "rollout/probe_gap": distributed.all_max([max(gaps)])[0],
            "rollout/probe_gap_mean": found.mean,
            "rollout/probe_rounding": noise.mean,
        }

    def _both(
        self, generator: Generator, logprobs: Callable[[], list[float]]
    ) -> tuple[list[list[list[float]]], list[float]]:
        """Each probe's logprobs by each engine, and the trainer's; at once where they can be."""

        def ask() -> list[list[list[float]]]:
            return [logprobs_of_each(generator, probe.token_ids) for probe in self.probes]

        if not isinstance(generator, Several):
            theirs = logprobs()
            return ask(), theirs
        with ThreadPoolExecutor(1, "probe") as thread:
            asked = thread.submit(ask)
            theirs = logprobs()
            return asked.result(), theirs

    def _compared(self, told: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
        """The compared tokens' logprobs by each engine that answered to every probe."""
        engines: list[list[float]] = [[] for _ in range(min(map(len, told)))]
        for probe, by_engine in zip(self.probes, told, strict=True):
            for engine, logprobs in zip(engines, by_engine, strict=False):
                engine.extend(logprobs[probe.first - 1 :])
        return engines


@dataclass(frozen=True, slots=True)
class WeightSync:
    """Keeps the generator's weights equal to the trainer's."""

    generator: Generator
    policy: Any  # the trainer's engine
    # the model's weights as the generator takes them (policy.adapters.sender)
    weights_of: Callable[[Any, Gather], FullWeights | AdapterWeights]
    proof: Proof
    pad_id: int
    budget: int  # tokens per micro-batch

    def send(self, version: int) -> dict[str, float]:
        """Send the weights and prove that they arrived. Returns the figures of the proof; raises
        SyncError. A collective.
        """
        model = self.policy.module.model
        self.generator.sync(self.weights_of(model, self.policy.gather), version)
        self.proof.check(self.generator, model, self._trainer_logprobs, version)
        return self.proof.figures

    def _trainer_logprobs(self) -> list[float]:
        """The trainer's logprobs of the probes' compared tokens, at temperature 1."""
        module, probes = self.policy.module, self.proof.probes
        prompts = [probe.token_ids[: probe.first] for probe in probes]
        responses = [probe.token_ids[probe.first :] for probe in probes]
        batch = collate(prompts, responses, self.pad_id, distributed.device())
        group = torch.arange(len(probes), device=batch.lengths.device)
        rows = list(range(len(probes)))
        temperature, module.temperature = module.temperature, 1.0
        try:
            logprobs, _ = policy_logprobs(self.policy, batch, group, rows, Layout(self.budget))
        finally:
            module.temperature = temperature
        return [float(x) for x in logprobs[batch.response_mask]]


def make_proof(
    generator: Generator, prompts: Sequence[Prompt], rollout: RolloutConfig, dtype: torch.dtype
) -> Proof:
    """What proves each weight sync, the same on every rank. A collective."""
    tolerance = gap_tolerance(rollout.gap_tolerance, dtype)
    if tolerance is None:
        probes = sampled_probes(generator, prompts, rollout.gap_tokens)
    else:
        probes = (_likely_probe(generator, prompts[0]),)
    return Proof(distributed.broadcast(probes), tolerance, Calibration(rollout.gap_factor))


def _likely_probe(generator: Generator, prompt: Prompt) -> Probe:
    """The end of a prompt with its most likely response."""
    greedy = generator.generate([prompt], n=1, seed=0, greedy=True)[0]
    ids = (*prompt.token_ids, *greedy.token_ids[:_PROBE_TOKENS])[-_PROBE_TOKENS:]
    return Probe(ids)


def gap_tolerance(configured: float | None, dtype: torch.dtype) -> float | None:
    """The largest gap in nats that is accepted: rollout.gap_tolerance where it is `configured`,
    else what rounding explains in float32. None: half precision, where it is calibrated.
    """
    if configured is not None or dtype is not torch.float32:
        return configured
    return FLOAT32_GAP


def fixed_bounds(tolerance: float) -> Bounds:
    return Bounds(tolerance, tolerance, share=0.0)


def gap_fault(metrics: Mapping[str, float], bounds: Bounds, *, exact: bool) -> str | None:
    """What is wrong with a step's gaps; None where nothing is.

    `exact`: responses were drawn from the policy's whole distribution, so both sides must agree on
    the tokens of the newest weights. Stale ones may be anywhere, but not at infinity.
    """
    largest = metrics.get("rollout/logprob_gap", 0.0)
    told = f"rollout/logprob_gap is {largest:.2e} nats"
    if not (math.isfinite(largest) and math.isfinite(metrics.get("ahead/moved", 0.0))):
        return told
    if not exact or "rollout/logprob_gap" not in metrics:
        return None
    tokens = metrics.get("ahead/fresh_tokens", metrics["rollout/trained_tokens"])
    above = metrics["rollout/logprob_gap_above"] * tokens
    fault = bounds.fault(metrics["rollout/logprob_gap_mean"], above, tokens)
    return None if fault is None else f"{told}: {fault}"


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


def verify_sync(
    generator: Generator,
    probe_ids: Sequence[int],
    trainer_logprobs: Sequence[float],
    tolerance: float,
    version: int,
) -> float:
    """The largest gap in nats between the generator's and the trainer's logprobs of the probe's
    tokens after the first.

    `trainer_logprobs` [len(probe_ids) - 1], temperature 1. Raises SyncError naming the parameter
    whose checksum differs, or the probe's position, token and gap where the gap is above
    `tolerance` or no number.
    """
    if len(trainer_logprobs) != len(probe_ids) - 1 or len(probe_ids) < 2:
        raise ValueError(
            f"a probe of {len(probe_ids)} tokens has {len(probe_ids) - 1} logprobs, got "
            f"{len(trainer_logprobs)}"
        )
    check_held(generator, version)
    engines = logprobs_of_each(generator, probe_ids)
    return compare(engines, probe_ids, trainer_logprobs, tolerance, version)


def compare(
    engines: Sequence[Sequence[float]],
    probe_ids: Sequence[int],
    trainer_logprobs: Sequence[float],
    tolerance: float,
    version: int,
) -> float:
    """As `verify_sync`, with the logprobs by each engine at hand."""
    ours = max(engines, key=lambda logprobs: _nan_last(_gap(logprobs, trainer_logprobs)))
    gaps = [abs(a - b) for a, b in zip(ours, trainer_logprobs, strict=True)]
    worst = max(range(len(gaps)), key=lambda i: _nan_last(gaps[i]))
    if not gaps[worst] <= tolerance:
        raise SyncError(
            f"weight sync {version}: at position {worst + 1} of the probe (token "
            f"{probe_ids[worst + 1]}) the generator's logprob is {ours[worst]:.6f} and the "
            f"trainer's {trainer_logprobs[worst]:.6f}: a gap of {gaps[worst]:.2e} nats, above "
            f"{tolerance:.0e} (rollout.gap_tolerance). The generator does not hold the trainer's "
            "weights."
        )
    return gaps[worst]


def check_held(generator: Generator, version: int) -> None:
    """The generator holds this version, and every tensor that it lets read is what was sent. Raises
    SyncError naming the tensors that differ.
    """
    if generator.version != version:
        raise SyncError(
            f"weight sync {version}: the generator still holds version {generator.version}."
        )
    if isinstance(generator, Checked):
        _compare_checksums(generator, version)


def _gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest difference; NaN where one is."""
    gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return max(gaps, key=_nan_last)


def _largest(found: Spread) -> Spread:
    """The largest of all ranks, so that every rank comes to the same verdict. Collective."""
    return Spread(*distributed.all_max([_nan_last(found.mean), _nan_last(found.tail)]))


def _nan_last(gap: float) -> float:
    """For a maximum that NaN wins."""
    return math.inf if math.isnan(gap) else gap


def _compare_checksums(generator: Checked, version: int) -> None:
    sent, held = generator.sent, generator.checksums()
    different = [name for name, value in held.items() if sent.get(name, value) != value]
    if different:
        names = ", ".join(different[:5])
        if len(different) > 5:
            names += f" and {len(different) - 5} more"
        raise SyncError(
            f"weight sync {version}: the generator does not hold what the trainer sent for {names}."
        )
    log.debug(
        "weight sync %d: %d of %d tensors compared by checksum, the rest by the probe",
        version,
        sum(name in sent for name in held),
        len(sent),
    )
