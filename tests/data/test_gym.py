"""reasoning-gym as data and verifier: deterministic rows, no leak into the held-out ones, scores
equal to the package's own, broken rows refused.
"""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from conf.choices import Recipe, TermKind
from conf.schema import Config, DataConfig, GymConfig, RewardTerm, RunConfig
from conf.stages import DoctorStage
from reward.base import VerifierScorer
from reward.verifiers.evaluated import Gym
from rlhf.cli import config
from rlhf.data.recipes import build as recipes
from rlhf.data.recipes import gym
from rlhf.process.metadata import decode, encode
from rlhf.types import UserError
from tests.checking import check
from tests.reward.test_reward_terms import plain


def ensure(cfg: Config) -> None:
    recipes.ensure(cfg.data, cfg.run)


@pytest.fixture(scope="module")
def verifier() -> Iterator[Gym]:
    made = Gym(RewardTerm(kind=TermKind.gym))
    yield made
    made.worker.close()


def test_rows_are_shared_out_distinct_and_disjoint() -> None:
    files = gym.rows(
        GymConfig(
            tasks=["chain_sum", "lcm", "spell_backward"], rows=100, eval_rows=20, suffix="\nAnswer:"
        ),
        seed=1,
    )
    train, held = files["prompts.jsonl"], files["prompts_eval.jsonl"]
    assert {
        task: sum(r["task"] == task for r in train)
        for task in ("chain_sum", "lcm", "spell_backward")
    } == {
        "chain_sum": 34,
        "lcm": 33,
        "spell_backward": 33,
    }
    prompts = [str(r["prompt"]) for r in (*train, *held)]
    assert len(set(prompts)) == len(prompts) == 120 and all(
        p.endswith("\nAnswer:") for p in prompts
    )
    assert set(train[0]) == {"prompt", "answer", "task", "metadata"}


def test_same_seed_same_rows_and_neighbouring_seeds_share_few() -> None:
    """reasoning-gym seeds its row i with seed + i: taken as they are, seeds 1 and 2 would share all
    rows but one.
    """
    options = GymConfig(tasks=["lcm"], rows=60, eval_rows=4)
    first, again, other = (gym.rows(options, seed) for seed in (1, 1, 2))
    assert first == again
    shared = {str(r["prompt"]) for r in first["prompts.jsonl"]} & {
        str(r["prompt"]) for r in other["prompts.jsonl"]
    }
    assert len(shared) < 20


def test_chat_rows_and_task_options() -> None:
    options = GymConfig(
        tasks=["chain_sum"],
        rows=5,
        eval_rows=1,
        chat=True,
        system="Only the number.",
        options={"chain_sum": {"max_terms": 2}},
    )
    for row in gym.rows(options, 0)["prompts.jsonl"]:
        system, user = row["prompt"]  # type: ignore[misc]
        assert (
            system == {"role": "system", "content": "Only the number."} and user["role"] == "user"
        )
        assert json.loads(str(row["metadata"]))["metadata"]["num_terms"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (GymConfig(tasks=["chain_sun"]), "has no task 'chain_sun'. Nearest: chain_sum"),
        (
            GymConfig(tasks=["lcm"], options={"lcm": {"max_nmbers": 3}}),
            "data.gym.options.lcm=.*max_nmbers",
        ),
        (GymConfig(tasks=["lcm"], options={"lcm": {"min_numbers": 0}}), "data.gym.options.lcm="),
        (
            GymConfig(
                tasks=["coin_flip"],
                rows=3000,
                options={"coin_flip": {"min_trials": 1, "max_trials": 1}},
            ),
            "different questions in",
        ),
    ],
)
def test_tasks_and_options_that_are_none(
    options: GymConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gym, "_PATIENCE", 1)
    with pytest.raises(UserError, match=message):
        gym.rows(options, 0)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.fractions(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.integers() | st.text(max_size=3) | st.tuples(st.integers()), inner, max_size=3
        )
        | st.sets(st.integers(), max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_metadata_survives_json(value: Any) -> None:
    found = decode(json.loads(json.dumps(encode(value))))
    assert found == value and repr(type(found)) == repr(type(value))


def test_metadata_that_json_cannot_hold() -> None:
    assert decode(encode({"__kind__": "tuple", "items": [Fraction(1, 2)]})) == {
        "__kind__": "tuple",
        "items": [Fraction(1, 2)],
    }
    with pytest.raises(TypeError, match="found object"):
        encode({"a": [object()]})


# arc_agi and rearc hold tuples, gsm_symbolic fractions, time_intervals reads its options while
# scoring, binary_matrix evaluates the answer
@pytest.mark.parametrize(
    "task",
    [
        "chain_sum",
        "arc_agi",
        "gsm_symbolic",
        "time_intervals",
        "binary_matrix",
        "countdown",
        "word_ladder",
    ],
)
def test_scores_are_the_package_s_own(task: str, verifier: Gym) -> None:
    (row,) = gym.rows(GymConfig(tasks=[task], rows=1, eval_rows=1), 5)["prompts.jsonl"]
    reference = verifier.reference(row["metadata"])
    dataset = reasoning_gym.create_dataset(task, seed=gym.task_seed(5, task), size=40)
    entry = next(e for e in dataset if e["question"] == reference["question"])
    right = str(row["answer"])
    assert (
        verifier.score(f"Let me see. <answer>{right}</answer>", reference)
        == dataset.score_answer(right, entry)
        == 1.0
    )
    for wrong in ("17", "no idea", right[:-1]):
        assert verifier.score(wrong, reference) == pytest.approx(dataset.score_answer(wrong, entry))
    assert verifier.score("no idea", reference) < 1


def test_a_response_that_breaks_the_package_is_wrong(verifier: Gym) -> None:
    (row,) = gym.rows(GymConfig(tasks=["prime_factorization"], rows=1, eval_rows=1), 0)[
        "prompts.jsonl"
    ]
    reference = verifier.reference(row["metadata"])
    with pytest.raises(ValueError, match="invalid literal"):
        reasoning_gym.get_score_answer_fn("prime_factorization")(
            "no idea", {"answer": row["answer"], "metadata": decode(reference["metadata"])}
        )
    assert verifier.score("no idea", reference) == 0.0
    assert verifier.score(str(row["answer"]), reference) == 1.0


def test_a_response_that_is_evaluated_does_nothing(verifier: Gym, tmp_path: Path) -> None:
    """Some of the package's verifiers call eval on the answer."""
    (row,) = gym.rows(GymConfig(tasks=["binary_matrix"], rows=1, eval_rows=1), 0)["prompts.jsonl"]
    entry = {
        "answer": row["answer"],
        "metadata": decode(json.loads(str(row["metadata"]))["metadata"]),
    }
    target = tmp_path / "written"
    attack = f"[open({str(target)!r}, 'w').write('x')]"
    reasoning_gym.get_score_answer_fn("binary_matrix")(attack, entry)
    assert target.exists(), "the package evaluates answers no longer: this guard can go"
    target.unlink()
    reference = verifier.reference(row["metadata"])
    for response in (attack, f"[__import__('os').system('touch {target}')]", "[9**9**9**9]"):
        assert verifier.score(response, reference) < 1
    assert not target.exists()
    assert verifier.score(str(row["answer"]), reference) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda entry: entry.pop("question"),
            "expected an object with task, config, question, answer, metadata",
        ),
        (
            lambda entry: entry.update(task="no_such"),
            "the task 'no_such' can't score its own answer",
        ),
        (
            lambda entry: entry.update(metadata={}),
            "the task 'time_intervals' can't score its own answer",
        ),
    ],
)
def test_broken_rows_stop_the_run_and_name_the_prompt(
    change: Any, message: str, verifier: Gym
) -> None:
    (row,) = gym.rows(GymConfig(tasks=["time_intervals"], rows=1, eval_rows=1), 0)["prompts.jsonl"]
    entry = json.loads(str(row["metadata"]))
    change(entry)
    with pytest.raises(
        UserError, match=rf"reward\.terms\.solved, column 'metadata' of prompt 'p0'.*{message}"
    ):
        VerifierScorer("solved", verifier).score([plain("1", metadata=json.dumps(entry))])


