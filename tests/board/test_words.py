"""Both languages say the same things, and pages use no text that is not there."""

import json
import re
import string
from importlib import resources
from pathlib import Path

import pytest

from rlhf.board.rendering import LANGUAGES, PARTS

BOARD = Path(str(resources.files("rlhf.board")))
# t("key" in a template or a module; what is put together from parts ends with a dot
HAN = re.compile("[\u4e00-\u9fff]")
USED = re.compile(r"""\bt\(\s*["']([a-z][a-z0-9_.-]*)["']\s*([+,)])""")


def part(name: str, language: str) -> dict[str, str]:
    path = BOARD / "words" / f"{name}.{language}.json"
    pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    keys = [key for key, _ in pairs]
    assert len(keys) == len(set(keys)), f"{path.name} has a key twice"
    return dict(pairs)


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def everything(language: str) -> dict[str, str]:
    return {key: text for name in PARTS for key, text in part(name, language).items()}


@pytest.mark.parametrize("name", PARTS)
def test_both_languages_have_the_same_keys_and_fields(name: str) -> None:
    english, chinese = (part(name, language) for language in ("en", "zh"))
    assert english.keys() == chinese.keys()
    different = [key for key in english if fields(english[key]) != fields(chinese[key])]
    assert not different
    empty = [key for key in english if not english[key].strip() or not chinese[key].strip()]
    assert not empty


def test_no_key_is_in_two_parts() -> None:
    keys = [key for name in PARTS for key in part(name, "en")]
    assert len(keys) == len(set(keys))
    assert set(LANGUAGES) == {"en", "zh"}


def test_chinese_is_chinese() -> None:
    """A text with words of English in it has its Chinese too, but for names of things."""
    english = everything("en")
    latin = [
        key
        for key, text in everything("zh").items()
        if re.search("[A-Za-z]{4}", re.sub(r"\{.*?\}", "", text)) and not HAN.search(text)
    ]
    assert [key for key in latin if english[key] != everything("zh")[key]] == []


def used() -> list[tuple[str, str, str]]:
    """(file, key, what follows) of each text that a template or a module asks for."""
    files = [*(BOARD / "templates").glob("*.html"), *BOARD.rglob("*.py")]
    out = []
    for path in files:
        if path.name == "rendering.py":  # its docstrings have examples
            continue
        text = path.read_text(encoding="utf-8")
        out += [(path.name, match[1], match[2]) for match in USED.finditer(text)]
    return out


def test_every_text_that_is_asked_for_is_there() -> None:
    known = everything("en")
    asked = used()
    assert len(asked) > 50
    missing = []
    for name, key, following in asked:
        if following == "+":  # the beginning of a key
            if not any(other.startswith(key) for other in known):
                missing.append((name, key))
        elif key not in known:
            missing.append((name, key))
    assert not missing


def test_every_text_of_the_rooms_is_used() -> None:
    """Else a page lost something, or the text should go."""
    files = [*(BOARD / "templates").glob("*.html"), *BOARD.rglob("*.py")]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    beginnings = {key for _, key, following in used() if following == "+"}
    # f"chat.state.{state}" in a module
    beginnings |= set(re.findall(r"""f["']((?:[a-z_]+\.)+)\{""", sources))
    unused = [
        key
        for key in part("rooms", "en")
        if f'"{key}"' not in sources
        and f"'{key}'" not in sources
        and not any(key.startswith(beginning) for beginning in beginnings)
    ]
    assert not unused
