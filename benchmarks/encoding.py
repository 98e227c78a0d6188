"""Rows as token ids: rows a second and peak memory of stage=sft's and stage=reward's encoding,
beside datasets.map of the same template with a process for each core.

python -m benchmarks.encoding                20,000 conversations and pairs of 350 tokens
python -m benchmarks.encoding --rows 2000    small ones

Each figure is measured in a process of its own. Memory is the kernel's peak of that process, with
its rows read, and that of the largest process it started; what those share counts in both.
"""

import argparse
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
# bytes of peak memory for each further row: the rows as they were read, never their tokens
ROW_BYTES = 12_000
_TRAIN, _HELD = "train.jsonl", "held.jsonl"
_WORDS = (
    *("film", "story", "scene", "actor", "people", "music", "end", "night", "city", "friend"),
    *("house", "water", "light", "answer", "question", "number", "reason", "letter", "garden"),
    *("morning", "company", "history", "river", "market", "doctor", "window", "teacher"),
)
_MAX_LENGTH = 4096


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=words)) + "."


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """Three questions and answers, of some 350 tokens."""
    turns = []
    for _ in range(3):
        turns.append({"role": "user", "content": sentence(rng, rng.randint(15, 35))})
        turns.append({"role": "assistant", "content": sentence(rng, rng.randint(50, 110))})
    return turns


def rows_of(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    if kind == "sft":
        return [{"messages": conversation(rng)} for _ in range(count)]
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
    tokenizer = train_tokenizer([sentence(rng, 50) for _ in range(500)], 1000, _MAX_LENGTH)
    tokenizer.chat_template = template_text("chatml")
    tokenizer.save_pretrained(folder / "tokenizer")


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement."""

    rows: int
    tokens: float  # a row
    read_s: float
    encode_s: float
    again_s: float | None  # the second time
    peak_gib: float  # of the process
    child_gib: float  # of its largest child


def peak_gib() -> float:
    """The largest resident memory that this program has had."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("/proc/self/status has no VmHWM")


def measure_ours(folder: Path, kind: str) -> Measured:
    """What the stage does between reading its files and its first batch."""
    from transformers import AutoTokenizer

    from conf.schema import Config, DataConfig, RunConfig
    from conf.stages import RewardStage, SFTStage
    from rlhf.data.loading import DataRequest
    from rlhf.stages import reward, sft

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    options: dict[str, Any] = {"max_length": _MAX_LENGTH}
    stage = SFTStage(**options) if kind == "sft" else RewardStage(**options)
    data = DataConfig(path=str(folder / _TRAIN), eval_path=str(folder / _HELD))
    request = DataRequest.of(Config(stage=stage, data=data, run=RunConfig(dir=str(folder))))
    records = sft.sft_records if kind == "sft" else reward.preference_records
    began = time.perf_counter()
    records(request)
    read_s = time.perf_counter() - began
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        if kind == "sft":
            rows, column = sft.read(request, tokenizer).train, "input_ids"
        else:
            rows, column = reward.read(request, tokenizer)[0].data, "chosen_ids"
        seconds.append(time.perf_counter() - began - read_s)
    return _measured(rows, column, read_s, seconds[0], seconds[1])


def measure_map(folder: Path, kind: str, processes: int) -> Measured:
    """datasets.map: each conversation once through the template, with the mask of its answers."""
    import datasets
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def encode(messages: list[dict[str, str]], mask: bool) -> Any:
        return tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=mask
        )

    def columns(row: dict[str, Any]) -> dict[str, Any]:
        if kind == "sft":
            out = encode(row["messages"], True)
            return {"input_ids": out["input_ids"], "mask": out["assistant_masks"]}
        sides = ("chosen", "rejected")
        return {f"{side}_ids": encode(row[side], False)["input_ids"] for side in sides}

    began = time.perf_counter()
    rows = datasets.load_dataset(
        "json", data_files=str(folder / _TRAIN), cache_dir=str(folder / "cache"), split="train"
    )
    read_s = time.perf_counter() - began
    began = time.perf_counter()
    rows = rows.map(columns, num_proc=processes, remove_columns=rows.column_names)
    encode_s = time.perf_counter() - began
    return _measured(rows, rows.column_names[0], read_s, encode_s, None)


def _measured(
    rows: Any, column: str, read_s: float, encode_s: float, again_s: float | None
) -> Measured:
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    peak, few = peak_gib(), min(100, len(rows))
    tokens = sum(len(row[column]) for row in rows.select(range(few))) / few
    return Measured(len(rows), tokens, read_s, encode_s, again_s, peak, child)


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
        f"{kind:6} {what:4} {result.rows:>6} rows of {result.tokens:.0f} tokens: "
        f"{result.rows / result.encode_s:6.0f} rows/s ({result.encode_s:.1f} s{again}), reading "
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
    parser.add_argument("--kind", choices=("sft", "pairs"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    processes = distributed.cores()
    if options.measure == "ours":
        print(json.dumps(asdict(measure_ours(options.dir, options.kind))))
        return 0
    if options.measure == "map":
        print(json.dumps(asdict(measure_map(options.dir, options.kind, processes))))
        return 0
    checks = []
    for kind in ("sft", "pairs"):
        peer = measured("map", kind, options.rows, options.dir)
        few = measured("ours", kind, options.rows // 4, options.dir)
        ours = measured("ours", kind, options.rows, options.dir)
        speed = peer.encode_s / ours.encode_s
        growth = (ours.peak_gib - few.peak_gib) * 2**30 / (ours.rows - few.rows)
        checks += [
            Check(f"{kind}: speed beside datasets.map, times", speed, low=1.0),
            Check(f"{kind}: bytes of memory for each further row", growth, high=ROW_BYTES),
        ]
    return 0 if report("make bench-encoding", checks) else 1


if __name__ == "__main__":
    sys.exit(main())
