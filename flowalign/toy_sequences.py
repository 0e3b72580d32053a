"""Discrete diffusion in small: short sequences that are unmasked step by step, and reward back-propagation through their relaxation
(DRAKES, arXiv 2410.13643). Shows that the rewards' contract and the trainer's updates need no images; `scripts/drakes.py` runs it.

A state is [n, L, V + 1], one-hot at each of L positions over V tokens and the mask, which is last. At the levels
1 = m_0 > … > m_S = 0 a position is masked with probability m. From m_t to m_s a masked position stays masked with probability
m_s/m_t, else it becomes a token by p(x0 | state); other positions stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from flowalign.trainers import AdamWConfig, Update
from rewards import Reward, RewardBatch, RewardOutput, RewardSpec, score
from samplers import generator

Denoiser = Callable[[Tensor], Tensor]  # states [n, L, V + 1], also relaxed ones -> log p(x0 | state) [n, L, V]


class SmallDenoiser(nn.Module):
    """An MLP over all positions, linear in its input first, so that relaxed states are inputs like others."""

    def __init__(self, length: int, tokens: int, width: int = 64) -> None:
        super().__init__()
        self.length, self.tokens = length, tokens
        self.layers = nn.Sequential(
            nn.Linear(length * (tokens + 1), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, length * tokens),
        )  # fmt: skip

    def forward(self, states: Tensor) -> Tensor:
        logits: Tensor = self.layers(states.flatten(1)).view(-1, self.length, self.tokens)
        return logits.log_softmax(-1)


def levels(steps: int) -> Tensor:
    """[S + 1] the mask's probabilities, from 1 to 0 in equal steps."""
    return torch.linspace(1, 0, steps + 1, dtype=torch.float64)


def masked(count: int, length: int, tokens: int) -> Tensor:
    """[count, L, V + 1] of nothing but masks."""
    return one_hot(torch.full((count, length), tokens), tokens + 1).float()


@dataclass(frozen=True, eq=False)
class Path:
    """What was sampled. tokens [n, L, V]: hard one-hots, whose gradient is that of the relaxation (straight-through); kl [n]: of
    the policy's path to the other's, summed over steps; states: before each step."""

    tokens: Tensor
    kl: Tensor
    states: list[Tensor]


def unmask(
    denoiser: Denoiser, other: Denoiser, start: Tensor, mask: Tensor, gumbel: Tensor, *, relaxed: int, temperature: float
) -> Path:  # fmt: skip
    """Samples from start [n, L, V + 1] over the levels mask [S + 1] with Gumbel noise [S, n, L, V + 1].

    The first S − relaxed steps are hard draws, through which no gradient passes. In the others x ← f·x + (1 − f)·y with
    y = softmax((ln q + Gumbel)/temperature) and f = 1 − x[mask]. kl: exact for hard states: a step from m_t to m_s adds
    Σ_{masked i} (1 − m_s/m_t)·KL(p ‖ p_other)_i, since the mask's own probability is the same under both. The released code's
    factor is 0 at masked positions; read as an inverted mask. In relaxed steps x[mask] weighs a position.
    Not kept: the effect of a hard step on later states has no gradient, and y is biased by the temperature."""
    state, steps = start, len(mask) - 1
    kl, states = start.new_zeros(len(start)), []
    for number in range(steps):
        hard = number < steps - relaxed
        states.append(state)
        own = denoiser(state)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not hard):
            theirs = other(state)
        stay = float(mask[number + 1] / mask[number])
        kl = kl + (1 - stay) * (state[..., -1] * (own.exp() * (own - theirs)).sum(-1)).sum(-1)
        log_q = torch.cat([own + _log(1 - stay), own.new_full((*own.shape[:-1], 1), _log(stay))], -1)
        if hard:
            drawn = one_hot((log_q + gumbel[number]).argmax(-1), log_q.shape[-1]).to(state)
        else:
            drawn = ((log_q + gumbel[number]) / temperature).softmax(-1)
        free = state[..., -1:]
        state = (1 - free) * state + free * drawn
        state = state.detach() if hard else state
    soft = state[..., :-1]
    tokens = one_hot(soft.argmax(-1), soft.shape[-1]).to(soft)
    return Path(tokens + (soft - soft.detach()), kl, states)


def _log(probability: float) -> float:
    return float(torch.tensor(probability, dtype=torch.float64).log())  # -inf at 0


