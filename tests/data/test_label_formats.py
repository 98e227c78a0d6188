"""Export -> label -> import through the files of every tool: exactly the labels that were given,
each for its task and annotator.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.choices import LabelKind, LabelTarget
from rlhf.labels.checking import check
from rlhf.labels.records import Export, Judgement, Verdict
from rlhf.labels.store import Store
from rlhf.labels.targets import LABEL_TOOLS, read_labels
from tests.labels.label_exports import TOOLS, Tool, exports, judgements
from tests.labels.labels import all_checked, ledgers_of, shown_back

UNSAID = "somebody"  # who made the labels that do not say it


def page_files(files: list[Path], said: list[Judgement]) -> Iterator[Path]:
    """What the page downloads: a file for each annotator."""
    for number, name in enumerate(dict.fromkeys(judgement.annotator for judgement in said)):
        rows = [
            {
                "task": one.task,
                "verdict": one.verdict.value,
                "ranking": one.ranking,
                "ratings": one.ratings,
                "comment": one.comment,
                "seconds": one.seconds,
                "time": one.time,
                "prompt": one.prompt,
                "shown": one.shown,
            }
            for one in said
            if one.annotator == name
        ]
        path = files[0].with_name(f"labels-{number}.json")
        content = {
            "format": "rlhf-labels",
            "version": 1,
            "export": "0123456789ab",
            "annotator": name or UNSAID,
            "saved": "",
            "labels": rows,
        }
        path.write_text(json.dumps(content), encoding="utf-8")
        yield path


_WORDS = {
    LabelKind.pair: [Verdict.left, Verdict.right, Verdict.tie, Verdict.skip],
    LabelKind.ranking: [Verdict.ranked, Verdict.skip],
}
PAGE = Tool(LabelTarget.page, lambda files, said: files[0], _WORDS, numbered=False, chats=True)


@pytest.mark.parametrize("kind", LabelKind)
@pytest.mark.parametrize("tool", [*TOOLS, PAGE], ids=lambda tool: tool.target.value)
@settings(deadline=None, max_examples=10)
@given(data=st.data())
def test_exactly_the_labels_that_were_given(
    tool: Tool, kind: LabelKind, data: st.DataObject
) -> None:
    export: Export = data.draw(exports(kind, ratings=kind is LabelKind.pair))
    said: list[Judgement] = data.draw(judgements(export, tool))
    ledgers = ledgers_of(export)
    with tempfile.TemporaryDirectory() as at:
        files = LABEL_TOOLS[tool.target].write(export, Path(at))
        filled = list(page_files(files, said)) if tool is PAGE else [tool.fill(files, said)]
        found = all_checked(
            row for path in filled for row in check(read_labels(path)[1], ledgers, annotator=UNSAID)
        )

        def what(one: Judgement) -> tuple[object, ...]:
            stars = one.ratings if any(one.ratings) else ()
            return (
                one.task,
                one.annotator.strip() or UNSAID,
                one.verdict,
                one.ranking,
                stars,
                one.comment,
                one.seconds,
                one.time,
            )

        back = [what(shown_back(one, ledgers.tasks[one.task][1])) for one in found]
        assert sorted(back, key=repr) == sorted(map(what, said), key=repr)
        for _ in range(2):
            with Store(Path(at) / "store") as store:
                store.add(found, 1)
        with Store(Path(at) / "store") as store:
            assert [one.label for one in store.stored] == found, (
                "a label for each task and annotator, once"
            )
