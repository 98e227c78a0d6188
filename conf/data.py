"""The group ``data``: where rows come from, how they are read, and what stage=data writes; and the
group ``migrate``: which file of another toolkit is read.
"""

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from conf.choices import DataKind, FileKind, Recipe, TaskClass
from conf.options import MISSING, check, check_options, nested, option


class DataFormat(Enum):
    """Formats of data files; which of them a stage reads is in rlhf/data/formats/."""

    auto = "auto"
    text = "text"
    prompt = "prompt"
    prompt_completion = "prompt_completion"
    messages = "messages"
    alpaca = "alpaca"
    sharegpt = "sharegpt"
    preference = "preference"
    implicit_preference = "implicit_preference"
    ultrafeedback = "ultrafeedback"
    hh_rlhf = "hh_rlhf"
    hh_rlhf_messages = "hh_rlhf_messages"  # the same file, its transcripts as turns
    alpaca_preference = "alpaca_preference"
    sharegpt_preference = "sharegpt_preference"
    swift_preference = "swift_preference"
    rejected_messages = "rejected_messages"
    chosen_messages = "chosen_messages"
    openai_preference = "openai_preference"
    xlam = "xlam"
    unpaired = "unpaired"
    sharegpt_unpaired = "sharegpt_unpaired"
    messages_unpaired = "messages_unpaired"
    alpaca_unpaired = "alpaca_unpaired"
    shp = "shp"
    nectar = "nectar"
    alpaca_eval = "alpaca_eval"
    alpaca_eval_annotation = "alpaca_eval_annotation"
    mt_bench_answer = "mt_bench_answer"
    mt_bench_judgment = "mt_bench_judgment"
    rewardbench = "rewardbench"
    label_studio = "label_studio"
    label_studio_ranker = "label_studio_ranker"
    argilla = "argilla"
    label_sheet = "label_sheet"
    arena = "arena"
    question = "question"
    question_answer = "question_answer"
    question_judged = "question_judged"
    question_preference = "question_preference"
    compared = "compared"
    rated = "rated"
    summaries = "summaries"
    dialogue = "dialogue"
    message_tree = "message_tree"
    verifiable = "verifiable"


class DataTarget(Enum):
    """Formats that stage=data writes (rlhf/data/targets.py)."""

    trl = "trl"  # the columns that every stage reads, whatever the kind
    kto = "kto"  # TRL's unpaired columns; a pair becomes two rows
    messages = "messages"  # OpenAI's; pairs in ms-swift's way (rejected_response)
    sharegpt = "sharegpt"  # with LLaMA-Factory's chosen and rejected, or kto_tag
    alpaca = "alpaca"  # with LLaMA-Factory's chosen and rejected, or kto_tag
    hh_rlhf = "hh_rlhf"
    ultrafeedback = "ultrafeedback"
    shp = "shp"
    nectar = "nectar"
    rewardbench = "rewardbench"
    alpaca_eval = "alpaca_eval"  # outputs, or annotations for pairs
    label_studio = "label_studio"
    label_studio_ranker = "label_studio_ranker"
    argilla = "argilla"
    csv = "csv"  # a label sheet for pairs, else TRL's columns, in a CSV file
    xlsx = "xlsx"  # the same in an Excel file


