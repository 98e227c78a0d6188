"""Several answers to one question with what was said of them: two with the better one's name
(PKU-SafeRLHF, HelpSteer3, WebGPT, arenas, Label Studio's JSON-MIN and CSV), or a list with ratings
(UltraFeedback, distilabel's generations); and OpenAI's comparisons of summaries.

    prompt, response_0, response_1, better_response_id      0 or 1
    question, answer_0, answer_1, score_0, score_1          the higher one is better
    prompt, answer1, answer2, comparison                    {"selected": "left"}
    conversation_a, conversation_b, winner                  model_a, model_b, tie
    context, response1, response2, overall_preference       -3 (the first) to 3 (the second)
    instruction, completions of {response, overall_score}, or generations with ratings
    problem, generations, correctness_math_verify           true or false of each generation

A tie gives no pair and is set aside. Two answers without a column that says which is better are
not guessed.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rlhf.data.formats.base import (
    Format,
    Made,
    Several,
    answer_like,
    make_pair,
    ranked,
)
from rlhf.data.formats.names import Roles, plain, roles_of
from rlhf.data.formats.questions import ASKED_INSIDE, has_question, pair_of_conversations, prompt_of
from rlhf.data.rows import Chat, Row, RowError, annotator_of, answer_of, finite, number_of, text_of
from rlhf.process.wording import describe

# ---- two answers ----

# columns that say which of two answers is better; the first one that a row has is taken
_CHOICES = (
    "better_response_id",
    "better_response",
    "better_answer",
    "preferred_response",
    "preferred",
    "preference",
    "winner",
    "choice",
    "chosen",
    "comparison",
    "selected",
    "verdict",
)
_GRADES = ("overall_preference", "preference_strength")  # below 0: the first is better
_SCORES = ("score", "rating", "reward")
_NONE = ("tie", "both", "neither", "none", "skip", "equal", "draw", "same", "")


def _choice_key(row: Row) -> str:
    """The column that says which of two answers is better; "" for none."""
    known = {plain(str(key)): str(key) for key in row}
    named = next((known[name] for name in (*_GRADES, *_CHOICES) if name in known), "")
    if named:
        return named
    return next((str(key) for key, value in row.items() if _selected(value) is not None), "")


def _selected(value: Any) -> Any:
    """What Label Studio's pairwise control selected, also as the text of a table's cell; None for
    any other value.
    """
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value.get("selected") if isinstance(value, Mapping) else None


def _score_keys(row: Row, roles: Roles) -> tuple[str, str] | None:
    """The columns of the two answers' scores, named as the answers are."""
    known = {plain(str(key)): str(key) for key in row}
    for name in _SCORES:
        for joint in ("_", ""):
            first, second = (f"{name}{joint}{suffix}" for suffix in roles.suffixes)
            if first in known and second in known:
                return known[first], known[second]
    return None


def _better(row: Row, roles: Roles) -> int | str:
    """1 or 2 for the better answer, or why there is none. Raises RowError for a value that says
    neither.
    """
    key = _choice_key(row)
    if plain(key) in _GRADES:
        grade = number_of(row, key)
        return f"a tie: {key} is 0" if grade == 0 else 1 + (grade > 0)
    if not key:
        scores = _score_keys(row, roles)
        assert scores is not None  # _is_compared
        first, second = (number_of(row, name) for name in scores)
        return f"a tie: both have {first:g}" if first == second else 1 + (second > first)
    value = row[key]
    selected = _selected(value)
    said = value if selected is None else selected
    if said is None:
        return f"not judged: {key} is null"
    word = plain(str(said))
    for number, (name, suffix) in enumerate(zip(roles.two, roles.suffixes, strict=True), start=1):
        side = ("left", "right")[number - 1] if selected is not None else suffix
        if word in (side, plain(name), f"model_{suffix}", f"response_{suffix}"):
            return number
    if word in _NONE or word.startswith(("tie", "both")):
        return f"a tie or a skip: {key} is {said!r}"
    raise RowError(
        f"key {key!r}: expected {roles.suffixes[0]} or {roles.suffixes[1]} (as in "
        f"{roles.two[0]!r} and {roles.two[1]!r}) or tie, found {describe(value)}"
    )


def _pairs_compared(row: Row) -> Several:
    roles = roles_of(row)
    better = _better(row, roles)
    if isinstance(better, str):
        return Several(set_aside=[better])
    answers = [answer_of(row, name) for name in roles.two]
    if better == 2:
        answers.reverse()
    chosen, rejected = answers
    if isinstance(chosen, list) and isinstance(rejected, list) and len(chosen) > 1:
        pair = pair_of_conversations(row, roles, chosen, rejected)
    else:
        prompt = prompt_of(row)
        sides = (answer_like(prompt, a) if isinstance(a, str) else a for a in answers)
        pair = make_pair(row, prompt, *sides)
    key = _choice_key(row)
    if plain(key) in _GRADES:
        pair = replace(pair, margin=abs(number_of(row, key)))
    return Several([Made(pair, {"position": better})])


