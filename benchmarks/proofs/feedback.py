"""The proof that the loop from use to a better model closes: serve, users say what they like, train
on it, gate, promote, better; and back, under load, without a failed request.

    python -m benchmarks.proofs.feedback                       runs and checks (minutes)
    python -m benchmarks.proofs.feedback --seeds 0 1 2

For each seed, everything by the commands that users have:

1. stage=sft: a model of two layers answers questions about topics, half of the answers warm, half
   of them cold. It is registered and promoted.
2. stage=gateway serves it by the registry's alias. Simulated users ask, choose between two answers
   and give thumbs by a preference that no program sees: warm. One choice in ten is wrong, one user
   in ten gives no consent.
3. stage=gateway action=export, stage=data, stage=dpo. The new model is registered: its lineage
   names the version whose users spoke. It is measured on held-out topics.
4. The gate withholds it from a rule that it can't pass, and lets it pass one that it can.
5. Both versions run side by side until the test decides.
6. The alias goes to the new version and back while users ask: no request fails.

Answers are sampled by transformers (benchmarks/served.py), not by vLLM: the gateway sees no
difference. Writes proof_feedback.json into the folder of runs.
"""

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.gateway import Running, gateway
from benchmarks.proofs.common import Check, report
from benchmarks.proofs.feedback_users import Users, asked, on_topic, preferred, questions
from benchmarks.served import Models, serving
from benchmarks.shared import exit_code, module, write_rows

NAME = "mine"
MOST_TOKENS = 12
_WARM, _COLD = "gladly: {} is lovely", "no: {} is dull"
_SETTLE_S = 60.0


def training_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Conversations, half of them warm."""
    drawn = random.Random(seed)
    rows = []
    for number in range(count):
        topic = drawn.choice(questions()[0])
        answer = (_WARM if number % 2 else _COLD).format(topic)
        rows.append({"messages": [*asked(topic), {"role": "assistant", "content": answer}]})
    return rows


@dataclass
class Loop:
    """One seed's runs."""

    runs: Path
    seed: int
    models: Models = field(default_factory=Models)

    def rlhf(self, *options: str, expected: int = 0) -> None:
        """A command of the toolkit. Raises RuntimeError for another exit code."""
        command = module("rlhf", *options, f"run.dir={self.runs}", f"run.seed={self.seed}")
        code = exit_code(command)
        if code != expected:
            raise RuntimeError(f"exit code {code}, not {expected}: {' '.join(command)}")

    def registry(self, action: str, *options: str, expected: int = 0) -> None:
        self.rlhf(
            "stage=registry",
            f"stage.action={action}",
            f"run.name={NAME}",
            "stage.who=proof",
            *options,
            expected=expected,
        )

    # ---- training ----

    def first(self) -> None:
        """A model that is warm half of the time."""
        rows = write_rows(self.runs / "rows" / "sft.jsonl", training_rows(self.seed, 800))
        self.rlhf(
            "stage=sft",
            "model=tiny",
            "run.name=first",
            f"data.path={rows}",
            "data.chat_template=chatml",
            "model.tiny.layers=2",
            "model.tiny.max_positions=96",
            "model.tiny.vocab_size=400",
            "stage.steps=250",
            "stage.batch_size=32",
            "stage.max_length=96",
            "stage.learning_rate=3e-3",
            "tracking=none",
        )

    def second(self) -> None:
        """A model that learnt from what users said."""
        self.rlhf("stage=gateway", "stage.action=export", f"run.name={NAME}")
        pairs = self.runs / NAME / "gateway" / "feedback" / "pairs.jsonl"
        self.rlhf(
            "stage=data",
            "run.name=feedback",
            f"data.path={pairs}",
            "data.pipeline=[patterns]",
            "tracking=none",
        )
        self.rlhf(
            "stage=dpo",
            "run.name=second",
            "model.path=registry:mine@production",
            f"data.path={self.runs / 'feedback' / 'data' / 'train.jsonl'}",
            "stage.batch_size=16",
            "stage.max_length=96",
            "stage.learning_rate=3e-4",
            "stage.steps=80",
            # without the likelihood of the chosen answers the topic is lost: the gate withheld it
            "stage.losses=[sigmoid,sft]",
            "stage.weights=[1.0,1.0]",
            "tracking=none",
        )

    # ---- measuring ----

    def measure(self, version: int, folder: Path) -> dict[str, float]:
        """Held-out figures of a version, which the registry gets."""
        name = f"{NAME}-{version}"
        self.models.add(name, folder, MOST_TOKENS)
        likes = topics = 0
        held = questions()[1]
        for topic in held:
            for text in self.models.answers[name]({"messages": asked(topic), "n": 8}):
                likes += preferred(text)
                topics += on_topic(topic, text)
        count = 8 * len(held)
        figures = {"eval/preferred": likes / count, "eval/on_topic": topics / count}
        file = self.runs / f"held-out-{version}.json"
        file.write_text(json.dumps({"metrics": figures}), encoding="utf-8")
        self.registry("measure", f"stage.version={version}", f"stage.summaries=[{file}]")
        return figures


# ---- the proof ----


def until(what: str, is_so: Callable[[], bool]) -> None:
    """Wait. Raises RuntimeError after a minute."""
    end = time.monotonic() + _SETTLE_S
    while not is_so():
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not within {_SETTLE_S:g} s")
        time.sleep(0.1)


@dataclass
class Found:
    """The figures of a seed."""

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    pairs: int = 0
    decided_for_new: float = 0.0
    users: int = 0
    asked_under_load: int = 0
    failed: int = 0
    went_and_came: float = 0.0
    ancestors: list[str] = field(default_factory=list)


