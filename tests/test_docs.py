"""The pages keep their word: commands compose, options and files that they name exist, links lead
somewhere, tables render, lines stay short.
"""

import ast
import dataclasses
import importlib
import importlib.util
import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from conf.data import DataTarget
from conf.preparation import STEPS
from conf.stages import STAGES
from rlhf.cli import config, options
from rlhf.cli.config import check_overrides, quote_paths
from rlhf.data.formats import FORMATS
from rlhf.data.report.remedies import REMEDIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
GENERATED = {"docs/configuration.md"}  # its own test holds it fresh
MAX_LINE = 100
MAX_TABLE_ROW = 160  # a row can't be broken
FENCE = re.compile(r"^ *```")
# `stage.steps`, but neither conf/stage.py nor a file's name such as data.jsonl
OPTION = re.compile(
    r"(?<![\w/.])((?:run|model|adapter|engine|rollout|reward|data|label|tracking|launch|stage)"
    r"(?:\.[a-z_]+)+)(?![\w/(])"
)
FILE_ENDINGS = (".md", ".jsonl", ".py", ".yaml", ".safetensors")
HISTORY = ("CHANGELOG.md", "docs/project/decisions.md")  # names what is no more


@dataclass(frozen=True)
class Command:
    """A command line of a page."""

    page: str
    line: int
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {' '.join(self.words)}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def lines_of(page: Path) -> list[tuple[int, str, bool]]:
    """Number, text and whether it is inside a fenced block, for each line of `page`."""
    out, inside = [], False
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if FENCE.match(text):
            inside = not inside
            out.append((number, text, True))
        else:
            out.append((number, text, inside))
    return out


def command_lines(page: Path) -> list[tuple[int, str]]:
    """Lines of the fenced blocks, those that end in a backslash joined with the next."""
    out: list[tuple[int, str]] = []
    started, parts = 0, ""
    for number, text, inside in lines_of(page):
        if not inside or FENCE.match(text):
            started, parts = 0, ""
            continue
        started = started or number
        if text.rstrip().endswith("\\"):
            parts += text.rstrip()[:-1] + " "
            continue
        out.append((started, parts + text))
        started, parts = 0, ""
    return out


def inline_commands(page: Path) -> list[tuple[int, str]]:
    """`python -m rlhf ...` between backticks in running text, which may cross a line's end."""
    text = "\n".join("" if inside else line for _, line, inside in lines_of(page))
    return [
        (text[: match.start()].count("\n") + 1, match[1].replace("\n", " "))
        for match in re.finditer(r"`([^`]*-m rlhf [^`]*)`", text)
    ]


def commands(page: Path) -> list[Command]:
    """Every command of `page` that runs a module by `-m`, without its comment."""
    out = []
    for line, text in command_lines(page) + inline_commands(page):
        if re.search(r" -m [a-z]", text):
            words = tuple(shlex.split(text, comments=True))
            if "-m" in words:
                out.append(Command(name_of(page), line, words))
    return out


ALL_COMMANDS = [
    command for page in PAGES if name_of(page) not in HISTORY for command in commands(page)
]


def overrides(command: Command) -> tuple[str, ...]:
    """What `-m rlhf` is told, without flags and without `...`, which stands for more options."""
    words = list(command.words)
    start = next(i for i, word in enumerate(words) if word == "-m" and words[i + 1] == "rlhf")
    given, after_flag = [], ""
    for word in words[start + 2 :]:
        if not word.startswith("-") and word != "..." and after_flag != "--cfg":
            given.append(word)
        after_flag = word
    return tuple(given)


def rlhf_commands() -> dict[tuple[str, ...], Command]:
    """Each distinct `-m rlhf` command of the pages that names a stage."""
    out: dict[tuple[str, ...], Command] = {}
    for command in ALL_COMMANDS:
        if " -m rlhf" not in " ".join(command.words) or "rlhf" not in command.words:
            continue
        given = overrides(command)
        if any(word.startswith("stage=") and word != "stage=NAME" for word in given):
            out.setdefault(given, command)
    return out


