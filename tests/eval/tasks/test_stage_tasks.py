"""Tasks through stage=eval, on tiny random policies by transformers."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from conf.choices import ModelKind
from conf.labelling import TaskConfig, TaskKind, TaskMetric
from conf.schema import ModelConfig, TinyConfig
from eval.tasks.figures import RowAnswer
from eval.tasks.prompts import scored_ids
from rlhf.cli import config
from rlhf.models.loading import load_causal_lm, train_tokenizer
from rlhf.run.context import RunContext
from rlhf.stages import eval as stage
from rlhf.stages import methods
from rlhf.stages.evaluation import tasks
from rlhf.stages.evaluation.engines import Wanted, up_to, write_answers
from rlhf.stages.evaluation.kept import KeptAnswers
from rlhf.types import Prompt, Rollout, UserError
from tests.toys import write_jsonl

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    methods.register()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Policies `a` and `b`, `plain` without a template, and rows of several shapes."""
    place = tmp_path_factory.mktemp("tasks")
    tiny = TinyConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, layers=1, heads=1, max_positions=160
    )
    tokenizer = train_tokenizer(["Question: how many? Answer: A B C D 0 1 2"], 300, 160)
    tokenizer.save_pretrained(place / "plain")
    tokenizer.chat_template = TEMPLATE
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        model = load_causal_lm(ModelConfig(kind=ModelKind.tiny, tiny=tiny), tokenizer)
        for weights in model.parameters():
            weights.data.mul_(4.0)  # the initial 0.02 would leave every distribution flat
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    model.save_pretrained(place / "plain")
    rows: list[dict[str, object]] = [
        {"question": f"{i}?", "choices": ["0", "one more", "two"], "answer": i % 3}
        for i in range(9)
    ]
    write_jsonl(place / "choices.jsonl", rows)
    rows = [{"question": f"{i}+{i}?", "answer": f"so\n#### {2 * i}"} for i in range(6)]
    write_jsonl(place / "sums.jsonl", rows)
    write_jsonl(place / "texts.jsonl", [{"text": "how many? " * (1 + 40 * i)} for i in range(3)])
    lines = [f"What is {i}?,{i},{i + 1},{i + 2},{i + 3},{'ABCD'[i % 4]}\n" for i in range(4)]
    (place / "mmlu.csv").write_text("".join(lines), encoding="utf-8")
    return place


def composed(folder: Path, runs: Path, *overrides: str) -> Any:
    base = ["stage=eval", "rollout=hf", "tracking=none", f"run.dir={runs}", "stage.bootstrap=20"]
    return config.compose([*base, f"stage.policies.a={folder / 'a'}", *overrides])


def run(folder: Path, runs: Path, *overrides: str) -> dict[str, float]:
    cfg = composed(folder, runs, *overrides)
    stage.check(cfg)
    stage.run(RunContext.open(cfg, ()))
    summary = json.loads((runs / cfg.run.name / "eval" / "summary.json").read_text("utf-8"))
    metrics: dict[str, float] = summary["metrics"]
    return metrics


def choices(folder: Path) -> list[str]:
    return [
        f"tasks.pick.path={folder / 'choices.jsonl'}",
        "tasks.pick.kind=loglikelihood",
        "tasks.pick.metrics=[accuracy,accuracy_norm]",
        "tasks.pick.prompt='Question: {question}'",
    ]


