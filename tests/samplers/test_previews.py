"""Previews of several steps: what they are, what they cost, what they leave as it was; which candidates stay."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from samplers import (
    Best,
    Bounded,
    Chain,
    Cost,
    Deterministic,
    DPMSolver,
    Fixed,
    FlowSDE,
    Forest,
    Guided,
    Kernel,
    KeyedNoise,
    Probed,
    Select,
    Selected,
    TransitionContext,
    Tree,
    Window,
    chain,
    generator,
    plain_sigmas,
    probed,
    rollout,
    window,
)
from samplers.tree_rules import COLUMNS
from tests.helpers.gaussian import gaussian_velocity

STEPS = 10


def curved(x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
    return torch.sin(2 * x) - 0.5 * x * sigma[:, None]


class Rolled:
    """A rollout, its network rows, and the previews that were scored, by (group, local)."""

    def __init__(self, tree: Tree, plan: Selected | None = None, kernel: Kernel | None = None, micro: int = 7) -> None:
        self.rows, self.seen = 0, dict[tuple[int, int], Tensor]()
        noise = KeyedNoise(0, 0, list(range(tree.num_groups)), (3,))
        select: Select | None = None if plan is None else plan.select(self.score)
        self.forest: Forest = rollout(
            self.velocity, noise.start(tree), plain_sigmas(tree.num_steps), tree, kernel or FlowSDE(), noise.step,
            micro_batch=micro, select=select,
        )  # fmt: skip

    def velocity(self, x: Tensor, sigma: Tensor, root: Tensor) -> Tensor:
        self.rows += len(x)
        return curved(x, sigma, root)

    def score(self, tree: Tree, nodes: Tensor, previews: Tensor) -> Tensor:
        for node, preview in zip(nodes.tolist(), previews, strict=True):
            self.seen[int(tree.group[node]), int(tree.local[node])] = preview
        return previews[:, 0]


def grown(plan: Bounded, group: int, groups: int = 2) -> Tree:
    return Tree.cat([plan.tree(STEPS, group, 0, generator(0))] * groups)


def check_left(small: Forest, large: Forest) -> None:
    """Each state of the selected forest is that of the whole one with its (group, local), bit for bit."""
    keys = [list(zip(f.tree.group.tolist(), f.tree.local.tolist(), strict=True)) for f in (small, large)]
    twin = torch.tensor([keys[1].index(key) for key in keys[0]])
    nodes = small.kept.nonzero().flatten()
    assert torch.equal(small.at(nodes), large.at(twin[nodes]))
    assert torch.equal(small.log_prob.nan_to_num(7), large.log_prob[twin].nan_to_num(7))


# ---------------------------------------------------------------------------------------------- what a preview is


@pytest.mark.parametrize("kernel", [FlowSDE(), DPMSolver(FlowSDE())], ids=["euler", "dpm"])
@pytest.mark.parametrize("steps", [1, 2, 4, 20])
@pytest.mark.parametrize(
    ("plan", "index"),
    [(Chain(), 0), (Window(1, position=Fixed(2)), 3), (Window(2, position=Fixed(1), shared_start=False), 2)],
    ids=["starts", "shared prefix", "inside a window"],
)
def test_a_preview_is_the_probe_of_its_state(plan: Bounded, index: int, steps: int, kernel: Kernel) -> None:
    """Bit for bit; the state's own velocity serves both, its history too; and micro-batches do not matter."""
    tree = grown(plan, 6)
    shown = Rolled(tree, Selected(plan, {index: 2}, preview_steps=steps), kernel).seen
    other = Rolled(tree, Selected(plan, {index: 2}, preview_steps=steps), kernel, micro=100).seen
    whole = Rolled(probed(tree, steps, at=[index], duplicate=True), None, kernel).forest
    here = (~whole.tree.probe & (whole.tree.index == index)).nonzero().flatten()
    assert len(here) == len(shown) == 12
    for node in here.tolist():
        line = node
        while int(whole.tree.index[line]) < STEPS:  # the child that is a probe; one ends each line
            line = int(((whole.tree.parent == line) & whole.tree.probe).nonzero()[0])
        key = int(whole.tree.group[node]), int(whole.tree.local[node])
        assert torch.equal(shown[key], whole.at(torch.tensor([line]))[0]) and torch.equal(shown[key], other[key])


