"""The watch of an online run: the held-out judge, the rules, and the weights that the judge valued
most.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from conf.choices import Action, Rule
from conf.schema import RewardConfig
from conf.stages import WatchConfig
from policy.saving import replacing
from reward.model import Holder
from reward.scorers.computed import CompositeScorer, FunctionScorer
from reward.scorers.reward_model import RewardModelScorer
from rlhf.online.watch import Alarm, HeldOutScores, Watch
from rlhf.process import distributed
from rlhf.run.plots import plot_frontier
from rlhf.types import Generator, Prompt, Scorer

LOG = logging.getLogger("rlhf.online.judging")
BEST = "best"  # directory in the run's: model/, adapter/ and RECORD
RECORD = "judge.json"


@dataclass(frozen=True, slots=True)
class HeldOutJudge:
    """Scores the policy's responses to held-out prompts by the judge and by the reward that
    trains.
    """

    prompts: list[Prompt]  # this rank's share
    judge: Scorer
    proxy: Scorer  # without a state: see comparable()
    # of every judgement: the same prompts with the same random numbers, so that only the policy
    # changes
    seed: int

    def __call__(self, generator: Generator) -> HeldOutScores:
        """One response per prompt from the weights that `generator` holds; over all ranks, in the
        order of the prompts. A collective.
        """
        rollouts = generator.generate(self.prompts, n=1, seed=self.seed) if self.prompts else []
        own = HeldOutScores(
            scores=self.judge.score(rollouts).total,
            proxies=self.proxy.score(rollouts).total,
            lengths=[r.length for r in rollouts],
            truncated=[r.truncated for r in rollouts],
        )
        parts = distributed.gather(own)
        return HeldOutScores(
            scores=[score for part in parts for score in part.scores],
            proxies=[score for part in parts for score in part.proxies],
            lengths=[length for part in parts for length in part.lengths],
            truncated=[cut for part in parts for cut in part.truncated],
        )


def held_out(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first `count` different prompts. The same prompt twice would weigh double in a
    judgement's standard errors.
    """
    different: dict[str, Prompt] = {}
    for prompt in prompts:
        different.setdefault(prompt.id, prompt)
    return list(different.values())[:count]


