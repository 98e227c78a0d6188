"""Options of ``stage=label``: the group ``label``, on the conventions of conf/schema.py."""

import math
from dataclasses import dataclass, field
from typing import Any

from conf.checks import check
from conf.choices import (
    ChoiceMethod,
    LabelAggregate,
    LabelKind,
    LabelMode,
    LabelTarget,
    Strength,
    TextVectors,
)


@dataclass(slots=True, kw_only=True)
class ABConfig:
    """A blind comparison of two policies by labels: planned at the export, decided at the import by
    the rule that was stated.
    """

    enabled: bool = False  # pairs are made of one answer of each of the two policies only
    # smallest distance of the win rate from 1/2 that is to be found: 0.1 is 60 % against 40 %
    effect: float = 0.1
    alpha: float = 0.05  # error rate of the sequential test, however often it looks
    power: float = 0.8  # probability of finding `effect`
    ties: float = 0.2  # share of ties that the plan expects

    def __post_init__(self) -> None:
        check(0 < self.effect < 0.5, "label.ab.effect", self.effect, "in (0, 0.5)")
        check(0 < self.alpha < 0.5, "label.ab.alpha", self.alpha, "in (0, 0.5)")
        check(0.5 <= self.power < 1, "label.ab.power", self.power, "in [0.5, 1)")
        check(0 <= self.ties < 1, "label.ab.ties", self.ties, "in [0, 1)")


@dataclass(slots=True, kw_only=True)
class LabelConfig:
    """Tasks out to people (``mode=export``), their labels back (``mode=import``)."""

    mode: LabelMode = LabelMode.export
    # -- export: where answers come from (one of policies, samples and review; without any,
    # model.path is the policy)
    # model directories by name; names never reach the annotators
    policies: dict[str, Any] = field(default_factory=dict)
    samples: list[str] = field(default_factory=list)  # samples.jsonl files that runs wrote
    # review.jsonl of an import: what annotators disagreed on goes out again
    review: str | None = None
    prompts: int | None = None  # the first so many of data.path; None: all
    responses: int = 4  # per prompt and policy
    # -- export: what a person's time goes to
    kind: LabelKind = LabelKind.pair
    group: int = 4  # answers in a ranking
    budget: int = 200  # tasks, gold and repeated ones not counted
    # share of the budget by method: {uncertainty: 0.7, random: 0.3}; empty: random
    choice: dict[str, Any] = field(default_factory=dict)
    vectors: TextVectors = TextVectors.tfidf  # of prompts, for clusters
    gold_path: str | None = None  # preference rows whose answer is known
    gold_share: float = 0.1  # gold tasks, as a share of the budget; only with gold_path
    # tasks that are shown twice, sides drawn anew, as a share of the budget
    repeat_share: float = 0.0
    # -- export: what annotators see
    targets: list[LabelTarget] = field(default_factory=lambda: [LabelTarget.page])
    title: str = "Which answer is better?"
    instructions: str = ""  # a text, or a .md or .txt file
    ratings: bool = False  # a rating from 1 to 5 of each side as well
    comments: bool = True  # a field for a comment
    # the reward model's preference as a suggestion, where a tool can show one
    prelabel: bool = False
    overlap: int = 1  # annotators wanted for each task
    # -- a Label Studio server
    push: bool = False  # create a project and import the tasks
    pull: bool = False  # fetch the project's labels
    # of the server; None with label.pull: the one that the export was pushed to
    url: str | None = None
    project: int | None = None  # its number; None: the one that the export created
    token_env: str = "LABEL_STUDIO_API_KEY"  # environment variable that holds an access token
    # -- import
    export: str | None = None  # the export's run directory; None: that of the same run.name
    # what came back, in any of the formats; a pattern takes every file that fits
    files: list[str] = field(default_factory=list)
    # who made the labels of files that do not say; None: such a row is refused
    annotator: str | None = None
    aggregate: LabelAggregate = LabelAggregate.majority
    min_labels: int = 1  # labels that a task needs
    min_confidence: float = 0.0  # verdicts below it go to the review queue
    # labels of annotators below it on gold tasks don't count
    min_gold_accuracy: float | None = None
    strength: Strength = Strength.none
    eval_fraction: float = 0.1  # of the prompts, held out
    ab: ABConfig = field(default_factory=ABConfig)

    def __post_init__(self) -> None:
        given = [key for key in ("policies", "samples", "review") if getattr(self, key)]
        check(len(given) <= 1, "label", given, "one of policies, samples and review")
        check(
            all(isinstance(path, str) and path for path in self.policies.values()),
            "label.policies",
            self.policies,
            "a model directory for each name",
        )
        check(
            not self.ab.enabled or len(self.policies) in (0, 2),
            "label.ab.enabled",
            sorted(self.policies),
            "two policies",
        )
        check(
            not self.ab.enabled or self.kind is LabelKind.pair,
            "label.kind",
            self.kind.value,
            "pair with label.ab.enabled=true",
        )
        check(
            self.prompts is None or self.prompts >= 1, "label.prompts", self.prompts, "at least 1"
        )
        check(self.responses >= 1, "label.responses", self.responses, "at least 1")
        check(self.group >= 2, "label.group", self.group, "at least 2 answers")
        check(self.budget >= 1, "label.budget", self.budget, "at least 1 task")
        self._check_choice()
        check(0 <= self.gold_share <= 1, "label.gold_share", self.gold_share, "in [0, 1]")
        check(0 <= self.repeat_share <= 1, "label.repeat_share", self.repeat_share, "in [0, 1]")
        check(
            len(self.targets) > 0 and len(set(self.targets)) == len(self.targets),
            "label.targets",
            [t.value for t in self.targets],
            "each once",
        )
        check(bool(self.title.strip()), "label.title", self.title, "a title")
        check(self.overlap >= 1, "label.overlap", self.overlap, "at least 1 annotator")
        check(
            not self.push or bool(self.url),
            "label.url",
            self.url,
            "the server's address with label.push",
        )
        check(
            not self.push or self.mode is LabelMode.export,
            "label.push",
            self.push,
            "false with label.mode=import",
        )
        check(
            not self.pull or self.mode is LabelMode["import"],
            "label.pull",
            self.pull,
            "false with label.mode=export",
        )
        check(
            bool(self.token_env),
            "label.token_env",
            self.token_env,
            "the name of an environment variable",
        )
        check(
            self.project is None or self.project >= 1,
            "label.project",
            self.project,
            "the number of a project, at least 1",
        )
        check(self.min_labels >= 1, "label.min_labels", self.min_labels, "at least 1")
        check(
            0 <= self.min_confidence <= 1, "label.min_confidence", self.min_confidence, "in [0, 1]"
        )
        gold = self.min_gold_accuracy
        check(gold is None or 0 <= gold <= 1, "label.min_gold_accuracy", gold, "in [0, 1]")
        check(0 <= self.eval_fraction < 1, "label.eval_fraction", self.eval_fraction, "in [0, 1)")

    def _check_choice(self) -> None:
        names = [method.value for method in ChoiceMethod]
        check(
            set(self.choice) <= set(names),
            "label.choice",
            sorted(self.choice),
            f"shares of {', '.join(names)}",
        )
        shares = list(self.choice.values())
        numbers = all(
            isinstance(share, (int, float)) and not isinstance(share, bool) and share >= 0
            for share in shares
        )
        check(
            numbers and (not shares or math.isclose(sum(shares), 1.0, abs_tol=1e-6)),
            "label.choice",
            self.choice,
            "shares that add up to 1",
        )
