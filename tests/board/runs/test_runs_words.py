"""Words that code puts together from names: each is there, in both languages."""

import pytest

from rlhf.board.rendering import LANGUAGES, words
from rlhf.board.runs.facts import _FOLLOWS, _USES
from rlhf.board.runs.listing import LOOKS
from rlhf.board.runs.panels import PANELS
from rlhf.run.console import HEADLINES


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_name_has_its_words(language: str) -> None:
    wanted = {f"panel.{panel.title}" for panel in PANELS.values()}
    wanted |= {f"unit.{panel.unit}" for panel in PANELS.values()}
    wanted |= {f"state.{state}" for state in LOOKS}
    wanted |= {f"run.why.{state}" for state in LOOKS} - {"run.why.running", "run.why.ended"}
    wanted |= {f"figure.{label}" for label, _ in HEADLINES}
    wanted |= {f"next.{name}" for names in _FOLLOWS.values() for name in names}
    wanted |= {f"next.{name}" for name in _USES}
    wanted |= {f"job.{how}{part}" for how in ("stop", "kill") for part in ("", ".text", ".queued")}
    assert wanted - words(language).keys() == set()
