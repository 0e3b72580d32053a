"""Rollouts that the gradient of a reward guides, with the prompts of their states (Euphonium, arXiv 2602.04928)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from flowalign.distributed.processes import Processes
from rewards import Reward, RewardBatch, channels_of, score, spec_of
from samplers import (
    SPSA,
    Ascent,
    AtPrediction,
    Forest,
    Guided,
    Held,
    Kernel,
    Path,
    RewardGradient,
    TransitionContext,
    Tree,
    even_sigmas,
)
from samplers.kernels.guided import GRADIENTS, RATE, GuidanceForm, MeanOf

# groups [n], latents [n, *], σ [n] -> what a reward gets of them
Batch = Callable[[Tensor, Tensor, Tensor], RewardBatch]


@dataclass(frozen=True)
class Probing:
    """SPSA, an estimate of ∇ρ from 2·`directions` scores per state, at a distance of `tau` from it. Its directions are
    keyed noise: a function of seed, iteration, prompt and state, whatever the batch and the number of processes."""

    directions: int = 1
    tau: float = 0.01

    def __post_init__(self) -> None:
        if self.directions < 1 or not self.tau > 0:
            raise ValueError(f"got spsa.directions={self.directions}, spsa.tau={self.tau}; expected >= 1 and > 0")


@dataclass(frozen=True)
class RewardGuidance:
    """Moves the mean of each step of the rollout by λ·∇ρ; see samplers.Guided for the options of λ and of active steps.

    reward: ρ, of one channel; null: the run's only process reward, which is then loaded once. at: where ∇ρ is taken; null
    goes by the reward's scope. "state": the noisy state, for scope latent. "prediction": the predicted x̂0 (decoded, if the
    reward reads pixels), for scope terminal; ∂x̂0/∂x is left out. spsa: how to estimate ∇ρ of a reward without a gradient;
    null: by autograd. scale .01, start 12 of 16 steps, no normalization: the released script (its η²/2β at β = 3.125).

    Under the default log_prob_mean the update knows nothing of the guidance: ratios are those of the kernel itself. The
    forest keeps ∇ρ at the guided states that stochastic steps leave, at most as many latents as the states themselves.
    Previews of a selection are not guided. A state without a score is an error, never an unguided one."""

    reward: Reward | None = None
    at: Literal["state", "prediction"] | None = None
    spsa: Probing | None = None
    scale: float | None = None
    form: GuidanceForm = "score_half"
    beta: float = 3.125
    use_delta: bool = True
    normalize: bool = False
    start: int = 0
    end: int | None = None
    interval: int = 1
    log_prob_mean: MeanOf = "unguided"

    def judge(self, process_rewards: Sequence[Reward]) -> Reward:
        """The reward whose gradient guides. ValueError where it is not said which."""
        if self.reward is not None:
            return self.reward
        if len(process_rewards) != 1:
            raise ValueError(
                f"got rollout.reward_guidance without a reward beside {len(process_rewards)} process_rewards; expected "
                "one there, to guide by it: set rollout.reward_guidance.reward"
            )
        return process_rewards[0]

    def place(self, reward: Reward) -> Literal["state", "prediction"]:
        """Where ∇ρ is taken."""
        return self.at or ("state" if spec_of(reward).scope == "latent" else "prediction")

    def guided(self, kernel: Kernel, ascent: Ascent, path: Path) -> Guided:
        """`kernel`, bound to `path`, moved along `ascent`."""
        return Guided(
            kernel, ascent, scale=self.scale, form=self.form, beta=self.beta, use_delta=self.use_delta,
            normalize=self.normalize, start=self.start, end=self.end, interval=self.interval,
            log_prob_mean=self.log_prob_mean, path=path,
        )  # fmt: skip

    def calls(self, tree: Tree, kernel: Kernel, path: Path) -> int:
        """Scores that guide a rollout of `tree`, at most: one per guided state, 2·directions with SPSA."""
        return self._states(tree, kernel, path) * (1 if self.spsa is None else 2 * self.spsa.directions)

    def check(self, tree: Tree, kernel: Kernel, path: Path, process_rewards: Sequence[Reward]) -> None:
        """ValueError for what cannot guide a rollout of `tree`; before anything is loaded."""
        reward = self.judge(process_rewards)
        spec, named = spec_of(reward), f"rollout.reward_guidance with the reward {reward.name!r}"
        if len(channels_of(reward)) > 1:
            raise ValueError(
                f"got {named}, whose channels are {list(channels_of(reward))}; expected one: take rewards.Mix"
            )
        if self.spsa is None and not spec.differentiable:
            raise ValueError(
                f"got {named}, which is not differentiable; expected one that is, or an estimate from its values: set "
                "rollout.reward_guidance.spsa={} (2 scores per guided state)"
            )
        if spec.scope == "terminal" and self.place(reward) == "state":
            raise ValueError(
                f"got {named} at 'state', but its scope is 'terminal': it scores finished samples: set at=prediction, or "
                "take a reward of scope latent"
            )
        if not self._states(tree, kernel, path):
            raise ValueError(
                f"got rollout.reward_guidance that moves no step of rollout.plan with rollout.kernel={kernel}: its rate is "
                f"0, or no step is active; expected a scale above 0, or steps with noise for form={self.form!r}, and "
                f"start={self.start}, end={self.end}, interval={self.interval} inside the {tree.num_steps} steps"
            )

    def _states(self, tree: Tree, kernel: Kernel, path: Path) -> int:
        """How many states of `tree` are guided, on an even grid."""
        nodes, sigmas = tree.parent.ge(0).nonzero().flatten(), even_sigmas(tree.num_steps, path).double()
        parents = tree.parent[nodes]
        sigma, then, index = sigmas[tree.index[parents]], sigmas[tree.index[nodes]], tree.index[parents]
        sigma = torch.where(sigma == 0, torch.finfo(torch.float64).tiny, sigma)
        ctx = TransitionContext(level=tree.level[nodes], step=index)
        step = kernel(torch.zeros(len(nodes), 1), torch.zeros(len(nodes), 1), sigma, then, ctx)
        rate = self.guided(kernel, _Nothing(), path).rate(step, sigma, ctx)
        return len(parents[rate != 0].unique())

    def begin(
        self, kernel: Kernel, path: Path, reward: Reward, batch: Batch, groups: Tensor,
        probes: Callable[[Tensor, int], Tensor], micro_batch: int,
    ) -> GuidedRollout:  # fmt: skip
        """What guides one rollout. groups [R]: of each root, as `batch` numbers them. probes: nodes [n], count ->
        [count, n, *]."""
        judge = Prompted(reward, batch, groups, micro_batch)
        ascent: Ascent = RewardGradient(judge, micro_batch)
        if self.spsa is not None:
            count = self.spsa.directions
            ascent = SPSA(judge, lambda nodes: probes(nodes, count), self.spsa.tau)
        if self.place(reward) == "prediction":
            ascent = AtPrediction(ascent, path)
        kept = Kept(ascent)
        return GuidedRollout(self.guided(kernel, kept, path), kernel, kept)

    def replayed(self, forest: Forest, kernel: Kernel, path: Path) -> Forest:
        """The forest as updates replay it: by the rollout's `kernel`, under the guided mean with the ∇ρ that was kept or without."""
        if self.log_prob_mean == "unguided":
            return forest
        return replace(forest, kernel=self.guided(kernel, Known(forest.velocities[GRADIENTS]), path))


