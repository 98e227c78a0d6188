"""Jobs with the real supervisor: they run, fail, stop, are killed, wait their turn, and are found
again by whoever looks.
"""

import json
import os
import time
from pathlib import Path

import pytest

from rlhf.board.jobs import records
from rlhf.board.jobs.processes import is_alive, start_mark
from rlhf.board.jobs.store import Job, Jobs
from rlhf.types import UserError
from tests.board.acting import acting, until

__all__ = ["acting"]


def submit(jobs: Jobs, part: str, run: str | None = None) -> Job:
    stage = None if run is None else "sft"
    return jobs.submit([f"act={part}"], title=part, run=run, stage=stage)


def state(jobs: Jobs, job: Job) -> str:
    return jobs.job(job.id).state


def wait(jobs: Jobs, job: Job, wanted: str) -> Job:
    until(lambda: state(jobs, job) == wanted)
    return jobs.job(job.id)


def printed(jobs: Jobs, job: Job) -> str:
    return jobs.output(job.id, 0)[0].decode()


def test_a_job_runs_to_its_end(acting: Path) -> None:
    jobs = Jobs(acting)
    assert jobs.jobs() == []
    job = submit(jobs, "words", "film <b> 电影")
    ended = wait(jobs, job, "ended")
    assert ended.exit_code == 0 and ended.pid is None
    assert ended.started is not None and ended.ended is not None
    assert job.created <= ended.started <= ended.ended
    assert printed(jobs, job).startswith("first\n")
    assert jobs.output(job.id, 6)[0] == printed(jobs, job)[6:].encode()
    assert jobs.output(job.id, -5)[0] == printed(jobs, job)[-5:].encode()
    assert jobs.of_run("film <b> 电影", "sft") == ended
    assert jobs.of_run("film <b> 电影", "ppo") is None
    with pytest.raises(KeyError):
        jobs.job("../../etc")


def test_a_failure_has_its_code_and_output(acting: Path) -> None:
    jobs = Jobs(acting)
    job = submit(jobs, "fail")
    assert wait(jobs, job, "failed").exit_code == 1
    assert "no such file" in printed(jobs, job)


def test_nobody_has_to_read_the_output(acting: Path) -> None:
    jobs = Jobs(acting)
    job = submit(jobs, "much")
    wait(jobs, job, "ended")
    size = (job.folder / "output.txt").stat().st_size
    assert size == 30 * 65536 > 1 << 20
    part, after = jobs.output(job.id, 0)
    assert len(part) == after == 1 << 20
    assert len(jobs.output(job.id, after)[0]) == size - after


def test_a_secret_is_in_the_environment_alone(acting: Path) -> None:
    jobs = Jobs(acting)
    first = submit(jobs, "run")
    secret = {"CUDA_VISIBLE_DEVICES": "a-secret"}  # this part prints it
    job = jobs.submit(["act=words"], title="t", run=None, stage=None, secret=secret)
    path = job.folder / "secrets.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert "a-secret" not in (job.folder / "job.json").read_text()
    jobs.kill(first.id)
    wait(jobs, job, "ended")
    assert printed(jobs, job) == "first\na-secret\n" and not path.exists()


def test_stop_lets_the_run_save_and_asking_twice_is_asking_once(acting: Path) -> None:
    jobs = Jobs(acting)
    job = submit(jobs, "run", "a")
    until(lambda: "child" in printed(jobs, job))
    running = jobs.job(job.id)
    assert running.state == "running" and running.pid is not None
    # sessions of their own: this one's end would end neither
    claim = records.read(job.folder, "supervisor.json")
    assert claim is not None
    sessions = {os.getsid(0), os.getsid(running.pid), os.getsid(claim["pid"])}
    assert len(sessions) == 3
    memory = jobs.memory_mib(running)
    assert memory is not None and memory > 1
    jobs.stop(job.id)
    Jobs(acting).stop(job.id)
    stopped = wait(jobs, job, "stopped")
    assert stopped.exit_code == 143
    assert printed(jobs, job).count("asked") == 1 and "saved" in printed(jobs, job)


def test_kill_ends_every_process(acting: Path) -> None:
    jobs = Jobs(acting)
    job = submit(jobs, "stubborn")
    until(lambda: "child" in printed(jobs, job))
    child = int(printed(jobs, job).split("child ")[1].split()[0])
    jobs.stop(job.id)
    until(lambda: "asked" in printed(jobs, job))
    assert state(jobs, job) == "stopping"
    jobs.kill(job.id)
    assert wait(jobs, job, "stopped").exit_code == 137
    until(lambda: start_mark(child) is None)


