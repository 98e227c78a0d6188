"""stage=label label.mode=export from end to end: sources, choice, gold and repeats, ledger, files that tell nothing, resume, push."""

import dataclasses
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import LabelKind, LabelTarget
from conf.labelling import LabelConfig
from rlhf import config, preflight
from rlhf.__main__ import execute
from rlhf.data.hashing import sha256
from rlhf.data.labelling import server
from rlhf.data.labelling.asking import Question, ask
from rlhf.data.labelling.candidates import Response
from rlhf.data.labelling.checks_export import instructions_text
from rlhf.data.labelling.ledger import read_export, task_row
from rlhf.data.labelling.records import Answer, Export, Role, Task
from rlhf.data.labelling.targets import TARGETS
from rlhf.models import load_tokenizer
from rlhf.stages import label_answers, label_export, label_sources
from rlhf.types import Scores, UserError
from tests import toys

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = "[page,label_studio,argilla,csv,xlsx,jsonl]"
GOLD = [{"prompt": f"known {i}", "chosen": f"right {i}", "rejected": f"wrong {i}"} for i in range(6)]
Tiny = Callable[..., Path]


def overrides(folder: Path, *more: str, prompts: bool = True) -> list[str]:
    base = ["stage=label", "rollout=hf", "tracking=none", f"run.dir={folder}", "data.max_prompt_length=24", "rollout.max_response_length=6"]
    if prompts:
        base.append(f"data.path={toys.write_jsonl(folder / 'prompts.jsonl', toys.prompt_rows()[:6])}")
    return [*base, "label.targets=[jsonl]", *more]


def run_export(folder: Path, *more: str, prompts: bool = True) -> tuple[Path, Export]:
    """The run directory and its export, through what the command line runs after Hydra: preflight and stage."""
    cfg = config.compose(overrides(folder, *more, prompts=prompts))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("rlhf.plots.plot_run", lambda _: [])  # a second of matplotlib for a run of one step
        execute(cfg, ())
    place = folder / cfg.run.name / "label"
    return place, read_export(place)


def two(tiny_model: Tiny) -> list[str]:
    return [f"label.policies={{northern: {tiny_model()}, southern: {tiny_model(tied=False)}}}"]


def content(export: Export) -> list[Any]:
    return [(task.prompt, task.answers, task.order, task.role, task.chosen_by) for task in export.tasks]


@pytest.fixture(scope="module")
def exported(tiny_model: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Export]:
    """Two policies, gold and repeats, every target."""
    folder = tmp_path_factory.mktemp("export")
    gold = toys.write_jsonl(folder / "gold.jsonl", GOLD)
    (folder / "guide.md").write_text("# How to judge\n\nBe kind.", encoding="utf-8")
    options = ["label.responses=2", "label.budget=10", f"label.gold_path={gold}", "label.gold_share=0.3", "label.repeat_share=0.2"]
    options += [f"label.targets={ALL}", f"label.instructions={folder / 'guide.md'}", "reward.function=tests.toys:even_tokens"]
    return run_export(folder, *two(tiny_model), *options)


# --- two policies ------------------------------------------------------------------------------------------------------------


def test_the_budget_gold_and_repeats_go_out(exported: tuple[Path, Export]) -> None:
    place, export = exported
    assert Counter(task.role for task in export.tasks) == {Role.main: 10, Role.gold: 3, Role.repeat: 2}
    main = [task for task in export.tasks if task.role is not Role.gold]
    assert {answer.policy for task in main for answer in task.answers} == {"northern", "southern"}
    assert all(answer.score is not None and 0 <= answer.score <= 1 for task in main for answer in task.answers)
    assert len({task.prompt for task in main}) == 6 and all(answer.text.strip() for task in main for answer in task.answers)
    assert export.instructions == "# How to judge\n\nBe kind." and export.kind is LabelKind.pair
    for task in export.tasks:
        if task.role is Role.gold:
            assert task.best is not None and task.answers[task.best].text.startswith("right")
    metrics = json.loads((place / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["label/tasks"] == 15 and metrics["label/main"] == 10 and metrics["label/gold"] == 3 and metrics["label/repeats"] == 2
    assert metrics["label/prompts"] == 6 and metrics["label/responses"] == 24 and metrics["label/chosen_random"] == 10
    assert {"time/rollout_s", "time/score_s", "time/choose_s", "time/write_s"} <= set(metrics)


def test_the_manifest_leads_back_to_what_it_was_made_of(exported: tuple[Path, Export], tiny_model: Tiny) -> None:
    place, export = exported
    manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    assert [(p["kind"], p["path"]) for p in manifest["parents"]] == [("policy", str(tiny_model())), ("policy", str(tiny_model(tied=False)))]
    assert [Path(entry["path"]).name for entry in manifest["data"]] == ["prompts.jsonl", "gold.jsonl"]
    (artifact,) = manifest["artifacts"]
    assert artifact["name"] == "default-export" and artifact["kind"] == "label-export" and artifact["metadata"]["export"] == export.id
    files = {entry["path"]: entry["sha256"] for entry in artifact["files"]}
    assert {"export.json", "tasks.jsonl", "out/label_tasks.jsonl", "out/label_sheet.xlsx", f"out/label-{export.id}.html"} <= set(files)
    assert all(sha256(place / name) == found for name, found in files.items())
    assert {path.relative_to(place).as_posix() for path in (place / "out").rglob("*")} == {name for name in files if name.startswith("out/")}
    assert export.details["policies"] == {"northern": str(tiny_model()), "southern": str(tiny_model(tied=False))}
    assert export.details["rewards"] == ["tests.toys:even_tokens"] and export.details["source"] == "policies"


def everything(path: Path) -> bytes:
    """A file's bytes; of a workbook those of its sheets (an archive also has dates)."""
    if path.suffix != ".xlsx":
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in sorted(archive.namelist()) if not name.startswith("docProps/"))


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
        "swapped",
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
            answers=tuple(Answer(answer.text, score=answer.score if export.prelabel else None) for answer in task.answers),
            role=Role.main,
            chosen_by="",
            best=None,
            repeats=None,
        )
        for task in export.tasks
    ]
    return dataclasses.replace(export, tasks=tuple(tasks), details={})


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=12).filter(str.strip)


