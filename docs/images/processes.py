"""Draws docs/images/processes.png, the processes of a run with rollout=server.

python docs/images/processes.py
"""

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).resolve().parent
OURS, VLLM, DATA = "#e3f2fd", "#fff3e0", "#f5f7fa"
LINE = "#486581"


def box(panel: plt.Axes, place: tuple[float, float, float, float], text: str, colour: str) -> None:
    """A box of (left, bottom, width, height), its text in the middle."""
    left, bottom, width, height = place
    shape = FancyBboxPatch(
        (left, bottom), width, height, boxstyle="round,pad=0.06", facecolor=colour, edgecolor=LINE
    )
    panel.add_patch(shape)
    panel.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize=9)


def title(panel: plt.Axes, x: float, y: float, text: str) -> None:
    panel.text(x, y, text, ha="left", va="center", fontsize=10, fontweight="bold")


def arrow(panel: plt.Axes, start: tuple[float, float], end: tuple[float, float], text: str) -> None:
    """An arrow between two points, its text above the middle."""
    panel.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=LINE, linewidth=1.4)
    )
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    panel.text(middle[0], middle[1] + 0.13, text, ha="center", va="bottom", fontsize=8.5)


def main() -> None:
    figure, panel = plt.subplots(figsize=(9.6, 5.4))
    panel.set_xlim(0, 12)
    panel.set_ylim(0, 6.75)
    panel.axis("off")

    box(panel, (0.2, 6.0, 11.6, 0.5), "launch=local | torchrun | slurm | ray: starts both", DATA)

    box(panel, (0.2, 1.9, 4.2, 3.6), "", OURS)
    title(panel, 0.35, 5.25, "Trainer: torchrun, one rank a device")
    for number, name in enumerate(("rank 0", "rank 1", "rank N-1")):
        box(panel, (0.5, 4.3 - 0.8 * number, 3.6, 0.42), name, "white")
    text = "policy, critic, reference: DeepSpeed\nrewards, advantages, update, proof of the sync"
    panel.text(2.3, 2.2, text, ha="center", va="center", fontsize=8.5)

    for number, bottom in enumerate((3.85, 1.9)):
        box(panel, (7.7, bottom, 4.1, 1.65), "", VLLM)
        title(panel, 7.85, bottom + 1.4, f"vLLM server {number}: HTTP, bearer token")
        for worker in range(4):
            place = (7.95 + 0.95 * worker, bottom + 0.6, 0.75, 0.42)
            box(panel, place, f"device {worker}", "white")
        text = "tensor_parallel: layers shared out\ndata_parallel: copies of the model"
        panel.text(9.75, bottom + 0.22, text, ha="center", va="center", fontsize=8)

    arrow(panel, (4.5, 4.85), (7.6, 4.85), "prompts: token ids, seed")
    arrow(panel, (7.6, 4.1), (4.5, 4.1), "token ids, logprobs, versions")
    arrow(panel, (4.5, 3.05), (7.6, 3.05), "rank 0: weights, version")
    arrow(panel, (7.6, 2.3), (4.5, 2.3), "checksums, probe")
    panel.text(6.05, 2.82, "nccl, ipc, gloo or file", ha="center", va="center", fontsize=8)

    box(panel, (0.2, 0.3, 4.2, 1.0), "runs/NAME: metrics, checkpoints,\nservers/*.json, logs", DATA)
    box(
        panel,
        (7.7, 0.3, 4.1, 1.0),
        "stage=serve_reward: reward models\nof the run, or of several",
        OURS,
    )
    arrow(panel, (2.3, 1.85), (2.3, 1.4), "")
    arrow(panel, (4.5, 1.85), (7.6, 0.95), "")
    panel.text(6.3, 1.6, "responses, scores", ha="left", va="center", fontsize=8.5)
    figure.tight_layout()
    figure.savefig(HERE / "processes.png", dpi=110)


if __name__ == "__main__":
    main()
