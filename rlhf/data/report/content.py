"""What the rows are about: languages, labels, clusters, diversity."""

import math
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

from rlhf.data.prepare.held import Mapped, picked
from rlhf.data.prepare.items import Item, joined
from rlhf.data.prepare.languages import NOTHING, UNKNOWN, identify
from rlhf.data.prepare.words import letters
from rlhf.data.report.looked import over
from rlhf.data.report.numbered import Numbered, distinct
from rlhf.data.report.records import (
    Bars,
    Finding,
    Marked,
    Section,
    Settings,
    Severity,
    Table,
    finding,
)
from rlhf.data.report.remedies import REMEDIES
from rlhf.data.report.texts import entropy

# columns that may name a row's class
LABELS = ("label", "kto_tag", "category", "class", "topic", "sentiment")
_CLASSES = 50  # different values that a column of classes may have
# rows of the largest class per row of the smallest from which balance is worth a warning
IMBALANCE = 3.0
_SURE = 0.9  # probability from which another language is believed
_LETTERS = 20  # letters that a text needs before its language is judged
_CLUSTERS = 20  # at most
_TERMS = 5000  # words that clusters are told by
_LARGEST = 0.5  # share of one cluster that is worth a warning
_CLUSTER_ROWS = 50  # that clusters need


def sampled(items: Sequence[Item], settings: Settings) -> Sequence[Item]:
    """At most `settings.sample` of the rows, drawn by the seed, in their order, where they are."""
    if len(items) <= settings.sample:
        return items
    drawn = random.Random(f"{settings.seed}:report").sample(range(len(items)), settings.sample)
    return picked(items, sorted(drawn))


def texts_of(items: Sequence[Item]) -> Sequence[str]:
    """All texts of each row in one."""
    return Mapped(lambda item: joined(item.columns), items)


# ---- languages ----


def detected_languages(items: list[Item]) -> list[tuple[str, float]]:
    """[N] (code, probability) of each row's texts; ("und", 0) for one with too few letters to tell.
    Languages that can't be kept apart have their group's code.
    """
    texts = [joined(item.columns) for item in items]
    out = [(UNKNOWN, 0.0)] * len(texts)
    telling = [index for index, text in enumerate(texts) if letters(text) >= _LETTERS]
    identified = identify([texts[index] for index in telling])
    for index, found in zip(telling, identified, strict=True):
        if found.group != NOTHING:
            out[index] = found.group, found.probability
    return out


def languages(some: Sequence[Item], settings: Settings) -> Section:
    """The mix of languages; rows that are surely in another one than most are named where most
    share one. some: `sampled` rows.
    """
    title = "Languages"
    if not some:
        return Section("languages", title, {}, unmeasured="there are no rows")
    detected = list(chain.from_iterable(over(detected_languages, some)))
    counts = Counter(code for code, _ in detected)
    main, most = max(
        ((c, n) for c, n in counts.items() if c != "und"),
        key=lambda pair: pair[1],
        default=("und", 0),
    )
    others = Marked(
        settings.named,
        (
            (some[index], f"{code}, probability {p:.2f}")
            for index, (code, p) in enumerate(detected)
            if code not in (main, "und") and p >= _SURE
        ),
    )
    findings: tuple[Finding, ...] = ()
    if most > len(some) / 2:
        message = (
            f"{len(others)} of {len(some)} rows looked at are in another language than "
            f"most ({main})"
        )
        findings = finding("languages", Severity.info, message, REMEDIES["languages"], others)
    figures = {
        "rows": len(some),
        "counts": dict(counts.most_common()),
        "main": main,
        "others": len(others),
    }
    rows = tuple((code, n, n / len(some)) for code, n in counts.most_common(12))
    top = counts.most_common(8)
    plots: tuple[Bars, ...] = ()
    if len(counts) > 1:
        sizes = tuple(float(n) for _, n in top)
        plots = (Bars("Languages", "rows", tuple(code for code, _ in top), sizes),)
    return Section(
        "languages",
        title,
        figures,
        findings,
        (Table("Languages", ("language", "rows", "share"), rows),),
        plots,
    )


# ---- labels ----


def classes(items: list[Item]) -> dict[str, Counter[str]]:
    """The values of the columns of LABELS in some rows, counted."""
    out: dict[str, Counter[str]] = {}
    for item in items:
        for name in LABELS:
            value = item.columns.get(name)
            if isinstance(value, (str, bool, int)):
                out.setdefault(name, Counter())[str(value)] += 1
    return out


