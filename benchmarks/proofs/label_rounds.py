"""Labelling in rounds with a simulated annotator: what a choice of pairs saves. Every piece is the
toolkit's own, only the annotator is made up.

    python -m rlhf stage=sft experiment=active_labels run.name=NAME
    python -m benchmarks.proofs.label_rounds experiment=active_labels run.name=NAME

Both arms start with the same pairs, taken at random. Then, round by round: stage=reward trains an
ensemble on the labels so far, each member on a resample of them; the ensemble scores the prompts
that are left; choose() takes the next pairs, by label.choice in one arm and by chance in the other;
the annotator labels them as shown, left or right. What is measured after each round is the members'
mean accuracy on held-out pairs, against what the annotator would prefer without noise. The held-out
pairs choose nothing: the weights after the last step are kept.

Writes <run.dir>/<run.name>/label: metrics.jsonl (a line a round), <arm>.jsonl (labels), rounds/.
"""

import dataclasses
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.proofs.annotator import Annotator, judge
from benchmarks.shared import write_rows
from conf.choices import ChoiceMethod, Recipe
from conf.schema import Config
from eval.judges import ClassifierJudge
from rlhf.cli import config
from rlhf.data.files import read_rows
from rlhf.labels.candidates import Response, gather
from rlhf.labels.choice import Chosen, choose
from rlhf.labels.clusters import text_vectors
from rlhf.labels.records import Candidates, Judgement, Task, Verdict, as_text
from rlhf.process import distributed
from rlhf.run.context import RunContext
from rlhf.types import UserError

RANDOM, ACTIVE = "random", "active"
ROUNDS = 4  # the first one is random, and the same in both arms
MEMBERS = 3  # reward models of an ensemble
TEMPERATURE = 0.5  # of the annotator, in nats of the hidden classifier
FLIP = 0.05  # share of slips
# nats of hidden worth between the sides of a held-out pair: what a person would not toss a coin for
CLEAR = 0.5
HELD_OUT = (400, 1200)  # prompts, pairs of their answers
_LIMIT = 1e-6  # probabilities nearer to 0 and 1 than this are taken for it
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class World:
    """What an experiment is made of: answers without scores, and what each text is worth to the
    annotator.
    """

    pool: tuple[Candidates, ...]
    held_out: Path  # preference rows
    worth: Mapping[str, float]  # by prompt + answer, nats


@dataclass(slots=True)
class Arm:
    """One way to choose, and the labels that it has so far."""

    name: str
    shares: dict[ChoiceMethod, float]
    left: list[Candidates]
    rows: list[Row] = dataclasses.field(default_factory=list)


def hidden_worth(judge_path: str, texts: Sequence[str]) -> dict[str, float]:
    """Log odds, in nats, that a classifier of other reviews finds each text positive. The reward
    model sees neither it nor what it was trained on.
    """
    rows = read_rows(judge_path, key="stage.judge_path")
    judge = ClassifierJudge.from_rows(rows, f"stage.judge_path={judge_path}")
    clipped = [min(max(p, _LIMIT), 1 - _LIMIT) for p in judge.probabilities(texts)]
    return {text: math.log(p / (1 - p)) for text, p in zip(texts, clipped, strict=True)}


def as_task(candidates: Candidates, chosen: Chosen, number: int, seed: int) -> Task:
    """A pair as it is shown: answers in the order of their ids, sides drawn by the seed and what
    the pair says.
    """
    answers = tuple(
        sorted((candidates.answers[i] for i in chosen.answers), key=lambda answer: answer.id)
    )
    order = [0, 1]
    random.Random(f"{seed}:{candidates.id}:{answers[0].id}:{answers[1].id}").shuffle(order)
    return Task(
        id=f"{candidates.id}-{number}",
        prompt=candidates.prompt,
        answers=answers,
        order=tuple(order),
        chosen_by=chosen.by.value,
    )


def preference_row(task: Task, judgement: Judgement) -> Row | None:
    """A judgement of a pair as a preference row; None for one that prefers no side."""
    if judgement.verdict not in (Verdict.left, Verdict.right):
        return None
    better, worse = task.order if judgement.verdict is Verdict.left else reversed(task.order)
    return {
        "prompt": task.prompt,
        "chosen": task.answers[better].text,
        "rejected": task.answers[worse].text,
    }


def held_out_rows(
    candidates: Sequence[Candidates],
    worth: Mapping[str, float],
    clear: float,
    limit: int,
    seed: int,
) -> list[Row]:
    """At most `limit` pairs of answers whose worth differs by at least `clear` nats, the better
    side chosen; drawn by the seed from all of them.
    """
    out: list[Row] = []
    for one in candidates:
        ranked = sorted(
            ((worth[as_text(one.prompt) + answer.text], answer.text) for answer in one.answers),
            reverse=True,
        )
        pairs = (
            (better, worse)
            for better, worse in combinations(ranked, 2)
            if better[0] - worse[0] >= clear
        )
        out += [
            {"prompt": one.prompt, "chosen": better[1], "rejected": worse[1]}
            for better, worse in pairs
        ]
    return random.Random(f"{seed}:held-out").sample(out, min(limit, len(out)))


