"""Proof of a weight sync: what the generator holds is what the trainer sent, and both give the same
logprobs.
"""

import logging
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rlhf.types import Generator, SyncError

log = logging.getLogger(__name__)


@runtime_checkable
class Checked(Protocol):
    """A generator that knows the checksum of each tensor it was sent, and those of the tensors it
    holds as far as it can read them.
    """

    sent: dict[str, str]

    def checksums(self) -> dict[str, str]: ...


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
    worst = max(range(len(gaps)), key=lambda i: gaps[i] if gaps[i] == gaps[i] else float("inf"))
    if not gaps[worst] <= tolerance:
        raise SyncError(
            f"weight sync {version}: at position {worst + 1} of the probe (token "
            f"{probe_ids[worst + 1]}) the generator's logprob is "
            f"{ours[worst]:.6f} and the trainer's {trainer_logprobs[worst]:.6f}: a gap of "
            f"{gaps[worst]:.2e} nats, above {tolerance:.0e} "
            "(rollout.gap_tolerance). The generator does not hold the trainer's weights."
        )
    return gaps[worst]


def _compare_checksums(generator: Checked, version: int) -> None:
    held = generator.checksums()
    different = [
        name
        for name, value in held.items()
        if name in generator.sent and generator.sent[name] != value
    ]
    if different:
        names = ", ".join(different[:5]) + (
            f" and {len(different) - 5} more" if len(different) > 5 else ""
        )
        raise SyncError(
            f"weight sync {version}: the generator does not hold what the trainer sent for {names}."
        )
    checked = sum(name in generator.sent for name in held)
    log.debug(
        "weight sync %d: %d of %d tensors compared by checksum, the rest by the probe",
        version,
        checked,
        len(generator.sent),
    )
