"""Rows as token ids: rows a second and peak memory of encoding conversations (stage=sft), pairs
(stage=reward) and prompts (stage=online), beside datasets.map of the same template with a process
for each core.

python -m benchmarks.encoding                20,000 rows of each, of some 500 tokens
python -m benchmarks.encoding --rows 2000    small files

Each figure is measured in a process of its own. Memory is the kernel's peak of that process, with
its rows read, and that of the largest process it started; what those share counts in both. CPU time
is that of all its processes. Prompts are held in memory while a policy is trained on them.
"""

import argparse
import functools
import itertools
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.proofs.common import Check, report
from benchmarks.shared import environment, module, write_rows

ROWS = 20_000
# bytes of peak memory for each further row beyond those that are held in memory: rows and tokens
# are on disk, their places in memory; a prompt is held with its text and tokens
ROW_BYTES = {"sft": 1_500, "pairs": 1_500, "prompts": 12_000}
KINDS = tuple(ROW_BYTES)
_TRAIN, _HELD = "train.jsonl", "held.jsonl"
_VOCABULARY = 20_000  # different words, the n-th as often as 1 / (n + 2.7), as in English
_MAX_LENGTH = 4096
_FEW = 100  # rows whose tokens are counted


@functools.cache
def vocabulary() -> tuple[list[str], list[float]]:
    """Made-up words of one to four syllables, and their weights up to each."""
    rng = random.Random(3)
    syllables = [f"{first}{vowel}" for first in "bcdfghjklmnprstvwz" for vowel in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < _VOCABULARY:
        words["".join(rng.choices(syllables, k=rng.choice((1, 2, 2, 3, 3, 4))))] = None
    weights = (1 / (number + 2.7) for number in range(1, _VOCABULARY + 1))
    return list(words), list(itertools.accumulate(weights))


def sentence(rng: random.Random, words: int) -> str:
    """Words with a comma behind every twelfth on average."""
    known, weights = vocabulary()
    said = rng.choices(known, cum_weights=weights, k=words)
    return " ".join(word + "," * (rng.random() < 1 / 12) for word in said) + "."


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """Three questions and answers, of some 570 tokens."""
    turns = []
    for _ in range(3):
        turns.append({"role": "user", "content": sentence(rng, rng.randint(15, 35))})
        turns.append({"role": "assistant", "content": sentence(rng, rng.randint(50, 110))})
    return turns


def rows_of(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    if kind == "sft":
        return [{"messages": conversation(rng)} for _ in range(count)]
    if kind == "prompts":
        return [{"prompt": conversation(rng)[:-1]} for _ in range(count)]
    rows = []
    for _ in range(count):
        chosen = conversation(rng)
        other = {"role": "assistant", "content": sentence(rng, rng.randint(50, 110))}
        rows.append({"chosen": chosen, "rejected": [*chosen[:-1], other]})
    return rows


def prepare(folder: Path, kind: str, count: int) -> None:
    """Files of rows, and the tokenizer."""
    from rlhf.models.loading import train_tokenizer
    from rlhf.models.templates import template_text

    write_rows(folder / _TRAIN, rows_of(kind, count, 0))
    write_rows(folder / _HELD, rows_of(kind, 8, 1))
    rng = random.Random(2)
    tokenizer = train_tokenizer([sentence(rng, 50) for _ in range(2000)], 8000, _MAX_LENGTH)
    tokenizer.chat_template = template_text("chatml")
    tokenizer.save_pretrained(folder / "tokenizer")


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement."""

    rows: int
    tokens: float  # a row
    read_s: float
    encode_s: float
    cpu_s: float  # of encoding
    again_s: float | None  # the second time
    peak_gib: float  # of the process
    child_gib: float  # of its largest child


def peak_gib() -> float:
    """The largest resident memory that this program has had."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("/proc/self/status has no VmHWM")


def cpu_s() -> float:
    """CPU time of this process and of those that it started and that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def request_for(folder: Path, kind: str) -> Any:
    """The rows in `folder`, for the stage that reads them."""
    from conf.online import OnlineStage
    from conf.schema import Config, DataConfig, RunConfig
    from conf.stages import RewardStage, SFTStage
    from rlhf.data.loading import DataRequest

    options: dict[str, Any] = {"max_length": _MAX_LENGTH}
    stage: Any = OnlineStage()
    if kind == "sft":
        stage = SFTStage(**options)
    elif kind == "pairs":
        stage = RewardStage(**options)
    data = DataConfig(
        path=str(folder / _TRAIN),
        eval_path=str(folder / _HELD),
        max_prompt_length=_MAX_LENGTH,
    )
    return DataRequest.of(Config(stage=stage, data=data, run=RunConfig(dir=str(folder))))


def measure_ours(folder: Path, kind: str) -> Measured:
    """What the stage does between reading its files and its first batch."""
    from transformers import AutoTokenizer

    from rlhf.data import reading
    from rlhf.data.formats import Use
    from rlhf.stages import rows as stage_rows

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    request = request_for(folder, kind)

    def read() -> Any:
        if kind == "sft":
            return reading.sft_records(request)
        if kind == "pairs":
            return reading.preference_records(request)
        return reading.load(request, reading.required_sources(request), Use.prompt)

    def encode() -> list[int]:
        """Tokens of the first rows."""
        if kind != "prompts":
            rows = stage_rows.encoded_rows(request, tokenizer, micro=1).train
            return lengths(rows, rows.column_names[0])
        return [len(prompt.token_ids) for prompt in reading.prompts(request, tokenizer)[:_FEW]]

    began, cpu_began = time.perf_counter(), cpu_s()
    read()
    read_s, read_cpu_s = time.perf_counter() - began, cpu_s() - cpu_began
    seconds, spent = [], []
    for _ in range(2):
        began, cpu_began = time.perf_counter(), cpu_s()
        tokens = encode()
        seconds.append(time.perf_counter() - began - read_s)
        spent.append(cpu_s() - cpu_began - read_cpu_s)
    return _measured(folder, tokens, read_s, seconds, spent)


def lengths(rows: Any, column: str) -> list[int]:
    """Tokens of the first rows."""
    return [len(row[column]) for row in rows.select(range(min(_FEW, len(rows))))]


def measure_map(folder: Path, kind: str, processes: int) -> Measured:
    """datasets.map: each conversation once through the template, with the mask of its answers."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def encode(messages: list[dict[str, str]], **options: bool) -> Any:
        return tokenizer.apply_chat_template(messages, return_dict=True, **options)

    def columns(row: dict[str, Any]) -> dict[str, Any]:
        if kind == "sft":
            out = encode(row["messages"], return_assistant_tokens_mask=True)
            return {"input_ids": out["input_ids"], "mask": out["assistant_masks"]}
        if kind == "prompts":
            return {"ids": encode(row["prompt"], add_generation_prompt=True)["input_ids"]}
        return {f"{side}_ids": encode(row[side])["input_ids"] for side in ("chosen", "rejected")}

    began = time.perf_counter()
    rows = datasets.load_dataset(
        "json", data_files=str(folder / _TRAIN), cache_dir=str(folder / "cache"), split="train"
    )
    read_s = time.perf_counter() - began
    began, cpu_began = time.perf_counter(), cpu_s()
    rows = rows.map(columns, num_proc=processes, remove_columns=rows.column_names)
    seconds, spent = [time.perf_counter() - began], [cpu_s() - cpu_began]
    return _measured(folder, lengths(rows, rows.column_names[0]), read_s, seconds, spent)


def _measured(
    folder: Path,
    tokens: list[int],
    read_s: float,
    seconds: Sequence[float],
    spent: Sequence[float],
) -> Measured:
    with (folder / _TRAIN).open("rb") as file:
        count = sum(1 for _ in file)
    again_s = seconds[1] if len(seconds) > 1 else None
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    mean = sum(tokens) / len(tokens)
    return Measured(count, mean, read_s, seconds[0], spent[0], again_s, peak_gib(), child)


def measured(what: str, kind: str, count: int, folder: Path | None) -> Measured:
    """One measurement in a process of its own, on files of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        prepare(Path(place), kind, count)
        done = subprocess.run(
            module("benchmarks.encoding", "--measure", what, "--kind", kind, "--dir", place),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment(),
        )
    result = Measured(**json.loads(done.stdout.splitlines()[-1]))
    again = "" if result.again_s is None else f", again {result.again_s:5.2f} s"
    print(
        f"{kind:7} {what:4} {result.rows:>6} rows of {result.tokens:.0f} tokens: "
        f"{result.rows / result.encode_s:6.0f} rows/s ({result.encode_s:.1f} s{again}), "
        f"{result.cpu_s / result.rows * 1000:.2f} ms of CPU a row, reading "
        f"{result.read_s:.1f} s, peak {result.peak_gib:.2f} GiB, child {result.child_gib:.2f} GiB",
        flush=True,
    )
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 where a bound doesn't hold."""
    from rlhf.process import distributed

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of each kind")
    parser.add_argument("--dir", type=Path, help="where files go; default: the temporary directory")
    parser.add_argument("--measure", choices=("ours", "map"), help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    processes = distributed.cores()
    if options.measure == "ours":
        print(json.dumps(asdict(measure_ours(options.dir, options.kind))))
        return 0
    if options.measure == "map":
        print(json.dumps(asdict(measure_map(options.dir, options.kind, processes))))
        return 0
    checks = []
    for kind in KINDS:
        peer = measured("map", kind, options.rows, options.dir)
        few = measured("ours", kind, options.rows // 2, options.dir)
        ours = measured("ours", kind, options.rows, options.dir)
        speed = peer.encode_s / ours.encode_s
        growth = (ours.peak_gib - few.peak_gib) * 2**30 / (ours.rows - few.rows)
        checks += [
            Check(f"{kind}: speed beside datasets.map, times", speed, low=1.0),
            Check(f"{kind}: bytes of memory for each further row", growth, high=ROW_BYTES[kind]),
        ]
    return 0 if report("make bench-encoding", checks) else 1


if __name__ == "__main__":
    sys.exit(main())
