"""The tables of other toolkits' keys: each once, each with options that exist, and all that their
examples use are known.
"""

import itertools
from collections import Counter
from pathlib import Path

import pytest

from conf.stages import STAGES
from rlhf.cli.options import general, valid_keys
from rlhf.cli.presets import choices, stage_schema
from rlhf.migrate import converting
from rlhf.migrate.tables import Fate, Settings, is_off
from rlhf.migrate.toolkits import TOOLKITS

KEYS_IN_USE = Path(__file__).with_name("keys.txt")


def keys_in_use() -> dict[str, list[str]]:
    """Toolkit: the keys that its public examples use."""
    out: dict[str, list[str]] = {}
    for line in KEYS_IN_USE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            names = out.setdefault(line.strip("[]"), [])
        elif not line.startswith("#"):
            names.extend(line.split())
    return out


def test_the_list_has_every_toolkit() -> None:
    assert {name: len(keys) > 50 for name, keys in keys_in_use().items()} == dict.fromkeys(
        TOOLKITS, True
    )


@pytest.mark.parametrize("name", TOOLKITS)
def test_a_key_stands_once(name: str) -> None:
    count = Counter(key.name for key in TOOLKITS[name].keys)
    assert [key for key, times in count.items() if times > 1] == []


@pytest.mark.parametrize("name", TOOLKITS)
def test_keys_of_their_examples_are_known(name: str) -> None:
    toolkit = TOOLKITS[name]
    assert [key for key in keys_in_use()[name] if toolkit.find(key) is None] == []
    assert toolkit.find("a_key_that_nobody_has") is None


@pytest.mark.parametrize("name", TOOLKITS)
def test_options_of_a_key_exist(name: str) -> None:
    known = valid_keys(list(STAGES))
    options = {option for key in TOOLKITS[name].keys for option in key.options}
    assert len(options) > 40
    assert [option for option in options if general(option, known)[0] not in known] == []
    lost = [one for one in options if not any(converting.exists(one, stage) for stage in STAGES)]
    assert lost == []


def test_existing_options_are_those_of_the_command_line() -> None:
    for stage in ("sft", "ppo", "cpo"):
        known = [key for key in valid_keys([stage]) if key.startswith(("stage.", "rollout."))]
        assert len(known) > 20
        assert [key for key in known if "<" not in key and not converting.exists(key, stage)] == []
    assert not converting.exists("stage.packing", "ppo")
    assert not converting.exists("stage.no_such", "sft")
    assert not converting.exists("no_such.option", "sft")


def test_schemas_of_presets_are_the_presets_own() -> None:
    for preset, schema in converting.SCHEMAS.items():
        assert stage_schema(preset) == schema
    others = [name for name in choices("stage") if name not in converting.SCHEMAS]
    assert [name for name in others if stage_schema(name) not in (name, "ppo")] == []


def test_the_longest_pattern_decides() -> None:
    toolkit = TOOLKITS["axolotl"]
    exact, pattern = toolkit.find("fsdp_config.offload_params"), toolkit.find("fsdp_config.other")
    assert exact is not None and exact.options
    assert pattern is not None and pattern.name == "fsdp_config.*"


def test_a_reason_stands_with_every_key_without_an_option() -> None:
    settings = Settings("", {}, {}, Path("x.yaml"), stage="sft", schema="sft")
    for key in itertools.chain.from_iterable(toolkit.keys for toolkit in TOOLKITS.values()):
        if key.options:
            continue
        answer = key.convert(settings, "some value")
        assert answer.note, key.name
        assert answer.fate is not Fate.taken


@pytest.mark.parametrize("value", [False, 0, 0.0, "none", "no", [], ""])
def test_off(value: object) -> None:
    assert is_off(value)


@pytest.mark.parametrize("value", [True, 1, "yes", 0.5, [0], None])
def test_on(value: object) -> None:
    assert not is_off(value)
