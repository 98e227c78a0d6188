"""GRPO on prompts with pictures under ZeRO-2 and ZeRO-3 on two CPU ranks takes the plain engine's
steps, in the part for pictures too. One launch makes both runs.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import toys, vision
from tests.online import zero_online_worker
from tests.online.test_zero_online import folder_of, launch, rows

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
# Adam divides by gradients: with its own epsilon the rounding of one near 0 is a whole step.
_GRPO = (
    "none:stage=grpo:stage.samples_per_prompt=4:stage.epochs=1:stage.steps=2:stage.minibatches=1"
    ":stage.save_steps=0:stage.adam_eps=1e-5:data.max_prompt_length=100:engine.micro_tokens=300"
)
COMPARED = ("objective/scores", "objective/kl", "objective/entropy", "loss/policy", "loss/kl")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_thread: Iterator[None]) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    start = vision.tiny_vision("idefics3", folder / "start")
    sizes = [(40, 40), (64, 32), (28, 50), (40, 40)] * 2
    shown = vision.pictures(folder, sizes)
    prompts = []
    for number, picture in enumerate(shown):
        chat = [{"role": "user", "content": f"<image> what is number {number}?"}]
        prompts.append({"prompt": chat, "images": [Path(picture["path"]).name]})
    toys.write_jsonl(folder / "prompts.jsonl", prompts)
    toys.write_jsonl(folder / "held_out.jsonl", prompts[:3])
    zero_online_worker.run(str(folder), str(start), f"torch:{_GRPO}")
    launch(folder, start, [f"zero{stage}:{_GRPO}" for stage in (2, 3)])
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_pictures_under_zero_take_the_torch_engines_steps(runs: Path, stage: int) -> None:
    names = [f"torch:{_GRPO}", f"zero{stage}:{_GRPO}"]
    expected, found = (rows(runs, run) for run in names)
    assert len(found) == len(expected) == 2
    for theirs, ours in zip(expected, found, strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(theirs[name], abs=1e-4), (ours["step"], name)
        assert ours["rollout/logprob_gap"] < 1e-4 and ours["rollout/probe_gap"] < 1e-4
    reference, weights = (
        load_file(folder_of(runs, run) / "model" / "model.safetensors") for run in names
    )
    start = load_file(runs / "start" / "model.safetensors")
    assert weights.keys() == reference.keys()
    for name, tensor in reference.items():
        assert float((weights[name] - tensor).abs().max()) < 1e-4, name
    seen = [name for name in start if "vision" in name]
    assert max(float((reference[name] - start[name]).abs().max()) for name in seen) > 1e-3
