"""A cold start of distillation: the student first learns from images that its teachers make."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flowalign.objectives import AdvantageWeighted
from flowalign.trainers.state_update import Draws, StateUpdate
from flowalign.trainers.update_engine import UpdateEngine
from samplers import Forest, Held, LogitNormalSigma, SampleKeys, SigmaLaw


@dataclass(frozen=True)
class ColdStart:
    """Flow matching on the teachers' images in the first `iterations` (Flow-OPD 2605.08063, its SFT start): each teacher
    samples its own prompts, x0, without noise on the way, and the student regresses on u at x = a(σ)x0 + b(σ)ε, `draws`
    times per image, σ by `sigma`. SD3's own law by default: the paper does not say. v is the velocity that the student samples with,
    so a guided one where its rollout is guided (ours: scripts of fine-tuning regress v without guidance, whose samples with guidance
    then have it twice).

    It is part of the main loop, so its steps are counted, checkpointed and evaluated as all others; the optimizer goes on
    from it. The other start of the paper, from the mean of the teachers' LoRAs, is policy.lora.init with several folders."""

    iterations: int
    draws: int = 1
    sigma: SigmaLaw = field(default_factory=LogitNormalSigma)

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.draws < 1:
            raise ValueError(f"got {self}; expected iterations and draws at least 1; cold_start=null leaves it out")

    def update(
        self, engine: UpdateEngine, forest: Forest, iteration: int, uids: tuple[int, ...], chosen: Tensor, micro_batch: int
    ) -> StateUpdate:  # fmt: skip
        """The update on the images of the groups where `chosen` [G]."""
        tree, path = forest.tree, engine.task.policy.path
        leaves = tree.leaves[chosen[tree.group[tree.leaves]]]
        keys = SampleKeys.of(engine.task.seed, iteration, tree, leaves, uids)
        sigma = keys.sigmas(self.sigma, self.draws, forest.sigmas.cpu(), path).T
        latents = Held(forest.row[leaves], forest.states)
        drawn = Draws.of(latents, tree.group[leaves], torch.ones(len(leaves)), keys, sigma, path, engine)
        return StateUpdate(engine, drawn, AdvantageWeighted(), {}, micro_batch)
