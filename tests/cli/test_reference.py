"""docs/configuration.md and conf/schema.json follow from the declarations; every shipped preset and
experiment composes to what the schema accepts.
"""

import copy
import re
from typing import Any

import jsonschema
import pytest
from omegaconf import OmegaConf

from conf.schema import Config
from conf.stages import STAGES
from rlhf.cli import presets, reference
from rlhf.cli.json_schema import json_schema
from rlhf.cli.options import ANYTHING, NAME, valid_keys
from tests.composing import composed
from tests.selection import marked_full

REMEDY = "not up to date: run `make reference` and commit what it writes"
GROUPS_OF_STAGES = ("stage.watch", "stage.schedule", "stage.plateau", "stage.batch_growth")
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_page_is_up_to_date() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), REMEDY


def test_the_schema_is_up_to_date() -> None:
    assert reference.SCHEMA.read_text(encoding="utf-8") == reference.schema_text(), REMEDY


def test_stale_files_are_found_and_written(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reference, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(reference, "SCHEMA", tmp_path / "schema.json")
    assert reference.main(["--check"]) == 1
    assert "page.md, schema.json" in capsys.readouterr().out
    assert reference.main([]) == 0 and reference.main(["--check"]) == 0


def test_the_page_has_every_option_in_rows_of_five_cells() -> None:
    text = reference.page()
    keys = valid_keys(list(STAGES))
    for key in keys:
        is_group = any(re.match(rf"{re.escape(key)}\.[^<]", other) for other in keys)
        if not is_group and not key.endswith((NAME, ANYTHING)) and key != "stage.name":
            assert f"| `{key}` |" in text, key
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}


def test_the_schema_is_a_json_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())


def plain(cfg: Config) -> dict[str, Any]:
    """A configuration as a YAML file would hold it."""
    container = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
    assert isinstance(container, dict)
    return container  # type: ignore[return-value]


def groups() -> list[tuple[str, ...]]:
    """Command lines of the presets of each group that a stage has."""
    lines: list[tuple[str, ...]] = []
    for group in presets.PRESET_GROUPS:
        if group not in ("stage", "experiment"):
            # some adapters have no published learning rate
            more = ("stage.learning_rate=1e-3",) if group == "adapter" else ()
            lines += [("stage=ppo", f"{group}={name}", *more) for name in presets.choices(group)]
    return lines


def experiments() -> list[tuple[str, ...]]:
    """Command lines of all experiments with the stages that they have."""
    lines: list[tuple[str, ...]] = []
    files = [path.stem for path in (presets.CONF_DIR / "experiment" / "stages").glob("*.yaml")]
    for experiment in presets.choices("experiment"):
        for stage in presets.choices("stage"):
            if f"{experiment}_{stage}" in files:
                lines.append((f"stage={stage}", f"experiment={experiment}"))
    return lines


STAGE_PRESETS: list[tuple[str, ...]] = [(f"stage={stage}",) for stage in presets.choices("stage")]
# One command line of each experiment; tests/cli/test_config.py composes every one.
EVERY_EXPERIMENT = list({line[1]: line for line in experiments()}.values())


@pytest.mark.parametrize(
    "overrides",
    marked_full(
        [" ".join(line) for line in [*STAGE_PRESETS, *groups(), *experiments()]],
        keep=[" ".join(line) for line in [*STAGE_PRESETS, *EVERY_EXPERIMENT]],
    ),
)
def test_what_ships_is_what_the_schema_accepts(overrides: str) -> None:
    assert not list(VALIDATOR.iter_errors(plain(composed(*overrides.split()))))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("stage", "gamma"), 1.5),
        (("stage", "name"), "sft"),
        (("stage", "gama"), 1.0),
        (("rollout", "temperature"), 0.0),
        (("engine", "zero_stage"), 4),
        (("adapter", "targets"), []),
        (("adapter", "kind"), "lorra"),
        (("engine", "threads"), "many"),
        (("run", "phase_timeout_s"), 0.0),
        (("data", "pipeline"), ["repare"]),
        (("data", "pipeline"), [{"step": "length", "lo": 1}]),
        (("reward", "terms"), {"a": {"weight": 1.0}}),
    ],
)
def test_the_schema_refuses_what_we_refuse(path: tuple[str, str], value: object) -> None:
    good = plain(composed("stage=ppo"))
    VALIDATOR.validate(good)
    bad = copy.deepcopy(good)
    bad[path[0]][path[1]] = value
    assert list(VALIDATOR.iter_errors(bad))


def test_null_and_steps_with_options_are_accepted() -> None:
    good = plain(composed("stage=ppo"))
    good["run"]["phase_timeout_s"] = None
    good["data"]["pipeline"] = ["repair", {"step": "length", "low": 1, "unit": "words"}]
    good["reward"]["terms"] = {"a": {"kind": "length", "low": 3}}
    assert not list(VALIDATOR.iter_errors(good))