@dataclass(frozen=True, eq=False)
class GuidedRollout:
    """One rollout: `kernel` for the engine, `plain` without the guidance."""

    kernel: Guided
    plain: Kernel
    kept: Kept

    def recorded(self, planned: Tree, forest: Forest) -> Forest:
        """The forest with its plain kernel, ∇ρ (GRADIENTS) and λ/b (RATE; a mean over siblings) at the guided states that
        stochastic steps leave. planned: the tree that was rolled out, of which a selection may have left less."""
        tree, nodes = forest.tree, self.kept.all_nodes
        keys, mine = _keys(planned)[nodes], _keys(tree)
        order = mine.argsort()
        found = order[torch.searchsorted(mine[order], keys).clamp(max=len(order) - 1)]
        here = (mine[found] == keys) & torch.isin(found, tree.parents_of_edges)
        gradients = self.kept.all_gradients(forest.states)
        forest = replace(forest, kernel=self.plain).with_velocities(
            GRADIENTS, found[here], gradients[here.to(gradients.device)]
        )
        return forest.with_scores(RATE, self._rates(forest))

    def _rates(self, forest: Forest) -> Tensor:
        """[N] λ/b of the guided states, over |∇ρ| if that is normalized; nan elsewhere."""
        tree, known = forest.tree, forest.velocities[GRADIENTS]
        edges = tree.edges[known.here[tree.parent[tree.edges]]]
        parents, position = tree.distinct_parents(edges)
        rates = torch.full((len(tree),), torch.nan, dtype=torch.float64)
        if not len(edges):
            return rates
        gradient = known.at(parents)
        step = forest.edge_steps(edges, torch.zeros_like(gradient), position)
        ctx = TransitionContext(step=tree.index[tree.parent[edges]])
        rate = self.kernel.rate(step, forest.sigma(tree.parent[edges]).double(), ctx) / step.policy.velocity_coef
        total, count = torch.zeros(len(parents), dtype=torch.float64), position.bincount(minlength=len(parents))
        mean = total.index_add(0, position, rate.cpu().double()) / count
        if self.kernel.normalize:
            norm = gradient.flatten(1).norm(dim=1).cpu().double()
            mean = torch.where(norm == 0, 0.0, mean / norm)
        return rates.index_copy(0, parents, mean)


