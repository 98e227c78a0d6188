"""stage=dpo, ipo, kto, cpo, simpo, orpo: they learn, their losses are the papers', their tokens are
encoding.py's, and their models load alone.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.choices import AdapterKind, KTOLoss, ModelKind, PreferenceLoss
from conf.schema import DataConfig, EngineConfig, ModelConfig, RunConfig
from rlhf.cli import config as composing
from rlhf.data.reading import DataRequest, preference_records
from rlhf.models.encoding import prompt_ids, response_ids
from rlhf.models.loading import load_causal_lm
from rlhf.run.context import RunContext
from rlhf.stages import preference
from rlhf.stages import rows as stage_rows
from rlhf.types import UserError
from tests import drawing
from tests.checking import check
from tests.offline import trl_tools
from tests.offline.preference_tools import LORA, answer_logprob, stage_of

PRESETS = ("dpo", "ipo", "kto", "cpo", "simpo", "orpo")
# By how much the held-out margin has to rise; each preset has its own unit (beta times
# log-probabilities, in sums or means).
RISE = {"dpo": 0.5, "ipo": 0.5, "kto": 0.3, "cpo": 0.5, "simpo": 1.0, "orpo": 0.02}


pytestmark = pytest.mark.usefixtures("one_thread")


def run(
    folder: Path,
    name: str,
    stage: Any,
    *,
    rows: list[dict[str, Any]] | None = None,
    **groups: Any,
) -> Path:
    ctx = RunContext.open(
        trl_tools.config(stage, folder, name, rows or trl_tools.pair_rows(80), **groups)
    )
    preference.run(ctx, stage_rows)
    return ctx.dir


def metrics_of(run_directory: Path) -> dict[str, float]:
    return json.loads((run_directory / "summary.json").read_text())["metrics"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preference")


@pytest.fixture(scope="module")
def base(folder: Path) -> Path:
    with drawing.on():
        return run(folder, "base", stage_of("dpo"))


@pytest.fixture(scope="module")
def start(folder: Path) -> Path:
    """A model directory that runs can start from, with weights large enough for an adapter to
    matter.
    """
    tokenizer = trl_tools.tiny_tokenizer()
    torch.manual_seed(0)
    model = load_causal_lm(ModelConfig(kind=ModelKind.tiny, tiny=trl_tools.TINY), tokenizer)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4.0)
    model.save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    return folder / "start"


# ---- it learns ----


def check_learned(preset: str, place: Path, share: float = 1.0) -> None:
    metrics = metrics_of(place)
    assert metrics["eval_loss"] < metrics["initial/eval_loss"]
    assert (
        metrics["eval_rewards/margins"]
        > metrics["initial/eval_rewards/margins"] + share * RISE[preset]
    )
    if preset != "kto":  # single answers have no accuracy
        assert (
            metrics["eval_rewards/accuracies"] >= 0.8
            and metrics["eval_rewards/accuracies"] > metrics["initial/eval_rewards/accuracies"]
        )


@pytest.mark.parametrize("preset", [p for p in PRESETS if p not in ("dpo", "cpo")])
def test_it_learns(preset: str, folder: Path) -> None:
    place = run(folder, "learns", stage_of(preset))
    check_learned(preset, place)
    assert (
        place.name == preset and json.loads((place / "summary.json").read_text())["stage"] == preset
    )


@pytest.mark.slow
def test_cpo_learns(folder: Path) -> None:
    check_learned("cpo", run(folder, "learns", stage_of("cpo", steps=16)))


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_lora_learns(preset: str, folder: Path, start: Path) -> None:
    place = run(
        folder,
        "lora_learns",
        stage_of(preset, steps=40, eval_steps=20, learning_rate=2e-2),
        model=ModelConfig(path=str(start)),
        adapter=LORA,
    )
    # the start likes shorter answers, which CPO's sums show, and its likelihood term weighs more
    # than its margin
    check_learned(preset, place, share=0.1 if preset == "cpo" else 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [loss for loss in PreferenceLoss if loss not in (PreferenceLoss.sigmoid, PreferenceLoss.ipo)],
)
def test_every_loss_learns(loss: PreferenceLoss, folder: Path) -> None:
    smoothing = 0.1 if loss in (PreferenceLoss.exo_pair, PreferenceLoss.robust) else 0.0
    metrics = metrics_of(
        run(folder, f"loss_{loss.value}", stage_of("dpo", losses=[loss], label_smoothing=smoothing))
    )
    assert metrics["eval_loss"] < metrics["initial/eval_loss"]
    if loss is PreferenceLoss.discopop:
        # Its slope at a margin of 0 is (1 - ln 2) / (4 tau) - 3/4, positive for tau = 0.05: the
        # loss is not convex, and small steps from
        # the start lead to the minimum at a negative margin nearby.
        assert -0.2 < metrics["eval_rewards/margins"] < 0
    else:  # sft looks at the chosen side alone, and apo_down takes both sides down
        assert metrics["eval_rewards/margins"] > (
            0.0 if loss in (PreferenceLoss.sft, PreferenceLoss.apo_down) else 0.1
        )


def test_what_a_run_leaves_behind(base: Path) -> None:
    check_learned("dpo", base)
    lines = trl_tools.metric_lines(base)
    assert [line["step"] for line in lines] == list(range(9)), (
        "a line per step, the evaluation before the first included"
    )
    assert {
        "loss",
        "grad_norm",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "train/tokens_per_s",
    } <= lines[1].keys()
    samples = [json.loads(line) for line in (base / "samples.jsonl").read_text().splitlines()]
    assert (
        len(samples) == 4
        and {"prompt", "response", "response_length", "finish_reason"} <= samples[0].keys()
    )
    assert {"loss.png", "margins.png"} <= {p.name for p in (base / "plots").glob("*.png")}
    assert {
        entry["path"] for entry in json.loads((base / "manifest.json").read_text())["data"]
    } == {str(base.parents[2] / "dpo_base.jsonl")}


def test_whole_texts_without_a_prompt(folder: Path) -> None:
    rows = [
        {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
        for row in trl_tools.pair_rows(80)
    ]
    place = run(folder, "whole", stage_of("dpo"), rows=rows)
    check_learned("dpo", place)
    sample = json.loads((place / "samples.jsonl").read_text().splitlines()[0])
    assert any(row["chosen"].startswith(sample["prompt"]) for row in rows), (
        "a sample goes on from the start of a held-out text"
    )


def test_kto_reads_single_answers(folder: Path) -> None:
    """Good and bad answers in two blocks, as files often are."""
    pairs = trl_tools.pair_rows(40)
    rows = [
        {"prompt": p["prompt"], "completion": p[side], "label": side == "chosen"}
        for side in ("chosen", "rejected")
        for p in pairs
    ]
    metrics = metrics_of(
        run(folder, "single", stage_of("kto", loss=KTOLoss.apo_zero_unpaired), rows=rows)
    )
    assert (
        metrics["eval_loss"] < metrics["initial/eval_loss"] - 0.05
        and metrics["eval_rewards/margins"] > 0.3
    )


# ---- the model that it saves ----


@pytest.mark.parametrize("adapter", [AdapterKind.none, AdapterKind.lora], ids=["full", "lora"])
def test_the_saved_model_has_the_reported_margin_against_the_start(
    adapter: AdapterKind, folder: Path, start: Path
) -> None:
    """Both are read back from their directories alone: the reference was the start, and model/
    holds whole, best weights.
    """
    stage = stage_of("dpo", learning_rate=1e-2)
    groups = {
        "model": ModelConfig(path=str(start)),
        "adapter": dataclasses.replace(LORA, kind=adapter),
    }
    place = run(folder, f"saved_{adapter.value}", stage, **groups)
    cfg = trl_tools.config(stage, folder, f"saved_{adapter.value}", trl_tools.pair_rows(80))
    assert (place / "adapter" / "adapter_model.safetensors").exists() == (
        adapter is AdapterKind.lora
    )
    assert (
        not (place / "adapter" / "ref").exists()
        and not (place / "model" / "adapter_config.json").exists()
    )
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    trained, reference = (
        AutoModelForCausalLM.from_pretrained(place / "model"),
        AutoModelForCausalLM.from_pretrained(start),
    )
    margins = []
    for record in preference_records(DataRequest.of(cfg))[1]:
        row = record.value
        sides = [response_ids(tokenizer, row[side]) for side in ("chosen", "rejected")]
        ratios = [
            answer_logprob(trained, c, s) - answer_logprob(reference, c, s)
            for c in [prompt_ids(tokenizer, row["prompt"])]
            for s in sides
        ]
        margins.append(stage.beta * (ratios[0] - ratios[1]))
    reported = metrics_of(place)["eval_rewards/margins"]
    assert reported == pytest.approx(sum(margins) / len(margins), abs=1e-4) and reported > 0.05


# ---- how it goes on ----


@pytest.mark.parametrize("split", [{"micro_batch_size": 2}, {"micro_batch_tokens": 60}])
def test_accumulation_changes_no_loss(split: dict[str, int], base: Path, folder: Path) -> None:
    name = f"split_{next(iter(split))}"
    check_same(run(folder, name, stage_of("dpo"), engine=EngineConfig(**split)), base)


@pytest.mark.parametrize(
    ("preset", "options", "split"),
    [
        ("cpo", {}, {"micro_batch_size": 2}),
        ("orpo", {}, {"micro_batch_tokens": 60}),
        ("dpo", {"losses": [PreferenceLoss.sigmoid, PreferenceLoss.sft]}, {"micro_batch_size": 2}),
    ],
)
def test_a_likelihood_is_a_mean_over_the_tokens_of_the_whole_batch(
    preset: str, options: dict[str, Any], split: dict[str, int], folder: Path
) -> None:
    """Rows have different lengths, so a mean taken per micro-batch would show."""
    stage = stage_of(preset, steps=3, **options)
    whole = run(folder, f"{preset}-whole", stage)
    check_same(run(folder, f"{preset}-split", stage, engine=EngineConfig(**split)), whole)


def check_same(split: Path, whole: Path) -> None:
    """Training losses, held-out loss (whose last micro-batch is smaller) and weights."""
    assert trl_tools.losses(split) == pytest.approx(trl_tools.losses(whole), abs=1e-5)
    held_out = [metrics_of(run_directory)["eval_loss"] for run_directory in (split, whole)]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-5)
    one, other = (load_file(r / "model" / "model.safetensors") for r in (split, whole))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-4, rtol=0, msg=name)


def stop_and_resume(folder: Path, preset: str) -> Path:
    """A run that is stopped at its sixth step, and goes on from its checkpoint of step 4."""
    ctx = RunContext.open(
        trl_tools.config(stage_of(preset), folder, "resumed", trl_tools.pair_rows(80))
    )
    log = ctx.tracker.log

    def stop_at_six(step: int, metrics: Any) -> None:
        if step == 6:
            raise KeyboardInterrupt
        log(step, metrics)

    ctx.tracker.log = stop_at_six  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        preference.run(ctx, stage_rows)
    resume = RunConfig(dir=str(folder / "runs"), name="resumed", resume=True)
    return run(folder, "resumed", stage_of(preset), run=resume)


def test_resume_goes_on_as_if_never_stopped(base: Path, folder: Path) -> None:
    """The reference of a resumed run is the start, not the checkpoint."""
    resumed = stop_and_resume(folder, "dpo")
    assert trl_tools.losses(resumed) == pytest.approx(trl_tools.losses(base), abs=1e-6)
    expected, found = (load_file(r / "model" / "model.safetensors") for r in (base, resumed))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=name)


def test_a_resumed_run_counts_its_tokens_on(folder: Path) -> None:
    """CPO's tokens are counted by us, and not in its checkpoint."""
    resumed = stop_and_resume(folder, "cpo")
    lines = [line for line in trl_tools.metric_lines(resumed) if "num_tokens" in line]
    tokens = [line["num_tokens"] for line in lines]
    assert len(tokens) == 8 and tokens == sorted(tokens)
    assert all(line["train/tokens_per_s"] > 0 for line in lines)


