"""Families beside Llama under ZeRO-3 on two CPU ranks take the plain engine's steps: policy,
reference and critic, whose head is the family's own or ours. One launch makes all runs.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.online import zero_online_worker
from tests.online.families import tiny_family
from tests.online.test_zero_online import COMPARED, folder_of, launch, rows, start_folder
from tests.selection import selected

pytestmark = [pytest.mark.distributed, pytest.mark.full]
FAMILIES = [
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    # experts; transformers has no classifier of OLMoE
    "qwen3_moe",
    "mixtral",
    "olmoe",
    "gpt_oss",
    "deepseek_v3",
    # dense, with a scalar head of ours
    "granite",
]
# Adam divides by gradients: with its own epsilon the rounding of one near 0 is a whole step.
_STEPS = "stage.steps=2:stage.epochs=1:stage.minibatches=1:stage.save_steps=0:stage.adam_eps=1e-5"


def described(engine: str, family: str) -> str:
    return f"{engine}:none:family={family}:{_STEPS}"


@pytest.fixture(scope="module")
def family_runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: Iterator[None],
) -> Path:
    folder = start_folder(tmp_path_factory.mktemp("families"))
    wanted = [family for family in FAMILIES if family in selected(request, "family")]
    for family in wanted:
        tiny_family(family, folder / "start", folder / family)
        zero_online_worker.run(str(folder), str(folder / "start"), described("torch", family))
    launch(folder, folder / "start", [described("zero3", family) for family in wanted])
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_under_zero_3_takes_the_torch_engines_steps(
    family_runs: Path, family: str
) -> None:
    runs = [described(engine, family) for engine in ("torch", "zero3")]
    expected, found = (rows(family_runs, run) for run in runs)
    assert len(found) == len(expected) == 2
    # before the first update, and after it
    for theirs, ours, bound in zip(expected, found, (1e-5, 1e-4), strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], abs=bound), (ours["step"], name)
        assert ours["rollout/logprob_gap"] < bound and ours["rollout/probe_gap"] < bound
    weights, reference = (
        load_file(folder_of(family_runs, run) / "model" / "model.safetensors")
        for run in reversed(runs)
    )
    start = load_file(family_runs / family / "model.safetensors")
    assert weights.keys() == reference.keys()
    for name, tensor in reference.items():
        assert float((weights[name] - tensor).abs().max()) < 1e-4, name
    assert max(float((reference[n] - start[n]).abs().max()) for n in start) > 1e-3
