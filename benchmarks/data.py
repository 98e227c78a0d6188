"""What preparation costs: near duplicates of many short texts, a file larger than memory streamed
through two steps, and answers through data=clean and the report.

python -m benchmarks.data                                        all, against their bounds
python -m benchmarks.data --rows 1000 --gib 0.01 --answers 1000  small ones
python -m benchmarks.data --only answers                         one of near, stream, answers

Texts are sentences of the movie reviews. Each figure is measured in a process of its own (wall
time, peak of resident memory by the kernel's count); what has to be found was planted, so the
counts are checked, too.
"""

import argparse
import json
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import answers
from benchmarks.proofs.common import Check, report
from benchmarks.shared import environment, module, run_stage

SIZES = (10_000, 20_000, 50_000, 100_000)
GIB = 2.0
NEAR_S, NEAR_GIB = 60.0, 2.0  # bounds for the largest size
STREAM_GIB = 1.0  # bound for the file
PLANTED = 0.1  # share of the texts that are edited copies of others
SHORT = 40  # characters below which the length filter takes a row
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_TAG = re.compile(r"<[^>]*>")


def sentences() -> list[str]:
    """Different sentences of 40 to 250 characters, in the order of the reviews."""
    from rlhf.data.recipes import reviews
    from rlhf.process.libraries import package_file

    table = package_file(reviews.DISTRIBUTION, reviews.TABLE, reviews.REQUIREMENT)
    kept: dict[str, None] = {}
    for review in reviews.read_reviews(table):
        for part in _SENTENCE.split(_TAG.sub(" ", review.text)):
            text = " ".join(part.split())
            if 40 <= len(text) <= 250:
                kept[text] = None
    return list(kept)


