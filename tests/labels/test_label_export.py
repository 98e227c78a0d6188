"""stage=label label.mode=export from end to end: policies, choice, gold and repeats, ledger, files
that tell nothing, scores.
"""

import dataclasses
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from conf.choices import LabelKind, LabelTarget
from rlhf.cli import config
from rlhf.data import reading
from rlhf.labels.asking import Question, ask
from rlhf.labels.candidates import Response
from rlhf.labels.records import Answer, Export, Role
from rlhf.labels.targets import LABEL_TOOLS
from rlhf.models.loading import load_tokenizer
from rlhf.process.files import sha256
from rlhf.stages.labelling import answers as label_answers
from rlhf.stages.labelling.scoring import spread_of
from rlhf.types import Scores
from tests import toys
from tests.labels.label_steps import (
    GOLD,
    GROUPS,
    Tiny,
    configured,
    content,
    options,
    run_config,
    run_export,
    two,
)
from tests.reward.test_scorer import save_reward_model

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = "[page,label_studio,argilla,csv,xlsx,jsonl]"


@pytest.fixture(scope="module")
def exported(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Export]:
    """Two policies, gold and repeats, every target."""
    folder = tmp_path_factory.mktemp("export")
    gold = toys.write_jsonl(folder / "gold.jsonl", GOLD)
    (folder / "guide.md").write_text("# How to judge\n\nBe kind.", encoding="utf-8")
    chosen = [
        "label.responses=2",
        "label.budget=10",
        f"label.gold_path={gold}",
        "label.gold_share=0.3",
        "label.repeat_share=0.2",
    ]
    chosen += [
        f"label.targets={ALL}",
        f"label.instructions={folder / 'guide.md'}",
        "reward.function=tests.toys:even_tokens",
    ]
    return run_config(config.compose([*GROUPS, *options(folder, *two(tiny_model), *chosen)]))


# --- two policies
# ------------------------------------------------------------------------------------------


