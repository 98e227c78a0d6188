"""Judges that training never sees: a lexicon, a classifier of labelled texts, a function. They give
each response a number; higher is better.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from rlhf.types import Rollout, Scorer, UserError

_REGULARISATION = 3.0  # logistic regression's C


class ResponseJudge(Protocol):
    """Judges responses; `name` is the name of the metric."""

    name: str

    def judge(self, rollouts: Sequence[Rollout]) -> list[float]: ...


def judged_text(rollout: Rollout) -> str:
    """The text that a judge reads: the response to a conversation; prompt and response where the
    response continues a plain text.
    """
    if isinstance(rollout.prompt.source, list):
        return rollout.text
    return rollout.prompt.text + rollout.text


class LexiconJudge:
    """VADER's compound sentiment in [-1, 1] (Hutto and Gilbert 2014): a fixed lexicon, with rules
    for negation and emphasis.
    """

    name = "lexicon"

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise UserError(
                "stage.judges holds lexicon, which needs the package vaderSentiment: pip install "
                "vaderSentiment==3.3.2"
            ) from error
        self._analyser: Any = SentimentIntensityAnalyzer()

    def judge(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [
            float(self._analyser.polarity_scores(judged_text(rollout))["compound"])
            for rollout in rollouts
        ]


class ClassifierJudge:
    """The probability, in [0, 1], that a text is positive: logistic regression on the TF-IDF of
    words and word pairs.
    """

    name = "classifier"

    def __init__(self, texts: Sequence[str], labels: Sequence[int], source: str) -> None:
        """Train on `texts`; `source` names them in errors. Raises UserError when they hold fewer
        than two labels.
        """
        if len(set(labels)) != 2:
            raise UserError(
                f"{source}: a classifier judge needs texts of two labels, 0 and 1; found "
                f"{sorted(set(labels))}."
            )
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        self._model: Any = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"\S+"),
            LogisticRegression(C=_REGULARISATION, max_iter=1000),
        )
        self._model.fit(list(texts), list(labels))

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]], source: str) -> "ClassifierJudge":
        """Train on rows with a `text` and a `label` (0 or 1); `source` names them in errors. Raises
        UserError naming the row that lacks either.
        """
        texts, labels = [], []
        for number, row in enumerate(rows, start=1):
            text, label = row.get("text"), row.get("label")
            if not isinstance(text, str) or label not in (0, 1):
                raise UserError(
                    f"{source}, row {number}: expected a text and a label of 0 or "
                    f"1, found keys {sorted(row)} and label {label!r}."
                )
            texts.append(text)
            labels.append(int(label))
        return cls(texts, labels, source)

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        return [float(p) for p in self._model.predict_proba(list(texts))[:, 1]] if texts else []

    def judge(self, rollouts: Sequence[Rollout]) -> list[float]:
        return self.probabilities([judged_text(rollout) for rollout in rollouts])


class FunctionJudge:
    """Judges by a scorer, such as that of ``stage.judge_function``."""

    def __init__(self, scorer: Scorer, name: str = "function") -> None:
        self.name = name
        self._scorer = scorer

    def judge(self, rollouts: Sequence[Rollout]) -> list[float]:
        return self._scorer.score(rollouts).total
