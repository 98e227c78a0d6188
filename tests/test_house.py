"""Bounds for the figures of benchmarks/house.py. They are lowered, never raised: where one fails,
make the code plainer.
"""

from pathlib import Path

import pytest

from benchmarks import house

ROOT = Path(__file__).resolve().parents[1]

# figure -> at most
BOUNDS = {
    "expressions a code line": 4.5,
    "ternaries a thousand code lines": 17.0,
    "lines above 100 characters": 0,
    "files above 400 lines": 0,
    "functions above 60 lines": 0,
    "functions that take Config": 59,
    "functions that take RunContext": 29,
    "circles": 0,
    "string imports": 0,
}


@pytest.fixture(scope="module")
def ours() -> house.House:
    return house.measure(ROOT)


@pytest.mark.parametrize("name", BOUNDS)
def test_bound(ours: house.House, name: str) -> None:
    long_files = [f"{path} {lines}" for path, lines in ours.files.items() if lines > 400]
    long_functions = [f"{f.name} {f.lines}" for f in ours.functions if f.lines > 60]
    counted = {
        "lines above 100 characters": ours.long_lines,
        "files above 400 lines": long_files,
        "functions above 60 lines": long_functions,
        "functions that take Config": ours.config_functions,
        "functions that take RunContext": ours.context_functions,
        "circles": ours.circles,
        "string imports": ours.string_imports,
    }
    figures = {label: float(len(items)) for label, items in counted.items()}
    figures["expressions a code line"] = ours.expressions_a_line
    figures["ternaries a thousand code lines"] = ours.ternaries_a_thousand
    listed = "\n".join(str(item) for item in counted.get(name, []))
    assert figures[name] <= BOUNDS[name], f"{name}: {figures[name]:.2f}\n{listed}"


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def test_figures_by_hand(tmp_path: Path) -> None:
    stages = [f"{module.replace('.', '/')}.py" for module in house.STAGES.values()]
    repo = write(
        tmp_path,
        {
            "rlhf/__init__.py": "",
            "rlhf/__main__.py": '"""Docstring."""\n\nx = 1\n',
            "rlhf/stages/__init__.py": "",
            **dict.fromkeys(stages, ""),
            "rlhf/stages/online.py": (
                "from typing import TYPE_CHECKING\n\n"
                "if TYPE_CHECKING:\n    from reward import b\n\n\n"
                "def run(cfg: schema.Config | None, n: int) -> int:\n"
                '    """Docstring\n    of two lines."""\n'
                "    from reward import a  # local\n\n    return 1 if n else 0\n"
            ),
            "rlhf/stages/sft.py": "import importlib\n\nimportlib.import_module('reward.a')\n",
            "reward/__init__.py": "",
            "reward/a.py": f"from .b import x\ny = '{'z' * 100}'\n",
            "reward/b.py": "def f():\n    import reward.a\n\n\nx = 1\n",
        },
    )
    found = house.measure(repo)
    # the entry, the stage and the two files of reward
    assert found.reached["ppo"] == found.reached["sft"] == 4
    assert found.reached["data"] == 2
    assert found.circles == [["reward.a", "reward.b"]]
    assert found.string_imports == ["rlhf/stages/sft.py: reward.a"]
    assert found.root_modules == ["rlhf/__init__.py", "rlhf/__main__.py"]
    assert found.long_lines == ["reward/a.py:2"]
    assert [f.lines for f in found.functions] == [6, 2]
    assert found.config_functions == ["rlhf/stages/online.py:7 run"]
    assert found.ternaries == 1
    # __main__ 1, online 6, sft 2, a 2, b 3
    assert found.code_lines == 14
    with pytest.raises(ValueError, match=r"conf, rlhf"):
        house.measure(tmp_path / "rlhf")
    (repo / "rlhf" / "stages" / "data.py").unlink()
    with pytest.raises(ValueError, match=r"rlhf\.stages\.data"):
        house.measure(repo)