def test_the_budget_gold_and_repeats_go_out(exported: tuple[Path, Export]) -> None:
    place, export = exported
    assert Counter(task.role for task in export.tasks) == {
        Role.main: 10,
        Role.gold: 3,
        Role.repeat: 2,
    }
    main = [task for task in export.tasks if task.role is not Role.gold]
    assert {answer.policy for task in main for answer in task.answers} == {"northern", "southern"}
    assert all(
        answer.score is not None and 0 <= answer.score <= 1
        for task in main
        for answer in task.answers
    )
    assert len({task.prompt for task in main}) == 6 and all(
        answer.text.strip() for task in main for answer in task.answers
    )
    assert export.instructions == "# How to judge\n\nBe kind." and export.kind is LabelKind.pair
    for task in export.tasks:
        if task.role is Role.gold:
            assert task.best is not None and task.answers[task.best].text.startswith("right")
    metrics = json.loads((place / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert (
        metrics["label/tasks"] == 15
        and metrics["label/main"] == 10
        and metrics["label/gold"] == 3
        and metrics["label/repeats"] == 2
    )
    assert (
        metrics["label/prompts"] == 6
        and metrics["label/responses"] == 24
        and metrics["label/chosen_random"] == 10
    )
    assert {"time/rollout_s", "time/score_s", "time/choose_s", "time/write_s"} <= set(metrics)


def test_the_manifest_leads_back_to_what_it_was_made_of(
    exported: tuple[Path, Export], tiny_model: Tiny
) -> None:
    place, export = exported
    manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    assert [(p["kind"], p["path"]) for p in manifest["parents"]] == [
        ("policy", str(tiny_model())),
        ("policy", str(tiny_model(tied=False))),
    ]
    assert [Path(entry["path"]).name for entry in manifest["data"]] == [
        "prompts.jsonl",
        "gold.jsonl",
    ]
    (artifact,) = manifest["artifacts"]
    assert (
        artifact["name"] == "default-export"
        and artifact["kind"] == "label-export"
        and artifact["metadata"]["export"] == export.id
    )
    files = {entry["path"]: entry["sha256"] for entry in artifact["files"]}
    assert {
        "export.json",
        "tasks.jsonl",
        "out/label_tasks.jsonl",
        "out/label_sheet.xlsx",
        f"out/label-{export.id}.html",
    } <= set(files)
    assert all(sha256(place / name) == found for name, found in files.items())
    assert {path.relative_to(place).as_posix() for path in (place / "out").rglob("*")} == {
        name for name in files if name.startswith("out/")
    }
    assert export.details["policies"] == {
        "northern": str(tiny_model()),
        "southern": str(tiny_model(tied=False)),
    }
    assert (
        export.details["rewards"] == ["tests.toys:even_tokens"]
        and export.details["source"] == "policies"
    )


def everything(path: Path) -> bytes:
    """A file's bytes; of a workbook those of its sheets (an archive also has dates)."""
    if path.suffix != ".xlsx":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(
            archive.read(name)
            for name in sorted(archive.namelist())
            if not name.startswith("docProps/")
        )


def test_files_for_annotators_tell_nothing(exported: tuple[Path, Export], tiny_model: Tiny) -> None:
    place, _ = exported
    hidden = [
        "northern",
        "southern",
        tiny_model().name,
        tiny_model(tied=False).name,
        str(place.parent),
        "even_tokens",
        "chosen_by",
        "repeats",
    ]
    names = [path for path in (place / "out").rglob("*") if path.is_file()]
    assert len(names) >= 8
    for path in names:
        said = everything(path).decode("utf-8", "replace")
        assert [word for word in hidden if word in said] == [], path.name


def blind(export: Export) -> Export:
    """The export as if nothing were hidden in it: what annotators get must be the same."""
    tasks = [
        dataclasses.replace(
            task,
            answers=tuple(
                Answer(answer.text, score=answer.score if export.prelabel else None)
                for answer in task.answers
            ),
            role=Role.main,
            chosen_by="",
            best=None,
            repeats=None,
        )
        for task in export.tasks
    ]
    return dataclasses.replace(export, tasks=tuple(tasks), details={})


TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12
).filter(str.strip)


@given(
    texts=st.lists(TEXT, min_size=6, max_size=12, unique_by=str.strip),
    chat=st.booleans(),
    prelabel=st.booleans(),
    seed=st.integers(0, 99),
    kind=st.sampled_from(LabelKind),
)
# to shrink what is found would take minutes
@settings(deadline=None, max_examples=8, phases=[Phase.generate])
def test_no_target_writes_what_is_hidden(
    tmp_path_factory: pytest.TempPathFactory,
    texts: Sequence[str],
    chat: bool,
    prelabel: bool,
    seed: int,
    kind: LabelKind,
) -> None:
    """Whatever was hidden (policies, roles, methods, scores), the files are the same without it."""
    size = 2 if kind is LabelKind.pair else 3
    score = 0.5 if prelabel else None
    questions = [
        Question(
            [{"role": "user", "content": f"prompt {i}"}] if chat else f"prompt {i}",
            tuple(
                Answer(text, f"policy{j}", score and score + j, score)
                for j, text in enumerate(texts[i : i + size])
            ),
            by="uncertainty",
        )
        for i in range(len(texts) - size + 1)
    ]
    known = [
        dataclasses.replace(
            q,
            prompt="known" if not chat else [{"role": "user", "content": "known"}],
            best=q.answers[0].id,
        )
        for q in questions[:1]
    ]
    asked = ask(questions, known, repeats=1, seed=seed, created="2026")
    ratings = kind is LabelKind.pair
    export = Export(
        asked.id,
        kind,
        "Title",
        "",
        ratings,
        True,
        "2026",
        asked.tasks,
        prelabel,
        1,
        {"policies": {"policy0": "secret"}, "seed": seed},
    )
    for target, (write, _) in LABEL_TOOLS.items():
        first, second = (
            write(one, tmp_path_factory.mktemp(target.value)) for one in (export, blind(export))
        )
        assert [path.name for path in first] == [path.name for path in second]
        for ours, theirs in zip(first, second, strict=True):
            assert everything(ours) == everything(theirs), target


def test_the_seed_decides_the_whole_export(tmp_path: Path, tiny_model: Tiny) -> None:
    chosen = [
        *two(tiny_model),
        "label.prompts=3",
        "label.responses=2",
        "label.budget=4",
        "label.repeat_share=0.5",
    ]
    _, first = run_export(tmp_path, *chosen)
    _, same = run_export(tmp_path, *chosen, "run.name=again")
    _, other = run_export(tmp_path, *chosen, "run.name=other", "run.seed=1")
    assert content(first) == content(same) != content(other)
    assert len({answer.text for task in first.tasks for answer in task.answers}) > 4
    assert {task.prompt for task in first.tasks} <= {"alpha 0", "beta 0", "gamma 0"}


def test_policies_draw_apart_from_each_other(tmp_path: Path, tiny_model: Tiny) -> None:
    """One policy under two names: with common random numbers all its answers would be the same and
    there would be nothing to ask.
    """
    chosen = [
        f"label.policies={{one: {tiny_model()}, two: {tiny_model()}}}",
        "label.responses=1",
        "label.ab.enabled=true",
        "label.ab.effect=0.4",
    ]
    place, export = run_export(tmp_path, *chosen)
    ab = export.details["ab"]
    assert len(export.tasks) == 6 - ab["identical_of_all_prompts"] - ab["empty"] >= 4
    assert {tuple(sorted(answer.policy for answer in task.answers)) for task in export.tasks} == {
        ("one", "two")
    }
    assert (ab["policies"], ab["asked"], ab["effect"]) == (
        ["one", "two"],
        len(export.tasks),
        0.4,
    ) and ab["pairs"] > 6
    assert not (place / "start-1").exists()


def test_the_plan_of_a_comparison_is_said(
    tmp_path: Path,
    tiny_model: Tiny,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with caplog.at_level("INFO"):
        _, export = run_export(
            tmp_path,
            *two(tiny_model),
            "label.ab.enabled=true",
            "label.ab.effect=0.3",
            "label.budget=5",
            "label.responses=3",
        )
    pairs = export.details["ab"]["pairs"]
    assert f"{pairs} pairs are planned" in caplog.text
    assert "win rate of 0.8 with power 0.8" in caplog.text
    assert (
        f"label.budget=5 is less than the {pairs} pairs" in caplog.text
        and f"{pairs} pairs are planned, but 5 go out" in caplog.text
    )
    assert "one response of each policy" in caplog.text
    assert f"5 pairs of {pairs} planned" in capsys.readouterr().out
    assert len({task.prompt for task in export.tasks}) == 5 == len(export.tasks)


def test_ties_are_reported_in_proportion(
    tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 12 prompts 6 are answered alike; where 3 of the other 6 are asked about, 3 of the 6 ties
    belong to them.
    """
    said = [
        Response(f"p{i}", "same" if i < 6 else f"{name} {i}", name)
        for i in range(12)
        for name in ("northern", "southern")
    ]
    monkeypatch.setattr(label_answers, "write_answers", lambda *_: (said, 0))
    _, export = run_export(tmp_path, *two(tiny_model), "label.ab.enabled=true", "label.budget=3")
    assert {
        name: export.details["ab"][name]
        for name in ("identical", "identical_of_all_prompts", "asked")
    } == {
        "identical": 3,
        "identical_of_all_prompts": 6,
        "asked": 3,
    }


def test_a_ranking_asks_for_a_group(tmp_path: Path, tiny_model: Tiny) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"known {i}", "chosen": "best", "rejected": worse}
        for i in range(3)
        for worse in ("good", "fair", "bad")
    ]
    gold = toys.write_jsonl(tmp_path / "gold.jsonl", rows)
    chosen = [
        f"model.path={tiny_model()}",
        "label.kind=ranking",
        "label.group=3",
        "label.responses=5",
        "label.budget=4",
        f"label.gold_path={gold}",
    ]
    _, export = run_export(tmp_path, *chosen)
    assert Counter(task.role for task in export.tasks) == {Role.main: 4, Role.gold: 1}
    assert {len(task.answers) for task in export.tasks} == {3}
    assert {answer.policy for task in export.tasks for answer in task.answers} == {"policy", ""}


def test_policies_with_other_tokens_read_the_same_prompts(tmp_path: Path, tiny_model: Tiny) -> None:
    other = other_policy(tmp_path / "other")
    first, second = (
        load_tokenizer(configured(tmp_path, f"model.path={path}").model)
        for path in (tiny_model(), other)
    )
    assert first("alpha 0")["input_ids"] != second("alpha 0")["input_ids"]
    _, export = run_export(
        tmp_path, f"label.policies={{northern: {tiny_model()}, far: {other}}}", "label.responses=1"
    )
    assert {task.prompt for task in export.tasks} <= {
        row["prompt"] for row in toys.prompt_rows()[:6]
    } and len(export.tasks) >= 4


def other_policy(place: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    from conf.schema import TinyConfig
    from rlhf.models.loading import tiny_config, train_tokenizer

    tiny = TinyConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, layers=1, heads=1, max_positions=64
    )
    tokenizer = train_tokenizer(
        ["alpha beta gamma delta 0 1 2 3"] * 8, tiny.vocab_size, tiny.max_positions
    )
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(
        tiny_config(tiny, tokenizer), dtype=torch.float32
    ).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_an_adapter_writes_with_its_base(tmp_path: Path, tiny_model: Tiny) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 1.0)
    model.save_pretrained(tmp_path / "adapter")
    load_tokenizer(configured(tmp_path, f"model.path={tiny_model()}").model).save_pretrained(
        tmp_path / "adapter"
    )
    cfg = configured(tmp_path)
    run_export(
        tmp_path,
        f"label.policies={{base: {tiny_model()}, tuned: {tmp_path / 'adapter'}}}",
        "label.responses=1",
    )
    base_said, tuned_said = (
        [
            json.loads(line)
            for line in (tmp_path / f"default/label/answers/{i}.jsonl").read_text().splitlines()[1:]
        ]
        for i in (1, 2)
    )
    assert len(base_said) == len(tuned_said) == 6
    tokenizer = load_tokenizer(dataclasses.replace(cfg.model, path=str(tiny_model())))
    prompts = reading.tokenised(
        tokenizer,
        reading.distinct_prompts(reading.DataRequest.of(cfg), None),
        reading.DataRequest.of(cfg),
    )
    from rollout.hf import HFGenerator
    from rollout.sampling import Sampling

    merged = HFGenerator(
        model.merge_and_unload,
        tokenizer,
        Sampling.from_config(cfg.rollout),
        max_tokens=30,
        max_num_seqs=8,
        device=torch.device("cpu"),
    )
    expected = merged.generate(prompts, n=1, seed=label_answers.policy_seed(cfg.run.seed, "tuned"))
    assert [row["token_ids"] for row in tuned_said] == [rollout.token_ids for rollout in expected]
    assert not list((tmp_path / "default/label").glob("start*"))


# --- scores
# ------------------------------------------------------------------------------------------


def test_uncertainty_takes_the_closest_pairs(tmp_path: Path, tiny_model: Tiny) -> None:
    chosen = [
        f"model.path={tiny_model()}",
        "label.responses=4",
        "label.budget=6",
        "label.choice={uncertainty: 1.0}",
    ]
    _, export = run_export(tmp_path, *chosen, "reward.function=tests.toys:even_tokens")
    kept = [
        json.loads(line)
        for line in (tmp_path / "default/label/answers/1.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[1:]
    ]
    scores: dict[str, list[float]] = {}
    for row in kept:
        if row["response"].strip():
            scores.setdefault(row["prompt"], []).append(
                sum(token % 2 == 0 for token in row["token_ids"]) / len(row["token_ids"])
            )
    closest = sorted(
        min(abs(a - b) for i, a in enumerate(one) for b in one[:i]) for one in scores.values()
    )
    margins = sorted(
        abs((t.answers[0].score or 0.0) - (t.answers[1].score or 0.0)) for t in export.tasks
    )
    assert {task.chosen_by for task in export.tasks} == {"uncertainty"} and len(export.tasks) == 6
    assert margins == pytest.approx(closest)


def test_prelabels_are_of_every_task(tmp_path: Path, tiny_model: Tiny) -> None:
    """A gold task without a suggestion, among others that have one, would be known."""
    gold = toys.write_jsonl(tmp_path / "gold.jsonl", GOLD)
    chosen = [
        f"model.path={tiny_model()}",
        "label.prelabel=true",
        f"label.gold_path={gold}",
        "label.gold_share=0.5",
        "reward.function=tests.toys:even_tokens",
    ]
    _, export = run_export(tmp_path, *chosen, "label.budget=6")
    tokenizer = load_tokenizer(configured(tmp_path, f"model.path={tiny_model()}").model)
    assert export.prelabel and sum(task.role is Role.gold for task in export.tasks) == 3
    for answer in (
        answer for task in export.tasks if task.role is Role.gold for answer in task.answers
    ):
        ids = [*tokenizer(answer.text)["input_ids"], tokenizer.eos_token_id]
        assert answer.score == pytest.approx(sum(token % 2 == 0 for token in ids) / len(ids))


def test_an_ensemble_of_reward_models_scores_every_answer(tmp_path: Path, tiny_model: Tiny) -> None:
    """The second head is the first, negated: all answers have the same mean (held-out mean 0.1,
    deviation 2), but not the same spread.
    """
    import torch

    tokenizer = load_tokenizer(configured(tmp_path, f"model.path={tiny_model()}").model)
    save_reward_model(tmp_path / "one", tokenizer)
    other = save_reward_model(tmp_path / "two", tokenizer)
    with torch.no_grad():
        other.score.weight.neg_()
    other.save_pretrained(tmp_path / "two")
    terms = (
        f"reward.terms={{rm: {{kind: model, weight: 2.0, paths: [{tmp_path / 'one'}, "
        f"{tmp_path / 'two'}]}}}}"
    )
    chosen = [
        f"model.path={tiny_model()}",
        terms,
        "label.choice={uncertain_diverse: 0.5, uncertainty: 0.5}",
        "label.budget=6",
    ]
    place, export = run_export(tmp_path, *chosen)
    answers = [answer for task in export.tasks for answer in task.answers]
    assert [answer.score for answer in answers] == pytest.approx([2 * -0.1 / 2] * 12)
    assert (
        all(answer.spread is not None and answer.spread > 0 for answer in answers)
        and len({answer.spread for answer in answers}) > 6
    )
    assert Counter(task.chosen_by for task in export.tasks) == {
        "uncertainty": 3,
        "uncertain_diverse": 3,
    }
    parents = json.loads((place / "manifest.json").read_text(encoding="utf-8"))["parents"]
    assert [(p["kind"], Path(p["path"]).name) for p in parents] == [
        ("policy", tiny_model().name),
        ("reward", "one"),
        ("reward", "two"),
    ]


def test_an_ensembles_spread_is_that_of_the_total() -> None:
    scores = Scores(
        [0.0, 0.0],
        {},
        {"rm_spread": [1.0, 3.0], "other_spread": [2.0, 4.0], "rm_clipped": [0.0, 1.0]},
    )
    assert spread_of(scores, {"rm": 0.5}) == [0.5, 1.5]
    assert spread_of(scores, {"rm": 3.0, "other": -2.0, "length": 1.0}) == [
        5.0,
        pytest.approx(145**0.5),
    ]
    assert spread_of(scores, {"length": 1.0}) is None


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_writes_for_two_policies(tmp_path: Path, tiny_model: Tiny) -> None:
    _, export = run_export(
        tmp_path,
        *two(tiny_model),
        "rollout.backend=vllm",
        "rollout.kv_cache_gib=0.2",
        "label.responses=2",
        "label.budget=8",
    )
    assert len(export.tasks) == 8 and {
        answer.policy for task in export.tasks for answer in task.answers
    } == {"northern", "southern"}
    assert LabelTarget.page in LABEL_TOOLS
