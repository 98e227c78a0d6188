"""metrics.jsonl while it grows, is cut by a resume, and grows again."""

import os
from pathlib import Path

from rlhf.board.runs.metrics import Reader, Readers, newest
from tests.board.making import metric_line


def lines(*steps: int, value: float = 0.5) -> str:
    return "".join(metric_line(step, loss=value + step) + "\n" for step in steps)


def test_it_reads_on_without_reading_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = Reader(path)
    assert reader.series() == {}
    path.write_text(lines(1, 2))
    assert list(reader.series()["loss"].points()) == [(1, 1.5), (2, 2.5)]
    with path.open("a") as file:
        file.write(lines(3) + metric_line(4, loss=9)[:7])
    assert list(reader.series()["loss"].steps) == [1, 2, 3], "a torn line waits for its end"
    with path.open("a") as file:
        file.write(metric_line(4, loss=9)[7:] + "\n")
    assert list(reader.series()["loss"].points())[-1] == (4, 9.0)
    assert reader.read_whole == 1 and reader.unreadable == 0


def test_the_last_line_may_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(1, 2))
    reader = Reader(path)
    reader.series()
    start = len(lines(1))
    with path.open("r+b") as file:
        file.truncate(start)
        file.seek(start)
        file.write((metric_line(2, loss=2.5, eval_loss=7.0) + "\n").encode())
    held = reader.series()
    assert list(held["eval_loss"].points()) == [(2, 7.0)]
    assert list(held["loss"].steps) == [1, 2]
    assert reader.read_whole == 1


def test_a_resume_cuts_the_file_and_an_offset_would_land_inside_a_line(tmp_path: Path) -> None:
    """The resumed run has written past the old end before anybody looked again."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(*range(1, 21)))
    reader = Reader(path)
    assert list(reader.series()["loss"].steps) == list(range(1, 21))
    beside = tmp_path / "metrics.tmp"
    beside.write_text(lines(*range(1, 11)))
    os.replace(beside, path)
    with path.open("a") as file:
        for step in range(11, 31):
            file.write(metric_line(step, loss=100.25 + step, other_figure_of_this_start=1.0) + "\n")
    held = reader.series()["loss"]
    assert list(held.steps) == list(range(1, 31))
    assert held.values[10] == 111.25
    assert reader.read_whole == 2 and reader.unreadable == 0


def test_the_same_file_cut_in_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(*range(1, 21)))
    reader = Reader(path)
    reader.series()
    with path.open("r+") as file:  # the same inode
        file.truncate(len(lines(*range(1, 6))))
        file.seek(0, os.SEEK_END)
        file.write(lines(*range(6, 9), value=50.0))
    held = reader.series()["loss"]
    assert list(held.steps) == list(range(1, 9)) and held.values[-1] == 58.0


def test_later_steps_over_a_cut_are_told_by_the_line_before(tmp_path: Path) -> None:
    """No step goes back after the offset, and the file is the same and longer."""
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(*range(1, 21)))
    reader = Reader(path)
    reader.series()
    with path.open("r+") as file:
        file.truncate(len(lines(*range(1, 6))))
        file.seek(0, os.SEEK_END)
        file.write(lines(*range(100, 140)))
    assert list(reader.series()["loss"].steps) == [*range(1, 6), *range(100, 140)]


def test_steps_that_go_back_tell_of_a_cut_that_bytes_do_not(tmp_path: Path) -> None:
    """Every line as long as before, and the line before the offset word by word the same."""
    path = tmp_path / "metrics.jsonl"
    same = '{"step": %d, "loss": %d}\n'
    path.write_text("".join(same % (step, step) for step in range(1, 6)))
    reader = Reader(path)
    reader.series()
    text = "".join(same % (step, step) for step in (1, 2, 3, 4, 3, 4, 5))
    with path.open("r+") as file:
        file.write(text)
    held = reader.series()["loss"]
    assert list(held.steps) == [1, 2, 3, 4, 5], "the later lines count"
    assert reader.read_whole == 2


def test_what_no_run_wrote_is_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = lines(1) + "no json\n[1]\n" + '{"step": true}\n' + lines(2)
    path.write_text(text + '{"step": 3, "loss": null, "flag": true, "text": "x", "n": NaN}\n')
    reader = Reader(path)
    held = reader.series()
    assert set(held) == {"loss"} and list(held["loss"].steps) == [1, 2]
    assert reader.unreadable == 3


def test_the_newest_figures_come_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        file.write(metric_line(1, eval_loss=3.0) + "\n" + metric_line(2, eval_loss=2.0) + "\n")
        for step in range(3, 40):
            file.write(metric_line(step, loss=float(step), long="x" * 500) + "\n")
        file.write('{"step": 40, "lo')
    end = newest(path)
    assert (end.step, end.time_s) == (39, 58.5)
    assert end.figures == {"loss": 39.0, "eval_loss": 2.0}
    path.write_text(metric_line(1, loss=1.0, long="x" * 300_000) + "\n")
    assert newest(path).step == 1, "a line longer than the part that is read first"
    path.write_text("")
    assert newest(path).step is None


def test_readers_are_kept_for_a_few_files(tmp_path: Path) -> None:
    readers = Readers(most=2)
    first = readers.of(tmp_path / "a")
    assert readers.of(tmp_path / "a") is first
    readers.of(tmp_path / "b")
    readers.of(tmp_path / "c")
    assert readers.of(tmp_path / "a") is not first
