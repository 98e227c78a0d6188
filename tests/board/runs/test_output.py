"""What a job printed, made readable."""

from rlhf.board.runs.output import problem, readable


def test_codes_and_bars_become_text() -> None:
    bar = b"step 1\rstep 2\rstep 3\n\x1b[31mred\x1b[0m \x1b]0;title\x07words\n\xff end\r\n"
    assert readable(bar) == "step 3\nred words\n\ufffd end\n"


def test_the_last_error_is_the_problem() -> None:
    assert problem("a\nerror: one\nb\nerror: two\nmore") == "two\nmore"
    assert problem("error: at once") == "at once"
    assert problem("no error: here") == ""
