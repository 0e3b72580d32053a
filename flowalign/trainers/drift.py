"""How far the log-probs of an unchanged policy are from the rollout's: what stops a run, and what is logged."""

from __future__ import annotations

from torch import Tensor

from flowalign.errors import RunError
from samplers import Step


def velocity_unit(step: Step) -> Tensor:
    """[E] the drift of each log-prob for a velocity that is off by one standard deviation's worth along the noise: |b|/s, times
    the number of elements where log-probs are sums, times 2s² where they are without constants (CPS). A drift divided by it
    is the same number for every kernel and step, however small its noise."""
    policy = step.policy
    scale = 1.0 if policy.reduce == "mean" or not len(policy.mean) else policy.mean[0].numel()
    unit = scale * policy.velocity_coef.abs() / policy.std
    return unit if policy.constants == "full" else unit * 2 * policy.std.square()


def check_drift(drift: Tensor, unit: Tensor, max_drift: float) -> None:
    """RunError where an unchanged policy's log-probs differ by `drift` [E], in units of `unit` [E] (`velocity_unit`) further
    from the rollout's than rounding can be."""
    relative = drift / unit
    if bool((~(relative <= max_drift)).any()):
        raise RunError(
            f"got log-probs of an unchanged policy as if its velocity were off by {float(relative.max()):.2e} from the rollout's; "
            f"expected at most trainer.max_drift={max_drift}, more than rounding: look for dropout, another grid of "
            "sigmas or swapped conditions (`flowalign doctor` measures it), or raise max_drift if it is rounding"
        )


def drift_metrics(drift: Tensor, step: Tensor) -> dict[str, float]:
    """The largest `drift` [E], of all and of each grid step `step` [E]."""
    found = {"ratio/drift_max": float(drift.max())}
    return found | {f"ratio/drift_step_{int(k)}": float(drift[step == k].max()) for k in step.unique()}