def _prompt_compared(row: Row) -> str | Chat:
    if has_question(row):
        return prompt_of(row)
    pairs = _pairs_compared(row).pairs
    if not pairs:
        raise RowError("a tie between whole conversations: expected a prompt of its own")
    prompt: str | Chat = pairs[0].value.prompt
    return prompt


def _is_compared(row: Row) -> bool:
    roles = roles_of(row)
    if roles.chosen and roles.rejected:
        return False  # the sides themselves
    first, second = (row.get(name) for name in roles.two)
    if isinstance(first, list) and isinstance(second, list):
        whole = bool(first) and isinstance(first[0], Mapping)
    else:
        whole = isinstance(first, str) and isinstance(second, str) and has_question(row)
    return whole and bool(_choice_key(row) or _score_keys(row, roles))


def _columns_compared(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    roles = roles_of(row)
    key = _choice_key(row)
    if key and _selected(row[key]) is None:  # objects are carried
        return roles.asked, (*roles.two, key)
    return roles.asked, roles.two


def _note_compared(row: Row) -> str:
    roles = roles_of(row)
    key = _choice_key(row)
    if not key:
        return f"the higher of {' and '.join(_score_keys(row, roles) or ())} is better"
    others = [name for name in row if plain(str(name)).startswith("safer") and name != key]
    unread = f", not {', '.join(others)}," if others else ""
    return f"{key!r}{unread} says which of {roles.two[0]} and {roles.two[1]} is better"


COMPARED = Format(
    "compared",
    (),
    "a question with two answers (response_a, response_b; answer_0, answer_1 ...) and which is "
    "better (better_response_id, preference, winner, comparison, score_0 and score_1 ...)",
    pairs=_pairs_compared,
    prompt=_prompt_compared,
    test=_is_compared,
    find_columns=_columns_compared,
    read_inside=ASKED_INSIDE,
    note=_note_compared,
)

# ---- a list of answers ----

_LISTS = ("generations", "completions", "responses", "candidates", "outputs", "answers")
_RATINGS = ("ratings", "scores", "rewards")
_RATING = ("overall_score", "rating", "score", "reward")  # inside an answer's object
_TEXT = ("response", "completion", "text", "output", "answer", "content", "generation")


def _list_key(row: Row) -> str:
    known = {plain(str(key)): str(key) for key in row}
    return next((known[name] for name in _LISTS if name in known), "")


def _ratings_key(row: Row) -> str:
    known = {plain(str(key)): str(key) for key in row}
    return next((known[name] for name in _RATINGS if name in known), "")


def _verdict_keys(row: Row) -> list[str]:
    """The columns that say of each answer whether it is right, as OpenR1's rows have them."""
    named = [key for key in row if plain(str(key)).startswith("correctness_")]
    return [key for key in named if _all_judged(row[key])]


def _all_judged(value: Any) -> bool:
    listed = isinstance(value, list) and bool(value)
    return listed and all(isinstance(each, bool) for each in value)


def _verdicts(row: Row, count: int, out: Several) -> list[float | None]:
    """1 for a right answer, 0 for a wrong one, None where two columns differ, which is noted in
    `out`. Raises RowError for columns that do not judge each of the `count` answers.
    """
    keys = _verdict_keys(row)
    for key in keys:
        if len(row[key]) != count:
            raise RowError(
                f"key {key!r}: expected true or false of each of the {count} {_list_key(row)}, "
                f"found {describe(row[key])}"
            )
    verdicts: list[float | None] = []
    for i, said in enumerate(zip(*(row[key] for key in keys), strict=True)):
        if len(set(said)) > 1:
            out.set_aside.append(f"{_list_key(row)}[{i}]: {' and '.join(keys)} differ")
        verdicts.append(float(said[0]) if len(set(said)) == 1 else None)
    return verdicts


def _rating_inside(answer: Mapping[str, Any]) -> float | None:
    return next((n for n in (finite(answer.get(key)) for key in _RATING) if n is not None), None)


def _rated_answers(row: Row, out: Several) -> list[tuple[str, str, float]]:
    """(name, text, rating) of each answer that has a rating. Raises RowError."""
    key, ratings_key = _list_key(row), _ratings_key(row)
    answers: list[Any] = row[key]
    judged = not ratings_key and bool(_verdict_keys(row))
    ratings: Any = row.get(ratings_key) if ratings_key else [None] * len(answers)
    if judged:
        ratings = _verdicts(row, len(answers), out)
    if not isinstance(ratings, list) or len(ratings) != len(answers):
        raise RowError(
            f"key {ratings_key!r}: expected a rating of each of the {len(answers)} {key}, found "
            f"{describe(ratings)}"
        )
    rated = []
    for i, (answer, rating) in enumerate(zip(answers, ratings, strict=True)):
        name, number = f"{key}[{i}]", finite(rating)
        if isinstance(answer, Mapping):
            inside = next((word for word in _TEXT if word in answer), _TEXT[0])
            text = text_of(answer, inside)
            if not ratings_key:
                number = _rating_inside(answer)
        else:
            text = text_of({name: answer}, name)
        if number is None and not judged:
            out.set_aside.append(f"{name} has no rating")
        elif number is not None:
            rated.append((name, text, number))
    return rated


def _pairs_rated(row: Row) -> Several:
    out = Several()
    rated = _rated_answers(row, out)
    ranks = [
        (name, text, float(1 + sum(other > rating for _, _, other in rated)))
        for name, text, rating in rated
    ]
    several = ranked(prompt_of(row), ranks, {})
    return Several(several.pairs, [*out.set_aside, *several.set_aside])


def _is_rated(row: Row) -> bool:
    roles = roles_of(row)
    if roles.chosen and roles.rejected:
        return False  # the sides were taken already
    answers = row.get(_list_key(row))
    if not isinstance(answers, list) or len(answers) < 2 or not has_question(row):
        return False
    if isinstance(row.get(_ratings_key(row)), list) or _verdict_keys(row):
        return all(isinstance(answer, (str, Mapping)) for answer in answers)
    return all(isinstance(a, Mapping) and _rating_inside(a) is not None for a in answers)


def _columns_rated(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    used = (_list_key(row), _ratings_key(row), *_verdict_keys(row))
    return roles_of(row).asked, tuple(filter(None, used))


def _beside_rated(row: Row) -> tuple[str, ...]:
    """The reference beside answers that were checked against it, and one of them as messages."""
    if not _verdict_keys(row):
        return ()
    roles = roles_of(row)
    return tuple(name for name in (roles.answer, roles.reference, "messages") if name in row)


def _note_rated(row: Row) -> str:
    keys = _verdict_keys(row)
    if _ratings_key(row) or not keys:
        return ""
    return f"{' and '.join(keys)} says which of {_list_key(row)} are right"


RATED = Format(
    "rated",
    (),
    "a question with generations, completions or responses, each with a rating (ratings beside "
    "them, or overall_score, rating, score inside, or correctness_... of each): the higher one is "
    "better",
    pairs=_pairs_rated,
    prompt=prompt_of,
    test=_is_rated,
    find_columns=_columns_rated,
    not_content=_beside_rated,
    read_inside=tuple(f"{name}[].{key}" for name in _LISTS for key in (*_TEXT, *_RATING)),
    note=_note_rated,
)

# ---- OpenAI's comparisons of summaries ----


def _post(row: Row) -> str:
    """The prompt of Stiennon et al. 2020: a post with its place and title, or an article."""
    info = row["info"]
    if info.get("post"):
        head = [
            f"{word.upper()}: {prefix}{info[word]}"
            for word, prefix in (("subreddit", "r/"), ("title", ""))
            if info.get(word)
        ]
        return "\n\n".join([*head, f"POST: {text_of(info, 'post')}", "TL;DR:"])
    return "\n\n".join([text_of(info, "article"), "TL;DR:"])


def _pairs_summaries(row: Row) -> Several:
    summaries, choice = row["summaries"], row["choice"]
    if len(summaries) != 2 or choice not in (0, 1) or isinstance(choice, bool):
        raise RowError(
            f"key 'choice': expected 0 or 1 of two summaries, found {describe(choice)} of "
            f"{len(summaries)}"
        )
    texts = [text_of(summary, "text") for summary in summaries]
    pair = make_pair(row, _post(row), texts[choice], texts[1 - choice])
    fields = {"position": 1 + choice, **annotator_of(row.get("worker"))}
    return Several([Made(pair, fields)])


def _is_summaries(row: Row) -> bool:
    summaries = row["summaries"]
    listed = isinstance(summaries, list) and all(isinstance(s, Mapping) for s in summaries)
    return listed and isinstance(row["info"], Mapping)


SUMMARIES = Format(
    "summaries",
    ("info", "summaries", "choice"),
    "info of {post or article}, two summaries of {text}, choice (0 or 1)",
    pairs=_pairs_summaries,
    prompt=_post,
    test=_is_summaries,
    consumed=("info",),
    answers=("summaries", "choice", "worker"),
    read_inside=(
        *(f"info.{key}" for key in ("post", "title", "subreddit", "article")),
        "summaries[].text",
        *(f"worker.{key}" for key in ("email", "username", "id")),
    ),
)
