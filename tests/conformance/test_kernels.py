"""Every kernel of samplers/kernels: the ODE without noise, draws and densities that agree, replay, dtypes, refusals."""

import importlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path as File
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

import samplers.kernels
from samplers import (
    ODE,
    FlowSDE,
    Forest,
    Kernel,
    KeyedNoise,
    Path,
    RewardGradient,
    TransitionContext,
    Tree,
    chain,
    load_forest,
    plain_sigmas,
    rollout,
    save_forest,
    window,
)
from tests.helpers.discovery import dataclasses_of, differences, example
from tests.helpers.kernels import F64, FLOW, VP


@dataclass(frozen=True)
class Pull:
    """A process reward whose gradient is 1 - x."""

    def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        return (x - 0.5 * x.square()).flatten(1).sum(1)


# arguments of the kernels that have no defaults for all of them
EXAMPLES: dict[str, dict[str, Any]] = {
    "DPMSolver": {"kernel": FlowSDE()},
    "Guided": {"kernel": FlowSDE(), "ascent": RewardGradient(Pull())},
}
KERNELS = dataclasses_of(samplers.kernels, "coefficients")
SIGMA, SIGMA_NEXT = torch.tensor([0.9, 0.7, 0.2], dtype=F64), torch.tensor([0.1, 0.5, 0.1], dtype=F64)
ROWS = torch.arange(3)


def bound(kernel: Kernel) -> list[tuple[Path, Kernel]]:
    """The kernel on each path that it can be on."""
    pairs = []
    for path in (FLOW, VP):
        try:
            pairs.append((path, kernel.bind(path)))
        except ValueError as error:
            assert "expected" in str(error)
    assert pairs, f"{kernel} can be bound to no path"
    return pairs


def inputs(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """x, v and noise [3, 2, 2]."""
    x, v, noise = torch.randn(3, 3, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0)).to(dtype)
    return x, v, noise


def highest(kernel: Kernel) -> float:
    """The level to look at a kernel with: 1, or 0 for a deterministic solver, which refuses any other."""
    try:
        kernel.coefficients(SIGMA, SIGMA_NEXT, 1.0, ROWS + 1)
    except ValueError as error:
        assert "expected level 0 in every row" in str(error)
        return 0.0
    return 1.0


def at(level: float) -> TransitionContext:
    """A context of three rows in the middle of a grid."""
    return TransitionContext(level=level, roots=ROWS, nodes=ROWS + 3, parents=ROWS, step=ROWS + 1)


def rolled_out(path: Path, kernel: Kernel, store: torch.dtype = torch.float32) -> Forest:
    """A window and chains of six steps, on a grid of the path. Chains, if the step from pure noise has a density."""
    grid = plain_sigmas(6) if path.rectified else torch.arange(7, 0, -1) / 10
    noisy = bool(kernel.coefficients(grid[:1], grid[1:2], highest(kernel), 0).std > 0)
    tree = Tree.cat([window(6, 3, 1, 2), chain(6, 2) if noisy else window(6, 2, 1, 4, shared_start=False)])
    tree = replace(tree, level=tree.level * highest(kernel))
    noise = KeyedNoise(0, 0, [0, 1], (2, 2))
    return rollout(velocity, noise.start(tree), grid, tree, kernel, noise.step, store_dtype=store)


def velocity(x: Tensor, sigma: Tensor, root: Tensor | None = None) -> Tensor:
    return torch.sin(2 * x) - 0.3 * x * sigma.to(x).reshape(-1, 1, 1)


def replayed(forest: Forest) -> Tensor:
    """The log-probs of all edges, under the velocities of the rollout."""
    parents, position = forest.tree.distinct_parents(forest.tree.edges)
    step = forest.edge_steps(forest.tree.edges, velocity(forest.at(parents), forest.sigma(parents)), position)
    return step.log_prob(forest.at(forest.tree.edges))


# ---------------------------------------------------------------------------------------------- what is checked


def has_all_members(kernel: Kernel, folder: File) -> None:
    assert not differences(type(kernel), Kernel)
    with pytest.raises(AttributeError):
        kernel.reduce = "sum"  # type: ignore[misc]


def is_the_ode_at_level_zero(kernel: Kernel, folder: File) -> None:
    for path, on_path in bound(kernel):
        for dtype in (torch.float32, F64):
            x, v, _ = inputs(dtype)
            step, ode = on_path(x, v, SIGMA, SIGMA_NEXT, at(0.0)), ODE().bind(path)(x, v, SIGMA, SIGMA_NEXT)
            if highest(on_path):
                assert torch.equal(step.policy.mean, ode.mean)
            else:  # a solver's step without history; it rounds as its scheduler does
                torch.testing.assert_close(step.policy.mean, ode.mean)
            assert not bool(step.std.any())
            assert torch.equal(step.sample(torch.ones_like(x)), step.mean)


