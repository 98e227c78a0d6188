"""stage=dpo, ipo, kto, cpo, simpo, orpo: they learn, their losses are the papers', their tokens are
encoding.py's, and their models load alone.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.choices import AdapterKind, Dtype, FDivergence, KTOLoss, ModelKind, PreferenceLoss
from conf.schema import AdapterConfig, DataConfig, EngineConfig, ModelConfig, RunConfig
from conf.stages import CPOStage, KTOStage, PreferenceStage
from rlhf.checks.launch import BatchPlan
from rlhf.cli import config as composing
from rlhf.data.reading import DataRequest, preference_dataset
from rlhf.models.encoding import IGNORED, encode_answer, prompt_ids, response_ids
from rlhf.models.loading import load_causal_lm
from rlhf.offline.arguments import trainer_arguments
from rlhf.offline.guards import Guard
from rlhf.offline.kto import balance_note, mismatch_shift, without_lone_row
from rlhf.offline.opening import with_adapter
from rlhf.offline.preference import has_reference, make_trainer, start_of
from rlhf.offline.rows import encode_preferences
from rlhf.run.context import RunContext
from rlhf.stages import preference
from rlhf.types import UserError
from tests import drawing
from tests.checking import check
from tests.offline import trl_tools

COMMON: dict[str, Any] = {
    "steps": 8,
    "batch_size": 8,
    "eval_steps": 4,
    "max_length": 40,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.0,
}
LORA = AdapterConfig(kind=AdapterKind.lora, rank=4)
PRESETS = ("dpo", "ipo", "kto", "cpo", "simpo", "orpo")
# By how much the held-out margin has to rise; each preset has its own unit (beta times
# log-probabilities, in sums or means).
RISE = {"dpo": 0.5, "ipo": 0.5, "kto": 0.3, "cpo": 0.5, "simpo": 1.0, "orpo": 0.02}


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def preset_of(name: str) -> Any:
    return composing.compose([f"stage={name}", "model=tiny"]).stage


def stage_of(preset: str, **changes: Any) -> Any:
    """A preset's stage as it composes, made small."""
    return dataclasses.replace(preset_of(preset), **(COMMON | changes))


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
    preference.run(ctx)
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


def answer_logprob(model: Any, context: list[int], answer: list[int]) -> float:
    """Sum over the answer's tokens, float64 nats; a first token without a context has none."""
    ids = torch.tensor([context + answer])
    with torch.no_grad():
        logprobs = (
            model(input_ids=ids)
            .logits[0, :-1]
            .double()
            .log_softmax(-1)
            .gather(1, ids[0, 1:, None])[:, 0]
        )
    return float(logprobs[max(len(context) - 1, 0) :].sum())


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
    for row in preference_dataset(DataRequest.of(cfg))[1]:
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


def test_accumulation_changes_no_loss(base: Path, folder: Path) -> None:
    split = run(folder, "split", stage_of("dpo"), engine=EngineConfig(micro_batch_size=2))
    assert trl_tools.losses(split) == pytest.approx(trl_tools.losses(base), abs=1e-5)


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
        preference.run(ctx)
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


# ---- tokens and losses ----


