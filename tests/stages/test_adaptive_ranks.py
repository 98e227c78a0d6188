"""AdaLoRA and GeLoRA from the first stage to what a run leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.cli import config
from rlhf.run.context import RunContext
from rlhf.stages import online, preference, reward, sft
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import toys
from tests.checking import check
from tests.offline import trl_tools

pytestmark = pytest.mark.usefixtures("one_thread")

COMMON = ["model.dtype=float32", "tracking=none", "stage.learning_rate=1e-2"]
OFFLINE = [*COMMON, "stage.batch_size=4", "stage.eval_steps=2", "stage.max_length=48"]
ONLINE = [
    *COMMON,
    "data.max_prompt_length=24",
    "rollout.max_response_length=4",
    "reward.function=tests.toys:even_tokens",
    "stage.prompts_per_step=2",
    "stage.samples_per_prompt=2",
    "stage.steps=2",
]
ADALORA = ["adapter=adalora", "adapter.rank=2", "adapter.adalora.initial_rank=4"]
GELORA = ["adapter=gelora", "adapter.alpha=2", "adapter.sample_rows=64"]
LAYERS = 14
STAGES: dict[str, Any] = {"sft": sft, "reward": reward, "dpo": preference, "kto": preference}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    trl_tools.write_rows(folder / "sft.jsonl", trl_tools.sft_rows(60))
    trl_tools.write_rows(folder / "pairs.jsonl", trl_tools.pair_rows(60))
    words = [{"prompt": f"{a} {b}"} for a in "abcdefgh" for b in ("alpha", "beta", "gamma", "two")]
    toys.write_jsonl(folder / "prompts.jsonl", [*words, *({"prompt": f"no {i}"} for i in range(9))])
    return folder


@pytest.fixture
def run(
    tmp_path: Path, rows: Path, tiny_model: Callable[..., Path]
) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """run("sft", *overrides, name="a") -> the run's directory and its summary."""

    def made(stage: str, *overrides: str, name: str = "a") -> tuple[Path, dict[str, Any]]:
        is_online = stage not in STAGES
        file = "prompts" if is_online else {"sft": "sft"}.get(stage, "pairs")
        given = [f"stage={stage}", f"run.dir={tmp_path}", f"run.name={name}"]
        given += [f"model.path={tiny_model()}", f"data.path={rows / file}.jsonl"]
        given += [*(ONLINE if is_online else OFFLINE), *overrides]
        ctx = RunContext.open(config.compose(given))
        STAGES.get(stage, online).run(ctx, stage_rows)
        text = (ctx.dir / "summary.json").read_text(encoding="utf-8")
        return ctx.dir, json.loads(text)

    return made


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


full = pytest.mark.full


@pytest.mark.parametrize(
    "stage", ["sft", pytest.param("reward", marks=full), pytest.param("dpo", marks=full)]
)
def test_adalora_ends_on_its_budget(run: Any, stage: str) -> None:
    """The best weights are those of an evaluation after the ranks stay, however good the loss was
    before.
    """
    extra = ["stage.bootstrap=10"] if stage == "reward" else []
    directory, summary = run(stage, *ADALORA, "stage.steps=8", *extra)
    found = summary["adapter"]
    assert found["used"] == found["budget"] == 2 * LAYERS
    assert sum(found["rank"].values()) == 2 * LAYERS
    saved = weights(directory)
    left = sum(int((t != 0).sum()) for name, t in saved.items() if name.endswith("lora_E"))
    assert 0 < left <= 2 * LAYERS
    assert summary["metrics"]["best_step"] >= 4  # adapter.adalora.end=0.5 of 8 steps
    assert (directory / "plots" / "adapter.png").stat().st_size > 1000
    twin = load_file(directory / "lora" / "adapter_model.safetensors")
    assert any(name.endswith("lora_A.weight") for name in twin)


