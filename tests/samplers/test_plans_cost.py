"""What plans cost, against an enumeration of trajectories in plain sets that knows nothing of Tree."""

import math
from itertools import combinations, pairwise, product

import numpy as np
import pytest
import torch

from samplers import (
    CPS,
    Branch,
    Chain,
    Compressed,
    Cost,
    Fixed,
    KeyedNoise,
    Plan,
    Probed,
    RandomSteps,
    Sliding,
    Sourced,
    SplitTree,
    Tree,
    TreeWindow,
    Window,
    branch,
    chain,
    compressed,
    diffusers_sigmas,
    probed,
    rollout,
    scattered,
    tree,
    unshared,
    window,
)

# A trajectory is a list of (state, level of the step that arrived); a state is (grid index, its draws so far).


def walk(draws: tuple, levels: list[float], choices: dict[int, object]) -> list:
    """One trajectory over all steps: at the steps of `choices` it takes a draw of its own."""
    path = [((0, draws), 0.0)]
    for step, level in enumerate(levels):
        if step in choices:
            draws = (*draws, (step, choices[step]))
        path.append(((step + 1, draws), level))
    return path


def chains(steps: int, group: int, trained: set[int], shared: bool) -> list:
    levels = [float(i in trained) for i in range(steps)]
    return [walk(() if shared else (s,), levels, dict.fromkeys(trained, s)) for s in range(group)]


def branches(steps: int, seeds: int, count: int, at: tuple[int, ...]) -> list:
    return [
        walk((seed,), [float(i == k) for i in range(steps)], {k: j})
        for seed, k, j in product(range(seeds), at, range(count))
    ]


def trees(levels: list[float], splits: tuple[int, ...], factor: int, roots: int = 1) -> list:
    picks = product(range(roots), product(range(factor), repeat=len(splits)))
    return [walk((root,), levels, dict(zip(splits, picked, strict=True))) for root, picked in picks]


def with_probes(paths: list, steps: int, count: int | None) -> list:
    """Each state that a stochastic step leaves or reaches, followed to the end without a choice: on the deterministic
    steps of any trajectory as far as they go, then alone."""
    continuation = {state: to for path in paths for (state, _), (to, level) in pairwise(path) if level == 0}
    trained = {end for path in paths for (state, _), (to, level) in pairwise(path) if level > 0 for end in (state, to)}
    out = list(paths)
    for state in trained:
        way = [(state, 0.0)]
        while way[-1][0] in continuation:
            way.append((continuation[way[-1][0]], 0.0))
        index, draws = way[-1][0]
        left = steps - index
        n = left if count is None else min(count, left)
        indices = [index + math.floor(j * left / n + 0.5) for j in range(1, n + 1)]
        out.append(way + [((index_reached, (*draws, "probe", index)), 0.0) for index_reached in indices])
    return out


def with_short_tails(paths: list, steps: int, ratio: float) -> list:
    out = []
    for path in paths:
        last = max(i for i, (_, level) in enumerate(path) if level > 0)
        index, draws = path[last][0]
        left = steps - index
        n = math.ceil(round(ratio * left, 6))
        indices = [index + math.floor(j * left / n + 0.5) for j in range(1, n + 1)]
        out.append(path[: last + 1] + [((index_reached, draws), 0.0) for index_reached in indices])
    return out


def count(paths: list) -> Cost:
    states, trained, edges, leaves = set(), set(), set(), set()
    for path in paths:
        for (state, _), (following, level) in pairwise(path):
            states.add(state)
            if level > 0:
                trained.add(state)
                edges.add(following)
        leaves.add(path[-1][0])
    return Cost(len(states), len(trained), len(edges), len(leaves))


CASES = [
    (chain(6, 4), chains(6, 4, set(range(5)), False)),
    (chain(6, 4, shared_start=True, train_last=True), chains(6, 4, set(range(6)), True)),
    (window(7, 3, 2, 3), chains(7, 3, {2, 3, 4}, True)),
    (scattered(8, 3, {1, 4, 6}), chains(8, 3, {1, 4, 6}, True)),
    (scattered(8, 3, {1, 4, 6}, shared_start=False), chains(8, 3, {1, 4, 6}, False)),
    (branch(6, 2, 3), branches(6, 2, 3, (0, 1, 2, 3, 4))),
    (branch(6, 2, 3, (1, 4)), branches(6, 2, 3, (1, 4))),
    (tree(7, (0, 2, 3), 2), trees([1.0] * 6 + [0.0], (0, 2, 3), 2)),
    (tree(7, (0, 2, 3), 2, train_last=True), trees([1.0] * 7, (0, 2, 3), 2)),
    (tree(6, (1, 3), 3, levels=[0, 1, 0, 2, 0, 0], roots=2), trees([0, 1, 0, 2, 0, 0], (1, 3), 3, 2)),
    (probed(chain(6, 3)), with_probes(chains(6, 3, set(range(5)), False), 6, None)),
    (probed(chain(9, 2), 3), with_probes(chains(9, 2, set(range(8)), False), 9, 3)),
    (probed(chain(9, 2), 1), with_probes(chains(9, 2, set(range(8)), False), 9, 1)),
    (probed(window(8, 3, 2, 3), 2), with_probes(chains(8, 3, {2, 3, 4}, True), 8, 2)),
    (probed(scattered(9, 3, {1, 4, 6})), with_probes(chains(9, 3, {1, 4, 6}, True), 9, None)),
    (probed(branch(6, 2, 3)), with_probes(branches(6, 2, 3, (0, 1, 2, 3, 4)), 6, None)),
    (probed(tree(7, (0, 2), 2), 2), with_probes(trees([1.0] * 6 + [0.0], (0, 2), 2), 7, 2)),
    (probed(tree(7, (0, 2), 2, train_last=True), 2), with_probes(trees([1.0] * 7, (0, 2), 2), 7, 2)),
    (compressed(window(12, 3, 2, 3), 0.4), with_short_tails(chains(12, 3, {2, 3, 4}, True), 12, 0.4)),
    (compressed(branch(9, 2, 2), 0.5), with_short_tails(branches(9, 2, 2, tuple(range(8))), 9, 0.5)),
    (
        probed(compressed(window(12, 3, 2, 3), 0.4)),
        with_probes(with_short_tails(chains(12, 3, {2, 3, 4}, True), 12, 0.4), 12, None),
    ),
]


