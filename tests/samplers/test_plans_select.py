"""Selection on the way: exact costs, unchanged noise, equal numbers; and where random steps and windows lie."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from samplers import (
    Best,
    Bounded,
    Branch,
    Chain,
    Cost,
    FlowSDE,
    Forest,
    KeyedNoise,
    Probed,
    RandomSteps,
    Select,
    Selected,
    Sliding,
    SplitTree,
    Tree,
    Window,
    branch,
    candidates,
    chain,
    compressed,
    generator,
    plain_sigmas,
    probed,
    rollout,
    sampled,
    tree,
    window,
)


def roll(topology: Tree, select: Select | None = None, micro: int | None = None) -> Forest:
    noise = KeyedNoise(0, 0, list(range(topology.num_groups)), (3,))
    return rollout(
        lambda x, s, r: 0.3 * x, noise.start(topology), plain_sigmas(topology.num_steps), topology, FlowSDE(), noise.step,
        micro_batch=micro, select=select,
    )  # fmt: skip


def first_element(topology: Tree, nodes: torch.Tensor, previews: torch.Tensor) -> torch.Tensor:
    return previews[:, 0]


def same_where_left(small: Forest, large: Forest) -> None:
    """Each node of the pruned forest is the node of the unpruned one with its (group, local), bit for bit."""
    place = {
        (g, n): i for i, (g, n) in enumerate(zip(large.tree.group.tolist(), large.tree.local.tolist(), strict=True))
    }
    twin = torch.tensor([place[key] for key in zip(small.tree.group.tolist(), small.tree.local.tolist(), strict=True)])
    inner = small.tree.parent >= 0
    assert torch.equal(twin[small.tree.parent[inner]], large.tree.parent[twin[inner]])
    for name in ("index", "level", "root", "source"):
        assert torch.equal(vars(small.tree)[name], vars(large.tree)[name][twin])
    nodes = small.kept.nonzero().flatten()
    assert torch.equal(small.at(nodes), large.at(twin[nodes]))
    assert torch.equal(small.log_prob.nan_to_num(7), large.log_prob[twin].nan_to_num(7))


def test_keep_takes_all_below_and_all_that_leads_nowhere() -> None:
    #   0 ─ 1 ─ 3 ─ 6      2, 5 and 8 form the second root-to-leaf way; 4 has one child, 7
    #   └ 2 ─ 5 ─ 8  └ 4 ─ 7
    topology = Tree.from_parents([-1, 0, 0, 1, 1, 2, 3, 4, 5], [0, 1, 1, 2, 2, 2, 3, 3, 3], [0] + [1] * 8, 3)
    mask = torch.ones(9, dtype=torch.bool)
    mask[4] = False
    assert topology.keep(mask).local.tolist() == [0, 1, 2, 3, 5, 6, 8]
    assert topology.keep(mask).parent.tolist() == [-1, 0, 0, 1, 2, 3, 4]
    mask[3] = False  # now node 1 leads nowhere
    assert topology.keep(mask).local.tolist() == [0, 2, 5, 8]
    mask[2] = False
    with pytest.raises(ValueError, match="at least one leaf"):
        topology.keep(mask)
    with pytest.raises(ValueError, match="one per node"):
        topology.keep(mask[:3])


def test_dropped_roots_stay_without_children() -> None:
    topology = chain(4, 3)
    pruned = topology.keep(topology.local != 1)
    assert pruned.num_roots == 3 and pruned.cost() == chain(4, 2).cost()
    assert KeyedNoise(0, 0, [5], (2,)).start(pruned).equal(KeyedNoise(0, 0, [5], (2,)).start(topology))


def test_best_of_n_starts() -> None:
    both = Tree.cat([chain(6, 5), chain(6, 5)])
    forest, whole = roll(both, Best({2: 2}, first_element, preview_steps=0)), roll(both)
    assert (
        forest.evaluations
        == 2 * (5 * 2 + 2 * 4)
        == 2 * Selected(Chain(), {2: 2}, preview_steps=0).forecast(6, 5).rollout
    )
    same_where_left(forest, whole)
    for group in range(2):
        there = ((both.index == 2) & (both.group == group)).nonzero().flatten()
        best = both.local[there[whole.at(there)[:, 0].argsort(descending=True)[:2]]]
        left = forest.tree.local[(forest.tree.index == 2) & (forest.tree.group == group)]
        assert sorted(left.tolist()) == sorted(best.tolist())


def beam(steps: int, width: int, factor: int, splits: int) -> Cost:
    """Path search by hand: `factor` children of each of `width` survivors at each of the first splits, best kept."""
    rows, survivors = 0, 1
    for step in range(steps):
        rows += survivors
        if step < splits:
            survivors = min(width, survivors * factor)
    return Cost(rows, -1, -1, survivors)


@pytest.mark.parametrize(("width", "factor"), [(1, 2), (2, 2), (2, 3), (3, 3)])
def test_path_search_costs_what_it_says(width: int, factor: int) -> None:
    plan = Selected(SplitTree((0, 1, 2), factor), {i: min(width, factor**i) for i in (1, 2, 3)}, preview_steps=0)
    cost, by_hand = plan.forecast(6, factor**3), beam(6, width, factor, 3)
    assert (cost.rollout, cost.leaves) == (by_hand.rollout, by_hand.leaves)
    whole = plan.tree(6, factor**3, 0, generator(0))
    forest = roll(Tree.cat([whole, whole]), plan.select(first_element), micro=4)
    assert forest.evaluations == 2 * cost.rollout and len(forest.tree.leaves) == 2 * cost.leaves
    # where the best come from tells how many of the edges above lead on: at most the forecast of any one winner
    assert forest.tree.cost().rollout <= forest.evaluations
    same_where_left(forest, roll(Tree.cat([whole, whole])))


@pytest.mark.parametrize("plan", [Chain(), Probed(Chain())])
def test_what_a_score_looks_at_is_evaluated_once(plan: Bounded) -> None:
    chosen, blind = Selected(plan, {2: 2}), Selected(plan, {2: 2}, preview_steps=0)
    topology, sigma = chosen.tree(6, 5, 0, generator(0)), plain_sigmas(6)[2]
    states: list[torch.Tensor] = []

    def of_states(topology: Tree, nodes: torch.Tensor, previews: torch.Tensor) -> torch.Tensor:
        states.append(previews)
        return previews[:, 0]

    def of_previews(topology: Tree, nodes: torch.Tensor, previews: torch.Tensor) -> torch.Tensor:
        assert torch.equal(previews, states[0] - sigma * (0.3 * states[0]))
        return previews[:, 0]

    without = roll(topology, blind.select(of_states))
    forest = roll(topology, chosen.select(of_previews), micro=4)
    assert forest.evaluations == chosen.forecast(6, 5).rollout == without.evaluations + 3
    same_where_left(forest, without)  # x - 0.3·σ·x orders as x does


def test_probes_of_dropped_states_are_never_computed() -> None:
    plan = Selected(Probed(SplitTree((0,), 4)), {1: 2}, preview_steps=0)
    cost = plan.forecast(5, 4)
    probes = 4 + 2 * (
        3 + 2 + 1
    )  # of the root; of the states 1, 2, 3 of both survivors, their own velocities being shared
    assert cost.rollout == 1 + 2 * 4 + probes
    topology = plan.tree(5, 4, 0, generator(0))
    forest = roll(topology, plan.select(first_element))
    assert forest.evaluations == cost.rollout and forest.tree.cost() == replace(cost, previews=0) and cost.previews == 4
    same_where_left(forest, roll(topology))
    assert bool((forest.tree.completion(forest.tree.edges) >= 0).all())
    trained_part = candidates(topology)
    assert bool(trained_part[topology.edges].all()) and not bool(
        trained_part[(topology.level == 0) & (topology.index == 1)].any()
    )


@pytest.mark.parametrize(
    ("plain", "group"), [(Chain(), 3), (Window(2, 1, 4), 3), (SplitTree((0, 2), 2), 4), (SplitTree((1,), 3, window=1, low=2, high=3), 3)]
)  # fmt: skip
def test_probes_are_no_samples(plain: Bounded, group: int) -> None:
    rng = generator(0)
    assert sampled(plain.tree(5, group, 0, rng)).all() and len(plain.tree(5, group, 0, rng).leaves) == group
    whole = Probed(plain).tree(5, group, 0, rng)
    assert int(sampled(whole).sum()) == group < len(whole.leaves)
    assert sampled(branch(5, 2, 3)).all() and sampled(compressed(chain(5, 3), 0.5)).all()


def test_shares_are_equal_where_asked() -> None:
    topology = tree(4, (0, 1), 3, train_last=True)
    forest = roll(topology, Best({2: 3}, first_element, "parent"))
    assert forest.tree.parent[forest.tree.index == 2].bincount().tolist()[-3:] == [1, 1, 1]
    anywhere = roll(topology, Best({2: 3}, lambda t, n, x: -t.local[n].double(), "group"))
    assert len(anywhere.tree.parent[anywhere.tree.index == 2].unique()) == 1
    with pytest.raises(ValueError, match="multiple"):
        roll(topology, Best({2: 4}, first_element, "parent"))
    with pytest.raises(ValueError, match="expected at most 3"):
        roll(topology, Best({2: 12}, first_element, "parent"))


class Own:
    """A selection rule that a user writes."""

    def __init__(self, counts, rule) -> None:
        self.counts, self._rule = counts, rule

    preview_steps = 0

    def keep(self, topology, nodes, previews):
        return self._rule(nodes)


def test_a_rule_is_held_to_its_counts() -> None:
    both = Tree.cat([window(5, 3, 1, 2), window(5, 3, 1, 2)])
    uneven = Own({2: 2}, lambda nodes: torch.arange(len(nodes)) < 4)  # three of one group, one of the other
    with pytest.raises(ValueError, match=r"expected 2 in each"):
        roll(both, uneven)
    free = roll(both, Own({2: None}, lambda nodes: torch.arange(len(nodes)) < 4))
    assert free.tree.group[free.tree.leaves].bincount().tolist() == [3, 1]
    with pytest.raises(ValueError, match="at least one"):
        roll(both, Own({2: None}, lambda nodes: torch.arange(len(nodes)) < 3))
    with pytest.raises(ValueError, match=r"torch.bool\[6\]"):
        roll(both, Own({2: 1}, lambda nodes: nodes))
    with pytest.raises(ValueError, match="6 of them nan or inf"):
        roll(both, Best({2: 2}, lambda t, n, x: x[:, 0] * math.nan))


def test_what_cannot_be_selected_is_refused() -> None:
    with pytest.raises(ValueError, match="unequal subtrees"):
        Selected(Branch(2), {2: 1}).forecast(6, 4)
    with pytest.raises(ValueError, match="candidates are of the generations"):
        roll(window(6, 3, 0, 2), Best({4: 1}, first_element))  # only deterministic tails are there
    with pytest.raises(ValueError, match="at least one"):
        Selected(Chain(), {})
    with pytest.raises(ValueError, match="within"):
        Selected(Chain(), {1: 1}, "batch")  # type: ignore[arg-type]


def test_selection_does_not_change_log_probs_or_replay() -> None:
    forest = roll(probed(branch(5, 3, 2)), Own({0: None}, lambda nodes: torch.tensor([True, False, True])))
    edges = forest.tree.edges
    parents, position = forest.tree.distinct_parents(edges)
    step = forest.edge_steps(edges, 0.3 * forest.at(parents), position)
    torch.testing.assert_close(step.log_prob(forest.at(edges)), forest.log_prob[edges])
    assert forest.tree.num_roots == 3 and set(forest.tree.root[edges].tolist()) == {0, 2}


# ---------------------------------------------------------------------------------------------- where steps lie


def test_random_steps_are_drawn_evenly_and_from_the_generator_alone() -> None:
    plan = RandomSteps(2, (1, 2, 5))
    drawn = [frozenset(plan.tree(8, 2, m, generator(0, "select", m)).edges.tolist()) for m in range(300)]
    assert len(set(drawn)) == 3 and all(drawn.count(each) > 70 for each in set(drawn))
    assert torch.equal(plan.tree(8, 2, 0, generator(4)).level, plan.tree(8, 2, 9, generator(4)).level)
    assert RandomSteps(None).tree(8, 2, 0, generator(0)).cost() == chain(8, 2, shared_start=True).cost()
    some = Branch(3, 2, (0, 2, 4)).tree(8, 6, 0, generator(1))
    assert some.cost().edges == 12 and set(some.index[some.parents_of_edges].tolist()) < {0, 2, 4}
    for bad in (lambda: RandomSteps(4, (1, 2)).forecast(8, 2), lambda: RandomSteps(1, (8,)).forecast(8, 2),
                lambda: RandomSteps(0), lambda: RandomSteps(1, (1, 1))):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            bad()


def state_machine(plan: Sliding, low: int, high: int, size: int, iterations: int) -> list[int]:
    """MixGRPO's progression (2507.21802, code), one iteration after the other, with windows of full size."""
    at, spent, out, l_max = low, 0, [], high - 1
    for _ in range(iterations):
        out.append(at)
        spent += 1
        fewest = plan.every_min or max(1, plan.every // 4)
        duration = {
            "constant": plan.every,
            "decay": max(fewest, int(plan.every * (1 - at / l_max) + fewest * at / l_max + 1e-9)),
            "exp_decay": math.ceil(plan.every * math.exp(-plan.rate * max(0, at - plan.threshold))),
        }[plan.strategy]
        if spent == duration:
            spent = 0
            at = at + plan.stride if at + plan.stride <= high - size else (low if plan.roll_back else at)
    return out


@pytest.mark.parametrize("strategy", ["constant", "decay", "exp_decay"])
@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("roll_back", [False, True])
def test_sliding_windows_follow_the_state_machine(strategy: str, stride: int, roll_back: bool) -> None:
    plan = Sliding(10, stride, roll_back, strategy, every_min=1, threshold=5)  # type: ignore[arg-type]
    for each in (plan, replace(plan, every_min=None)):
        for low, high, size in ((0, 24, 4), (2, 24, 4), (0, 9, 3), (0, 3, 3), (0, 1, 1)):
            stateless = [each.start(m, low, high, size, np.random.default_rng(0)) for m in range(600)]
            assert stateless == state_machine(each, low, high, size, 600) if high > 1 else [0] * 600


def test_a_decaying_window_lasts_as_long_as_in_mix_grpos_code() -> None:
    """T = 25: l_max = 23. τ_max = 10 and τ_min = 1 (its script), then τ = 25 and the default τ_min = 6."""
    script = [10, 9, 9, 8, 8, 8, 7, 7, 6, 6, 6, 5, 5, 4, 4, 4, 3, 3, 2, 2, 2, 1, 1, 1]
    default = [25, 24, 23, 22, 21, 20, 20, 19, 18, 17, 16, 15, 15, 14, 13, 12, 11, 10, 10, 9, 8, 7, 6, 6]
    assert [Sliding(10, strategy="decay", every_min=1).duration(at, 24) for at in range(24)] == script
    assert [Sliding(25, strategy="decay").duration(at, 24) for at in range(24)] == default
    plan = Window(4, position=Sliding(10, strategy="decay", every_min=1))
    starts = []
    for iteration in range(130):
        topology = plan.tree(25, 2, iteration, np.random.default_rng(0))
        trained = (topology.index[topology.edges] - 1).unique()
        assert len(trained) == 4  # never shorter, at the end neither
        starts.append(int(trained[0]))
    assert [starts.count(at) for at in range(20)] == script[:20] and starts[-1] == 20


def test_the_window_of_mix_grpo_as_a_plan() -> None:
    plan = Window(4, position=Sliding(every=25))
    for iteration, start in ((0, 0), (24, 0), (25, 1), (299, 11)):
        topology = plan.tree(25, 12, iteration, np.random.default_rng(0))
        assert sorted((topology.index[topology.edges] - 1).unique().tolist()) == list(range(start, start + 4))


def test_the_rollouts_own_velocities_are_kept_for_what_is_left() -> None:
    both, scale = Tree.cat([branch(5, 3, 2), branch(5, 3, 2)]), torch.arange(1, 7) / 10
    noise = KeyedNoise(0, 0, [0, 1], (3,))

    def kept(select: Select | None) -> Forest:
        return rollout(
            lambda x, s, r: scale[r][:, None] * x, noise.start(both), plain_sigmas(5), both, FlowSDE(), noise.step,
            micro_batch=3, select=select, keep_velocities=True,
        )  # fmt: skip

    for forest in (kept(None), kept(Best({1: 2}, first_element))):
        tree = forest.tree
        nodes = tree.parents_of_edges
        assert torch.equal(forest.velocities["old"].at(nodes), scale[tree.root[nodes]][:, None] * forest.at(nodes))
        step = forest.role_steps("old", tree.edges)
        assert torch.equal(step.log_prob(forest.at(tree.edges)), forest.log_prob[tree.edges])
