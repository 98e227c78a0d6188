"""Groups of parameters in TRL's trainers."""

from policy.engines.loading import one_rate
from rlhf.offline.steps import split
from tests.policy.test_groups import Tower, falling_rates


def test_groups_of_an_optimizer_are_parted() -> None:
    module = Tower()
    rates = falling_rates(module)
    weights = [block.weight for block in module.model.blocks]
    biases = [block.bias for block in module.model.blocks]
    given = [
        {"params": weights, "weight_decay": 0.1},
        {"params": biases, "weight_decay": 0.0},
        {"params": [], "weight_decay": 0.0},
    ]
    parts, numbers = split(given, rates)
    assert numbers == [0, 1, 2, 0, 1, 2, 0]
    assert [part["weight_decay"] for part in parts] == [0.1] * 3 + [0.0] * 4
    assert parts[1]["params"][0] is weights[1] and parts[5]["params"][0] is biases[2]
    whole, numbers = split(given, one_rate(module))
    assert whole == given and numbers == [0, 0, 0]
