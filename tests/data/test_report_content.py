"""Labels, languages, clusters, broken text, templates and annotators of the data report, on rows by
hand.
"""

# ruff: noqa: RUF001 - full-width signs of Chinese texts
import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import TaskClass
from rlhf.data.formats import Use
from rlhf.data.prepare.items import Item
from rlhf.data.report import content
from rlhf.data.report.annotators import annotators, gold, gold_verdict
from rlhf.data.report.content import (
    cluster,
    clustered,
    compression_ratio,
    detected_languages,
    diversity,
    label_columns,
    labels,
    languages,
    sampled,
    texts_of,
)
from rlhf.data.report.making import examine
from rlhf.data.report.noise import (
    encoding_problem,
    garbled_problem,
    html_problem,
    noise,
    repetition_problem,
)
from rlhf.data.report.numbered import distinct, number
from rlhf.data.report.origins import origins
from rlhf.data.report.records import Section, Settings, Severity, StandardResult
from rlhf.data.report.standards import accuracy, enough, kappa
from rlhf.data.report.suspects import suspects
from rlhf.data.report.templates import role_problem, templates
from rlhf.data.report.texts import words
from rlhf.process import parallel
from tests.data.report_rows import (
    LONG,
    PREFERENCE,
    SFT,
    UNPAIRED,
    chat,
    checks,
    found,
    items,
    pair_rows,
    rows_of,
    texts,
)
from tests.offline.trl_tools import CHATML, tiny_tokenizer

# ---- origins ----


def test_rows_are_counted_by_split_file_format_and_source() -> None:
    rows = [
        *items({"text": "a", "source": "imdb"}, {"text": "b", "source": "web"}),
        *texts("c", origin="b.csv", split="eval"),
    ]
    section = origins(rows, SFT, {"a.jsonl": "text"})
    assert section.figures == {
        "total": 3,
        "by_split": {"train": 2, "eval": 1},
        "by_file": {"a.jsonl": 2, "b.csv": 1},
        "by_format": {"text": 2, "unknown": 1},
        "by_source": {"imdb": 1, "web": 1},
    }


# ---- labels ----


def judged_rows(*labels_: bool) -> list[Item]:
    return items(
        *({"prompt": "p", "completion": f"c{i}", "label": label} for i, label in enumerate(labels_))
    )


def test_imbalance_names_the_rows_of_the_rare_class() -> None:
    section = labels(judged_rows(True, False, True, True, True, False, True, True), UNPAIRED)
    assert (
        section.figures["label"]["counts"] == {"True": 6, "False": 2}
        and section.figures["label"]["ratio"] == 3.0
    )
    assert rows_of(section, "imbalance") == [2, 6]
    assert checks(labels(judged_rows(True, True, False), UNPAIRED)) == [], (
        "2 to 1 is balanced enough"
    )
    assert section.figures["label"]["balance"] == pytest.approx(
        -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    )


def test_one_class_alone_is_found() -> None:
    assert rows_of(labels(judged_rows(True, True), UNPAIRED), "one_class") == [1, 2]


def test_free_text_is_no_class() -> None:
    rows = items(
        *({"text": "t", "category": f"all different {i}", "topic": "ab"[i % 2]} for i in range(10))
    )
    assert list(label_columns(rows)) == ["topic"]
    assert labels(texts("a"), SFT).unmeasured is not None


# ---- languages ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The film was long, but the actors made it worth every minute.", "en"),
        ("Der Film war lang, aber die Schauspieler haben ihn gerettet.", "de"),
        ("这部电影很长，但是演员们的表演非常精彩，值得一看。", "zh"),
        ("Фильм был длинным, но актёры сыграли прекрасно.", "ru"),
        ("ok", "und"),
        ("123 456 !!!", "und"),
    ],
)
def test_languages_are_told(text: str, expected: str) -> None:
    assert detected_languages(texts(text))[0][0] == expected


