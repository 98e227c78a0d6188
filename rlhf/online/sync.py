"""Sending weights from the trainer to the generator, and the proof that they arrived: what the
generator holds is what the trainer sent, and both give the same logprobs.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from policy.batching import collate
from policy.forward import Layout, policy_logprobs
from policy.model import adapter_weights, full_weights
from rlhf.process import distributed
from rlhf.types import AdapterWeights, FullWeights, Generator, SyncError

log = logging.getLogger(__name__)
# Gaps that rounding explains between the generator's and the trainer's logprobs, nats.
_FLOAT32_GAP, _HALF_GAP = 1e-4, 0.05


@runtime_checkable
class Checked(Protocol):
    """A generator that knows the checksum of each tensor it was sent, and those of the tensors it
    holds as far as it can read them.
    """

    sent: dict[str, str]

    def checksums(self) -> dict[str, str]: ...


@dataclass(frozen=True, slots=True)
class WeightSync:
    """Keeps the generator's weights equal to the trainer's."""

    generator: Generator
    policy: Any  # the trainer's engine
    adapter_only: bool  # the LoRA adapter is sent alone, not whole weights with it merged in
    probe: tuple[int, ...]  # fixed token ids whose logprobs prove each sync
    tolerance: float  # nats
    pad_id: int
    budget: int  # tokens per micro-batch

    def send(self, version: int) -> float:
        """Send the weights and prove that they arrived. Returns the probe's largest gap in nats;
        raises SyncError. A collective.
        """
        self.generator.sync(self._weights(), version)
        trainer = self._trainer_logprobs()
        return verify_sync(self.generator, self.probe, trainer, self.tolerance, version)

    def _weights(self) -> FullWeights | AdapterWeights:
        model = self.policy.module.model
        if self.adapter_only:
            return adapter_weights(model, self.policy.gather)
        return full_weights(model, self.policy.gather)

    def _trainer_logprobs(self) -> list[float]:
        """The trainer's logprobs of the probe's tokens after the first, at temperature 1."""
        module = self.policy.module
        batch = collate([self.probe[:1]], [self.probe[1:]], self.pad_id, distributed.device())
        group = torch.zeros(1, dtype=torch.long, device=batch.lengths.device)
        temperature, module.temperature = module.temperature, 1.0
        try:
            logprobs, _ = policy_logprobs(self.policy, batch, group, [0], Layout(self.budget))
        finally:
            module.temperature = temperature
        return [float(x) for x in logprobs[0]]


def gap_tolerance(configured: float | None, dtype: torch.dtype) -> float:
    """The gap in nats above which weights did not arrive: rollout.gap_tolerance where it is
    `configured`, else what rounding explains for weights of `dtype`.
    """
    if configured is not None:
        return configured
    return _FLOAT32_GAP if dtype is torch.float32 else _HALF_GAP


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
    if generator.version != version:
        raise SyncError(
            f"weight sync {version}: the generator still holds version {generator.version}."
        )
    if isinstance(generator, Checked):
        _compare_checksums(generator, version)
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
