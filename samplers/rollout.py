"""The engine: roll a tree out, generation by generation, each distinct state evaluated once."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from samplers.forest import Forest
from samplers.frontier import Engine, Frontier, Noise, Record, Velocity
from samplers.kernels.base import Kernel
from samplers.schedules import check_sigmas
from samplers.selection import Select, candidates, check_frontiers, choose, trained_part
from samplers.trees import Tree

Keep = Literal["edges", "all"]


def rollout(
    velocity: Velocity,
    x_start: Tensor,
    sigmas: Tensor,
    tree: Tree,
    kernel: Kernel,
    noise: Noise,
    *,
    micro_batch: int | None = None,
    store_dtype: torch.dtype = torch.float32,
    select: Select | None = None,
    keep_velocities: bool = False,
    keep: Keep = "edges",
) -> Forest:
    """Rolls `tree` out from `x_start` [R, *] (one row per root) over `sigmas` [T+1], without gradient.

    On a device a generation is stepped in parts of `micro_batch` of its states, so that beside two generations of states there
    is what one part takes; no step waits for the device, and each part takes two copies of the host's numbers, its noise
    among them. On the host all steps of a generation are one part.

    velocity(x [n, *], sigma [n], root [n]) -> v [n, *]: called on distinct states of one generation, at most
    `micro_batch` rows at a time; root says which row of `x_start` (hence which condition) a state descends from.
    noise(tree, nodes) -> [n, *]: the draws of the stochastic steps that arrive at `nodes`, such as KeyedNoise.step.
    store_dtype: states are cast to it before log-probs are taken and before the next step, so that a replay sees the
    numbers of the rollout; the network gets them in at least fp32.
    select: drops states during the rollout, after completing them to previews in `select.preview_steps` deterministic
    steps of the kernel. The descendants of dropped states are not computed, and the forest's tree holds what is left
    (Tree.keep); its `evaluations` count all rows, those of previews too. The noise of the others is unchanged, and
    the velocity from which a preview sets out is not evaluated again.
    keep_velocities: the forest holds, as the role "old", the velocities at both ends of stochastic steps, where the network
    was evaluated.
    keep: which states the forest stores. "edges": those that an update, a decoder or a score reads later (roots, both
    ends of stochastic steps, nodes without children). "all": every state, so that Forest.at works at deterministic ones
    too; a group of G chains over T steps then takes G·(T+1) latents: 24 samples of SD3.5 at 1024 pixels (16·128·128,
    fp32: 1 MiB each) over 40 steps 984 MiB in place of 48 under a Deterministic plan.
    """
    _check(x_start, sigmas, tree, micro_batch, keep)
    if select is not None:
        check_frontiers(tree, select)
    among, needed = candidates(tree), _needed(tree, keep)
    continued = torch.zeros(len(tree), dtype=torch.bool)
    engine = Engine(velocity, sigmas, tree, kernel, noise, micro_batch, store_dtype, ~trained_part(tree))
    record = Record.of(tree, int(needed.sum()), keep_velocities)
    frontier = Frontier(engine, record, tree.generations[0], x_start.to(store_dtype), None)
    del x_start  # so that only the frontier holds the first generation
    with torch.no_grad():
        for generation in (*tree.generations[1:], torch.empty(0, dtype=torch.int64)):
            nodes = frontier.nodes
            continued[nodes] = True if select is None else choose(select, tree, nodes, among, frontier.previews)
            children = generation[continued[tree.parent[generation]]]
            following = frontier.advance(children, (needed & continued)[nodes].nonzero().flatten())
            if following is None:
                break
            frontier = following
    log_prob = record.log_prob(frontier.x)
    kept = needed & continued
    row = torch.where(kept, kept.cumsum(0) - 1, -1)
    forest = Forest(tree, sigmas, kernel, record.states.rows, row, log_prob, record.evaluations, record.previews)
    if record.velocities is not None:
        forest = forest.with_velocities("old", record.evaluated.nonzero().flatten(), record.velocities.rows)
    return forest if select is None else _pruned(forest, continued)


def _check(x_start: Tensor, sigmas: Tensor, tree: Tree, micro_batch: int | None, keep: Keep) -> None:
    check_sigmas(sigmas)
    if len(sigmas) != tree.num_steps + 1:
        raise ValueError(f"got {len(sigmas)} sigmas for a tree of {tree.num_steps} steps; expected num_steps + 1")
    if x_start.ndim < 2 or len(x_start) != tree.num_roots:
        raise ValueError(
            f"got x_start {list(x_start.shape)}; expected [R, *] with one row per root, R = {tree.num_roots}"
        )
    if micro_batch is not None and micro_batch < 1:
        raise ValueError(f"got micro_batch={micro_batch}; expected at least 1, or None for no limit")
    if keep not in ("edges", "all"):
        raise ValueError(f"got keep={keep!r}; expected 'edges' or 'all'")


def _needed(tree: Tree, keep: Keep) -> Tensor:
    """[N] whose states are stored: see `rollout`."""
    if keep == "all":
        return torch.ones(len(tree), dtype=torch.bool)
    needed = tree.parent < 0
    needed[tree.edges] = True
    needed[tree.parents_of_edges] = True
    childless = torch.ones(len(tree), dtype=torch.bool)
    childless[tree.evaluated] = False
    return needed | childless


def _pruned(forest: Forest, continued: Tensor) -> Forest:
    """The forest without the states that were dropped, their descendants, and what then leads to no leaf."""
    alive, tree = forest.tree.alive(continued), forest.tree.keep(continued)
    used = forest.row[alive & forest.kept]
    velocities = {role: velocities.kept(alive) for role, velocities in forest.velocities.items()}
    return replace(
        forest,
        tree=tree,
        velocities=velocities,
        states=forest.states[used],
        row=torch.where(forest.kept[alive], forest.kept[alive].cumsum(0) - 1, -1),
        log_prob=forest.log_prob[alive],
    )
