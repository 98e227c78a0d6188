"""The bench's own parts: all programs get the same case, take turns over a pipe, and the ratios
are taken turn by turn.
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.shared import descendants, one_thread, pinned
from benchmarks.speed import __main__ as bench
from benchmarks.speed import offline, online, results, scaling
from benchmarks.speed import turns as turns_module
from benchmarks.speed.cases import Case, distinct_words
from benchmarks.speed.ours import bare_pass, overrides
from benchmarks.speed.protocol import Worker
from benchmarks.speed.results import Result, Spread
from benchmarks.speed.turns import Contestant, take_turns
from conf.choices import Advantage
from rlhf.cli import config
from rlhf.types import UserError

CASE = Case(
    name="b-lora",
    model="runs/x",
    prompts=["a", "b"],
    samples=4,
    max_response=6,
    max_prompt=8,
    lora=True,
)


def test_a_case_survives_its_file(tmp_path: Path) -> None:
    CASE.dump(tmp_path / "case.json")
    assert Case.load(tmp_path / "case.json") == CASE


def test_our_side_trains_grpo_without_a_penalty_on_every_prompt(tmp_path: Path) -> None:
    cfg = config.compose(overrides(CASE, tmp_path))
    stage = cfg.stage
    assert (stage.advantage, stage.epochs, stage.minibatches, stage.kl_coef, stage.reference) == (
        Advantage.group,
        1,
        1,
        0.0,
        False,
    )
    assert (
        stage.prompts_per_step,
        stage.samples_per_prompt,
        cfg.rollout.max_response_length,
        cfg.adapter.rank,
    ) == (2, 4, 6, 8)
    assert len((tmp_path / "prompts.jsonl").read_text(encoding="utf-8").splitlines()) == 2


def test_the_reward_is_the_share_of_distinct_words() -> None:
    assert distinct_words(["a b a b", [{"role": "assistant", "content": "x"}], ""]) == [
        0.5,
        1.0,
        0.0,
    ]


def figures(step: float, memory: float = 100.0) -> dict[str, float]:
    return {
        "step_s": step,
        "cpu_s": step,
        "rollout_s": step / 2,
        "update_s": step / 4,
        "sync_s": step / 100,
        "bare_s": step / 5,
        "gap": 1e-6,
        "loss": 0.5,
        "peak_rss_mb": memory,
        "response_tokens": 100.0,
    }


def result(part: str, turns: dict[str, list[dict[str, float]]], case: str = "a") -> Result:
    facts = {"case": case, "work": "some work"}
    return Result(
        part, f"python -m benchmarks.speed --only {part}", "2026-01-01", "2 x", turns, facts
    )


TRL = [figures(s, 200) for s in (3.0, 5.0, 8.0)]
TURNS = [figures(s) for s in (1.0, 2.0, 4.0)]


def test_a_spread_is_least_median_and_largest() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(1.0, 3.0, 10.0)
    assert str(Spread.of([1234.5, 20.04, 0.123])) == "20.0 [0.12, 1,234]"
    with pytest.raises(ValueError, match="no turn"):
        Spread.of([])


def test_the_tables_hold_spreads_and_ratios_of_neighbouring_turns() -> None:
    text = "\n".join(online.online_tables({"a": result("a", {"turns": TURNS, "trl": TRL})}))
    assert "| a | TRL / one process | 2.50 [2.00, 3.00] | 2.50 [2.00, 3.00] | 3 |" in text
    assert "| a | one process | 2.00 [1.00, 4.00] | 100 [50.0, 200] |" in text
    # the update against a bare pass, the sync's share
    assert "| a | one process | 0.80 [0.80, 0.80] | 1.00 [1.00, 1.00] | 1.0e-06 |" in text
    assert "some work" in text


def test_a_cost_is_ours_against_bare_trl_and_other_losses_are_refused() -> None:
    turns = {"ours": [figures(1.1), figures(2.0)], "trl": [figures(1.0), figures(2.0)]}
    assert "1.05 [1.00, 1.10]" in "\n".join(offline.offline_table({"sft": result("sft", turns)}))
    turns["ours"][1]["loss"] = 0.501
    with pytest.raises(RuntimeError, match=r"sft.*0\.501"):
        offline.check_same("sft", turns["ours"], turns["trl"])
    nan = [figures(1.0) | {"loss": float("nan")}]
    with pytest.raises(RuntimeError, match="nan"):
        offline.check_same("sft", nan, nan)


def test_the_page_takes_the_tables_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{results.BEGIN}old\n{results.END}after\n", encoding="utf-8")
    result("a", {"turns": TURNS, "trl": TRL}).write(tmp_path / "figures")
    read = results.read_all(tmp_path / "figures")
    lines = [*bench.tables(read), *bench.origins(read)]
    results.write_page(lines, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "python -m benchmarks.speed --only a" in text and "2026-01-01" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 100
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(ValueError, match="figures of make bench"):
        results.write_page(lines, page)
    with pytest.raises(UserError, match=str(tmp_path / "none")):
        results.read_all(tmp_path / "none")


def test_the_committed_page_has_its_place() -> None:
    text = (Path(__file__).resolve().parents[2] / results.PAGE).read_text(encoding="utf-8")
    assert text.count(results.BEGIN) == text.count(results.END) == 1


def test_parts_are_chosen_by_the_beginnings_of_their_names() -> None:
    assert bench.chosen_parts([], quick=False) == list(bench.PARTS)
    assert bench.chosen_parts([], quick=True) == ["a", "sft", "reward", "dpo"]
    assert bench.chosen_parts(["sft", "b-lora-t"], quick=False) == ["b-lora-trl", "sft"]
    assert len(bench.chosen_parts(["b-"], quick=False)) == 8
    with pytest.raises(SystemExit):
        bench.main(["--only", "x"])


def test_a_part_that_fails_leaves_the_others_and_the_exit_code_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(part: str, *given: object) -> Result:
        if part == "sft":
            raise RuntimeError("it broke")
        return result(part, {"ours": [figures(1.0)], "trl": [figures(1.0)]})

    monkeypatch.setattr(bench, "measure", measure)
    given = ["--only", "sft", "dpo", "--runs", str(tmp_path), "--results", str(tmp_path / "out")]
    assert bench.main(given) == 1
    assert "it broke" in capsys.readouterr().err
    assert list(results.read_all(tmp_path / "out")) == ["dpo"]
    assert bench.main(["--only", "dpo", *given[3:]]) == 0


def test_each_way_has_its_cores_and_one_core_one_thread(tmp_path: Path) -> None:
    ways = online.contestants(CASE, ("turns", "server", "ahead", "trl"), tmp_path)
    both = ways["turns"].cores
    assert both is not None
    first, second = both.split(",")
    assert [way.cores for way in ways.values()] == [both] * 4
    given = Case.load(ways["ahead"].case)
    assert (given.way, given.server_cores, given.trainer_core) == ("ahead", (second,), int(first))
    assert Case.load(ways["turns"].case).trainer_core is None
    assert Case.load(ways["trl"].case) == CASE
    assert (
        one_thread("1") == {"OMP_NUM_THREADS": "1"} and one_thread("0,1") == one_thread(None) == {}
    )
    assert pinned(["x"], "0,1") == ["taskset", "-c", "0,1", "x"] and pinned(["x"], None) == ["x"]


def test_a_server_and_one_ahead_are_options(tmp_path: Path) -> None:
    given = {
        way: overrides(replace(CASE, way=way, server_cores=("1",)), tmp_path)
        for way in ("server", "ahead")
    }
    assert {"rollout=server", "rollout.server.count=1", "stage.ahead=0"} <= set(given["server"])
    assert "stage.ahead=1" in given["ahead"] and "engine.threads=1" in given["ahead"]
    assert "rollout.server.cores=['1']" in given["ahead"] and "rollout=vllm" not in given["ahead"]


def test_scaling_launches_so_many_ranks_or_servers(tmp_path: Path) -> None:
    ranks, place = scaling.run_command("ranks", 2, CASE, 8, tmp_path)
    assert "--nproc_per_node=2" in ranks and "engine=zero0" in ranks and "stage.steps=8" in ranks
    assert place == tmp_path / "scaling-ranks-2" / "scaling" / "grpo"
    servers, _ = scaling.run_command("servers", 2, CASE, 8, tmp_path)
    assert "rollout.server.count=2" in servers and "torch.distributed.run" not in servers


def test_scaling_reads_the_steps_of_a_run() -> None:
    row = {
        "time/step_s": 4.0,
        "time/rollout_s": 1.0,
        "time/prepare_s": 0.5,
        "time/update_s": 1.5,
        "time/sync_s": 0.1,
        "rollout/response_tokens": 60.0,
    }
    step = scaling.figures_of(row)
    assert (step["update_s"], step["response_tokens"]) == (2.0, 60.0)
    measured = result("ranks", {"1": [step], "2": [step | {"step_s": 2.0}]})
    lines = scaling.scaling_table({"ranks": measured})
    assert lines[2].startswith("| 1 rank |") and lines[3].startswith("| 2 ranks | 2.00")
    assert lines[3].endswith("| 2.00 |")


class Toy(nn.Module):
    """A language model just large enough for a pass."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=11)
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, 11)
        self.seen: list[tuple[int, int]] = []
        self.answered: list[int] = []
        self.head.register_forward_hook(lambda _m, args, _o: self.answered.append(len(args[0])))

    def body(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.seen.append(tuple(input_ids.shape))
        return SimpleNamespace(last_hidden_state=self.embed(input_ids))

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_the_bare_pass_covers_the_real_tokens_and_leaves_no_gradient() -> None:
    module = nn.Module()
    module.model = toy = Toy()
    assert bare_pass(module, 10, 40, 60, budget=35) > 0
    assert sum(rows * length for rows, length in toy.seen) == 100 and sum(toy.answered) == 60
    assert all(rows * length <= 35 for rows, length in toy.seen)
    assert all(parameter.grad is None for parameter in module.parameters())


ECHO = """
import itertools, os
from benchmarks.speed.protocol import serve

n = itertools.count()

def step():
    i = next(n)
    assert i < 2, "no third step"
    return {"i": float(i), "step_s": 0.0, "cores": float(len(os.sched_getaffinity(0)))}

serve(step)
"""


@pytest.fixture
def echo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A worker that counts, and its case."""
    (tmp_path / "echo_worker.py").write_text(ECHO, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path.cwd()}")
    CASE.dump(tmp_path / "case.json")
    return tmp_path / "case.json"


def test_a_worker_answers_each_request_and_a_dead_one_tells_its_log(
    tmp_path: Path, echo: Path
) -> None:
    core = str(min(os.sched_getaffinity(0)))
    worker = Worker.start("echo_worker", echo, tmp_path / "log", core)
    first, second = worker.step(), worker.step()
    assert [first["i"], second["i"]] == [0.0, 1.0] and first["cores"] == 1.0
    assert descendants(os.getpid()).count(worker.process.pid) == 1
    with pytest.raises(RuntimeError, match="no third step"):
        worker.step()
    worker.close()
    assert worker.process.pid not in descendants(os.getpid())


def test_programs_take_turns_after_one_that_does_not_count(
    tmp_path: Path, echo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns_module, "PAUSE_S", 0.0)
    two = {name: Contestant("echo_worker", echo) for name in ("one", "other")}
    turns = take_turns("echo", two, 1, tmp_path)
    assert [[row["i"] for row in rows] for rows in turns.values()] == [[1.0], [1.0]]
    with pytest.raises(RuntimeError, match="no third step"):
        take_turns("echo", two, 2, tmp_path)
    assert json.loads(echo.read_text(encoding="utf-8"))["name"] == "b-lora" and sys.executable
