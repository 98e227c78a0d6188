"""Augmentation: what is asked changes, never an answer; words join to their text again;
back-translation through a real Marian model.
"""

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.preparation.augmentation import Augment, BackTranslate, Operation
from rlhf.data.formats import Use
from rlhf.data.prepare import eda
from rlhf.data.prepare.augment import augment
from rlhf.data.prepare.eda import OPERATIONS, Change, cut, joined, make_synonyms
from rlhf.data.prepare.items import Item
from rlhf.data.prepare.translate import back_translate
from rlhf.types import UserError
from tests import steps

Row = dict[str, Any]
SYNONYMS = """
- [film, movie, picture]
- [great, superb]
- [电影, 影片]
- [喜欢, 喜爱]
"""
WORDS = make_synonyms(
    [["film", "movie"], ["great", "superb", "excellent"], ["电影", "影片"], ["喜欢", "喜爱"]],
    "test",
)


def change(seed: int = 0, share: float = 0.3, keep: tuple[str, ...] = ()) -> Change:
    return Change(random.Random(seed), share, WORDS, frozenset(keep))


# ---- words ----

plain = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)


@settings(deadline=None, max_examples=200)
@given(plain, st.sampled_from(["auto", "en", "zh"]))
def test_words_join_to_their_text(text: str, language: str) -> None:
    words = cut(text, language)
    assert joined(words.words, words.between) == text and len(words.between) == len(words.words) + 1
    assert all(
        any(c.isalnum() or c == "_" or not c.isascii() for c in word) for word in words.words
    )


def test_words_of_both_scripts() -> None:
    assert cut("I don't like well-made films, really.").words == [
        "I",
        "don't",
        "like",
        "well-made",
        "films",
        "really",
    ]
    chinese = cut("我喜欢这部电影。")
    assert (
        chinese.words == ["我", "喜欢", "这部", "电影"]
        and not chinese.spaced
        and chinese.between[-1] == "。"
    )
    assert cut("我喜欢 Python 3").words == ["我", "喜欢", "Python", "3"]


# ---- operations ----


@settings(deadline=None, max_examples=200)
@given(plain, st.integers(0, 10**6), st.sampled_from(sorted(OPERATIONS)))
def test_operations_keep_what_must_stay(text: str, seed: int, name: str) -> None:
    words = cut(text)
    if not words.words:
        return
    new = OPERATIONS[name](words, change(seed))
    if name == "swap":
        assert sorted(new) == sorted(text), "swapping exchanges words and makes none"
    if name == "delete":
        assert len(new) <= len(text)
        remaining = iter(text)
        assert all(c in remaining for c in new), "what is left stands in the text's order"
    digits = [c for c in text if c.isdigit()]
    if name in ("synonym", "insert"):
        assert [c for c in new if c.isdigit()] == digits


def test_synonyms_take_places_and_capitals() -> None:
    assert eda.replace_synonyms(cut("The film."), change()) == "The movie."
    assert eda.replace_synonyms(cut("FILM"), change()) == "MOVIE"
    assert eda.replace_synonyms(cut("Film"), change()) == "Movie"
    assert eda.replace_synonyms(cut("我喜欢这部电影"), change(share=1.0)) == "我喜爱这部影片"
    assert eda.replace_synonyms(cut("a b c"), change()) == "a b c", "no word has a synonym"
    assert eda.replace_synonyms(cut("film"), change(keep=("film",))) == "film"


def test_the_share_is_the_papers_alpha() -> None:
    text = cut(" ".join(["film"] * 20))
    for share, expected in ((0.01, 1), (0.1, 2), (0.5, 10), (1.0, 20)):
        assert eda.replace_synonyms(text, change(share=share)).split().count("movie") == expected
        assert len(eda.insert_synonyms(text, change(share=share)).split()) == 20 + expected
    kept = [len(eda.delete_words(text, change(seed, share=0.3)).split()) for seed in range(300)]
    assert abs(sum(kept) / len(kept) - 14) < 0.4


def test_insertions_stand_among_the_words() -> None:
    new = eda.insert_synonyms(cut("One great day."), change())
    assert new in {"superb One great day.", "One superb great day.", "One great superb day."} | {
        "excellent One great day.",
        "One excellent great day.",
        "One great excellent day.",
    }
    chinese = eda.insert_synonyms(cut("我喜欢"), change())
    assert chinese in {"喜爱我喜欢", "我喜爱喜欢"}


def test_numbers_are_never_touched() -> None:
    """A question with another number, or numbers in another order, has another answer."""
    text = cut("take 12 from x2 plus 3rd film")
    for seed in range(50):
        for name in OPERATIONS:
            new = cut(OPERATIONS[name](text, change(seed, share=1.0))).words
            assert [w for w in new if any(c.isdigit() for c in w)] == ["12", "x2", "3rd"], (
                name,
                new,
            )


