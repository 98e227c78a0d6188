"""SMOTE for classifier heads on embeddings. For texts there is no such step: a point between two
embeddings is the embedding of nothing.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.process.libraries import require
from rlhf.types import UserError


def smote(
    vectors: NDArray[np.floating[Any]], labels: NDArray[Any], *, seed: int = 0, neighbours: int = 5
) -> tuple[NDArray[Any], NDArray[Any]]:
    """`vectors` [N, D] and `labels` [N], followed by made-up vectors of the smaller classes until
    all are as large as the largest.

    Each lies at a random point between a vector and one of its `neighbours` nearest of the same
    class (Chawla et al. 2002, arXiv:1106.1813; imbalanced-learn). Raises UserError for a class of
    fewer than two vectors, which has no neighbour.
    """
    over_sampling = require("imblearn.over_sampling", "data")
    if len(vectors) != len(labels) or np.ndim(vectors) != 2:
        raise UserError(
            f"smote: expected vectors [N, D] and labels [N], found shapes {np.shape(vectors)} "
            f"and {np.shape(labels)}."
        )
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2:
        raise UserError(f"smote: expected at least two classes, found {len(names)}.")
    if counts.min() < 2:
        raise UserError(
            f"smote: class {names[counts.argmin()]!r} has {counts.min()} vector: expected at "
            "least 2, to lie between them."
        )
    nearest = min(neighbours, int(counts.min()) - 1)
    sampler = over_sampling.SMOTE(random_state=seed, k_neighbors=nearest)
    return sampler.fit_resample(vectors, labels)
