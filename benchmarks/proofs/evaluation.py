"""The proof of the evaluation: a pretrained chat model before and after a short SFT, on two local
tasks, with two judges and a reward model, in one report.

python -m benchmarks.proofs.evaluation                   runs and checks (under 12 minutes on two
idle cores) python -m benchmarks.proofs.evaluation --check-only      checks the run that is there

The SFT teaches three things: to tell praise of a film from blame, sums of two digits, and to answer
questions about films with praise. So both tasks and the judges have something to see. One judge is
a lexicon. The other is the untrained 135M model itself, asked about pairs: such a model looks at
the place, not at the answers, and the report has to say so and rank nobody by it.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.proofs.common import Check, MissingRun, Run, read_run, report
from benchmarks.shared import exit_code, module, write_rows
from conf.choices import Recipe
from conf.schema import DataConfig, RunConfig
from rlhf.data.recipes.build import ensure
from rlhf.data.recipes.films import side_of_question
from rlhf.data.recipes.smollm2 import MODEL_FOLDER

STAGES = ("sft", "reward", "eval_reward", "eval")
MAX_WALL_S = 12 * 60
SENTIMENT = "Is this sentence about a film praise or blame? Answer with one word.\n"
SUM = "What is {} plus {}? Answer with the number alone."
TASK_ROWS, PAIRS, PROMPTS = 80, 160, 40
Row = Mapping[str, Any]


# ---- rows


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _asked(question: str, answer: str) -> Row:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def sentiment_rows(pairs: Sequence[Any]) -> Iterator[tuple[str, str]]:
    """Questions and answers: each pair's sentence of praise, and its sentence of blame."""
    for pair in pairs:
        for side, answer in (("chosen", "praise"), ("rejected", "blame")):
            yield SENTIMENT + pair[side][-1]["content"], answer


def sums(rng: random.Random) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Sums to train on, and others to be asked, of numbers from 2 to 19."""
    every = [(a, b) for a in range(2, 20) for b in range(2, 20)]
    rng.shuffle(every)
    return every[TASK_ROWS:], every[:TASK_ROWS]


def subset_of(pair: Any) -> str:
    """The side of a film that a pair's question is about."""
    return side_of_question(pair["prompt"][-1]["content"]) or "another"


def write_files(folder: Path, seed: int) -> None:
    """The recipe's files, and those of this proof, below `folder`."""
    run = RunConfig(dir=str(folder.parent), name=folder.name, seed=seed, overwrite=True)
    ensure(DataConfig(recipe=Recipe.films), run)
    rng = random.Random(seed)
    recipe = folder / "recipe"
    pairs, held = _lines(recipe / "pairs.jsonl"), _lines(recipe / "pairs_eval.jsonl")
    known, asked = sums(rng)
    rows = [_asked(*row) for row in sentiment_rows(pairs[:240])]
    rows += [_asked(SUM.format(a, b), str(a + b)) for a, b in known]
    rows += [{"messages": [*pair["prompt"], *pair["chosen"]]} for pair in pairs[240:640]]
    rng.shuffle(rows)
    write_rows(folder / "files" / "sft.jsonl", rows[:-40])
    write_rows(folder / "files" / "sft_eval.jsonl", rows[-40:])
    choices = ["praise", "blame"]
    questions = list(sentiment_rows(held))[:TASK_ROWS]
    sentiment = [
        {"question": q, "choices": choices, "answer": choices.index(a)} for q, a in questions
    ]
    write_rows(folder / "files" / "sentiment.jsonl", sentiment)
    numbers = [{"question": SUM.format(a, b), "answer": str(a + b)} for a, b in asked]
    write_rows(folder / "files" / "sums.jsonl", numbers)
    judged = [{**pair, "subset": subset_of(pair)} for pair in held[:PAIRS]]
    write_rows(folder / "files" / "pairs.jsonl", judged)


# ---- runs


def commands(folder: Path, seed: int, overrides: Sequence[str]) -> dict[str, list[str]]:
    """The command line of each stage, in their order."""
    base, files = folder / "recipe" / MODEL_FOLDER, folder / "files"
    same = [f"run.dir={folder.parent}", f"run.name={folder.name}", f"run.seed={seed}"]
    same += ["run.overwrite=true", "model=pretrained", *overrides]
    training = ["stage.batch_size=8", "stage.max_length=96", "engine.micro_batch_size=8"]
    training += ["stage.log_steps=10", f"model.path={base}"]
    return {
        "sft": [
            *same,
            *training,
            f"data.path={files / 'sft.jsonl'}",
            f"data.eval_path={files / 'sft_eval.jsonl'}",
            "stage.steps=40",
            "stage.eval_steps=40",
            "stage.learning_rate=2e-4",
            "stage.train.layers=6",
        ],
        "reward": [
            *same,
            *training,
            f"data.path={folder / 'recipe' / 'pairs.jsonl'}",
            f"data.eval_path={folder / 'recipe' / 'pairs_eval.jsonl'}",
            "stage.steps=24",
            "stage.eval_steps=24",
            "stage.learning_rate=2e-4",
            "stage.train.layers=4",
        ],
        "eval_reward": [
            *same,
            f"stage.models={{films: {folder / 'reward' / 'model'}}}",
            f"stage.pairs={files / 'pairs.jsonl'}",
        ],
        "eval": [
            *same,
            "rollout=hf",
            f"data.eval_path={folder / 'recipe' / 'prompts_eval.jsonl'}",
            "data.max_prompt_length=64",
            "rollout.max_response_length=32",
            "rollout.temperature=0.7",
            f"stage.prompts={PROMPTS}",
            f"stage.before={base}",
            f"stage.after={folder / 'sft' / 'model'}",
            f"reward.path={folder / 'reward' / 'model'}",
            "stage.judges=[lexicon,llm]",
            f"stage.llm_judge.path={base}",
            "stage.llm_judge.max_prompt_length=512",
            "stage.llm_judge.max_tokens=8",
            *task_options(files),
        ],
    }


