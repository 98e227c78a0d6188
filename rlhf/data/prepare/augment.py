"""The step `augment`: new training rows by easy data augmentation, see rlhf/data/prepare/eda.py.

Only rows of the training split grow, so that no copy of a held-out row trains. A pair's prompt is
changed once for both sides. A new row follows its original and says in its columns `augmented` (the
operation) and `augmented_from` (file and row).
"""

import random
from collections.abc import Iterator

from conf.preparation.augmentation import Augment
from rlhf.data.prepare.asked import asked, changed, may_grow, text_at
from rlhf.data.prepare.eda import OPERATIONS, Change, Synonyms, cut, read_synonyms
from rlhf.data.prepare.items import Context, Item
from rlhf.types import UserError


def copies(
    item: Item, options: Augment, synonyms: Synonyms, context: Context, counts: dict[str, int]
) -> Iterator[Item]:
    """Up to `options.copies` new rows. A copy that equals its original or another copy is left out
    and counted. What is drawn depends on the seed and the row alone, not on the rows before it.
    """
    keys = asked(item.columns, context.kind)
    if not keys:
        counts["nothing_asked"] += 1
        return
    originals = {where: text_at(item.columns, where) for where in keys}
    pieces = {where: cut(text, options.language.value) for where, text in originals.items()}
    rng = random.Random(f"{context.seed}:augment:{item.origin}:{item.number}")
    first = rng.randrange(len(options.operations))
    seen = [originals]
    for number in range(options.copies):
        name = options.operations[(first + number) % len(options.operations)].value
        change = Change(
            rng, options.share, synonyms, frozenset(word.lower() for word in options.keep)
        )
        texts = {
            where: OPERATIONS[name](words, change) if words.words else originals[where]
            for where, words in pieces.items()
        }
        if texts in seen or not all(text.strip() for text in texts.values()):
            counts["unchanged"] += 1
            continue
        seen.append(texts)
        counts[name] += 1
        yield changed(item, texts, name)


def augment(options: Augment, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Yield every row, each row of the training split followed by its new ones. Raises UserError
    before a split, and for synonyms that can't be read.
    """
    if not context.split_done:
        raise UserError(
            "step augment: expected a split step before it, so that no copy of a held-out row "
            "trains."
        )
    synonyms = read_synonyms(options.synonyms) if options.synonyms is not None else Synonyms({})
    counts = {
        "rows": 0,
        **{operation.value: 0 for operation in options.operations},
        "unchanged": 0,
        "nothing_asked": 0,
    }
    context.figures["counts"] = counts
    for item in items:
        yield item
        if may_grow(item):
            counts["rows"] += 1
            yield from copies(item, options, synonyms, context, counts)
