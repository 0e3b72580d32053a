"""One deterministic step of every kernel is the x0-prediction of its path, whatever the kernel's noise, wherever it starts."""

import pytest
import torch
from torch import Tensor

from flowalign.rollouts.completions import completed
from samplers import (
    CPS,
    DDIM,
    ODE,
    Chain,
    ClippedFlowSDE,
    DanceSDE,
    DPMSolver,
    FlowSDE,
    Kernel,
    LinearSDE,
    RectifiedFlow,
    StepwiseSDE,
    VariancePreserving,
    rollout,
)

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # of Stable Diffusion
TABLE = (1 - BETAS).cumprod(0)


def velocity(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
    """Of no Gaussian, so that nothing cancels."""
    return torch.sin(3 * x) + x * sigma[:, None].to(x) + 0.1 * root[:, None].to(x)


def one_step(kernel: Kernel, sigmas: Tensor) -> tuple[Tensor, ...]:
    """Of each state of four rollouts but the last: x, v, σ, and what one step makes of it."""
    steps, draws = len(sigmas) - 1, torch.Generator().manual_seed(0)

    def noise(tree, nodes):
        return torch.randn(len(nodes), 3, generator=draws, dtype=torch.float64)

    tree = Chain().tree(steps, 4, 0, None)
    start = torch.randn(tree.num_roots, 3, generator=draws, dtype=torch.float64)
    forest = rollout(velocity, start, sigmas, tree, kernel, noise, keep_velocities=True)
    ends = torch.cat([tree.edges, tree.parents_of_edges]).unique()
    nodes = ends[tree.index[ends] < steps]
    x = completed(forest, nodes, 1, lambda *_: pytest.fail("asked"), micro_batch=3)
    return tuple(
        each.double() for each in (forest.at(nodes), forest.velocities["old"].at(nodes), forest.sigma(nodes), x)
    )


@pytest.mark.parametrize(
    "kernel",
    [
        ODE(), FlowSDE(), ClippedFlowSDE(), DanceSDE(), LinearSDE(), CPS(), StepwiseSDE(), DPMSolver(FlowSDE()),
        DPMSolver(CPS(), prefix=True, across_noise=False),
    ],
    ids=str,
)  # fmt: skip
def test_of_a_flow(kernel: Kernel) -> None:
    x, v, sigma, found = one_step(kernel.bind(RectifiedFlow()), torch.linspace(0.99, 0, 6, dtype=torch.float64))
    torch.testing.assert_close(found, x - sigma[:, None] * v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [0.0, 0.001], ids=["to clean data", "to timestep 0"])
@pytest.mark.parametrize(
    "kernel", [DDIM(1.0), DDIM(0.0, constants="none"), DPMSolver(DDIM(0.5)), DPMSolver(DDIM(1.0), prefix=True)], ids=str
)
def test_of_stable_diffusion(kernel: Kernel, last: float) -> None:
    """Where the grid ends at timestep 0, the predicted noise of that level stays in, as in the finished samples."""
    bound = kernel.bind(VariancePreserving(TABLE))
    x, v, sigma, found = one_step(bound, torch.tensor([1.0, 0.8, 0.5, 0.2, last], dtype=torch.float64))
    kept = TABLE[(sigma * 1000).round().long() - 1][:, None]
    x0, eps = kept.sqrt() * x - (1 - kept).sqrt() * v, (1 - kept).sqrt() * x + kept.sqrt() * v
    rest = 1 - TABLE[0] if last else torch.zeros(1, dtype=torch.float64)
    torch.testing.assert_close(found, (1 - rest).sqrt() * x0 + rest.sqrt() * eps, rtol=1e-5, atol=1e-5)
    assert float(rest.sqrt()) == pytest.approx(0.029 if last else 0.0, abs=5e-4)
