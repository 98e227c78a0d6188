"""Imports point one way, without circles; heavy libraries have few importers.

The rooms and the rule are described in docs/project/decisions.md ("The rooms of the house") and
CONTRIBUTING.md. This test reads the source only: it imports nothing of the project.
"""

import ast
import functools
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("conf", "rlhf", "rollout", "reward", "policy", "eval")
PACKAGES = (*PRODUCT, "benchmarks")

# The lower rooms, which every room above may import.
BASE = ("conf", "rlhf.types", "rlhf.process", "rlhf.models")
SIDE_BY_SIDE = ("rollout", "reward", "policy", "eval")
WIRING = ("rlhf.online", "rlhf.offline", "rlhf.stages")

# Room -> the rooms of ours that it may import beside itself. The longest name that fits counts.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "conf": (),
    "rlhf.types": ("conf",),
    "rlhf.process": ("conf", "rlhf.types"),
    "rlhf.models": ("conf", "rlhf.types", "rlhf.process"),
    **dict.fromkeys(SIDE_BY_SIDE, BASE),
    "rlhf.data": BASE,
    "rlhf.labels": (*BASE, "rlhf.data"),
    "rlhf.rows": (*BASE, "rlhf.data"),
    # tools run in the rewards' sandbox
    "rlhf.environments": (*BASE, "reward"),
    "rlhf.run": BASE,
    "rlhf.checks": (*BASE, "rlhf.run"),
    "rlhf.export": (*BASE, "rlhf.run"),
    "rlhf.serving": (*BASE, "rollout"),
    # where a version comes from stands in the manifests of runs
    "rlhf.registry": (*BASE, "rlhf.run"),
    # what users say is tested as labels are, and cleaned as rows are
    "rlhf.gateway": (*BASE, "rlhf.registry", "rlhf.labels", "rlhf.data"),
    "rlhf.cli": (*BASE, "rlhf.run", "rlhf.checks"),
    # pages over files: what runs, labels and rows are, and the options' declarations
    "rlhf.board": (
        *BASE,
        "rlhf.run",
        "rlhf.checks",
        "rlhf.cli",
        "rlhf.data",
        "rlhf.rows",
        "rlhf.labels",
        "rlhf.serving",
    ),
    # trials are processes: their commands, and what they leave in their run directories
    "rlhf.search": (*BASE, "rlhf.run", "rlhf.checks", "rlhf.cli", "rlhf.launch"),
    # reads other toolkits' files: knows our options by their declarations alone
    "rlhf.migrate": ("conf", "rlhf.types", "rlhf.process"),
    # starts processes, and imports nothing of what they do
    "rlhf.launch": ("conf", "rlhf.types", "rlhf.process"),
    # what trains knows no format of a file: its rows are given to it (rlhf/stages/rows.py)
    "rlhf.online": (*BASE, *SIDE_BY_SIDE, "rlhf.run", "rlhf.checks"),
    "rlhf.offline": (*BASE, *SIDE_BY_SIDE, "rlhf.run", "rlhf.checks"),
    "rlhf.stages": (
        *BASE,
        *SIDE_BY_SIDE,
        "rlhf.run",
        "rlhf.data",
        "rlhf.rows",
        "rlhf.labels",
        "rlhf.environments",
        "rlhf.board",
        "rlhf.checks",
        "rlhf.cli",
        "rlhf.export",
        "rlhf.launch",
        "rlhf.gateway",
        "rlhf.migrate",
        "rlhf.online",
        "rlhf.registry",
        "rlhf.search",
        "rlhf.serving",
        "rlhf.offline",
    ),
    "rlhf.__main__": ("conf", "rlhf.types", "rlhf.process", "rlhf.cli"),
    "rlhf": (),
    "benchmarks": PRODUCT,
}

# What a vLLM server imports by its name. It runs there alone, so nothing of ours imports it.
IN_A_SERVER = "rollout/server/extension.py"
IMPORTERS = {
    "vllm": {"rollout/vllm.py", "rollout/server/device_routes.py", IN_A_SERVER},
    "deepspeed": {"policy/engines/deepspeed.py"},
    "wandb": {"rlhf/run/tracking/wandb.py"},
    "label_studio_sdk": {"rlhf/labels/server.py"},
    "ray": {"rlhf/launch/ray.py"},
    "optuna": {"rlhf/search/study.py"},
}
# The one module that names a module of ours as a string: the stage that the command line asks for.
NAMES_A_STAGE = "rlhf/__main__.py"

