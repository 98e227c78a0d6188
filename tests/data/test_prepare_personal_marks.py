"""A word of a list may be the name of a mark: the search for it ends."""

from pathlib import Path

from rlhf.data.prepare.personal import KNOWN, redacted, word_pattern


def test_words_that_are_marks(tmp_path: Path) -> None:
    listed = tmp_path / "words.txt"
    listed.write_text("word\nemail\n")
    found = redacted("a word, x@example.org, EMAIL", [*KNOWN.values(), word_pattern(str(listed))])
    assert found == ("a [WORD], [EMAIL], [WORD]", {"email": 1, "word": 2})