@pytest.mark.parametrize(("topology", "paths"), CASES, ids=range(len(CASES)))
def test_costs_equal_an_enumeration_of_trajectories_and_so_do_rollouts(topology: Tree, paths: list) -> None:
    assert topology.cost() == count(paths)
    sizes = []
    noise = KeyedNoise(0, 0, [0], (2,))
    forest = rollout(
        lambda x, s, r: sizes.append(len(x)) or 0.1 * x, noise.start(topology), diffusers_sigmas(topology.num_steps),
        topology, CPS(0.5), noise.step, micro_batch=7,
    )  # fmt: skip
    assert forest.evaluations == sum(sizes) == count(paths).rollout and max(sizes) <= 7
    assert forest.at(topology.leaves).isfinite().all()


def test_probes_of_duplicates_cost_images_but_no_rows() -> None:
    once, twice = probed(chain(6, 3)), probed(chain(6, 3), duplicate=True)
    assert twice.cost() == Cost(once.cost().rollout, once.cost().train, once.cost().edges, once.cost().leaves + 3)
    assert probed(window(8, 3, 2, 2), duplicate=True).cost().rollout > probed(window(8, 3, 2, 2)).cost().rollout


def test_tempflow() -> None:
    assert Branch().forecast(10, 24) == Cost(rollout=1116, train=36, edges=216, leaves=216)
    assert unshared(branch(10, 4, 6), "step").tree.cost().train == 216
    assert int(branch(10, 1, 6, (0, 3)).index[branch(10, 1, 6, (0, 3)).parents_of_edges].max()) == 3


@pytest.mark.parametrize(
    ("splits", "factor", "rows", "edges", "leaves"),
    [
        ((0, 3, 6, 9), 2, 203, 218, 16), ((0, 4, 8, 12), 2, 169, 184, 16), ((0, 5, 10, 15), 2, 135, 150, 16),
        ((0, 3, 6, 9), 3, 928, 1008, 81), ((0, 3, 6, 9), 4, 2813, 3068, 256),
    ],
)  # fmt: skip
def test_branch_grpo(splits: tuple[int, ...], factor: int, rows: int, edges: int, leaves: int) -> None:
    """The paper's counts, which include the last step: train_last=True."""
    assert SplitTree(splits, factor, train_last=True).forecast(20, leaves) == Cost(rows, rows, edges, leaves)
    assert SplitTree(splits, factor).forecast(20, leaves) == Cost(rows, rows - leaves, edges - leaves, leaves)
    assert unshared(tree(20, splits, factor, train_last=True)).tree.cost() == Cost(
        20 * leaves, 20 * leaves, 20 * leaves, leaves
    )
    assert unshared(tree(20, splits, factor, train_last=True), "step").tree.cost().rollout == edges


def test_branch_grpo_mix_and_the_last_step() -> None:
    mix = SplitTree(window=4, position=Fixed(0))
    assert mix.forecast(20, 16).edges == 34 and mix.forecast(20, 32).edges == 68
    assert SplitTree().forecast(20, 16).edges == 218 - 16
    assert not bool((SplitTree().tree(20, 16, 0, np.random.default_rng(0)).level[-16:] > 0).any())


@pytest.mark.parametrize(("start", "rows"), [(0, 207), (4, 147), (8, 87)])
def test_dynamic_tree_rpo(start: int, rows: int) -> None:
    plan = TreeWindow(position=Fixed(start))
    assert rows == start + (2**4 - 1) + 2**4 * (16 - start - 4)
    assert plan.forecast(16, 16) == Cost(rollout=rows, train=15, edges=30, leaves=16)
    grown = plan.tree(16, 16, 0, np.random.default_rng(0))
    assert [round(v, 9) for v in grown.level[grown.edges].unique().tolist()] == [
        round(1 + 0.5 * k / 3, 9) for k in range(4)
    ]
    by_step = [grown.level[grown.edges[grown.index[grown.edges] == start + 1 + k]].unique() for k in range(4)]
    assert all(len(levels) == 1 for levels in by_step) and torch.cat(by_step).diff().gt(0).all()
    assert TreeWindow(depth=1, factor=5).tree(6, 5, 0, np.random.default_rng(0)).level.max() == 1


