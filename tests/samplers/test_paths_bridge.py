"""Re-noising from one level to a noisier one: the marginal and the velocity target, against closed forms on both paths."""

import pytest
import torch
from torch import Tensor

from samplers import Path
from tests.helpers.kernels import F64, FLOW, VP, bed, rows

PATHS = {"flow": FLOW, "vp": VP}
LEVELS = [(0.0, 0.3), (0.2, 0.3), (0.3, 0.9), (0.5, 1.0), (0.8, 0.8)]


def map_of(bridge, sigma_from: float, sigma_to: float) -> tuple[float, float]:
    """The two coefficients of a function that is linear in (x, ε)."""
    return float(bridge(rows(1.0), rows(0.0), sigma_from, sigma_to)), float(
        bridge(rows(0.0), rows(1.0), sigma_from, sigma_to)
    )


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", PATHS)
def test_the_bridge_keeps_the_marginals_of_gaussian_data(name: str, levels: tuple[float, float]) -> None:
    path, (low, high), m = PATHS[name], levels, 0.5
    _, variance = bed(path, m)
    alpha, beta = map_of(path.bridge, low, high)
    a, a_to = (float(path.mix(number(sigma))[0]) for sigma in (low, high))
    assert alpha * a * m == pytest.approx(a_to * m, abs=1e-12)
    assert alpha**2 * variance(low) + beta**2 == pytest.approx(variance(high), abs=1e-12)


@pytest.mark.parametrize("name", PATHS)
def test_two_bridges_are_one(name: str) -> None:
    path = PATHS[name]
    (first, fresh), (second, then) = map_of(path.bridge, 0.2, 0.4), map_of(path.bridge, 0.4, 0.7)
    alpha, beta = map_of(path.bridge, 0.2, 0.7)
    assert (first * second, (fresh * second) ** 2 + then**2) == pytest.approx((alpha, beta**2), abs=1e-12)


@pytest.mark.parametrize("levels", LEVELS[:-1])
@pytest.mark.parametrize("name", PATHS)
def test_the_mean_of_the_target_is_the_exact_velocity(name: str, levels: tuple[float, float]) -> None:
    """u and x_τ are jointly Gaussian, so E[u | x_τ] is a straight line, known from their covariances."""
    path, (low, high), m = PATHS[name], levels, 0.5
    exact, variance = bed(path, m)
    alpha, beta = map_of(path.bridge, low, high)
    of_x, of_eps = map_of(path.bridge_velocity, low, high)
    slope = (of_x * alpha * variance(low) + of_eps * beta) / variance(high)
    center = float(path.mix(number(low))[0]) * m
    for x in (-1.0, 2.0):
        expected = float(exact(rows(x), number(high)))
        assert of_x * center + slope * (x - alpha * center) == pytest.approx(expected, abs=1e-10)


def test_on_a_flow_the_target_is_the_derivative_of_the_bridge() -> None:
    x, eps, small = rows(0.3, -1.2), rows(1.1, 0.4), 1e-6
    ahead, behind = (FLOW.bridge(x, eps, 0.3, 0.7 + step) for step in (small, -small))
    torch.testing.assert_close(FLOW.bridge_velocity(x, eps, 0.3, 0.7), (ahead - behind) / (2 * small))


@pytest.mark.parametrize("name", PATHS)
def test_from_clean_data_it_is_the_forward_process(name: str) -> None:
    path, x, eps = PATHS[name], rows(0.3, -1.2), rows(1.1, 0.4)
    sigma = torch.tensor([0.4, 1.0], dtype=F64)
    torch.testing.assert_close(path.bridge(x, eps, 0.0, sigma), path.add_noise(x, eps, sigma))
    torch.testing.assert_close(path.bridge_velocity(x, eps, 0.0, sigma), path.velocity(x, eps, sigma))


@pytest.mark.parametrize("name", PATHS)
def test_close_levels_do_not_cancel_in_single_precision(name: str) -> None:
    path, low, high = PATHS[name], 0.9, 1.0 if name == "vp" else 0.9001
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    assert path.bridge(zero, one, low, high).dtype == torch.float32
    assert float(path.bridge(zero, one, low, high)) == pytest.approx(map_of(path.bridge, low, high)[1], rel=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_a_bridge_refuses_what_it_cannot_do(name: str) -> None:
    path, x = PATHS[name], rows(0.0, 1.0)
    with pytest.raises(ValueError, match="only adds noise"):
        path.bridge(x, x, 0.5, torch.tensor([0.6, 0.4], dtype=F64))
    with pytest.raises(ValueError, match="sigma_to > sigma_from"):
        path.bridge_velocity(x, x, 0.5, 0.5)
    if path.rectified:
        with pytest.raises(ValueError, match="data left"):
            path.bridge(x, x, 1.0, 1.0)


@pytest.mark.parametrize(("path", "expected"), [(FLOW, [0.01, 0.449, 0.45, 1.0]), (VP, [0.1, 0.4, 0.5, 1.0])])
def test_the_nearest_level_is_one_that_the_path_has(path: Path, expected: list[float]) -> None:
    sigma = torch.tensor([0.01, 0.449, 0.45, 1.0], dtype=F64)
    torch.testing.assert_close(path.nearest(sigma), torch.tensor(expected, dtype=F64))
    path.mix(path.nearest(sigma))
