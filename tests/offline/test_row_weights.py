"""Rows' weights in the losses: read from the column, normalised, and in every trainer's gradient as
the sum of weighted rows says.
"""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import RewardConfig as TRLRewardConfig
from trl import SFTConfig

from conf.choices import CPOLoss, Dtype, KTOLoss, ModelKind, PreferenceLoss
from conf.schema import Config, DataConfig, EngineConfig, ModelConfig, RunConfig
from conf.stages import (
    CPOStage,
    KTOStage,
    OnlineStage,
    ORPOStage,
    PreferenceStage,
    RewardStage,
    SFTStage,
)
from rlhf.checks.launch import BatchPlan
from rlhf.data import reading
from rlhf.models.loading import load_causal_lm, load_classifier
from rlhf.offline.judged_pairs import Reward
from rlhf.offline.preference import has_reference, make_trainer
from rlhf.offline.setup import trainer_arguments
from rlhf.offline.steps import Guard
from rlhf.offline.trainers import SFT
from rlhf.rows.columns import normalised
from rlhf.rows.pairs import encode_pairs, padding_token
from rlhf.rows.preferences import check_row_weights, encode_preferences
from rlhf.rows.sft import encode_sft
from rlhf.run.context import RunContext
from rlhf.stages import preference, reward, sft
from rlhf.stages import rows as stage_rows
from rlhf.types import WEIGHT, UserError
from tests.offline import trl_tools

Row = dict[str, Any]
ROWS = 6


pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the numbers ----


def test_weights_are_over_their_mean() -> None:
    assert normalised([1.0, 2.0, 3.0]) == [0.5, 1.0, 1.5]
    assert normalised([0.1] * 3) == [1.0, 1.0, 1.0]
    assert normalised([1.0, 3.0], sizes=[3, 1]) == pytest.approx([1 / 1.5, 3 / 1.5])
    with pytest.raises(UserError, match="nothing would be trained"):
        normalised([0.0, 0.0])
    with pytest.raises(UserError, match="nothing would be trained"):
        normalised([0.0, 1.0], sizes=[4, 0])


some = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=20).filter(
    lambda rows: any(w > 1e-3 for w, _ in rows)
)


@settings(deadline=None)
@given(some, st.floats(1e-3, 1e3))
def test_their_scale_means_nothing(rows: list[tuple[float, int]], scale: float) -> None:
    values, sizes = [w for w, _ in rows], [n for _, n in rows]
    found = normalised(values, sizes)
    assert found == pytest.approx(normalised([w * scale for w in values], sizes), rel=1e-6)
    assert math.fsum(w * n for w, n in zip(found, sizes, strict=True)) / sum(
        sizes
    ) == pytest.approx(1.0)


# ---- out of the files ----


def config(folder: Path, rows: list[Row], stage: Any = None, **data: Any) -> Config:
    path = trl_tools.write_rows(folder / "rows.jsonl", rows)
    return Config(
        stage=stage or RewardStage(),
        data=DataConfig(path=str(path), eval_fraction=0.25, **data),
        run=RunConfig(dir=str(folder)),
    )


def pairs(count: int = 8) -> list[Row]:
    return [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(count)]


def values(records: list[Any]) -> list[Row]:
    return [record.value for record in records]


def test_weights_stay_with_their_rows(tmp_path: Path) -> None:
    rows = [row | {"weight": i + 0.5} for i, row in enumerate(pairs())]
    cfg = config(tmp_path, rows)
    for part in map(values, reading.preference_records(reading.DataRequest.of(cfg))):
        assert len(part) and all(row["weight"] == int(row["prompt"][1:]) + 0.5 for row in part)
    single = [
        {"prompt": f"p{i}", "completion": " a", "label": i % 2, "weight": str(i)}
        for i in range(1, 9)
    ]
    for part in map(
        values,
        reading.unpaired_records(reading.DataRequest.of(config(tmp_path, single, KTOStage()))),
    ):
        assert len(part) and all(row["weight"] == int(row["prompt"][1:]) for row in part)
    for part in map(
        values, reading.unpaired_records(reading.DataRequest.of(config(tmp_path, rows, KTOStage())))
    ):
        assert len(part) and all(row["weight"] == int(row["prompt"][1:]) + 0.5 for row in part), (
            "both sides of a pair weigh what it weighs"
        )
    for rows in (
        [{"text": f"t{i}", "weight": i} for i in range(8)],
        [{"prompt": f"t{i}", "completion": " x", "weight": i} for i in range(8)],
    ):
        request = reading.DataRequest.of(config(tmp_path, rows, SFTStage()))
        for part in map(values, reading.sft_records(request)):
            assert len(part) and all(
                row["weight"] == int(row.get("text", row.get("prompt"))[1:]) for row in part
            )