# Modules of ours that a stage reaches, all imports followed, those inside functions too; packages
# without code don't count. The aim for online is 90.
MOST_REACHED = {"online": 94, "sft": 70, "reward": 73, "preference": 73}
# The same for the steps that rlhf/cli/command.py takes before a stage trains.
STEPS_REACH = {"rows": 87, "memory": 55}


@dataclass(frozen=True)
class Import:
    """An imported module, and whether the import runs as soon as its file is loaded."""

    path: str  # of the importing file, relative to the repository
    line: int
    module: str  # absolute dotted name
    eager: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.line} imports {self.module}"


def package_of(path: str) -> list[str]:
    """The package that relative imports of the file `path` start from."""
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return parts if path.endswith("__init__.py") else parts[:-1]


def imports_of(source: str, path: str) -> Iterator[Import]:
    """Every import in `source`; ``from a import b`` counts as ``a.b``, since b may be a module."""
    package = package_of(path)

    def walk(node: ast.AST, eager: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(path, child.lineno, alias.name, eager)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                origin = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield Import(path, child.lineno, f"{origin}.{alias.name}", eager)
            else:
                yield from walk(child, eager and not lazy(child))

    yield from walk(ast.parse(source), True)


def lazy(node: ast.AST) -> bool:
    """A function's body runs when it is called; ``if TYPE_CHECKING`` never runs."""
    if isinstance(node, ast.If):
        return "TYPE_CHECKING" in ast.unparse(node.test)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def string_imports(source: str, path: str) -> Iterator[Import]:
    """Calls of import_module and __import__ whose argument names a module of ours."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = getattr(node.func, "attr", getattr(node.func, "id", None))
        if called not in ("import_module", "__import__"):
            continue
        for text in (part for argument in node.args for part in ast.walk(argument)):
            name = text.value if isinstance(text, ast.Constant) else None
            if isinstance(name, str) and name.split(".")[0] in PACKAGES:
                yield Import(path, node.lineno, name, False)


def inside(module: str, name: str) -> bool:
    return module == name or module.startswith(name + ".")


def room_of(module: str) -> str:
    """The entry of MAY_IMPORT that `module` belongs to."""
    return max((room for room in MAY_IMPORT if inside(module, room)), key=len)


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def allowed(importer: str, module: str) -> bool:
    """Whether the file `importer` may import our own `module`."""
    room = room_of(module_of(importer))
    rooms = (room, *MAY_IMPORT[room])
    return any(inside(module, name) for name in rooms)


def source_files(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Path relative to the repository -> source."""
    paths = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def imports_or_definitions(source: str) -> list[ast.stmt]:
    """The statements of a module beside docstrings."""
    return [node for node in ast.parse(source).body if not isinstance(node, ast.Expr)]


@functools.cache
def files() -> dict[str, str]:
    return source_files()


@functools.cache
def imports() -> list[Import]:
    return [item for path, source in files().items() for item in imports_of(source, path)]


def is_empty_package(module: str) -> bool:
    """Whether a package's own file holds no code."""
    source = files().get(module.replace(".", "/") + "/__init__.py")
    return source is not None and not imports_or_definitions(source)


def graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, anywhere in its file."""
    modules = {module_of(path) for path in sources}
    edges: dict[str, set[str]] = {module: set() for module in modules}
    for path, source in sources.items():
        for item in (*imports_of(source, path), *string_imports(source, path)):
            # ``from package.module import name`` is an import of package.module
            target = item.module
            while target and target not in modules:
                target = target.rpartition(".")[0]
            if target and target != module_of(path):
                edges[module_of(path)].add(target)
    return edges


@functools.cache
def house() -> dict[str, set[str]]:
    """The graph of all our modules."""
    return graph(files())


def circles(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in sorted(edges[module]):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            start = stack.index(module)
            components.append(sorted(stack[start:]))
            del stack[start:]

    for module in sorted(edges):
        if module not in number:
            visit(module)
    return [component for component in components if len(component) > 1]


def reached(edges: Mapping[str, set[str]], *starts: str) -> set[str]:
    """Modules that the `starts` import, directly or not."""
    seen: set[str] = set()
    waiting = list(starts)
    while waiting:
        module = waiting.pop()
        if module in seen or module not in edges:
            continue
        seen.add(module)
        waiting.extend(edges[module])
    return seen


def test_imports_point_one_way() -> None:
    ours = [item for item in imports() if item.module.split(".")[0] in PACKAGES]
    assert len(ours) > 200, "the walk came back almost empty, so it checked nothing"
    wrong = [str(item) for item in ours if not allowed(item.path, item.module)]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle() -> None:
    assert circles(house()) == []


def test_no_module_of_ours_is_imported_by_name() -> None:
    strings = [item for path, source in files().items() for item in string_imports(source, path)]
    assert {item.path for item in strings} <= {NAMES_A_STAGE}, "\n".join(map(str, strings))


def closure(*starts: str) -> list[str]:
    """Modules with code that the `starts` reach; prints them."""
    modules = [module for module in reached(house(), *starts) if not is_empty_package(module)]
    print(f"{starts[-1]}: {len(modules)} modules\n" + "\n".join(sorted(modules)))
    return modules


@pytest.mark.parametrize(("stage", "most"), MOST_REACHED.items())
def test_a_stage_reaches_few_modules(stage: str, most: int) -> None:
    assert len(closure("rlhf.__main__", f"rlhf.stages.{stage}")) <= most


@pytest.mark.parametrize(("step", "most"), STEPS_REACH.items())
def test_a_step_before_a_stage_reaches_few_modules(step: str, most: int) -> None:
    assert len(closure(f"rlhf.stages.{step}")) <= most


@pytest.mark.parametrize(("library", "paths"), IMPORTERS.items())
def test_a_backend_has_few_importers_all_lazy(library: str, paths: set[str]) -> None:
    items = [
        item
        for item in imports()
        if inside(item.module, library) and not item.path.startswith("benchmarks/")
    ]
    assert {item.path for item in items} == paths
    assert not [str(item) for item in items if item.eager and item.path != IN_A_SERVER]


def test_nothing_of_ours_imports_what_runs_in_a_server() -> None:
    inside_a_server = module_of(IN_A_SERVER)
    assert inside_a_server in house()
    assert not [module for module, edges in house().items() if inside_a_server in edges]


def test_configuration_needs_the_standard_library_only() -> None:
    files = source_files(["conf"])
    assert len(files) > 3
    allowed_names = {"conf", *sys.stdlib_module_names}
    for path, source in files.items():
        names = {item.module.split(".")[0] for item in imports_of(source, path)}
        assert names <= allowed_names, path


@pytest.mark.parametrize(
    ("source", "path", "module", "eager"),
    [
        ("import vllm", "rollout/vllm.py", "vllm", True),
        ("def f():\n    from vllm import LLM", "rollout/vllm.py", "vllm.LLM", False),
        ("try:\n    import wandb\nexcept ImportError:\n    raise", "rlhf/x.py", "wandb", True),
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
    assert (module, eager) in [(item.module, item.eager) for item in imports_of(source, path)]


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ('import importlib\nimportlib.import_module("reward.terms")', "reward.terms"),
        ('from importlib import import_module\nimport_module(f"rlhf.stages.{x}")', "rlhf.stages."),
        ('__import__("policy.kl")', "policy.kl"),
        ('import importlib\nimportlib.import_module("numpy")', None),
        ("import importlib\nimportlib.import_module(users_module)", None),
    ],
)
def test_string_imports_are_seen(source: str, module: str | None) -> None:
    names = [item.module for item in string_imports(source, "rlhf/x.py")]
    assert names == ([] if module is None else [module])


def test_circles_of_any_size_are_seen() -> None:
    files = {
        "rlhf/a.py": "def f():\n    from rlhf import b",
        "rlhf/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rlhf.c",
        "rlhf/c.py": "from rlhf.a import f",
        "rlhf/d.py": "from rlhf.a import f",
    }
    assert circles(graph(files)) == [["rlhf.a", "rlhf.b", "rlhf.c"]]


@pytest.mark.parametrize(
    ("importer", "module", "expected"),
    [
        ("policy/losses.py", "reward.losses", False),
        ("policy/losses.py", "policy.kl", True),
        ("rollout/hf.py", "rlhf.types.Prompt", True),
        ("rollout/hf.py", "rlhf.run.tracking", False),
        ("rollout/hf.py", "rlhf.data.reading", False),
        ("eval/report/html.py", "rollout.hf", False),
        ("rlhf/online/loop.py", "policy.losses", True),
        ("rlhf/data/reading.py", "rlhf.labels.records", False),
        ("rlhf/labels/records.py", "rlhf.data.reading", True),
        ("rlhf/models/loading.py", "policy.model", False),
        ("rlhf/run/context.py", "rlhf.online.loop", False),
        ("rlhf/checks/disk.py", "reward.terms", False),
        ("conf/schema.py", "rlhf.types", False),
        ("rlhf/stages/eval.py", "benchmarks.proofs", False),
    ],
)
def test_rule(importer: str, module: str, expected: bool) -> None:
    assert allowed(importer, module) is expected
