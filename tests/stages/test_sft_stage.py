"""stage=sft: it learns, its numbers don't depend on the batch's split, it resumes, and it refuses
what can't work.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from conf.choices import AdapterKind, ModelKind, Scheduler
from conf.schema import AdapterConfig, DataConfig, EngineConfig, ModelConfig, RunConfig
from conf.stages import SFTStage
from rlhf.checks import launch
from rlhf.data.reading import DataRequest, sft_records
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.rows.sft import encode_sft
from rlhf.run.context import RunContext
from rlhf.stages import rows as stage_rows
from rlhf.stages import sft
from rlhf.types import TrainingDiverged, UserError
from tests import drawing
from tests.offline import trl_tools

STAGE: dict[str, Any] = {
    "steps": 6,
    "batch_size": 8,
    "eval_steps": 3,
    "max_length": 32,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.0,
}


def run(
    folder: Path,
    name: str,
    *,
    rows: list[dict[str, Any]] | None = None,
    stage: dict[str, Any] | None = None,
    **groups: Any,
) -> Path:
    """Run a tiny SFT. Returns its run directory."""
    cfg = trl_tools.config(
        SFTStage(**(STAGE | (stage or {}))), folder, name, rows or trl_tools.sft_rows(), **groups
    )
    ctx = RunContext.open(cfg)
    sft.run(ctx, stage_rows)
    return ctx.dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sft")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    """A finished run from scratch."""
    with drawing.on():
        return run(folder, "base")


def test_it_learns_and_leaves_what_the_contract_says(base: Path) -> None:
    summary = json.loads((base / "summary.json").read_text())
    metrics = summary["metrics"]
    assert summary["stage"] == "sft" and summary["steps"] == 6 and summary["model"] == "model"
    assert metrics["eval_loss"] < metrics["initial/eval_loss"] - 1.0
    lines = trl_tools.metric_lines(base)
    assert [line["step"] for line in lines] == list(range(7)), (
        "a line per step, the evaluation before the first included"
    )
    assert {
        "loss",
        "grad_norm",
        "learning_rate",
        "mean_token_accuracy",
        "train/tokens_per_s",
    } <= lines[1].keys()
    assert "eval_loss" in lines[3] and "eval_loss" in lines[6]
    samples = [json.loads(line) for line in (base / "samples.jsonl").read_text().splitlines()]
    assert (
        len(samples) == 4
        and {"prompt", "response", "response_length", "finish_reason"} <= samples[0].keys()
    )
    assert list((base / "plots").glob("*.png"))


def test_the_model_loads_alone_and_has_the_reported_loss(base: Path, folder: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base / "model"),
        AutoTokenizer.from_pretrained(base / "model"),
    )
    rows = encode_sft(
        tokenizer,
        sft_records(DataRequest.of(context_config(folder, "base")))[1],
        name="x",
        max_length=32,
        completion_only=True,
        cut=True,
    )
    total, count = 0.0, 0
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(
            float(logprobs[t - 1, labels[t]]) for t in range(1, len(ids)) if labels[t] >= 0
        )
        count += sum(label >= 0 for label in labels[1:])
    expected = total / count
    assert json.loads((base / "summary.json").read_text())["metrics"]["eval_loss"] == pytest.approx(
        expected, abs=1e-4
    )


def context_config(folder: Path, name: str) -> Any:
    return trl_tools.config(SFTStage(**STAGE), folder, name, trl_tools.sft_rows())


@pytest.mark.parametrize("split", [{"micro_batch_size": 2}, {"micro_batch_tokens": 40}])
def test_accumulation_changes_no_loss(split: dict[str, int], base: Path, folder: Path) -> None:
    """Rows have different lengths, so a mean taken per micro-batch would show."""
    run_directory = run(folder, f"split_{next(iter(split))}", engine=EngineConfig(**split))
    assert trl_tools.losses(run_directory) == pytest.approx(trl_tools.losses(base), abs=1e-5)
    held_out = [
        json.loads((place / "summary.json").read_text())["metrics"]["eval_loss"]
        for place in (run_directory, base)
    ]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-5)


def test_noise_on_embeddings_is_there_while_it_trains_alone(base: Path, folder: Path) -> None:
    noisy = run(folder, "noisy", stage={"neftune_alpha": 5.0})
    mine, plain = (trl_tools.metric_lines(place) for place in (noisy, base))
    assert mine[0]["eval_loss"] == plain[0]["eval_loss"], "held-out rows have none"
    assert abs(mine[1]["loss"] - plain[1]["loss"]) > 1e-4
    again = run(folder, "noisy_again", stage={"neftune_alpha": 5.0})
    assert trl_tools.losses(again) == trl_tools.losses(noisy), "it comes of run.seed"


def test_resume_goes_on_as_if_never_stopped(base: Path, folder: Path) -> None:
    cfg = trl_tools.config(SFTStage(**STAGE), folder, "resumed", trl_tools.sft_rows())
    ctx = RunContext.open(cfg)
    log = ctx.tracker.log

    def stop_at_five(step: int, metrics: Any) -> None:
        if step == 5:
            raise KeyboardInterrupt
        log(step, metrics)

    ctx.tracker.log = stop_at_five  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        sft.run(ctx, stage_rows)
    assert not (ctx.dir / "summary.json").exists()
    resumed = run(
        folder, "resumed", run=RunConfig(dir=str(folder / "runs"), name="resumed", resume=True)
    )
    assert trl_tools.losses(resumed) == pytest.approx(trl_tools.losses(base), abs=1e-6)
    expected, found = (load_file(r / "model" / "model.safetensors") for r in (base, resumed))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_lora_from_a_directory_names_its_base_and_merges_on_request(
    base: Path, folder: Path
) -> None:
    start = ModelConfig(path=str(base / "model"))
    plain = run(folder, "lora", model=start, adapter=AdapterConfig(kind=AdapterKind.lora, rank=4))
    merged = run(
        folder,
        "lora_merged",
        model=start,
        adapter=AdapterConfig(kind=AdapterKind.lora, rank=4, merge_on_save=True),
    )
    named = json.loads((plain / "model" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    assert (
        Path(named) == (base / "model").resolve()
        and (plain / "adapter" / "adapter_model.safetensors").exists()
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    logits = []
    for place in (plain, merged, base):
        cfg = ModelConfig(path=str(place / "model"))
        with torch.no_grad():
            logits.append(load_causal_lm(cfg, load_tokenizer(cfg)).eval()(input_ids=ids).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)
    assert (logits[0] - logits[2]).abs().max() > 1e-2, "the adapter changed nothing"


def test_lora_without_a_base_directory_is_saved_whole(folder: Path) -> None:
    place = run(
        folder,
        "lora_tiny",
        adapter=AdapterConfig(kind=AdapterKind.lora, rank=4),
        stage={"steps": 1, "eval_steps": 1},
    )
    assert (place / "adapter" / "adapter_model.safetensors").exists()
    assert (place / "model" / "config.json").exists() and not (
        place / "model" / "adapter_config.json"
    ).exists()
    AutoModelForCausalLM.from_pretrained(place / "model")


def chat_rows() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in trl_tools.sft_rows()
    ]


def test_chat_with_a_template_file(folder: Path) -> None:
    template = folder / "chatml.jinja"
    template.write_text(trl_tools.CHATML)
    data = DataConfig(
        path=str(folder / "sft_chat.jsonl"), eval_fraction=0.2, chat_template=str(template)
    )
    place = run(
        folder,
        "chat",
        rows=chat_rows(),
        data=data,
        stage={"steps": 2, "eval_steps": 2, "max_length": 64},
    )
    assert AutoTokenizer.from_pretrained(place / "model").chat_template == trl_tools.CHATML


def test_chat_without_a_template_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no chat template.*data.chat_template"):
        run(folder, "no_template", rows=chat_rows())


def test_packed_documents_do_not_see_each_other() -> None:
    """Packed rows share a sequence; each must get the logits that it gets by itself."""
    torch.manual_seed(0)
    tokenizer = trl_tools.tiny_tokenizer()
    model = load_causal_lm(ModelConfig(kind=ModelKind.tiny, tiny=trl_tools.TINY), tokenizer).eval()
    for param in model.parameters():
        if param.ndim == 2:
            param.data.mul_(5.0)  # fresh weights are too small for attention to matter
    rows = [
        tokenizer(text)["input_ids"]
        for text in ("good film plot", "great", "the end fine actor scene")
    ]
    packed = pack_dataset(Dataset.from_dict({"input_ids": rows, "labels": rows}), 32, "bfd", {})
    assert len(packed) == 1
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(list(packed))
    with torch.no_grad():
        # as SFTTrainer calls it
        together = model(
            **{k: v for k, v in batch.items() if k != "labels"}, use_cache=False
        ).logits[0]
        ends = torch.tensor([0, *packed[0]["seq_lengths"]]).cumsum(0).tolist()
        for start, end in itertools.pairwise(ends):
            alone = model(input_ids=batch["input_ids"][:, start:end]).logits[0]
            torch.testing.assert_close(together[start:end], alone, atol=1e-4, rtol=0)
        assert (
            model(input_ids=batch["input_ids"], use_cache=False).logits[0][ends[1] :]
            - together[ends[1] :]
        ).abs().max() > 1e-2


def test_packing_trains(folder: Path) -> None:
    place = run(
        folder, "packing", stage={"packing": True, "batch_size": 2, "steps": 4, "eval_steps": 4}
    )
    metrics = json.loads((place / "summary.json").read_text())["metrics"]
    assert metrics["eval_loss"] < metrics["initial/eval_loss"] - 0.5


def test_early_stopping(folder: Path) -> None:
    place = run(folder, "patience", stage={"steps": 9, "learning_rate": 1e-30, "patience": 1})
    summary = json.loads((place / "summary.json").read_text())
    assert summary["steps"] == 6, "the second evaluation brought nothing new"
    assert summary["metrics"]["best_step"] == 3


def test_best_weights_are_kept_not_the_last(folder: Path) -> None:
    """A rate that ruins the model after the first evaluation."""
    place = run(
        folder,
        "best",
        stage={
            "steps": 3,
            "eval_steps": 1,
            "learning_rate": 3.0,
            "scheduler": Scheduler.constant,
            "max_grad_norm": 0.0,
        },
    )
    by_step = {
        line["step"]: line["eval_loss"]
        for line in trl_tools.metric_lines(place)
        if "eval_loss" in line and line["step"]
    }
    best = min(by_step, key=by_step.__getitem__)
    metrics = json.loads((place / "summary.json").read_text())["metrics"]
    assert metrics["best_step"] == best and metrics["eval_loss"] == pytest.approx(by_step[best])
    expected = load_file(place / "checkpoints" / f"checkpoint-{best}" / "model.safetensors")
    found = load_file(place / "model" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in found)
    last = load_file(place / "checkpoints" / "checkpoint-3" / "model.safetensors")
    assert best == 3 or not torch.equal(found["model.norm.weight"], last["model.norm.weight"])


def test_divergence_stops_and_saves_the_batch(folder: Path) -> None:
    with pytest.raises(
        TrainingDiverged,
        match=r"step 2: the (loss|gradient's norm) is (nan|inf).*diverged_step2_rank0.safetensors",
    ) as caught:
        run(folder, "diverged", stage={"learning_rate": 1e30, "scheduler": Scheduler.constant})
    place = folder / "runs" / "diverged" / "sft"
    assert str(place) in str(caught.value)
    batch = load_file(place / "diverged_step2_rank0.safetensors")
    assert (
        batch["0.input_ids"].shape[0] == 8 and batch["0.labels"].shape == batch["0.input_ids"].shape
    )
    texts = json.loads((place / "diverged_step2_rank0.json").read_text())["micro_batches"]
    assert len(texts[0]) == 8 and "good" in "".join(texts[0]) + "great fine"
    assert not (place / "summary.json").exists() and not (place / "model").exists()


@pytest.mark.parametrize(
    ("batch_size", "micro", "ranks", "expected"),
    [(8, None, 1, (8, 1)), (8, None, 2, (4, 1)), (8, 2, 2, (2, 2)), (32, 4, 1, (4, 8))],
)
def test_batch_arithmetic(
    batch_size: int, micro: int | None, ranks: int, expected: tuple[int, int]
) -> None:
    plan = launch.plan_batches(batch_size, EngineConfig(micro_batch_size=micro), ranks)
    assert (plan.micro, plan.accumulation) == expected
    assert plan.micro * plan.accumulation * plan.ranks == batch_size


@pytest.mark.parametrize(
    ("batch_size", "micro", "ranks", "message"),
    [
        (9, None, 2, "2 ranks = 2.*stage.batch_size=10"),
        (8, 3, 1, "1 rank x engine.micro_batch_size=3 = 3.*stage.batch_size=9"),
    ],
)
def test_batches_that_do_not_divide(
    batch_size: int, micro: int | None, ranks: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        launch.plan_batches(batch_size, EngineConfig(micro_batch_size=micro), ranks)


def test_batches_are_checked_before_weights_load(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "load_causal_lm", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match="doesn't divide"):
        run(folder, "undivided", engine=EngineConfig(micro_batch_size=3))


def test_rows_longer_than_the_model(folder: Path) -> None:
    rows = [{"text": "good film " * 60 + str(i)} for i in range(10)]
    with pytest.raises(
        UserError,
        match=r"rows of 1\d\d tokens.*64 positions.*stage.max_length=64",
    ):
        run(folder, "long", rows=rows, stage={"max_length": 512})


def test_steps_come_from_epochs() -> None:
    stage = SFTStage(epochs=2.0, batch_size=8)
    assert [launch.count_steps(stage, rows) for rows in (80, 83, 5)] == [20, 20, 2]
    assert launch.count_steps(SFTStage(steps=7), 80) == 7
