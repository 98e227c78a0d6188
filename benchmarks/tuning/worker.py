"""One way to fine-tune: `measure` runs in a process of its own, so that its peak of memory is its
own.
"""

import dataclasses
import gc
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.tuning.cases import CASES
from conf.schema import Config
from policy import adapters
from policy.batching import Batch, collate
from policy.engines.base import OptimSettings
from policy.engines.torch import make_engine
from policy.logprobs import head_of
from policy.model import PolicyModule, base_of, tending_of, trainable
from rlhf.cli import config
from rlhf.data.recipes import reviews
from rlhf.models.loading import load_causal_lm, load_tokenizer
from rlhf.models.parts import backbone_name
from rlhf.process import distributed
from rlhf.process.libraries import package_file
from rlhf.stages import methods

BATCH, SEARCHED, STEPS = 4, 3, 6  # rows a step; steps of the search, and of a run
TRAIN_ROWS, HELD_OUT, SEARCH_ROWS = 512, 32, 16  # rows; the last: held-out ones of the search
MAX_TOKENS = 40
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Row:
    """A review's sentence and whether its critic liked the film."""

    prompt: list[int]
    label: int


@dataclass(frozen=True, slots=True)
class Task:
    """Rows, and the tokens that say "negative" and "positive"."""

    train: list[Row]
    held_out: list[Row]
    words: tuple[int, int]
    pad: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run."""

    loss: float  # nats of the right word, over the held-out rows
    accuracy: float  # how often the right one of the two words is the likelier one
    step_s: float  # the median of the steps but the first
    peak_mib: float  # the most that the process held from the first step on
    trained: int
    total: int


def measure(directory: str, name: str) -> dict[str, Any]:
    """The figures of a way, of the model in `directory`, as JSON can hold them."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(2)
    methods.register()
    case = CASES[name]
    task = read_task(directory)
    cfg = config.compose(
        [
            "stage=sft",
            f"model.path={directory}",
            "model.dtype=float32",
            "stage.scheduler=constant",
            "stage.warmup_ratio=0",
            f"stage.learning_rate={case.rates[0]}",  # each run has its own
            *case.overrides,
        ]
    )
    start = None
    if name == "full":  # the untrained model, which is every way's start
        start = dataclasses.asdict(Run(cfg, task, seed=0).evaluate(0.0))
    trainer = Trainer(cfg, task, one_start=case.one_start)
    searched = [trainer.train(rate, SEEDS[0], SEARCHED, SEARCH_ROWS).loss for rate in case.rates]
    rate = case.rates[searched.index(min(searched))]
    runs = [trainer.train(rate, seed, STEPS, HELD_OUT) for seed in SEEDS]
    return {
        "name": name,
        "rate": rate,
        "searched": dict(zip(map(str, case.rates), searched, strict=True)),
        "start": start,
        "runs": [dataclasses.asdict(run) for run in runs],
    }


def read_task(directory: str) -> Task:
    """Rotten Tomatoes sentences, the same for every method."""
    tokenizer = load_tokenizer(config.compose(["stage=sft", f"model.path={directory}"]).model)
    rng = random.Random("tuning")
    table = package_file(reviews.DISTRIBUTION, reviews.TABLE, reviews.REQUIREMENT)
    sentences = []
    for review in reviews.read_reviews(table):
        if review.source == "rotten_tomatoes":
            sentences += list(reviews.verdict_sentences(review))
    rng.shuffle(sentences)
    rows = []
    for sentence in sentences:
        ids = tokenizer(f"Review: {sentence.text}\nSentiment:")["input_ids"]
        if len(ids) <= MAX_TOKENS:
            rows.append(Row(ids, sentence.label))
    words = tuple(tokenizer(f" {word}")["input_ids"][0] for word in ("negative", "positive"))
    train = rows[HELD_OUT : HELD_OUT + TRAIN_ROWS]
    return Task(train, rows[:HELD_OUT], words, tokenizer.pad_token_id)