@pytest.mark.full
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_split_of_an_offline_step_changes_no_weight(run: Any, stage: str) -> None:
    """In equal micro-batches, and by tokens; SFT's loss is a sum over tokens, DPO's a mean."""
    options = [*ADALORA, "stage.steps=3", "adapter.adalora.orthogonality=1.0"]
    whole = weights(run(stage, *options, "engine.micro_batch_size=4")[0])
    splits = ("engine.micro_batch_tokens=30", "engine.micro_batch_size=1")
    for number, split in enumerate(splits):
        found = weights(run(stage, *options, split, name=f"b{number}")[0])
        for name, tensor in whole.items():
            torch.testing.assert_close(found[name], tensor, atol=2e-5, rtol=1e-3, msg=name)
    if stage == "sft":
        without = weights(run(stage, *options, "adapter.adalora.orthogonality=0", name="c")[0])
        assert max(float((without[n] - t).abs().max()) for n, t in whole.items()) > 1e-3


@pytest.mark.parametrize("stop", [3, pytest.param(6, marks=full)])
def test_a_resumed_offline_run_is_the_same_to_the_bit(
    run: Any, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf.offline.step_rows import Tended

    options = [*ADALORA, "stage.steps=8", "stage.save_steps=1"]
    straight = weights(run("sft", *options)[0])
    after_step = Tended.after_step

    def stops(self: Any, trainer: Any) -> None:
        if trainer.state.global_step == stop + 1:
            raise KeyboardInterrupt
        after_step(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Tended, "after_step", stops)
        with pytest.raises(KeyboardInterrupt):
            run("sft", *options, name="b")
    directory, summary = run("sft", *options, "run.resume=true", name="b")
    resumed = weights(directory)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], tensor) for name, tensor in resumed.items())
    assert summary["adapter"]["used"] == 2 * LAYERS


def test_gelora_reads_the_rows_that_it_trains_on(run: Any) -> None:
    directory, summary = run("sft", *GELORA, "stage.steps=2")
    found = summary["adapter"]
    assert found["rows"] > 32 and len(found["dimension"]) == 3
    saved = weights(directory)
    ranks = {n: t.shape[0] for n, t in saved.items() if n.endswith("lora_A.weight")}
    prefix, end = "base_model.model.", ".lora_A.weight"
    named = {name.removeprefix(prefix).removesuffix(end): rank for name, rank in ranks.items()}
    assert named == found["rank"]
    assert json.loads((directory / "looked_up.json").read_text(encoding="utf-8"))["rows"]
    assert (directory / "plots" / "adapter.png").is_file()


@pytest.mark.parametrize("options", [ADALORA, GELORA], ids=["adalora", "gelora"])
def test_both_train_online(run: Any, options: list[str]) -> None:
    directory, summary = run("grpo", *options, "rollout=hf", "stage.save_steps=1")
    assert summary["metrics"]["rollout/logprob_gap_max"] < 1e-4
    assert summary["adapter"]["rank"].keys()
    if options is ADALORA:
        assert summary["adapter"]["used"] == 2 * LAYERS
    before = {name: tensor.clone() for name, tensor in weights(directory).items()}
    (directory / "checkpoints" / "step-2" / "checksums.json").unlink()
    again, _ = run("grpo", *options, "rollout=hf", "stage.save_steps=1", "run.resume=true")
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(again).items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["engine=zero3"], r"adapter=adalora with engine=zero3: .*engine=zero2.*adapter=lora"),
        (["stage.patience=2"], r"stage\.patience=2 with adapter=adalora: .*stage\.patience=null"),
    ],
)
def test_what_could_not_end_on_its_budget_is_refused(
    rows: Path, tiny_model: Callable[..., Path], given: list[str], said: str
) -> None:
    start = ["stage=sft", f"model.path={tiny_model()}", f"data.path={rows}/sft.jsonl", *OFFLINE]
    with pytest.raises(UserError, match=said):
        check(config.compose([*start, *ADALORA, *given]))


def test_an_initial_rank_below_the_last_is_refused() -> None:
    with pytest.raises(UserError, match=r"initial_rank=1.*at least adapter\.rank"):
        config.compose(["stage=sft", "adapter=adalora", "adapter.adalora.initial_rank=1"])


def test_a_generator_without_room_for_the_initial_rank_is_refused(
    rows: Path, tiny_model: Callable[..., Path]
) -> None:
    given = ["stage=grpo", f"model.path={tiny_model()}", f"data.path={rows}/prompts.jsonl"]
    room = ["rollout=hf", "rollout.max_lora_rank=3"]
    with pytest.raises(
        UserError, match=r"max_lora_rank=3 is below adapter\.adalora\.initial_rank=4"
    ):
        check(config.compose([*given, *ONLINE, *ADALORA, *room]))
