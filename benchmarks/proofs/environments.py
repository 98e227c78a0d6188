"""The proof of environments, from scratch: a tool that must be used, and a guessing game.

    lookup   a number's value in a random table, which only a tool knows (kind=tools); GRPO, PPO,
             and GRPO with one turn, in which there is no time for the tool
    guess    a number from 1 to 8 in three guesses, each answered by higher or lower (kind=python);
             GRPO

python -m benchmarks.proofs.environments --seeds 0 1 2     runs and checks
python -m benchmarks.proofs.environments --check-only      checks the runs that are there
python -m benchmarks.proofs.environments --tasks guess rollout=hf    one task; options of all stages

Each policy of half a million parameters first learns from conversations that this program makes
(SFT), by a careless hand: who often guesses a value instead of looking it up, and often guesses a
number that the answers rule out. Held-out prompts are in no file that trains. The runs lie in
<runs>/proof-environments-<seed>/<task>-<run>.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.proofs.common import Check, MissingRun, read_run, report
from benchmarks.shared import exit_code, module, write_rows
from rlhf.environments.tables import DIGITS, value

LEAST_RISE = 0.20  # of the share of held-out episodes that succeed
CHANCE = 0.02  # of a value that is guessed: 0.001, and a few of 256
MAX_WALL_S = 15 * 60  # a task and a seed, its stages together
TEMPLATE = Path(__file__).with_suffix(".jinja")
LOOKS_UP = 0.6  # share of the demonstrations that ask the tool
LISTENS = 0.5  # share of the demonstrated guesses that heed the answers
LOW, HIGH, GUESSES = 1, 8, 3
DEMONSTRATIONS, HELD_OUT = 4000, 256
PRACTICE = 1900  # rows

Row = dict[str, Any]


def _user(content: str) -> Row:
    return {"role": "user", "content": content}


def _assistant(content: str, *calls: Row) -> Row:
    message: Row = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message


def looked_up(rng: random.Random, seed: int) -> Row:
    """A demonstration: of another table than the one that is asked for later."""
    key = f"{rng.randrange(10**DIGITS):0{DIGITS}d}"
    if rng.random() >= LOOKS_UP:
        return {"messages": [_user(key), _assistant(f"{rng.randrange(10**DIGITS):0{DIGITS}d}")]}
    told = value(key, f"demonstrations of {seed} {rng.random()}")
    asked = _assistant("", {"name": "table", "arguments": {"key": key}})
    answered = {"role": "tool", "name": "table", "content": told}
    return {"messages": [_user(key), asked, answered, _assistant(told)]}


def repeated(rng: random.Random) -> Row:
    """Practice in copying digits, which calls and answers are made of: a number of another length
    than keys have, and the same again. Without such rows some seeds don't learn to copy a key.
    """
    digits = rng.randint(DIGITS + 1, 2 * DIGITS + 2)
    number = f"{rng.randrange(10**digits):0{digits}d}"
    return {"messages": [_user(number), _assistant(number)]}


def guessed(rng: random.Random, seed: int) -> Row:
    """A demonstration of the game, played to its end."""
    number, low, high = rng.randint(LOW, HIGH), LOW, HIGH
    messages = [_user(f"game {rng.randrange(1000, 10**4)}")]
    for left in range(GUESSES - 1, -1, -1):
        listens = rng.random() < LISTENS
        guess = rng.randint(low, high) if listens else rng.randint(LOW, HIGH)
        messages.append(_assistant(str(guess)))
        if guess == number or not left:
            break
        if guess < number:
            low = max(low, guess + 1)
        else:
            high = min(high, guess - 1)
        messages.append(_user("higher" if guess < number else "lower"))
    return {"messages": messages}


def lookup_prompts(rng: random.Random) -> list[Row]:
    """Every key once, with its value."""
    keys = [f"{key:0{DIGITS}d}" for key in range(10**DIGITS)]
    rng.shuffle(keys)
    return [{"prompt": [_user(key)], "answer": value(key)} for key in keys]


def guess_prompts(rng: random.Random) -> list[Row]:
    """Games by numbers that say nothing; a number's seed hides another one."""
    games = rng.sample(range(1000, 10**4), 2000)
    return [{"prompt": [_user(f"game {game}")]} for game in games]


@dataclass(frozen=True, slots=True)
class Task:
    """What is learned, and the options of its runs."""

    demonstrate: Callable[[random.Random, int], Row]
    prompts: Callable[[random.Random], list[Row]]
    environment: Sequence[str]
    lengths: Sequence[str]
    sft: Sequence[str]
    runs: Mapping[str, Sequence[str]]  # online runs by name; the first option is the stage's name
    # rows that SFT learns from beside the demonstrations
    practice: Callable[[random.Random], Row] | None = None