def test_rows_in_another_language_than_most_are_named() -> None:
    english = [
        "The film was long, but the actors made it worth every minute.",
        "I would not watch this a second time, the plot is thin.",
    ]
    section = languages(
        texts(*english, "这部电影很长，但是演员们的表演非常精彩，值得一看。", "ok", english[0]), SFT
    )
    assert section.figures["main"] == "en" and section.figures["counts"] == {
        "en": 3,
        "zh": 1,
        "und": 1,
    }
    assert rows_of(section, "languages") == [3]


def test_a_set_in_two_languages_names_nobody() -> None:
    section = languages(
        texts(
            "The film was long, but the actors were good.",
            "这部电影很长，但是演员们的表演非常精彩。",
        ),
        SFT,
    )
    assert checks(section) == [] and len(section.figures["counts"]) == 2


# ---- clusters and diversity ----


def looked_at(check: Callable[..., Section], rows: list[Item]) -> Section:
    return check(rows, number(rows), SFT)


@pytest.mark.parametrize("most", [5000, 7])
def test_clusters_are_told_by_the_words_that_scikit_learn_takes(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    monkeypatch.setattr(content, "_TERMS", most)
    rows = topical({"sea": 30, "food": 20, "sport": 5})
    theirs = TfidfVectorizer(
        analyzer=words, min_df=2, max_df=0.5, max_features=most, sublinear_tf=True
    ).fit(texts_of(rows))
    numbered = number(rows)
    ours = [numbered.words[term] for term in content._telling(numbered.counts())]
    assert ours == theirs.get_feature_names_out().tolist()
    assert numbered.counts().sum() == len(numbered.flat) == 8 * len(rows)
    assert (numbered.flat == number(rows).flat).all(), "counting leaves the words alone"


def test_words_are_numbered_alike_in_any_number_of_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [*topical({"sea": 20, "food": 20}), *texts("", "Новое слово 你好")]
    monkeypatch.setattr("rlhf.data.report.looked.PART", 3)
    alone = number(rows)
    monkeypatch.setattr(parallel, "_WORTH_S", 0.0)
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    shared = number(rows)
    starts = [0, *alone.ends]
    said = [alone.flat[a:b] for a, b in pairwise(starts)]
    assert [[alone.words[i] for i in codes] for codes in said] == [*map(words, texts_of(rows))]
    assert shared.words == alone.words and (shared.flat == alone.flat).all()


def topical(sizes: dict[str, int]) -> list[Item]:
    rng = random.Random(0)
    vocabulary = {
        "sea": "ship wave harbour sailor anchor",
        "food": "bread soup spoon kitchen salt",
        "sport": "goal match referee stadium team",
    }
    rows = [
        " ".join(rng.choices(vocabulary[topic].split(), k=8))
        for topic, n in sizes.items()
        for _ in range(n)
    ]
    return texts(*rows)


def test_clusters_are_the_topics() -> None:
    rows = topical({"sea": 40, "food": 40, "sport": 40})
    members = cluster(number(rows), seed=0).members
    assert all(
        len(set(members[start : start + 40]) & set(members[other : other + 40])) == 0
        for start, other in ((0, 40), (40, 80), (0, 80))
    )


def test_a_cluster_that_holds_most_rows_is_found() -> None:
    rows = [
        *topical({"sea": 8, "food": 8}),
        *[
            Item({"text": "one and the same text about nothing"}, "a.jsonl", 100 + i)
            for i in range(60)
        ],
    ]
    section = looked_at(clustered, rows)
    assert (
        section.figures["largest_share"] == pytest.approx(60 / 76)
        and len(rows_of(section, "one_cluster")) == 60
    )
    even = looked_at(clustered, topical({"sea": 40, "food": 40, "sport": 40}))
    assert checks(even) == [] and 2.5 < even.figures["effective"] <= even.figures["clusters"]


def test_too_few_rows_and_texts_without_shared_words_have_no_clusters() -> None:
    assert "too few" in str(looked_at(clustered, texts("a")).unmeasured)
    assert "share no words" in str(
        looked_at(clustered, texts(*(f"word{i}" for i in range(60)))).unmeasured
    )


def test_diversity_by_hand() -> None:
    assert (
        distinct(number(texts("a b A b", "a")), 2) == pytest.approx(2 / 3)
        and distinct(number(texts()), 1) == 0.0
    )
    figures = looked_at(diversity, texts("a b a b", "c a")).figures
    assert (figures["words"], figures["vocabulary"], figures["once"], figures["distinct_1"]) == (
        6,
        3,
        1,
        0.5,
    )
    assert (
        compression_ratio([LONG] * 20) > 5 > compression_ratio([LONG])
        and compression_ratio([]) == 0.0
    )


def test_coverage_of_held_out_words() -> None:
    rows = [*texts("a b c"), *texts("b c d x", split="eval")]
    assert (
        looked_at(diversity, rows).figures["held_out_words_covered"] == 0.5
        and looked_at(diversity, texts("a")).figures["held_out_words_covered"] is None
    )


def test_a_sample_is_fixed_by_the_seed_and_keeps_the_order() -> None:
    rows = texts(*map(str, range(100)))
    some = sampled(rows, Settings(kind=Use.sft, sample=10, seed=3))
    assert (
        len(some) == 10
        and some == sampled(rows, Settings(kind=Use.sft, sample=10, seed=3))
        and [r.number for r in some] == sorted(r.number for r in some)
    )
    assert sampled(rows, SFT) == rows


@given(st.lists(st.sampled_from("abcdefghijkl"), min_size=20, max_size=40))
def test_repetition_is_that_of_all_its_grams(said: list[str]) -> None:
    grams = [tuple(said[at : at + 3]) for at in range(len(said) - 2)]
    repeats = len(set(grams)) / len(grams) < 0.5
    assert (repetition_problem(" ".join(said)) is not None) == repeats


def test_sections_of_a_sample_say_so() -> None:
    rows = topical({"sea": 40, "food": 40})
    for size in (60, 80):
        some = Settings(kind=Use.sft, sample=size)
        sections = {section.name: section for section in examine(rows, [], some, {}, [])}
        for name in ("languages", "clusters", "diversity"):
            assert sections[name].figures["rows"] == size
            assert ("60" in sections[name].title and "80" in sections[name].title) == (size == 60)
        assert "80" not in sections["lengths"].title


# ---- broken text ----


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a fine<br />film", "holds <br />"),
        ("salt &amp; pepper", "holds &amp;"),
        ('<div class="x">hello</div>', 'holds <div class="x">'),
        ("if a < b and b > c then &c", None),
        ("I <3 this, R&D; x<y>", None),
        ("write `<br>` to break\n```html\n<p>one</p>\n```", None),
    ],
)
def test_html(text: str, problem: str | None) -> None:
    assert html_problem(text) == problem


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("It\u2019s na\u00efve".encode().decode("windows-1252"), True),
        ("caf\u00e9 and na\u00efve".encode().decode("latin-1"), True),
        ("broken \ufffd here", True),
        ("a bell\x07", True),
        ("caf\u00e9, na\u00efve, \u201cquoted\u201d and 这部电影 \u2014 fine\twith a tab\n", False),
    ],
)
def test_wrong_encodings(text: str, bad: bool) -> None:
    assert (encoding_problem(text) is not None) is bad


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("#@! %$^& *()_+ {}|:<>? xx", True),
        ("sooooooooooooo good", True),
        ("well ................ yes, a plain text with a rule", False),
        ("a plain text (with some signs): yes!", False),
        ("这部电影很长，但是很好！", False),
        ("see ```x[[i]]={}//**!!;;``` there", False),
        (":-)", False),
    ],
)
def test_garbled_text(text: str, bad: bool) -> None:
    assert (garbled_problem(text) is not None) is bad