@given(
    texts=st.lists(TEXT, min_size=6, max_size=12, unique_by=str.strip),
    chat=st.booleans(),
    prelabel=st.booleans(),
    seed=st.integers(0, 99),
    kind=st.sampled_from(LabelKind),
)
@settings(deadline=None, max_examples=8)
def test_no_target_writes_what_is_hidden(
    tmp_path_factory: pytest.TempPathFactory, texts: Sequence[str], chat: bool, prelabel: bool, seed: int, kind: LabelKind
) -> None:
    """Whatever was hidden (policies, roles, methods, scores), the files are the same without it."""
    size = 2 if kind is LabelKind.pair else 3
    score = 0.5 if prelabel else None
    questions = [
        Question(
            [{"role": "user", "content": f"prompt {i}"}] if chat else f"prompt {i}",
            tuple(Answer(text, f"policy{j}", score and score + j, score) for j, text in enumerate(texts[i : i + size])),
            by="uncertainty",
        )
        for i in range(len(texts) - size + 1)
    ]
    known = [
        dataclasses.replace(q, prompt="known" if not chat else [{"role": "user", "content": "known"}], best=q.answers[0].id) for q in questions[:1]
    ]
    asked = ask(questions, known, repeats=1, seed=seed, created="2026")
    ratings = kind is LabelKind.pair
    export = Export(asked.id, kind, "Title", "", ratings, True, "2026", asked.tasks, prelabel, 1, {"policies": {"policy0": "secret"}, "seed": seed})
    for target, (write, _) in TARGETS.items():
        first, second = (write(one, tmp_path_factory.mktemp(target.value)) for one in (export, blind(export)))
        assert [path.name for path in first] == [path.name for path in second]
        for ours, theirs in zip(first, second, strict=True):
            assert everything(ours) == everything(theirs), target


def test_the_seed_decides_the_whole_export(tmp_path: Path, tiny_model: Tiny) -> None:
    options = [*two(tiny_model), "label.prompts=3", "label.responses=2", "label.budget=4", "label.repeat_share=0.5"]
    _, first = run_export(tmp_path, *options)
    _, same = run_export(tmp_path, *options, "run.name=again")
    _, other = run_export(tmp_path, *options, "run.name=other", "run.seed=1")
    assert content(first) == content(same) != content(other)
    assert len({answer.text for task in first.tasks for answer in task.answers}) > 4
    assert {task.prompt for task in first.tasks} <= {"alpha 0", "beta 0", "gamma 0"}


def test_policies_draw_apart_from_each_other(tmp_path: Path, tiny_model: Tiny) -> None:
    """One policy under two names: with common random numbers all its answers would be the same and there would be nothing to ask."""
    options = [f"label.policies={{one: {tiny_model()}, two: {tiny_model()}}}", "label.responses=1", "label.ab.enabled=true", "label.ab.effect=0.4"]
    place, export = run_export(tmp_path, *options)
    ab = export.details["ab"]
    assert len(export.tasks) == 6 - ab["identical_of_all_prompts"] - ab["empty"] >= 4
    assert {tuple(sorted(answer.policy for answer in task.answers)) for task in export.tasks} == {("one", "two")}
    assert (ab["a"], ab["b"], ab["asked"], ab["effect"]) == ("one", "two", len(export.tasks), 0.4) and ab["pairs"] > 6
    assert not (place / "start-1").exists()