def bench_arguments(stage: Any, rows: int, out: Path) -> dict[str, Any]:
    """What TRL's configs have in common, for one forward pass of `rows`."""
    plan = BatchPlan(1, rows, 1)
    return trainer_arguments(stage, plan, EngineConfig(), RunConfig(), Dtype.auto, out)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A policy away from its reference, and a few encoded pairs and answers."""

    tokenizer: Any
    policy: Any
    reference: Any
    pairs: Dataset
    answers: Dataset
    rows: list[dict[str, Any]]
    # of the policy: side -> [B] float64 nats, sums over each answer
    logprobs: dict[str, torch.Tensor]
    ratios: dict[str, torch.Tensor]  # the same less the reference's
    out: Path

    def trainer(self, stage: Any) -> Any:
        arguments = bench_arguments(stage, len(self.rows), self.out)
        data = self.answers if isinstance(stage, KTOStage) else self.pairs
        model, reference = (
            start_of(self.policy).requires_grad_(True),
            start_of(self.reference),
        )
        return make_trainer(
            stage,
            arguments,
            model,
            reference if has_reference(stage) else None,
            self.tokenizer,
            data,
            data,
            guard=Guard(stage, self.out, self.out, lambda step, figures: None),
            engine=EngineConfig(),
        )

    def batch(self, trainer: Any) -> dict[str, Any]:
        return trainer.data_collator(
            [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
        )

    def loss(self, stage: Any) -> float:
        trainer = self.trainer(stage)
        return float(
            trainer.compute_loss(
                trainer.model, trainer._prepare_inputs(self.batch(trainer))
            ).detach()
        )

    def tokens(self, side: str) -> torch.Tensor:
        return torch.tensor([len(row[f"{side}_ids"]) for row in self.pairs], dtype=torch.float64)


def pair_logprobs(model: Any, pairs: Dataset) -> dict[str, torch.Tensor]:
    """[B] float64 nats per side: sums over each answer."""
    sides = ("chosen", "rejected")
    return {
        s: torch.tensor(
            [answer_logprob(model, row["prompt_ids"], row[f"{s}_ids"]) for row in pairs],
            dtype=torch.float64,
        )
        for s in sides
    }


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    tokenizer = trl_tools.tiny_tokenizer()
    torch.manual_seed(3)
    reference = load_causal_lm(
        ModelConfig(kind=ModelKind.tiny, tiny=trl_tools.TINY), tokenizer
    ).eval()
    for parameter in reference.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(4.0)
    policy = start_of(reference)
    for parameter in policy.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    rows = trl_tools.pair_rows(6)
    pairs = encode_preferences(
        tokenizer, Dataset.from_list(rows), ("chosen", "rejected"), name="x", max_length=60
    )
    single = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in rows
        for side in ("chosen", "rejected")
    ]
    answers = encode_preferences(
        tokenizer, Dataset.from_list(single), ("completion",), name="x", max_length=60
    )
    logprobs, of_reference = pair_logprobs(policy, pairs), pair_logprobs(reference, pairs)
    ratios = {side: logprobs[side] - of_reference[side] for side in logprobs}
    return Bench(
        tokenizer,
        policy,
        reference,
        pairs,
        answers,
        rows,
        logprobs,
        ratios,
        tmp_path_factory.mktemp("bench"),
    )


def test_pairs_reach_the_trainers_as_every_stage_encodes_them(bench: Bench) -> None:
    """A space at the boundary merges with the word when prompt and answer are tokenised together,
    so this would show.
    """
    apart = [
        encode_answer(bench.tokenizer, row["prompt"], row[side])
        for side in ("chosen", "rejected")
        for row in bench.rows
    ]
    answers = [
        response_ids(bench.tokenizer, row[side])
        for side in ("chosen", "rejected")
        for row in bench.rows
    ]
    trainer = bench.trainer(PreferenceStage())
    batch = bench.batch(trainer)
    for i, (whole, answer) in enumerate(zip(apart, answers, strict=True)):
        assert batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist() == whole
        assert batch["input_ids"][i][batch["completion_mask"][i].bool()].tolist() == answer
    batch = bench.batch(bench.trainer(CPOStage()))
    for i, (whole, answer) in enumerate(zip(apart, answers, strict=True)):
        side, j = ("chosen", i) if i < len(bench.rows) else ("rejected", i - len(bench.rows))
        assert (
            batch[f"{side}_input_ids"][j][batch[f"{side}_attention_mask"][j].bool()].tolist()
            == whole
        )
        labels = batch[f"{side}_labels"][j]
        assert (
            labels[labels != IGNORED].tolist() == answer
            and labels[: len(whole) - len(answer)].eq(IGNORED).all()
        )


def test_kto_pairs_every_answer_of_a_shuffled_batch_with_another_prompt(bench: Bench) -> None:
    trainer = bench.trainer(KTOStage())
    order = torch.randperm(len(bench.answers), generator=torch.Generator().manual_seed(5)).tolist()
    rows = [bench.answers[i] for i in order]
    batch = trainer.data_collator(rows)
    kl_answers = []
    for i, row in enumerate(rows):
        assert (
            batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
            == row["prompt_ids"] + row["completion_ids"]
        )
        whole = batch["KL_input_ids"][i][batch["KL_attention_mask"][i].bool()].tolist()
        answer = batch["KL_input_ids"][i][batch["KL_completion_mask"][i].bool()].tolist()
        assert whole == row["prompt_ids"] + answer
        owners = [r["prompt_ids"] for r in rows if r["completion_ids"] == answer]
        assert owners and row["prompt_ids"] not in owners
        kl_answers.append(answer)
    assert sorted(kl_answers) == sorted(row["completion_ids"] for row in rows), (
        "both estimates come from the same answers"
    )


def test_mismatch_shift() -> None:
    assert mismatch_shift([[1], [2], [3]]) == 1
    assert mismatch_shift([[1], [1], [2], [2]]) == 2, "a pair's two sides lie side by side"
    assert mismatch_shift([[1], [1]]) == 1 and mismatch_shift([[1]]) == 0


def test_rows_that_are_too_long_or_part_early(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = trl_tools.tiny_tokenizer(trl_tools.CHATML)
    rows = Dataset.from_list(
        [
            {"prompt": "the", "chosen": " good", "rejected": " bad"},
            {"prompt": "the", "chosen": " good", "rejected": " bad" * 40},
        ]
    )
    with caplog.at_level("WARNING", "rlhf.stages"):
        kept = encode_preferences(
            tokenizer, rows, ("chosen", "rejected"), name="training", max_length=20
        )
    assert len(kept) == 1 and "1 of 2 rows are longer than stage.max_length=20" in caplog.text
    with pytest.raises(UserError, match=r"each of the 2 rows is longer than stage.max_length=3"):
        encode_preferences(tokenizer, rows, ("chosen", "rejected"), name="training", max_length=3)

    def turns(*texts: str) -> list[dict[str, str]]:
        return [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant", "user", "assistant"), texts, strict=False)
        ]

    chats = {"chosen": turns("a", "b", "c", "good"), "rejected": turns("a", "x", "c", "bad")}
    with pytest.raises(
        UserError, match="held-out row 0: the answers must differ in their last message only"
    ):
        encode_preferences(
            tokenizer,
            Dataset.from_list([chats]),
            ("chosen", "rejected"),
            name="held-out",
            max_length=200,
        )
    chats["rejected"] = turns("a", "b", "c", "bad")
    encoded = encode_preferences(
        tokenizer,
        Dataset.from_list([chats]),
        ("chosen", "rejected"),
        name="held-out",
        max_length=200,
    )[0]
    assert tokenizer.decode(encoded["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert encoded["rejected_ids"] == response_ids(tokenizer, "bad")


def _dpo_cases() -> list[Any]:
    """(stage options, loss of one pair from chosen and rejected log-ratios [B], lengths [B] and the
    chosen logprobs [B]).
    """
    beta, tau, smooth = 0.3, 0.07, 0.2

    def log_odds(delta: torch.Tensor, scale: float = beta) -> torch.Tensor:
        return F.logsigmoid(scale * delta)

    def exo(c: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        q, p = (
            torch.stack([torch.sigmoid(beta * (c - r)), torch.sigmoid(beta * (r - c))]),
            torch.tensor([1 - smooth, smooth]).double()[:, None],
        )
        return (q * (q / p).log()).sum(0)

    def discopop(c: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        rho = beta * (c - r)
        mix = torch.sigmoid(rho / tau)
        return -(1 - mix) * F.logsigmoid(rho) + mix * (-rho).exp()

    def alpha(t: torch.Tensor) -> torch.Tensor:
        return (t.exp() ** (0.7 - 1) - 1) / (0.7 - 1)

    losses: list[tuple[str, dict[str, Any], Callable[..., torch.Tensor]]] = [
        ("sigmoid", {}, lambda c, r, nc, nr: -log_odds(c - r)),
        ("sigmoid_norm", {}, lambda c, r, nc, nr: -log_odds(c / nc - r / nr)),
        ("hinge", {}, lambda c, r, nc, nr: (1 - beta * (c - r)).clamp(min=0)),
        ("ipo", {}, lambda c, r, nc, nr: (c / nc - r / nr - 1 / (2 * beta)) ** 2),
        ("exo_pair", {"label_smoothing": smooth}, lambda c, r, nc, nr: exo(c, r)),
        (
            "nca_pair",
            {},
            lambda c, r, nc, nr: -log_odds(c) - 0.5 * log_odds(-c) - 0.5 * log_odds(-r),
        ),
        (
            "robust",
            {"label_smoothing": smooth},
            lambda c, r, nc, nr: (
                (-(1 - smooth) * log_odds(c - r) + smooth * log_odds(r - c)) / (1 - 2 * smooth)
            ),
        ),
        ("bco_pair", {}, lambda c, r, nc, nr: -log_odds(c) - log_odds(-r)),
        ("sppo_hard", {}, lambda c, r, nc, nr: (c - 0.5 / beta) ** 2 + (r + 0.5 / beta) ** 2),
        ("aot_unpaired", {}, lambda c, r, nc, nr: -log_odds(c.sort().values - r.sort().values)),
        (
            "apo_zero",
            {},
            lambda c, r, nc, nr: 1 - torch.sigmoid(beta * c) + torch.sigmoid(beta * r),
        ),
        (
            "apo_down",
            {},
            lambda c, r, nc, nr: torch.sigmoid(beta * c) + 1 - torch.sigmoid(beta * (c - r)),
        ),
        ("discopop", {"discopop_tau": tau}, lambda c, r, nc, nr: discopop(c, r)),
        (
            "sigmoid",
            {"f_divergence": FDivergence.forward_kl},
            lambda c, r, nc, nr: -log_odds(-(-c).exp() + (-r).exp()),
        ),
        (
            "hinge",
            {"f_divergence": FDivergence.js_divergence},
            lambda c, r, nc, nr: (1 - beta * (F.logsigmoid(c) - F.logsigmoid(r))).clamp(min=0),
        ),
        (
            "sigmoid",
            {"f_divergence": FDivergence.alpha_divergence, "f_alpha": 0.7},
            lambda c, r, nc, nr: -log_odds(alpha(c) - alpha(r)),
        ),
    ]
    return [
        pytest.param(name, {"beta": beta, **extra}, function, id="-".join([name, *map(str, extra)]))
        for name, extra, function in losses
    ]


@pytest.mark.parametrize(("loss", "options", "expected"), _dpo_cases())
def test_dpo_losses_are_the_papers(
    bench: Bench, loss: str, options: dict[str, Any], expected: Callable[..., torch.Tensor]
) -> None:
    chosen, rejected = bench.ratios["chosen"], bench.ratios["rejected"]
    assert chosen.abs().min() > 1e-2, "a policy at its reference would hide everything"
    value = float(
        expected(chosen, rejected, bench.tokens("chosen"), bench.tokens("rejected")).mean()
    )
    assert bench.loss(PreferenceStage(losses=[PreferenceLoss(loss)], **options)) == pytest.approx(
        value, rel=1e-4, abs=1e-5
    )


def test_ld_alpha_weighs_the_tokens_beyond_the_shorter_answer(bench: Bench) -> None:
    alpha, beta, total = 0.25, 0.1, []
    for row in bench.pairs:
        shared = min(len(row["chosen_ids"]), len(row["rejected_ids"]))
        ratios = []
        for side in ("chosen", "rejected"):
            both = (row[f"{side}_ids"][:shared], row[f"{side}_ids"])
            values = [
                answer_logprob(bench.policy, row["prompt_ids"], ids)
                - answer_logprob(bench.reference, row["prompt_ids"], ids)
                for ids in both
            ]
            ratios.append(values[0] + alpha * (values[1] - values[0]))
        total.append(-math.log(1 / (1 + math.exp(-beta * (ratios[0] - ratios[1])))))
    plain, weighed = bench.loss(PreferenceStage()), bench.loss(PreferenceStage(ld_alpha=alpha))
    assert weighed == pytest.approx(sum(total) / len(total), rel=1e-4) and weighed != pytest.approx(
        plain, rel=1e-3
    )
    assert bench.loss(PreferenceStage(ld_alpha=1.0)) == pytest.approx(plain, rel=1e-5)


def test_several_losses_are_their_weighted_sum(bench: Bench) -> None:
    names = [
        PreferenceLoss.sigmoid,
        PreferenceLoss.robust,
        PreferenceLoss.bco_pair,
        PreferenceLoss.sft,
    ]
    single = [
        bench.loss(
            PreferenceStage(losses=[n], label_smoothing=0.1 if n is PreferenceLoss.robust else 0.0)
        )
        for n in names
    ]
    assert len({round(value, 3) for value in single}) == 4
    weights = [0.8, 0.3, 0.2, 1.5]
    both = bench.loss(PreferenceStage(losses=names, weights=weights, label_smoothing=0.1))
    assert both == pytest.approx(sum(w * v for w, v in zip(weights, single, strict=True)), rel=1e-5)
    assert bench.loss(PreferenceStage(losses=names, label_smoothing=0.1)) == pytest.approx(
        sum(single), rel=1e-5
    )


def test_kto_is_the_papers(bench: Bench) -> None:
    """Equation 7, with the KL divergence estimated from answers that meet another prompt."""
    beta, good, bad = 0.3, 1.5, 0.5
    rows = list(bench.answers)

    def ratio(context: list[int], answer: list[int]) -> float:
        return answer_logprob(bench.policy, context, answer) - answer_logprob(
            bench.reference, context, answer
        )

    shift = 2  # the two sides of a pair lie side by side
    kl = max(
        0.0,
        sum(
            ratio(row["prompt_ids"], rows[i - shift]["completion_ids"])
            for i, row in enumerate(rows)
        )
        / len(rows),
    )
    total = 0.0
    for row in rows:
        value = beta * (ratio(row["prompt_ids"], row["completion_ids"]) - kl)
        weight, sign = (good, 1) if row["label"] else (bad, -1)
        total += weight * (1 - 1 / (1 + math.exp(-sign * value)))
    stage = KTOStage(beta=beta, desirable_weight=good, undesirable_weight=bad)
    assert bench.loss(stage) == pytest.approx(total / len(rows), rel=1e-4)


def test_cpo_simpo_and_orpo_are_the_papers(bench: Bench) -> None:
    chosen, rejected = bench.logprobs["chosen"], bench.logprobs["rejected"]
    nc, nr = bench.tokens("chosen"), bench.tokens("rejected")
    nll = -float(chosen.sum() / nc.sum())
    stage = dataclasses.replace(stage_of("cpo"), beta=0.3, nll_coef=0.7)
    assert bench.loss(stage) == pytest.approx(
        -float(F.logsigmoid(0.3 * (chosen - rejected)).mean()) + 0.7 * nll, rel=1e-4
    )
    simpo = -float(F.logsigmoid(2.0 * (chosen / nc - rejected / nr) - 1.0).mean())
    assert bench.loss(stage_of("simpo")) == pytest.approx(simpo, rel=1e-4)
    odds = [mean - torch.log(-torch.expm1(mean)) for mean in (chosen / nc, rejected / nr)]
    whole = [row["prompt_ids"] + row["chosen_ids"] for row in bench.pairs]
    whole_nll = -sum(answer_logprob(bench.policy, [], ids) for ids in whole) / sum(
        len(ids) - 1 for ids in whole
    )
    orpo = whole_nll - 0.1 * float(F.logsigmoid(odds[0] - odds[1]).mean())
    assert bench.loss(stage_of("orpo")) == pytest.approx(orpo, rel=1e-4)


def test_the_reference_of_an_adapter_is_the_adapter_turned_off(bench: Bench) -> None:
    """Away from the start, so that a copy of the adapter as it was when the trainer was made would
    differ from the base.
    """
    model = with_adapter(start_of(bench.policy), LORA, None, "CAUSAL_LM")
    stage = PreferenceStage()
    assert start_of(model) is None
    trainer = make_trainer(
        stage,
        bench_arguments(stage, 6, bench.out),
        model,
        None,
        bench.tokenizer,
        bench.pairs,
        bench.pairs,
        guard=Guard(stage, bench.out, bench.out, lambda step, figures: None),
        engine=EngineConfig(),
    )
    assert list(trainer.model.peft_config) == ["default"]
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all(".default." in n for n in trained)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    loss = float(
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(bench.batch(trainer))).detach()
    )
    on = pair_logprobs(trainer.model, bench.pairs)
    margins = 0.1 * sum(
        sign * (on[side] - bench.logprobs[side]) for side, sign in (("chosen", 1), ("rejected", -1))
    )
    assert (
        loss == pytest.approx(-float(F.logsigmoid(margins).mean()), rel=1e-4)
        and abs(loss - math.log(2)) > 1e-3
    )


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
            "stage.label_smoothing=0.1 .* only robust, exo_pair, aot, aot_unpaired read it",
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
            "holds the language-model head 'lm_head'",
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


def test_sorted_losses_on_micro_batches_are_said_aloud(folder: Path) -> None:
    stage = stage_of("dpo", losses=[PreferenceLoss.aot])
    whole = trl_tools.config(stage, folder, "noted", trl_tools.pair_rows(20))
    assert check(whole) == []
    split = dataclasses.replace(whole, engine=EngineConfig(micro_batch_size=2))
    assert check(split) == [
        "stage.losses: aot sorts the pairs of one forward pass, which are 2 of stage.batch_size=8."
    ]


def test_an_adapter_on_any_head_is_refused_with_the_weights(folder: Path) -> None:
    head = dataclasses.replace(LORA, targets=["lm_head"])
    model = ModelConfig(
        kind=ModelKind.tiny, tiny=dataclasses.replace(trl_tools.TINY, tie_embeddings=False)
    )
    with pytest.raises(UserError, match=r"adapter\.targets holds the language-model head"):
        run(folder, "head", stage_of("dpo"), adapter=head, model=model)


def test_answers_of_one_kind_are_refused(folder: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": " good", "label": True} for i in range(10)]
    with pytest.raises(
        UserError,
        match="each of its 8 training answers is judged good: expected good ones and bad ones",
    ):
        run(folder, "one_kind", stage_of("kto"), rows=rows)


def test_a_row_alone_in_its_pass_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_dict({"prompt_ids": [[i] for i in range(9)]})
    assert (
        len(without_lone_row(rows, 4, "held-out")) == 8
        and "the last of 9 rows is left out" in caplog.text
    )
    assert len(without_lone_row(rows, 5, "held-out")) == 9
    with pytest.raises(UserError, match="one answer is too few"):
        without_lone_row(rows.select([0]), 4, "held-out")


def test_balance_of_good_and_bad_answers() -> None:
    assert balance_note(50, 50, 1.0, 1.0) is None
    assert (
        balance_note(60, 80, 1.33, 1.0) is None and balance_note(30, 40, 4 / 3 * 4 / 3, 1.0) is None
    )
    note = balance_note(20, 80, 1.0, 1.0)
    assert note is not None and "found 0.25" in note and "in [4, 5.33]" in note
    assert balance_note(20, 80, 4.5, 1.0) is None


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
        match="training data: the rows hold chat messages, but the tokenizer has no chat template",
    ):
        run(folder, "chat", stage_of("dpo"), data=data)
