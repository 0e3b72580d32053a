"""What plans roll out: marginals, equivalences between methods, shared prefixes, probes, correlated branch noise."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from samplers import (
    CPS,
    SOURCES,
    Chain,
    Deterministic,
    FlowSDE,
    Forest,
    KeyedNoise,
    Sourced,
    SplitTree,
    Tree,
    branch,
    chain,
    compressed,
    diffusers_sigmas,
    load_forest,
    plain_sigmas,
    probed,
    rollout,
    save_forest,
    scattered,
    tree,
    unshared,
    window,
)
from tests.helpers.gaussian import gaussian_velocity

F64 = torch.float64
SHAPES = {
    "tree": tree(6, (0, 2, 3), 2, train_last=True),
    "mix": tree(6, (1, 3), 2, levels=[0, 1, 0, 1, 1, 0]),
    "branch": branch(6, 2, 3),
    "probed chain": probed(chain(6, 2)),
    "probed window": probed(window(8, 3, 2, 3), 2),
    "flash": compressed(window(12, 3, 2, 3), 0.4),
    "probed tree": probed(tree(6, (0, 2), 2, train_last=True), 3),
}


def roll(
    topology: Tree, kernel=None, width: int = 3, scale: float | None = None, micro: int | None = None, seed: int = 0
):
    """Row-wise in the strict sense: no row's velocity depends on its batch."""
    velocity, _ = gaussian_velocity()
    noise = KeyedNoise(seed, 0, list(range(topology.num_groups)), (width,), branch_scale=scale)
    grid = plain_sigmas(topology.num_steps, 3.0)
    return rollout(velocity, noise.start(topology), grid, topology, kernel or FlowSDE(), noise.step, micro_batch=micro)


def moments(kernel, levels: list[float], steps: int) -> tuple[float, float]:
    """Exact mean and variance of x_T on the Gaussian bed, for steps with these levels."""
    _, velocity_coef = gaussian_velocity()
    grid = plain_sigmas(steps, 3.0).double()
    one = kernel.coefficients(grid[:-1], grid[1:], torch.tensor(levels, dtype=F64), torch.arange(steps))
    mean, variance = 0.0, 1.0
    for i in range(steps):
        a, b, s, k = (float(t[i]) for t in (one.alpha, one.velocity_coef, one.std, velocity_coef(grid)))
        mean = a * mean + b * (-0.5 + k * (mean - (1 - float(grid[i])) * 0.5))
        variance = (a + b * k) ** 2 * variance + s**2
    return mean, variance


@pytest.mark.parametrize("scale", [None, 1.0, 4.0])
@pytest.mark.parametrize("which", ["tree", "mix", "branch"])
def test_every_leaf_has_the_marginal_of_the_chain_along_its_way(which: str, scale: float | None) -> None:
    topology = SHAPES[which]
    width = 20_000
    forest = roll(topology, width=width, scale=scale)
    leaves = forest.at(topology.leaves)
    for leaf, x in zip(topology.leaves.tolist(), leaves, strict=True):
        levels, node = [0.0] * 6, leaf
        while int(topology.parent[node]) >= 0:
            levels[int(topology.index[node]) - 1] = float(topology.level[node])
            node = int(topology.parent[node])
        mean, variance = moments(FlowSDE(), levels, 6)
        assert float(x.mean()) == pytest.approx(mean, abs=4.5 * math.sqrt(variance / width))
        assert float(x.var()) == pytest.approx(variance, rel=4.5 * math.sqrt(2 / width))


@pytest.mark.parametrize("scale", [0.5, 4.0])
def test_branch_noise_is_standard_and_correlated_between_siblings_only(scale: float) -> None:
    topology, n = tree(4, (0, 2), 2, train_last=True), 100_000
    noise = KeyedNoise(0, 0, [0], (n,), branch_scale=scale)
    nodes = topology.edges
    draws = noise.step(topology, nodes).double()
    covariance = draws @ draws.T / n
    siblings = topology.parent[nodes][:, None] == topology.parent[nodes][None]
    expected = torch.where(siblings, 1 / (1 + scale**2), 0.0).double().fill_diagonal_(1.0)
    assert int((siblings.sum(1) == 2).sum()) == 6 and int((siblings.sum(1) == 1).sum()) == 6
    torch.testing.assert_close(covariance, expected, rtol=0, atol=5 * math.sqrt(2 / n))