@pytest.mark.parametrize(
    ("plan", "leaves", "apart"),
    [(Probed(Chain(), duplicate=True), 264, 1560), (Probed(Chain()), 240, 1536)],
    ids=["DenseGRPO", "TP-GRPO"],
)
def test_gains_from_probes(plan: Probed, leaves: int, apart: int) -> None:
    assert plan.forecast(10, 24) == Cost(rollout=1320, train=216, edges=216, leaves=leaves)
    assert unshared(plan.tree(10, 24, 0, np.random.default_rng(0)), "step").tree.cost().rollout == apart


def test_flash() -> None:
    per_sample = [compressed(window(25, 1, at, 4, shared_start=False), 0.4).cost().rollout for at in range(12)]
    assert per_sample[0] == 13 and per_sample[-1] == 19 and round(sum(per_sample) / 12, 2) == 16.08
    assert per_sample == [at + 4 + math.ceil(round(0.4 * (21 - at), 6)) for at in range(12)]
    assert compressed(window(25, 12, 0, 4, shared_start=False), 0.2).cost().rollout == 9 * 12
    assert compressed(window(26, 1, 0, 1, shared_start=False), 0.28).cost().rollout == 1 + 7  # 7.000000000000001
    jumps = compressed(window(25, 1, 0, 4, shared_start=False), 0.4)
    assert jumps.index.diff().tolist() == [1, 1, 1, 1, 2, 3, 2, 2, 3, 2, 2, 3, 2]


def test_unshared_windows_and_chains() -> None:
    assert unshared(window(25, 12, 3, 4)).tree.cost() == Cost(300, 48, 48, 12)
    assert unshared(window(25, 12, 3, 4), "step").tree.cost().rollout == 3 + 12 * 22
    for per in ("trajectory", "step"):
        assert unshared(chain(5, 3), per).tree.cost() == chain(5, 3).cost()


def most(costs: list[Cost]) -> Cost:
    return Cost(*(max(vars(c)[name] for c in costs) for name in ("rollout", "train", "edges", "leaves")))


def short(paths: list) -> list:
    return with_short_tails(paths, 9, 0.3)


SETS = list(combinations(range(8), 3))


@pytest.mark.parametrize(
    ("plan", "paths"),
    [
        (RandomSteps(3), [chains(9, 4, set(s), True) for s in SETS]),
        (RandomSteps(3, shared_start=False), [chains(9, 4, set(s), False) for s in SETS]),
        (RandomSteps(1, (3, 1, 2)), [chains(9, 4, {s}, True) for s in (1, 2, 3)]),
        (Compressed(RandomSteps(3), 0.3), [short(chains(9, 4, set(s), True)) for s in SETS]),
        (Probed(RandomSteps(3)), [with_probes(chains(9, 4, set(s), True), 9, None) for s in SETS]),
        (
            Probed(Compressed(RandomSteps(3, shared_start=False), 0.3)),
            [with_probes(short(chains(9, 4, set(s), False)), 9, None) for s in SETS],
        ),
        (Branch(2, 3), [branches(9, 2, 2, s) for s in SETS]),
        (Compressed(Branch(2, 3), 0.3), [short(branches(9, 2, 2, s)) for s in SETS]),
        (Window(3), [chains(9, 4, {at, at + 1, at + 2}, True) for at in range(6)]),
        (Window(3, position=Fixed(4)), [chains(9, 4, {4, 5, 6}, True)]),
        (Window(3, low=1, position=Sliding(stride=2)), [chains(9, 4, {at, at + 1, at + 2}, True) for at in (1, 3, 5)]),
        (Compressed(Window(3, shared_start=False), 0.3), [short(chains(9, 4, {at, at + 1, at + 2}, False)) for at in range(6)]),
        (
            SplitTree((1, 4), window=2),
            [trees([float(i in {1, 4, at, at + 1}) for i in range(9)], (1, 4), 2) for at in range(7)],
        ),
        (
            Probed(TreeWindow(2), 2),
            [with_probes(trees([float(at <= i < at + 2) for i in range(9)], (at, at + 1), 2), 9, 2) for at in range(7)],
        ),
        (Sourced(Chain(), hinted=1), [chains(9, 4, set(range(8)), False)]),
    ],
)  # fmt: skip
def test_forecasts_are_the_worst_that_any_draw_costs(plan: Plan, paths: list) -> None:
    costs = [count(each) for each in paths]
    assert plan.forecast(9, 4) == most(costs)
    drawn = [plan.tree(9, 4, m, np.random.default_rng(m)).cost() for m in range(60)]
    assert set(map(str, drawn)) <= set(map(str, costs))
