"""Losses weighted by how little a reward model agrees with itself on repeats (Ctrl-U, 2410.11236): pure functions.

For a differentiable reward on K images of one condition. Making them is left to the caller: in Ctrl-U's code they are the one-step
predictions of x0 from one image with the same noise at two adjacent timesteps, t and t + 1; so are the window of timesteps that
is rewarded (zero `weights` outside it), the pixels that count and the warm-up of the reward's share of the loss. For policy
gradients see flowalign.objectives.Certainty, which reads a reward's own uncertainty (of `Ensemble` or `Augmented`, say).
"""

from __future__ import annotations

import torch
from torch import Tensor


def disagreement(outputs: Tensor) -> Tensor:
    """U [N, *]: mean of |a − b| over the pairs of K >= 2 repeats, outputs [K, N, *]: for K = 2 Ctrl-U's |a − b| of depth, edges
    and line art, pixel by pixel. ValueError for fewer repeats."""
    if outputs.ndim < 2 or len(outputs) < 2:
        raise ValueError(
            f"got outputs {list(outputs.shape)}; expected [K, N, *] with at least 2 repeats of each sample"
        )
    first, second = torch.triu_indices(len(outputs), len(outputs), 1, device=outputs.device)
    return (outputs[first] - outputs[second]).abs().mean(0)


def class_disagreement(logits: Tensor) -> Tensor:
    """U [N, *]: KL(softmax of repeat 1 ‖ softmax of repeat 0) over the classes of logits [2, N, C, *], which Ctrl-U takes for
    segmentation, times its u_scale (1 of ADE20K, 0.1 of COCOStuff) in both places of U. ValueError for another number of
    repeats."""
    if logits.ndim < 3 or len(logits) != 2:
        raise ValueError(f"got logits {list(logits.shape)}; expected [2, N, C, *], two repeats of each sample")
    log_p, log_q = logits.log_softmax(2)
    return (log_q.exp() * (log_q - log_p)).sum(1)


def certainty_weighted_loss(
    losses: Tensor, uncertainty: Tensor, scale: float = 1.0, weights: Tensor | None = None
) -> Tensor:
    """Σ_n w_n·mean(L_n·exp(−U_n) + scale·U_n) / Σ_n w_n, a scalar; 0 where all weights are 0.

    losses [N, *] >= 0, of the first repeat (of a reward: its upper bound − reward); uncertainty [N, *] >= 0, of their shape;
    weights [N] >= 0: None is 1 each. scale: 0.1 of depth and edges in Ctrl-U. Gradients pass through U too, as in Ctrl-U's code:
    + scale·U is there since the loss would otherwise fall with every growth of U. Where L·exp(−U) > scale it still does.
    ValueError for other shapes, or below 0."""
    if losses.shape != uncertainty.shape or losses.ndim < 1:
        raise ValueError(
            f"got losses {list(losses.shape)}, uncertainty {list(uncertainty.shape)}; expected one shape [N, *]"
        )
    if bool((losses < 0).any()) or bool((uncertainty < 0).any()):
        raise ValueError("got a negative loss or uncertainty; expected at least 0, so that exp(-U) lowers a loss")
    each = (losses * torch.exp(-uncertainty) + scale * uncertainty)[..., None].flatten(1).mean(1)
    own = torch.ones_like(each) if weights is None else weights.to(each)
    return (own * each).sum() / own.sum().clamp(min=torch.finfo(each.dtype).tiny)