def test_repetition() -> None:
    assert repetition_problem("very good film " * 10) == "89% of its 3-grams of words stood before"
    assert repetition_problem(LONG) is None and repetition_problem("no no no") is None


def test_noise_names_the_row_once_and_the_text_in_it() -> None:
    section = noise(pair_rows(("fine", "a<br>b"), ("c", "d"), ("<p>", "<p>")), PREFERENCE)
    assert (
        rows_of(section, "html") == [1, 3]
        and found(section, "html").rows[0].note == "rejected holds <br>"
        and section.figures["encoding"] == 0
    )


# ---- templates ----


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        ("user assistant user assistant", None),
        ("system user assistant", None),
        ("user assistant tool assistant user", None),
        ("user assistant tool tool assistant", None),
        ("assistant user", "the first turn is the assistant's, not the user's"),
        ("system system user", "2 system messages at the start"),
        ("system", "a system message alone"),
        ("user user assistant", "message 1 is the user's and follows the user's"),
        (
            "system user assistant assistant",
            "message 3 is the assistant's and follows the assistant's",
        ),
        ("user system assistant", "message 1 is the system's and follows the user's"),
        ("user assistant system user", "message 2 is the system's and follows the assistant's"),
        ("user assistant tool user", "message 3 is the user's and follows the tool's"),
    ],
)
def test_role_order(roles: str, problem: str | None) -> None:
    assert role_problem(chat(*((role, "x") for role in roles.split()))) == problem


