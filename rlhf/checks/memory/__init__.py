"""What a run needs in memory, before anything loads: pure functions from shapes and settings to
bytes.

`shapes` counts parameters, `states` what engines hold of them, `activations` what a pass keeps and
what the generator takes; `moments` are a plan's parts, `plan` puts the roles of a stage together,
moment by moment, `fit` tries the other settings and `tables` shows them. Every formula names its
source and is held against DeepSpeed's own estimators, against tensors counted one by one, and
against measured peaks (tests/checks/test_memory*.py).
"""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Bytes:
    """Memory of one rank: on its device, and on the host. Without a GPU the device is the host, and
    `device` counts there.
    """

    device: float = 0.0
    host: float = 0.0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.device + other.device, self.host + other.host)


NOTHING = Bytes()


def total(parts: dict[str, Bytes]) -> Bytes:
    """The sum of named parts."""
    return sum(parts.values(), NOTHING)
