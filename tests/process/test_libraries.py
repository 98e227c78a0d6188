"""A library of an extra that isn't installed is refused with the extra that brings it."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from rlhf.process.libraries import hide_bitsandbytes, require
from rlhf.types import UserError

ROOT = Path(__file__).resolve().parents[2]
# Library -> the extras that bring it. No module of the product imports it but through `require`.
OF_EXTRAS = {
    "cleanlab": {"data"},
    "crowdkit": {"labels"},
    "ftfy": {"data"},
    "imblearn": {"data"},
    "jieba": {"data"},
    "openpyxl": {"data", "labels"},
    "py3langid": {"data"},
    "sentence_transformers": {"embeddings"},
}


def test_an_installed_library_is_given() -> None:
    import json.decoder

    assert require("json.decoder", "data") is json.decoder


@pytest.mark.parametrize("module", ["nolibrary", "nolibrary.part"])
def test_a_missing_library_names_its_extra(module: str) -> None:
    with pytest.raises(UserError, match=r"nolibrary .*pip install 'rlhf-toolkit\[data\]'"):
        require(module, "data")


def test_a_missing_part_of_an_installed_library_is_another_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "halflibrary.py").write_text("import notthere\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="notthere"):
        require("halflibrary", "data")
    assert "halflibrary" not in sys.modules


def _uses(path: Path) -> list[tuple[str, str]]:
    """(library, how) of every import of a library of an extra: the extra, or import."""
    out = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            out += [(alias.name.partition(".")[0], "import") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            out.append((node.module.partition(".")[0], "import"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "require":
            module, extra = (ast.literal_eval(argument) for argument in node.args)
            out.append((module.partition(".")[0], extra))
    return out


def test_libraries_of_extras_are_imported_through_require_only() -> None:
    used = set()
    for path in sorted((ROOT / "rlhf" / "data").rglob("*.py")):
        for library, how in _uses(path):
            if library in OF_EXTRAS:
                assert how in OF_EXTRAS[library], f"{path}: {library} by {how}"
                used.add(library)
    assert used == set(OF_EXTRAS)


def test_bitsandbytes_is_missing_to_others_until_it_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PEFT asks so, and would import it."""
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    assert importlib.util.find_spec("bitsandbytes") is not None, "nothing to hide"
    hide_bitsandbytes()
    assert importlib.util.find_spec("bitsandbytes") is None
    monkeypatch.setitem(sys.modules, "bitsandbytes", pytest)
    hide_bitsandbytes()
    assert sys.modules["bitsandbytes"] is pytest, "it was asked for"
