"""Imports point one way, and each heavy backend is imported by exactly one file, inside a
function.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("conf", "rlhf", "rollout", "reward", "policy", "eval")
SHARED = (
    "conf.checks",
    "conf.choices",
    "conf.labelling",
    "conf.online",
    "conf.preparation",
    "conf.schema",
    "conf.stages",
    "conf.training",
    "rlhf.types",
    "rlhf.data",
    "rlhf.models.loading",
    "rlhf.process.distributed",
    "rlhf.process.moments",
)
SOLE_IMPORTER = {
    "vllm": "rollout/vllm.py",
    "deepspeed": "policy/engines/deepspeed.py",
    "wandb": "rlhf/run/tracking.py",
    "label_studio_sdk": "rlhf/labels/server.py",
}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether the import statement runs as soon as its file is loaded."""

    path: str  # of the importing file, relative to the repository
    line: int
    module: str  # absolute dotted name
    eager: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def imports_of(source: str, path: str) -> Iterator[Import]:
    """Every import in `source`; ``from a import b`` counts as ``a.b``, since b may be a module."""
    package = path.removesuffix(".py").removesuffix("/__init__").split("/")
    if not path.endswith("__init__.py"):
        package = package[:-1]

    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(path, child.lineno, alias.name, eager) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                origin = ".".join([*base, *([child.module] if child.module else [])])
                yield from (
                    Import(path, child.lineno, f"{origin}.{alias.name}", eager)
                    for alias in child.names
                )
            else:
                yield from walk(child, eager and not lazy(child))

    yield from walk(ast.parse(source), True)


def lazy(node: ast.AST) -> bool:
    """A function's body runs when it is called; ``if TYPE_CHECKING`` never runs."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def inside(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def allowed(importer: str, module: str) -> bool:
    """Whether the file `importer` may import our own `module`."""
    owner = importer.split("/", 1)[0]
    if owner == "conf":
        return inside(module, "conf")
    if owner in ("rollout", "reward", "policy", "eval"):
        return inside(module, owner) or any(inside(module, name) for name in SHARED)
    if importer.startswith("rlhf/stages/"):
        return not inside(module, "rlhf.__main__")
    if importer in (
        "rlhf/types.py",
        "rlhf/models/loading.py",
        "rlhf/process/distributed.py",
        "rlhf/process/moments.py",
    ) or importer.startswith("rlhf/data/"):
        return any(inside(module, name) for name in SHARED)
    # What carries a run (run, tracking, config, preflight, __main__ ...) knows no package and no
    # stage: stages are loaded by name.
    return inside(module, "conf") or (inside(module, "rlhf") and not inside(module, "rlhf.stages"))


def source_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def all_imports() -> list[Import]:
    return [
        found
        for path in source_files()
        for found in imports_of(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    ]


def test_imports_point_one_way() -> None:
    ours = [found for found in all_imports() if found.module.split(".")[0] in PACKAGES]
    assert len(ours) > 20, "the walk found almost nothing, so it checked nothing"
    wrong = [str(found) for found in ours if not allowed(found.path, found.module)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("library", "path"), SOLE_IMPORTER.items())
def test_backend_has_one_lazy_importer(library: str, path: str) -> None:
    found = [item for item in all_imports() if inside(item.module, library)]
    assert {item.path for item in found} == {path}
    eager = [str(item) for item in found if item.eager]
    assert not eager, "\n".join(eager)


def test_configuration_needs_the_standard_library_only() -> None:
    files = sorted((ROOT / "conf").rglob("*.py"))
    assert {"choices.py", "schema.py", "stages.py"} <= {path.name for path in files}
    for path in files:
        names = {
            found.module.split(".")[0]
            for found in imports_of(
                path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
            )
        }
        assert names <= {"conf", "dataclasses", "enum", "math", "re", "typing"}, path


@pytest.mark.parametrize(
    ("source", "path", "module", "eager"),
    [
        ("import vllm", "rollout/vllm.py", "vllm", True),
        ("def f():\n    from vllm import LLM", "rollout/vllm.py", "vllm.LLM", False),
        (
            "try:\n    import wandb\nexcept ImportError:\n    raise",
            "rlhf/run/tracking.py",
            "wandb",
            True,
        ),
        ("class A:\n    import deepspeed", "policy/x.py", "deepspeed", True),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import vllm",
            "rollout/x.py",
            "vllm",
            False,
        ),
        ("from . import kl", "policy/losses.py", "policy.kl", True),
        ("from ..reward import model", "policy/adapters/x.py", "policy.reward.model", True),
    ],
)
def test_walk_sees_every_kind_of_import(source: str, path: str, module: str, eager: bool) -> None:
    found = [(item.module, item.eager) for item in imports_of(source, path)]
    assert (module, eager) in found


@pytest.mark.parametrize(
    ("importer", "module", "expected"),
    [
        ("policy/losses.py", "reward.losses", False),
        ("policy/losses.py", "policy.kl", True),
        ("rollout/hf.py", "rlhf.types.Prompt", True),
        ("rollout/hf.py", "rlhf.run.tracking", False),
        ("eval/report.py", "rollout.hf", False),
        ("rlhf/online/loop.py", "policy.losses", True),
        ("rlhf/models/loading.py", "policy.model", False),
        ("rlhf/run/context.py", "rlhf.online.loop", False),
        ("conf/schema.py", "rlhf.types", False),
    ],
)
def test_rule(importer: str, module: str, expected: bool) -> None:
    assert allowed(importer, module) is expected