def prove(runs: Path, seed: int) -> Found:
    """Everything, for one seed. Raises RuntimeError where a command fails."""
    loop, found = Loop(runs, seed), Found()
    loop.first()
    model = runs / "first" / "sft" / "model"
    loop.registry("register", f"model.path={model}", "stage.reason=first")
    found.before = loop.measure(1, model)
    loop.registry("promote", "stage.version=1", "stage.reason=the only one")
    with serving(loop.models.answers) as url:
        arm = {"url": url, "model": f"{NAME}-{{version}}", "version": f"{NAME}@production"}
        quoted = {**arm, "model": f"'{arm['model']}'"}
        with gateway(runs, {"live": quoted}, "stage.poll_s=0.2") as running:
            users = Users(running.url, NAME, seed)
            for number in range(120):
                for _ in range(2):
                    users.choose(f"early {number}")
            _train(loop, found)
            _test(users, url, found)
            users.arms({"live": {**arm, "weight": 1}})
            _under_load(loop, running, users, found)
    return found


def _train(loop: Loop, found: Found) -> None:
    """From feedback to a registered version that the gate lets pass."""
    loop.second()
    rows = (loop.runs / "feedback" / "data" / "train.jsonl").read_text(encoding="utf-8")
    found.pairs = len(rows.splitlines())
    model = loop.runs / "second" / "dpo" / "model"
    loop.registry("register", f"model.path={model}", "stage.reason=trained on feedback")
    found.after = loop.measure(2, model)
    too_much = 'stage.rules=["eval/preferred > 1"]'
    promote = ("promote", "stage.version=2", "stage.reason=better")
    loop.registry(*promote, too_much, expected=1)
    from rlhf.registry.store import FILE, Registry

    with Registry(loop.runs / FILE) as registry:
        found.ancestors = list(registry.version(NAME, "2").draft.lineage["ancestors"])


def _test(users: Users, url: str, found: Found) -> None:
    """Both versions side by side, until the test decides."""
    arms = {
        "new": {"url": url, "model": f"{NAME}-2", "weight": 1},
        "old": {"url": url, "model": f"{NAME}-1", "weight": 1},
    }
    users.arms(arms)
    for number in range(300):
        for _ in range(3):
            users.judge(f"late {number}")
        if number % 10 == 9:
            (compared,) = users.state()["comparisons"]
            found.users = compared["users"]
            if compared["stopped"] is not None:
                # arms are compared by name: a is new, b is old
                found.decided_for_new = float(compared["decision"] == "a is better")
                return


def _under_load(loop: Loop, running: Running, users: Users, found: Found) -> None:
    """The alias goes to the new version and back, while others ask without a pause."""
    stop = threading.Event()
    crowd = [Users(running.url, NAME, 1000 + number) for number in range(4)]
    counts = [0] * len(crowd)

    def ask(place: int) -> None:
        while not stop.is_set():
            try:
                crowd[place].ask(f"crowd {place}")
                counts[place] += 1
            except (RuntimeError, httpx.HTTPError):
                counts[place] += 1
                found.failed += 1

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(crowd))]
    for thread in threads:
        thread.start()
    try:
        rules = 'stage.rules=["eval/preferred >= 0.6"]'
        drop = "+stage.largest_drop={eval/on_topic: 0.1}"
        loop.registry("promote", "stage.version=2", "stage.reason=better", rules, drop)
        until("the new version", lambda: _served(users) == f"{NAME}@2")
        loop.registry("rollback", "stage.reason=to show that it can be done")
        until("the old version", lambda: _served(users) == f"{NAME}@1")
        found.went_and_came = 1.0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    found.asked_under_load = sum(counts)


def _served(users: Users) -> str:
    return str(users.state()["arms"]["live"]["version"])


def checks(found: Found) -> list[Check]:
    """The bounds of a seed."""
    gained = found.after["eval/preferred"] - found.before["eval/preferred"]
    return [
        Check("preferred answers before", found.before["eval/preferred"], 0.3, 0.7),
        Check("preferred answers after, less before", gained, low=0.2),
        Check("answers on the topic before", found.before["eval/on_topic"], low=0.8),
        Check("answers on the topic after", found.after["eval/on_topic"], low=0.7),
        Check("pairs out of feedback", float(found.pairs), low=50),
        Check("the lineage names version 1", float(f"{NAME}@1" in found.ancestors), low=1),
        Check("the test decides for the new one", found.decided_for_new, low=1),
        Check("requests while the alias goes and comes", float(found.asked_under_load), low=50),
        Check("of these failed", float(found.failed), high=0),
        Check("the alias went and came", found.went_and_came, low=1),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every seed passed, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.proofs.feedback",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    options = parser.parse_args(arguments)
    passed = True
    written: dict[str, Any] = {}
    for seed in options.seeds:
        began = time.monotonic()
        runs = (options.runs / f"proof-feedback-{seed}").resolve()
        if runs.exists():
            print(f"{runs} exists: remove it, or give other --runs", file=sys.stderr)
            return 1
        try:
            found = prove(runs, seed)
        except (RuntimeError, httpx.HTTPError) as error:
            print(f"seed {seed}: {error}", file=sys.stderr)
            passed = False
            continue
        written[str(seed)] = {**vars(found), "wall_s": round(time.monotonic() - began, 1)}
        passed &= report(f"feedback, seed {seed}, {found.users} users tested", checks(found))
    (options.runs / "proof_feedback.json").write_text(json.dumps(written, indent=2) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