def test_every_template_problem_names_its_rows() -> None:
    good = chat(("user", "hi"), ("assistant", "hello"))
    rows = items(
        {"messages": good},
        {"messages": chat(("user", "hi"), ("user", "hi"), ("assistant", "hello"))},
        {"messages": chat(("user", "hi"), ("assistant", "  "))},
        {"messages": chat(("user", "hi"), ("assistant", "hello"), ("user", "and?"))},
        {"messages": chat(("user", "[INST] hi [/INST]"), ("assistant", "hello"))},
    )
    section = templates(rows, SFT)
    assert {f.check: [r.row for r in f.rows] for f in section.findings} == {
        "role_order": [2],
        "empty_turns": [3],
        "wrong_end": [4],
        "template_markers": [5],
    }
    assert found(section, "empty_turns").rows[0].note == "messages[1] is empty"
    assert found(section, "template_markers").rows[0].note == "messages[0] holds [INST]"


def test_a_prompt_must_not_end_with_the_assistant_and_an_empty_prompt_is_none() -> None:
    rows = items(
        {"prompt": chat(("user", "hi"))}, {"prompt": chat(("user", "hi"), ("assistant", "hello"))}
    )
    assert rows_of(templates(rows, Settings(kind=Use.prompt)), "wrong_end") == [2]
    assert checks(templates(pair_rows(("a", "b")), PREFERENCE)) == []
    assert rows_of(templates(pair_rows(("a", " ")), PREFERENCE), "empty_turns") == [1]


@pytest.mark.parametrize(
    "marker", ["<|im_start|>user", "<start_of_turn>", "### Response:", "<|eot_id|>"]
)
def test_markers_in_plain_texts(marker: str) -> None:
    assert rows_of(templates(texts("fine", f"a {marker} b"), SFT), "template_markers") == [2]


def test_doubled_special_tokens() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    rows = texts("good film", f"{bos}good film", f"good film{eos}", f"good film{eos}{eos}")
    section = templates(rows, Settings(kind=Use.sft, tokenizer=tokenizer))
    assert rows_of(section, "double_bos") == [2] and rows_of(section, "double_eos") == [4]
    assert rows_of(section, "template_markers") == [2, 3, 4], (
        "the tokenizer's own special tokens count as markers"
    )


def test_a_template_that_doubles_the_first_token_and_one_that_refuses() -> None:
    rows = items(
        {"messages": chat(("user", "good"), ("assistant", "film"))},
        {"messages": chat(("system", "bad"), ("user", "good"), ("assistant", "film"))},
    )
    doubling = tiny_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML)
    assert rows_of(templates(rows, Settings(kind=Use.sft, tokenizer=doubling)), "double_bos") == [
        1,
        2,
    ]
    refusing = tiny_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% "
        "endif %}" + CHATML
    )
    section = templates(rows, Settings(kind=Use.sft, tokenizer=refusing))
    assert rows_of(section, "unrendered") == [2] and found(section, "unrendered").rows[
        0
    ].note.endswith("refuses a conversation of 2 messages: no system message")


# ---- annotators, gold items, standards ----


