"""Texts as unit vectors: TF-IDF of words and pairs of words, or a sentence-embedding model's."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from conf.preparation.base import Vectors
from rlhf.data.prepare.texts import normalised
from rlhf.data.prepare.words import words
from rlhf.process.libraries import require
from rlhf.types import UserError

Sides = tuple[str, str]  # rlhf.data.prepare.texts.sides


def terms(text: Sides) -> list[str]:
    """Words and pairs of neighbouring words of a text; those of what is judged bad are terms of
    their own.
    """
    out: list[str] = []
    for mark, side in zip(("", "\0"), text, strict=True):
        marked = [mark + word for word in words(normalised(side))]
        out += marked
        out += [f"{first} {second}" for first, second in pairwise(marked)]
    return out


def tfidf_vectors(texts: Sequence[Sides]) -> Any:
    """[N, V] sparse rows of length 1 (scikit-learn's smoothed idf); a text without a word is a row
    of zeros.
    """
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        return csr_array(TfidfVectorizer(analyzer=terms, dtype=np.float32).fit_transform(texts))
    except ValueError:  # no text holds a word
        return csr_array((len(texts), 1), dtype=np.float32)


def embeddings(texts: Sequence[Sides], model: str) -> Any:
    """[N, D] float32 rows of length 1 from a directory that sentence-transformers can load; with
    bad sides [N, 2 D], each half by itself.

    Raises UserError for a directory that holds no such model.
    """
    from pathlib import Path

    from rlhf.process import distributed

    folder = Path(model).expanduser()
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"model={model}: expected a sentence-embedding model's directory (modules.json), "
            "found none there."
        )
    sentence_transformers = require("sentence_transformers", "embeddings")
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    encoder = sentence_transformers.SentenceTransformer(
        str(folder), device=str(distributed.device()), local_files_only=True
    )

    def encode(parts: list[str]) -> Any:
        return encoder.encode(
            parts,
            batch_size=64,
            show_progress_bar=False,
            convert_to_numpy=True,
            normalize_embeddings=True,
        ).astype(np.float32)

    good = encode([text[0] for text in texts])
    if not any(text[1] for text in texts):
        return good
    # [N, 2]
    present = np.array([[bool(side) for side in text] for text in texts], dtype=np.float32)
    bad = encode([text[1] for text in texts])
    both = np.concatenate([good * present[:, :1], bad * present[:, 1:]], axis=1)
    return both / np.maximum(np.linalg.norm(both, axis=1, keepdims=True), 1e-12)


def vectors(texts: Sequence[Sides], how: Vectors, model: str | None) -> Any:
    """[N, D] rows of length 1, sparse for TF-IDF and dense for embeddings."""
    if how is Vectors.tfidf:
        return tfidf_vectors(texts)
    return embeddings(texts, str(model))


def reduced(matrix: Any, seed: int) -> Any:
    """[N, at most 50] latent semantic analysis of sparse rows, of length 1: density and nearness
    mean little in thousands of dimensions.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    size = max(1, min(50, matrix.shape[0] - 1, matrix.shape[1] - 1))
    return normalize(TruncatedSVD(size, random_state=seed).fit_transform(matrix))