@dataclass(slots=True, kw_only=True)
class GymConfig:
    """``data.recipe=gym``: procedural tasks of reasoning-gym with their verifiers
    (rlhf/data/recipes/gym.py).
    """

    tasks: list[str] = option(
        ["chain_sum"], "Tasks by reasoning-gym's names; each gets the same number of rows."
    )
    rows: int = option(1024, "Training prompts of all tasks together.", unit="rows")
    eval_rows: int = option(128, "Held-out prompts.", unit="rows", at_least=1)
    seed: int | None = option(None, "Seed of the tasks; null: run.seed.")
    options: dict[str, Any] = option(
        {}, "By task, its own options, such as {chain_sum: {max_terms: 3}}."
    )
    suffix: str = option("", "Text after each question, such as how to write the answer.")
    chat: bool = option(False, "Prompts are messages, for a policy with a chat template.")
    system: str | None = option(None, "System message; needs chat=true; null: no system message.")

    def __post_init__(self) -> None:
        check_options(self, "data.gym")
        check(
            len(self.tasks) > 0 and len(set(self.tasks)) == len(self.tasks),
            "data.gym.tasks",
            self.tasks,
            "at least one task, each once",
        )
        check(
            self.rows >= len(self.tasks),
            "data.gym.rows",
            self.rows,
            f"at least one for each of {len(self.tasks)} tasks",
        )
        check(
            set(self.options) <= set(self.tasks),
            "data.gym.options",
            sorted(self.options),
            f"options of the tasks {', '.join(self.tasks)}",
        )
        check(
            all(isinstance(values, dict) for values in self.options.values()),
            "data.gym.options",
            self.options,
            "a dictionary for each task",
        )
        check(
            self.chat or self.system is None,
            "data.gym.system",
            self.system,
            "null without data.gym.chat=true",
        )


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    """One source of a mixture; its options mean what those of the group ``data`` mean."""

    path: str = option(MISSING, "Rows of this source, written as data.path is.")
    weight: float | None = option(
        None,
        "Share of the mixture, relative to the other sources; null for all sources: every row of "
        "each.",
        above=0,
    )
    cap: int | None = option(
        None,
        "Take at most so many rows, drawn by run.seed; null: all.",
        unit="rows",
        at_least=1,
    )
    format: DataFormat = option(DataFormat.auto, "Format of the rows; auto: by their columns.")
    columns: dict[str, Any] = option({}, "A format's column: the column of this source.")
    subset: str | None = option(None, "Configuration of a hub's data set.")
    split: str | None = option(
        None, "Split of a data set that has several; null: train, or the only one."
    )

    def check(self, key: str) -> None:
        """Check ranges; `key` is the source's dotted name, which it doesn't know by itself."""
        check_options(self, key)
        _check_columns(f"{key}.columns", self.columns)