def draws_what_it_measures(kernel: Kernel, folder: File) -> None:
    """x' = mean + std·z; its density is the normal one of the policy; velocity_coef is ∂mean/∂v."""
    choices = {entry.name for entry in fields(kernel)} & {"reduce", "constants"}  # type: ignore[arg-type]
    for reduce, constants in (("mean", "full"), ("sum", "full"), ("mean", "none"), ("sum", "none")):
        chosen = {name: value for name, value in (("reduce", reduce), ("constants", constants)) if name in choices}
        for _, on_path in bound(replace(kernel, **chosen)):  # type: ignore[type-var]
            x, v, noise = inputs()
            v.requires_grad_()
            step = on_path(x, v, SIGMA, SIGMA_NEXT, at(highest(on_path)))
            (slope,) = torch.autograd.grad(step.policy.mean.sum(), v)
            torch.testing.assert_close(slope, step.policy.velocity_coef[:, None, None].expand_as(v))
            torch.testing.assert_close(
                on_path.coefficients(SIGMA, SIGMA_NEXT, highest(on_path), ROWS + 1).std, step.std
            )
            arrived = step.sample(noise).detach()
            torch.testing.assert_close(arrived, step.mean + step.std[:, None, None] * noise)
            if on_path.constants == "none":
                density = -(arrived - step.policy.mean).square()
            elif bool((step.std > 0).all()):
                density = Normal(step.policy.mean, step.policy.std[:, None, None]).log_prob(arrived)
            else:
                with pytest.raises(ValueError, match="density"):
                    step.log_prob(arrived)
                continue
            total = density.flatten(1).mean(1) if on_path.reduce == "mean" else density.flatten(1).sum(1)
            torch.testing.assert_close(step.log_prob(arrived), total)


def replays_with_ratio_one(kernel: Kernel, folder: File) -> None:
    for path, on_path in bound(kernel):
        for store in (torch.float32, torch.bfloat16):
            forest = rolled_out(path, on_path, store)
            ratio = (replayed(forest) - forest.log_prob[forest.tree.edges]).exp()
            assert torch.equal(ratio, torch.ones_like(ratio))


def keeps_the_dtype(kernel: Kernel, folder: File) -> None:
    for _, on_path in bound(kernel):
        for given, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)):
            x, v, noise = inputs(given)
            step = on_path(x, v, SIGMA, SIGMA_NEXT, at(highest(on_path)))
            assert step.mean.dtype == step.std.dtype == step.sample(noise).dtype == expected
        affine = on_path.coefficients(SIGMA.float(), SIGMA_NEXT.float(), highest(on_path))
        assert affine.alpha.dtype == affine.velocity_coef.dtype == affine.std.dtype == F64


def refuses_bad_levels(kernel: Kernel, folder: File) -> None:
    x, v, _ = inputs()
    for _, on_path in bound(kernel):
        for level in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="level"):
                on_path(x, v, SIGMA, SIGMA_NEXT, at(level))
        for sigma, sigma_next in ((SIGMA_NEXT, SIGMA), (SIGMA, SIGMA), (SIGMA + 1, SIGMA)):
            with pytest.raises(ValueError, match="sigma"):
                on_path(x, v, sigma, sigma_next, at(highest(on_path)))


def goes_by_the_index_of_the_first_step(kernel: Kernel, folder: File) -> None:
    """A grid that starts just below pure noise has nearly the coefficients of one that starts at it: within about √(1-σ)."""
    for path, on_path in bound(kernel):
        if path.rectified:
            then = torch.tensor([0.95], dtype=F64)
            one, below = (
                on_path.coefficients(torch.tensor([s], dtype=F64), then, highest(on_path), 0) for s in (1.0, 0.99999)
            )
            for name in ("alpha", "velocity_coef", "std"):
                torch.testing.assert_close(vars(below)[name], vars(one)[name], rtol=0, atol=3.2e-3)


def survives_a_file(kernel: Kernel, folder: File) -> None:
    for path, on_path in bound(kernel):
        forest = rolled_out(path, on_path)
        save_forest(folder / "forest", forest)
        try:
            read = load_forest(folder / "forest")
        except ValueError as error:
            assert "pass kernel=" in str(error)
            read = load_forest(folder / "forest", on_path)
        assert torch.equal(replayed(read), replayed(forest))