def test_deletion_leaves_one_space_and_one_word() -> None:
    results = {
        eda.delete_words(cut("one two three."), change(seed, share=0.4)) for seed in range(60)
    }
    assert {"two three.", "one three.", "one two."} <= results
    assert all("  " not in text and text.strip() == text for text in results)
    assert all(
        cut(eda.delete_words(cut("a b"), change(seed, share=1.0))).words for seed in range(20)
    )
    assert eda.delete_words(cut("alone"), change(share=1.0)) == "alone"


# ---- the step ----


@pytest.fixture
def options(tmp_path: Path) -> Augment:
    (tmp_path / "synonyms.yaml").write_text(SYNONYMS, encoding="utf-8")
    return Augment(synonyms=str(tmp_path / "synonyms.yaml"), share=0.3)


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def bot(text: str) -> Row:
    return {"role": "assistant", "content": text}


ROWS: dict[Use, list[Row]] = {
    Use.preference: [
        {
            "prompt": "Is this film any great?",
            "chosen": "A great film",
            "rejected": "A bad film",
            "margin": 1.5,
        },
        {
            "prompt": [
                {"role": "system", "content": "Judge the film."},
                user("A great film"),
                bot("A great film"),
                user("the film again"),
            ],
            "chosen": [bot("great film")],
            "rejected": [bot("no film")],
        },
    ],
    Use.unpaired: [{"prompt": "a great film it is", "completion": "the great film", "label": True}],
    Use.sft: [
        {"prompt": "tell of a great film", "completion": " a great film"},
        {
            "messages": [
                user("one great film"),
                bot("a great film"),
                user("more film please"),
                bot("film"),
            ]
        },
        {"text": "This is a great film with a great end"},
    ],
    Use.prompt: [{"prompt": "我喜欢这部电影。非常喜欢。", "answer": "film"}],
}


def answers(row: Row) -> list[Any]:
    """Whatever must stay as it was."""
    out = [
        row.get(key) for key in ("chosen", "rejected", "completion", "label", "margin", "answer")
    ]
    return out + [
        [m for m in row.get(key, []) if m["role"] != "user"]
        for key in ("messages", "prompt")
        if isinstance(row.get(key), list)
    ]


@pytest.mark.parametrize("kind", list(ROWS))
def test_new_rows_follow_their_original_and_keep_every_answer(
    options: Augment, tmp_path: Path, kind: Use
) -> None:
    for row in ROWS[kind]:
        ran = steps.run(augment, options, [row], tmp_path, kind, split_done=True)
        assert ran.rows[0] == row
        assert len(ran.rows) >= 4, ran.figures
        for new in ran.rows[1:]:
            assert answers(new) == answers(row)
            assert new["augmented"] in OPERATIONS and new["augmented_from"] == "rows.jsonl, row 1"
            assert {k: v for k, v in new.items() if not k.startswith("augmented")} != row
        made = [str(new.get("prompt", new.get("messages", new.get("text")))) for new in ran.rows]
        assert len(set(made)) == len(made), "no copy twice"


def test_pairs_stay_pairs_of_one_prompt(options: Augment, tmp_path: Path) -> None:
    ran = steps.run(augment, options, ROWS[Use.preference], tmp_path, split_done=True)
    for new in ran.rows:
        assert isinstance(new["prompt"], type(new["chosen"])) and new["chosen"] != new["rejected"]


def test_only_training_rows_grow_and_only_after_a_split(options: Augment, tmp_path: Path) -> None:
    held = [
        Item({"prompt": "a great film"}, "f", 1, "eval"),
        Item({"prompt": "a great film"}, "f", 2, "train"),
    ]
    ran = steps.run(augment, options, iter(held), tmp_path, Use.prompt, split_done=True)
    assert (
        ran.kept[0].split == "eval"
        and all(item.split == "train" and item.number == 2 for item in ran.kept[1:])
        and len(ran.kept) > 2
    )
    with pytest.raises(UserError, match="expected a split step before it"):
        steps.run(augment, options, ROWS[Use.prompt], tmp_path, Use.prompt)
    assert Augment.after_split and BackTranslate.after_split


def test_a_second_step_does_not_grow_what_a_first_made(options: Augment, tmp_path: Path) -> None:
    once = steps.run(augment, options, ROWS[Use.prompt], tmp_path, Use.prompt, split_done=True)
    twice = steps.run(augment, options, iter(once.kept), tmp_path, Use.prompt, split_done=True)
    assert twice.figures["counts"]["rows"] == 1


