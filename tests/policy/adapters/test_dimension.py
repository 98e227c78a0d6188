"""TwoNN on clouds of known dimension."""

import math

import pytest
import torch
from torch import Tensor

from policy.adapters.dimension import corrected, dimension, ratios, reading_on_sphere, two_nn

POINTS, SEEDS = 2048, 1


def sphere(dimension: int, generator: torch.Generator) -> Tensor:
    points = torch.randn(POINTS, dimension + 1, generator=generator, dtype=torch.float64)
    return points / points.norm(dim=1, keepdim=True)


def normal(dimension: int, generator: torch.Generator) -> Tensor:
    return torch.randn(POINTS, dimension, generator=generator, dtype=torch.float64)


def cube(dimension: int, generator: torch.Generator) -> Tensor:
    return torch.rand(POINTS, dimension, generator=generator, dtype=torch.float64)


def in_many_coordinates(points: Tensor, generator: torch.Generator) -> Tensor:
    """The same points, turned into 40 coordinates."""
    turned = torch.randn(40, points.shape[1], generator=generator, dtype=torch.float64)
    return points @ torch.linalg.qr(turned).Q.T


def found(make: object, true: int) -> float:
    """The mean dimension over seeds, as a share of the true one."""
    readings = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        points = make(true, generator)  # type: ignore[operator]
        readings.append(dimension(in_many_coordinates(points, generator), seed))
    return sum(readings) / SEEDS / true


@pytest.mark.parametrize("true", [2, 5, 10, 20])
@pytest.mark.parametrize("make", [sphere, normal], ids=["sphere", "normal"])
def test_the_dimension_of_a_cloud_is_found_within_a_tenth(make: object, true: int) -> None:
    assert found(make, true) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("true", [2, 5])
def test_so_is_that_of_a_cube(true: int) -> None:
    assert found(cube, true) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("true", [10, 20])
def test_a_cube_of_many_dimensions_reads_a_tenth_too_little(true: int) -> None:
    """Nearly all of its points are at its border. As the module's text says."""
    assert found(cube, true) == pytest.approx(0.9, abs=0.06)


def test_the_expected_reading_is_that_of_a_sphere() -> None:
    """Against TwoNN on points; of two dimensions it is exact, whatever their number."""
    generator = torch.Generator().manual_seed(0)
    for true in (3, 8):
        reading = two_nn(sphere(true, generator))
        assert reading == pytest.approx(reading_on_sphere(float(true), POINTS), rel=0.08)
    assert reading_on_sphere(2.0, 64) == pytest.approx(2.0, rel=1e-3)


def test_the_correction_turns_the_expected_reading_around() -> None:
    for true in (1.5, 4.0, 17.0):
        assert corrected(reading_on_sphere(true, 300), 300) == pytest.approx(true, rel=1e-6)


def test_the_slope_is_that_of_a_hand_written_fit() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0], [7.0], [15.0]])
    # nearest and second distances: 1, 3 | 1, 2 | 2, 3 | 4, 6 | 8, 12
    assert sorted(ratios(points).tolist()) == pytest.approx([1.5, 1.5, 1.5, 2.0, 3.0])
    x = [math.log(1.5)] * 3 + [math.log(2.0)]  # the largest of five is left out
    y = [-math.log(1 - k / 5) for k in (1, 2, 3, 4)]
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / sum(a * a for a in x)
    assert two_nn(points) == pytest.approx(slope)


def test_points_that_coincide_have_no_dimension() -> None:
    with pytest.raises(ValueError, match="no two distances"):
        two_nn(torch.ones(20, 3))
    twice = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    assert len(ratios(twice)) == 0, "a copy is no neighbour"