def test_divergence_saves_the_batch(folder: Path) -> None:
    """CPO's batches have names of their own."""
    with pytest.raises(
        UserError,
        match=r"the (loss|gradient's norm) is (nan|inf).*diverged_step\d_rank0.safetensors",
    ):
        run(folder, "diverged", stage_of("cpo", learning_rate=1e30, warmup_ratio=0.0))
    place = next((folder / "runs" / "diverged" / "cpo").glob("diverged_step*_rank0.json"))
    texts = json.loads(place.read_text())["micro_batches"][0]
    assert len(texts) == 16 and any("good" in text for text in texts)


# ---- bad options ----


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("dpo", "stage.losses=[]", "stage.losses=.* expected at least one loss"),
        ("dpo", "stage.losses=[sigmoid,sigmoid]", "each loss once"),
        ("dpo", "stage.losses=[sigmoyd]", "sigmoyd"),
        ("dpo", "stage.weights=[1,2]", "stage.weights=.* one weight for each of 1 losses"),
        ("dpo", "stage.weights=[0]", "stage.weights=.* at least one above 0"),
        ("dpo", "stage.losses=[exo_pair]", "stage.label_smoothing=0.0 .* above 0 with exo_pair"),
        (
            "dpo",
            "stage.label_smoothing=0.1",
            "stage.label_smoothing=0.1 .* only robust, exo_pair, aot, aot_unpaired",
        ),
        (
            "dpo",
            "stage.losses=[robust] stage.label_smoothing=0.5",
            r"stage.label_smoothing=0.5 .* in \[0, 0.5\)",
        ),
        (
            "dpo",
            "stage.losses=[sigmoid,nca_pair] stage.f_divergence=forward_kl",
            "stage.f_divergence='forward_kl' .* reverse_kl with losses",
        ),
        (
            "dpo",
            "stage.f_alpha=0.3",
            "stage.f_alpha=0.3 .* null without f_divergence=alpha_divergence",
        ),
        ("dpo", "stage.ld_alpha=1.5", "stage.ld_alpha"),
        ("dpo", "stage.losses=[discopop] stage.discopop_tau=0", "stage.discopop_tau"),
        ("ipo", "stage.beta=0", "stage.beta"),
        ("kto", "stage.desirable_weight=0", "stage.desirable_weight"),
        ("cpo", "stage.gamma=1", "stage.gamma=1.0 .* only simpo has a target margin"),
        (
            "cpo",
            "stage.loss=ipo stage.label_smoothing=0.1",
            "stage.label_smoothing=0.1 .* only sigmoid and simpo",
        ),
        ("simpo", "stage.nll_coef=-1", "stage.nll_coef"),
        ("orpo", "stage.beta=-1", "stage.beta"),
        (
            "kto",
            "stage.losses=[kto]",
            "stage.losses: no such option of stage=kto. Nearest: stage.loss.",
        ),
    ],
)
def test_bad_options(stage: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        composing.compose([f"stage={stage}", *override.split()])


@pytest.mark.parametrize(
    ("preset", "changes", "groups", "message"),
    [
        (
            "kto",
            {"batch_size": 8},
            {"engine": EngineConfig(micro_batch_size=1)},
            "engine.micro_batch_size = 1: stage.loss=kto compares",
        ),
        (
            "dpo",
            {},
            {"adapter": dataclasses.replace(LORA, dropout=0.1)},
            "adapter.dropout=0.1: TRL turns dropout off for stage=dpo",
        ),
        (
            "orpo",
            {},
            {"adapter": dataclasses.replace(LORA, dropout=0.1)},
            "adapter.dropout=0.1: TRL turns dropout off for stage=orpo",
        ),
        (
            "ipo",
            {},
            {"adapter": dataclasses.replace(LORA, targets=["q_proj", "lm_head"])},
            r"adapter\.targets=.*'lm_head'.*model\.embed_tokens \(tied",
        ),
        (
            "simpo",
            {"batch_size": 9},
            {"engine": EngineConfig(micro_batch_size=2)},
            "stage.batch_size=9 doesn't divide",
        ),
    ],
)
def test_refused_before_weights_load(
    preset: str, changes: dict[str, Any], groups: dict[str, Any], message: str, folder: Path
) -> None:
    cfg = trl_tools.config(
        stage_of(preset, **changes), folder, "refused", trl_tools.pair_rows(20), **groups
    )
    with pytest.raises(UserError, match=message):
        check(cfg)


def test_sorted_losses_on_micro_batches_give_a_note(folder: Path) -> None:
    stage = stage_of("dpo", losses=[PreferenceLoss.aot])
    whole = trl_tools.config(stage, folder, "noted", trl_tools.pair_rows(20))
    assert check(whole) == []
    split = dataclasses.replace(whole, engine=EngineConfig(micro_batch_size=2))
    (note,) = check(split)
    assert "stage.losses: aot" in note and "2 of stage.batch_size=8" in note


def test_an_adapter_on_any_head_is_refused_with_the_weights(folder: Path) -> None:
    head = dataclasses.replace(LORA, targets=["lm_head"])
    model = ModelConfig(
        kind=ModelKind.tiny, tiny=dataclasses.replace(trl_tools.TINY, tie_embeddings=False)
    )
    with pytest.raises(UserError, match=r"adapter\.targets=\['lm_head'\].*never train"):
        run(folder, "head", stage_of("dpo"), adapter=head, model=model)


def test_answers_of_one_kind_are_refused(folder: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": " good", "label": True} for i in range(10)]
    with pytest.raises(
        UserError,
        match="8 training answers is judged good",
    ):
        run(folder, "one_kind", stage_of("kto"), rows=rows)


def test_chat_rows_need_a_template(folder: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows = [
        {
            "prompt": chat,
            **{s: [{"role": "assistant", "content": f"{s} {i}"}] for s in ("chosen", "rejected")},
        }
        for i in range(4)
    ]
    data = DataConfig(
        path=str(trl_tools.write_rows(folder / "chat.jsonl", rows)),
        eval_path=str(folder / "chat.jsonl"),
    )
    with pytest.raises(
        UserError,
        match=r"training data: .* no chat template",
    ):
        run(folder, "chat", stage_of("dpo"), data=data)
