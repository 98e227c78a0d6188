"""Verifiable instructions, with the names and arguments of IFEval (Zhou et al. 2023,
arXiv:2311.07911), and a few more.

A row's column holds a list of {"id": ..., arguments}, or that list as JSON text. Arguments that are
null, as in IFEval's files, are ignored. Departures from IFEval: sentences are counted by their
closing marks (IFEval: NLTK's punkt); the constraints on case don't check that the text is English;
instead of a language, which would be guessed, a script is checked (language:script). An empty
response follows no instruction, as in IFEval.
"""

import json
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from conf.schema import RewardTerm
from reward.verifiers.extract import fenced_or_all
from reward.verifiers.text import parse_json
from rlhf.process.wording import describe, nearest

RELATIONS: dict[str, Callable[[int, int], bool]] = {
    "at least": operator.ge,
    "less than": operator.lt,
    "at most": operator.le,
    "more than": operator.gt,
    "exactly": operator.eq,
}
_KINDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "whole number": (int,),
    "list of texts": (list,),
    "relation": (str,),
}


# --- counting


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def sentences(text: str) -> int:
    """The number of parts that hold a word, where the text is split at closing marks and empty
    lines.
    """
    parts = re.split(r"(?:[.!?]+[\"')\]]*(?=\s|$))|[\u3002\uff01\uff1f]+|\n\s*\n", text)
    return sum(bool(re.search(r"\w", part)) for part in parts)


def paragraphs(text: str, separator: str) -> list[str]:
    """The text split at the pattern `separator`, without empty parts at both ends; an empty part
    in between counts as a paragraph.
    """
    parts = re.split(separator, text)
    while parts and not parts[0].strip():
        parts.pop(0)
    while parts and not parts[-1].strip():
        parts.pop()
    return parts


def occurrences(text: str, keyword: str) -> int:
    """How often a word or phrase occurs as a whole, ignoring case."""
    return len(re.findall(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE))


def in_script(text: str, script: str) -> bool:
    """Whether all letters are of the script, by their Unicode names: LATIN, CYRILLIC, GREEK,
    ARABIC, HEBREW, HANGUL, CJK, HIRAGANA ... False for a text without letters.
    """
    names = [unicodedata.name(c, "") for c in text if c.isalpha()]
    return bool(names) and all(name.startswith(script.upper()) for name in names)


def _is_json(text: str) -> bool:
    try:
        parse_json(fenced_or_all(text, ("json",)))
    except ValueError:
        return False
    return True


def _sections(text: str, splitter: str) -> int:
    return len(re.findall(rf"\s?{re.escape(splitter)}\s?\d+\s?", text))


def _highlights(text: str) -> int:
    parts = re.findall(r"(?<!\*)\*([^\n*]+)\*(?!\*)", text)
    parts += re.findall(r"\*\*([^\n*]+)\*\*", text)
    return sum(bool(part.strip()) for part in parts)


def _nth_first_word(text: str, count: int, nth: int, first: str) -> bool:
    parts = paragraphs(text, r"\n\n")
    if len(parts) != count or not parts[nth - 1].split():
        return False
    return parts[nth - 1].split()[0].strip("'\".,?!").lower() == first.lower()


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in paragraphs(text, r"\*{6}")]
    return len(parts) == 2 and parts[0] != parts[1] and all(parts)


# --- the instructions


@dataclass(frozen=True, slots=True)
class Instruction:
    """A kind of constraint: its arguments by name and kind, and the function that tells whether a
    text (which is not empty) follows it.
    """

    arguments: Mapping[str, str]
    followed: Callable[[str, Mapping[str, Any]], bool]