def resampled(rows: Sequence[Row], seed: str) -> list[Row]:
    """As many rows, drawn with replacement (bagging: Breiman 1996): what one member of an ensemble
    is trained on.
    """
    rng = random.Random(seed)
    return [rows[rng.randrange(len(rows))] for _ in rows]


def with_scores(
    candidates: Sequence[Candidates], scores: Sequence[Sequence[float]]
) -> list[Candidates]:
    """The candidates with mean and spread of the members' `scores` [K][answers of all candidates].

    Each member's scores are first shifted to mean 0: a Bradley-Terry score has no zero of its own.
    """
    table = np.array(scores)  # [K, N]
    table -= table.mean(axis=1, keepdims=True)
    means, spreads = iter(table.mean(axis=0).tolist()), iter(table.std(axis=0, ddof=1).tolist())
    return [
        dataclasses.replace(
            one,
            answers=tuple(
                dataclasses.replace(a, score=next(means), spread=next(spreads)) for a in one.answers
            ),
        )
        for one in candidates
    ]


def sample_answers(cfg: Config, prompts_split: str, count: int | None) -> list[Candidates]:
    """label.responses answers of the policy to each of the first `count` prompts, as an export
    would gather them.
    """
    from rlhf.data import reading
    from rlhf.models.loading import load_causal_lm, load_tokenizer
    from rollout import make_generator

    tokenizer = load_tokenizer(cfg.model)
    prompts = reading.prompts(reading.DataRequest.of(cfg), tokenizer, split=prompts_split)[:count]
    path = str(cfg.model.path)
    generator = make_generator(
        cfg,
        model_path=path,
        tokenizer=tokenizer,
        model_factory=lambda: load_causal_lm(cfg.model, tokenizer),
        adapter_rank=None,
    )
    try:
        rollouts = generator.generate(prompts, n=cfg.label.responses, seed=cfg.run.seed)
    finally:
        generator.close()
    return list(
        gather(
            [Response(rollout.prompt.text, rollout.text, "policy") for rollout in rollouts], least=2
        ).candidates
    )


def make_world(cfg: Config, folder: Path) -> World:
    """Pool and held-out pairs from the policy's answers to real prompts."""
    pool, held = (
        sample_answers(cfg, "train", cfg.label.prompts),
        sample_answers(cfg, "eval", HELD_OUT[0]),
    )
    texts = list(
        dict.fromkeys(
            as_text(one.prompt) + answer.text for one in (*pool, *held) for answer in one.answers
        )
    )
    worth = hidden_worth(str(Path(str(cfg.data.path)).parent / "judge.jsonl"), texts)
    held_rows = held_out_rows(held, worth, CLEAR, HELD_OUT[1], cfg.run.seed)
    if not held_rows:
        raise UserError(
            f"{folder}: no two answers to a held-out prompt differ by {CLEAR} nats of hidden worth."
        )
    return World(tuple(pool), write_rows(folder / "held_out.jsonl", held_rows), worth)


def train(
    base: Sequence[str], folder: Path, rows: Sequence[Row], held_out: Path, seed: int
) -> tuple[float, Path]:
    """stage=reward on `rows`, as the run `folder`/reward. Returns its accuracy on the held-out
    pairs, and its model's directory.
    """
    from rlhf.checks import launch
    from rlhf.checks.launch import count_steps
    from rlhf.stages import memory, methods, reward
    from rlhf.stages import rows as stage_rows

    cfg = config.compose(["stage=reward", *base])
    data = write_rows(folder / "train.jsonl", rows)
    cfg = dataclasses.replace(
        cfg,
        run=dataclasses.replace(
            cfg.run, dir=str(folder.parent), name=folder.name, seed=seed, overwrite=True
        ),
        data=dataclasses.replace(
            cfg.data, recipe=Recipe.none, path=str(data), eval_path=str(held_out)
        ),
    )
    # One evaluation, after the last step: held-out pairs must choose nothing.
    cfg.stage.steps = cfg.stage.eval_steps = count_steps(cfg.stage, len(rows))
    launch.check_stage([reward.check, stage_rows.check, memory.check], cfg)
    methods.register()
    reward.run(RunContext.open(cfg), stage_rows)
    directory = folder / "reward"
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return float(summary["metrics"]["eval/accuracy"]), directory / "model"


def scores_of(model: Path, candidates: Sequence[Candidates], batch_tokens: int) -> list[float]:
    """The reward model's score of each answer, candidate by candidate."""
    from rlhf.stages.pair_scores import score_pairs

    # It scores two sides of one prompt at a time: neighbours go together, an odd one with itself.
    sides = [[answer.text for answer in one.answers] for one in candidates]
    pairs = [
        (one.prompt, texts[i], texts[min(i + 1, len(texts) - 1)], None)
        for one, texts in zip(candidates, sides, strict=True)
        for i in range(0, len(texts), 2)
    ]
    scores = iter(score_pairs(str(model), pairs, batch_tokens=batch_tokens))
    out: list[float] = []
    for texts in sides:
        both = [value for _ in range(0, len(texts), 2) for value in next(scores)]
        out += both[: len(texts)]
    return out


