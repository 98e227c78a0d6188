"""The trainers of the preference stages: their losses are the papers', and their tokens those of
every stage.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from conf.choices import Dtype, FDivergence, ModelKind, PreferenceLoss
from conf.schema import AdapterConfig, EngineConfig, ModelConfig, RunConfig
from conf.stages import CPOStage, KTOStage, PreferenceStage
from policy.adapters import attach
from rlhf.checks.launch import BatchPlan
from rlhf.models.encoding import IGNORED, encode_answer, response_ids
from rlhf.models.loading import load_causal_lm
from rlhf.offline.preference import has_reference, make_trainer, start_of
from rlhf.offline.setup import trainer_arguments
from rlhf.offline.steps import Guard
from rlhf.rows.preferences import encode_preferences
from tests.offline import trl_tools
from tests.offline.preference_tools import LORA, answer_logprob, stage_of

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = AdapterConfig()  # all weights train


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
            start_of(self.policy, FULL).requires_grad_(True),
            start_of(self.reference, FULL),
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
    policy = start_of(reference, FULL)
    for parameter in policy.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    rows = trl_tools.pair_rows(6)
    pairs = encode_preferences(
        tokenizer, trl_tools.records(rows), ("chosen", "rejected"), name="x", max_length=60
    )
    single = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in rows
        for side in ("chosen", "rejected")
    ]
    answers = encode_preferences(
        tokenizer, trl_tools.records(single), ("completion",), name="x", max_length=60
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
    model = attach(start_of(bench.policy, FULL), LORA, task="CAUSAL_LM")
    stage = PreferenceStage()
    assert start_of(model, LORA) is None
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