def label_columns(items: Sequence[Item]) -> dict[str, Counter[str]]:
    """The columns that name classes, with the rows of each: a known name, and few different values
    beside the number of rows.
    """
    out = {}
    found: dict[str, Counter[str]] = {name: Counter() for name in LABELS}
    for part in over(classes, items):
        for name, counts in part.items():
            found[name].update(counts)
    for name, counts in found.items():
        # one label for all rows is worth a word, one topic is not
        least = 1 if name == "label" else 2
        if least <= len(counts) <= min(_CLASSES, max(2, counts.total() // 2)):
            out[name] = counts
    return out


def labels(items: Sequence[Item], settings: Settings) -> Section:
    """How many rows each class has."""
    title = "Labels"
    columns = label_columns(items)
    if not columns:
        return Section(
            "labels", title, {}, unmeasured=f"no row has a column of classes ({', '.join(LABELS)})"
        )
    figures: dict[str, Any] = {}
    findings: list[Finding] = []
    tables: list[Table] = []
    for name, counts in columns.items():
        total, (largest, most), (smallest, fewest) = (
            sum(counts.values()),
            counts.most_common(1)[0],
            counts.most_common()[-1],
        )
        ratio = most / fewest
        balance = entropy(counts.values()) / math.log(len(counts)) if len(counts) > 1 else 0.0
        figures[name] = {"counts": dict(counts.most_common()), "ratio": ratio, "balance": balance}
        tables.append(
            Table(
                f"Column {name}",
                ("class", "rows", "share"),
                tuple((c, n, n / total) for c, n in counts.most_common()),
            )
        )
        labelled = ((item, item.columns[name]) for item in items if name in item.columns)
        rare = ((item, f"{name} is {smallest}") for item, own in labelled if str(own) == smallest)
        if len(counts) == 1:
            message = f"every row has {name}={largest}"
            every = ((item, f"{name} is {largest}") for item, _ in labelled)
            rows = Marked(settings.named, every)
            findings += finding("one_class", Severity.warn, message, REMEDIES["one_class"], rows)
        elif ratio >= IMBALANCE:
            rows = Marked(settings.named, rare)
            message = (
                f"column {name}: {most} rows of {largest} to {fewest} of {smallest}, which is "
                f"{ratio:.1f} to 1"
            )
            findings += finding("imbalance", Severity.warn, message, REMEDIES["imbalance"], rows)
    return Section("labels", title, figures, tuple(findings), tuple(tables))


# ---- clusters and diversity ----


@dataclass(frozen=True, slots=True)
class Clustering:
    """Which cluster each text is in, and each cluster's own words; the largest cluster is 0."""

    members: list[int]
    terms: list[list[str]]


def _telling(counts: Any) -> Any:
    """[V] which words can tell texts apart: those in two texts or more but at most in half of them,
    of these the _TERMS commonest. Raises ValueError: no word can.
    """
    import numpy as np

    texts = np.bincount(counts.indices, minlength=counts.shape[1])  # [V] that have the word
    telling = np.flatnonzero((texts >= 2) & (texts <= 0.5 * counts.shape[0]))
    if not len(telling):
        raise ValueError("no word is in two texts but not in half of them")
    if len(telling) > _TERMS:
        often = np.bincount(counts.indices, counts.data, minlength=counts.shape[1])
        telling = np.sort(telling[np.argsort(-often[telling])[:_TERMS]])
    return telling


def cluster(texts: Numbered, seed: int) -> Clustering:
    """k-means on TF-IDF of words, k = sqrt(n / 2) up to 20 (rule of thumb of Mardia, Kent and Bibby
    1979). Raises ValueError: no shared words.
    """
    import numpy as np
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfTransformer
    from threadpoolctl import threadpool_limits

    counts = texts.counts()
    telling = _telling(counts)
    vectors = TfidfTransformer(sublinear_tf=True).fit_transform(counts[:, telling])
    vectors.sort_indices()
    rows = {
        (vectors.indices[start:end].tobytes(), vectors.data[start:end].tobytes())
        for start, end in pairwise(vectors.indptr)
    }
    k = min(_CLUSTERS, len(rows), max(2, int(math.sqrt(len(texts.ends) / 2))))
    # One thread: in a forked process OpenMP would wait forever for those that this process had, as
    # after step balance.
    with threadpool_limits(limits=1, user_api="openmp"):
        model = KMeans(n_clusters=k, n_init=1, max_iter=50, random_state=seed).fit(vectors)
    labels = model.labels_.tolist()
    order = [label for label, _ in Counter(labels).most_common()]
    number_of = {label: i for i, label in enumerate(order)}
    terms = []
    for label in order:
        heaviest = np.argsort(-model.cluster_centers_[label], kind="stable")[:6]
        terms.append([texts.words[telling[term]] for term in heaviest])
    return Clustering([number_of[label] for label in labels], terms)


def clustered(some: Sequence[Item], texts: Numbered, settings: Settings) -> Section:
    """How evenly the rows are spread over clusters of words. texts: of `sampled` rows."""
    if len(some) < _CLUSTER_ROWS:
        reason = f"{len(some)} rows are too few: at least {_CLUSTER_ROWS}"
        return Section("clusters", "Clusters", {}, unmeasured=reason)
    try:
        clustering = cluster(texts, settings.seed)
    except ValueError as error:  # scikit-learn: no word is in two texts but not in half of them
        reason = f"the texts share no words that tell them apart ({error})"
        return Section("clusters", "Clusters", {}, unmeasured=reason)
    counts = Counter(clustering.members)
    sizes = [counts[i] for i in range(len(clustering.terms)) if counts[i]]
    shares = [size / len(some) for size in sizes]
    figures = {
        "rows": len(some),
        "clusters": len(sizes),
        "effective": math.exp(entropy(sizes)),
        "sizes": sizes,
        "largest_share": shares[0],
    }
    findings: tuple[Finding, ...] = ()
    if shares[0] > _LARGEST:
        inside = zip(some, clustering.members, strict=True)
        largest = ((item, "in the largest cluster") for item, member in inside if member == 0)
        rows = Marked(settings.named, largest)
        message = (
            f"one cluster of {len(sizes)} holds {shares[0]:.0%} of the rows "
            f"({', '.join(clustering.terms[0][:3])})"
        )
        findings = finding("one_cluster", Severity.warn, message, REMEDIES["one_cluster"], rows)
    rows_shown = tuple(
        (i + 1, size, shares[i], ", ".join(clustering.terms[i])) for i, size in enumerate(sizes)
    )
    table = Table("Clusters", ("cluster", "rows", "share", "words"), rows_shown)
    names = tuple(str(i + 1) for i in range(len(sizes)))
    plot = Bars("Rows by cluster", "rows", names, tuple(map(float, sizes)))
    return Section("clusters", "Clusters", figures, findings, (table,), (plot,))


def compression_ratio(texts: Iterable[str]) -> float:
    """Bytes / compressed bytes of all texts together (Shaib et al. 2024, arXiv:2403.00553): the
    more they repeat each other, the higher.
    """
    packer = zlib.compressobj(6)
    raw = packed = 0
    for number, text in enumerate(texts):
        line = text.encode("utf-8", "surrogatepass")
        if number:
            line = b"\n" + line
        raw += len(line)
        packed += len(packer.compress(line))
    if raw:
        return raw / (packed + len(packer.flush()))
    return 0.0


_DIVERSITY = {
    "rows": "rows looked at",
    "words": "words",
    "vocabulary": "different words",
    "once": "words that occur once",
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "compression_ratio": "compression ratio",
    "held_out_words_covered": "share of the held-out rows' different words that training rows have",
}


def diversity(some: Sequence[Item], texts: Numbered, settings: Settings) -> Section:
    """How many different things the rows say. The figures fall (the ratio rises) with more text:
    compare equal amounts only. texts: of `sampled` rows.
    """
    import numpy as np

    splits = [item.split for item in some]
    held_out = texts.different([split == "eval" for split in splits])
    trained = texts.different([split == "train" for split in splits])
    covered = None
    if held_out.any():
        covered = int((held_out & trained).sum()) / int(held_out.sum())
    figures: dict[str, int | float | None] = {
        "rows": len(some),
        "words": len(texts.flat),
        "vocabulary": len(texts.words),
        "once": int((np.bincount(texts.flat) == 1).sum()),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "compression_ratio": compression_ratio(texts_of(some)),
        "held_out_words_covered": covered,
    }
    table = Table(
        "Coverage and diversity",
        ("figure", "value"),
        tuple((label, figures[name]) for name, label in _DIVERSITY.items()),
    )
    return Section("diversity", "Coverage and diversity", figures, tables=(table,))