def test_one_at_a_time_goes_on_without_a_board_and_a_queued_one_can_be_dropped(
    acting: Path,
) -> None:
    jobs = Jobs(acting)
    first, dropped, last = (submit(jobs, part) for part in ("run", "words", "words"))
    assert (state(jobs, dropped), state(jobs, last)) == ("queued", "queued")
    jobs.stop(dropped.id)
    assert state(jobs, dropped) == "stopped"
    until(lambda: "child" in printed(jobs, first))
    jobs.stop(first.id)
    # from here on nobody but the supervisors acts: a fresh look sees the last one end
    assert wait(Jobs(acting), last, "ended").exit_code == 0
    assert jobs.job(dropped.id).exit_code is None


def test_two_at_once(acting: Path) -> None:
    jobs = Jobs(acting, at_once=2)
    running = [submit(jobs, "run") for _ in range(3)]
    assert [state(jobs, job) for job in running] == ["running", "running", "queued"]
    for job in running:
        jobs.kill(job.id)
    for job in running:
        wait(jobs, job, "stopped")


def test_a_run_directory_has_one_job(acting: Path) -> None:
    jobs = Jobs(acting)
    job = submit(jobs, "run", "a")
    with pytest.raises(UserError, match=r"run\.name=a stage=sft"):
        submit(jobs, "words", "a")
    jobs.kill(job.id)
    wait(jobs, job, "stopped")
    wait(jobs, submit(jobs, "words", "a"), "ended")


def test_each_device_has_one_job(acting: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    jobs = Jobs(acting)
    running = [submit(jobs, "run") for _ in range(3)]
    shown = [jobs.job(job.id) for job in running]
    assert [job.state for job in shown] == ["running", "running", "queued"]
    assert [job.device for job in shown] == ["cuda:4", "cuda:7", "cuda"]
    last = submit(jobs, "words")
    for job in running:
        jobs.kill(job.id)
    wait(jobs, last, "ended")
    device = jobs.job(last.id).device.removeprefix("cuda:")
    assert device in ("4", "7") and printed(jobs, last) == f"first\n{device}\n"


def test_a_stale_process_file_is_a_lost_job(acting: Path) -> None:
    """Its number has another process now, as after a reboot: the start tells."""
    jobs = Jobs(acting)
    job = submit(jobs, "run", "a")
    until(lambda: "child" in printed(jobs, job))
    claim = records.read(job.folder, "supervisor.json")
    process = records.read(job.folder, "process.json")
    assert claim is not None and process is not None
    os.kill(claim["pid"], 9)
    until(lambda: not is_alive(claim["pid"], claim["start"]))
    assert state(jobs, job) == "running", "the run lives on without its supervisor"
    jobs.kill(job.id)
    until(lambda: state(jobs, job) == "lost")
    mine = os.getpid()
    for name, content in (("supervisor.json", claim), ("process.json", process)):
        (job.folder / name).write_text(json.dumps({**content, "pid": mine}))
    lost = jobs.job(job.id)
    assert lost.state == "lost" and lost.pid is None
    jobs.kill(job.id)  # would end this very process if the number were believed
    jobs.stop(job.id)
    # what was lost holds up nobody, neither the queue nor the run directory
    wait(jobs, submit(jobs, "words", "a"), "ended")
    latest = jobs.of_run("a", "sft")
    assert latest is not None and latest.state == "ended"


def test_a_new_board_starts_what_waited_through_a_reboot(acting: Path) -> None:
    jobs = Jobs(acting)
    first, waiting = submit(jobs, "run"), submit(jobs, "words")
    claim = records.read(first.folder, "supervisor.json")
    assert claim is not None
    os.kill(claim["pid"], 9)
    jobs.kill(first.id)
    until(lambda: state(jobs, first) == "lost")
    assert state(jobs, waiting) == "queued"
    Jobs(acting).go_on()
    wait(jobs, waiting, "ended")


def test_a_job_whose_folder_went_before_it_began(acting: Path) -> None:
    jobs = Jobs(acting)
    first, second = submit(jobs, "run"), submit(jobs, "words")
    asked = records.read(second.folder, "job.json")
    assert asked is not None
    records.write(second.folder, "job.json", {**asked, "cwd": str(acting / "gone")})
    jobs.kill(first.id)
    failed = wait(jobs, second, "failed")
    assert failed.exit_code == 127 and "gone" in printed(jobs, second)


def test_looking_at_many_jobs_is_quick(acting: Path) -> None:
    jobs = Jobs(acting)
    for number in range(200):
        folder = jobs.folder / f"20260101-000000-{number:08x}"
        folder.mkdir(parents=True)
        asked = {"argv": [], "title": "t", "run": "a", "stage": "sft", "cwd": "/", "device": "cpu"}
        records.write(folder, "job.json", {**asked, "created": float(number)})
        records.write(folder, "exit.json", {"exit_code": 0, "ended": 1.0})
    start = time.monotonic()
    assert len(jobs.jobs()) == 200
    assert jobs.jobs()[0].created == 199.0
    assert time.monotonic() - start < 5
