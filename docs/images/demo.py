"""Draws docs/images/demo.png from the table of README "What the demo shows".

python docs/images/demo.py
"""

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt

HERE = Path(__file__).resolve().parent
NUMBER = r"[-+]?\d+\.\d+"
ROW = re.compile(
    rf"^\| (?P<name>reward-model score|judge: \w+) \| (?P<before>{NUMBER}) \| (?P<after>{NUMBER}) "
    rf"\| {NUMBER} \[(?P<low>{NUMBER}), (?P<high>{NUMBER})\]",
    re.MULTILINE,
)


def main() -> None:
    """A panel for each judge: before and after, with the difference's 95 % interval on the
    latter.
    """
    text = (HERE.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = [match.groupdict() for match in ROW.finditer(text)]
    figure, axes = plt.subplots(1, len(rows), figsize=(8.2, 2.8))
    for panel, row in zip(axes, rows, strict=True):
        before, after = float(row["before"]), float(row["after"])
        below = after - before - float(row["low"])
        above = float(row["high"]) - (after - before)
        panel.bar(["SFT", "GRPO"], [before, after], color=["#9fb3c8", "#2680c2"])
        panel.errorbar(["GRPO"], [after], yerr=[[below], [above]], color="black", capsize=6)
        panel.set_title(row["name"], fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle("make demo: 80 held-out questions, before and after GRPO", fontsize=11)
    figure.tight_layout()
    figure.savefig(HERE / "demo.png", dpi=110)


if __name__ == "__main__":
    main()