class Trainer:
    """Trains from the start again and again."""

    def __init__(self, cfg: Config, task: Task, *, one_start: bool) -> None:
        """one_start: whatever the seed, so that it is found once: what trains is put back."""
        self.cfg, self.task, self.one_start = cfg, task, one_start
        # what a method finds in the rows is the same for every seed
        self.folder = tempfile.TemporaryDirectory()
        self.kept: Run | None = None
        self.start: dict[str, torch.Tensor] = {}

    def train(self, rate: float, seed: int, steps: int, held_out: int) -> Figures:
        """Figures of `steps` steps at a learning rate, over so many held-out rows."""
        run = self._fresh(seed)
        seconds = run.train(rate, steps)
        run.task = dataclasses.replace(self.task, held_out=self.task.held_out[:held_out])
        figures = run.evaluate(statistics.median(seconds[1:]))
        del run
        gc.collect()
        return figures

    def _fresh(self, seed: int) -> "Run":
        record = Path(self.folder.name) / "found.json"
        if not self.one_start:
            return Run(self.cfg, self.task, seed=seed, record=record)
        if self.kept is None:
            self.kept = Run(self.cfg, self.task, seed=seed, record=record)
            named = self.kept.model.named_parameters()
            self.start = {name: p.detach().clone() for name, p in named if p.requires_grad}
        for name, parameter in self.kept.model.named_parameters():
            if name in self.start:
                parameter.data.copy_(self.start[name])
                parameter.grad = None
        self.kept.seed = seed
        gc.collect()
        forget_peak()
        return self.kept


class Run:
    """A fresh model with what trains of it."""

    def __init__(self, cfg: Config, task: Task, *, seed: int, record: Path | None = None) -> None:
        """record: as of `adapters.attach`."""
        self.cfg, self.task, self.seed = cfg, task, seed
        torch.manual_seed(seed)
        tokenizer = load_tokenizer(cfg.model)
        model = load_causal_lm(cfg.model, tokenizer)
        # before some weights are held rounded, which are no parameters
        self.total = sum(p.numel() for p in model.parameters())
        sample = [row.prompt for row in task.train[: cfg.adapter.sample_rows]]
        self.model = adapters.attach(
            model,
            cfg.adapter,
            task="CAUSAL_LM",
            sample=lambda: sample,
            train=cfg.stage.train,
            tokenizer=tokenizer,
            record=record,
        )
        self.module = PolicyModule(self.model, chunk=256)
        self.module.entropy_grad = False
        forget_peak()

    def train(self, rate: float, steps: int) -> list[float]:
        """Seconds of each step."""
        optim = OptimSettings.from_stage(self.cfg.stage, total_steps=steps, learning_rate=rate)
        rates = adapters.rates_of(self.model, self.cfg.stage, self.cfg.adapter)
        device = distributed.device()
        engine = make_engine(self.module, self.cfg.engine, optim, device, half=False, rates=rates)
        self.module.train()
        rng = random.Random(self.seed)
        tending = tending_of(self.model)
        seconds = []
        for _ in range(steps):
            tending.clear()
            rows = rng.sample(self.task.train, BATCH)
            began = time.perf_counter()
            logprobs, _ = engine(*arguments(rows, self.task))
            loss = -logprobs.sum() / len(rows) + tending.penalty()
            engine.backward(loss, last=True)
            engine.step()
            seconds.append(time.perf_counter() - began)
        return seconds

    @torch.no_grad()
    def evaluate(self, step_s: float) -> Figures:
        """The held-out figures."""
        peak = peak_mib()
        self.module.eval()
        lm = base_of(self.model)
        head = head_of(lm, plain=self.module.plain_head)
        losses, right = [], 0
        for start in range(0, len(self.task.held_out), 16):
            rows = self.task.held_out[start : start + 16]
            batch = collate_rows(rows, self.task)
            backbone = getattr(lm, backbone_name(lm))
            hidden = backbone(input_ids=batch.input_ids, use_cache=False).last_hidden_state
            last = torch.tensor([len(row.prompt) - 1 for row in rows])
            logprobs = head(hidden[torch.arange(len(rows)), last]).float().log_softmax(-1)
            words = logprobs[:, list(self.task.words)]
            labels = torch.tensor([row.label for row in rows])
            losses += (-words[torch.arange(len(rows)), labels]).tolist()
            right += int((words.argmax(dim=1) == labels).sum())
        return Figures(
            loss=statistics.fmean(losses),
            accuracy=right / len(self.task.held_out),
            step_s=step_s,
            peak_mib=peak,
            trained=sum(p.numel() for p in trainable(self.model)),
            total=self.total,
        )


def collate_rows(rows: Sequence[Row], task: Task) -> Batch:
    """Prompts with the right word as the response."""
    responses = [[task.words[row.label]] for row in rows]
    return collate([row.prompt for row in rows], responses, task.pad, distributed.device())


def arguments(rows: Sequence[Row], task: Task) -> tuple[Any, ...]:
    """Of `PolicyModule`."""
    batch = collate_rows(rows, task)
    return batch.input_ids, batch.positions, batch.response_ids, batch.response_mask


def forget_peak() -> None:
    """Let the process's peak of resident memory begin anew (Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib() -> float:
    """The most that was resident since then."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