def test_whole_texts_of_pairs_have_nothing_to_change(options: Augment, tmp_path: Path) -> None:
    rows = [{"prompt": "", "chosen": "a great film", "rejected": "no film"}]
    ran = steps.run(augment, options, rows, tmp_path, split_done=True)
    assert ran.rows == rows and ran.figures["counts"]["nothing_asked"] == 1


def test_the_seed_and_the_row_decide(options: Augment, tmp_path: Path) -> None:
    rows = [{"prompt": f"a great film number {word} to see"} for word in ("one", "two", "three")]

    def made(given: list[Row] | Any, seed: int) -> dict[int, list[Row]]:
        ran = steps.run(augment, options, given, tmp_path, Use.prompt, split_done=True, seed=seed)
        return {n: [item.columns for item in ran.kept if item.number == n] for n in (1, 2, 3)}

    assert made(rows, 1) == made(rows, 1) != made(rows, 2)
    alone = steps.run(
        augment,
        options,
        iter([Item(rows[2], "rows.jsonl", 3)]),
        tmp_path,
        Use.prompt,
        split_done=True,
        seed=1,
    )
    assert alone.rows == made(rows, 1)[3], "the rows before it don't matter"


def test_operations_take_turns(options: Augment, tmp_path: Path) -> None:
    rows = [{"prompt": f"what a great film this one is {word}"} for word in "abcdefghijklmnopqrst"]
    counts = steps.run(augment, options, rows, tmp_path, Use.prompt, split_done=True).figures[
        "counts"
    ]
    assert counts["rows"] == 20 and all(counts[name] >= 14 for name in OPERATIONS), counts
    assert sum(counts[name] for name in OPERATIONS) + counts["unchanged"] == 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- [film]", "group 1: expected two words or more"),
        ("- [film, no]", "found False; put it in quotes"),
        ("film", "expected a list of groups of words"),
        ("", "is empty"),
    ],
)
def test_bad_synonyms_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        steps.run(
            augment,
            Augment(synonyms=str(tmp_path / "s.yaml")),
            ROWS[Use.prompt],
            tmp_path,
            Use.prompt,
            split_done=True,
        )


def test_synonyms_are_asked_for() -> None:
    with pytest.raises(ValueError, match="synonyms=None is out of range"):
        Augment()
    assert Augment(operations=[Operation.swap, Operation.delete]).copies == 4
    one_way = make_synonyms({"film": ["movie"]}, "test")
    assert one_way("Film") == ("movie",) and one_way("movie") == ()


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plain, plain, plain)
def test_any_text_gives_whole_rows(
    options: Augment, tmp_path: Path, prompt: str, chosen: str, rejected: str
) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for new in steps.run(augment, options, [row], tmp_path, split_done=True).rows:
        assert (new["chosen"], new["rejected"]) == (chosen, rejected) and (
            new["prompt"].strip() or new["prompt"] == prompt
        )


# ---- back-translation ----