def test_a_task_whose_verifier_takes_anything_is_refused(verifier: Gym) -> None:
    (row,) = gym.rows(GymConfig(tasks=["game_of_life_halting"], rows=1, eval_rows=1), 0)[
        "prompts.jsonl"
    ]
    with pytest.raises(
        UserError, match="gives full marks to 'qzx', so its verifier verifies nothing"
    ):
        VerifierScorer("solved", verifier).score([plain("1", metadata=row["metadata"])])


def test_recipe_writes_once_and_preflight_accepts_it(tmp_path: Path) -> None:
    overrides = [
        "stage=ppo",
        "reward=gym",
        "data.recipe=gym",
        "data.gym.tasks=[chain_sum,lcm]",
        "data.gym.rows=12",
        "data.gym.eval_rows=4",
    ]
    overrides += [
        "data.gym.options.chain_sum.max_terms=3",
        f"run.dir={tmp_path}",
        "run.name=r",
        f"data.path={tmp_path}/r/recipe/prompts.jsonl",
    ]
    cfg = config.compose(
        [*overrides, "model=tiny", "tracking=none", "rollout=hf", "stage.critic_init=policy"]
    )
    assert cfg.data.gym.options == {"chain_sum": {"max_terms": 3}}
    ensure(cfg)
    meta = json.loads((tmp_path / "r" / "recipe" / recipes.META).read_text())
    assert meta["files"]["prompts.jsonl"]["rows"] == 12 and meta["origin"]["options"][
        "options"
    ] == {"chain_sum": {"max_terms": 3}}
    assert check(cfg) == []
    cfg.data.gym.rows = 13
    with pytest.raises(UserError, match="holds other rows"):
        ensure(cfg)


def test_the_recipe_s_seed_is_its_own_or_the_run_s(tmp_path: Path) -> None:
    def prompts(name: str, run_seed: int, seed: int | None) -> str:
        data = DataConfig(recipe=Recipe.gym, gym=GymConfig(rows=4, eval_rows=1, seed=seed))
        ensure(
            Config(
                stage=DoctorStage(),
                run=RunConfig(dir=str(tmp_path), name=name, seed=run_seed),
                data=data,
            )
        )
        return (tmp_path / name / "recipe" / "prompts.jsonl").read_text()

    assert prompts("a", 1, None) == prompts("b", 2, 1) != prompts("c", 2, None)


def test_options_below_the_free_dictionary_only() -> None:
    with pytest.raises(UserError, match=r"data\.gym\.optoins\.x: .*data\.gym\.options"):
        config.compose(["stage=ppo", "+data.gym.optoins.x=1"])
    with pytest.raises(UserError, match=r"data\.gym\.options=\['lcm'\] is out of range"):
        config.compose(["stage=ppo", "data.gym.options.lcm.max_value=3"])
