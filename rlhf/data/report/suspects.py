"""Labels that the other rows contradict, found without a reward model: a linear model of words,
held out row by row, and confident learning.

Coarse on purpose: it costs seconds, and it sees words only. What it names is worth a look, not
worth dropping; step label_noise of data.pipeline judges with the run's own reward model.
"""

import random
from collections.abc import Sequence
from typing import Any

from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item, answers_of
from rlhf.data.report.content import sampled
from rlhf.data.report.records import Marked, Section, Settings, Severity, Table, finding
from rlhf.data.report.remedies import REMEDIES
from rlhf.data.report.texts import words
from rlhf.process import parallel
from rlhf.process.libraries import require

_ROWS = 200  # that the model needs
_FOLDS = 5
# held-out probability of its own label below which a row is named: on real pairs, with 71 % right,
# confident learning alone named 25 %
DOUBT = 0.05
# of the held-out rows below which words don't tell good from bad, and the model's doubts say
# nothing
MIN_ACCURACY = 0.6


def held_out_probabilities(features: Any, targets: Sequence[int], seed: int) -> Any:
    """[N, 2] P(target = 0), P(target = 1) of each row by a logistic regression fitted on the other
    folds, which are shared out among processes.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold
    from threadpoolctl import threadpool_limits

    labels = np.array(targets)

    def held_out(fold: tuple[Any, Any]) -> Any:
        others, own = fold
        model = LogisticRegression(C=10.0, max_iter=1000)
        # threads that share vectors this short wait for each other, four times as long as one works
        with threadpool_limits(limits=1, user_api="blas"):
            model.fit(features[others], labels[others])
        return model.predict_proba(features[own])

    folds = list(StratifiedKFold(_FOLDS, shuffle=True, random_state=seed).split(labels, labels))
    out = np.empty((len(labels), 2))
    found = parallel.in_order(held_out, folds, pieces=len(folds))
    for (_, own), probabilities in zip(folds, found, strict=True):
        out[own] = probabilities
    return out


def _features(items: Sequence[Item], settings: Settings) -> tuple[Any, list[int]]:
    """TF-IDF of the answer, or of pairs the first side's minus the second's, sides drawn by the
    seed; and which one is right.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=words, min_df=2, sublinear_tf=True)
    if settings.kind is Use.preference:
        texts = [answers_of(item.columns) for item in items]
        vectors = vectorizer.fit_transform(
            [t["chosen"] for t in texts] + [t["rejected"] for t in texts]
        )
        difference = vectors[: len(items)] - vectors[len(items) :]
        rng = random.Random(f"{settings.seed}:suspects")
        targets = [rng.randrange(2) for _ in items]
        from scipy.sparse import diags

        return diags([2.0 * t - 1.0 for t in targets]) @ difference, targets
    answers = ["\n".join(answers_of(item.columns).values()) for item in items]
    return vectorizer.fit_transform(answers), [int(bool(item.columns["label"])) for item in items]


def suspects(items: Sequence[Item], settings: Settings) -> Section:
    """Rows whose label a model of the other rows contradicts with confidence (Northcutt et al.
    2021, arXiv:1911.00068).
    """
    title = "Suspect labels"
    if settings.kind not in (Use.preference, Use.unpaired):
        return Section("suspects", title, {}, unmeasured="the rows hold no judgement")
    some = sampled(items, settings)
    if len(some) < _ROWS:
        return Section(
            "suspects", title, {}, unmeasured=f"{len(some)} rows are too few: at least {_ROWS}"
        )
    if settings.kind is Use.unpaired:
        good = sum(bool(item.columns["label"]) for item in some)
        if min(good, len(some) - good) < _FOLDS:
            reason = f"one of the labels has fewer than {_FOLDS} rows"
            return Section("suspects", title, {}, unmeasured=reason)
    try:
        features, targets = _features(some, settings)
    except ValueError as error:  # scikit-learn: no word is in two texts
        return Section("suspects", title, {}, unmeasured=f"the texts share no words ({error})")
    import numpy as np

    find_label_issues = require("cleanlab.filter", "data").find_label_issues
    probabilities = held_out_probabilities(features, targets, settings.seed)
    accuracy = sum(
        int(p[1] >= 0.5) == t for p, t in zip(probabilities, targets, strict=True)
    ) / len(some)
    figures = {"rows": len(some), "accuracy": accuracy}
    if accuracy < MIN_ACCURACY:
        reason = f"words alone tell good from bad in {accuracy:.0%} of held-out rows only"
        return Section("suspects", title, figures, unmeasured=reason)
    flagged = find_label_issues(np.array(targets), probabilities, filter_by="both", n_jobs=1)
    rows = Marked(settings.named)
    for item, p, t, bad in zip(some, probabilities, targets, flagged, strict=True):
        if bad and p[t] < DOUBT:
            rows.add(item, f"probability {p[t]:.2f}")
    message = (
        f"{len(rows)} of {len(some)} rows looked at: the words of the other rows speak "
        "against the label"
    )
    findings = finding("suspect_labels", Severity.info, message, REMEDIES["suspect_labels"], rows)
    shown = (
        ("rows looked at", len(some)),
        ("held-out accuracy of the model of words", accuracy),
        ("suspect rows", len(rows)),
    )
    return Section(
        "suspects",
        title,
        {**figures, "suspect": len(rows)},
        findings,
        (Table("Suspect labels", ("figure", "value"), shown),),
    )