class Reversing:
    """A stub: there, words are reversed; back, each comes back with a mark, except that some come
    back empty or as they were.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[int, str, str]] = []

    def translate(self, texts: Any, source: str, target: str) -> list[str]:
        self.calls.append((len(texts), source, target))
        if target == "de":
            return ["" if "lost" in text else text[::-1] for text in texts]
        return [
            " "
            if "void" in text[::-1]
            else text[::-1].upper()
            if "same" in text[::-1]
            else text[::-1] + " indeed"
            for text in texts
        ]


def test_back_translation_counts_what_it_leaves_out(tmp_path: Path) -> None:
    options = BackTranslate(translator="x:y")
    texts = ["a film", "lost", "void", "same  film", "a film"]
    translator = Reversing()
    ran = steps.run(
        lambda o, i, c: back_translate(o, i, c, translator),
        options,
        [{"prompt": text} for text in texts],
        tmp_path,
        Use.prompt,
        split_done=True,
    )
    assert [row["prompt"] for row in ran.rows] == [
        "a film",
        "a film indeed",
        "lost",
        "void",
        "same  film",
        "a film",
        "a film indeed",
    ]
    assert ran.rows[1] == {
        "prompt": "a film indeed",
        "augmented": "back_translation",
        "augmented_from": "rows.jsonl, row 1",
    }
    assert ran.figures["counts"] == {
        "rows": 5,
        "texts": 4,
        "new": 2,
        "empty": 2,
        "equal": 1,
        "nothing_asked": 0,
    }
    assert translator.calls == [(4, "en", "de"), (3, "de", "en")], "each text once"


def test_back_translation_keeps_answers_and_held_out_rows(tmp_path: Path) -> None:
    rows = [
        Item({"prompt": "a", "chosen": "b", "rejected": "c"}, "f", n, split)
        for n, split in ((1, "train"), (2, "eval"))
    ]
    step = lambda o, i, c: back_translate(o, i, c, Reversing())  # noqa: E731
    ran = steps.run(step, BackTranslate(translator="x:y"), iter(rows), tmp_path, split_done=True)
    assert [(item.number, item.columns["prompt"], item.columns["chosen"]) for item in ran.kept] == [
        (1, "a", "b"),
        (1, "a indeed", "b"),
        (2, "a", "b"),
    ]
    with pytest.raises(UserError, match="expected a split step"):
        steps.run(step, BackTranslate(translator="x:y"), iter(rows), tmp_path)


def shout(texts: list[str], source: str, target: str) -> list[str]:
    return [f"{text} ({source}-{target})" for text in texts]


def short(texts: list[str], source: str, target: str) -> list[str]:
    return texts[1:]


def test_a_function_translates(tmp_path: Path) -> None:
    def run(name: str) -> steps.Ran:
        options = BackTranslate(translator=f"{__name__}:{name}", pivot="fr")
        return steps.run(
            back_translate,
            options,
            [{"prompt": "a"}, {"prompt": "b"}],
            tmp_path,
            Use.prompt,
            split_done=True,
        )

    assert [row["prompt"] for row in run("shout").rows] == [
        "a",
        "a (en-fr) (fr-en)",
        "b",
        "b (en-fr) (fr-en)",
    ]
    with pytest.raises(UserError, match="expected a list of 2 texts, found 1 values"):
        run("short")
    with pytest.raises(UserError, match=r"can't be loaded .* Expected pkg\.module:function"):
        run("none")


def test_translators_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the package argostranslate"):
        steps.run(
            back_translate,
            BackTranslate(translator="argos"),
            [{"prompt": "a"}],
            tmp_path,
            Use.prompt,
            split_done=True,
        )
    empty = BackTranslate(there=str(tmp_path), back=str(tmp_path))
    with pytest.raises(UserError, match=r"holds no config\.json"):
        steps.run(back_translate, empty, [{"prompt": "a"}], tmp_path, Use.prompt, split_done=True)
    for wrong in (
        {},
        {"there": "x"},
        {"translator": "google"},
        {"translator": "argos", "there": "x", "back": "y"},
        {"translator": "a:b", "pivot": "en"},
    ):
        with pytest.raises(ValueError, match="is out of range"):
            BackTranslate(**wrong)


def marian(folder: Path, seed: int) -> Path:
    """A tiny Marian model with random weights, and its tokenizer as opus-mt models have it: two
    SentencePiece files and a vocabulary.
    """
    import json

    import sentencepiece
    import torch
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    folder.mkdir()
    (folder / "text.txt").write_text(
        "\n".join(
            [
                "the film was great and the end was not",
                "a bad plot with a good actor",
                "what a film",
            ]
            * 20
        )
    )
    for side in ("source", "target"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"),
            model_prefix=str(folder / side),
            vocab_size=60,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.spm"))
    words = [
        "</s>",
        "<unk>",
        *(
            p
            for i in range(pieces.get_piece_size())
            if (p := pieces.id_to_piece(i)) not in ("</s>", "<unk>", "<s>")
        ),
        "<pad>",
    ]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    tokenizer = MarianTokenizer(
        source_spm=str(folder / "source.spm"),
        target_spm=str(folder / "target.spm"),
        vocab=str(folder / "vocab.json"),
        source_lang="en",
        target_lang="de",
    )
    torch.manual_seed(seed)
    size = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    pad = len(words) - 1
    model = MarianMTModel(
        MarianConfig(
            vocab_size=len(words),
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=32,
            pad_token_id=pad,
            eos_token_id=0,
            decoder_start_token_id=pad,
            forced_eos_token_id=0,
            init_std=1.0,
            **size,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_marian_models_translate(tmp_path: Path) -> None:
    """The mechanics, with random weights: batches and padding change nothing, long texts are
    counted, the same text has one translation.
    """
    there, back = marian(tmp_path / "there", 1), marian(tmp_path / "back", 2)
    rows = [
        {"prompt": text}
        for text in (
            "the film was great",
            "a bad plot",
            "what a film " * 40,
            "the end was not good and the actor was bad",
        )
    ]
    results = []
    for batch_size in (1, 4):
        options = BackTranslate(
            there=str(there), back=str(back), batch_size=batch_size, max_new_tokens=12
        )
        results.append(
            steps.run(back_translate, options, rows, tmp_path, Use.prompt, split_done=True)
        )
    one, other = results
    assert one.rows == other.rows and one.figures == other.figures
    counts = one.figures["counts"]
    assert (
        counts["texts"] == 4
        and counts["empty"] >= 1
        and counts["new"] + counts["empty"] + counts["equal"] == 4
    )
    assert counts["new"] >= 1 and any("augmented" in row for row in one.rows)