def test_branch_noise_is_a_function_of_its_key() -> None:
    one, other = tree(4, (0, 2), 2), tree(4, (1,), 2)
    alone = KeyedNoise(3, 1, [7], (5,), branch_scale=4.0)
    together = KeyedNoise(3, 1, [9, 7], (5,), branch_scale=4.0)
    both = Tree.cat([other, one])
    mine = both.edges[both.group[both.edges] == 1]
    expected = alone.step(one, one.edges)
    assert torch.equal(together.step(both, mine), expected)
    shuffled = torch.randperm(len(mine), generator=torch.Generator().manual_seed(0))
    assert torch.equal(together.step(both, mine[shuffled]), expected[shuffled])
    assert torch.equal(torch.cat([alone.step(one, edge[None]) for edge in one.edges]), expected)
    assert not torch.equal(KeyedNoise(3, 2, [7], (5,), branch_scale=4.0).step(one, one.edges), expected)
    for bad in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="branch_scale"):
            KeyedNoise(0, 0, [0], (1,), branch_scale=bad)


def test_starts_differ_and_do_not_move_with_the_batch() -> None:
    one, pair = chain(4, 3), Tree.cat([branch(4, 2, 2), chain(4, 3)])
    starts = KeyedNoise(0, 0, [7], (5,)).start(one)
    assert len(starts.unique(dim=0)) == 3
    assert torch.equal(KeyedNoise(0, 0, [8, 7], (5,)).start(pair)[2:], starts)


def by_local(forest: Forest) -> dict[int, torch.Tensor]:
    nodes = forest.kept.nonzero().flatten()
    return dict(zip(forest.tree.local[nodes].tolist(), forest.at(nodes), strict=True))


def test_chain_is_the_window_of_all_but_the_last() -> None:
    one, other = chain(6, 4), window(6, 4, 0, 5, shared_start=False)
    assert torch.equal(roll(one).states, roll(other).states)
    assert torch.equal(chain(6, 4, shared_start=True).level, scattered(6, 4, range(5)).level)


def test_a_tree_without_splits_is_chains() -> None:
    assert torch.equal(roll(tree(6, (), 2, roots=4)).states, roll(chain(6, 4)).states)


@pytest.mark.parametrize("kernel", [FlowSDE(), CPS()], ids=["flow", "cps"])
def test_a_sample_is_a_function_of_its_start_and_of_the_noise_inside_the_window(kernel) -> None:
    """Noise is asked for at the window's edges alone; with equal noise all siblings are one sample."""
    topology, asked = window(10, 4, 3, 2), []

    def noise(tree: Tree, nodes: torch.Tensor) -> torch.Tensor:
        asked.append(nodes)
        return torch.full((len(nodes), 3), 0.5)

    velocity, _ = gaussian_velocity()
    forest = rollout(velocity, torch.ones(1, 3), plain_sigmas(10, 3.0), topology, kernel, noise)
    assert torch.equal(torch.cat(asked).sort().values, topology.edges.sort().values)
    assert [int((topology.level[topology.index == step + 1] > 0).any()) for step in range(10)] == [0] * 3 + [1] * 2 + [
        0
    ] * 5
    leaves = forest.at(topology.leaves)
    assert torch.equal(leaves, leaves[:1].expand_as(leaves)) and len(leaves) == 4


def test_one_split_is_fast_grpo_with_one_step_is_one_branching_step() -> None:
    """Same topology, same noise keys, so the same numbers bit for bit."""
    levels = [float(i == 2) for i in range(6)]
    forests = [roll(t) for t in (tree(6, (2,), 4, levels=levels), window(6, 4, 2, 1), branch(6, 1, 4, (2,)))]
    for forest in forests[1:]:
        for name in ("parent", "index", "level", "local"):
            assert torch.equal(vars(forest.tree)[name], vars(forests[0].tree)[name])
        assert torch.equal(forest.states, forests[0].states) and len(forest.tree.leaves) == 4
        assert torch.equal(forest.log_prob.nan_to_num(7), forests[0].log_prob.nan_to_num(7))


@pytest.mark.parametrize("which", SHAPES)
def test_micro_batches_change_nothing_bit_for_bit(which: str) -> None:
    whole = roll(SHAPES[which])
    for micro in (1, 3):
        parts = roll(SHAPES[which], micro=micro)
        assert torch.equal(whole.states, parts.states) and whole.evaluations == parts.evaluations
        assert torch.equal(whole.log_prob.nan_to_num(7), parts.log_prob.nan_to_num(7))


@pytest.mark.parametrize("which", SHAPES)
def test_prefixes_are_those_of_each_samples_own_trajectory(which: str) -> None:
    """Without sharing, each leaf is rolled out alone from its start: the same bits, more evaluations."""
    topology = SHAPES[which]
    velocity, _ = gaussian_velocity()
    noise = KeyedNoise(0, 0, [0], (3,), branch_scale=2.0)
    grid, start = plain_sigmas(topology.num_steps, 3.0), noise.start(topology)
    shared = rollout(velocity, start, grid, topology, FlowSDE(), noise.step)
    for per in ("trajectory", "step"):
        copies = unshared(topology, per)
        apart = copies.rollout(velocity, start, grid, FlowSDE(), noise.step, micro_batch=4)
        assert apart.tree is topology and apart.evaluations == copies.tree.cost().rollout > shared.evaluations
        assert torch.equal(apart.states, shared.states) and torch.equal(apart.row, shared.row)
        assert torch.equal(apart.log_prob.nan_to_num(7), shared.log_prob.nan_to_num(7))


