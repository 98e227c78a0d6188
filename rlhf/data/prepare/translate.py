"""The step `back_translate`: a new training row for each row, its text translated into another
language and back (Sennrich et al. 2016; as augmentation Edunov et al. 2018). What is changed, and
where new rows go, is as in the step `augment`.
"""

from collections.abc import Iterator, Sequence

from conf.preparation.augmentation import BackTranslate
from rlhf.data.prepare.asked import asked, changed, may_grow, text_at
from rlhf.data.prepare.items import Context, Item
from rlhf.data.prepare.translators import Translator, make_translator
from rlhf.types import UserError


def there_and_back(
    texts: Sequence[str], translator: Translator, source: str, pivot: str
) -> dict[str, str]:
    """Each different text with its back-translation; empty where either direction gave nothing."""
    distinct = list(dict.fromkeys(texts))
    between = translator.translate(distinct, source, pivot) if distinct else []
    kept = [
        (text, middle) for text, middle in zip(distinct, between, strict=True) if middle.strip()
    ]
    back = translator.translate([middle for _, middle in kept], pivot, source) if kept else []
    return dict.fromkeys(distinct, "") | {
        text: translation.strip() for (text, _), translation in zip(kept, back, strict=True)
    }


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def back_translate(
    options: BackTranslate,
    items: Iterator[Item],
    context: Context,
    translator: Translator | None = None,
) -> Iterator[Item]:
    """Yield every row, each row of the training split followed by its new row. A translation that
    is empty or equals the original gives no row and is counted.

    Raises UserError before a split, and for a translator that can't be loaded.
    """
    if not context.split_done:
        raise UserError(
            "step back_translate: expected a split step before it, so that no copy of a held-out "
            "row trains."
        )
    rows = list(items)
    translator = translator or make_translator(options)
    keys = [asked(item.columns, context.kind) if may_grow(item) else [] for item in rows]
    texts = [
        text_at(item.columns, where)
        for item, parts in zip(rows, keys, strict=True)
        for where in parts
    ]
    translated = there_and_back(texts, translator, options.source, options.pivot)
    counts = {
        "rows": sum(map(may_grow, rows)),
        "texts": len(translated),
        "new": 0,
        "empty": 0,
        "equal": 0,
        "nothing_asked": 0,
    }
    context.figures["counts"] = counts
    for item, parts in zip(rows, keys, strict=True):
        yield item
        if not may_grow(item):
            continue
        new = {where: translated[text_at(item.columns, where)] for where in parts}
        if not parts:
            counts["nothing_asked"] += 1
        elif not all(new.values()):
            counts["empty"] += 1
        elif all(
            _plain(text) == _plain(text_at(item.columns, where)) for where, text in new.items()
        ):
            counts["equal"] += 1
        else:
            counts["new"] += 1
            yield changed(item, new, "back_translation")
