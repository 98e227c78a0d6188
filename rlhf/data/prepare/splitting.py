"""Step split: whole clusters of prompts are drawn until a share of the rows is held out."""

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from conf.preparation.base import Part
from conf.preparation.sampling import Split, SplitBy
from rlhf.data.prepare.balance import column_groups
from rlhf.data.prepare.clusters import beside_pictures, components, members
from rlhf.data.prepare.held import Mapped, gathered, picked
from rlhf.data.prepare.items import Context, Item, prompt_of
from rlhf.data.prepare.near import near_clusters
from rlhf.data.prepare.texts import noting
from rlhf.types import UserError


def draw(
    groups: Sequence[Sequence[int]], strata: Sequence[str], fraction: float, seed: int
) -> list[int]:
    """The rows to hold out: groups in random order, each taken where it brings the strata nearer to
    `fraction` of their rows. At least one group is taken, and never all of them. With a single
    stratum this is the usual draw, which no group may overshoot by more than half its size.
    """
    order = list(range(len(groups)))
    random.Random(f"{seed}:split").shuffle(order)
    totals = Counter(strata)
    wanted = {name: fraction * count for name, count in totals.items()}
    taken: Counter[str] = Counter()
    held: list[int] = []
    for index in order:
        inside = Counter(strata[row] for row in groups[index])
        # Only the strata of this group change; nearer means a smaller sum of squared differences.
        gain = sum(
            (wanted[s] - taken[s]) ** 2 - (wanted[s] - taken[s] - n) ** 2 for s, n in inside.items()
        )
        if gain > 0:
            taken.update(inside)
            held.append(index)
    if not held:
        held = [min(order, key=lambda i: len(groups[i]))]
    if len(held) == len(groups):
        held.remove(max(held, key=lambda i: len(groups[i])))
    return sorted(row for index in held for row in groups[index])


def _clusters(
    options: Split, rows: Sequence[Item], shown: Sequence[tuple[str, ...]], seed: int
) -> list[int]:
    """The number of each row's cluster of prompts. Prompts about different pictures (`shown` by
    each row) are different ones; those that share a picture belong together.
    """
    texts = Mapped(lambda item: (prompt_of(item.columns), ""), rows)

    def cluster(some: Sequence[int]) -> Any:
        return near_clusters(
            texts if len(some) == len(rows) else picked(texts, array("Q", some)),
            threshold=options.threshold,
            ngram=options.ngram,
            count=options.permutations,
            seed=seed,
        )

    labels = beside_pictures(shown, cluster)
    first: dict[str, int] = {}  # row that shows a picture
    pairs = [(row, first.setdefault(one, row)) for row, all_ in enumerate(shown) for one in all_]
    if not pairs:
        return labels
    of_cluster: dict[int, int] = {}
    pairs += [(row, of_cluster.setdefault(label, row)) for row, label in enumerate(labels)]
    left, right = zip(*pairs, strict=True)
    together: list[int] = components(len(rows), left, right).tolist()
    return together


def split(options: Split, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Set each row's split. Raises UserError where all rows have one prompt."""
    shown: list[tuple[str, ...]] = []
    rows = gathered(noting(items, Part.prompt, shown), context.folder)
    if len(rows) < 2:
        raise UserError(f"step split: {len(rows)} rows can't be split: expected at least 2.")
    if options.by is SplitBy.row:
        groups = [[index] for index in range(len(rows))]
    else:
        groups = members(_clusters(options, rows, shown, context.seed))
    if len(groups) < 2:
        raise UserError(
            f"step split: all {len(rows)} prompts are one or near duplicates "
            f"(threshold={options.threshold:g}), so no cluster of them can be held "
            "out. Set by=row to hold out rows of a data set with one prompt for all, or raise "
            "the threshold."
        )
    strata = [""] * len(rows)
    if options.stratify is not None:
        strata = column_groups(rows, options.stratify, "split")
    held = set(draw(groups, strata, options.fraction, context.seed))
    for index, item in enumerate(rows):
        item.split = "eval" if index in held else "train"
        yield item
    largest = max(map(len, groups))
    context.figures.update(
        train=len(rows) - len(held),
        eval=len(held),
        groups=len(groups),
        largest_group=largest,
        seed=context.seed,
    )
    if options.stratify is not None:
        held_of = Counter(strata[i] for i in held)
        shares = {
            name: round(held_of[name] / count, 4) for name, count in sorted(Counter(strata).items())
        }
        context.figures["held_out_share"] = shares
    names = "".join(f"{rows[i].origin}\t{rows[i].number}\n" for i in sorted(held))
    # the same rows, the same split
    context.figures["eval_rows_sha256"] = hashlib.sha256(
        names.encode("utf-8", "surrogatepass")
    ).hexdigest()