def _counted(
    count: Callable[[str], int], number: str, relation: str | None = "relation"
) -> Instruction:
    """A count that the argument `number` bounds: by the relation of the argument `relation`, or
    exactly where that is None.
    """
    names = {number: "whole number"}
    if relation is not None:
        names[relation] = "relation"

    def followed(text: str, arguments: Mapping[str, Any]) -> bool:
        wanted = "exactly" if relation is None else arguments[relation]
        return RELATIONS[wanted](count(text), arguments[number])

    return Instruction(names, followed)


INSTRUCTIONS: dict[str, Instruction] = {
    "keywords:existence": Instruction(
        {"keywords": "list of texts"}, lambda t, a: all(occurrences(t, k) for k in a["keywords"])
    ),
    "keywords:forbidden_words": Instruction(
        {"forbidden_words": "list of texts"},
        lambda t, a: not any(occurrences(t, k) for k in a["forbidden_words"]),
    ),
    "keywords:frequency": Instruction(
        {"keyword": "text", "frequency": "whole number", "relation": "relation"},
        lambda t, a: RELATIONS[a["relation"]](occurrences(t, a["keyword"]), a["frequency"]),
    ),
    "keywords:letter_frequency": Instruction(
        {"letter": "text", "let_frequency": "whole number", "let_relation": "relation"},
        lambda t, a: RELATIONS[a["let_relation"]](
            t.lower().count(a["letter"].lower()), a["let_frequency"]
        ),
    ),
    "length_constraints:number_words": _counted(lambda t: len(words(t)), "num_words"),
    "length_constraints:number_sentences": _counted(sentences, "num_sentences"),
    "length_constraints:number_paragraphs": _counted(
        lambda t: len(paragraphs(t, r"\s?\*\*\*\s?")), "num_paragraphs", None
    ),
    "length_constraints:number_characters": _counted(len, "num_characters"),  # not in IFEval
    "length_constraints:nth_paragraph_first_word": Instruction(
        {"num_paragraphs": "whole number", "nth_paragraph": "whole number", "first_word": "text"},
        lambda t, a: _nth_first_word(t, a["num_paragraphs"], a["nth_paragraph"], a["first_word"]),
    ),
    "detectable_content:number_placeholders": Instruction(
        {"num_placeholders": "whole number"},
        lambda t, a: len(re.findall(r"\[[^\[\]\n]+\]", t)) >= a["num_placeholders"],
    ),
    "detectable_content:postscript": Instruction(
        {"postscript_marker": "text"},
        lambda t, a: re.search(rf"(?im)^\s*{re.escape(a['postscript_marker'])}.*\S", t) is not None,
    ),
    "detectable_format:number_bullet_lists": _counted(
        lambda t: len(re.findall(r"(?m)^\s*[*\-•](?![*\-])\s*\S.*$", t)), "num_bullets", None
    ),
    "detectable_format:number_highlighted_sections": Instruction(
        {"num_highlights": "whole number"}, lambda t, a: _highlights(t) >= a["num_highlights"]
    ),
    "detectable_format:multiple_sections": Instruction(
        {"section_spliter": "text", "num_sections": "whole number"},
        lambda t, a: _sections(t, a["section_spliter"]) >= a["num_sections"],
    ),
    "detectable_format:title": Instruction(
        {}, lambda t, a: re.search(r"<<[^\n<>]*\w[^\n<>]*>>", t) is not None
    ),
    "detectable_format:json_format": Instruction({}, lambda t, a: _is_json(t)),
    "change_case:english_capital": Instruction({}, lambda t, a: t.isupper()),
    "change_case:english_lowercase": Instruction({}, lambda t, a: t.islower()),
    "change_case:capital_word_frequency": _counted(
        lambda t: sum(w.isupper() for w in words(t)), "capital_frequency", "capital_relation"
    ),
    "startend:start_checker": Instruction(
        {"start_phrase": "text"},
        lambda t, a: t.strip().lower().startswith(a["start_phrase"].strip().lower()),
    ),
    "startend:end_checker": Instruction(
        {"end_phrase": "text"},
        lambda t, a: t.strip().strip('"').lower().endswith(a["end_phrase"].strip().lower()),
    ),
    "startend:quotation": Instruction(
        {}, lambda t, a: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"'
    ),
    "punctuation:no_comma": Instruction({}, lambda t, a: "," not in t),
    "combination:two_responses": Instruction({}, lambda t, a: _two_responses(t)),
    "combination:repeat_prompt": Instruction(
        {"prompt_to_repeat": "text"},
        lambda t, a: t.strip().lower().startswith(a["prompt_to_repeat"].strip().lower()),
    ),
    # not in IFEval
    "language:script": Instruction({"script": "text"}, lambda t, a: in_script(t, a["script"])),
}


