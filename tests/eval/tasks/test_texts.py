"""ROUGE against published values, chrF and BLEU against sacrebleu."""

import random

import numpy as np
import pytest
import sacrebleu

from eval.statistics import bootstrap_totals, mcnemar, paired_totals
from eval.tasks import texts

# The example of the package rouge-score's README, and its values.
TARGET = "The quick brown fox jumps over the lazy dog"
ANSWER = "The quick brown dog jumps on the log."


def test_rouge_is_what_rouge_score_publishes() -> None:
    assert texts.rouge_n(ANSWER, TARGET, 1) == pytest.approx(0.7058823529411765)
    assert texts.rouge_l(ANSWER, TARGET) == pytest.approx(0.5882352941176471)
    # of 7 and 8 pairs of words the answer and the target share "the quick" and "quick brown"
    assert texts.rouge_n(ANSWER, TARGET, 2) == pytest.approx(2 * 2 / (7 + 8))
    assert texts.rouge_n("", TARGET, 1) == texts.rouge_l(ANSWER, "") == 0.0


def test_rouge_counts_repeated_words_and_chinese_characters() -> None:
    assert texts.rouge_n("a a a", "a b", 1) == pytest.approx(2 / 5)
    assert texts.rouge_words("北京 is 大") == ["北", "京", "is", "大"]
    assert texts.rouge_l("北京大", "北大") == pytest.approx(4 / 5)


def corpus() -> tuple[list[str], list[list[str]]]:
    words = ["the", "a", "quick", "fox", "jumps", "over", "dog", ",", ".", "3", "1,000", "it's"]
    drawn = random.Random(0)
    answers = [" ".join(drawn.choices(words, k=drawn.randint(1, 14))) for _ in range(12)]
    references = [
        [" ".join(drawn.choices(words, k=drawn.randint(1, 14))) for _ in range(2)]
        for _ in range(12)
    ]
    references[3] = [answers[3], "dog"]
    return answers, references


def test_chrf_and_bleu_are_sacrebleus() -> None:
    answers, references = corpus()
    streams = [list(stream) for stream in zip(*references, strict=True)]
    chrf = np.array([texts.chrf_counts(a, r) for a, r in zip(answers, references, strict=True)])
    found = float(texts.chrf(chrf.sum(axis=0)))
    assert found == pytest.approx(sacrebleu.corpus_chrf(answers, streams).score, abs=1e-9)
    bleu = np.array([texts.bleu_counts(a, r) for a, r in zip(answers, references, strict=True)])
    found = float(texts.bleu(bleu.sum(axis=0)))
    assert found == pytest.approx(sacrebleu.corpus_bleu(answers, streams).score, abs=1e-9)
    # of single rows
    for row, answer in enumerate(answers):
        expected = sacrebleu.sentence_chrf(answer, references[row]).score
        assert float(texts.chrf(chrf[row])) == pytest.approx(expected, abs=1e-9)


def test_figures_of_sums_have_intervals() -> None:
    answers, references = corpus()
    chrf = np.array([texts.chrf_counts(a, r) for a, r in zip(answers, references, strict=True)])
    found = bootstrap_totals(chrf, texts.chrf, resamples=200, seed=0)
    assert found.low < found.estimate < found.high
    same = paired_totals(chrf, chrf, texts.chrf, resamples=50, seed=0)
    assert (same.estimate, same.low, same.high) == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="N >= 1"):
        bootstrap_totals(np.zeros((0, 2)), texts.chrf, resamples=1, seed=0)


def test_paired_totals_take_out_what_rows_differ_by() -> None:
    rng = np.random.default_rng(0)
    base = np.stack([rng.normal(0, 100, 60), np.ones(60)], axis=1)
    better = base + np.stack([1 + rng.normal(0, 0.1, 60), np.zeros(60)], axis=1)
    found = paired_totals(
        base, better, lambda sums: sums[..., 0] / sums[..., 1], resamples=300, seed=0
    )
    assert 0.9 < found.low < found.estimate < found.high < 1.1


def test_mcnemar_by_hand() -> None:
    # 1 row lost, 5 won: 2 x (C(6,0) + C(6,1)) / 2^6
    before, after = [1, 0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1, 1]
    assert mcnemar(list(map(bool, before)), list(map(bool, after))) == pytest.approx(14 / 64)
    assert mcnemar([True, False], [True, False]) == 1.0
    from scipy.stats import binomtest

    found = mcnemar([True] * 3 + [False] * 9, [False] * 3 + [True] * 9)
    assert found == pytest.approx(binomtest(3, 12).pvalue)