@dataclass(frozen=True)
class MotifCount:
    """How often a motif stands in a sequence: Σ over places of Π_j x[place + j, motif_j], differentiable; the one-hot tokens
    [n, L, V] are the batch's latents."""

    motif: tuple[int, ...] = (0, 1)
    name: str = "motif"
    spec = RewardSpec(("latents",), differentiable=True)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        assert batch.latents is not None  # the spec asks for them
        places = batch.latents.shape[1] - len(self.motif) + 1
        found = [batch.latents[:, j : j + places, token] for j, token in enumerate(self.motif)]
        counts = torch.stack(found).prod(0).sum(1)
        return RewardOutput(counts, torch.ones(len(counts), dtype=torch.bool))


@dataclass
class Drakes:
    """Gradient ascent on E[reward] − alpha·KL(path ‖ path of the model before training) by relaxed samples.

    All samples start from masks alone, so no model has a higher value than alpha·ln E_before[e^{reward/alpha}] (`highest`), that
    of the tilt of the first model's paths by e^{reward/alpha}. Not kept: the tilt itself, since positions that are unmasked in
    one step are independent, and since the gradient of relaxed samples is biased, more so with many steps.

    steps: S; relaxed: how many of the last ones carry a gradient (the release's K); temperature: of Gumbel-softmax. Defaults are
    ours, for sequences of a few tokens (release, DNA: S 128, K 50, temperature 1, alpha 1e-3, Adam 1e-4)."""

    denoiser: nn.Module
    before: Denoiser
    reward: Reward
    length: int
    tokens: int
    steps: int = 8
    relaxed: int = 8
    temperature: float = 0.5
    alpha: float = 0.5
    count: int = 128
    optimizer: AdamWConfig = field(default_factory=lambda: AdamWConfig(lr=3e-3, weight_decay=0.0))
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.relaxed <= self.steps or not (self.temperature > 0 and self.alpha >= 0):
            raise ValueError(f"got relaxed={self.relaxed}, temperature={self.temperature}, alpha={self.alpha}; expected "
                             f"1 <= relaxed <= steps={self.steps}, temperature > 0 and alpha >= 0")  # fmt: skip
        self._adam = self.optimizer.build(self.denoiser.parameters())

    def path(self, iteration: int) -> Path:
        """The samples of an iteration; noise is keyed to it and to the sample."""
        return self._path(self.denoiser, iteration, self.count, self.relaxed)

    @torch.no_grad()
    def highest(self, count: int = 8192) -> float:
        """The bound of the objective, from hard samples of the model before training: low, if alpha is so small that few
        of them carry the mean."""
        scores = self.scores(self._path(self.before, -1, count, 0)).double()
        return float(self.alpha * ((scores / self.alpha).logsumexp(0) - torch.tensor(float(count)).log()))

    def _path(self, denoiser: Denoiser, iteration: int, count: int, relaxed: int) -> Path:
        shape = (self.steps, self.length, self.tokens + 1)
        noise = [generator(self.seed, "step", iteration, number).gumbel(size=shape) for number in range(count)]
        gumbel = torch.stack([torch.from_numpy(each).float() for each in noise], 1)
        start = masked(count, self.length, self.tokens)
        return unmask(
            denoiser, self.before, start, levels(self.steps), gumbel, relaxed=relaxed, temperature=self.temperature
        )

    def scores(self, path: Path) -> Tensor:
        """[n] of the reward, with gradient if gradients are on; `count` at a time, since equal samples are looked for in pairs."""
        return torch.cat([self._scored(part) for part in path.tokens.split(self.count)])

    def _scored(self, tokens: Tensor) -> Tensor:
        batch = RewardBatch(prompts=[""] * len(tokens), latents=tokens, sigma=torch.zeros(len(tokens)))
        return score(self.reward, batch, grad=torch.is_grad_enabled()).scores[:, 0]

    def updates(self, iteration: int) -> Iterable[Update]:
        """One update, as the main loop's trainers give it: of new samples, which are made in its only micro-batch."""
        measured: dict[str, float] = {}

        def loss() -> Tensor:
            path = self.path(iteration)
            scores = self.scores(path)
            measured.update({"reward/mean": float(scores.detach().mean()), "kl/path": float(path.kl.detach().mean())})
            return -scores.mean() + self.alpha * path.kl.mean()

        yield Update(self._adam, self.optimizer.max_grad_norm, [loss], lambda: measured)
