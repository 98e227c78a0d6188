"""The bench of episodes, on a small model with few tokens."""

import pytest

from benchmarks import environments
from conf.choices import RolloutBackend
from conf.schema import TinyConfig


def test_every_way_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 1, "heads": 1}
    tiny = TinyConfig(vocab_size=300, max_positions=512, **shape)
    monkeypatch.setattr(environments, "SHAPE", tiny)
    monkeypatch.setattr(environments, "EPISODES", 3)
    speeds = environments.measure(2, RolloutBackend.hf, 4)
    assert speeds.keys() == {"single", "episodes", "uneven"}
    assert all(len(values) == 2 and min(values) > 0 for values in speeds.values())
    monkeypatch.setattr(environments, "measure", lambda rounds, backend, turn_tokens: speeds)
    environments.main(["2", "hf", "4"])
    assert "target 0.8" in capsys.readouterr().out
