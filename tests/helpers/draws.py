"""Draws of a small random network in float64, and the gradient of an objective of states on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowalign.objectives import DrawIds, Predictions, StateObjective

F64 = torch.float64


class Net(nn.Module):
    """v(x, σ) of three elements by a hidden layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"into": (4, 8), "bias": (8,), "out": (8, 3)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(0.7 * torch.randn(shape, generator=generator, dtype=F64)))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return torch.tanh(torch.cat([x, sigma[:, None]], 1) @ self.into + self.bias) @ self.out


@dataclass(eq=False)
class Drawn:
    """Two groups of four samples, two draws of each; sigma and noise shared in the group, or not."""

    shared: bool = True

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        samples, self.group = torch.randn(8, 3, generator=generator, dtype=F64), torch.arange(2).repeat_interleave(4)
        self.advantage = torch.tensor([1.4, -0.2, -0.9, -0.3, 0.5, 0.9, -1.1, -0.3], dtype=F64)
        rows = 2 if self.shared else 8
        eps = torch.randn(2, rows, 3, generator=generator, dtype=F64)
        sigma = 0.1 + 0.8 * torch.rand(2, rows, generator=generator, dtype=F64)
        of = self.group if self.shared else torch.arange(8)
        self.x0, self.sigma = samples.repeat(2, 1), sigma[:, of].flatten()
        eps = eps[:, of].flatten(0, 1)
        self.x = (1 - self.sigma)[:, None] * self.x0 + self.sigma[:, None] * eps
        self.u = eps - self.x0
        self.ids = DrawIds(self.advantage.repeat(2), self.group.repeat(2), torch.arange(2).repeat_interleave(8))

    def velocity(self, net: Net) -> Tensor:
        return net(self.x, self.sigma)

    def error(self, velocity: Tensor) -> Tensor:
        """[D] ⟨(v − u)²⟩."""
        return (velocity - self.u).square().mean(1)

    def gradient(self, net: Net, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """Of loss(v [D, 3]) by the network's weights, flat."""
        grads = torch.autograd.grad(loss(self.velocity(net)), list(net.parameters()))
        return torch.cat([grad.flatten() for grad in grads])

    def common_form(
        self, objective: StateObjective, net: Net, roles: Mapping[str, Net], anchors: Mapping[str, float] | None = None
    ) -> Tensor:
        """The gradient of mean(c·‖v − u‖² + Σ κ·‖v − v_a‖²), with anchors by role in velocity space."""
        known = {name: self.velocity(role).detach() for name, role in roles.items()}
        found = Predictions(self.velocity(net).detach(), known, self.u, self.sigma)
        values = objective.value(found)
        at = objective.coefficients(found, self.ids.advantage, objective.couple(values, self.ids))

        def loss(v: Tensor) -> Tensor:
            total = at.c * self.error(v)
            for name, kappa in at.kappa.items():
                total = total + kappa * (v - found.of(name)).square().mean(1)
            for name, beta in (anchors or {}).items():
                total = total + beta * (v - known[name]).square().mean(1)
            return total.mean()

        return self.gradient(net, loss)