def share_out(prompts: Sequence[Prompt], rank: int, ranks: int) -> list[Prompt]:
    """Consecutive shares whose sizes differ by at most one; an empty one where there are more ranks
    than prompts.
    """
    return list(prompts[len(prompts) * rank // ranks : len(prompts) * (rank + 1) // ranks])


def make_judge(
    watch: WatchConfig,
    reward: RewardConfig,
    tokenizer: Any,
    proxy: Scorer,
    prompts: Sequence[Prompt],
    seed: int,
    holder: Holder | None = None,
) -> HeldOutJudge | None:
    """The judge that ``stage.watch`` names, with the held-out `prompts`; None where it names none.
    `proxy` is the reward that trains; holder: how the ranks hold the judge's model together. Raises
    UserError.
    """
    if not watch.has_judge:
        return None
    prompts = held_out(prompts, watch.judge_prompts)
    if len(prompts) < watch.judge_prompts:
        LOG.warning(
            "stage.watch.judge_prompts=%d, but only %d different prompts are held out; all are "
            "used.",
            watch.judge_prompts,
            len(prompts),
        )
    mine = share_out(prompts, distributed.rank(), distributed.world_size())
    judge = _judge_scorer(watch, reward, tokenizer, holder)
    return HeldOutJudge(mine, judge, comparable(proxy), seed=seed)


def comparable(scorer: Scorer) -> Scorer:
    """The same reward, models shared, with no term normalised: running statistics move the scale
    from one judgement to the next, and held-out responses have no part in training's statistics.
    """
    if not isinstance(scorer, CompositeScorer):
        return scorer
    return CompositeScorer([replace(term, normalise=False) for term in scorer.terms])


def _judge_scorer(
    watch: WatchConfig, reward: RewardConfig, tokenizer: Any, holder: Holder | None
) -> Scorer:
    if watch.judge_function is not None:
        return FunctionScorer(watch.judge_function, "stage.watch.judge_function")
    assert watch.judge_path is not None
    return RewardModelScorer(
        watch.judge_path,
        reward,
        distributed.device(),
        policy_tokenizer=tokenizer,
        key="stage.watch.judge_path",
        holder=holder,
    )


class Keeper:
    """Keeps in one directory the weights of the highest judgement so far; of equal ones the later,
    which has the higher score.

    What lies in the directory is what is kept, also after a resume: a judgement made after the
    checkpoint was one of this run's policy too. A new best is written to the side and renamed, so
    that whole weights lie there at any time.
    """

    def __init__(self, directory: Path, save: Callable[[Path], None]) -> None:
        """`save` writes the current weights into a directory; every rank calls it."""
        self.directory = directory
        self._save = save
        best = self._read_record() if distributed.is_main() else None
        self.best: tuple[int, float] | None = distributed.broadcast(best)  # (step, judge's score)

    @property
    def _side(self) -> Path:
        return self.directory.with_name(self.directory.name + ".part")

    @property
    def _old(self) -> Path:
        return self.directory.with_name(self.directory.name + ".old")

    def _read_record(self) -> tuple[int, float] | None:
        """What an earlier start of this run kept; a swap that was cut short is undone."""
        if not self.directory.exists() and self._old.exists():
            self._old.rename(self.directory)
        if not (self.directory / RECORD).is_file():
            return None
        record = json.loads((self.directory / RECORD).read_text(encoding="utf-8"))
        return int(record["step"]), float(record["judge"])

    def consider(self, step: int, judge: float) -> bool:
        """Save the weights if `judge`, their score, is the highest so far. A collective; returns
        whether they were saved.
        """
        if self.best is not None and judge < self.best[1]:
            return False
        if distributed.is_main():
            shutil.rmtree(self._side, ignore_errors=True)
        distributed.barrier()
        self._save(self._side)
        if distributed.is_main():
            record = json.dumps({"step": step, "judge": judge}) + "\n"
            (self._side / RECORD).write_text(record, encoding="utf-8")
            shutil.rmtree(self._old, ignore_errors=True)
            if self.directory.exists():
                self.directory.rename(self._old)
            self._side.rename(self.directory)
            shutil.rmtree(self._old, ignore_errors=True)
        distributed.barrier()
        self.best = (step, judge)
        return True

    def restore(self, directory: Path) -> None:
        """Copy what is kept, without its record, into `directory`. A collective."""
        if distributed.is_main():
            for kept in self.directory.iterdir():
                if kept.is_dir():
                    with replacing(directory / kept.name) as side:
                        shutil.copytree(kept, side, dirs_exist_ok=True)
        distributed.barrier()


class Watching:
    """What the loop calls: `begin` once, `after` each step, and at the end `summary`, `figures`,
    `plot`.
    """

    def __init__(
        self, cfg: WatchConfig, last_step: int | None, judge: HeldOutJudge | None, keeper: Keeper
    ) -> None:
        """`last_step`: the updates of the whole run; the judge is asked after the last one too."""
        self.cfg = cfg
        self.last_step = last_step
        self.watch = Watch(cfg)
        self.judge, self.keeper = judge, keeper
        self.stopped: int | None = None  # updates done when a rule stopped the run
        self._stopped_by: Rule | None = None
        self.judged: dict[int, dict[str, float]] = {}  # the judge's figures by step

    def begin(self, generator: Generator) -> dict[str, float]:
        """Judge the policy before its first update; the judge's figures. A collective."""
        return self._judge(0, generator)

    def after(
        self, step: int, metrics: Mapping[str, float], generator: Generator
    ) -> dict[str, float]:
        """Update number `step` was made and the generator holds its weights. Returns the judge's
        figures and a 1 for each alarm. A collective.

        The judge is asked every ``judge_every`` steps and after the last.
        """
        alarms: list[Alarm] = []
        if "objective/scores" in metrics:  # a step that was left out has none
            alarms = self.watch.observe(step, metrics)
        out = self._report(alarms, step)
        if self.judges(step):
            out |= self._judge(step, generator)
        return out

    def judges(self, step: int) -> bool:
        """Whether the judge is asked after update number `step`."""
        due = step % self.cfg.judge_every == 0 or step == self.last_step
        return self.judge is not None and due

    def _judge(self, step: int, generator: Generator) -> dict[str, float]:
        assert self.judge is not None
        began = time.perf_counter()
        judgement = self.judge(generator)
        figures = judgement.metrics()
        self.judged[step] = figures
        self.keeper.consider(step, figures["judge/score"])
        alarms = self._report(self.watch.judged(step, judgement), step)
        return figures | alarms | {"time/judge_s": time.perf_counter() - began}

    def _report(self, alarms: Sequence[Alarm], step: int) -> dict[str, float]:
        """Warn of each alarm, and note that the run stops where its action says so."""
        for alarm in alarms:
            if distributed.is_main():
                LOG.warning(
                    "step %d, stage.watch.%s=%s: %s",
                    step,
                    alarm.rule.value,
                    alarm.action.value,
                    alarm.message,
                )
            if alarm.action is Action.stop:
                self.stopped, self._stopped_by = step, alarm.rule
        return {f"watch/{alarm.rule.value}": 1.0 for alarm in alarms}

    @property
    def keeps_best(self) -> bool:
        """Whether the run's model is what the keeper holds: a rule stopped it, and a judge told
        which weights were best.
        """
        return self.stopped is not None and self.keeper.best is not None

    def summary(self) -> dict[str, float]:
        """Figures for summary.json: where the run stopped, what was kept, and the judge's first,
        best and last figures.
        """
        out = {}
        if self.stopped is not None:
            out["watch/stopped_step"] = float(self.stopped)
        if self.keeper.best is None or not self.judged:
            return out
        step, score = self.keeper.best
        out["watch/best_step"] = float(step)
        out["judge/score_best"] = score
        last = self.judged[max(self.judged)]
        for name, value in self.judged[min(self.judged)].items():
            out[f"{name}_first"] = value
            out[name] = last[name]
        return out

    def figures(self) -> dict[str, str]:
        """Lines of the closing panel."""
        out = {}
        best = self.keeper.best
        if best is not None and self.judged:
            first = self.judged[min(self.judged)]["judge/score"]
            last = self.judged[max(self.judged)]["judge/score"]
            out["judge, first, best, last"] = (
                f"{first:.3f}, {best[1]:.3f} at step {best[0]}, {last:.3f}"
            )
        if self.stopped is not None:
            text = f"after step {self.stopped}"
            if best is not None:
                text += f"; model/ holds the weights of step {best[0]}"
            out["stopped by the watch"] = text
        return out

    def plot(self, directory: Path) -> list[Path]:
        """Draw the frontier; rank 0's work. Returns the files, none where nothing was measured."""
        path = directory / "frontier.png"
        best = None if self.keeper.best is None else self.keeper.best[0]
        drawn = plot_frontier(list(self.watch.points.values()), path, best, self.stopped)
        return [path] if drawn else []

    def state_dict(self) -> dict[str, Any]:
        stopped = None if self._stopped_by is None else [self.stopped, self._stopped_by.value]
        return {
            "watch": self.watch.state_dict(),
            "judged": [[step, figures] for step, figures in self.judged.items()],
            "stopped": stopped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.watch.load_state_dict(state["watch"])
        self.judged = {int(step): figures for step, figures in state["judged"]}
        if state["stopped"] is not None:
            step, rule = state["stopped"]
            # who resumes with another action wants the run to go on
            if getattr(self.cfg, rule) is Action.stop:
                self.stopped, self._stopped_by = step, Rule(rule)