CHECKS: list[Callable[[Kernel, File], None]] = [
    has_all_members, is_the_ode_at_level_zero, draws_what_it_measures, replays_with_ratio_one, keeps_the_dtype,
    refuses_bad_levels, goes_by_the_index_of_the_first_step, survives_a_file,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel(name: str, check: Callable[[Kernel, File], None], tmp_path: File) -> None:
    check(example(KERNELS[name], EXAMPLES), tmp_path)


def test_all_public_kernels_are_found() -> None:
    public = {name for name in samplers.kernels.__all__ if hasattr(vars(samplers.kernels)[name], "coefficients")}
    assert public - {"Kernel"} == set(KERNELS) and set(EXAMPLES) <= set(KERNELS)


# ---------------------------------------------------------------------------------------------- the checks themselves

FAULTY = """
from dataclasses import dataclass, replace
import torch
from samplers.kernels.base import Affine, affine_step, bind_rectified_flow, step_inputs
from samplers.kernels.gaussian import Gaussian

@dataclass(frozen=True)
class Sound:
    reduce: str = "mean"
    constants: str = "full"
    uses_roots = False
    bind = bind_rectified_flow
    __call__ = affine_step

    def coefficients(self, sigma, sigma_next, level=1.0, step=None):
        sigma, sigma_next, level = step_inputs(sigma, sigma_next, level)
        return Affine(torch.ones_like(sigma), sigma_next - sigma, 0.1 * level)

@dataclass(frozen=True)
class MovesAtLevelZero(Sound):
    def coefficients(self, sigma, sigma_next, level=1.0, step=None):
        return replace(super().coefficients(sigma, sigma_next, level, step), alpha=torch.full_like(sigma.double(), 1.001))

@dataclass(frozen=True)
class MeasuresAnotherStd(Sound):
    def __call__(self, x, v, sigma, sigma_next, ctx):
        step = affine_step(self, x, v, sigma, sigma_next, ctx)
        return replace(step, policy=replace(step.policy, std=1.1 * step.std, velocity_coef=2 * step.policy.velocity_coef))

@dataclass(frozen=True)
class DependsOnReplay(Sound):
    def __call__(self, x, v, sigma, sigma_next, ctx):
        return affine_step(self, x, v + 0.01 * float(ctx.replay), sigma, sigma_next, ctx)

@dataclass(frozen=True)
class HalvesPrecision(Sound):
    def __call__(self, x, v, sigma, sigma_next, ctx):
        return affine_step(self, x.float(), v.float(), sigma, sigma_next, ctx)

@dataclass(frozen=True)
class TakesAnyLevel(Sound):
    def coefficients(self, sigma, sigma_next, level=1.0, step=None):
        sigma, sigma_next = torch.as_tensor(sigma).double(), torch.as_tensor(sigma_next).double()
        return Affine(torch.ones_like(sigma), sigma_next - sigma, torch.as_tensor(level).double().expand_as(sigma))

@dataclass(frozen=True)
class GoesBySigmaOne(Sound):
    def coefficients(self, sigma, sigma_next, level=1.0, step=None):
        affine = super().coefficients(sigma, sigma_next, level, step)
        bounded = torch.where(sigma == 1, sigma_next, sigma)
        return replace(affine, std=affine.std / (1 - bounded))

@dataclass(frozen=True)
class HasNoBind:
    reduce: str = "mean"
    constants: str = "full"
    uses_roots = False
    __call__ = affine_step
    coefficients = Sound.coefficients

@dataclass(frozen=True)
class KnowsNoIndex(Sound):
    def coefficients(self, sigma, sigma_next, level=1.0):
        return super().coefficients(sigma, sigma_next, level)

@dataclass(frozen=True)
class NeedsArguments(Sound):
    strength: float = None
    table: list = __import__("dataclasses").field(kw_only=True)
"""


@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("MovesAtLevelZero", is_the_ode_at_level_zero), ("MeasuresAnotherStd", draws_what_it_measures),
        ("DependsOnReplay", replays_with_ratio_one), ("HalvesPrecision", keeps_the_dtype),
        ("TakesAnyLevel", refuses_bad_levels), ("GoesBySigmaOne", goes_by_the_index_of_the_first_step),
        ("HasNoBind", has_all_members), ("KnowsNoIndex", has_all_members), ("Sound", None),
    ],
)  # fmt: skip
def test_a_fault_in_a_new_file_is_caught(
    tmp_path: File, monkeypatch: pytest.MonkeyPatch, name: str, caught: Callable[[Kernel, File], None] | None
) -> None:
    found = new_package(tmp_path, monkeypatch)
    kernel = example(found[name], EXAMPLES)
    if caught is not None:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            caught(kernel, tmp_path)
        return
    for check in CHECKS[:-1]:  # a kernel outside samplers is passed to load_forest, which the last check does as well
        check(kernel, tmp_path)


def test_a_kernel_without_an_example_is_named(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match=r"'NeedsArguments': \{'table': ...\} in EXAMPLES"):
        example(new_package(tmp_path, monkeypatch)["NeedsArguments"], EXAMPLES)


def new_package(folder: File, monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """The kernels of a package with one new file."""
    name = f"new_kernels_{folder.name.replace('-', '_')}"
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    (folder / name / "faulty.py").write_text(textwrap.dedent(FAULTY))
    monkeypatch.syspath_prepend(str(folder))
    return dataclasses_of(importlib.import_module(name), "coefficients")
