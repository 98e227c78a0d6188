"""Every check of the data report has a remedy, and every option and step that a remedy names
exists.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from conf.preparation import STEPS
from conf.preparation.duplicates import NearDuplicates
from conf.schema import DataConfig, RewardConfig
from conf.stages import STAGES
from rlhf.data.formats import Use
from rlhf.data.report.records import Settings
from rlhf.data.report.remedies import REMEDIES

CODE = [
    (check, code) for check, remedy in REMEDIES.items() for code in re.findall(r"`([^`]+)`", remedy)
]
OPTIONS = {
    f"{group}.{f.name}"
    for group, config in (("data", DataConfig), ("reward", RewardConfig))
    for f in dataclasses.fields(config)
}
OPTIONS |= {f"stage.{f.name}" for config in STAGES.values() for f in dataclasses.fields(config)}


def test_remedies_name_something() -> None:
    assert len(CODE) > 20 and len({check for check, _ in CODE}) > 15


@pytest.mark.parametrize(("check", "code"), CODE)
def test_steps_and_options_of_remedies_exist(check: str, code: str) -> None:
    if not code.startswith("{"):
        assert code.split("=", maxsplit=1)[0] in OPTIONS
        return
    entry = yaml.safe_load(code)
    fields = {f.name for f in dataclasses.fields(STEPS[entry.pop("step")])}
    assert set(entry) <= fields, f"{check}: {code}"


def test_every_check_in_the_detectors_has_a_remedy_and_none_is_left_over() -> None:
    folder = Path(__file__).parents[2] / "rlhf" / "data" / "report"
    source = "".join(
        path.read_text(encoding="utf-8")
        for path in folder.glob("*.py")
        if path.name != "remedies.py"
    )
    # an f-string in the source
    made = {f"{what}_leakage_{kind}" for what in ("row", "prompt") for kind in ("exact", "near")}
    assert made == {check for check in REMEDIES if "leakage" in check}
    assert [check for check in REMEDIES if check not in made and f'"{check}"' not in source] == []


def test_near_means_what_the_step_means_by_it() -> None:
    assert Settings(kind=Use.sft).near == NearDuplicates().threshold and NearDuplicates().ngram == 5