def sweep_jobs(given: tuple[str, ...]) -> list[list[str]]:
    """The first and the last job of a sweep (`stage.kl_coef=0.1,0.2`); of a plain command, one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    jobs: list[list[str]] = [[], []]
    for word, quoted in zip(given, quote_paths(given), strict=True):
        override = parser.parse_override(quoted)
        values = [word, word]
        if override.is_sweep_override():
            key = override.get_key_element()
            choices = [f"{key}={value}" for value in override.sweep_string_iterator()]
            values = [choices[0], choices[-1]]
        jobs[0].append(values[0])
        jobs[1].append(values[1])
    return jobs[:1] if jobs[0] == jobs[1] else jobs


def covering(every: dict[tuple[str, ...], Command]) -> dict[tuple[str, ...], Command]:
    """Of each stage the longest command, which sets most options."""
    longest: dict[str, tuple[str, ...]] = {}
    for given in every:
        stage = next(word for word in given if word.startswith("stage="))
        if len(given) > len(longest.get(stage, ())):
            longest[stage] = given
    return {given: every[given] for given in longest.values()}


def failures(chosen: dict[tuple[str, ...], Command]) -> list[str]:
    out = []
    for given, command in chosen.items():
        for job in sweep_jobs(given):
            try:
                config.compose(job)
            except Exception as error:  # noqa: BLE001 - all failures are reported together
                out.append(f"{command}\n    {error}")
    return out


def test_commands_name_stages_presets_and_options_that_exist() -> None:
    found = rlhf_commands()
    assert len(found) > 50
    wrong = []
    for given, command in found.items():
        try:
            check_overrides([*given, "--multirun"])
        except Exception as error:  # noqa: BLE001 - all failures are reported together
            wrong.append(f"{command}\n    {error}")
    assert not wrong, "\n".join(wrong)


def test_the_longest_command_of_each_stage_composes() -> None:
    chosen = covering(rlhf_commands())
    assert len(chosen) > 10
    wrong = failures(chosen)
    assert not wrong, "\n".join(wrong)


@pytest.mark.full  # half a second each; `make docs` and `make test-full` run it
def test_every_command_composes() -> None:
    wrong = failures(rlhf_commands())
    assert not wrong, "\n".join(wrong)


def test_modules_of_commands_exist() -> None:
    modules = set()
    for command in ALL_COMMANDS:
        words = command.words
        if words[0].endswith(("python", "torchrun")) and "pip" not in words:
            modules.add(words[words.index("-m") + 1])
    assert {"rlhf"} < modules
    assert not [name for name in modules if importlib.util.find_spec(name) is None]


@cache
def make_targets() -> frozenset[str]:
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return frozenset(re.findall(r"^  make ([a-z0-9-]+) +\S", done.stdout, re.MULTILINE))


def named_targets(page: Path) -> set[str]:
    """Targets of `make` in a block or between backticks."""
    targets = set()
    for _, text in command_lines(page):
        targets |= set(re.findall(r"^\s*make ([a-z][a-z0-9-]+)", text))
    plain = "\n".join(line for _, line, inside in lines_of(page) if not inside)
    return targets | set(re.findall(r"`make ([a-z][a-z0-9-]+)", plain))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page: Path) -> None:
    assert named_targets(page) <= make_targets()


def test_readme_names_the_two_commands() -> None:
    assert {"demo", "test"} <= named_targets(ROOT / "README.md")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_exist(page: Path) -> None:
    if name_of(page) in HISTORY:
        pytest.skip("history names options that are no more")
    known = options.valid_keys(list(STAGES))
    of_items = tuple(key.partition("<")[0] for key in known if "<" in key)
    named = {match[1] for match in OPTION.finditer(page.read_text(encoding="utf-8"))}
    unknown = named - set(known)
    # below reward.terms and data.sources a name of the user's choice comes first; whole commands
    # are checked above
    wrong = [key for key in unknown if not key.startswith(of_items)]
    assert not [key for key in wrong if not key.endswith(FILE_ENDINGS)]


# Files of the repository between backticks: rlhf/online/loop.py, conf/stage/ppo.yaml, tests/run/.
FILE = re.compile(
    r"`((?:rlhf|conf|policy|rollout|reward|eval|benchmarks|tests|docs|requirements)/[\w./-]*"
    r"(?:/|\.\w+))`"
)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_of_the_repository_exist(page: Path) -> None:
    if name_of(page) in HISTORY:
        pytest.skip("history names files that are no more")
    named = {name for name in FILE.findall(page.read_text(encoding="utf-8")) if "NAME" not in name}
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def anchors(page: Path) -> set[str]:
    """The targets that a page's headings are, as GitHub and MyST name them."""
    out = set()
    for _, text, inside in lines_of(page):
        if not inside and text.startswith("#"):
            title = re.sub(r"[`*]|\[|\]\([^)]*\)", "", text.lstrip("#").strip()).lower()
            out.add(re.sub(r"[^\w\- ]", "", title).replace(" ", "-"))
    return out


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page: Path) -> None:
    dead = []
    for number, text, inside in lines_of(page):
        for target, anchor in [] if inside else LINK.findall(text):
            if "://" in target:
                continue
            where = page.parent / target if target else page
            if not where.exists() or (anchor and anchor not in anchors(where)):
                dead.append(f"{name_of(page)}:{number}: {target}#{anchor}")
    assert not dead


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=name_of)
def test_pages_are_in_the_table_of_contents(page: Path) -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
    assert name == "index" or re.search(rf"^{re.escape(name)}$", index, re.MULTILINE)