def test_the_column_can_be_named_or_left_alone(tmp_path: Path) -> None:
    rows = [row | {"weight": "heavy", "importance": 2 * i + 1} for i, row in enumerate(pairs())]
    with pytest.raises(
        UserError,
        match=r"row 1: column 'weight'.*at least 0.*'heavy'.*data.weight_column=null",
    ):
        reading.preference_records(reading.DataRequest.of(config(tmp_path, rows)))
    alone = config(tmp_path, rows, weight_column=None)
    assert "weight" not in reading.preference_records(reading.DataRequest.of(alone))[0][0].value
    train, held = reading.preference_records(
        reading.DataRequest.of(config(tmp_path, rows, weight_column="importance"))
    )
    assert {record.value["weight"] for record in (*train, *held)} == set(range(1, 17, 2))
    none = config(tmp_path, pairs())
    assert "weight" not in reading.preference_records(reading.DataRequest.of(none))[0][0].value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -1}, "number -1"),
        ({"weight": None}, "null"),
        ({"weight": True}, "true/false True"),
        ({"weight": math.nan}, "number nan"),
        ({}, "no such column"),
    ],
)
def test_bad_weights_are_refused(tmp_path: Path, change: Row, message: str) -> None:
    rows = [row | {"weight": 1.0} for row in pairs()]
    rows[4] = pairs()[4] | change
    with pytest.raises(
        UserError,
        match=rf"rows.jsonl, row 5: column 'weight'.*at least 0.*{message}",
    ):
        reading.preference_records(reading.DataRequest.of(config(tmp_path, rows)))
    with pytest.raises(UserError, match="every weight is 0"):
        reading.preference_records(
            reading.DataRequest.of(config(tmp_path, [row | {"weight": 0} for row in pairs()]))
        )


def test_a_prompts_weight_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(tmp_path, [{"prompt": f"p{i}", "weight": 2} for i in range(4)], OnlineStage())
    assert reading.prompts(reading.DataRequest.of(cfg), trl_tools.tiny_tokenizer())[0].fields == {
        "weight": 2
    }
    assert "'weight' weighs no prompt" in caplog.text and "stage=ppo" in caplog.text


def test_what_no_loss_can_weigh_is_refused(tmp_path: Path) -> None:
    rows = trl_tools.records([row | {"weight": 1.0} for row in pairs()])
    for loss in (PreferenceLoss.aot, PreferenceLoss.aot_unpaired):
        with pytest.raises(
            UserError, match=rf"stage.losses={loss.value} sorts the rows of a batch"
        ):
            check_row_weights("weight", [loss], rows)
    check_row_weights("weight", [PreferenceLoss.aot], trl_tools.records(pairs()))
    cfg = trl_tools.config(
        SFTStage(packing=True),
        tmp_path,
        "packed",
        [row | {"weight": 1} for row in trl_tools.sft_rows()],
    )
    with pytest.raises(UserError, match=r"stage.packing=true joins rows"):
        sft.run(RunContext.open(cfg), stage_rows)


# ---- in the trainers ----


