"""benchmarks/ and tests/ are not part of what users install."""

import tomllib
from pathlib import Path

from setuptools import find_packages

from benchmarks.house import PACKAGES
from benchmarks.shared import environment

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_the_product_only() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    find = project["tool"]["setuptools"]["packages"]["find"]
    packages = find_packages(str(ROOT), include=find["include"], exclude=find.get("exclude", ()))
    assert {name.split(".")[0] for name in packages} == set(PACKAGES)
    data = project["tool"]["setuptools"].get("package-data", {})
    assert {name.split(".")[0] for name in data} <= set(PACKAGES)


def test_programs_of_a_harness_import_from_this_checkout() -> None:
    assert environment()["PYTHONPATH"].split(":")[0] == str(ROOT)
