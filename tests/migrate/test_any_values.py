"""Values of another kind than a key expects end in a line of the table, or in a message."""

import random
from pathlib import Path

import pytest

from rlhf.migrate import converting, writing
from rlhf.migrate.reading import Request
from rlhf.migrate.tables import NotPossible
from rlhf.migrate.toolkits import TOOLKITS
from rlhf.types import UserError

COMMANDS = {
    "llama_factory": ["", "train"],
    "swift": ["", "sft", "pt", "rlhf", "megatron sft"],
    "axolotl": ["", "train"],
    "trl": ["sft", "dpo", "grpo", "ppo", "kto", "reward", "online_dpo", "cpo"],
    "openrlhf": ["train_sft", "train_dpo", "train_ppo_ray", "train_rm"],
}
PLAIN = ["abc", "", 0, -1, 1, 2.5, 1e9, 10**30, True, False, "$X", "a,b", "1e-4", "none", "auto"]
INNER = [[], {}, [1], ["a", "b"], {"a": 1}, [{"path": "x"}], [{"a": [1]}], [None], {"type": None}]
VALUES = [*PLAIN, *INNER, float("nan"), float("inf")]


@pytest.mark.parametrize("name", TOOLKITS)
def test_no_value_is_a_traceback(name: str) -> None:
    toolkit, draw = TOOLKITS[name], random.Random(name)
    names = [key.name.replace("*", "x").replace("[]", "") for key in toolkit.keys]
    migrated = 0
    for _ in range(300):
        values = {key: draw.choice(VALUES) for key in draw.sample(names, 6)}
        request = Request(name, draw.choice(COMMANDS[name]), values)
        ranks, rows = draw.choice([None, 2]), draw.choice([None, 100])
        try:
            found = converting.migrate(request, toolkit, Path("x.yaml"), ranks=ranks, rows=rows)
        except (UserError, NotPossible):
            continue
        migrated += 1
        assert writing.experiment(found, "x").startswith("# @package _global_")
        assert "## " in writing.table(found, "x", "command")
    assert migrated > 30
