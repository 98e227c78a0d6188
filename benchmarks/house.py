"""How readable and how entangled the code of a checkout is, in figures.

    python -m benchmarks.house                 this checkout
    python -m benchmarks.house --repo DIR      another one

Every figure is of the packages that users install (conf, rlhf, reward, policy, rollout, eval):

    modules reached     by a stage: its module and rlhf.__main__, all import statements followed,
                        those inside functions and under TYPE_CHECKING too
    circles             sets of modules that import each other, whatever their size
    string imports      calls of importlib.import_module with the name of a module of ours, outside
                        rlhf/__main__.py
    code lines          without blank lines, comments and docstrings
    expressions a line  nodes of kind ast.expr / code lines
    ternaries           `a if b else c`, per thousand code lines
    whole configuration functions with a parameter of type Config (all options), or RunContext

tests/test_house.py holds bounds for them.
"""

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("conf", "rlhf", "reward", "policy", "rollout", "eval")
# The modules that run the stages, in all versions so far.
STAGES = {
    "ppo": "rlhf.stages.online",
    "sft": "rlhf.stages.sft",
    "reward": "rlhf.stages.reward",
    "label": "rlhf.stages.label",
    "data": "rlhf.stages.data",
}
LONGEST_LINE = 100
ENTRY = "rlhf.__main__"
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the source."""

    name: str  # path:line name
    lines: int
    parameters: tuple[str, ...]  # their types, as written


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the packages."""

    path: str  # relative to the checkout
    module: str  # dotted name
    text: str
    nodes: tuple[ast.AST, ...]  # of the whole syntax tree

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


def sources(repo: Path) -> list[Source]:
    """The files of the packages. Raises ValueError where the directory holds none of them."""
    out = []
    for package in PACKAGES:
        for path in sorted((repo / package).rglob("*.py")):
            relative = path.relative_to(repo)
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            text = path.read_text(encoding="utf-8")
            nodes = tuple(ast.walk(ast.parse(text)))
            out.append(Source(relative.as_posix(), module, text, nodes))
    if not out:
        raise ValueError(f"{repo} holds none of the packages {', '.join(PACKAGES)}")
    return out


# --- density


def code_lines(source: Source) -> int:
    """Lines that hold code: no blank lines, comments and docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type not in _LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in source.nodes:
        if isinstance(node, ast.Expr) and _is_text(node.value):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def count(source: Source, kind: type[ast.AST]) -> int:
    """Nodes of a kind."""
    return sum(isinstance(node, kind) for node in source.nodes)


def functions(source: Source) -> Iterator[Function]:
    """Every function and method, those inside others too."""
    for node in source.nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            types = [ast.unparse(a.annotation) for a in arguments if a.annotation is not None]
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            yield Function(f"{source.path}:{node.lineno} {node.name}", length, tuple(types))


def takes(function: Function, name: str) -> bool:
    """Whether a parameter's type is the class `name`, or that or None."""
    for written in function.parameters:
        kind = written.removesuffix(" | None").split("[")[0]
        if kind.split(".")[-1] == name:
            return True
    return False


def long_lines(source: Source) -> list[str]:
    """path:line of every line above LONGEST_LINE characters."""
    return [
        f"{source.path}:{number}"
        for number, line in enumerate(source.lines, start=1)
        if len(line) > LONGEST_LINE
    ]


# --- imports


def names_a_module(call: ast.Call, known: Mapping[str, object]) -> str | None:
    """The module of ours that a call of importlib.import_module names as a constant."""
    if ast.unparse(call.func).split(".")[-1] not in ("import_module", "__import__"):
        return None
    argument = call.args[0] if call.args else None
    if isinstance(argument, ast.Constant) and argument.value in known:
        return str(argument.value)
    return None


def imported(source: Source, known: Mapping[str, object]) -> set[str]:
    """Modules of ours that a file names in any import, also by importlib."""
    package = source.module.split(".")
    if not source.path.endswith("__init__.py"):
        package = package[:-1]
    named: set[str] = set()
    for node in source.nodes:
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                named.add(inner if inner in known else origin)
        elif isinstance(node, ast.Call):
            named.add(names_a_module(node, known) or "")
    return {name for name in named if name in known and name != source.module}


