"""Prompts with functions and calls go out to people and come back as pairs that have them."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from conf.choices import LabelKind, LabelTarget
from conf.schema import Config, DataConfig
from conf.training import RewardStage
from rlhf.data import formats, reading
from rlhf.data.formats import Use
from rlhf.data.reading import DataRequest
from rlhf.labels import versions
from rlhf.labels.asking import Question
from rlhf.labels.checking import Checked, Refused, check
from rlhf.labels.ledger import read_export, write_export
from rlhf.labels.records import Answer, Export, Judgement, Verdict, tools_text
from rlhf.labels.samples import read_review
from rlhf.labels.store import Stored
from rlhf.labels.targets import LABEL_TOOLS, label_studio, page, read_labels
from rlhf.models.loading import load_tokenizer
from rlhf.stages.labelling import scoring
from rlhf.types import RowError, UserError
from tests import toys
from tests.labels.label_exports import TOOLS as ANNOTATORS
from tests.labels.label_exports import export, task
from tests.labels.label_steps import Tiny, configured, run_export
from tests.labels.labels import ledgers_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "=Looks\nout of the <window> at $place",
            "parameters": {"type": "object", "properties": {"near": {"default": 1.0}}},
        },
    }
]
CALLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Ask it.",
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "weather", "arguments": {"x": 1.0}},
            }
        ],
    },
    {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"},
]
ANSWERS = ["It rains.", "No idea."]


def calling(kind: LabelKind = LabelKind.pair, **fields: Any) -> Export:
    """A task with functions and calls, and one without."""
    texts = ANSWERS if kind is LabelKind.pair else [*ANSWERS, "Ask again."]
    tasks = [task(1, CALLS, texts), task(2, [{"role": "user", "content": "Hi"}], texts)]
    return export(kind, [replace(tasks[0], tools=TOOLS), tasks[1]], ratings=False, **fields)


def fill_page(files: list[Path], said: list[Judgement]) -> Path:
    """What labelsFile of web/labels.js writes of the page's tasks; its numbers are the browser's,
    which has no 1.0.
    """
    data = page_data(files[0])
    tasks = {entry["id"]: entry for entry in data["tasks"]}
    labels = []
    for judgement in said:
        shown = {key: value for key, value in tasks[judgement.task].items() if key != "id"}
        label = {"task": judgement.task, "verdict": judgement.verdict.value, "ranking": []}
        if judgement.ranking:
            label["ranking"] = [list(group) for group in judgement.ranking]
        labels.append({**label, "comment": "", "seconds": 1, "time": None, **shown})
    file = {"format": page.FORMAT, "version": page.VERSION, "annotator": "ann", "labels": labels}
    path = files[0].with_name("labels.json")
    path.write_text(json.dumps(file).replace(": 1.0", ": 1"), encoding="utf-8")
    return path


def page_data(path: Path) -> dict[str, Any]:
    before, _, after = path.read_text(encoding="utf-8").partition('id="data">')
    assert before
    return json.loads(after.partition("</script>")[0])


FILL = {tool.target: tool.fill for tool in ANNOTATORS} | {LabelTarget.page: fill_page}
by_target = pytest.mark.parametrize("target", LabelTarget, ids=lambda target: target.value)
by_kind = pytest.mark.parametrize("kind", LabelKind, ids=lambda kind: kind.value)


def said(out: Export) -> list[Judgement]:
    """The first shown is the best, in the order as shown."""
    verdict, ranking = Verdict.left, ()
    if out.kind is LabelKind.ranking:
        verdict, ranking = Verdict.ranked, ((0,), (1,), (2,))
    return [
        Judgement(one.id, "ann", verdict, ranking, annotation=str(number))
        for number, one in enumerate(out.tasks, start=1)
    ]


def imported(out: Export, path: Path) -> list[Checked | Refused]:
    return list(check(read_labels(path)[1], ledgers_of(out)))


def pairs_of(out: Export, labels: list[Any]) -> dict[str, list[dict[str, Any]]]:
    stored = [Stored(label, 1, counts=True) for label in labels]
    settings = versions.Settings(eval_fraction=0.0)
    return versions.preference_rows(versions.settle(ledgers_of(out), stored, settings), settings)


@by_target
@by_kind
def test_tools_go_round(target: LabelTarget, kind: LabelKind, tmp_path: Path) -> None:
    """Out by the ledger that a run wrote, filled in as the tool does it, back as pairs: the prompt
    with its calls and the functions are what went out, and a stage reads them.
    """
    write_export(calling(kind), tmp_path / "run")
    out = read_export(tmp_path / "run")
    files = LABEL_TOOLS[target].write(out, tmp_path / "out")
    labels = imported(out, FILL[target](files, said(out)))
    assert [type(label) for label in labels] == [Checked, Checked], labels
    rows = pairs_of(out, labels)["train"]
    each = 1 if kind is LabelKind.pair else 3
    assert len(rows) == 2 * each
    for row in rows[:each]:
        assert row["prompt"] == CALLS and row["tools"] == TOOLS
    assert all("tools" not in row for row in rows[each:])
    shown = out.tasks[0].shown
    texts = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows[:each]]
    assert set(texts) == set(combinations(shown, 2))
    path = toys.write_jsonl(tmp_path / "pairs.jsonl", rows)
    train, held = reading.preference_records(request(path))
    read = [record.value for record in (*train, *held)]
    assert sum(row["prompt"] == CALLS and row.get("tools") == TOOLS for row in read) == each
    assert sum(row["prompt"] != CALLS and "tools" not in row for row in read) == each


def request(path: Path) -> DataRequest:
    """What stage=reward asks of a file of pairs."""
    cfg = Config(stage=RewardStage(), data=DataConfig(path=str(path)))
    cfg.run.dir = str(path.parent)
    return DataRequest.of(cfg)


@by_target
def test_people_see_the_tools(target: LabelTarget, tmp_path: Path) -> None:
    files = LABEL_TOOLS[target].write(calling(), tmp_path)
    plain = replace(calling(), tasks=(calling().tasks[1],))
    others = LABEL_TOOLS[target].write(plain, tmp_path / "plain")
    shown = [shown_tools(target, paths) for paths in (files, others)]
    assert shown == [True, False]


def shown_tools(target: LabelTarget, files: list[Path]) -> bool:
    """Whether the functions stand where the tool shows them."""
    if target is LabelTarget.page:
        return page_data(files[0])["tasks"][0].get("tools") == TOOLS
    if target is LabelTarget.label_studio:
        data = json.loads(files[0].read_text(encoding="utf-8"))[0]["data"]
        assert ("$tools" in files[1].read_text(encoding="utf-8")) == ("tools" in data)
        return data.get("tools") == tools_text(TOOLS)
    if target is LabelTarget.argilla:
        record = json.loads(files[0].read_text(encoding="utf-8"))[0]
        settings = json.loads(files[1].read_text(encoding="utf-8"))
        names = {field["name"]: field["required"] for field in settings["fields"]}
        assert names.get("tools", False) is False
        assert ("tools" in names) == ("tools" in record["fields"])
        return record["fields"].get("tools") == tools_text(TOOLS)
    if target is LabelTarget.xlsx:
        import openpyxl

        names, first = list(openpyxl.load_workbook(files[0]).active.values)[:2]
        return tools_text(TOOLS) in first and names[2] == "tools"
    text = files[0].read_text(encoding="utf-8")
    if target is LabelTarget.csv:
        return ',"tools",' in text and json.dumps(TOOLS, indent=2)[:20].replace('"', '""') in text
    return json.loads(text.splitlines()[0]).get("tools") == TOOLS


def test_files_of_people_are_not_read_without_their_tools(tmp_path: Path) -> None:
    """As data.path they would be pairs of texts; the message names the way back. A project whose
    prompts are messages is read with its functions.
    """
    out = replace(calling(), tasks=calling().tasks[:1])
    for target in (LabelTarget.label_studio, LabelTarget.argilla, LabelTarget.csv):
        folder = tmp_path / target.value
        files = LABEL_TOOLS[target].write(out, folder)
        path = FILL[target](files, [replace(said(out)[0], prompt=None)])
        with pytest.raises(UserError, match=r"key 'tools'.*label\.mode=import"):
            reading.preference_pairs(request(path))
    rows = json.loads((tmp_path / "label_studio/project-1-at-2026.json").read_text())
    rows[0]["data"] |= {"prompt": CALLS, "tools": TOOLS}
    found = formats.detect(rows[0])
    assert found is not None and found.name == "label_studio"
    (made,) = found.read(rows[0], Use.preference).pairs
    assert made.value.prompt == CALLS and made.value.tools == TOOLS
    with pytest.raises(RowError, match=r"'tools' and 'data\.tools': expected one of them"):
        found.read({**rows[0], "tools": [{"name": "other"}]}, Use.preference)


@by_target
def test_other_tools_are_refused(target: LabelTarget, tmp_path: Path) -> None:
    """Functions that were changed on the way change what was asked."""
    out = calling()
    files = LABEL_TOOLS[target].write(out, tmp_path)
    path = FILL[target](files, said(out))
    other = replace(out.tasks[0], tools=[{"type": "function", "function": {"name": "look"}}])
    first, second = imported(replace(out, tasks=(other, out.tasks[1])), path)
    assert isinstance(first, Refused) and isinstance(second, Checked)
    assert first.reason == f"edited: the tools of task {other.id} are not those that went out"


def test_a_prompt_with_other_tools_is_another_pair() -> None:
    one = calling()
    without = replace(one.tasks[0], tools=None, id="0123456789ab-3")
    out = replace(one, tasks=(one.tasks[0], without))
    labels = list(check(said(out), ledgers_of(out)))
    rows = pairs_of(out, labels)["train"]
    assert [row.get("tools") for row in rows] == [TOOLS, None]


# ---- through the stage ----

TEMPLATE = (
    "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def prompts_with_tools(folder: Path) -> list[str]:
    rows: list[dict[str, object]] = []
    parts = [{"type": "text", "text": "go"}]
    for name in ("fly", "run"):
        tools = [{"type": "function", "function": {"name": name}}]
        rows.append({"prompt": [{"role": "user", "content": parts}], "tools": tools})
    template = folder / "short.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    return [
        f"data.path={toys.write_jsonl(folder / 'with_tools.jsonl', rows)}",
        f"data.chat_template={template}",
    ]


@pytest.mark.usefixtures("one_thread")
def test_the_stage_carries_tools(tmp_path: Path, tiny_model: Tiny) -> None:
    """Answers are drawn from the prompt with its functions, and the import's rows have them; so has
    the review queue that goes out again.
    """
    from rlhf.__main__ import execute

    given = [f"model.path={tiny_model()}", *prompts_with_tools(tmp_path), "label.responses=2"]
    directory, out = run_export(tmp_path, *given, prompts=False)
    names = {one.tools[0]["function"]["name"] for one in out.tasks if one.tools}
    assert names == {"fly", "run"} and len(out.tasks) == 2
    cfg = configured(tmp_path, *given, prompts=False)
    tokenizer = load_tokenizer(cfg.model, cfg.data.chat_template)
    loaded = reading.distinct_prompts(DataRequest.of(cfg), None)
    read = reading.tokenised(tokenizer, loaded, DataRequest.of(cfg))
    assert [tokenizer.decode(prompt.token_ids)[:5] for prompt in read] == ["[fly]", "[run]"]
    kept = (directory / "answers/1.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["prompt"] for line in kept[1:]} == {prompt.id for prompt in read}

    files = [directory / "out/label_tasks.jsonl"]
    path = FILL[LabelTarget.jsonl](files, said(out))
    back = ["label.mode=import", f"label.files=[{path}]", "label.eval_fraction=0"]
    execute(configured(tmp_path, *back, prompts=False), ())
    written = (directory.parent / "labels/latest/train.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in written.splitlines()]
    assert {row["tools"][0]["function"]["name"] for row in rows} == {"fly", "run"}
    assert all(row["prompt"] == [{"role": "user", "content": "go"}] for row in rows)


@pytest.mark.usefixtures("one_thread")
def test_gold_is_scored_with_its_tools(
    tmp_path: Path, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suggestion of a gold task comes from the prompt that the other tasks have."""
    seen: list[Any] = []

    def noted(reward: Any, rollouts: list[Any], tokenizer: Any) -> list[scoring.AnswerScore]:
        seen.extend(rollouts)
        return [scoring.AnswerScore(float(number)) for number in range(len(rollouts))]

    monkeypatch.setattr(scoring, "score", noted)
    given = [f"model.path={tiny_model()}", *prompts_with_tools(tmp_path)]
    cfg = configured(tmp_path, *given, prompts=False)
    tools = [{"type": "function", "function": {"name": "fly"}}]
    chat = [{"role": "user", "content": "go"}]
    questions = [
        Question(chat, (Answer("a"), Answer("b")), tools=tools),
        Question(chat, (Answer("a"), Answer("b"))),
    ]
    template = cfg.data.chat_template
    scored = scoring.score_questions(questions, cfg.model, template, cfg.reward)
    assert [[answer.score for answer in one.answers] for one in scored] == [[0.0, 1.0], [2.0, 3.0]]
    assert [one.tools for one in scored] == [tools, None]
    tokenizer = load_tokenizer(cfg.model, template)
    texts = [tokenizer.decode(rollout.prompt.token_ids) for rollout in seen]
    assert [text.startswith("[fly]") for text in texts] == [True, True, False, False]
    assert [rollout.prompt.tools for rollout in seen] == [tools, tools, None, None]