_ONLINE = ("stage.learning_rate=3e-4", "stage.kl_coef=0.0")
_GRPO = ("grpo", "stage.prompts_per_step=32", "stage.samples_per_prompt=8", *_ONLINE)
# At GRPO's rate, and from a critic that knows nothing, one seed of three forgot the tool in its
# fourth step and found it never again.
_PPO = (
    "ppo",
    "stage.prompts_per_step=256",
    "stage.epochs=2",
    "stage.minibatches=2",
    "stage.critic_init=policy",
    "stage.critic_learning_rate=1e-3",
    "stage.critic_warmup=5",
    "stage.gae_lambda=0.95",
    "stage.learning_rate=1e-4",
    "stage.kl_coef=0.0",
)
TASKS = {
    "lookup": Task(
        looked_up,
        lookup_prompts,
        environment=(
            "environment=tools",
            "environment.tools=[rlhf.environments.tables:table]",
            "environment.options={answer: answer}",
            "environment.max_tokens=64",
        ),
        lengths=("data.max_prompt_length=16", "rollout.max_response_length=40"),
        # merges for the words around a call, so that digits stay tokens of their own
        sft=("model.tiny.vocab_size=283", "stage.steps=800", "stage.max_length=64"),
        runs={
            "grpo": (*_GRPO, "stage.steps=40"),
            "ppo": (*_PPO, "stage.steps=40"),
            "without": (*_GRPO, "stage.steps=40", "environment.max_turns=1"),
        },
        practice=repeated,
    ),
    "guess": Task(
        guessed,
        guess_prompts,
        environment=(
            "environment=python",
            "environment.path=rlhf.environments.games:GuessNumber",
            f"environment.options={{low: {LOW}, high: {HIGH}, guesses: {GUESSES}}}",
            "environment.max_tokens=64",
        ),
        lengths=("data.max_prompt_length=20", "rollout.max_response_length=4"),
        sft=("model.tiny.vocab_size=280", "stage.steps=700", "stage.max_length=64"),
        runs={"grpo": (*_GRPO, "stage.steps=160", "stage.learning_rate=1e-3")},
    ),
}


@dataclass(frozen=True, slots=True)
class ProofRuns:
    """Where the runs of one task and seed lie, and their commands."""

    runs: Path
    seed: int
    task: str
    overrides: tuple[str, ...] = ()

    @property
    def root(self) -> Path:
        return self.runs / f"proof-environments-{self.seed}"

    def write(self) -> None:
        """The files of rows."""
        task, folder = TASKS[self.task], self.root / f"{self.task}-data"
        rng = random.Random(f"{self.seed}:{self.task}")
        prompts = task.prompts(rng)
        write_rows(folder / "prompts_eval.jsonl", prompts[:HELD_OUT])
        write_rows(folder / "prompts.jsonl", prompts[HELD_OUT:])
        shown = [task.demonstrate(rng, self.seed) for _ in range(DEMONSTRATIONS)]
        write_rows(folder / "sft_eval.jsonl", shown[:HELD_OUT])
        beside = [task.practice(rng) for _ in range(PRACTICE)] if task.practice else []
        write_rows(folder / "sft.jsonl", shown[HELD_OUT:] + beside)

    def command(self, stage: str, name: str, *options: str) -> list[str]:
        task = TASKS[self.task]
        shared = [f"run.seed={self.seed}", f"run.dir={self.root}", "run.overwrite=true"]
        shared += [f"run.name={self.task}-{name}", "tracking=none", "model=tiny"]
        shared += ["engine.threads=1", "model.tiny.layers=2", "model.tiny.max_positions=128"]
        shared += [f"data.chat_template={TEMPLATE}", *task.lengths]
        return module("rlhf", f"stage={stage}", *shared, *options, *self.overrides)

    def commands(self) -> Iterator[list[str]]:
        """SFT once, then each online run and its evaluation."""
        task, data = TASKS[self.task], self.root / f"{self.task}-data"
        rows = [f"data.path={data}/sft.jsonl", f"data.eval_path={data}/sft_eval.jsonl"]
        taught = ["stage.batch_size=32", "stage.learning_rate=2e-3", "stage.eval_steps=100"]
        yield self.command("sft", "sft", *rows, *taught, *task.sft)
        start = f"{self.root}/{self.task}-sft/sft/model"
        for name, (stage, *options) in task.runs.items():
            acting = [f"model.path={start}", *task.environment, "reward=environment"]
            prompts = f"data.path={data}/prompts.jsonl"
            yield self.command(stage, name, *acting, prompts, *options)
            judged = [f"data.eval_path={data}/prompts_eval.jsonl", f"stage.before={start}"]
            judged += [f"stage.after={self.root}/{self.task}-{name}/{stage}/model"]
            judged += [item for item in options if item.startswith("environment.")]
            yield self.command("eval", name, *acting, *judged, f"stage.prompts={HELD_OUT}")

    def checks(self) -> list[Check]:
        """The bounds on all runs of the task. Raises MissingRun."""
        sft = read_run(self.root / f"{self.task}-sft" / "sft")
        checks = []
        for name, (stage, *_) in TASKS[self.task].runs.items():
            folder = self.root / f"{self.task}-{name}"
            online, evaluation = read_run(folder / stage), read_run(folder / "eval")
            before = evaluation.metric("eval/success_before")
            after = evaluation.metric("eval/success_after")
            wall = sum(float(run.summary["wall_s"]) for run in (sft, online, evaluation))
            checks.append(Check(f"{name}: success before", before, high=1.0 - LEAST_RISE))
            if name == "without":
                checks.append(Check(f"{name}: success after", after, high=CHANCE))
            else:
                checks.append(Check(f"{name}: success after", after, low=LEAST_RISE))
                checks.append(Check(f"{name}: its rise", after - before, low=LEAST_RISE))
            checks.append(Check(f"{name}: SFT, it and its evaluation, s", wall, high=MAX_WALL_S))
            gap = max(online.series("rollout/logprob_gap"))
            checks.append(Check(f"{name}: largest rollout/logprob_gap", gap, high=1e-3))
        return checks


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.environments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--check-only", action="store_true", help="run nothing")
    options, overrides = parser.parse_known_args(arguments)
    passed = True
    for seed in options.seeds:
        for task in options.tasks:
            plan = ProofRuns(options.runs.resolve(), seed, task, tuple(overrides))
            if not options.check_only:
                plan.write()
                if any(exit_code(command) for command in plan.commands()):
                    print(f"{task}, seed {seed}: a command failed", file=sys.stderr)
                    passed = False
                    continue
            try:
                passed &= report(f"{task}, seed {seed}", plan.checks())
            except MissingRun as error:
                print(f"{task}, seed {seed}: {error}", file=sys.stderr)
                passed = False
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