def reached(graph: Mapping[str, set[str]], *starts: str) -> set[str]:
    """Modules that `starts` import, directly or not."""
    seen: set[str] = set()
    waiting = list(starts)
    while waiting:
        module = waiting.pop()
        if module in seen or module not in graph:
            continue
        seen.add(module)
        waiting += graph[module]
    return seen


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others: the strongly connected components
    of more than one module.
    """
    reach = {module: _followed(graph, module) for module in graph}
    out: list[list[str]] = []
    seen: set[str] = set()
    for module in sorted(graph):
        circle = sorted(other for other in reach[module] if module in reach[other])
        if circle and module not in seen:
            out.append(circle)
        seen.update(circle)
    return out


def _followed(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """Modules that imports lead to from `start`, which is only among them where a circle is."""
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph[module]
    return seen


# --- the figures


@dataclass(frozen=True, slots=True)
class House:
    """The figures of a checkout; lists name what they count."""

    reached: dict[str, int]  # by stage
    root_modules: list[str]  # files of rlhf/ itself
    circles: list[list[str]]
    string_imports: list[str]
    files: dict[str, int]  # path -> lines
    code_lines: int
    functions: list[Function]
    expressions: int
    ternaries: int
    long_lines: list[str]
    config_functions: list[str]
    context_functions: list[str]

    @property
    def expressions_a_line(self) -> float:
        return self.expressions / self.code_lines

    @property
    def ternaries_a_thousand(self) -> float:
        return 1000 * self.ternaries / self.code_lines

    def function_lines(self, share: float) -> int:
        """Lines of a function; `share` 0.5 is the median, 0.9 the 90th percentile."""
        lengths = sorted(function.lines for function in self.functions)
        return lengths[int(len(lengths) * share)]


def measure(repo: Path) -> House:
    """The figures of the checkout in `repo`."""
    read = sources(repo)
    known = {source.module: source for source in read}
    missing = [module for module in STAGES.values() if module not in known]
    if missing:
        raise ValueError(f"{repo} has no module {', '.join(missing)}: STAGES is out of date")
    graph = {source.module: imported(source, known) for source in read}
    every = [function for source in read for function in functions(source)]
    strings = []
    for source in read:
        calls = [node for node in source.nodes if isinstance(node, ast.Call)]
        names = [names_a_module(call, known) for call in calls]
        if source.module != ENTRY:
            strings += [f"{source.path}: {name}" for name in names if name is not None]
    return House(
        reached={name: len(reached(graph, ENTRY, stage)) for name, stage in STAGES.items()},
        root_modules=[s.path for s in read if Path(s.path).parent == Path("rlhf")],
        circles=circles(graph),
        string_imports=strings,
        files={source.path: len(source.lines) for source in read},
        code_lines=sum(code_lines(source) for source in read),
        functions=every,
        expressions=sum(count(source, ast.expr) for source in read),
        ternaries=sum(count(source, ast.IfExp) for source in read),
        long_lines=[line for source in read for line in long_lines(source)],
        config_functions=[f.name for f in every if takes(f, "Config")],
        context_functions=[f.name for f in every if takes(f, "RunContext")],
    )


def table(house: House) -> dict[str, str]:
    """The figures by their label."""
    rows = {f"modules reached by {name}": str(n) for name, n in house.reached.items()}
    longest = max(house.functions, key=lambda function: function.lines)
    return rows | {
        "modules at the root of rlhf/": str(len(house.root_modules)),
        "circles": f"{len(house.circles)} {[len(circle) for circle in house.circles]}",
        "string imports": str(len(house.string_imports)),
        "lines": str(sum(house.files.values())),
        "files": str(len(house.files)),
        "files above 400 lines": str(sum(lines > 400 for lines in house.files.values())),
        "median function, lines": str(house.function_lines(0.5)),
        "90th percentile function, lines": str(house.function_lines(0.9)),
        "longest function, lines": f"{longest.lines} ({longest.name})",
        "functions above 60 lines": str(sum(f.lines > 60 for f in house.functions)),
        "code lines": str(house.code_lines),
        "expressions a code line": f"{house.expressions_a_line:.2f}",
        f"lines above {LONGEST_LINE} characters": str(len(house.long_lines)),
        "ternaries a thousand code lines": f"{house.ternaries_a_thousand:.1f}",
        "functions that take Config": str(len(house.config_functions)),
        "functions that take RunContext": str(len(house.context_functions)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--repo", type=Path, default=here, help="the checkout's directory")
    given = parser.parse_args(arguments)
    for label, figure in table(measure(given.repo)).items():
        print(f"{label:36}{figure}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