@by_kind
def test_label_studio_takes_the_configuration_with_tools(kind: LabelKind) -> None:
    """By the SDK's own check, which its server makes at an import."""
    interface = pytest.importorskip("label_studio_sdk.label_interface").LabelInterface
    config = interface(label_studio.config_xml(calling(kind)))
    config.validate()
    for row in label_studio.task_rows(calling(kind)):
        config.validate_task(row)


def test_a_review_queue_keeps_tools(tmp_path: Path) -> None:
    from rlhf.labels.ledger import task_row

    out = calling()
    path = toys.write_jsonl(tmp_path / "review.jsonl", [task_row(one) for one in out.tasks])
    first, second = read_review(str(path), LabelKind.pair)
    assert (first.tools, second.tools) == (TOOLS, None) and first.prompt == CALLS


@pytest.mark.usefixtures("one_thread")
def test_samples_find_their_tools(tmp_path: Path, tiny_model: Tiny) -> None:
    """A run's samples have the text that its policy read; data.path gives the functions back. Two
    prompts that are one text can't be told apart.
    """
    given = [f"model.path={tiny_model()}", *prompts_with_tools(tmp_path)]
    cfg = configured(tmp_path, *given, prompts=False)
    tokenizer = load_tokenizer(cfg.model, cfg.data.chat_template)
    loaded = reading.distinct_prompts(DataRequest.of(cfg), None)
    rows: list[dict[str, object]] = [
        {"step": step, "prompt": prompt.text, "response": f"at {step}", "score": None}
        for prompt in reading.tokenised(tokenizer, loaded, DataRequest.of(cfg))
        for step in (1, 2)
    ]
    samples = toys.write_jsonl(tmp_path / "samples.jsonl", rows)
    more = [*given, f"label.samples=[{samples}]"]
    _, out = run_export(tmp_path, *more, prompts=False)
    names = {one.tools[0]["function"]["name"] for one in out.tasks if one.tools}
    assert names == {"fly", "run"}

    (tmp_path / "short.jinja").write_text(TEMPLATE[TEMPLATE.index("{% for m") :], encoding="utf-8")
    with pytest.raises(UserError, match=r"label\.samples: two prompts of .* are the same text"):
        run_export(tmp_path, *more, "run.name=other", prompts=False)