@dataclass(frozen=True, eq=False)
class Prompted:
    """A reward of the rewards package as the samplers ask for it: rows become groups, whose prompts `batch` adds.

    RewardError where a state has no score."""

    reward: Reward
    batch: Batch
    groups: Tensor
    micro_batch: int

    def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        """[n], with a graph if x has one."""
        groups, scores = self.groups[rows.cpu()], []
        parts = (values.split(self.micro_batch) for values in (groups, x, sigma))
        for part in zip(*parts, strict=True):
            batch = self.batch(*part)
            output = score(self.reward, batch, grad=x.requires_grad, max_fail_rate=0.0)
            scores.append(output.scores[:, 0])
        return torch.cat(scores)


@dataclass(eq=False)
class Kept:
    """`ascent`, of which every gradient is kept with the number of its state."""

    ascent: Ascent
    nodes: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)

    def gradient(self, x: Tensor, v: Tensor, sigma: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
        found = self.ascent.gradient(x, v, sigma, rows, nodes)
        self.nodes.append(nodes)
        self.gradients.append(found)
        return found

    @property
    def all_nodes(self) -> Tensor:
        return torch.cat(self.nodes) if self.nodes else torch.empty(0, dtype=torch.int64)

    def all_gradients(self, like: Tensor) -> Tensor:
        """[n, *], in the order of the nodes."""
        return torch.cat(self.gradients) if self.gradients else like[:0].float()


@dataclass(frozen=True, eq=False)
class Known:
    """∇ρ as a rollout found it: a replay computes none."""

    gradients: Held

    def gradient(self, x: Tensor, v: Tensor, sigma: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
        return self.gradients.at(nodes)


@dataclass(frozen=True)
class _Nothing:
    """No gradient: for counting."""

    def gradient(self, x: Tensor, v: Tensor, sigma: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
        return torch.zeros_like(x)


def measured(forest: Forest, processes: Processes) -> dict[str, float]:
    """gradient_norm: mean |∇ρ| of the guided states. shift_per_noise: mean root mean square of λ·∇ρ over the noise's
    standard deviation; 1 means that guidance moves a step as far as its noise does. Collective."""
    tree, found = forest.tree, forest.velocities[GRADIENTS]
    edges = tree.edges[found.known[tree.parent[tree.edges]]]
    if not len(edges):
        return {}
    edges = edges[found.here[tree.parent[edges]]]
    parents, position = tree.distinct_parents(edges)
    gradient = found.at(parents)
    step = forest.edge_steps(edges, torch.zeros_like(gradient), position).policy
    size = gradient.flatten(1).square().mean(1).sqrt()[position.to(gradient.device)]
    shift = forest.scores[RATE][tree.parent[edges]].to(size) * step.velocity_coef * size / step.std
    return {
        "guidance/gradient_norm": float(processes.gather(gradient.flatten(1).norm(dim=1)).mean()),
        "guidance/shift_per_noise": float(processes.gather(shift.abs()).mean()),
    }


def _keys(tree: Tree) -> Tensor:
    """[N] a number of each node that a selection does not change."""
    return tree.group * 2**40 + tree.local