def task_options(files: Path) -> list[str]:
    """The two tasks: choices by log-probability, and numbers that are written."""
    return [
        f"+tasks.sentiment.path={files / 'sentiment.jsonl'}",
        "+tasks.sentiment.kind=loglikelihood",
        "+tasks.sentiment.metrics=[accuracy]",
        "+tasks.sentiment.chat=true",
        f"+tasks.sums.path={files / 'sums.jsonl'}",
        "+tasks.sums.metrics=[numeric]",
        "+tasks.sums.chat=true",
        "+tasks.sums.max_tokens=12",
    ]


# ---- checks


def check_run(folder: Path) -> list[Check]:
    """Every bound on the run directories of one seed. Raises MissingRun for a stage that has not
    finished.
    """
    runs = {stage: read_run(folder / stage) for stage in STAGES}
    reward, evaluation = runs["eval_reward"], runs["eval"]
    pages = [folder / stage / "report.html" for stage in ("eval_reward", "eval")]
    return [
        *_gains(evaluation),
        Check(
            "lexicon, difference's lower end",
            evaluation.metric("eval/lexicon_low"),
            low=0.0,
            strict=True,
        ),
        Check(
            "score, difference's lower end",
            evaluation.metric("eval/score_low"),
            low=0.0,
            strict=True,
        ),
        Check("judge llm: it ranks", evaluation.metric("eval/llm/ranked"), high=0.0),
        Check("judge llm: pairs", evaluation.metric("eval/llm/pairs"), low=float(PROMPTS)),
        Check("reward model: accuracy", reward.metric("eval/films/accuracy"), low=0.7),
        Check(
            "reward model: log loss with its temperature, below a coin's",
            reward.metric("eval/films/log_loss_tempered"),
            high=0.693,
            strict=True,
        ),
        Check("sections of the report", float(len(_sections(folder))), low=4),
        Check("requests in the pages", float(sum(map(_requests, pages))), high=0),
        Check(
            "wall time of all stages, s",
            sum(float(run.summary["wall_s"]) for run in runs.values()),
            high=MAX_WALL_S,
        ),
    ]


def _gains(evaluation: Run) -> list[Check]:
    """Both tasks are done better after: the interval after lies above that before."""
    out = []
    for task, metric in (("sentiment", "accuracy"), ("sums", "numeric")):
        before = evaluation.metric(f"eval/{task}/before/{metric}_high")
        after = evaluation.metric(f"eval/{task}/after/{metric}_low")
        name = f"task {task}: lower end after, upper end before"
        out.append(Check(name, after - before, low=0, strict=True))
    return out


def _sections(folder: Path) -> list[str]:
    path = folder / "eval" / "report.json"
    if not path.is_file():
        raise MissingRun(f"{path}: no such file")
    content = json.loads(path.read_text(encoding="utf-8"))
    return [section["title"] for section in content["sections"]]


def _requests(page: Path) -> int:
    """Attributes of a page that would ask a host for something."""
    if not page.is_file():
        raise MissingRun(f"{page}: no such file")
    text = page.read_text(encoding="utf-8")
    return sum(text.count(f'{name}="http') for name in ("src", "href", "action"))


def figures(folder: Path) -> dict[str, float]:
    """What the tables show, for the terminal."""
    names = ("consistency", "first_share", "longer_share", "unread")
    metrics = read_run(folder / "eval").summary["metrics"]
    wanted = [f"eval/llm/{name}" for name in names]
    wanted += [name for name in metrics if name.count("/") == 3 and "llm" not in name]
    return {name: metrics[name] for name in wanted if name in metrics}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="root of the runs")
    parser.add_argument("--check-only", action="store_true", help="check the run that is there")
    options, overrides = parser.parse_known_args(arguments)
    folder = options.runs / f"proof-evaluation-{options.seed}"
    if not options.check_only:
        write_files(folder, options.seed)
        for stage, command in commands(folder, options.seed, overrides).items():
            code = exit_code(module("rlhf", f"stage={stage}", *command))
            if code != 0:
                print(f"stage={stage} ended with exit code {code}", file=sys.stderr)
                return 1
    try:
        for name, value in figures(folder).items():
            print(f"{name} = {value:.4g}")
        passed = report(f"evaluation, seed {options.seed}", check_run(folder))
    except MissingRun as error:
        print(str(error), file=sys.stderr)
        return 1
    print(f"the report: {folder / 'eval' / 'report.html'}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