def cells(row: str) -> int:
    """Cells of a table's row; a bar inside code counts as GitHub and MyST count it, escaped or
    not.
    """
    return len(re.split(r"(?<!\\)\|", row.strip().strip("|")))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_render(page: Path) -> None:
    """A header, a line of dashes and rows of as many cells, without a blank line between."""
    table: list[tuple[int, str]] = []
    wrong = []
    for number, text, inside in [*lines_of(page), (0, "", False)]:
        if text.startswith("|") and not inside:
            table.append((number, text))
            continue
        if table:
            first = table[0][0]
            dashes = len(table) > 1 and re.fullmatch(r"[|: -]+", table[1][1]) is not None
            if not dashes or len({cells(row) for _, row in table}) != 1:
                wrong.append(f"{name_of(page)}:{first}")
        table = []
    assert not wrong


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short(page: Path) -> None:
    if name_of(page) in GENERATED:
        pytest.skip("generated")
    long = []
    for number, text, inside in lines_of(page):
        limit = MAX_TABLE_ROW if text.startswith("|") and not inside else MAX_LINE
        if len(text) > limit:
            long.append(f"{name_of(page)}:{number}: {len(text)}")
    assert not long


def reference(name: str) -> str:
    return (ROOT / "docs" / "reference" / f"{name}.md").read_text(encoding="utf-8")


def test_the_page_of_formats_is_complete() -> None:
    rows = set(re.findall(r"^\| (\w+) \| .+ \| .+ \|$", reference("formats"), re.MULTILINE))
    assert {form.name for form in FORMATS} <= rows
    written = reference("formats")
    assert not [target.value for target in DataTarget if f"`{target.value}`" not in written]
    templates = sorted((ROOT / "rlhf" / "models" / "templates").glob("*.jinja"))
    assert templates
    assert not [path.stem for path in templates if f"`{path.stem}`" not in written]


@pytest.mark.parametrize("step", sorted(STEPS))
def test_the_page_of_steps_is_complete(step: str) -> None:
    """Each step has a paragraph, which names its options."""
    paragraphs = {
        match[1]: match[0]
        for match in re.finditer(r"^\*\*(\w+)\*\*.*?(?=\n\n)", reference("data-steps"), re.M | re.S)
    }
    named = set(re.findall(r"`(\w+)`", paragraphs[step]))
    assert {field.name for field in dataclasses.fields(STEPS[step])} <= named


def test_the_page_of_findings_is_complete() -> None:
    page = reference("data-steps")
    assert not [name for name in REMEDIES if name not in page]


def metric_names() -> set[str]:
    """Metrics that the product's source spells out: "objective/kl", "time/{name}_s"."""
    out: set[str] = set()
    groups = "objective|rollout|policy|value|group|reward|time|memory|train|eval|watch|judge|loss"
    literal = re.compile(rf'f?"((?:{groups}|data|label)/[a-z0-9_]+)"')
    for folder in ("rlhf", "policy", "eval", "rollout"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name in ("plots.py", "console.py"):
                continue  # they show metrics of others, with names for the eye
            out |= set(literal.findall(path.read_text(encoding="utf-8")))
    return {name for name in out if not (ROOT / name).exists()}


def test_the_page_of_metrics_is_complete() -> None:
    page = reference("metrics")
    found = metric_names()
    assert len(found) > 60
    unnamed = []
    for name in sorted(found):
        # the ends of an interval may be named by `_low` and `_high` alone
        middle = name.removesuffix("_low").removesuffix("_high")
        if f"`{middle}`" not in page and f"`{name}`" not in page:
            unnamed.append(name)
    assert not unnamed


def test_the_page_of_installing_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    assert not [extra for extra in project["optional-dependencies"] if f"`{extra}`" not in page]


def test_imports_of_examples_in_python_resolve() -> None:
    imports = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    imports |= {(node.module or "", alias.name) for alias in node.names}
    assert imports
    for module, name in imports:
        assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"