def edited(text: str, rng: random.Random) -> str:
    """A near duplicate: a word left out, one written twice, or other punctuation at the end."""
    words = text.split()
    at = rng.randrange(len(words))
    kind = rng.randrange(3)
    if kind == 0:
        return " ".join(words[:at] + words[at + 1 :])
    return (
        " ".join([*words[:at], words[at], *words[at:]])
        if kind == 1
        else text.rstrip(".!?") + " ..."
    )


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts in random order; (copy, original) of each planted pair."""

    texts: list[str]
    planted: list[tuple[int, int]]


def corpus(pool: Sequence[str], rows: int, seed: int = 0) -> Corpus:
    """`rows` texts of which PLANTED are edited copies of others. Raises ValueError where the pool
    is too small.
    """
    rng = random.Random(seed)
    copies = int(PLANTED * rows)
    if len(pool) < rows - copies:
        raise ValueError(f"{len(pool)} sentences, expected at least {rows - copies}")
    texts = rng.sample(pool, rows - copies)
    originals = [rng.randrange(len(texts)) for _ in range(copies)]
    texts += [edited(texts[i], rng) for i in originals]
    order = list(range(rows))
    rng.shuffle(order)
    at = {old: new for new, old in enumerate(order)}
    return Corpus(
        [texts[i] for i in order],
        [(at[rows - copies + i], at[original]) for i, original in enumerate(originals)],
    )


def grams(text: str) -> set[str]:
    from rlhf.data.prepare.texts import normalised

    plain = normalised(text)
    return {plain[i : i + 5] for i in range(max(1, len(plain) - 4))}


@dataclass(frozen=True, slots=True)
class Near:
    """One measurement of near_duplicates."""

    rows: int
    seconds: float
    peak_gib: float
    kept: int
    due: int  # planted pairs with a Jaccard similarity of at least 0.8
    found: int  # of those, pairs that are in one cluster


def measure_near(rows: int, folder: Path) -> Near:
    """The step, run over items in this process: its time alone, and the process's peak with the
    texts in it.
    """
    from rlhf.data.prepare.items import Item
    from rlhf.data.prepare.near import near_clusters
    from rlhf.data.prepare.pipeline import run

    data = corpus(sentences(), rows)
    items = [
        Item({"text": text}, "reviews", number) for number, text in enumerate(data.texts, start=1)
    ]
    began = time.perf_counter()
    out = run(items, ["near_duplicates"], kind="sft", folder=folder)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    labels = near_clusters([(text, "") for text in data.texts])
    due = [pair for pair in data.planted if similar(*(grams(data.texts[i]) for i in pair)) >= 0.8]
    return Near(
        rows,
        seconds,
        peak,
        len(out.items),
        len(due),
        sum(int(labels[a] == labels[b]) for a, b in due),
    )


def similar(one: set[str], other: set[str]) -> float:
    return len(one & other) / len(one | other)


@dataclass(frozen=True, slots=True)
class Written:
    """What was written into the file, and so has to be found."""

    rows: int
    short: int
    repeated: int
    gib: float


def write_file(path: Path, gib: float, pool: Sequence[str], seed: int = 0) -> Written:
    """A JSONL file of `gib` GiB: rows of one to eight sentences, numbered so that none repeats by
    chance; 10 % repeat an earlier row in other case, 5 % are short.
    """
    rng = random.Random(seed)
    most = int(gib * 2**30)
    size = rows = short = repeated = 0
    earlier: list[str] = []  # rows to repeat, each once
    with path.open("w", encoding="utf-8") as out:
        while size < most:
            draw = rng.random()
            if draw < 0.05:
                text = f"too short {rows}"
                short += 1
            elif draw < 0.15 and earlier:
                text = earlier.pop(rng.randrange(len(earlier))).swapcase()
                repeated += 1
            else:
                text = " ".join(
                    [
                        f"{rows}:",
                        *(pool[rng.randrange(len(pool))] for _ in range(rng.randint(1, 8))),
                    ]
                )
                if len(earlier) < 5000:
                    earlier.append(text)
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            out.write(line)
            size += len(line.encode("utf-8"))
            rows += 1
    return Written(rows, short, repeated, size / 2**30)


@dataclass(frozen=True, slots=True)
class Streamed:
    """One run of stage=data over the file."""

    seconds: float
    peak_gib: float
    train: int
    rejected: dict[str, int]  # by step


def measure_stream(path: Path, folder: Path) -> Streamed:
    """stage=data in a process of its own: reading, length filter, exact de-duplication, writing."""
    pipeline = f"[{{step: length, low: {SHORT}}}, exact_duplicates]"
    command = module(
        "rlhf",
        "stage=data",
        f"data.path={path}",
        f"data.pipeline={pipeline}",
        "data.cache=false",
        "tracking=none",
    )
    run = run_stage(command, folder)
    rejected = {
        name.partition("-")[2]: int(value)
        for name, value in run.summary.items()
        if name.startswith("rejected/")
    }
    return Streamed(run.seconds, run.peak_gib, int(run.summary["data/rows_train"]), rejected)


def near_checks(results: Sequence[Near]) -> list[Check]:
    largest = results[-1]
    return [
        Check(f"near duplicates of {largest.rows} texts, s", largest.seconds, high=NEAR_S),
        Check("peak memory, GiB", largest.peak_gib, high=NEAR_GIB),
        *(
            Check(f"planted pairs found among {r.rows}, share", r.found / max(1, r.due), low=0.995)
            for r in results
        ),
    ]


def stream_checks(written: Written, streamed: Streamed) -> list[Check]:
    kept = written.rows - written.short - written.repeated
    return [
        Check("peak memory of stage=data, GiB", streamed.peak_gib, high=STREAM_GIB),
        Check(
            "short rows left out, of those written",
            streamed.rejected["length"] - written.short,
            low=0,
            high=0,
        ),
        Check(
            "repeated rows left out, of those written",
            streamed.rejected["exact_duplicates"] - written.repeated,
            low=0,
            high=0,
        ),
        Check("rows kept, of those due", streamed.train - kept, low=0, high=0),
    ]


def near_results(sizes: Sequence[int]) -> Iterator[Near]:
    """Each size in a process of its own."""
    for rows in sizes:
        done = subprocess.run(
            module("benchmarks.data", "--measure", str(rows)),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment(),
        )
        yield Near(**json.loads(done.stdout.splitlines()[-1]))


def _near(options: argparse.Namespace, folder: Path) -> list[Check]:
    sizes = [size for size in SIZES if size < options.rows] + [options.rows]
    results = []
    for near in near_results(sizes):
        results.append(near)
        print(
            f"near duplicates: {near.rows:>7} texts {near.seconds:7.1f} s "
            f"{near.peak_gib:6.2f} GiB, {near.kept} kept, "
            f"{near.found} of {near.due} planted pairs found",
            flush=True,
        )
    first, last = results[0], results[-1]
    print(
        f"growth: {last.rows / first.rows:.0f} times the texts take "
        f"{last.seconds / first.seconds:.1f} times the time"
    )
    return near_checks(results)


def _stream(options: argparse.Namespace, folder: Path) -> list[Check]:
    path = folder / "rows.jsonl"
    written = write_file(path, options.gib, sentences())
    streamed = measure_stream(path, folder / "runs")
    print(
        f"stream: {written.gib:.2f} GiB, {written.rows} rows in {streamed.seconds:.0f} s "
        f"({written.rows / streamed.seconds:.0f} rows/s), peak {streamed.peak_gib:.2f} GiB",
        flush=True,
    )
    return stream_checks(written, streamed)


def _answers(options: argparse.Namespace, folder: Path) -> list[Check]:
    results = answers.measure(options.answers, sentences(), folder)
    for line in answers.lines(options.answers, results):
        print(line, flush=True)
    return answers.checks(results)


PARTS = {"near": _near, "stream": _stream, "answers": _answers}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a bound doesn't hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=SIZES[-1], help="texts of the largest set")
    parser.add_argument("--gib", type=float, default=GIB, help="size of the file")
    parser.add_argument("--answers", type=int, default=answers.ROWS, help="rows of the largest set")
    parser.add_argument("--only", choices=PARTS, help="one part; default: all")
    parser.add_argument(
        "--dir",
        type=Path,
        help="where the files go (twice their size); default: the system's directory",
    )
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        if options.measure is not None:
            result = measure_near(options.measure, Path(folder))
            print(json.dumps({name: getattr(result, name) for name in Near.__dataclass_fields__}))
            return 0
        names = [options.only] if options.only else list(PARTS)
        checks = [check for name in names for check in PARTS[name](options, Path(folder))]
    return 0 if report("make bench-data", checks) else 1


if __name__ == "__main__":
    sys.exit(main())