def test_copies_keep_their_groups_and_conditions() -> None:
    both = Tree.cat([window(5, 2, 1, 2), probed(chain(5, 2))])
    noise = KeyedNoise(0, 0, [4, 4], (3,))
    condition = torch.tensor([1.0, 2.0, 3.0])

    def velocity(x, sigma, root):
        return 0.1 * x * condition[root][:, None]

    start, grid = noise.start(both), diffusers_sigmas(5)
    shared = rollout(velocity, start, grid, both, FlowSDE(), noise.step)
    for per in ("trajectory", "step"):
        apart = unshared(both, per).rollout(velocity, start, grid, FlowSDE(), noise.step)
        assert torch.equal(apart.states, shared.states) and apart.evaluations > shared.evaluations


@pytest.mark.parametrize("which", ["tree", "mix", "branch", "probed chain"])
def test_without_noise_every_leaf_is_the_ode_sample(which: str) -> None:
    topology = SHAPES[which]
    forest = roll(topology, CPS(0.0))
    ends = roll(chain(6, topology.num_roots), CPS(0.0))
    for leaf in topology.leaves.tolist():
        root = int(topology.root[leaf])
        assert torch.equal(forest.at(torch.tensor([leaf]))[0], ends.at(ends.tree.leaves)[root])


@pytest.mark.parametrize("steps", [None, 1, 3])
def test_probes_are_the_states_own_ode_completions_and_change_no_sample(steps: int | None) -> None:
    bare = tree(7, (1, 3), 2, train_last=True)
    topology = probed(bare, steps)
    before, after = by_local(roll(bare)), by_local(roll(topology))
    assert all(torch.equal(after[key], value) for key, value in before.items())
    forest, (velocity, _) = roll(topology), gaussian_velocity()
    grid = plain_sigmas(7, 3.0)
    nodes = torch.cat([topology.edges, topology.parents_of_edges]).unique()
    assert len(nodes) == len(bare)
    for node, leaf in zip(nodes.tolist(), topology.completion(nodes).tolist(), strict=True):
        x, index = forest.at(torch.tensor([node])), int(topology.index[node])
        count = 7 - index if steps is None else min(steps, 7 - index)
        indices = [index] + [index + math.floor(j * (7 - index) / count + 0.5) for j in range(1, count + 1)]
        for here, there in pairwise(indices):
            x = x + (grid[there] - grid[here]) * velocity(x, grid[here].expand(1))
        torch.testing.assert_close(forest.at(torch.tensor([leaf])), x)


def test_a_completion_is_the_main_trajectory_where_that_is_deterministic() -> None:
    main = scattered(8, 2, {1, 4}, shared_start=False)
    topology = probed(main)
    assert len(topology.leaves) == 2 * 3  # two samples, probes from their states 1 and 4
    forest_nodes = torch.arange(len(topology))
    reached = topology.completion(forest_nodes)
    assert bool((reached >= 0).all())
    for sample in range(2):
        own = (topology.root == sample) & (topology.local < len(main))
        at = {int(topology.index[n]): int(reached[n]) for n in forest_nodes[own]}
        assert at[0] == at[1] and at[2] == at[4] and at[5] == at[8] and len({at[0], at[2], at[5]}) == 3
    assert bool((main.completion(main.parents_of_edges) == -1).all())
    anywhere = probed(chain(5, 1, train_last=True), at=(2,))
    assert len(anywhere.leaves) == 2 and int(anywhere.completion((anywhere.index == 2).nonzero()[0])) >= 0


def test_probes_run_as_one_wavefront() -> None:
    topology = Tree.cat([probed(chain(6, 3)), probed(chain(6, 2), 2)])
    calls = []
    noise = KeyedNoise(0, 0, [0, 1], (2,))
    rollout(
        lambda x, s, r: calls.append(len(x)) or 0.1 * x, noise.start(topology), diffusers_sigmas(6), topology,
        FlowSDE(), noise.step,
    )  # fmt: skip
    assert len(calls) == 6 and sum(calls) == topology.cost().rollout