def by_the_model(folder: Path, name: str) -> tuple[list[list[float]], list[list[int]]]:
    """log p of each row's choices by a forward pass of its own, and the choices' lengths."""
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32).eval()
    sums = []
    for i in range(9):
        prompt = tokenizer(f"Question: {i}?", add_special_tokens=False)["input_ids"]
        row = []
        for text in ("0", "one more", "two"):
            whole = tokenizer(f"Question: {i}? {text}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            later = range(len(prompt), len(whole))
            row.append(sum(float(logprobs[at - 1, whole[at]]) for at in later))
        sums.append(row)
    return sums, [[1, 8, 3]] * 9


def test_choices_are_scored_as_the_model_scores_them(folder: Path, tmp_path: Path) -> None:
    found = run(folder, tmp_path, *choices(folder), f"stage.policies.b={folder / 'b'}")
    for policy in ("a", "b"):
        sums, lengths = by_the_model(folder, policy)
        kept = KeptAnswers(tmp_path / "default" / "eval" / "answers" / policy / "pick.jsonl")
        answers = sorted(answer.logprobs for answer in kept.found.values())
        for got, expected in zip(answers, sorted(map(tuple, sums)), strict=True):
            assert got == pytest.approx(expected, abs=1e-4)
        best = [row.index(max(row)) for row in sums]
        share = sum(choice == i % 3 for i, choice in enumerate(best)) / 9
        assert found[f"eval/pick/{policy}/accuracy"] == pytest.approx(share)
        normed = [
            [value / length for value, length in zip(row, sizes, strict=True)]
            for row, sizes in zip(sums, lengths, strict=True)
        ]
        best = [row.index(max(row)) for row in normed]
        share = sum(choice == i % 3 for i, choice in enumerate(best)) / 9
        assert found[f"eval/pick/{policy}/accuracy_norm"] == pytest.approx(share)
    report = json.loads((tmp_path / "default" / "eval" / "report.json").read_text("utf-8"))
    (part,) = report["sections"]
    assert part["figures"]["rows"] == 9 and set(part["figures"]["policies"]) == {"a", "b"}
    delta = part["figures"]["differences"]["b"]["accuracy"]["estimate"]
    shares = [found[f"eval/pick/{policy}/accuracy"] for policy in ("a", "b")]
    assert delta == pytest.approx(shares[1] - shares[0])


def test_perplexity_of_texts_longer_than_the_model_reads(folder: Path, tmp_path: Path) -> None:
    found = run(
        folder, tmp_path, "task=[perplexity]", f"tasks.perplexity.path={folder / 'texts.jsonl'}"
    )
    kept = KeptAnswers(tmp_path / "default" / "eval" / "answers" / "a" / "perplexity.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    texts = ["how many? " * (1 + 40 * i) for i in range(3)]
    tokens = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert max(tokens) > 160
    assert sorted(answer.tokens[0] for answer in kept.found.values()) == sorted(tokens)
    total = -sum(answer.logprobs[0] for answer in kept.found.values())
    expected = torch.tensor(total / sum(len(text) for text in texts)).exp()
    assert found["eval/perplexity/a/byte_perplexity"] == pytest.approx(float(expected), rel=1e-5)
    expected = torch.tensor(total / sum(tokens)).exp()
    assert found["eval/perplexity/a/token_perplexity"] == pytest.approx(float(expected), rel=1e-5)


def sums(folder: Path) -> list[str]:
    return [
        "task=[gsm8k]",
        f"tasks.gsm8k.path={folder / 'sums.jsonl'}",
        "tasks.gsm8k.fewshot=1",
        "tasks.gsm8k.max_tokens=40",
    ]


def test_a_killed_evaluation_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was answered before the kill is not answered again, and all is as if it had not been."""
    drawn = ["tasks.gsm8k.samples=2", "tasks.gsm8k.temperature=1.0", "tasks.gsm8k.pass_at=[2]"]
    both = [*sums(folder), *choices(folder), *drawn]
    whole = run(folder, tmp_path / "whole", *both)
    monkeypatch.setattr(tasks, "_BATCH", 4)
    answered: list[int] = []
    write = tasks.write_answers

    def counted(generator: Any, tokenizer: Any, wanted: Any, *options: Any) -> Any:
        answered.append(len(wanted))
        if len(answered) == 2:
            raise KeyboardInterrupt
        return write(generator, tokenizer, wanted, *options)

    monkeypatch.setattr(tasks, "write_answers", counted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path, *both)
    file = tmp_path / "default" / "eval" / "answers" / "a" / "gsm8k.jsonl"
    assert len(file.read_bytes().splitlines()) == 4
    with file.open("ab") as torn:
        torn.write(b'{"key": "half')
    again = run(folder, tmp_path, *both, "run.resume=true")
    assert answered == [8, 4, 4]  # samples: two of each row
    assert again == whole
    # another prompt is another question
    run(folder, tmp_path, *both, "run.resume=true", "tasks.gsm8k.fewshot=2")
    assert answered[3:] == [8, 4]


def test_another_policy_behind_the_same_name_is_asked_again(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path, *choices(folder))
    again = run(
        folder, tmp_path, *choices(folder), f"stage.policies.a={folder / 'b'}", "run.resume=true"
    )
    fresh = run(folder, tmp_path / "x", *choices(folder), f"stage.policies.a={folder / 'b'}")
    assert again == fresh


def test_other_weights_in_the_same_directory_are_asked_again(
    folder: Path,
    tmp_path: Path,
) -> None:
    place = tmp_path / "policy"
    shutil.copytree(folder / "a", place)
    asked = [*choices(folder), f"stage.policies.a={place}"]
    run(folder, tmp_path, *asked)
    shutil.copy(folder / "b" / "model.safetensors", place / "model.safetensors")
    again = run(folder, tmp_path, *asked, "run.resume=true")
    assert again == run(
        folder, tmp_path / "x", *choices(folder), f"stage.policies.a={folder / 'b'}"
    )


def test_blanks_that_end_a_prompt_belong_to_the_text(folder: Path) -> None:
    """As lm-eval takes them: the same tokens as a prompt without them before a text with them."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "a")
    plain = TaskConfig(metrics=[TaskMetric.accuracy], kind=TaskKind.loglikelihood)
    bare = dataclasses.replace(plain, delimiter="")
    expected = scored_ids(plain, tokenizer, "how many?", "A")
    assert scored_ids(bare, tokenizer, "how many? ", "A") == expected
    ids = tokenizer("how many? A", add_special_tokens=False)["input_ids"]
    assert [*expected.context, *expected.ids] == ids
    # nothing before the text: the token that begins a sequence
    alone = scored_ids(bare, tokenizer, "", "A")
    assert alone.context == (tokenizer.bos_token_id,)


class Scripted:
    """A generator that writes the letters of a text, so many tokens at a time as it is asked."""

    def __init__(self, text: str) -> None:
        self.text, self.asked = text, 0

    def generate(self, prompts: list[Prompt], **options: Any) -> list[Rollout]:
        self.asked += 1
        out = []
        for prompt in prompts:
            begun = len(prompt.token_ids) - 1
            assert prompt.limit is not None
            ids = [ord(c) for c in self.text[begun : begun + prompt.limit]]
            reason = "stop" if begun + len(ids) == len(self.text) else "length"
            out.append(Rollout(prompt, "", ids, [], reason, 0))
        return out


class Letters:
    """A tokenizer of letters."""

    pad_token_id = bos_token_id = unk_token_id = eos_token_id = 0
    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_answers_end_at_texts() -> None:
    text = "x" * 40 + " Question: y" * 30
    generator = Scripted(text)
    wanted = [
        Wanted("a", (1,), 300, ("Question:", "zzz"), False),
        Wanted("b", (1,), 20, ("Question:",), False),
        Wanted("c", (1,), 300, (), False),
        Wanted("d", (1,), 1000, (), False),
    ]
    found = write_answers(generator, Letters(), wanted, None, 0)
    assert [len(one.text) for one in found] == [41, 20, 300, 400]
    assert [one.finished for one in found] == [True, False, False, True]
    assert generator.asked == 2  # of 64 tokens the text is among the first 52
    assert up_to("ab", ["b", "a"]) == "" and up_to("ab", ["c"]) is None


def test_all_that_is_wrong_is_told_before_weights_load(folder: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "bad.jsonl", [{"question": "q", "answer": "4"}])
    cfg = composed(
        folder,
        tmp_path,
        f"stage.policies.plain={folder / 'plain'}",
        f"stage.policies.gone={folder / 'gone'}",
        "task=[gsm8k,mmlu,gsm8k_chat]",
        f"tasks.gsm8k.path={tmp_path / 'bad.jsonl'}",
        f"tasks.gsm8k_chat.path={folder / 'sums.jsonl'}",
        "tasks.gsm8k_chat.max_tokens=20",
    )
    with pytest.raises(UserError) as caught:
        stage.check(cfg)
    told = str(caught.value).splitlines()
    for words in (
        ["tasks.gsm8k", "bad.jsonl, row 1", "####", "max_bad_rows=0"],
        ["tasks.mmlu.path"],
        ["policy gone", "no such directory"],
        ["tasks.gsm8k_chat", "policy plain", "no chat template"],
    ):
        assert any(all(word in line for word in words) for line in told), (words, told)
    assert len(told) == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stage.policies.before=x"], []),
        (["tasks.pick.metrics=[exact]"], ["tasks.pick.metrics", "loglikelihood"]),
        (["tasks.pick.metrics=[accuracy,byte_perplexity]"], ["tasks.pick.metrics"]),
        (["tasks.pick.samples=2"], ["tasks.pick.samples", "temperature=0"]),
        (["rollout=server"], ["rollout=server"]),
        (["tasks.pick.prompt='{quest}'"], ["'quest'", "row 1"]),
        (["tasks.pick.fewshot=9"], ["fewshot=9", "found 8"]),
        (["tasks.pick.fewshot=8", "tasks.pick.system='" + "x " * 99 + "'"], ["row 1", "160"]),
        (["tasks.pick.columns.question=quest"], ["'quest'"]),
    ],
)
def test_what_does_not_go_is_refused(
    folder: Path, tmp_path: Path, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        stage.check(composed(folder, tmp_path, *choices(folder), *overrides))
    assert all(word in str(caught.value) for word in words), caught.value


def test_rows_that_do_not_fit_are_counted(folder: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"question": "1?", "answer": "#### 1"}] * 3
    write_jsonl(tmp_path / "some.jsonl", [rows[0], {"question": "2?", "answer": "2"}, *rows[1:]])
    asked = ["task=[gsm8k]", "tasks.gsm8k.fewshot=0", "tasks.gsm8k.max_tokens=4"]
    some = [*asked, f"tasks.gsm8k.path={tmp_path / 'some.jsonl'}"]
    run(folder, tmp_path, *some, "tasks.gsm8k.max_bad_rows=1")
    report = json.loads((tmp_path / "default" / "eval" / "report.json").read_text("utf-8"))
    (bad,) = report["sections"][0]["figures"]["left_out"]
    assert "some.jsonl, row 2" in bad and "####" in bad
    assert report["sections"][0]["figures"]["rows"] == 3


