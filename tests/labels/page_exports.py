"""Exports for the labelling page's tests."""

from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

from conf.choices import LabelKind
from rlhf.labels.records import Answer, Export, Role, Task

ID = "0123456789ab"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, what is it?"},
    {"role": "user", "content": "Which is bigger,\n\n  2 or 3?"},
]
# What may not run, load, end the data early, or turn the layout around.
EVIL = (
    '<script>window.evil = 1; alert("x")</script><img src="https://example.invalid/a.png" '
    'onerror="window.evil = 1"><b>bold</b> </script><!-- ]]> '
    "[link](javascript:window.evil=1) <a href='javascript:window.evil=1'>here</a> "
    "<style>*{display:none}</style> &lt;i&gt; &amp; ${1} $data {{ x }} "
    '<iframe srcdoc="<script>parent.evil=1</script>"></iframe> <svg onload="window.evil=1"> '
    "\u2028 \u2029 \u202e right to left \u2066 "
    "\ud800 \u0000 \x1b[31m \U0001f600 שלום مرحبا 你好 \\u003c \\ \" '"
)


def export_of(
    tasks: Sequence[tuple[Any, Sequence[str]]], *, kind: LabelKind = LabelKind.pair, **fields: Any
) -> Export:
    """An export of (prompt, texts) whose answers are shown in the order given; what must stay
    hidden holds the word "secret" in some form.
    """
    made = [
        Task(
            id=f"{ID}-{number}",
            prompt=prompt,
            answers=tuple(
                Answer(text, policy=f"secret policy {place}", score=7.4321 + place, spread=0.98765)
                for place, text in enumerate(texts)
            ),
            order=tuple(range(len(texts))),
            role=Role.gold,
            chosen_by="secret method",
            best=0,
            repeats="secret repeat",
        )
        for number, (prompt, texts) in enumerate(tasks, 1)
    ]
    given = {
        "title": "Which answer is better?",
        "instructions": "Read both.\n\nThen choose.",
        "ratings": False,
        "comments": True,
    } | fields
    return Export(
        id=ID,
        kind=kind,
        created="2031-02-03T04:05:06Z",
        tasks=tuple(made),
        details={"policies": ["secret details"]},
        **given,
    )


def pairs(count: int, **fields: Any) -> Export:
    prompts: list[Any] = [CHAT if i == 1 else f"Question {i + 1}" for i in range(count)]
    return export_of(
        [(prompt, [f"left {i + 1}", f"right {i + 1}"]) for i, prompt in enumerate(prompts)],
        **fields,
    )


def rankings(count: int, **fields: Any) -> Export:
    tasks = [
        (f"Question {i + 1}", [f"answer {i + 1}{letter}" for letter in "abcd"])
        for i in range(count)
    ]
    return export_of(tasks, kind=LabelKind.ranking, **fields)


class Elements(HTMLParser):
    """The text and the attributes of a page's elements, in the order of their start, as a browser's
    parser would split them.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.inside = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs), []))
        self.inside = True

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[-1][2].append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        """Of the elements with these attributes."""
        return [
            "".join(texts)
            for name, attrs, texts in self.found
            if name == tag and attributes.items() <= attrs.items()
        ]
