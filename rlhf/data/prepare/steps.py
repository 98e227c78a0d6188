"""The steps of data.pipeline by the names of their options (conf/preparation).

A new step is its options there, and a function here: (options, items, context) -> items, see
rlhf/data/prepare/items.py. A step of single rows (`rowwise`) has a second one, which makes its
figures of its tallies. The modules import their heavy libraries when a step runs.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from rlhf.data.formats import Use
from rlhf.data.prepare import (
    aggregate,
    augment,
    balance,
    cleaning,
    cosine,
    exact,
    label_noise,
    near,
    perplexity,
    personal,
    quality,
    review,
    splitting,
    terms,
    translate,
)
from rlhf.data.prepare.items import Step

STEPS: dict[str, Step[Any]] = {
    "exact_duplicates": exact.exact_duplicates,
    "near_duplicates": near.near_duplicates,
    "cosine_duplicates": cosine.cosine_duplicates,
    "balance": balance.balance,
    "split": splitting.split,
    "augment": augment.augment,
    "back_translate": translate.back_translate,
    "repair": cleaning.repair,
    "language": cleaning.language,
    "length": cleaning.length,
    "quality": quality.quality,
    "tfidf": quality.tfidf,
    "perplexity": perplexity.perplexity,
    "patterns": personal.patterns,
    "terms": terms.terms,
    "aggregate": aggregate.aggregate,
    "review": review.review,
    "label_noise": label_noise.label_noise,
}

# what a step asks of single rows, found in the processes that the rowwise steps before it are
# shared out among
KEYS: dict[str, Callable[[Any, dict[str, Any], Use], bytes]] = {"exact_duplicates": exact.row_key}

FIGURES: dict[str, Callable[[Any, Counter[Any]], dict[str, Any]]] = {
    "repair": cleaning.repair_figures,
    "language": cleaning.language_figures,
    "length": cleaning.length_figures,
    "quality": lambda options, tallies: {},
    "patterns": lambda options, tallies: dict(tallies.most_common()),
}
