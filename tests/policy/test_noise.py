"""The gradient-noise scale: against the paper's two batch sizes, and gradients of known noise."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from policy.engines.base import GradientNoise
from rlhf.types import UserError

WIDTH = 30
FIGURES = ["train/noise_trace", "train/noise_square"]


class Rows:
    """A loss whose gradient is the mean of its rows, which are drawn around `true`."""

    def __init__(self, true: float, spread: float, decay: float) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.true = torch.full((WIDTH,), true / math.sqrt(WIDTH), dtype=torch.float64)
        self.spread, self.generator = spread, torch.Generator().manual_seed(0)
        self.noise = GradientNoise([self.weight, self.bias], decay)
        self.noise.watch()

    def step(self, parts: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """A step of micro-batches of so many rows. Returns their mean gradients, and the step's."""
        self.weight.grad = self.bias.grad = None
        self.noise.begin()
        means = []
        for count in parts:
            drawn = torch.randn(count, WIDTH, generator=self.generator, dtype=torch.float64)
            rows = self.true + self.spread * drawn
            loss = ((rows * self.weight).sum() + 0.0 * self.bias.sum()) / sum(parts)
            loss.backward()
            self.noise.part(count)
            means.append(rows.mean(0))
        assert self.weight.grad is not None
        self.noise.end(float(self.weight.grad.norm()))
        return means, self.weight.grad


def test_it_is_the_papers_estimate_from_two_batch_sizes() -> None:
    """Appendix A.1, equations A.2 and A.3: small batches of 3 rows, the mean of their squared
    norms, and a big one of 12.
    """
    rows = Rows(1.0, 0.5, 0.0)
    means, whole = rows.step([3] * 4)
    small = sum(float(mean.norm()) ** 2 for mean in means) / 4
    big = float(whole.norm()) ** 2
    square = (12 * big - 3 * small) / (12 - 3)
    trace = (small - big) / (1 / 3 - 1 / 12)
    figures = rows.noise.figures()
    assert figures == pytest.approx(
        {FIGURES[0]: trace, FIGURES[1]: square, "train/noise_scale": trace / square}, rel=1e-12
    )


@pytest.mark.parametrize("parts", [[1] * 8, [2] * 4, [1, 2, 5, 8], [15, 1]])
def test_it_finds_a_noise_that_is_known(parts: list[int]) -> None:
    """Rows of spread 0.7 around a gradient of length 2: a trace of 30 x 0.49, a scale of 3.675."""
    rows = Rows(2.0, 0.7, 0.999)
    for _ in range(800):
        rows.step(parts)
    figures = rows.noise.figures()
    assert figures["train/noise_trace"] == pytest.approx(WIDTH * 0.49, rel=0.05)
    assert figures["train/noise_square"] == pytest.approx(4.0, rel=0.05)
    assert figures["train/noise_scale"] == pytest.approx(3.675, rel=0.08)


def test_the_averages_decay_as_they_say_and_go_on_from_their_state() -> None:
    single, averaged, resumed = (Rows(1.0, 0.5, decay) for decay in (0.0, 0.8, 0.8))
    seen = []
    for number in range(5):
        single.step([2, 2])
        averaged.step([2, 2])
        resumed.step([2, 2])
        seen.append(single.noise.figures()["train/noise_trace"])
        if number == 2:
            fresh = GradientNoise([], 0.8)
            fresh.load_state_dict(resumed.noise.state_dict())
            resumed.noise.trace = resumed.noise.square = resumed.noise.weight = math.nan
            resumed.noise.load_state_dict(fresh.state_dict())
    weights = [0.8 ** (4 - number) for number in range(5)]
    expected = sum(w * value for w, value in zip(weights, seen, strict=True)) / sum(weights)
    assert averaged.noise.figures()["train/noise_trace"] == pytest.approx(expected, rel=1e-12)
    assert resumed.noise.state_dict() == averaged.noise.state_dict()


def test_a_step_of_one_micro_batch_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows(1.0, 0.5, 0.9)
    rows.step([4])
    rows.step([4])
    assert rows.noise.figures() == {}
    assert caplog.text.count("single micro-batch says nothing") == 1
    rows.step([2, 2])
    assert set(FIGURES) <= rows.noise.figures().keys()


def test_a_gradient_below_its_noise_has_no_scale() -> None:
    rows = Rows(0.0, 1.0, 0.0)
    signs = set()
    for _ in range(20):
        rows.step([1, 1])
        figures = rows.noise.figures()
        signs.add(figures["train/noise_square"] > 0)
        assert ("train/noise_scale" in figures) == (figures["train/noise_square"] > 0)
    assert signs == {True, False}


def test_a_step_that_was_given_up_leaves_nothing_behind() -> None:
    rows, other, begun = (Rows(1.0, 0.5, 0.0) for _ in range(3))
    for given_up in (other, begun):
        given_up.weight.sum().backward()
        given_up.noise.part(3)
    other.noise.end(None)
    for each in (rows, other, begun):
        each.step([2, 3])
        assert each.noise.figures() == rows.noise.figures()


def test_gradients_in_several_pieces_are_refused() -> None:
    layer = torch.nn.Linear(2, 2)
    noise = GradientNoise(list(layer.parameters()), 0.9)
    noise.watch()
    x = torch.ones(1, 2, requires_grad=True)
    twice = checkpoint(layer, checkpoint(layer, x, use_reentrant=False), use_reentrant=False)
    twice.sum().backward()
    noise.part(1)
    with pytest.raises(UserError, match=r"stage\.noise_scale: .*several pieces"):
        checkpoint(
            layer, checkpoint(layer, x, use_reentrant=True), use_reentrant=True
        ).sum().backward()


def test_parameters_that_wait_are_watched_once_they_train() -> None:
    first, second = torch.nn.Linear(2, 1, bias=False), torch.nn.Linear(2, 1, bias=False)
    second.requires_grad_(False)
    noise = GradientNoise([first.weight, second.weight], 0.0)
    noise.watch()
    assert not second.weight.requires_grad
    found = []
    for trains in (False, True):
        second.requires_grad_(trains)
        noise.begin()
        squares = []
        for scale in (1.0, 2.0):
            first.zero_grad()
            second.zero_grad()
            (scale * (first(torch.ones(2)) + second(torch.ones(2)))).sum().backward()
            noise.part(1)
            squares.append(scale**2 * 2 * (1 + trains))
        noise.end(0.0)
        found.append(noise.figures()["train/noise_trace"])
        # N^2 sum |c_i|^2 / n_i, with a whole gradient of 0 and m - 1 = 1
        assert found[-1] == pytest.approx(4 * sum(squares))
