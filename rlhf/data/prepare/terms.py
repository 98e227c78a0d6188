"""The step `terms`: other words for one thing become its canonical term.

The dictionary is a YAML file, `canonical term: [other word, ...]`. Whole words are exchanged, the
longest first and in one pass, so that what was put in is never changed again; a canonical term that
stands in the text already is left alone, and with it any shorter word inside it. An entry without
other words only protects its term. A word in small letters is found in any capitals, and a term in
small letters takes on those of what it replaces; a word with capitals of its own is found as it is
written. In scripts without spaces between words (Chinese, Japanese, Thai ...) a word is found
wherever it stands: protect the longer words that contain it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from conf.preparation.annotation import Terms
from rlhf.data.prepare.items import Context, Item, replace_texts
from rlhf.data.prepare.texts import emptied
from rlhf.data.prepare.words import bounded, in_case_of, read_yaml, word_list
from rlhf.types import UserError

REPORT_FILE = "terms.jsonl"  # a line for each row that was changed
_EXAMPLES = 20  # changed rows in the figures


@dataclass(frozen=True, slots=True)
class Dictionary:
    """Words to look for, and the term that each becomes."""

    pattern: Any  # of regex
    exact: Mapping[str, str]  # as written -> canonical; also every canonical term to itself
    small: Mapping[str, str]  # words in small letters, found in any capitals -> canonical


def read_dictionary(path: str) -> Dictionary:
    """The dictionary in a YAML file. Raises UserError: not a mapping of terms to words, no word at
    all, a word of two terms, a term that is another term's word.
    """
    content = read_yaml(path, "step terms: dictionary")
    if not isinstance(content, dict):
        raise UserError(
            f"step terms: dictionary={path}: expected a mapping of each term to its other words, "
            f"found {type(content).__name__}."
        )
    terms = {
        word_list([term], f"step terms: dictionary={path}")[0]: word_list(
            words, f"step terms: dictionary={path}, {term}"
        )
        for term, words in content.items()
    }
    return make_dictionary(terms, f"step terms: dictionary={path}")


def make_dictionary(terms: Mapping[str, list[str]], where: str) -> Dictionary:
    """A dictionary of canonical terms and their other words. Raises UserError as
    `read_dictionary`.
    """
    import regex

    owner: dict[str, str] = {}
    for term, words in terms.items():
        for word in words:
            if owner.setdefault(word.lower(), term) != term:
                raise UserError(
                    f"{where}: {word!r} stands for {owner[word.lower()]!r} and for {term!r}: "
                    "expected one of them."
                )
    if not owner:
        raise UserError(f"{where}: no term has another word, so there is nothing to exchange.")
    for term in terms:
        other = owner.get(term.lower(), term)
        if other != term:
            raise UserError(
                f"{where}: {term!r} is a term and another word for {other!r}: expected one of them."
            )
    exact = {
        word: term for term, words in terms.items() for word in words if not word.islower()
    } | {term: term for term in terms}
    small = {word: term for term, words in terms.items() for word in words if word.islower()}
    small = {term: term for term in terms if term.islower()} | small
    # longer words first: a shorter word inside of one is not looked for
    ordered = sorted({*exact, *small}, key=lambda word: (-len(word), word))
    patterns = [f"(?i:{bounded(word)})" if word in small else bounded(word) for word in ordered]
    pattern = regex.compile("|".join(patterns), regex.V1)
    return Dictionary(pattern, exact, small)


def exchange(text: str, dictionary: Dictionary, changes: Counter[tuple[str, str]]) -> str:
    """`text` with canonical terms; what was exchanged is added to `changes` as (term, word as the
    dictionary has it).
    """

    def replaced(match: Any) -> str:
        matched = match.group()
        word = matched if matched in dictionary.exact else matched.lower()
        if word in dictionary.exact:
            term = dictionary.exact[word]
            new = term
        else:
            term = dictionary.small.get(word, "")
            # capitals that small letters don't come back from, such as a dotted I: leave what is
            # not surely the word
            if not term:
                return matched
            new = in_case_of(matched, term)
        if word == term or new == matched:
            return matched
        changes[term, word] += 1
        return new

    return dictionary.pattern.sub(replaced, text)


def terms(options: Terms, items: Iterator[Item], context: Context) -> Iterator[Item]:
    """Yield every row with its texts in canonical terms; a pair whose sides become equal is left
    out.

    The figures hold the rows changed, and for each term its words, how often and in how many rows
    they were exchanged. Raises UserError as `read_dictionary`.
    """
    dictionary = read_dictionary(options.dictionary)
    counts: dict[str, dict[str, Any]] = {}
    examples: list[dict[str, str]] = []
    context.figures.update(rows_changed=0, exchanges=0, terms=counts, examples=examples)
    context.folder.mkdir(parents=True, exist_ok=True)
    with (context.folder / REPORT_FILE).open("w", encoding="utf-8") as report:
        for item in items:
            changes: Counter[tuple[str, str]] = Counter()

            def change(where: str, text: str, into: Counter[tuple[str, str]] = changes) -> str:
                if options.columns and where.partition("[")[0] not in options.columns:
                    return text
                return exchange(text, dictionary, into)

            columns = replace_texts(item.columns, change)
            problem = emptied(item.columns, columns) if changes else None
            if problem is not None:  # two sides that differed in their words alone
                context.rejected(item, f"with canonical terms {problem}")
                continue
            if changes:
                context.figures["rows_changed"] += 1
                context.figures["exchanges"] += changes.total()
                for (term, word), times in changes.items():
                    row = counts.setdefault(term, {"exchanges": 0, "rows": 0, "words": {}})
                    row["exchanges"] += times
                    row["words"][word] = row["words"].get(word, 0) + times
                for term in {term for term, _ in changes}:
                    counts[term]["rows"] += 1
                exchanged = [f"{word} -> {term}" for term, word in changes]
                report.write(
                    json.dumps(
                        {"file": item.origin, "row": item.number, "exchanged": exchanged},
                        ensure_ascii=False,
                    )
                    + "\n"
                )
                if len(examples) < _EXAMPLES:
                    examples.append({"place": item.place, "exchanged": "; ".join(exchanged)})
                item.columns = columns
            yield item
