"""Checks of the objective: what it assumes of its samples, and how strong its anchors are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowalign.diagnostics.doctor.base import Finding
from flowalign.trainers import EndpointDraws, Pulls

ERRORS = 5.0  # a slope further from 0 than so many standard errors is one
SHARE = 0.05  # and matters where it explains so much of the error
GUIDANCE = "guidance"


def check_anchors(pulls: Callable[[Any], Pulls] | None, batch: Callable[[], Any]) -> Finding:
    """κ/(c·w) of each anchor or KL, over the trained levels: what it weighs beside a sample of advantage 1, in which coefficients
    of different methods can be compared. With one anchor such a sample moves the target by (u − v) over it. Never fails."""
    if pulls is None:
        return Finding("anchors", True, "this trainer weighs no anchor against advantages")
    found = pulls(batch())
    lines = [_range(name, found) for name in found.kappa]
    return Finding("anchors", True, "; ".join(lines) or "none: nothing but the length of the training holds the policy")


def _range(name: str, found: Pulls) -> str:
    ratio = found.ratio(name).double()
    usable, label = ratio.isfinite(), f"{name} → {found.role[name]}"
    if not bool(usable.any()):
        return f"{label} alone: advantages have no weight"
    if not bool(ratio[usable].any()):
        return f"{label} 0 (it acts beyond a threshold only)"
    low, high = (float(bound) for bound in (found.sigma[usable].min(), found.sigma[usable].max()))
    least, most = (float(bound) for bound in (ratio[usable].min(), ratio[usable].max()))
    span = f"{least:.2g}" if most <= 1.005 * least else f"{least:.2g} to {most:.2g}"
    return f"{label} κ/(c·w) = {span} at advantage 1, σ {high:.2f} to {low:.2f}"


@dataclass(frozen=True)
class Slope:
    """Of u − v on a function f of the state, at one level: ⟨(u − v)·f⟩/⟨f²⟩ over samples, its standard error, and the share of
    ⟨(u − v)²⟩ that it explains. Samples are independent of one another, the elements of one are not."""

    value: float
    error: float
    share: float

    @staticmethod
    def of(residual: Tensor, function: Tensor) -> Slope:
        """residual, function [N, *]."""
        residual, function = residual.double().flatten(1), function.double().flatten(1)
        product, square = (residual * function).mean(1), function.square().mean(1)
        value = product.sum() / square.sum()
        error = (product - value * square).std() * len(product) ** 0.5 / square.sum()
        share = value.square() * square.mean() / residual.square().mean()
        return Slope(float(value), float(error), float(share))

    @property
    def matters(self) -> bool:
        return abs(self.value) > ERRORS * self.error and self.share > SHARE


def check_canonical(endpoints: Callable[[Any], EndpointDraws] | None, batch: Callable[[], Any]) -> Finding:
    """Whether the velocity v of the role that sampled is E[u | x] of its own samples, noised anew: then u − v has slope 0 on
    every function of x, here on v, on x, and with guidance in the rollout alone on what that adds to v (slope 1: the samples
    are those of the guided velocity).

    It is, up to the model's error, for samples of many steps of that very velocity. A distilled model, guidance in the rollout
    alone, few steps or samples of older weights break it. Not kept: functions of x on which the slope is 0 all the same."""
    if endpoints is None:
        return Finding("canonical", True, "this trainer assumes nothing of the samples")
    draws = endpoints(batch())
    levels = [_slopes(draws, number) for number in range(len(draws.sigma))]
    worst = max((slope for level in levels for slope in level.values()), key=lambda slope: slope.share)
    figure = f"slope of u − v on {', '.join(levels[0])}: " + ", ".join(
        f"σ {float(sigma):.2f} " + " ".join(f"{slope.value:+.3f}±{slope.error:.3f}" for slope in level.values())
        for sigma, level in zip(draws.sigma, levels, strict=True)
    )
    figure += f"; up to {worst.share:.1%} of ⟨(u − v)²⟩"
    if not draws.assumed:
        return Finding("canonical", True, f"{figure}; this objective does not need it")
    named = {name for level in levels for name, slope in level.items() if slope.matters}
    if not named:
        return Finding("canonical", True, figure)
    cure = (
        "lower rollout.guidance_scale to trainer.guidance_scale"
        if GUIDANCE in named
        else "take more rollout.num_inference_steps, a model that is not distilled"
    )
    advice = (
        "the sampler's velocity is not the mean of u over its own samples, as the formulas of NFT, tilt matching, RAM, DGPO and "
        f"other evidence-bound methods have it: {cure}, or a method of transitions such as Flow-GRPO; without guidance a model "
        "that needs it starts from poor samples"
    )
    return Finding("canonical", False, figure, advice)


def _slopes(draws: EndpointDraws, number: int) -> dict[str, Slope]:
    velocity = draws.velocity[number]
    functions = {"v": velocity, "x": draws.state[number]}
    if draws.guided is not None:
        functions[GUIDANCE] = draws.guided[number] - velocity
    residual = draws.target[number] - velocity
    return {name: Slope.of(residual, function) for name, function in functions.items()}
