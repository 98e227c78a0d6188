"""Data sets built from what installed packages carry, or from the seed alone, so that demos and
proofs run on real input without a hub.

Files appear under ``<run.dir>/<run.name>/recipe`` with a ``meta.json`` that says what they were
built from; what a recipe holds is written in its own module (rlhf/data/recipes/reviews.py,
rlhf/data/recipes/smollm2.py, rlhf/data/recipes/films.py, rlhf/data/recipes/gym.py,
rlhf/data/recipes/arithmetic.py, rlhf/data/recipes/safety.py).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.choices import Recipe
from conf.schema import DataConfig, GymConfig, RunConfig
from rlhf.data.recipes import arithmetic, films, gym, reviews, safety, smollm2
from rlhf.process import distributed
from rlhf.process.files import sha256
from rlhf.process.libraries import package_file
from rlhf.types import UserError

Rows = Mapping[str, Sequence[Mapping[str, object]]]
META = "meta.json"


def ensure(data: DataConfig, run: RunConfig) -> None:
    """Build the files of ``data.recipe`` where they are missing: rank 0 writes, every rank waits.

    Raises UserError when the package is missing, or when the directory holds rows of another recipe
    or seed and ``run.overwrite`` is false.
    """
    if data.recipe is Recipe.none:
        return
    if distributed.is_main() and data.recipe is Recipe.gym:
        _gym(directory(run), data.gym, run.seed, run.overwrite)
    elif distributed.is_main():
        _BUILDERS[data.recipe](directory(run), run.seed, run.overwrite)
    distributed.barrier()


def directory(run: RunConfig) -> Path:
    """The directory of the recipe's files."""
    return Path(run.dir).expanduser() / run.name / "recipe"


def _reviews(folder: Path, seed: int, overwrite: bool) -> None:
    table = package_file(reviews.DISTRIBUTION, reviews.TABLE, reviews.REQUIREMENT)
    origin = {
        "recipe": "reviews",
        "format": reviews.FORMAT_VERSION,
        "seed": seed,
        "source": reviews.REQUIREMENT,
        "source_sha256": sha256(table),
    }
    if not is_current(folder, origin, overwrite):
        write_all(folder, reviews.rows(reviews.read_reviews(table), seed), origin)


def _smollm2(folder: Path, seed: int, overwrite: bool) -> None:
    _chat(folder, seed, overwrite, smollm2)


def _films(folder: Path, seed: int, overwrite: bool) -> None:
    _chat(folder, seed, overwrite, films)


def _chat(folder: Path, seed: int, overwrite: bool, recipe: Any) -> None:
    """Rows of the reviews for the pretrained chat model, and the model itself beside them."""
    table = package_file(reviews.DISTRIBUTION, reviews.TABLE, reviews.REQUIREMENT)
    gguf = package_file(smollm2.DISTRIBUTION, smollm2.GGUF, smollm2.REQUIREMENT)
    origin = {
        "recipe": recipe.__name__.rpartition(".")[2],
        "format": recipe.FORMAT_VERSION,
        "seed": seed,
        "source": reviews.REQUIREMENT,
        "source_sha256": sha256(table),
    }
    origin |= {"model": smollm2.REQUIREMENT, "model_sha256": sha256(gguf)}
    if not is_current(folder, origin, overwrite):
        write_all(folder, recipe.rows(reviews.read_reviews(table), seed), origin)
    smollm2.convert(gguf, folder / smollm2.MODEL_FOLDER)


def _gym(folder: Path, options: GymConfig, run_seed: int, overwrite: bool) -> None:
    seed = run_seed if options.seed is None else options.seed
    origin = {
        "recipe": "gym",
        "format": gym.FORMAT_VERSION,
        "seed": seed,
        "source": gym.REQUIREMENT,
        "options": dataclasses.asdict(options),
    }
    if not is_current(folder, origin, overwrite):
        write_all(folder, gym.rows(options, seed), origin)


def _arithmetic(folder: Path, seed: int, overwrite: bool) -> None:
    origin = {"recipe": "arithmetic", "format": arithmetic.FORMAT_VERSION, "seed": seed}
    if not is_current(folder, origin, overwrite):
        write_all(folder, arithmetic.rows(seed), origin)


def _safety(folder: Path, seed: int, overwrite: bool) -> None:
    files = {
        name: package_file(distribution, name, requirement)
        for name, (distribution, requirement) in safety.FILES.items()
    }
    hashes = {name: sha256(path) for name, path in files.items()}
    origin = {"recipe": "safety", "format": safety.FORMAT_VERSION, "files": hashes}
    if not is_current(folder, origin, overwrite):
        write_all(folder, safety.rows(files), origin)


def is_current(folder: Path, origin: Mapping[str, object], overwrite: bool) -> bool:
    """Whether `folder` holds every file of its meta.json, built from `origin`. Raises UserError for
    another origin unless `overwrite`.
    """
    meta_file = folder / META
    if not meta_file.is_file():
        return False
    meta = json.loads(meta_file.read_text(encoding="utf-8"))
    current = meta["origin"]
    differs = [
        f"{key}: found {current.get(key)!r}, expected {value!r}"
        for key, value in origin.items()
        if current.get(key) != value
    ]
    if differs and not overwrite:
        raise UserError(
            f"{folder} holds other rows than the recipe gives ({'; '.join(differs)}): choose "
            "another run.name, or set run.overwrite=true."
        )
    return not differs and all((folder / name).is_file() for name in meta["files"])


def write_all(folder: Path, files: Rows, origin: Mapping[str, object]) -> None:
    """Write each list as JSON lines, then meta.json: its presence says that all files are
    complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    written = {
        name: {"rows": len(rows), "sha256": sha256(folder / name)} for name, rows in files.items()
    }
    (folder / META).write_text(
        json.dumps({"origin": origin, "files": written}, indent=2) + "\n", encoding="utf-8"
    )


_BUILDERS: dict[Recipe, Callable[[Path, int, bool], None]] = {
    Recipe.reviews: _reviews,
    Recipe.smollm2: _smollm2,
    Recipe.films: _films,
    Recipe.arithmetic: _arithmetic,
    Recipe.safety: _safety,
}