def test_the_plan_of_a_comparison_is_said(
    tmp_path: Path, tiny_model: Tiny, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("INFO"):
        _, export = run_export(tmp_path, *two(tiny_model), "label.ab.enabled=true", "label.ab.effect=0.3", "label.budget=5", "label.responses=3")
    pairs = export.details["ab"]["pairs"]
    assert f"{pairs} pairs are planned, to find a win rate of 0.8 with power 0.8" in caplog.text
    assert f"label.budget=5 is less than the {pairs} pairs" in caplog.text and f"{pairs} pairs are planned, but 5 go out" in caplog.text
    assert "one response of each policy to each prompt" in caplog.text
    assert f"5 pairs of {pairs} planned" in capsys.readouterr().out
    assert len({task.prompt for task in export.tasks}) == 5 == len(export.tasks)


def test_ties_are_reported_in_proportion(tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 prompts 6 are answered alike; where 3 of the other 6 are asked about, 3 of the 6 ties belong to them."""
    said = [Response(f"p{i}", "same" if i < 6 else f"{name} {i}", name) for i in range(12) for name in ("northern", "southern")]
    monkeypatch.setattr(label_sources.label_answers, "write_answers", lambda *_: (said, 0))
    _, export = run_export(tmp_path, *two(tiny_model), "label.ab.enabled=true", "label.budget=3")
    assert {name: export.details["ab"][name] for name in ("identical", "identical_of_all_prompts", "asked")} == {
        "identical": 3,
        "identical_of_all_prompts": 6,
        "asked": 3,
    }


def test_a_ranking_asks_for_a_group(tmp_path: Path, tiny_model: Tiny) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": f"known {i}", "chosen": "best", "rejected": worse} for i in range(3) for worse in ("good", "fair", "bad")
    ]
    gold = toys.write_jsonl(tmp_path / "gold.jsonl", rows)
    options = [f"model.path={tiny_model()}", "label.kind=ranking", "label.group=3", "label.responses=5", "label.budget=4", f"label.gold_path={gold}"]
    _, export = run_export(tmp_path, *options)
    assert Counter(task.role for task in export.tasks) == {Role.main: 4, Role.gold: 1}
    assert {len(task.answers) for task in export.tasks} == {3}
    assert {answer.policy for task in export.tasks for answer in task.answers} == {"policy", ""}


def test_policies_with_other_tokens_read_the_same_prompts(tmp_path: Path, tiny_model: Tiny) -> None:
    other = other_policy(tmp_path / "other")
    first, second = (load_tokenizer(config.compose([*overrides(tmp_path), f"model.path={path}"]).model) for path in (tiny_model(), other))
    assert first("alpha 0")["input_ids"] != second("alpha 0")["input_ids"]
    _, export = run_export(tmp_path, f"label.policies={{northern: {tiny_model()}, far: {other}}}", "label.responses=1")
    assert {task.prompt for task in export.tasks} <= {row["prompt"] for row in toys.prompt_rows()[:6]} and len(export.tasks) >= 4


def other_policy(place: Path) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    from conf.schema import TinyConfig
    from rlhf.models import tiny_config, train_tokenizer

    tiny = TinyConfig(vocab_size=320, hidden_size=32, intermediate_size=48, layers=1, heads=1, max_positions=64)
    tokenizer = train_tokenizer(["alpha beta gamma delta 0 1 2 3"] * 8, tiny.vocab_size, tiny.max_positions)
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(tiny_config(tiny, tokenizer), dtype=torch.float32).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_an_adapter_writes_with_its_base(tmp_path: Path, tiny_model: Tiny) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(0.0, 1.0)
    model.save_pretrained(tmp_path / "adapter")
    load_tokenizer(config.compose([*overrides(tmp_path), f"model.path={tiny_model()}"]).model).save_pretrained(tmp_path / "adapter")
    cfg = config.compose(overrides(tmp_path))
    run_export(tmp_path, f"label.policies={{base: {tiny_model()}, tuned: {tmp_path / 'adapter'}}}", "label.responses=1")
    base_said, tuned_said = (
        [json.loads(line) for line in (tmp_path / f"default/label/answers/{i}.jsonl").read_text().splitlines()[1:]] for i in (1, 2)
    )
    assert len(base_said) == len(tuned_said) == 6
    tokenizer = load_tokenizer(dataclasses.replace(cfg.model, path=str(tiny_model())))
    prompts = label_answers.reading.tokenised(tokenizer, label_answers.reading.distinct_prompts(cfg, None), cfg.data)
    from rollout.hf import HFGenerator
    from rollout.sampling import Sampling

    merged = HFGenerator(
        model.merge_and_unload, tokenizer, Sampling.from_config(cfg.rollout), max_tokens=30, max_num_seqs=8, device=torch.device("cpu")
    )
    expected = merged.generate(prompts, n=1, seed=label_answers.policy_seed(cfg.run.seed, "tuned"))
    assert [row["token_ids"] for row in tuned_said] == [rollout.token_ids for rollout in expected]
    assert not list((tmp_path / "default/label").glob("start*"))


# --- scores ------------------------------------------------------------------------------------------------------------------


def test_uncertainty_takes_the_closest_pairs(tmp_path: Path, tiny_model: Tiny) -> None:
    options = [f"model.path={tiny_model()}", "label.responses=4", "label.budget=6", "label.choice={uncertainty: 1.0}"]
    _, export = run_export(tmp_path, *options, "reward.function=tests.toys:even_tokens")
    kept = [json.loads(line) for line in (tmp_path / "default/label/answers/1.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    scores: dict[str, list[float]] = {}
    for row in kept:
        if row["response"].strip():
            scores.setdefault(row["prompt"], []).append(sum(token % 2 == 0 for token in row["token_ids"]) / len(row["token_ids"]))
    closest = sorted(min(abs(a - b) for i, a in enumerate(one) for b in one[:i]) for one in scores.values())
    margins = sorted(abs((t.answers[0].score or 0.0) - (t.answers[1].score or 0.0)) for t in export.tasks)
    assert {task.chosen_by for task in export.tasks} == {"uncertainty"} and len(export.tasks) == 6
    assert margins == pytest.approx(closest)


def test_prelabels_are_of_every_task(tmp_path: Path, tiny_model: Tiny) -> None:
    """A gold task without a suggestion, among others that have one, would be known."""
    gold = toys.write_jsonl(tmp_path / "gold.jsonl", GOLD)
    options = [
        f"model.path={tiny_model()}",
        "label.prelabel=true",
        f"label.gold_path={gold}",
        "label.gold_share=0.5",
        "reward.function=tests.toys:even_tokens",
    ]
    _, export = run_export(tmp_path, *options, "label.budget=6")
    tokenizer = load_tokenizer(config.compose([*overrides(tmp_path), f"model.path={tiny_model()}"]).model)
    assert export.prelabel and sum(task.role is Role.gold for task in export.tasks) == 3
    for answer in (answer for task in export.tasks if task.role is Role.gold for answer in task.answers):
        ids = [*tokenizer(answer.text)["input_ids"], tokenizer.eos_token_id]
        assert answer.score == pytest.approx(sum(token % 2 == 0 for token in ids) / len(ids))


def test_an_ensembles_spread_is_that_of_the_total() -> None:
    scores = Scores([0.0, 0.0], {}, {"rm_spread": [1.0, 3.0], "other_spread": [2.0, 4.0], "rm_clipped": [0.0, 1.0]})
    assert label_answers.spread_of(scores, {"rm": 0.5}) == [0.5, 1.5]
    assert label_answers.spread_of(scores, {"rm": 3.0, "other": -2.0, "length": 1.0}) == [5.0, pytest.approx(145**0.5)]
    assert label_answers.spread_of(scores, {"length": 1.0}) is None


# --- runs' samples and review queues -----------------------------------------------------------------------------------------


def sample_rows() -> list[dict[str, object]]:
    return [
        {"step": step, "prompt": f"p{i}", "response": f"answer {i} at {step}", "score": step / 10 + i, "kl": None}
        for step in (1, 5, 9)
        for i in range(4)
    ] + [{"step": 12, "prompt": "p0", "response": " answer 0 at 1 ", "score": 3.0}, {"step": 12, "prompt": "p1", "response": "", "score": 3.0}]


def samples_of(folder: Path, rows: list[dict[str, object]] | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("run: {name: alpha}\nstage: {name: ppo}\nreward: {path: rm}\n", encoding="utf-8")
    return toys.write_jsonl(folder / "samples.jsonl", rows if rows is not None else sample_rows())


def test_a_runs_samples_are_compared_across_its_steps(tmp_path: Path) -> None:
    place = samples_of(tmp_path / "alpha/ppo")
    directory, export = run_export(tmp_path, f"label.samples=[{place}]", "label.choice={uncertainty: 1.0}", "label.budget=4", prompts=False)
    assert sorted(task.prompt for task in export.tasks) == ["p0", "p1", "p2", "p3"]
    assert all(abs((t.answers[0].score or 0) - (t.answers[1].score or 0)) == pytest.approx(0.4) for t in export.tasks)
    assert {answer.policy for task in export.tasks for answer in task.answers} <= {"alpha/1", "alpha/5", "alpha/9"}
    metrics = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["metrics"]
    assert (metrics["label/responses"], metrics["label/duplicates"], metrics["label/empty"]) == (14, 1, 1)
    manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["parents"][0] == {"kind": "samples", "path": str(place.parent), "summary_sha256": None}
    assert [entry["path"] for entry in manifest["data"]] == [str(place)]


def test_templated_samples_get_the_prompts_of_the_data(tmp_path: Path, tiny_model: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    chats = [[{"role": "user", "content": text}] for text in ("hello", "bye")]
    rows = [
        {"step": step, "prompt": f"<|im_start|>user\n{chat[0]['content']}<|im_end|>\n<|im_start|>assistant\n", "response": f"r{step}"}
        for step in (1, 2)
        for chat in chats
    ]
    place = samples_of(tmp_path / "alpha/ppo", [*rows, {"step": 1, "prompt": "other", "response": "r"}])
    _, plain = run_export(tmp_path, f"label.samples=[{place}]", prompts=False)
    assert "4 of 5 responses hold marks of a chat template" in caplog.text and plain.tasks[0].prompt.startswith("<|im_start|>user")
    data = toys.write_jsonl(tmp_path / "chats.jsonl", [{"prompt": chat} for chat in chats])
    options = [f"label.samples=[{place}]", f"data.path={data}", f"model.path={tiny_model()}", "data.chat_template=chatml", "run.name=own"]
    _, export = run_export(tmp_path, *options, "data.max_prompt_length=60", prompts=False)
    assert sorted(task.prompt[0]["content"] for task in export.tasks) == ["bye", "hello"]
    assert "1 of 5 responses answer no prompt of data.path" in caplog.text
    with pytest.raises(UserError, match=r"not one of the 5 responses answers a prompt of data.path=.*the first is to '<\|im_start"):
        run_export(tmp_path, *options, "data.chat_template=llama-3", "data.max_prompt_length=200", "run.name=wrong", prompts=False)


def test_an_evaluations_samples_are_two_policies(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"step": 0, "prompt": f"p{i}", "response_before": f"old {i}", "response": "old 1" if i == 1 else f"new {i}"} for i in range(4)
    ]
    _, export = run_export(tmp_path, f"label.samples=[{samples_of(tmp_path / 'alpha/eval', rows)}]", "label.ab.enabled=true", prompts=False)
    assert len(export.tasks) == 3 and export.details["ab"]["identical"] == 1
    assert {answer.policy for task in export.tasks for answer in task.answers} == {"alpha/before", "alpha/after"}
    place = samples_of(tmp_path / "beta/ppo")
    with pytest.raises(UserError, match=r"compares two policies, found 4 in label.samples: alpha/1, alpha/5"):
        run_export(tmp_path, f"label.samples=[{place}]", "label.ab.enabled=true", "run.name=more", prompts=False)


def test_scores_of_two_rewards_are_said_to_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = samples_of(tmp_path / "alpha/ppo"), samples_of(tmp_path / "beta/ppo")
    other.with_name("config.yaml").write_text("run: {name: beta}\nreward: {path: another}\n", encoding="utf-8")
    run_export(tmp_path, f"label.samples=[{one},{other}]", "label.choice={uncertainty: 1.0}", prompts=False)
    assert "the scores come from different rewards" in caplog.text


def test_a_review_goes_out_again_with_sides_drawn_anew(tmp_path: Path) -> None:
    answers = [(Answer(f"a{i}", "north", 1.0), Answer(f"b{i}", "south", 2.0)) for i in range(8)]
    old = [Task(f"old-{i}", f"p{i}", tuple(sorted(pair, key=lambda a: a.id)), (0, 1), Role.main, "random") for i, pair in enumerate(answers)]
    place = toys.write_jsonl(tmp_path / "review.jsonl", [task_row(task) | {"labels": []} for task in old])
    _, export = run_export(tmp_path, f"label.review={place}", "label.budget=2", "label.prelabel=true", prompts=False)
    assert len(export.tasks) == 8 and {task.chosen_by for task in export.tasks} == {"review"}
    known = {task.id: task for task in old}
    assert sorted(export.details["origins"].values()) == sorted(known)
    for task in export.tasks:
        assert task.answers == known[export.details["origins"][task.id]].answers
    assert Counter(task.answers[task.order[0]].policy for task in export.tasks) == {"north": 4, "south": 4}


# --- stopping and going on ---------------------------------------------------------------------------------------------------


class Loud:
    """A server that fails as often as it is told to, and remembers what it got."""

    def __init__(self, failures: int) -> None:
        self.failures, self.got = failures, list[tuple[str, str, str]]()

    def push(self, export: Export, *, url: str, token: str) -> int:
        if self.failures:
            self.failures -= 1
            raise UserError(f"{url} can't be reached.")
        self.got.append((export.id, url, token))
        return 40 + len(self.got)


def test_a_failed_push_loses_nothing(tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    loud = Loud(failures=1)
    monkeypatch.setattr(server, "push", loud.push)
    monkeypatch.setenv("LABEL_STUDIO_API_KEY", "secret-token")
    options = [f"model.path={tiny_model()}", "label.push=true", "label.url=http://localhost:8080", "label.budget=4"]
    with pytest.raises(UserError, match=r"can't be reached. Nothing is lost: .* run.resume=true"):
        run_export(tmp_path, *options)
    place = tmp_path / "default/label"
    first = read_export(place)
    assert (place / "out/label_tasks.jsonl").exists() and not (place / "summary.json").exists() and not (place / "server.json").exists()
    monkeypatch.setattr(label_answers, "_generate", lambda *_: pytest.fail("it generated again"))
    (place / "out/label_tasks.jsonl").write_text("labels by now\n", encoding="utf-8")
    _, again = run_export(tmp_path, *options, "run.resume=true", "label.targets=[jsonl,csv]")
    assert again == first and loud.got == [(first.id, "http://localhost:8080", "secret-token")]
    assert json.loads((place / "server.json").read_text(encoding="utf-8")) == {"url": "http://localhost:8080", "project": 41}
    assert (place / "out/label_tasks.jsonl").read_text(encoding="utf-8") == "labels by now\n" and (place / "out/label_sheet.csv").exists()
    manifest = json.loads((place / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["server"]["project"] == 41 and len(manifest["parents"]) == 1 and len(manifest["starts"]) == 2
    assert json.loads((place / "summary.json").read_text(encoding="utf-8"))["metrics"]["label/main"] == 4
    run_export(tmp_path, *options, "run.resume=true")
    assert len(loud.got) == 1, "the tasks were pushed twice"
    with pytest.raises(UserError, match=r"is project 41 of http://localhost:8080 already, so it can't go to http://elsewhere"):
        run_export(tmp_path, *options, "run.resume=true", "label.url=http://elsewhere")
    assert all("secret-token" not in path.read_bytes().decode("utf-8", "replace") for path in place.rglob("*") if path.is_file())


def test_what_people_may_be_labelling_is_not_changed(tmp_path: Path, tiny_model: Tiny) -> None:
    options = [f"model.path={tiny_model()}", "label.budget=3"]
    place, first = run_export(tmp_path, *options)
    summary = (place / "summary.json").read_bytes()
    with pytest.raises(UserError, match=r"made with other options \(label.budget: 3 -> 4; label.title: 'default' -> 'Which\?'\)"):
        run_export(tmp_path, f"model.path={tiny_model()}", "label.budget=4", "label.title='Which?'", "run.resume=true")
    assert (place / "summary.json").read_bytes() == summary and read_export(place) == first
    with pytest.raises(UserError, match=r"exists. Continue it with run.resume=true"):
        run_export(tmp_path, *options)
    assert run_export(tmp_path, *options, "run.overwrite=true")[1].id != first.id


def test_answers_of_a_stopped_export_are_not_written_again(tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    real = label_answers._generate
    written: list[str] = []

    def generate(*arguments: Any) -> Any:
        if len(written) == 1:
            written.append("killed")
            raise KeyboardInterrupt
        written.append(Path(arguments[2]).name)
        return real(*arguments)

    monkeypatch.setattr(label_answers, "_generate", generate)
    with pytest.raises(KeyboardInterrupt):
        run_export(tmp_path, *two(tiny_model))
    _, export = run_export(tmp_path, *two(tiny_model), "run.resume=true")
    assert written == [tiny_model().name, "killed", tiny_model(tied=False).name]
    _, straight = run_export(tmp_path, *two(tiny_model), "run.name=straight")
    assert content(export) == content(straight)


def test_kept_answers_of_other_options_are_not_taken(tmp_path: Path, tiny_model: Tiny) -> None:
    place, _ = run_export(tmp_path, f"model.path={tiny_model()}")
    cfg = config.compose([*overrides(tmp_path), f"model.path={tiny_model()}"])
    file = place / "answers/1.jsonl"
    ((_, prompts),) = label_answers.read_prompts(cfg, {"policy": str(tiny_model())}).values()
    keys = []
    for change in ([], ["rollout.temperature=0.5"], ["rollout.max_response_length=5"]):
        other = config.compose([*overrides(tmp_path), f"model.path={tiny_model()}", *change])
        keys.append(label_answers._key(other, str(tiny_model()), prompts, 4, 7))
    keys += [label_answers._key(cfg, str(tiny_model(tied=False)), prompts, 4, 7), label_answers._key(cfg, str(tiny_model()), prompts[1:], 4, 7)]
    keys += [label_answers._key(cfg, str(tiny_model()), prompts, 3, 7), label_answers._key(cfg, str(tiny_model()), prompts, 4, 8)]
    assert len(set(keys)) == len(keys)
    right = json.loads(file.read_text(encoding="utf-8").splitlines()[0])["key"]
    kept = label_answers.read_kept(file, right, prompts, 4)
    assert kept is not None and len(kept) == 24 and label_answers.read_kept(file, "another", prompts, 4) is None


def test_every_option_is_part_of_an_export_or_may_change() -> None:
    """A new option of the label group has to be put on one side."""
    later = {"mode", "targets", "push", "pull", "url", "project", "token_env", "export", "files", "aggregate", "min_labels", "min_confidence"}
    later |= {"min_gold_accuracy", "strength", "eval_fraction"}
    assert {f.name for f in dataclasses.fields(LabelConfig)} == later | {*label_export._ASKED, *label_export._TOLD}


def test_the_next_command_brings_the_labels_back(tmp_path: Path) -> None:
    cfg = config.compose(overrides(tmp_path, "run.name=two words", "label.url=http://x"))
    assert label_export.next_command(cfg, None) == (
        f"python -m rlhf stage=label label.mode=import 'run.name=two words' run.dir={tmp_path} label.files=[FILE]"
    )
    assert label_export.next_command(cfg, 7).endswith("label.pull=true label.url=http://x")


# --- what can't be asked -----------------------------------------------------------------------------------------------------


def test_gold_that_is_too_little_is_said(tmp_path: Path, tiny_model: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    gold = toys.write_jsonl(tmp_path / "gold.jsonl", GOLD[:2])
    options = [f"model.path={tiny_model()}", f"label.gold_path={gold}", "label.gold_share=0.5", "label.budget=8"]
    _, export = run_export(tmp_path, *options)
    assert sum(task.role is Role.gold for task in export.tasks) == 2
    assert "label.gold_share=0.5 asks for 4 gold tasks" in caplog.text and "gives 2" in caplog.text
    same = toys.write_jsonl(tmp_path / "same.jsonl", [{"prompt": "p", "chosen": "x", "rejected": " x"}])
    with pytest.raises(UserError, match=r"none of its 1 pairs can be a gold task \(1 pairs of the same text\)"):
        run_export(tmp_path, f"model.path={tiny_model()}", f"label.gold_path={same}", "run.name=none")


def test_nothing_to_ask_has_a_reason(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"step": i, "prompt": "p", "response": text} for i, text in enumerate(("x", " x", "", "x\n"))]
    place = samples_of(tmp_path / "alpha/ppo", rows)
    with pytest.raises(UserError, match=r"no prompt has 2 different answers \(of 4 responses to 1 prompts 1 are empty and 2 repeat another\)"):
        run_export(tmp_path, f"label.samples=[{place}]", prompts=False)


def test_samples_with_holes_in_their_scores_are_refused(tmp_path: Path) -> None:
    rows = sample_rows()
    rows[3] = rows[3] | {"score": None}
    place = samples_of(tmp_path / "alpha/ppo", rows)
    with pytest.raises(UserError, match=r"label.choice=.* needs a score of every answer, but 1 of 12 answers have none"):
        run_export(tmp_path, f"label.samples=[{place}]", "label.choice={uncertainty: 1.0}", prompts=False)


def test_a_policy_that_cannot_read_the_prompts_is_named(tmp_path: Path, tiny_model: Tiny) -> None:
    chats = toys.write_jsonl(tmp_path / "chats.jsonl", [{"prompt": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(UserError, match=r"policy northern \(.*\): .*the tokenizer has no chat template"):
        run_export(tmp_path, *two(tiny_model), f"data.path={chats}", prompts=False)


def test_instructions_are_a_text_or_a_file(tmp_path: Path) -> None:
    assert instructions_text("Judge by the sound.\nSee notes.md") == "Judge by the sound.\nSee notes.md" and instructions_text("") == ""
    (tmp_path / "guide.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="byte 4 is not UTF-8"):
        instructions_text(str(tmp_path / "guide.txt"))
    with pytest.raises(UserError, match=r"label.instructions=.*guide.md: no such file"):
        instructions_text(str(tmp_path / "guide.md"))


POLICY = "model.path={tied}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"needs answers: set label.policies=\{NAME: MODEL DIRECTORY\}, model.path, label.samples"),
        (["label.policies={a: /no/such/place}"], r"label.policies.a=/no/such/place: no such directory"),
        (["model.path=/no/such/place"], r"model.path=/no/such/place: no such directory"),
        ([POLICY, "data.path=null"], r"data.path is not set: stage=label needs a file of prompts"),
        (
            [POLICY, "label.responses=1"],
            r"label.responses=1 of 1 policy give 1 answer to a prompt, but a pair needs 2. Set label.responses=2 or more",
        ),
        ([POLICY, "label.kind=ranking", "label.group=5"], r"give 4 answers to a prompt, but label.group=5 needs 5. Set label.responses=5"),
        ([POLICY, "label.ab.enabled=true"], r"label.ab.enabled=true compares two policies, found 1"),
        ([POLICY, "label.choice={uncertainty: 0.5, random: 0.5}"], r"label.choice=.* needs scores of the answers.*Set reward.path"),
        ([POLICY, "label.choice={uncertain_diverse: 1.0}"], r"needs scores of the answers"),
        ([POLICY, "label.prelabel=true"], r"label.prelabel=true suggests what the reward model prefers, but there are no scores"),
        (
            [
                "label.policies={a: {tied}, b: {untied}}",
                "label.ab.enabled=true",
                "label.choice={uncertainty: 1.0}",
                "reward.function=tests.toys:constant",
            ],
            r"pairs chosen for being close say nothing of a win rate",
        ),
        ([POLICY, "label.gold_path=/no/gold.jsonl"], r"label.gold_path=/no/gold.jsonl: no such file"),
        ([POLICY, "label.gold_path={prompts}"], r"expected pairs of a chosen and a rejected answer, but its keys \(prompt\)"),
        ([POLICY, "label.gold_path={gold}", "label.gold_share=0"], r"label.gold_share=0 asks for no gold task"),
        ([POLICY, "label.instructions=/no/guide.md"], r"label.instructions=/no/guide.md: no such file"),
        (
            [POLICY, "label.kind=ranking", "label.ratings=true", "label.targets=[page,label_studio]"],
            r"Label Studio can't ask for ratings beside a ranking",
        ),
        ([POLICY, "label.push=true", "label.url=http://x"], r"access token in the environment variable LABEL_STUDIO_API_KEY"),
        ([POLICY, "label.push=true", "label.url=localhost:80"], r"label.url=localhost:80: expected the address"),
        ([POLICY, "reward.path=/no/rm"], r"reward.path=/no/rm"),
        ([POLICY, "reward.function=tests.toys:nothing"], r"tests.toys has no function nothing"),
        ([POLICY, "rollout.max_response_length=60"], r"are more than the model reads \(policy=.* = 64\)"),
        ([POLICY, "data.chat_template=nobody"], r"data.chat_template=nobody: no such file"),
        (["label.samples=[{prompts}]"], r"row 1: key 'response': expected, but missing"),
        (["label.samples=[{samples}]", "label.prelabel=true"], r"there are no scores. Choose samples of a run that has scores"),
        (["label.samples=[{samples}]", "reward.path=x"], r"reward.path is set, but the answers of label.samples have the scores of the run"),
        (["label.samples=[{scored}]", "label.prelabel=true", "label.gold_path={gold}"], r"nothing scores the gold answers"),
        (["label.review={prompts}"], r"row 1: no key 'id'. Expected a task of review.jsonl"),
        (["label.review={review}", "label.choice={random: 1.0}"], r"label.choice is set, but the tasks of label.review=.* all go out again"),
        (["label.review={review}", "label.prompts=3"], r"label.prompts is set, but the tasks of label.review"),
        (["label.review={review}", "label.ab.enabled=true"], r"what annotators disagreed on is no sample"),
        (["label.review={review}", "label.prelabel=true", "label.gold_path={gold}"], r"with label.gold_path and label.review: nothing scores"),
    ],
)
def test_preflight_says_what_is_missing(tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str) -> None:
    monkeypatch.delenv("LABEL_STUDIO_API_KEY", raising=False)
    task = Task("old", "p", (Answer("a"), Answer("b")), (0, 1))
    places = {
        "{tied}": tiny_model(),
        "{untied}": tiny_model(tied=False),
        "{prompts}": tmp_path / "prompts.jsonl",
        "{gold}": toys.write_jsonl(tmp_path / "gold.jsonl", GOLD),
        "{samples}": toys.write_jsonl(tmp_path / "samples.jsonl", [{"step": 1, "prompt": "p", "response": "x"}]),
        "{scored}": toys.write_jsonl(tmp_path / "scored.jsonl", sample_rows()),
        "{review}": toys.write_jsonl(tmp_path / "review.jsonl", [task_row(task)]),
    }
    chosen = overrides(tmp_path)
    text = "\n".join(options)
    for name, place in places.items():
        text = text.replace(name, str(place))
    chosen += text.splitlines()
    with pytest.raises(UserError, match=message):
        preflight.check(config.compose(chosen))
    assert not (tmp_path / "default").exists()


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_writes_for_two_policies(tmp_path: Path, tiny_model: Tiny) -> None:
    _, export = run_export(tmp_path, *two(tiny_model), "rollout=vllm", "rollout.kv_cache_gib=0.2", "label.responses=2", "label.budget=8")
    assert len(export.tasks) == 8 and {answer.policy for task in export.tasks for answer in task.answers} == {"northern", "southern"}
    assert LabelTarget.page in TARGETS