def _check_columns(key: str, columns: dict[str, Any]) -> None:
    named = all(isinstance(name, str) and name for name in columns.values())
    check(
        named and len(set(columns.values())) == len(columns),
        key,
        columns,
        "a different column's name for each",
    )


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Where rows come from and how they are read. ``recipe`` builds them from a package's own data
    in ``<run.dir>/<run.name>/recipe``.
    """

    path: str | None = option(
        None,
        "Rows: a JSON, JSONL, CSV, TXT, Parquet or XLSX file, a glob, a datasets directory or a "
        "hub name; #500 at its end draws 500 rows.",
        section="where rows come from",
    )
    sources: dict[str, SourceConfig] = option({}, "A mixture of sources by name; replaces path.")
    registry: str | None = option(None, "LLaMA-Factory's dataset_info.json, or its directory.")
    dataset: str | None = option(
        None, 'Entries of the registry to read: NAME or "NAME,NAME"; replaces path.'
    )
    eval_path: str | None = option(
        None, "Held-out rows; null: eval_fraction of data.path is held out."
    )
    format: DataFormat = option(
        DataFormat.auto, "Format of the rows; auto: detected by their columns, and logged."
    )
    columns: dict[str, Any] = option(
        {}, "A format's column: the file's column; renamed before the format is detected."
    )
    subset: str | None = option(None, "Configuration of a hub's data set.")
    split: str | None = option(
        None, "Split of a data set that has several; null: train, or the only one."
    )
    join: list[str] = option(
        [], "MT-Bench: files of questions and answers whose texts the rows refer to."
    )
    recipe: Recipe = option(
        Recipe.none, "Build the rows from a package's own data.", section="recipes"
    )
    gym: GymConfig = nested(GymConfig)
    eval_fraction: float = option(
        0.1,
        "Share of data.path that is held out where there is no eval_path; 0: none, so that the "
        "last weights are the model, and nothing is evaluated while it trains.",
        at_least=0,
        below=1,
        section="how rows are read",
    )
    max_rows: int | None = option(
        None, "Read the first rows only; null: all.", unit="rows", at_least=1
    )
    max_bad_rows: int = option(
        0, "Rows that may be unreadable before the run stops.", unit="rows", at_least=0
    )
    image_dir: str | None = option(
        None,
        "Folder of the pictures that rows name; null: that of the data file. No row may name one "
        "outside of it.",
        filled=True,
    )
    max_image_pixels: int = option(
        89_478_485,
        "Most pixels of a picture; one with more, which may be a decompression bomb, is an error.",
        unit="pixels",
        at_least=1,
        at_most=178_956_970,
    )
    weight_column: str | None = option(
        "weight",
        "Column that weighs a row in the loss, where the rows have it; null: no weights.",
    )
    chat_template: str | None = option(
        None,
        "A Jinja file or a name (chatml, llama-3 ...: rlhf/models/templates); null: the "
        "tokenizer's own.",
    )
    system: str | None = option(
        None,
        "System message of conversations that have none; null: they stay as they are.",
        filled=True,
    )
    max_prompt_length: int = option(
        1024,
        "Longest prompt; longer ones are an error unless truncate_prompts=true.",
        unit="tokens",
        at_least=1,
    )
    truncate_prompts: bool = option(
        False, "Keep the last max_prompt_length tokens of longer prompts."
    )
    kind: DataKind = option(
        DataKind.auto,
        "What the rows become; auto: what the detected format is.",
        section="stage=data",
    )
    pipeline: list[Any] = option(
        [],
        "Preparation steps in order: a name, or {step: NAME, option: value ...} "
        "(conf/preparation).",
    )
    to: DataTarget = option(DataTarget.trl, "Format that it writes.")
    file: FileKind | None = option(
        None, "Kind of file that it writes; null: csv or xlsx as `to` says, else jsonl."
    )
    preview: int = option(0, "Rows whose tokens are shown in colour.", unit="rows", at_least=0)
    cache: bool = option(
        True,
        "Keep what was computed from rows: rows as token ids, in cache_dir; each step's rows of "
        "stage=data, in the run directory, so that run.resume=true continues after the last step "
        "that is still valid.",
    )
    cache_dir: str | None = option(
        None,
        "Folder of the rows as token ids; may be removed between runs; null: .encoded in run.dir.",
    )
    report: bool = option(
        False, "Examine the prepared rows: report.json and report.html in the run directory."
    )
    report_limit: int = option(
        2048,
        "Tokens from which the report counts a row as truncated: the stage.max_length that will "
        "train on it.",
        unit="tokens",
        at_least=2,
    )
    report_rows: int = option(
        100, "Rows that a finding of the report lists.", unit="rows", at_least=1
    )
    task: TaskClass | None = option(
        None,
        "What the rows are to teach; the report then checks that there are enough; null: no check.",
    )

    def __post_init__(self) -> None:
        check_options(self, "data")
        _check_columns("data.columns", self.columns)
        self._check_sources()
        given = [key for key in ("path", "sources", "dataset") if getattr(self, key)]
        check(len(given) <= 1, "data", given, "one of path, sources and dataset")
        check(
            (self.dataset is None) == (self.registry is None),
            "data.dataset",
            self.dataset,
            "set where data.registry is, and only there",
        )

    @property
    def holds_out(self) -> bool:
        """Whether some rows are held out from training."""
        return self.eval_path is not None or self.eval_fraction > 0

    def _check_sources(self) -> None:
        for name, source in self.sources.items():
            source.check(f"data.sources.{name}")
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        check(
            len(weighted) in (0, len(self.sources)),
            "data.sources",
            weighted,
            "a weight for every source or for none",
        )


@dataclass(slots=True, kw_only=True)
class MigrateConfig:
    """Which file of another toolkit ``stage=migrate`` reads, and what the file doesn't say."""

    path: str | None = option(
        None, "A YAML or JSON file, or a script with a command line.", filled=True
    )
    toolkit: str | None = option(
        None,
        "Whose file it is; null: by its keys or its command.",
        choices=("llama_factory", "swift", "axolotl", "trl", "openrlhf"),
    )
    number: int | None = option(
        None,
        "Which command of a script with several, counted from 1; null: the only one.",
        at_least=1,
    )
    stage: str | None = option(
        None, "The stage that it is for; null: as the file says.", filled=True
    )
    ranks: int | None = option(
        None,
        "Ranks that trained; null: as the launcher or the devices in the file say, else 1.",
        unit="ranks",
        at_least=1,
    )
    rows: int | None = option(
        None,
        "Rows of the training data, for what counts in epochs there and in steps here; null: such "
        "keys are not possible.",
        unit="rows",
        at_least=1,
    )
    name: str | None = option(None, "Name of the experiment; null: the file's.", filled=True)
    out: str | None = option(
        None,
        "Folder that gets experiment/NAME.yaml and NAME.md; null: migrated in run.dir.",
        filled=True,
    )

    def __post_init__(self) -> None:
        check_options(self, "migrate")
        named = self.name is None or re.fullmatch(r"[\w-]+", self.name) is not None
        check(named, "migrate.name", self.name, "letters, digits, _ and -")


@dataclass(slots=True, kw_only=True)
class MigrateStage:
    """Another toolkit's configuration as an experiment; its options are the migrate group's."""

    name: str = option("migrate", "Name of the preset; stage=NAME sets it.")
