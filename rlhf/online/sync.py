"""Sending weights from the trainer to the generator, and the proof that they arrived: what the
generator holds is what the trainer sent, and both give the same logprobs.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from policy.batching import collate
from policy.forward import Layout, policy_logprobs
from policy.model import adapter_weights, full_weights
from policy.rounding import Spread, rounding_spread, spread
from rlhf.online.gaps import Bounds, Calibration, Probe, fixed_bounds
from rlhf.process import distributed
from rlhf.types import AdapterWeights, FullWeights, Generator, SyncError

log = logging.getLogger(__name__)


@runtime_checkable
class Checked(Protocol):
    """A generator that knows the checksum of each tensor it was sent, and those of the tensors it
    holds as far as it can read them.
    """

    sent: dict[str, str]

    def checksums(self) -> dict[str, str]: ...


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
        theirs = logprobs()
        if self.tolerance is not None:
            (probe,) = self.probes
            gap = verify_sync(generator, probe.token_ids, theirs, self.tolerance, version)
            self.figures = {"rollout/probe_gap": gap}
            return
        check_held(generator, version)
        ours: list[float] = []
        for probe in self.probes:
            ours += generator.logprobs(probe.token_ids)[probe.first - 1 :]
        gaps = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        found = _largest(spread(gaps))
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


@dataclass(frozen=True, slots=True)
class WeightSync:
    """Keeps the generator's weights equal to the trainer's."""

    generator: Generator
    policy: Any  # the trainer's engine
    adapter_only: bool  # the LoRA adapter is sent alone, not whole weights with it merged in
    proof: Proof
    pad_id: int
    budget: int  # tokens per micro-batch

    def send(self, version: int) -> dict[str, float]:
        """Send the weights and prove that they arrived. Returns the figures of the proof; raises
        SyncError. A collective.
        """
        self.generator.sync(self._weights(), version)
        model = self.policy.module.model
        self.proof.check(self.generator, model, self._trainer_logprobs, version)
        return self.proof.figures

    def _weights(self) -> FullWeights | AdapterWeights:
        model = self.policy.module.model
        if self.adapter_only:
            return adapter_weights(model, self.policy.gather)
        return full_weights(model, self.policy.gather)

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


def _largest(found: Spread) -> Spread:
    """The largest of all ranks, so that every rank comes to the same verdict. Collective."""
    return Spread(*distributed.all_max([_nan_last(found.mean), _nan_last(found.tail)]))


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
    ours = generator.logprobs(probe_ids)
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
