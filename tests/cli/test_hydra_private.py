"""What we use of Hydra beyond its public interface is still there. When this fails after an
upgrade, repair rlhf/cli/config.py: nothing else depends on it.
"""

import ast
from pathlib import Path

import pytest

from rlhf.cli import config

ROOT = Path(__file__).resolve().parents[2]


def test_hydra_still_has_the_private_functions() -> None:
    try:
        from hydra._internal.utils import get_args
    except ImportError as error:
        pytest.fail(f"Hydra moved get_args, which rlhf/cli/config.py needs: {error}")
    args = get_args(["stage=ppo", "-m"])
    missing = [name for name in ("overrides", "multirun") if not hasattr(args, name)]
    assert not missing, f"get_args of this Hydra lacks {missing}: repair rlhf/cli/config.py"


def test_overrides_are_split_from_flags() -> None:
    split = config.split(["stage=ppo", "stage.steps=3", "--cfg", "job"])
    assert split.overrides == ["stage=ppo", "stage.steps=3"] and not split.multirun
    assert config.split(["stage=ppo", "--multirun"]).multirun


def test_no_other_file_uses_private_parts_of_hydra() -> None:
    users = []
    for folder in ("conf", "rlhf", "policy", "reward", "rollout", "eval", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hydra._"):
                    users.append(path.name)
    assert users == ["config.py"]