def test_tails_jump_from_the_same_states() -> None:
    bare = window(12, 3, 2, 3)
    before, after = by_local(roll(bare)), by_local(roll(compressed(bare, 0.4)))
    stays = [int(n) for n in bare.local[bare.index <= 5]]
    assert (
        all(torch.equal(before[k], after[k]) for k in stays if k in before)
        and len(after) < len(by_local(roll(bare))) + 1
    )
    assert torch.equal(roll(compressed(bare, 1.0)).at(compressed(bare, 1.0).leaves), roll(bare).at(bare.leaves))
    pair = Tree.cat([bare, chain(12, 2)])
    assert compressed(pair, 0.4).num_groups == 2
    assert compressed(pair, 0.4).cost().rollout == compressed(bare, 0.4).cost().rollout + 24


def test_sources_are_read_through_the_root(tmp_path) -> None:
    plan = Sourced(Chain(), hinted=1, teacher=2)
    topology = Tree.cat([plan.tree(4, 5, 0, np.random.default_rng(0)), chain(4, 1)])
    seen = set()

    def velocity(x, sigma, root):
        seen.update(zip(root.tolist(), topology.source[root].tolist(), strict=True))
        return x

    noise = KeyedNoise(0, 0, [0, 1], (2,))
    forest = rollout(velocity, noise.start(topology), diffusers_sigmas(4), topology, FlowSDE(), noise.step)
    assert dict(seen) == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2, 5: 0} and SOURCES[1] == "hinted"
    assert torch.equal(topology.source, topology.source[topology.root])
    save_forest(tmp_path / "forest", forest)
    assert torch.equal(load_forest(tmp_path / "forest").tree.source, topology.source)
    assert torch.equal(probed(topology).source[: topology.num_roots], topology.source[: topology.num_roots])
    with pytest.raises(ValueError, match="at least one root for the student"):
        Sourced(SplitTree(), teacher=1).tree(20, 16, 0, np.random.default_rng(0))


@pytest.mark.parametrize(
    "make",
    [
        lambda: tree(4, (4,)), lambda: tree(4, (1, 1)), lambda: tree(4, (1,), 1), lambda: tree(4, (1,), levels=[1.0]),
        lambda: tree(4, (1,), levels=[1, 0, 1, 1]), lambda: branch(4, 1, 2, ()), lambda: branch(4, 1, 2, (4,)),
        lambda: SplitTree().forecast(20, 12), lambda: SplitTree(()), lambda: SplitTree(window=20).forecast(20, 16),
        lambda: probed(chain(4, 2), 0), lambda: compressed(window(4, 2, 0, 1), 0.0), lambda: unshared(chain(4, 2), "edge"),
        lambda: chain(4, 2).with_source(torch.zeros(3, dtype=torch.int64)), lambda: scattered(4, 2, {4}),
    ],
)  # fmt: skip
def test_bad_plans_say_what_was_expected(make) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


def test_a_deterministic_rollout_is_the_ode_from_independent_starts() -> None:
    topology = Deterministic().tree(5, 3, 0, np.random.default_rng(0))
    assert topology.num_roots == 3 and not len(topology.edges) and len(topology.leaves) == 3
    forest = roll(topology)
    x, grid, (velocity, _) = KeyedNoise(0, 0, [0], (3,)).start(topology), plain_sigmas(5, 3.0), gaussian_velocity()
    for sigma, sigma_next in pairwise(grid):
        x = x + (sigma_next - sigma) * velocity(x, sigma.expand(3))
    torch.testing.assert_close(forest.at(topology.leaves), x)
    assert bool(forest.log_prob.isnan().all()) and forest.evaluations == 15


@pytest.mark.parametrize("which", ["probed window", "flash", "probed tree"])
def test_keep_all_stores_every_state_and_changes_nothing_else(which: str) -> None:
    topology, (velocity, _) = SHAPES[which], gaussian_velocity()
    noise, grid = KeyedNoise(0, 0, [0], (3,)), plain_sigmas(SHAPES[which].num_steps, 3.0)
    seen: list[tuple[float, float]] = []

    def recording(x, sigma, root):
        seen.extend(zip(sigma.tolist(), x[:, 0].tolist(), strict=True))
        return velocity(x, sigma)

    full = rollout(recording, noise.start(topology), grid, topology, FlowSDE(), noise.step, keep="all")
    part = roll(topology)
    assert bool(full.kept.all()) and not bool(part.kept.all())
    kept = part.kept.nonzero().flatten()
    assert torch.equal(full.at(kept), part.at(kept))
    torch.testing.assert_close(full.log_prob, part.log_prob, rtol=0, atol=0, equal_nan=True)
    nodes = topology.evaluated
    assert sorted(zip(full.sigma(nodes).tolist(), full.at(nodes)[:, 0].tolist(), strict=True)) == sorted(seen)
    with pytest.raises(ValueError, match="keep='every'"):
        rollout(velocity, noise.start(topology), grid, topology, FlowSDE(), noise.step, keep="every")