def voted(*votes: tuple[str, str, bool]) -> list[Item]:
    """(answer, annotator, whether it is good)."""
    return items(
        *(
            {"prompt": "p", "completion": name, "label": good, "annotator": who}
            for name, who, good in votes
        )
    )


def test_kappa_of_two_annotators_is_cohens() -> None:
    # agreement on 3 of 4; x says good 3 times of 4, y twice: chance 3/4 * 2/4 + 1/4 * 2/4 = 0.5;
    # kappa (0.75 - 0.5) / 0.5
    votes = [("1", True, True), ("2", True, True), ("3", True, False), ("4", False, False)]
    section = annotators(
        voted(*[(n, "x", x) for n, x, _ in votes], *[(n, "y", y) for n, _, y in votes]), UNPAIRED
    )
    assert section.figures["kappa"]["name"] == "Cohen's kappa" and section.figures["kappa"][
        "value"
    ] == pytest.approx(0.5)
    assert (
        rows_of(section, "disagreement") == [3, 7]
        and found(section, "disagreement").message == "annotators differ on 1 of 4 items"
    )
    verdict = kappa(section)
    assert (
        verdict.verdict is StandardResult.failed
        and verdict.found == "Cohen's kappa 0.500"
        and "Landis" in verdict.source
    )


def test_agreeing_annotators_pass_and_one_annotator_is_not_measurable() -> None:
    same = [("1", True), ("2", False), ("3", True)]
    section = annotators(
        voted(*[(n, who, v) for who in ("x", "y", "z") for n, v in same]), UNPAIRED
    )
    assert (
        section.figures["kappa"] == {"name": "Fleiss' kappa", "value": pytest.approx(1.0)}
        and kappa(section).verdict is StandardResult.passed
    )
    alone = annotators(voted(("1", "x", True), ("2", "x", False)), UNPAIRED)
    assert alone.unmeasured is not None and kappa(alone).verdict is StandardResult.unknown
    always = annotators(voted(("1", "x", True), ("1", "y", True)), UNPAIRED)
    assert (
        kappa(always).verdict is StandardResult.unknown
        and "every label is the same" in kappa(always).found
    )


def test_annotators_of_pairs_judge_the_same_pair_in_either_order() -> None:
    sides = [("a", "b", "x"), ("b", "a", "y"), ("c", "d", "x"), ("c", "d", "y"), ("e", "f", "x")]
    section = annotators(
        items(
            *({"prompt": "", "chosen": c, "rejected": r, "annotator": who} for c, r, who in sides)
        ),
        PREFERENCE,
    )
    assert (
        rows_of(section, "disagreement") == [1, 2]
        and section.figures["observed"]["value"] == 0.5
        and section.figures["observed"]["items"] == 2
    )


def test_classes_have_annotators_too() -> None:
    rows = items(
        *(
            {"text": t, "label": v, "annotator": who}
            for t, who, v in (
                ("a", "x", "war"),
                ("a", "y", "love"),
                ("b", "x", "war"),
                ("b", "y", "war"),
            )
        )
    )
    assert rows_of(annotators(rows, SFT), "disagreement") == [1, 2]


@pytest.mark.parametrize("row", [{}, {"label": ""}, {"label": None}, {"label": {"a": 1}}])
def test_rows_with_annotators_and_without_labels_are_not_measurable(row: dict[str, Any]) -> None:
    rows = items(*({"prompt": f"p {i}", "annotator": i % 2, **row} for i in range(4)))
    assert "annotator" in (annotators(rows, Settings(kind=Use.prompt)).unmeasured or "")


@pytest.mark.parametrize(
    ("columns", "kind", "expected"),
    [
        ({"label": True, "gold": "true"}, Use.unpaired, True),
        ({"label": True, "gold": 0}, Use.unpaired, False),
        ({"label": "Comedy", "gold_label": "comedy "}, Use.sft, True),
        ({"label": "Comedy", "gold_label": ""}, Use.sft, None),
        ({"chosen": "a", "gold": "chosen"}, Use.preference, True),
        ({"chosen": "a", "gold": "rejected"}, Use.preference, False),
        ({"chosen": "a", "gold": "tie"}, Use.preference, None),
        ({"label": True}, Use.unpaired, None),
    ],
)
def test_gold_labels(columns: dict[str, Any], kind: Use, expected: bool | None) -> None:
    assert gold_verdict(columns, kind) is expected


