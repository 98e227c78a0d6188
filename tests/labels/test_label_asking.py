"""What may be compared and how it is asked: candidates, gold, repeats, sides and order, and that
nothing shown tells what is hidden.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import LabelKind
from rlhf.labels.asking import Asked, Question, ask, gold_questions, most_repeats, share_of
from rlhf.labels.candidates import Response, first_prompts, gather, gather_two
from rlhf.labels.ledger import task_row
from rlhf.labels.records import Answer, Role, Task
from rlhf.labels.samples import read_review, read_samples, run_names
from rlhf.types import PreferencePair, UserError
from tests import toys

CREATED = "2026-11-25T00:00:00+00:00"


def question(
    number: int, answers: int = 2, policies: tuple[str, ...] = ("north", "south")
) -> Question:
    return Question(
        f"prompt {number}",
        tuple(Answer(f"text {number} {i}", policies[i % len(policies)]) for i in range(answers)),
        by="random",
    )


def gold(number: int, answers: int = 2) -> Question:
    texts = tuple(Answer(f"known {number} {i}") for i in range(answers))
    return Question(f"gold {number}", texts, by="gold", best=texts[0].id)


# --- candidates
# ------------------------------------------------------------------------------------------


def test_candidates_are_distinct_texts_of_one_prompt() -> None:
    said = ["yes", " yes\n", "", "  ", "line\r\nend", "line\nend", "no"]
    found = gather(
        [Response("p", text, "a", score=float(i)) for i, text in enumerate(said)]
        + [Response("q", "only", "a")],
        least=2,
    )
    (one,) = found.candidates
    assert [(a.text, a.score) for a in one.answers] == [
        ("yes", 0.0),
        ("line\r\nend", 4.0),
        ("no", 6.0),
    ]
    assert found.counts == {"responses": 8, "prompts": 2, "empty": 2, "duplicates": 2, "few": 1}
    assert len({answer.id for answer in one.answers}) == 3


def test_conversations_are_grouped_by_what_they_say() -> None:
    chat = [{"role": "user", "content": "hi"}]
    found = gather(
        [Response(chat, "a", "x"), Response([dict(reversed(chat[0].items()))], "b", "x")], least=2
    )
    assert len(found.candidates) == 1 and found.candidates[0].prompt == chat


def test_two_policies_get_one_pair_a_prompt() -> None:
    rows = {
        "differs": [("a", "1"), ("a", "2"), ("b", "3"), ("b", "4")],
        "alike": [("a", "same"), ("a", "other"), ("b", " same"), ("b", "more")],
        "nothing": [("a", ""), ("b", " ")],
        "empty": [("a", "word"), ("b", " ")],
        "missing": [("b", "word")],
    }
    found = gather_two(
        [Response(prompt, text, policy) for prompt, said in rows.items() for policy, text in said],
        ("a", "b"),
    )
    assert [[(a.policy, a.text) for a in one.answers] for one in found.candidates] == [
        [("a", "1"), ("b", "3")]
    ]
    assert {name: found.counts[name] for name in ("prompts", "ties", "empty", "missing")} == {
        "prompts": 5,
        "ties": 2,
        "empty": 1,
        "missing": 1,
    }


def test_the_first_prompts_keep_all_their_responses() -> None:
    responses = [Response(prompt, text, "a") for text in ("x", "y") for prompt in ("p", "q", "r")]
    assert [(r.prompt, r.text) for r in first_prompts(responses, 2)] == [
        ("p", "x"),
        ("q", "x"),
        ("p", "y"),
        ("q", "y"),
    ]
    assert first_prompts(responses, None) == responses


# --- asking
# ------------------------------------------------------------------------------------------


def test_every_question_is_asked_once_and_repeats_twice() -> None:
    main, known = [question(i) for i in range(20)], [gold(i) for i in range(4)]
    asked = ask(main, known, repeats=5, seed=3, created=CREATED)
    assert Counter(task.role for task in asked.tasks) == {
        Role.main: 20,
        Role.gold: 4,
        Role.repeat: 5,
    }
    by_id = {task.id: task for task in asked.tasks}
    places = [task.id for task in asked.tasks]
    assert places == [f"{asked.id}-{i + 1}" for i in range(29)] and len(by_id) == 29
    for task in asked.tasks:
        assert [a.id for a in task.answers] == sorted(a.id for a in task.answers)
        assert sorted(task.order) == [0, 1]
        if task.repeats is not None:
            first = by_id[task.repeats]
            assert (first.prompt, first.answers, first.role) == (
                task.prompt,
                task.answers,
                Role.main,
            )
            assert places.index(task.id) - places.index(first.id) >= 2
        if task.role is Role.gold:
            assert task.best is not None and task.answers[task.best].text.endswith(" 0")
    assert {t.prompt for t in asked.tasks if t.role is Role.main} == {q.prompt for q in main}


def test_sides_are_balanced_for_policies_gold_and_repeats() -> None:
    asked = ask(
        [question(i) for i in range(40)],
        [gold(i) for i in range(10)],
        repeats=12,
        seed=5,
        created=CREATED,
    )
    by_id = {task.id: task for task in asked.tasks}
    mains = [t for t in asked.tasks if t.role is not Role.gold]
    left = Counter(t.answers[t.order[0]].policy for t in mains if t.role is Role.main)
    # which of a question's two tasks is the repeat is drawn, too
    assert abs(left["north"] - left["south"]) <= 12
    once = {t.prompt for t in mains} - {t.prompt for t in mains if t.repeats}
    assert sum(t.order[0] == t.best for t in asked.tasks if t.role is Role.gold) == 5
    assert sum(t.order != by_id[t.repeats].order for t in mains if t.repeats) == 6
    assert len(once) == 28
    plain = ask([question(i) for i in range(41)], [], repeats=0, seed=5, created=CREATED).tasks
    assert sorted(Counter(t.answers[t.order[0]].policy for t in plain).values()) == [20, 21]


def test_the_seed_decides_and_when_it_was_made_names_it() -> None:
    main, known = [question(i) for i in range(12)], [gold(i) for i in range(3)]

    def content(asked: Asked) -> list[Any]:
        return [(t.prompt, t.order, t.role) for t in asked.tasks]

    first = ask(main, known, repeats=3, seed=1, created=CREATED)
    assert ask(main, known, repeats=3, seed=1, created=CREATED) == first
    later = ask(main, known, repeats=3, seed=1, created="2027")
    assert later.id != first.id and content(later) == content(first)
    assert content(ask(main, known, repeats=3, seed=2, created=CREATED)) != content(first)


def test_places_tell_no_role() -> None:
    """Over many seeds gold and repeats stand everywhere: a role's mean place is the middle, but a
    repeat comes after its first.
    """
    places: dict[Role, list[int]] = {role: [] for role in Role}
    for seed in range(300):
        for place, task in enumerate(
            ask(
                [question(i) for i in range(8)],
                [gold(i) for i in range(2)],
                repeats=2,
                seed=seed,
                created="",
            ).tasks
        ):
            places[task.role].append(place)
    assert sum(places[Role.gold]) / len(places[Role.gold]) == pytest.approx(5.5, abs=0.4)
    assert set(places[Role.gold]) == set(range(12))
    assert set(places[Role.repeat]) == set(range(2, 12))


@given(
    main=st.integers(0, 7),
    known=st.integers(0, 3),
    repeats=st.integers(0, 7),
    answers=st.integers(2, 4),
    seed=st.integers(0, 10**6),
)
@settings(deadline=None, max_examples=200)
def test_any_export_hides_its_roles(
    main: int, known: int, repeats: int, answers: int, seed: int
) -> None:
    """What annotators get (id, prompt, texts as shown) is the same function of every task; repeats
    never stand beside their first.
    """
    repeats = min(repeats, most_repeats(main, known))
    asked = ask(
        [question(i, answers) for i in range(main)],
        [gold(i, answers) for i in range(known)],
        repeats=repeats,
        seed=seed,
        created=CREATED,
    )
    assert len(asked.tasks) == main + known + repeats
    places = {task.id: place for place, task in enumerate(asked.tasks)}
    shown = json.dumps([(task.id, task.prompt, task.shown) for task in asked.tasks])
    for hidden in (
        "north",
        "south",
        "random",
        "repeat",
        "true",
        "null",
        *(role.value for role in Role if role is not Role.gold),
    ):
        assert hidden not in shown
    for place, task in enumerate(asked.tasks):
        assert task.id == f"{asked.id}-{place + 1}"
        assert len(task.shown) == answers and set(task.shown) == {
            answer.text for answer in task.answers
        }
        assert (task.best is not None) is (task.role is Role.gold)
        if task.repeats is not None:
            assert places[task.id] >= places[task.repeats] + 2
            assert asked.tasks[places[task.repeats]].repeats is None


def test_repeats_need_something_between() -> None:
    assert (
        most_repeats(1, 0) == 0
        and most_repeats(0, 5) == 0
        and most_repeats(1, 1) == 1
        and most_repeats(2, 0) == 2
    )
    with pytest.raises(ValueError, match="1 repeats of 1 questions"):
        ask([question(0)], [], repeats=1, seed=0, created=CREATED)


def test_a_share_is_at_least_one() -> None:
    assert [share_of(0.1, n) for n in (0, 1, 10, 11, 200)] == [0, 1, 1, 2, 20]
    assert share_of(0.0, 50) == 0 and share_of(0.3, 10) == 3 and share_of(1.0, 7) == 7


def test_tasks_of_a_review_are_followed_to_the_first_export() -> None:
    main = [
        Question(f"p{i}", (Answer("a"), Answer("b")), by="review", origin=f"old-{i}")
        for i in range(6)
    ]
    asked = ask(main, [], repeats=3, seed=0, created=CREATED)
    by_id = {task.id: task for task in asked.tasks}
    assert {old: by_id[new].prompt for new, old in asked.origins.items()} == {
        f"old-{i}": f"p{i}" for i in range(6)
    }
    assert all(by_id[new].role is Role.main for new in asked.origins)


# --- gold
# ------------------------------------------------------------------------------------------


def test_gold_pairs_of_every_shape() -> None:
    chat = [{"role": "user", "content": "hi"}]
    turn = [{"role": "assistant", "content": "good"}]
    pairs = [
        PreferencePair("plain", "better", "worse"),
        PreferencePair(chat, turn, [{"role": "assistant", "content": "bad"}]),
        PreferencePair(
            "",
            [*chat, {"role": "user", "content": "more"}, *turn],
            [*chat, {"role": "user", "content": "more"}, {"role": "assistant", "content": "b"}],
        ),
        PreferencePair("same", "x ", " x"),
        PreferencePair("empty", "x", " "),
        PreferencePair("", "whole text", "other text"),
        PreferencePair("torn", "a", "b"),
        PreferencePair("torn", "b", "a"),
    ]
    texts, left = gold_questions(pairs, size=2, chat=False, with_tools={False})
    assert [(q.prompt, q.answers[0].text, q.answers[1].text) for q in texts] == [
        ("plain", "better", "worse"),
        ("hi", "good", "bad"),
    ]
    assert all(q.best == q.answers[0].id and q.by == "gold" for q in texts)
    assert (
        sum(left.values()) == 5
        and left["pairs that contradict each other"] == 1
        and left["pairs without a prompt of their own"] == 1
    )
    chats, _ = gold_questions(pairs, size=2, chat=True, with_tools={False})
    assert [q.prompt[0]["content"] for q in chats] == ["plain", "hi", "hi"] and len(
        chats[2].prompt
    ) == 2


def test_gold_is_told_by_no_tools() -> None:
    chat = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "look"}}]
    turns = [[{"role": "assistant", "content": text}] for text in ("good", "bad")]
    pairs = [PreferencePair(chat, *turns), PreferencePair(chat, *turns, tools=tools)]
    both, left = gold_questions(pairs, size=2, chat=True, with_tools={False, True})
    assert [one.tools for one in both] == [None, tools] and left == {}
    assert len({one.id for one in both}) == 2
    plain, left = gold_questions(pairs, size=2, chat=True, with_tools={False})
    assert [one.tools for one in plain] == [None]
    assert left == {"pairs with tools, where no other prompt has some": 1}
    calling, left = gold_questions(pairs, size=2, chat=True, with_tools={True})
    assert [one.tools for one in calling] == [tools]
    assert left == {"pairs without tools, where every other prompt has some": 1}


def test_gold_rankings_have_as_many_answers_as_the_others() -> None:
    order = ["best", "good", "fair", "bad"]
    pairs = [PreferencePair("p", order[i], order[j]) for i in range(4) for j in range(i + 1, 4)] + [
        PreferencePair("q", "x", "y")
    ]
    (one,), left = gold_questions(pairs, size=3, chat=False, with_tools={False})
    assert [a.text for a in one.answers] == ["best", "good", "fair"] and one.best == one.answers[
        0
    ].id
    assert list(left.values()) == [1]


# --- samples and reviews
# ------------------------------------------------------------------------------------------


def sample(folder: Path, rows: list[dict[str, object]], config: str | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.yaml").write_text(config, encoding="utf-8")
    return str(toys.write_jsonl(folder / "samples.jsonl", rows))


def test_samples_are_named_after_run_and_step(tmp_path: Path) -> None:
    config = "run: {name: alpha}\nstage: {name: ppo}\nreward: {path: rm}\n"
    row = {"step": 3, "prompt": "p", "response": "x", "score": 0.5, "kl": None}
    one = sample(tmp_path / "alpha/ppo", [row, row | {"step": 4, "score": None}], config)
    before = {
        "step": 0,
        "prompt": "p",
        "response": "new",
        "response_before": "old",
        "score": 2.0,
        "score_before": 1.0,
    }
    two = sample(tmp_path / "beta/eval", [before])
    found = read_samples([one, two])
    assert [(r.policy, r.text, r.score) for r in found.responses] == [
        ("alpha/3", "x", 0.5),
        ("alpha/4", "x", None),
        ("eval/before", "old", 1.0),
        ("eval/after", "new", 2.0),
    ]
    assert not found.comparable and found.templated == 0
    assert read_samples([one]).comparable
    three = sample(tmp_path / "alpha/grpo", [row], config.replace("ppo", "grpo"))
    assert run_names([Path(one), Path(three)]) == ["alpha/ppo", "alpha/grpo"]
    assert read_samples([one, three]).comparable
    with pytest.raises(UserError, match="are both of the run alpha/ppo"):
        read_samples([one, one])


def test_moving_statistics_make_scores_incomparable(tmp_path: Path) -> None:
    config = "run: {name: a}\nreward: {terms: {length: {kind: length, normalise: true}}}\n"
    assert not read_samples(
        [
            sample(
                tmp_path / "a/ppo",
                [{"step": 1, "prompt": "p", "response": "x", "score": 1}],
                config,
            )
        ]
    ).comparable


def test_templated_prompts_are_seen(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "prompt": text, "response": "x"}
        for text in ("<|im_start|>user\nhi", "[INST] hi [/INST]", "a < b", "x <|> y")
    ]
    assert read_samples([sample(tmp_path / "a", rows)]).templated == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": 1, "prompt": "p"}, r"row 2: key 'response': expected, but missing"),
        (
            {"step": 1, "prompt": "p", "response": "x", "score": "high"},
            r"row 2: key 'score': expected a finite number",
        ),
        (
            {"pair": 0, "side": "chosen", "response": "x", "score": 1.0},
            r"row 2: key 'prompt'.*Expected samples.jsonl of a run that generates",
        ),
        ({"prompt": "p", "response": "x"}, r"row 2: key 'step'"),
        ({"step": 1, "prompt": "p", "response": "\ud800"}, r"half of a surrogate pair"),
        (
            {"step": 1, "prompt": "p", "response": "x", "turns": [{"text": "a"}, {"text": "x"}]},
            r"row 2: turns: turn 1 is .*expected role and text",
        ),
    ],
)
def test_a_sample_that_does_not_fit_is_named(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_samples([sample(tmp_path / "a", [{"step": 1, "prompt": "p", "response": "x"}, row])])


def test_an_episode_is_shown_turn_by_turn(tmp_path: Path) -> None:
    turns = [
        {"role": "assistant", "text": "7?", "reward": 0.0},
        {"role": "environment", "text": "<|end|>\n<|user|>more<|end|>", "said": "more"},
        {"role": "assistant", "text": "12", "reward": 1.0},
    ]
    row = {"step": 3, "prompt": "p", "response": "12", "score": 1.0, "turns": turns}
    (response,) = read_samples([sample(tmp_path / "a", [row])]).responses
    assert response.text == "[assistant]\n7?\n\n[environment]\nmore\n\n[assistant]\n12"
    assert response.episode and response.answer.episode


def test_a_torn_last_line_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = Path(sample(tmp_path / "a", [{"step": 1, "prompt": "p", "response": "x"}]))
    place.write_text(place.read_text(encoding="utf-8") + '{"step": 2, "pro', encoding="utf-8")
    assert len(read_samples([str(place)]).responses) == 1 and "row 2" in caplog.text
    place.write_text(
        '{"step": 2, "pro\n' + json.dumps({"step": 1, "prompt": "p", "response": "x"}) + "\n",
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="row 1"):
        read_samples([str(place)])


def review_row(task: Task) -> dict[str, object]:
    return task_row(task) | {"labels": [{"annotator": "eve", "verdict": "left"}]}


def test_a_review_queue_goes_out_again(tmp_path: Path) -> None:
    answers = (Answer("a", "north", 1.0, 0.5), Answer("b", "south"))
    first = Task("old-1", "p", answers, (1, 0), Role.main, "uncertainty")
    known = Task("old-2", "q", answers, (0, 1), Role.gold, "gold", best=1)
    again = Task("old-3", "p", answers, (0, 1), Role.repeat, "uncertainty", repeats="old-1")
    place = toys.write_jsonl(
        tmp_path / "review.jsonl", [review_row(task) for task in (first, known, again)]
    )
    one, two = read_review(str(place), LabelKind.pair)
    assert (one.prompt, one.answers, one.by, one.best, one.origin) == (
        "p",
        answers,
        "review",
        None,
        "old-1",
    )
    assert two.best == answers[1].id and two.origin == "old-2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": [0, 0]}, r"row 1: order \[0, 0\] of 2 answers"),
        ({"role": "judge"}, r"row 1: 'judge' is not a valid Role"),
        (
            {"answers": [{"text": str(i)} for i in range(3)], "order": [0, 1, 2]},
            r"row 1: task old has 3 answers, expected 2.*label.kind=ranking",
        ),
    ],
)
def test_a_review_that_does_not_fit_is_named(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    row = task_row(Task("old", "p", (Answer("a"), Answer("b")), (0, 1))) | change
    with pytest.raises(UserError, match=message):
        read_review(str(toys.write_jsonl(tmp_path / "review.jsonl", [row])), LabelKind.pair)
    del row["prompt"]
    with pytest.raises(UserError, match="no key 'prompt'"):
        read_review(str(toys.write_jsonl(tmp_path / "review.jsonl", [row])), LabelKind.pair)