@dataclass
class Up:
    """∇ρ = 1. Remembers the states it was asked for."""

    asked: list[int] = field(default_factory=list)

    def gradient(self, x: Tensor, v: Tensor, sigma: Tensor, rows: Tensor, nodes: Tensor) -> Tensor:
        self.asked += nodes.tolist()
        return torch.ones_like(x)


@pytest.mark.parametrize("steps", [1, 3])
def test_no_reward_guides_a_preview(steps: int) -> None:
    """Its deterministic steps are the kernel's own, and ∇ρ is asked for once at each state that is continued."""
    tree, chosen, up = grown(Chain(), 6), Selected(Chain(), {2: 2}, preview_steps=steps), Up()
    plain = Rolled(tree, chosen)
    moved = Rolled(tree, chosen, Guided(FlowSDE(), up, scale=1.0, start=2))
    assert all(torch.equal(plain.seen[key], preview) for key, preview in moved.seen.items()) and len(moved.seen) == 12
    assert len(up.asked) == len(set(up.asked)) == 2 * 2 * (STEPS - 2)


@pytest.mark.parametrize(
    ("plan", "group", "counts", "preview", "rows", "previews"),
    [
        (Chain(), 96, {0: 24}, 6, 96 * 6 + 24 * 9, 96),  # Sol-RL's numbers; the first row serves preview and sample
        (Chain(), 96, {0: 24}, 1, 96 + 24 * 9, 96),
        (Chain(), 96, {0: 24}, 0, 24 * 10, 96),
        (Window(1, position=Fixed(2)), 96, {3: 24}, 4, 3 + 96 * 4 + 24 * 6, 96),
        (Window(1, position=Fixed(2)), 96, {3: 24}, 50, 3 + 96 * 7 + 24 * 6, 96),  # no more than the remaining steps
        (Chain(train_last=True), 96, {10: 24}, 6, 96 * 10, 96),  # finished samples are their own previews
        (Window(2, position=Fixed(2)), 96, {3: 48, 4: 24}, 3, 3 + 96 * 3 + 48 * 3 + 24 * 5, 96 + 48),
        # potential assessed twice: G·(i + 1) + k·(j − i) + 24·(T − 1 − j)
        (Chain(), 72, {2: 48, 5: 24}, 1, 72 * 3 + 48 * 3 + 24 * 4, 72 + 48),
        (Deterministic(), 96, {0: 24}, 6, 96 * 6 + 24 * 9, 96),
        (Chain(), 24, {0: 24}, 6, 24 * 10, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("keep", ["best", "extremes"])
def test_rows_and_previews_are_those_of_the_forecast(plan, group, counts, preview, rows, previews, keep) -> None:
    chosen = Selected(plan, counts, preview_steps=preview, keep=keep)
    cost, done = chosen.forecast(STEPS, group), Rolled(grown(plan, group), chosen)
    assert (cost.rollout, cost.previews) == (rows, previews)
    assert done.forest.evaluations == done.rows == 2 * rows and done.forest.previews == 2 * previews
    left = done.forest.tree.cost()
    assert (left.train, left.edges, left.leaves) == tuple(2 * n for n in (cost.train, cost.edges, cost.leaves))
    assert done.forest.tree.group[done.forest.tree.leaves].bincount().tolist() == [24, 24]


@pytest.mark.parametrize("plan", [Chain(), Window(2, position=Fixed(1)), Probed(Window(1, position=Fixed(1)))], ids=str)
def test_what_is_left_is_as_without_selection(plan: Bounded) -> None:
    tree, index = grown(plan, 8), 2
    whole = Rolled(tree).forest
    for keep in ("best", "extremes"):
        check_left(Rolled(tree, Selected(plan, {index: 4}, preview_steps=3, keep=keep)).forest, whole)
    same = Rolled(tree, Selected(plan, {index: 8}, preview_steps=3)).forest  # as many as there are: nothing to choose
    for name in COLUMNS:
        assert torch.equal(vars(same.tree)[name], vars(whole.tree)[name])
    assert torch.equal(same.states, whole.states) and torch.equal(same.row, whole.row)
    assert torch.equal(same.log_prob.nan_to_num(7), whole.log_prob.nan_to_num(7))
    assert same.evaluations == whole.evaluations and same.previews == 0
    assert Selected(plan, {index: 8}, preview_steps=3).forecast(STEPS, 8) == plan.forecast(STEPS, 8)


# ---------------------------------------------------------------------------------------------- which ones stay


def kept(scores: list[float], share: int, pick: str = "extremes", tree: Tree | None = None, **within) -> list[int]:
    """The candidates, independent starts, that stay."""
    tree = tree or chain(1, len(scores))
    best = Best({0: share}, lambda tree, nodes, previews: torch.tensor(scores), pick=pick, **within)
    nodes = torch.arange(len(scores))
    return best.keep(tree, nodes, torch.zeros(len(scores), 1)).nonzero().flatten().tolist()


INVALID = -float("inf")


@pytest.mark.parametrize(
    ("scores", "share", "best", "extremes"),
    [
        ([3.0, 1.0, 2.0, 5.0, 4.0, 0.0], 4, [0, 2, 3, 4], [1, 3, 4, 5]),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 4, [0, 1, 2, 3], [0, 1, 4, 5]),  # the earlier of equals is the better
        ([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 2, [0, 2], [0, 5]),
        ([INVALID, 3.0, INVALID, 2.0, 1.0, 4.0], 2, [1, 5], [4, 5]),  # the worst of those with a score
        ([INVALID, 3.0, INVALID, 2.0, 1.0, 4.0], 4, [1, 3, 4, 5], [1, 3, 4, 5]),
        ([INVALID, 3.0, INVALID, INVALID, 1.0, 4.0], 4, [0, 1, 4, 5], [0, 1, 4, 5]),  # too few: one without a score
    ],
)
def test_the_number_is_exact_and_what_has_no_score_comes_last(scores, share, best, extremes) -> None:
    assert kept(scores, share, "best") == best and kept(scores, share) == extremes


def test_extremes_of_each_root_and_odd_numbers() -> None:
    tree = Tree.from_parents([-1, -1, *[0] * 4, *[1] * 4], [0, 0, *[1] * 8], [0, 0, *[1.0] * 8], 2)
    best = Best({1: 4}, lambda tree, nodes, previews: previews[:, 0], "root", pick="extremes")
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0])[:, None]
    assert best.keep(tree, torch.arange(2, 10), values).nonzero().flatten().tolist() == [0, 3, 4, 7]
    with pytest.raises(ValueError, match="expected even numbers"):
        Selected(Chain(), {0: 3}, keep="extremes")
    with pytest.raises(ValueError, match="expected a multiple of 4 in place of 6"):
        replace(best, counts={1: 6}).keep(tree, torch.arange(2, 10), values)
    with pytest.raises(ValueError, match="expected at least 1, or 0"):
        Selected(Chain(), {0: 3}, preview_steps=-1)


@pytest.mark.parametrize(
    ("candidates", "correlation", "best", "std"),
    [(96, 1.0, 1.624, 1.676), (96, 0.933, 1.518, 1.602), (96, 0.0, 0.0, 0.968), (24, 1.0, 0.775, 0.970)],
)
def test_how_much_selection_spreads_the_rewards(candidates: int, correlation: float, best: float, std: float) -> None:
    """Sol-RL keeps the best and worst 12 by a preview that correlates so with the reward, both standard normal: the mean
    reward of those 12 that rank best by the preview, and the std of all 24. Rank correlation .927 is correlation .933."""
    random, groups = torch.Generator().manual_seed(0), 400
    reward, other = torch.randn(2, groups, candidates, generator=random, dtype=torch.float64)
    preview = correlation * reward + (1 - correlation**2) ** 0.5 * other
    tree = Tree.cat([chain(1, candidates)] * groups)
    rule = Best({0: 24}, lambda tree, nodes, previews: previews[:, 0], pick="extremes")
    stay = torch.ones(groups, candidates, dtype=torch.bool)
    if candidates > 24:
        stay = rule.keep(tree, torch.arange(groups * candidates), preview.reshape(-1, 1)).reshape(groups, candidates)
    assert stay.sum(1).eq(24).all()
    rewards, previews = reward[stay].reshape(groups, 24), preview[stay].reshape(groups, 24)
    top = rewards.gather(1, previews.argsort(1, descending=True)[:, :12])
    assert float(top.mean()) == pytest.approx(best, abs=0.02)
    assert float(rewards.std(1, correction=0).mean()) == pytest.approx(std, abs=0.02)


def test_each_assessment_keeps_the_paths_of_the_highest_potential() -> None:
    """Of 9 paths the 6 whose x̂0 at index 2 is largest, then of these the 3 at index 5; their end is that of a rollout of all."""
    topology, plan = grown(Chain(), 9, 4), Selected(Chain(), {2: 6, 5: 3})
    whole, done = Rolled(topology).forest, Rolled(topology, plan)
    sigmas, left = plain_sigmas(STEPS), done.forest.tree
    for group in range(4):
        paths = torch.arange(9)
        for index, count in plan.counts.items():
            states = whole.at(((topology.index == index) & (topology.group == group)).nonzero().flatten()[paths])
            estimate = states - sigmas[index].float() * curved(states, sigmas[index].float().expand(len(states)), paths)
            paths = paths[estimate[:, 0].argsort(descending=True)[:count].sort().values]
        leaves = left.leaves[left.group[left.leaves] == group]
        assert (left.root[leaves] - 9 * group).tolist() == paths.tolist()
    check_left(done.forest, whole)


@pytest.mark.parametrize(("group", "stay", "top"), [(2, 1, 0.56419), (4, 2, 0.66318), (8, 1, 1.42360)])
def test_selection_raises_the_expected_reward_by_its_closed_form(group: int, stay: int, top: float) -> None:
    """Data N(m, δ²), paths of an SDE with exact velocities, reward x. All is jointly normal, so of the best `stay` of `group` by x̂0 at
    step i the mean reward is E[x_T] + Cov(x_T, x_i) / std(x_i) · top, top being the mean of the best of as many standard normals; x̂0 grows
    with x_i. Against the recursion of the steps' own means and deviations."""
    (velocity, _), index, groups = gaussian_velocity(), 3, 600
    sigmas, kernel = plain_sigmas(6), FlowSDE(0.7)
    mean, variance, slope, std = 0.0, 1.0, 1.0, 0.0
    for step in range(6):
        at = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        level, following = (sigmas[i].double().expand(2) for i in (step, step + 1))
        law = kernel(at, velocity(at, level), level, following, TransitionContext(level=float(step < 5), step=step))
        offset, factor, noise = law.mean[0].item(), (law.mean[1] - law.mean[0]).item(), law.std[0].item()
        if step == index:
            std, slope = variance**0.5, 1.0
        mean, variance, slope = offset + factor * mean, factor**2 * variance + noise**2, factor * slope
    plan = Selected(Chain(), {index: stay})
    topology = Tree.cat([plan.tree(6, group, 0, generator(0))] * groups)
    noise_of = KeyedNoise(0, 0, list(range(groups)), (1,))
    finished = {}
    for name, select in (("all", None), ("best", plan.select(lambda tree, nodes, previews: previews[:, 0]))):
        forest = rollout(velocity, noise_of.start(topology), sigmas, topology, kernel, noise_of.step, select=select)
        finished[name] = forest.at(forest.tree.leaves)[:, 0]
    for name, expected in (("all", mean), ("best", mean + slope * std * top)):
        off = 4 * variance**0.5 / len(finished[name]) ** 0.5  # four standard errors, at most
        assert float(finished[name].mean()) == pytest.approx(expected, abs=off)
    assert slope * std * top > 0.2  # more than what is off


def test_a_cost_without_previews_has_none() -> None:
    assert Chain().forecast(10, 4) == Cost(40, 36, 36, 4, 0) and window(4, 2, 0, 1).cost().previews == 0
