"""What columns are called: the words by which a column is known as a part of a row's content.

    question    what is asked: prompt, question, query, instruction, problem, input
    context     what stands beside the question: input, context
    answer      what is to be learnt: completion, response, answer, output, solution, target
    sides       a better and a worse answer: chosen and rejected, with or without a noun
    two         two answers of which one was preferred: response_a and response_b

A name counts in any case, with blanks or hyphens for underscores.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# the plainest first: where several stand in a row, the first one is read
QUESTIONS = (
    "prompt",
    "question",
    "query",
    "instruction",
    "instructions",
    "problem",
    "input",
    "inputs",
    "user_prompt",
)
CONTEXTS = ("input", "context", "context_messages")
ANSWERS = (
    "completion",
    "response",
    "answer",
    "output",
    "outputs",
    "solution",
    "target",
    "targets",
    "generation",
    "reply",
)
SYSTEMS = ("system", "system_prompt", "system_message")
HISTORIES = ("history", "chat_history", "conversation_history")
REASONS = ("complex_cot", "reasoning", "reasoning_content", "thinking", "cot", "chain_of_thought")
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "trajectory")
# what a question may be about: content, but in no known place of a prompt
PASSAGES = (
    "body",
    "passage",
    "document",
    "paragraph",
    "article",
    "story",
    "background",
    "options",
    "choices",
)
# columns that say whether a row's answer is good
JUDGEMENTS = (
    "label",
    "kto_tag",
    "is_safe",
    "is_good",
    "is_correct",
    "is_chosen",
    "is_preferred",
    "desirable",
    "accepted",
)
# names that mean a question only together with their answer's name: they are also names of people
_SPEAKERS = (("user", "assistant"), ("human", "assistant"), ("human", "bot"), ("q", "a"))

_NOUN = (
    r"(responses?|answers?|completions?|outputs?|generations?|replies|reply|resp|texts?|"
    r"messages?|contents?|conversations?|traj(ectory|ectories)?|solutions?|summary)"
)
_GOOD, _BAD = "chosen|preferred|accepted", "rejected|dispreferred|non_?preferred|unpreferred"
_BETTER, _WORSE = "pos|positive|better|good|win(ner|ning)?", "neg|negative|worse|bad|los(er|ing)"


def _sides(plain: str, noun: str) -> re.Pattern[str]:
    """Names of a side: the words of `plain` alone or with a noun, those of `noun` with one."""
    return re.compile(rf"({plain})(_{_NOUN})?|{_NOUN}_({plain})|({noun})_{_NOUN}|{_NOUN}_({noun})")


_CHOSEN, _REJECTED = _sides(_GOOD, _BETTER), _sides(_BAD, _WORSE)
_FAMILY = re.compile(
    r"(response|answer|completion|output|reply|generation|solution|summary|conversation|text)"
    r"_?([0-9]|[a-d]|left|right)"
)
_ORDERS = (("0", "1"), ("1", "2"), ("a", "b"), ("left", "right"))
# a number or a letter after the noun: one of several answers
_ANSWER = re.compile(
    r"(generated_)?"
    r"(responses?|answers?|completions?|outputs?|solutions?|generations?|targets?|replies|reply|"
    r"summary|summaries|instances)(_?[0-9]{1,2}|_[a-z]|_text)?"
)
_QUESTION = frozenset(
    (*QUESTIONS, *CONTEXTS, *SYSTEMS, *HISTORIES, *TURNS, *PASSAGES, "prompts", "questions")
)


def plain(name: str) -> str:
    """A name in lower case, its words joined by underscores."""
    return re.sub(r"[\s.\-]+", "_", name.strip()).lower()


@dataclass(frozen=True, slots=True)
class Roles:
    """Which column has which part in a row; "" (which no row has) for a part that it lacks."""

    question: str = ""
    context: str = ""
    system: str = ""
    history: str = ""
    answer: str = ""
    reference: str = ""  # the final answer beside a whole solution
    reason: str = ""
    chosen: str = ""
    rejected: str = ""
    judgement: str = ""
    two: tuple[str, str] = ("", "")
    suffixes: tuple[str, str] = ("", "")  # of the two answers' names

    @property
    def asked(self) -> tuple[str, ...]:
        """The columns that a prompt is made of."""
        parts = (self.question, self.context, self.system, self.history)
        return tuple(part for part in parts if part)


def roles_of(row: Mapping[str, Any]) -> Roles:
    """The parts of a row by its columns' names."""
    return _roles(tuple(key for key in row if isinstance(key, str)))


@lru_cache(maxsize=512)
def _roles(names: tuple[str, ...]) -> Roles:
    by_plain: dict[str, str] = {}
    for name in names:
        by_plain.setdefault(plain(name), name)

    def first(words: Sequence[str]) -> str:
        return next((by_plain[word] for word in words if word in by_plain), "")

    question, answer = first(QUESTIONS), first(ANSWERS)
    if not (question and answer):
        for asked, said in _SPEAKERS:
            if asked in by_plain and said in by_plain:
                question, answer = by_plain[asked], by_plain[said]
    reference, whole = by_plain.get("answer", ""), first(("completion", "solution"))
    if reference and whole:
        answer = whole
    else:
        reference = ""
    two, suffixes = _two(by_plain)
    return Roles(
        question=question,
        context=next((by_plain[w] for w in CONTEXTS if by_plain.get(w, question) != question), ""),
        system=first(SYSTEMS),
        history=first(HISTORIES),
        answer=answer,
        reference=reference,
        reason=first(REASONS),
        chosen=next((n for p, n in by_plain.items() if _CHOSEN.fullmatch(p)), ""),
        rejected=next((n for p, n in by_plain.items() if _REJECTED.fullmatch(p)), ""),
        judgement=first(JUDGEMENTS),
        two=two,
        suffixes=suffixes,
    )


def _two(by_plain: Mapping[str, str]) -> tuple[tuple[str, str], tuple[str, str]]:
    """Two answers of one name, such as response_a and response_b, and how their names end."""
    families: dict[str, dict[str, str]] = {}
    for word, name in by_plain.items():
        match = _FAMILY.fullmatch(word)
        if match:
            families.setdefault(match[1], {})[match[2]] = name
    for members in families.values():
        for order in _ORDERS:
            if set(members) == set(order):
                return (members[order[0]], members[order[1]]), order
    return ("", ""), ("", "")


def is_answer(name: str) -> bool:
    """Whether a column of this name holds an answer, or one of several."""
    word = plain(name)
    return any(p.fullmatch(word) for p in (_ANSWER, _CHOSEN, _REJECTED)) or word == "text"


def is_question(name: str) -> bool:
    """Whether a column of this name holds a question, or what belongs before one."""
    return plain(name) in _QUESTION


def is_known(name: str) -> bool:
    """Whether a name says by itself what the column is."""
    return is_question(name) or is_answer(name) or plain(name) in (*JUDGEMENTS, *REASONS)


def holds_content(value: Any) -> bool:
    """Whether a value is a text, a conversation or texts rather than a number or nothing."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, (list, tuple)):
        return any(isinstance(part, (str, Mapping, list, tuple)) and part for part in value)
    return isinstance(value, Mapping) and bool(value)
