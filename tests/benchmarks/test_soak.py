"""The judge of `make soak` sees a leak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import soak
from rlhf.cli import config
from rlhf.types import UserError


def test_growth_by_hand() -> None:
    warm = [50.0] * 40  # the warm-up does not count
    assert soak.growth([*warm, *[100.0] * 160]) == 0.0
    assert soak.growth([*warm, *[100.0] * 20, *[101.0] * 120, *[103.0] * 20]) == pytest.approx(0.03)
    assert soak.growth([*warm, *[100.0] * 100, 500.0, *[100.0] * 59]) == 0.0, (
        "one step's peak is no growth"
    )
    with pytest.raises(ValueError, match=r"79 steps.* 80"):
        soak.growth([1.0] * 79)


def test_open_files_by_hand() -> None:
    # half of the steps found idle connections closed
    steady = [25, 10] * 100
    assert soak.more_files(steady) == 0
    leaking = [count + step // 20 for step, count in enumerate(steady)]
    assert soak.more_files(leaking) == 7  # from 2 more in step 41 to 9 more in step 181


def write_run(root: Path, case: str, last: float) -> None:
    place = root / f"soak-{case}" / soak.stage_of(case)
    place.mkdir(parents=True)
    resident = [*[100.0] * 180, *[last] * 20]
    lines = [
        json.dumps({"step": i, "memory/rss_mb": value}) for i, value in enumerate(resident, start=1)
    ]
    (place / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize(("last", "code"), [(101.9, 0), (102.1, 1)])
def test_soak_fails_above_two_percent_in_any_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], last: float, code: int
) -> None:
    write_run(tmp_path, "sft", last)
    write_run(tmp_path, "ppo", 100.0)
    assert soak.main(["--dir", str(tmp_path), "--check-only", "--cases", "sft", "ppo"]) == code
    said = capsys.readouterr().out
    assert f"{last - 100:+.2f}%" in said and "+0.00%" in said


def test_a_run_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"soak-ppo-vllm.*no such run"):
        soak.main(["--dir", str(tmp_path), "--check-only", "--cases", "ppo-vllm"])


@pytest.mark.parametrize(
    ("name", "least", "most", "said"),
    [
        ("servers_mib", 500.0, 511.0, "+2.20%"),
        ("handles", 45, 51, "+6"),
        ("servers_handles", 100, 107, "+7"),
    ],
)
def test_memory_and_open_files_are_judged_from_outside(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    least: float,
    most: float,
    said: str,
) -> None:
    write_run(tmp_path, "grpo-server", 100.0)
    file = tmp_path / "soak-grpo-server" / "grpo" / soak.WATCHED_FILE
    steady = dict.fromkeys(("servers_mib", "handles", "servers_handles"), [50] * 200)
    for last, code in ((least, 0), (most, 1)):
        file.write_text(json.dumps(steady | {name: [*[least] * 180, *[last] * 20]}))
        given = ["--dir", str(tmp_path), "--check-only", "--cases", "grpo-server"]
        assert soak.main(given) == code
    assert said in capsys.readouterr().out


STARTS = """
import subprocess, sys, time
from pathlib import Path

inner = "import os, time; held = b'x' * (64 * 2**20); files = [os.pipe() for _ in range(20)]; "
inner += "print('in', flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-S", "-c", inner], stdout=subprocess.PIPE)
child.stdout.readline()
for line in range(3):
    with Path(sys.argv[1]).open("a") as file:
        file.write("line\\n")
    time.sleep(0.3)
child.kill()
child.wait()
"""


def test_what_a_run_started_is_measured_after_each_line(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    command = [sys.executable, "-S", "-c", STARTS, str(metrics)]
    with subprocess.Popen(command) as process:
        seen = soak.watch(process, metrics)
    assert len(seen.servers_mib) == 3 and all(64 < value < 200 for value in seen.servers_mib)
    assert len(seen.handles) == 3 and all(0 < value < 40 for value in seen.handles)
    assert len(seen.servers_handles) == 3 and all(value > 40 for value in seen.servers_handles)


@pytest.mark.parametrize("case", soak.CASES)
def test_each_case_composes_to_what_its_name_says(case: str) -> None:
    cfg = config.compose([*soak.CASES[case], *soak.COMMON, "data.path=x"])
    assert (
        cfg.stage.name == soak.stage_of(case) == case.partition("-")[0]
        and cfg.stage.steps == soak.STEPS
    )
    assert ("vllm" in case) == (cfg.rollout.backend.value == "vllm")
    assert ("server" in case) == (cfg.rollout.backend.value == "server") == soak.has_server(case)
    assert ("lora" in case) == (cfg.adapter.kind.value == "lora")
    assert cfg.engine.zero_stage == (2 if "zero2" in case else 0)