def _fits(value: Any, kind: str) -> bool:
    """Whether an argument's value is of its kind."""
    known: tuple[type, ...] = _KINDS[kind]
    if type(value) not in known:  # so that true is no number
        return False
    if kind == "relation":
        return value in RELATIONS
    if kind == "whole number":
        return bool(value >= 0)
    if kind == "list of texts":
        return bool(value) and all(isinstance(item, str) and item for item in value)
    return bool(value != "")


def read_constraint(value: Any) -> tuple[Instruction, dict[str, Any]]:
    """An object {"id": ..., arguments} as the instruction and its arguments. Raises ValueError for
    an unknown instruction, and for arguments that don't fit it.
    """
    if not isinstance(value, dict) or not isinstance(value.get("id"), str):
        raise ValueError(f"expected an object with an id, found {describe(value)}")
    name = value["id"]
    instruction = INSTRUCTIONS.get(name)
    if instruction is None:
        raise ValueError(
            f"there is no constraint {name!r}; nearest: {nearest(name, list(INSTRUCTIONS))!r}; "
            f"all: {', '.join(INSTRUCTIONS)}"
        )
    given = {
        key: argument for key, argument in value.items() if key != "id" and argument is not None
    }
    if set(given) != set(instruction.arguments):
        raise ValueError(
            f"{name}: expected the arguments {', '.join(instruction.arguments) or 'none'}; found "
            f"{', '.join(given) or 'none'}"
        )
    for key, kind in instruction.arguments.items():
        argument = given[key]
        if isinstance(argument, float) and argument.is_integer():
            given[key] = argument = int(argument)  # data frames write integers beside nulls so
        if not _fits(argument, kind):
            wanted = f"one of {', '.join(RELATIONS)}" if kind == "relation" else f"a {kind}"
            raise ValueError(f"{name}: {key}: expected {wanted}, found {describe(argument)}")
    if "nth_paragraph" in given and not 1 <= given["nth_paragraph"] <= given["num_paragraphs"]:
        raise ValueError(
            f"{name}: nth_paragraph={given['nth_paragraph']}: expected 1 to "
            f"num_paragraphs={given['num_paragraphs']}"
        )
    return instruction, given


class Instructions:
    """The share of the row's constraints that the response follows; with all_or_nothing 1 for all
    of them, else 0.
    """

    workers = 1

    def __init__(self, term: RewardTerm) -> None:
        self.columns: tuple[str, ...] = (term.column or "constraints",)
        self.all_or_nothing = term.all_or_nothing

    def reference(self, *values: Any) -> list[tuple[Instruction, dict[str, Any]]]:
        constraints = json.loads(values[0]) if isinstance(values[0], str) else values[0]
        if not isinstance(constraints, list) or not constraints:
            raise ValueError(f"expected a list of constraints, found {describe(constraints)}")
        return [read_constraint(constraint) for constraint in constraints]

    def score(self, response: str, reference: list[tuple[Instruction, dict[str, Any]]]) -> float:
        if not response.strip():
            return 0.0
        followed = sum(
            instruction.followed(response, arguments) for instruction, arguments in reference
        )
        if self.all_or_nothing:
            return float(followed == len(reference))
        return followed / len(reference)