class Bench:
    """One trainer of each kind on six rows, and its loss and gradient for any weights of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = trl_tools.tiny_tokenizer()
        torch.manual_seed(3)
        self.policy = self.loud(
            load_causal_lm(ModelConfig(kind=ModelKind.tiny, tiny=trl_tools.TINY), self.tokenizer)
        )
        self.reference = self.loud(copy.deepcopy(self.policy))
        self.classifier = self.loud(
            load_classifier(ModelConfig(kind=ModelKind.tiny, tiny=trl_tools.TINY), self.tokenizer)
        )
        rows = trl_tools.pair_rows(ROWS)
        single = [
            {
                "prompt": r["prompt"],
                "completion": r["chosen" if i % 2 else "rejected"],
                "label": bool(i % 2),
            }
            for i, r in enumerate(rows)
        ]
        self.pairs = encode_preferences(
            self.tokenizer, trl_tools.records(rows), ("chosen", "rejected"), name="x", max_length=60
        )
        self.answers = encode_preferences(
            self.tokenizer, trl_tools.records(single), ("completion",), name="x", max_length=60
        )
        self.texts = encode_sft(
            self.tokenizer,
            trl_tools.records(trl_tools.sft_rows(ROWS)),
            name="x",
            max_length=60,
            completion_only=True,
            cut=True,
        )
        self.sides = encode_pairs(
            self.tokenizer, trl_tools.records(rows), name="x", max_length=60, margin=True
        )

    @staticmethod
    def loud(model: Any) -> Any:
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        return model.eval()

    def trainer(self, stage: Any, row_weights: list[float] | None) -> Any:
        plan = BatchPlan(1, ROWS, 1)
        arguments = trainer_arguments(
            stage, plan, EngineConfig(), RunConfig(), Dtype.auto, self.folder
        )
        data = {SFTStage: self.texts, RewardStage: self.sides, KTOStage: self.answers}.get(
            type(stage), self.pairs
        )
        # as they are: normalising is tested above
        rows = data if row_weights is None else data.add_column(WEIGHT, row_weights)
        ours = {
            "guard": Guard(stage, self.folder, self.folder, lambda step, figures: None),
            "engine": EngineConfig(),
        }
        given = {"train_dataset": rows, "eval_dataset": rows, **ours}
        model = copy.deepcopy(self.classifier if isinstance(stage, RewardStage) else self.policy)
        if isinstance(stage, SFTStage):
            args = SFTConfig(**arguments, completion_only_loss=False)
            return SFT(model=model, args=args, processing_class=self.tokenizer, **given)
        if isinstance(stage, RewardStage):
            rewards = TRLRewardConfig(
                **arguments, center_rewards_coefficient=stage.centering_coef or None
            )
            tokenizer = copy.deepcopy(self.tokenizer)
            tokenizer.pad_token = padding_token(tokenizer, self.sides)
            return Reward(model=model, args=rewards, processing_class=tokenizer, **given)
        reference = None
        if has_reference(stage):
            reference = copy.deepcopy(self.reference).requires_grad_(False)
        return make_trainer(stage, arguments, model, reference, self.tokenizer, rows, rows, **ours)

    def gradient(
        self, stage: Any, given: list[float] | None, rows: list[int] | None = None
    ) -> tuple[float, torch.Tensor]:
        """Loss, and gradient over all parameters in one vector, of a batch as the trainer's own
        loader makes it.
        """
        trainer = self.trainer(stage, given)
        batch = (
            next(iter(trainer.get_eval_dataloader()))
            if rows is None
            else trainer.data_collator([trainer.train_dataset[i] for i in rows])
        )
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
        loss.backward()
        model = trainer.accelerator.unwrap_model(trainer.model)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        return float(loss.detach()), torch.cat([part.flatten() for part in parts])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("weights"))


STAGES: dict[str, Any] = {
    "sft": SFTStage(),
    "reward": RewardStage(margin=True, centering_coef=0.3),
    "dpo": PreferenceStage(),
    "ipo and sft": PreferenceStage(
        losses=[PreferenceLoss.ipo, PreferenceLoss.sft], weights=[1.0, 0.5]
    ),
    "kto": KTOStage(),
    "apo": KTOStage(loss=KTOLoss.apo_zero_unpaired),
    "cpo": CPOStage(),
    "simpo": CPOStage(loss=CPOLoss.simpo, nll_coef=0.0),
    "orpo": ORPOStage(),
}
REPORTS_WEIGHTED = ("sft", "reward")  # the others' loss is TRL's, of rows that weigh the same


@pytest.mark.parametrize("name", STAGES)
def test_weights_of_one_change_no_bit(bench: Bench, name: str) -> None:
    loss, gradient = bench.gradient(STAGES[name], None)
    weighted_loss, weighted = bench.gradient(STAGES[name], [1.0] * ROWS)
    assert weighted_loss == loss and torch.equal(weighted, gradient)
    assert float(gradient.norm()) > 1e-3


@pytest.mark.parametrize("name", STAGES)
def test_the_gradient_is_the_weighted_sum_over_rows(bench: Bench, name: str) -> None:
    """With one row's weight 1 and the others' 0 a row's own part is left; the parts add up, by any
    weights, to the whole gradient.
    """
    single = [
        bench.gradient(STAGES[name], [float(i == j) for j in range(ROWS)]) for i in range(ROWS)
    ]
    given = [0.0, 0.5, 1.0, 2.0, 0.25, 3.0]
    loss, gradient = bench.gradient(STAGES[name], given)
    torch.testing.assert_close(
        gradient,
        sum(w * part for w, (_, part) in zip(given, single, strict=True)),
        atol=2e-5,
        rtol=1e-4,
    )
    unweighted_loss, whole = bench.gradient(STAGES[name], None)
    torch.testing.assert_close(sum(part for _, part in single), whole, atol=2e-5, rtol=1e-4)
    parts = [value for value, _ in single]
    if name in REPORTS_WEIGHTED:
        assert loss == pytest.approx(
            sum(w * value for w, value in zip(given, parts, strict=True)), abs=1e-5
        )
        assert sum(parts) == pytest.approx(unweighted_loss, abs=1e-5)
    else:
        assert loss == unweighted_loss and set(parts) == {unweighted_loss}


@pytest.mark.parametrize("name", ["reward", "dpo", "apo", "simpo"])
def test_a_rows_part_is_its_own_loss(bench: Bench, name: str) -> None:
    """The part of row i in a batch of six is a sixth of the gradient of a batch of that row alone:
    no other row is in it.
    """
    for i in (0, 3):
        _, part = bench.gradient(STAGES[name], [float(i == j) for j in range(ROWS)])
        _, alone = bench.gradient(STAGES[name], None, rows=[i])
        torch.testing.assert_close(part * ROWS, alone, atol=2e-5, rtol=1e-4)


def test_a_weight_of_zero_takes_a_text_out(bench: Bench) -> None:
    """SFT divides by all tokens of the batch, so the others' gradient is theirs alone, times their
    share of the tokens.
    """
    _, without = bench.gradient(STAGES["sft"], [0.0] + [1.0] * (ROWS - 1))
    _, others = bench.gradient(STAGES["sft"], None, rows=list(range(1, ROWS)))
    tokens = [sum(label != -100 for label in labels[1:]) for labels in bench.texts["labels"]]
    torch.testing.assert_close(
        without, others * sum(tokens[1:]) / sum(tokens), atol=2e-5, rtol=1e-4
    )


# ---- in whole runs ----

SMALL: dict[str, Any] = {
    "steps": 4,
    "batch_size": 8,
    "eval_steps": 2,
    "max_length": 40,
    "learning_rate": 5e-3,
    "warmup_ratio": 0.0,
}
RUN = {
    "sft": (sft.run, SFTStage, trl_tools.sft_rows),
    "reward": (reward.run, RewardStage, trl_tools.pair_rows),
    "dpo": (preference.run, PreferenceStage, trl_tools.pair_rows),
}


def run(folder: Path, name: str, kind: str, rows: list[Row], **changes: Any) -> Path:
    function, stage, _ = RUN[kind]
    ctx = RunContext.open(trl_tools.config(stage(**(SMALL | changes)), folder, name, rows))
    function(ctx, stage_rows)
    return ctx.dir


@pytest.mark.parametrize("kind", list(RUN))
def test_equal_weights_make_the_same_run(kind: str, tmp_path: Path) -> None:
    rows = RUN[kind][2](48)
    plain = run(tmp_path, "plain", kind, rows)
    equal = run(tmp_path, "equal", kind, [row | {"weight": 0.3} for row in rows])
    assert trl_tools.losses(plain) == trl_tools.losses(equal)
    one, other = (
        json.loads((place / "summary.json").read_text())["metrics"] for place in (plain, equal)
    )
    assert one["eval_loss"] == other["eval_loss"]
    assert (plain / "model" / "model.safetensors").read_bytes() == (
        equal / "model" / "model.safetensors"
    ).read_bytes()


def test_wrong_rows_of_weight_zero_do_no_harm(tmp_path: Path) -> None:
    """Three pairs of five have their sides exchanged; weighed 0 they teach nothing, and the model
    goes with the others.
    """
    rows = trl_tools.pair_rows(120)
    for i, row in enumerate(rows):
        wrong = i % 5 < 3
        row["weight"] = 0.0 if wrong else 2.0
        if wrong:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]

    def margin(place: Path) -> float:
        """Mean score of good less bad words, by the side that is right."""
        from rlhf.stages.pair_scores import score_pairs

        fresh = [
            (row["prompt"], row["chosen"], row["rejected"], None)
            for row in trl_tools.pair_rows(160)[120:]
        ]
        scores = score_pairs(str(place / "model"), fresh, batch_tokens=2048)
        return sum(chosen - rejected for chosen, rejected in scores) / len(scores)

    steps = {"steps": 24, "eval_steps": 12, "bootstrap": 10}
    assert margin(run(tmp_path, "weighed", "reward", rows, **steps)) > 0.5
    assert (
        margin(
            run(
                tmp_path,
                "all",
                "reward",
                [{k: v for k, v in row.items() if k != "weight"} for row in rows],
                **steps,
            )
        )
        < 0.0
    )


def test_the_held_out_loss_is_weighed_too(tmp_path: Path) -> None:
    """By hand: the mean of w times each held-out pair's loss, w over its mean."""
    from rlhf.stages.pair_scores import score_pairs

    rows = [row | {"weight": 1.0 + 4 * (i % 3)} for i, row in enumerate(trl_tools.pair_rows(60))]
    place = run(tmp_path, "held", "reward", rows, bootstrap=10)
    cfg = trl_tools.config(RewardStage(**SMALL), tmp_path, "held", rows)
    held = values(reading.preference_records(reading.DataRequest.of(replace(cfg)))[1])
    scores = score_pairs(
        str(place / "model"),
        [(r["prompt"], r["chosen"], r["rejected"], None) for r in held],
        batch_tokens=2048,
    )
    given = normalised([row["weight"] for row in held])
    expected = sum(
        w * math.log1p(math.exp(rejected - chosen))
        for w, (chosen, rejected) in zip(given, scores, strict=True)
    ) / len(scores)
    assert json.loads((place / "summary.json").read_text())["metrics"][
        "eval_loss"
    ] == pytest.approx(expected, abs=1e-5)
