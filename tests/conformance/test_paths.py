"""Every path of samplers/paths.py: all conversions invert each other and agree on the (x0, ε) that made x."""

import re
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

import samplers.paths
from samplers import Path
from tests.helpers.discovery import dataclasses_of, differences, example
from tests.helpers.kernels import F64

LEVELS = 10
# arguments of the paths that have no defaults for all of them
EXAMPLES: dict[str, dict[str, Any]] = {
    "VariancePreserving": {"alphas_cumprod": torch.linspace(0.95, 0.05, LEVELS, dtype=F64)},
}
PATHS = dataclasses_of(samplers.paths, "mix")
QUANTITIES = ("x0", "noise", "score", "velocity")


def drawn(path: Path, seed: int, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """Random x0, ε [4, 3] and σ [4] inside (0, 1): any for a flow, one of ten levels otherwise."""
    rng = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 4, 3, dtype=F64, generator=rng).to(dtype)
    if path.rectified:
        return x0, eps, 0.02 + 0.96 * torch.rand(4, dtype=F64, generator=rng)
    return x0, eps, torch.randint(1, LEVELS, (4,), generator=rng).double() / LEVELS


def truth(path: Path, x0: Tensor, eps: Tensor, sigma: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """x and the four quantities that describe it, from the coefficients alone."""
    a, b, c, d = (coefficient[:, None].to(x0) for coefficient in path.mix(sigma))
    return a * x0 + b * eps, {"x0": x0, "noise": eps, "score": -eps / b, "velocity": c * x0 + d * eps}


def conversion(path: Path, target: str, source: str):
    """The method `target`_from_`source`, bound to the path."""
    return vars(type(path))[f"{target}_from_{source}"].__get__(path)


@pytest.mark.parametrize("name", PATHS)
def test_every_path_has_all_members_and_all_conversions(name: str) -> None:
    assert not differences(PATHS[name], Path)
    written = {tuple(found) for member in vars(PATHS[name]) for found in re.findall(r"^(\w+)_from_(\w+)$", member)}
    assert written == set(permutations(QUANTITIES, 2))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", PATHS)
def test_conversions_invert_each_other_and_agree(name: str, seed: int) -> None:
    path = example(PATHS[name], EXAMPLES)
    x0, eps, sigma = drawn(path, seed)
    x, values = truth(path, x0, eps, sigma)
    torch.testing.assert_close(path.add_noise(x0, eps, sigma), x)
    torch.testing.assert_close(path.velocity(x0, eps, sigma), values["velocity"])
    for target, source in permutations(QUANTITIES, 2):
        converted = conversion(path, target, source)(x, values[source], sigma)
        torch.testing.assert_close(converted, values[target], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(conversion(path, source, target)(x, converted, sigma), values[source])
        other = torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(seed + 9))  # not that of x
        back = conversion(path, source, target)(x, conversion(path, target, source)(x, other, sigma), sigma)
        torch.testing.assert_close(back, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", PATHS)
def test_the_velocity_is_normalized_and_the_law_goes_from_noise_to_data(name: str) -> None:
    path = example(PATHS[name], EXAMPLES)
    sigma = torch.arange(LEVELS, -1, -1, dtype=F64) / LEVELS
    a, b, c, d = path.mix(sigma)
    torch.testing.assert_close(a * d - b * c, torch.ones_like(sigma))
    assert bool((a.diff() > 0).all()) and bool((b.diff() < 0).all())
    assert float(a[-1]) == 1 and float(b[-1]) == 0
    assert bool(((a + b == 1).all()) if path.rectified else torch.allclose(a**2 + b**2, torch.ones_like(a)))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", PATHS)
def test_conversions_keep_the_dtype_and_refuse_bad_levels(name: str, dtype: torch.dtype) -> None:
    path = example(PATHS[name], EXAMPLES)
    x0, eps, sigma = drawn(path, 0, dtype)
    assert path.add_noise(x0, eps, sigma).dtype == dtype
    for target, source in permutations(QUANTITIES, 2):
        convert = conversion(path, target, source)
        assert convert(x0, eps, sigma).dtype == dtype and convert(x0, eps, 0.5).shape == x0.shape
        for bad in (-0.1, 1.1, 500.0, sigma[:3]):
            with pytest.raises(ValueError, match="expected"):
                convert(x0, eps, bad)
