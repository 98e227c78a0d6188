"""AdaLoRA and GeLoRA under ZeRO on two CPU ranks take the steps of the plain engine, and end with
the same ranks. One launch makes all runs.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.online import zero_online_worker
from tests.online.test_zero_online import folder_of, launch, start_folder

pytestmark = [pytest.mark.distributed, pytest.mark.full]
# eight of the initial ranks of the preset; clipping at work
ADALORA = "adalora:adapter.adalora.orthogonality=0.5:stage.max_grad_norm=0.5:stage.minibatches=1"
GELORA = "gelora:adapter.alpha=2:stage.minibatches=1"
RUNS = [f"zero{stage}:{ADALORA}" for stage in (0, 1, 2)] + [f"zero3:{GELORA}"]


def in_one_process(run: str) -> str:
    return "torch:" + run.split(":", 1)[1]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_thread: Iterator[None]) -> Path:
    folder = start_folder(tmp_path_factory.mktemp("zero"))
    for run in dict.fromkeys(in_one_process(run) for run in RUNS):
        zero_online_worker.run(str(folder), str(folder / "start"), run)
    launch(folder, folder / "start", RUNS)
    return folder


@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_end_as_one_process(runs: Path, run: str) -> None:
    places = [folder_of(runs, one) for one in (in_one_process(run), run)]
    told = [json.loads((place / "summary.json").read_text("utf-8"))["adapter"] for place in places]
    assert told[0] == told[1]
    if told[0]["method"] == "adalora":
        assert told[0]["used"] == told[0]["budget"]
    expected, found = (
        load_file(place / "adapter" / "adapter_model.safetensors") for place in places
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
        assert float(tensor.abs().max()) > 0 or name.endswith("lora_E")
