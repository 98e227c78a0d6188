"""What the presets' steps leave of clean rows in any script, of code and of maths."""

import unicodedata
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.data.prepare.items import Item
from rlhf.data.prepare.pipeline import Prepared, run
from tests.data.languages import SENTENCES
from tests.data.preparation import apply, numbers, sft

ROOT = Path(__file__).parents[2]


def preset(name: str) -> list[Any]:
    """The steps of a preset."""
    return yaml.safe_load((ROOT / "conf" / "data" / f"{name}.yaml").read_text())["pipeline"]


def answers(sentences: tuple[str, ...]) -> list[str]:
    """Prose, numbered lists, bullet points and tables of the same sentences."""
    out = []
    for number, chosen in enumerate([*combinations(sentences, 5)][::5]):
        lines = {
            0: [" ".join(chosen)],
            1: [f"{i}. {sentence}" for i, sentence in enumerate(chosen, start=1)],
            2: [f"- {sentence}" for sentence in chosen],
            3: ["| # | A | B |", "|---|---|---|"]
            + [
                f"| {i} | {s[:9].strip()} | {s[9:].strip()} |"
                for i, s in enumerate(chosen, start=1)
            ],
        }[number % 4]
        out.append("\n".join(lines))
    return out


def clean(texts: list[str], folder: Path) -> Prepared:
    """The preset clean, over rows with these answers."""
    rows = [
        Item({"prompt": f"{text[-30:]} ({number})", "completion": text}, "f", number)
        for number, text in enumerate(texts, start=1)
    ]
    return run(rows, preset("clean"), kind="sft", folder=folder)


@pytest.mark.parametrize("language", SENTENCES)
def test_no_clean_row_of_any_script_is_left_out(language: str, tmp_path: Path) -> None:
    texts = answers(SENTENCES[language])
    out = clean(texts, tmp_path)
    assert out.rejected.read_text(encoding="utf-8") == ""
    unchanged = [unicodedata.normalize("NFC", text) for text in texts]
    assert [item.columns["completion"] for item in out.items] == unchanged


@pytest.mark.parametrize("language", SENTENCES)
def test_a_loop_in_any_script_is_left_out(language: str) -> None:
    loop = SENTENCES[language][2] * 12
    _, reasons, _ = apply(sft(loop), "quality")
    assert "share of" in reasons[1]


@pytest.mark.parametrize("language", SENTENCES)
def test_each_language_is_kept_by_its_code(language: str) -> None:
    rows = sft(*SENTENCES[language], *answers(SENTENCES[language])[:4])
    kept, reasons, _ = apply(rows, "language", keep=[language])
    assert reasons == {} and len(kept) == len(rows)
    other = "en" if language != "en" else "de"
    kept, _, _ = apply(rows, "language", keep=[other])
    assert len(kept) <= len(rows) // 10


CODE = (
    '''Here is the function.

```python
def rolling(values, width):
    """Means of every `width` neighbours."""
    # the first sum, then one value in and one out
    total = sum(values[:width])
    out = [total / width]
    for i in range(width, len(values)):
        total += values[i] - values[i - width]
        out.append(total / width)
    return out[::2]
```''',
    """#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
    int n = argc > 1 ? atoi(argv[1]) : 10;
    for (int i = 0; i < n; i++) {
        if (i % 3 == 0) printf("fizz");
        if (i % 5 == 0) printf("buzz");
        printf("\\n");
    }
    return 0;
}""",
    """SELECT c.name, COUNT(o.id) AS orders, SUM(o.total) AS spent
FROM customers AS c
LEFT JOIN orders AS o ON o.customer_id = c.id
WHERE o.created_at >= '2024-01-01'
GROUP BY c.name
HAVING COUNT(o.id) > 3
ORDER BY spent DESC;""",
)
MATHS = (
    """Each box holds 12 eggs, so 5 boxes hold 12*5=<<12*5=60>>60 eggs.
She uses 3 a day for 7 days, which is 3*7=<<3*7=21>>21 eggs.
That leaves 60-21=<<60-21=39>>39 eggs, and 39/3=<<39/3=13>>13 days.
#### 13""",
    r"""We complete the square:
\[
x^2 + 6x + 5 = (x + 3)^2 - 4.
\]
So $(x + 3)^2 = 4$, and $x + 3 = 2$ or $x + 3 = -2$.
\[
x = -1 \quad\text{or}\quad x = -5.
\]
Both solve $x^2 + 6x + 5 = 0$, since $1 - 6 + 5 = 0$ and $25 - 30 + 5 = 0$.""",
    r"""$\frac{3}{4} + \frac{1}{6} = \frac{9}{12} + \frac{2}{12} = \frac{11}{12}$, and
$\frac{11}{12} \cdot \frac{4}{11} = \frac{44}{132} = \frac{1}{3}$. The sum of both is
$\frac{11}{12} + \frac{1}{3} = \frac{11}{12} + \frac{4}{12} = \frac{15}{12} = \frac{5}{4}$.""",
)


def test_code_and_maths_pass_unchanged(tmp_path: Path) -> None:
    texts = [*CODE, *MATHS]
    out = clean(texts, tmp_path)
    assert out.rejected.read_text(encoding="utf-8") == ""
    assert [item.columns["completion"] for item in out.items] == texts


def test_what_an_assistant_says_again_in_a_later_turn_is_no_repetition() -> None:
    def chat(*answers: str) -> dict[str, Any]:
        turns = [
            [{"role": "user", "content": "Again?"}, {"role": "assistant", "content": answer}]
            for answer in answers
        ]
        return {"messages": [message for turn in turns for message in turn]}

    answer = " ".join(SENTENCES["en"])
    loop = "the best film ever " * 20
    rows = [
        Item(chat(answer, answer, answer), "f", 1),
        Item(chat(answer, loop), "f", 2),
        Item(chat(loop, answer), "f", 3),
    ]
    rows[2].columns["messages"][1]["train"] = False
    kept, reasons, _ = apply(rows, "quality")
    assert numbers(kept) == [1, 3] and reasons[2].startswith("messages[3]: share of")