@pytest.mark.parametrize(
    ("right", "verdict"),
    [(96, StandardResult.passed), (95, StandardResult.failed), (40, StandardResult.failed)],
)
def test_accuracy_against_gold_must_be_above_95_percent(
    right: int, verdict: StandardResult
) -> None:
    rows = items(
        *(
            {"prompt": "p", "completion": str(i), "label": True, "gold": i < right}
            for i in range(100)
        )
    )
    section = gold(rows, UNPAIRED)
    assert section.figures["accuracy"] == right / 100 and rows_of(section, "wrong_labels") == list(
        range(right + 1, 101)
    )
    assert accuracy(section).verdict is verdict and f"{right}.0% of 100" in accuracy(section).found
    assert accuracy(gold(items({"text": "a"}), SFT)).verdict is StandardResult.unknown


@pytest.mark.parametrize(
    ("rows", "task", "verdict"),
    [
        (999, TaskClass.simple, StandardResult.failed),
        (1000, TaskClass.simple, StandardResult.passed),
        (9000, TaskClass.simple, StandardResult.passed),
        (4999, TaskClass.medium, StandardResult.failed),
        (5000, TaskClass.medium, StandardResult.passed),
        (19999, TaskClass.complex, StandardResult.failed),
        (20000, TaskClass.complex, StandardResult.passed),
        (20000, None, StandardResult.unknown),
    ],
)
def test_enough_rows_for_the_task(
    rows: int, task: TaskClass | None, verdict: StandardResult
) -> None:
    assert enough(rows, task).verdict is verdict


# ---- suspects ----


def sided(count: int, wrong: set[int]) -> list[Item]:
    rng = random.Random(5)
    good, bad, plain = (
        ["great", "fine", "lovely", "superb"],
        ["poor", "awful", "dull", "weak"],
        ["film", "plot", "actor", "scene", "end", "story"],
    )
    rows = []
    for i in range(count):
        sides = [
            " ".join([*rng.sample(words_, 2), *rng.sample(plain, 3)]) for words_ in (good, bad)
        ]
        rows.append(tuple(sides[::-1] if i in wrong else sides))
    return pair_rows(*rows)


def test_pairs_with_exchanged_sides_are_suspect() -> None:
    wrong = {7, 50, 51, 120, 199, 260, 333}
    section = suspects(sided(400, wrong), PREFERENCE)
    named = {n - 1 for n in rows_of(section, "suspect_labels")}
    assert len(named & wrong) >= 6 and len(named - wrong) <= 1 and section.figures["accuracy"] > 0.9
    assert found(section, "suspect_labels").severity is Severity.info


def test_words_that_tell_nothing_raise_no_suspicion() -> None:
    rng = random.Random(1)
    plain = ["film", "plot", "actor", "scene", "end", "story", "good", "bad"]
    rows = pair_rows(
        *(
            (" ".join(rng.choices(plain, k=5)), " ".join(rng.choices(plain, k=5)))
            for _ in range(300)
        )
    )
    section = suspects(rows, PREFERENCE)
    assert (
        section.unmeasured is not None
        and "words alone" in section.unmeasured
        and section.findings == ()
    )


@pytest.mark.parametrize(
    "section",
    [
        suspects(texts("a"), SFT),
        suspects(sided(20, set()), PREFERENCE),
        suspects(judged_rows(*[True] * 300), UNPAIRED),
    ],
)
def test_suspects_need_judgements_rows_and_both_labels(section: Section) -> None:
    assert section.unmeasured is not None and section.findings == ()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=8))
def test_no_text_breaks_a_detector(values: list[str]) -> None:
    rows = texts(*values)
    for section in (
        noise(rows, SFT),
        templates(rows, SFT),
        languages(rows, SFT),
        looked_at(diversity, rows),
        labels(rows, SFT),
    ):
        assert all(1 <= r.row <= len(rows) for f in section.findings for r in f.rows)
