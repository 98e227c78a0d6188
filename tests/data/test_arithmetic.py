"""The arithmetic recipe and its verifier: right answers, demonstrations as careless as they say, no
held-out sum in training in either order.
"""

from pathlib import Path

import pytest

from conf.choices import Recipe
from reward import functions
from rlhf.cli import config as configuration
from rlhf.data.recipes import arithmetic
from rlhf.data.recipes import build as recipes
from rlhf.models.loading import train_tokenizer
from tests.data.test_recipes import config, ensure

FILES = ("sft.jsonl", "sft_eval.jsonl", "prompts.jsonl", "prompts_eval.jsonl")


@pytest.fixture(scope="module")
def built() -> dict[str, list[arithmetic.Row]]:
    return arithmetic.rows(3)


def numbers(row: arithmetic.Row) -> tuple[int, int]:
    first, second = str(row["prompt"]).removesuffix("=").split("+")
    return int(first), int(second)


def test_every_answer_is_the_sum(built: dict[str, list[arithmetic.Row]]) -> None:
    assert tuple(sorted(built)) == tuple(sorted(FILES))
    for name in ("prompts.jsonl", "prompts_eval.jsonl"):
        assert all(
            set(row) == {"prompt", "answer"} and row["answer"] == str(sum(numbers(row)))
            for row in built[name]
        ), name
    assert all(
        10 <= number <= 99 for rows in built.values() for row in rows for number in numbers(row)
    )


def test_demonstrations_forget_the_carry_and_nothing_else(
    built: dict[str, list[arithmetic.Row]],
) -> None:
    """Right where the units don't carry; else 10 too low, about as often as FORGETS says, and never
    anything else.
    """
    forgotten: list[bool] = []
    for row in (*built["sft.jsonl"], *built["sft_eval.jsonl"]):
        first, second = numbers(row)
        assert set(row) == {"prompt", "completion"}
        units, tens, answer = map(int, str(row["completion"]).split(" "))
        assert (units, tens) == (first % 10 + second % 10, first // 10 + second // 10)
        short_by = first + second - answer
        assert short_by in (0, 10)
        if first % 10 + second % 10 >= 10:
            forgotten.append(short_by == 10)
        else:
            assert short_by == 0
    assert sum(forgotten) / len(forgotten) == pytest.approx(arithmetic.FORGETS, abs=0.04)
    assert (
        arithmetic.carries(37, 58) and arithmetic.carries(35, 15) and not arithmetic.carries(34, 15)
    )


def test_no_sum_is_in_two_files_in_either_order(built: dict[str, list[arithmetic.Row]]) -> None:
    """As unordered pairs, so that 58+37 in training keeps 37+58 out of the held-out files; together
    they are all pairs there are.
    """
    problems = {name: {tuple(sorted(numbers(row))) for row in rows} for name, rows in built.items()}
    for first in FILES:
        for second in FILES:
            assert first == second or not problems[first] & problems[second], (first, second)
    assert {len(problems[name]) for name in FILES[:2]} == {2000, 128} and len(
        problems["prompts_eval.jsonl"]
    ) == 256
    assert len(set().union(*problems.values())) == sum(map(len, problems.values())) == 90 * 91 // 2


def test_training_holds_both_orders_and_held_out_files_one(
    built: dict[str, list[arithmetic.Row]],
) -> None:
    for name in ("sft.jsonl", "prompts.jsonl"):
        pairs = [numbers(row) for row in built[name]]
        assert len(pairs) == len(set(pairs)) and {(b, a) for a, b in pairs} == set(pairs)
    held = [numbers(row) for row in built["prompts_eval.jsonl"]]
    assert len({tuple(sorted(pair)) for pair in held}) == len(held)
    assert 0.3 < sum(a > b for a, b in held) / len(held) < 0.7


def test_same_seed_same_rows_other_seed_other_rows(built: dict[str, list[arithmetic.Row]]) -> None:
    assert arithmetic.rows(3) == built
    mine, other = (
        {tuple(sorted(numbers(row))) for row in rows["prompts_eval.jsonl"]}
        for rows in (built, arithmetic.rows(4))
    )
    assert len(mine & other) < 50, (
        "another seed holds out other sums, not the same ones in another order"
    )


def test_ensure_writes_the_files(tmp_path: Path) -> None:
    ensure(config(tmp_path, recipe=Recipe.arithmetic))
    folder = tmp_path / "r" / "recipe"
    assert {path.name for path in folder.iterdir()} == {*FILES, recipes.META}
    stamp = (folder / "sft.jsonl").stat().st_mtime_ns
    ensure(config(tmp_path, recipe=Recipe.arithmetic))
    assert (folder / "sft.jsonl").stat().st_mtime_ns == stamp


def test_every_digit_is_a_token_of_the_experiments_tokenizer(
    built: dict[str, list[arithmetic.Row]],
) -> None:
    """The experiment asks for no merges by its vocabulary size, and its lengths hold every row."""
    cfg = configuration.compose(["stage=grpo", "experiment=arithmetic"])
    texts = [str(row[key]) for row in built["sft.jsonl"] for key in ("prompt", "completion")]
    tokenizer = train_tokenizer(texts, cfg.model.tiny.vocab_size, cfg.model.tiny.max_positions)
    for rows in built.values():
        for row in rows:
            for key, room in (
                ("prompt", cfg.data.max_prompt_length),
                ("answer", cfg.rollout.max_response_length - 1),
            ):
                text = str(row.get(key, row.get("completion")))
                assert len(tokenizer(text)["input_ids"]) == len(text) <= room


def test_the_final_answer_is_the_last_word() -> None:
    completions = [
        "95",
        "15 8 95\n",
        "95 ",
        "15 8 950",
        "095",
        "9 5",
        "",
        "95 8",
        [{"role": "assistant", "content": "15 8 95"}],
    ]
    expected = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert (
        functions.final_answer(
            completions=completions,
            answer=["95"] * len(completions),
            prompts=[""] * len(completions),
        )
        == expected
    )
    assert functions.final_answer(completions=["7", "8"], answer=[7, "7"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="row without one"):
        functions.final_answer(completions=["95", "95"], answer=["95", None])