def test_mmlu_of_csv_for_lm_eval(folder: Path, tmp_path: Path) -> None:
    """A CSV file without a header, and what is written for lm-eval of it."""
    found = run(
        folder,
        tmp_path,
        "task=[mmlu,gsm8k]",
        f"tasks.mmlu.path={folder / 'mmlu.csv'}",
        "tasks.mmlu.fewshot=1",
        *sums(folder)[1:],
        "stage.lm_eval=true",
    )
    assert 0 <= found["eval/mmlu/a/accuracy"] <= 1
    written = tmp_path / "default" / "eval" / "lm_eval"
    assert {path.name for path in written.iterdir()} == {"mmlu.yaml", "mmlu.jsonl"}
    declared = yaml.safe_load((written / "mmlu.yaml").read_text("utf-8"))
    assert declared["task"] == "mmlu" and declared["output_type"] == "multiple_choice"
    assert declared["dataset_kwargs"]["data_files"]["test"] == str(written / "mmlu.jsonl")
    first = json.loads((written / "mmlu.jsonl").read_text("utf-8").splitlines()[0])
    assert first["prompt"].startswith("What is 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\nWhat is 0?")
    assert first["choices"] == ["A", "B", "C", "D"] and first["gold"] == [0]


def test_tasks_beside_two_policies_on_prompts(folder: Path, tmp_path: Path) -> None:
    """`before` and `after` are policies of the tasks too; without prompts the tasks run alone."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"how {i}"} for i in range(3)])
    both = [f"stage.before={folder / 'a'}", f"stage.after={folder / 'b'}"]
    lengths = ["data.max_prompt_length=16", "rollout.max_response_length=4"]
    asked = [*choices(folder), *both, *lengths]
    found = run(folder, tmp_path, *asked, f"data.eval_path={prompts}", "run.name=both")
    assert found["eval/kl_per_token"] > 0
    policies = {key.split("/")[2] for key in found if key.startswith("eval/pick/")}
    assert policies == {"before", "after", "a"}
    report = json.loads((tmp_path / "both" / "eval" / "report.json").read_text("utf-8"))
    assert [part["title"] for part in report["sections"]][1:] == ["Task pick"]
    alone = run(folder, tmp_path, *asked)
    assert alone == {key: value for key, value in found.items() if key.startswith("eval/pick/")}


def test_a_task_of_ones_own_is_a_file(folder: Path, tmp_path: Path) -> None:
    """As docs/tasks/benchmarks.md has it, beside a preset and changed on the command line."""
    page = (Path(__file__).parents[3] / "docs" / "tasks" / "benchmarks.md").read_text("utf-8")
    text = page.partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "capitals.yaml").write_text(text, encoding="utf-8")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    chosen = ["task=[capitals,gsm8k]", "tasks.capitals.fewshot=0"]
    found = composed(folder, tmp_path, search, *chosen).tasks
    assert list(found) == ["capitals", "gsm8k"]
    capitals = found["capitals"]
    assert capitals.prompt == "Q: {question}\nA:" and capitals.stops == ["\n"]
    assert capitals.fewshot == 0 and capitals.path == "capitals.jsonl"
    with pytest.raises(UserError, match=r"task=capital: no such preset.*capitals"):
        composed(folder, tmp_path, search, "task=[capital]")


def test_a_damaged_file_of_answers_is_refused(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path / "x" / "task.jsonl")
    kept.add({"k": RowAnswer(texts=("é\n",), tokens=(2,), finished=(True,))})
    assert KeptAnswers(kept.path).found == kept.found
    kept.path.write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"task\.jsonl, line 1.*Remove the file"):
        KeptAnswers(kept.path)


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_gives_what_transformers_gives(folder: Path, tmp_path: Path) -> None:
    """Letters in one request, choices of several tokens, a text in windows, answers with stops."""
    asked = [
        *choices(folder),
        "task=[mmlu,perplexity]",
        f"tasks.mmlu.path={folder / 'mmlu.csv'}",
        f"tasks.perplexity.path={folder / 'texts.jsonl'}",
        f"tasks.sums.path={folder / 'sums.jsonl'}",
        "tasks.sums.metrics=[numeric]",
        "tasks.sums.max_tokens=70",
        "tasks.sums.stops=[zq]",
    ]
    by_vllm = ["rollout=vllm", "rollout.kv_cache_gib=0.1", "rollout.max_num_seqs=8"]
    expected = run(folder, tmp_path / "hf", *asked)
    found = run(folder, tmp_path / "vllm", *asked, *by_vllm)
    assert found == pytest.approx(expected, rel=1e-4)
    lines = []
    for engine in ("hf", "vllm"):
        file = tmp_path / engine / "default" / "eval" / "samples.jsonl"
        rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        lines.append([(row["task"], row["row"], row["response"]) for row in rows])
    assert lines[0] == lines[1]