def next_tasks(arm: Arm, cfg: Config, number: int) -> list[Task]:
    """The pairs of one round by choose(); their prompts are not asked again."""
    vectors = text_vectors(cfg.label.vectors)
    chosen = choose(
        arm.left,
        kind=cfg.label.kind,
        budget=cfg.label.budget,
        shares=arm.shares if number else {},
        group=cfg.label.group,
        vectors=vectors,
        across=False,
        seed=cfg.run.seed * 1000 + number,
    )
    tasks = [as_task(arm.left[one.candidates], one, number, cfg.run.seed) for one in chosen]
    asked = {one.candidates for one in chosen}
    arm.left = [one for index, one in enumerate(arm.left) if index not in asked]
    return tasks


def label(
    tasks: Sequence[Task], annotator: Annotator, worth: Mapping[str, float]
) -> tuple[list[Row], float]:
    """Preference rows of the annotator's judgements, and the share of them that is as the annotator
    would judge without noise.
    """
    rows, right = [], 0
    for task in tasks:
        values = [worth[as_text(task.prompt) + answer.text] for answer in task.answers]
        row = preference_row(task, judge(annotator, task, values))
        if row is not None:
            best = task.answers[values.index(max(values))].text
            right += row["chosen"] == best
            rows.append(row)
    return rows, right / max(1, len(rows))


def train_ensemble(
    arm: Arm, cfg: Config, base: Sequence[str], world: World, folder: Path, number: int
) -> tuple[list[float], list[Path]]:
    """MEMBERS reward models, each on a resample of the arm's labels: their accuracies and their
    directories.
    """
    out = []
    for member in range(MEMBERS):
        seed = (cfg.run.seed * ROUNDS + number) * MEMBERS + member
        directory = folder / "rounds" / f"{arm.name}-{number}-{member}"
        out.append(
            train(base, directory, resampled(arm.rows, f"{seed}:resample"), world.held_out, seed)
        )
    return [accuracy for accuracy, _ in out], [model for _, model in out]


def figures(arm: Arm, accuracies: Sequence[float], right: float) -> dict[str, float]:
    """What metrics.jsonl has of an arm's round; `right`: share of the round's labels that are as
    the annotator would judge without noise.
    """
    mean = sum(accuracies) / len(accuracies)
    spread = {f"{arm.name}/lowest": min(accuracies), f"{arm.name}/highest": max(accuracies)}
    return {
        f"{arm.name}/labels": float(len(arm.rows)),
        f"{arm.name}/accuracy": mean,
        **spread,
        f"{arm.name}/right_labels": right,
    }


def run(ctx: RunContext, base: Sequence[str]) -> None:
    """Both arms, round by round. Raises UserError where the prompts don't last."""
    cfg = ctx.cfg
    world = make_world(cfg, ctx.dir)
    if len(world.pool) < ROUNDS * cfg.label.budget:
        raise UserError(
            f"label.budget={cfg.label.budget}: {ROUNDS} rounds of it need as many prompts, found "
            f"{len(world.pool)}."
        )
    ctx.add_parent("policy", cfg.model.path)
    annotator = Annotator("simulated", cfg.run.seed, temperature=TEMPERATURE, flip=FLIP)
    shares = {ChoiceMethod(name): float(share) for name, share in cfg.label.choice.items()}
    chance, active = Arm(RANDOM, {}, list(world.pool)), Arm(ACTIVE, shares, list(world.pool))
    metrics: dict[str, float] = {}
    for number in range(ROUNDS):
        for arm in (active, chance):
            fresh, right = label(next_tasks(arm, cfg, number), annotator, world.worth)
            arm.rows += fresh
            write_rows(ctx.dir / f"{arm.name}.jsonl", arm.rows)
            if number == 0 and arm is chance:  # as in the other arm
                metrics |= {name.replace(ACTIVE, RANDOM): value for name, value in metrics.items()}
                continue
            accuracies, models = train_ensemble(arm, cfg, base, world, ctx.dir, number)
            metrics |= figures(arm, accuracies, right)
            if arm is active and number < ROUNDS - 1:
                arm.left = with_scores(
                    arm.left,
                    [scores_of(model, arm.left, cfg.reward.batch_tokens) for model in models],
                )
        ctx.tracker.log(number, metrics)
    ctx.finish(
        steps=ROUNDS,
        metrics=metrics,
        model=None,
        figures={name: f"{value:.3f}" for name, value in metrics.items()},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Overrides as of stage=label; the rows that they read are the recipe's."""
    from rlhf.data.recipes import build as recipes
    from rlhf.process.libraries import quiet_libraries

    base = list(sys.argv[1:] if arguments is None else arguments)
    try:
        cfg = config.compose(["stage=label", *base])
        recipes.ensure(cfg.data, dataclasses.replace(cfg.run, overwrite=False))
        distributed.set_threads(cfg.engine.threads)
        quiet_libraries()
        ctx = RunContext.open(cfg, base)
        with ctx.closing():
            run(ctx, base)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
