"""The proof that the generator holds the trainer's weights: both give a fixed text the same logprobs."""

from collections.abc import Sequence

from rlhf.types import Generator, SyncError


def verify_sync(generator: Generator, probe: Sequence[int], trainer_logprobs: Sequence[float], tolerance: float, version: int) -> float:
    """Largest |generator - trainer| logprob over the tokens of `probe` after the first, in nats.

    `trainer_logprobs` has len(probe) - 1 entries at temperature 1. Raises SyncError naming the probe's worst token when the gap
    is above `tolerance` or not a number, and when the generator is at another weight version.
    """
    if generator.version != version:
        raise SyncError(f"weight sync {version}: the generator says that it holds version {generator.version}.")
    found = generator.logprobs(probe)
    if len(found) != len(trainer_logprobs) or len(found) != len(probe) - 1:
        raise SyncError(
            f"weight sync {version}: expected {len(probe) - 1} probe logprobs, found {len(found)} (generator) and {len(trainer_logprobs)} (trainer)."
        )
    gaps = [abs(a - b) for a, b in zip(found, trainer_logprobs, strict=True)]
    worst = max(range(len(gaps)), key=lambda i: (gaps[i] != gaps[i], gaps[i]))  # NaN counts as the largest
    if not gaps[worst] <= tolerance:
        raise SyncError(
            f"weight sync {version}: the generator's weights are not the trainer's. Logprob probe: token {worst + 1} (id {probe[worst + 1]}) has "
            f"{found[worst]:.6f} nats in the generator and {trainer_logprobs[worst]:.6f} in the trainer, a gap of {gaps[worst]:.2e} "
            f"(rollout.gap_tolerance {tolerance:.0e})."
        )
    return gaps[worst]
