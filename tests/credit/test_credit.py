"""Credit rules against hand-computed trees, telescoping sums and golden values."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowalign.advantage import Normalized, SignalContext
from flowalign.credit import (
    BranchLocal,
    Broadcast,
    EdgeValues,
    Gain,
    Joined,
    Process,
    ReturnToGo,
    SubtreeFusion,
    TurningPoint,
)
from samplers import (
    CPS,
    Chain,
    Deterministic,
    FlowSDE,
    Forest,
    KeyedNoise,
    Probed,
    Tree,
    chain,
    diffusers_sigmas,
    rollout,
    window,
)
from tests.helpers.trees import everywhere, grown, leaves_under, probed, split_tree, trunk


def credit(rule, forest: Forest, scores, valid=None):
    """(values [E], valid [E]) of one channel; `scores` are in the order of the leaves."""
    column = torch.as_tensor(scores, dtype=torch.float64)[:, None]
    got = rule.assign(forest, column, everywhere(column) if valid is None else valid[:, None], ("r",))
    assert got.channels == ("r",) and got.values.dtype == torch.float64
    return got.values[:, 0], got.valid[:, 0]


def leaf_scores(tree: Tree, values: dict[int, list[float]]) -> torch.Tensor:
    """Leaf scores of `probed` chains: values[root] = [V_0, V_1, …, V_n], V_n being the chain's own end."""
    scores = torch.full((len(tree.leaves),), torch.nan, dtype=torch.float64)
    for row, leaf in enumerate(tree.leaves.tolist()):
        node, steps = leaf, 0
        while tree.level[node] == 0 and tree.parent[node] >= 0:
            node = int(tree.parent[node])
        while node >= 0:
            steps += int(tree.level[node] > 0)
            node = int(tree.parent[node])
        scores[row] = values[int(tree.root[leaf])][steps]
    return scores


def by_step(forest: Forest, values: torch.Tensor, root: int = 0) -> list[float]:
    edges = forest.tree.edges
    return values[forest.tree.root[edges] == root].tolist()


# ---------------------------------------------------------------------------------------------- leaves


def test_fusion_without_beta_is_the_mean_of_the_leaves_and_of_the_children() -> None:
    forest = grown(split_tree(4, (0, 2)))
    tree, rewards = forest.tree, torch.tensor([1.0, 4.0, 10.0, 17.0])
    uniform, _ = credit(SubtreeFusion(), forest, rewards)
    assert torch.equal(uniform, credit(Broadcast(), forest, rewards)[0])
    assert uniform.tolist() == [2.5, 13.5, 2.5, 13.5, 1, 4, 10, 17, 1, 4, 10, 17]
    of_node = torch.zeros(len(tree)).double().index_put((tree.edges,), uniform)
    for node in tree.evaluated.tolist()[1:]:
        assert float(of_node[tree.parent == node].mean()) == pytest.approx(float(of_node[node]))


def test_fusion_weighs_leaves_by_their_path_probability() -> None:
    forest = grown(split_tree(4, (0, 2)))
    tree, rewards = forest.tree, torch.tensor([1.0, 4.0, 10.0, 17.0])
    got, _ = credit(SubtreeFusion(beta=2.0), forest, rewards)
    log_prob = forest.log_prob.double()
    for row, edge in enumerate(tree.edges.tolist()):  # by hand: climb from every leaf to the edge
        sums = []
        for leaf in leaves_under(tree, edge).tolist():
            node, total = leaf, 0.0
            while node != edge:
                total, node = total + float(log_prob[node]), int(tree.parent[node])
            sums.append(total)
        weights = torch.tensor(sums, dtype=torch.float64).mul(2.0).softmax(0)
        below = torch.isin(tree.leaves, leaves_under(tree, edge))
        assert float(got[row]) == pytest.approx(float(weights @ rewards.double()[below]), rel=1e-9)
    shifted = replace(forest, log_prob=forest.log_prob + 3.0)  # the same constant on every step
    torch.testing.assert_close(credit(SubtreeFusion(beta=2.0), shifted, rewards)[0], got, rtol=1e-5, atol=1e-6)
    one_hot, known = credit(SubtreeFusion(beta=1e6), forest, rewards)  # the likeliest leaf of each edge takes all
    assert bool(known.all()) and set(one_hot.tolist()) == {1.0, 4.0, 10.0, 17.0}
    ones = credit(SubtreeFusion(beta=2.0), forest, torch.ones(4))[0]
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_fused_reward_is_unbiased_for_the_value_of_its_node() -> None:
    """Two binary steps with known probabilities: the mean of R̄(first child) over all outcomes is Q(child)."""
    forest = grown(split_tree(2, (0, 1)))
    reward = {(0, 0): 1.0, (0, 1): 3.0, (1, 0): -2.0, (1, 1): 5.0}
    p_first, p_second = 0.3, 0.8  # probability of action 1
    expected = {a: (1 - p_second) * reward[a, 0] + p_second * reward[a, 1] for a in (0, 1)}
    total, mass = {0: 0.0, 1: 0.0}, {0: 0.0, 1: 0.0}
    for first, *below in itertools.product((0, 1), repeat=3):
        probability = (p_first if first else 1 - p_first) * np.prod([p_second if b else 1 - p_second for b in below])
        fused, _ = credit(SubtreeFusion(), forest, [reward[first, below[0]], reward[first, below[1]], 0.0, 0.0])
        total[first] += probability * float(fused[0])
        mass[first] += probability
    for action in (0, 1):
        assert total[action] / mass[action] == pytest.approx(expected[action])


@pytest.mark.parametrize("rule", [Broadcast(), SubtreeFusion(), SubtreeFusion(2.0)], ids=str)
def test_probes_are_no_samples(rule) -> None:
    """Chains with probes get the terminal reward of the chain, whatever the probes score and even if they have none."""
    forest = grown(probed(5, 2))
    states = {0: [9.0, 8.0, 7.0, 6.0, 1.0], 1: [-9.0, -8.0, -7.0, -6.0, 4.0]}
    scores = leaf_scores(forest.tree, states)
    ends = torch.isin(scores, torch.tensor([1.0, 4.0], dtype=torch.float64))
    for valid in (torch.ones_like(ends), ends):
        got, known = credit(rule, forest, scores, valid)
        assert bool(known.all())
        np.testing.assert_allclose(by_step(forest, got, 0), [1.0] * 4)
        np.testing.assert_allclose(by_step(forest, got, 1), [4.0] * 4)


def test_an_edge_is_valid_only_if_all_leaves_below_are() -> None:
    forest = grown(split_tree(4, (0, 2)))
    valid = torch.tensor([True, False, True, True])
    for rule in (Broadcast(), SubtreeFusion(), SubtreeFusion(0.5)):
        values, known = credit(rule, forest, [1.0, float("nan"), 2.0, 3.0], valid)
        assert known.tolist() == [False, True, False, True, True, False, True, True, True, False, True, True]
        assert bool(values.isfinite().all())


def test_a_branch_is_credited_with_its_own_leaf() -> None:
    """TempFlow-GRPO with R = x_T of a linear world: the credit follows the noise of that one step."""
    forest = grown(trunk(4, 2, 3), width=1)
    tree = forest.tree
    rewards = forest.at(tree.leaves)[:, 0].double()
    got, known = credit(BranchLocal(), forest, rewards)
    assert bool(known.all()) and len(got) == 2 * 3 * 3
    for edge, value in zip(tree.edges.tolist(), got.tolist(), strict=True):
        (leaf,) = leaves_under(tree, edge).tolist()
        assert value == float(forest.at(torch.tensor([leaf]))[0, 0])


def test_where_nothing_is_completed_the_error_names_probes() -> None:
    forest = grown(chain(3, 2, train_last=True))
    for rule in (Gain(), TurningPoint()):
        with pytest.raises(ValueError, match=r"wrap the plan in samplers\.Probed"):
            credit(rule, forest, [1.0, 2.0])


# ---------------------------------------------------------------------------------------------- gains


def test_gains_telescope() -> None:
    forest = grown(probed(6, 3))
    scores = torch.randn(len(forest.tree.leaves), generator=torch.Generator().manual_seed(0)).double()
    gain, known = credit(Gain(), forest, scores)
    assert bool(known.all()) and len(gain) == 3 * 5
    value, _ = credit(Gain("value"), forest, scores)
    by_hand = [[1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [0.0] * 6, [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]]
    scores = leaf_scores(forest.tree, dict(enumerate(by_hand)))
    gain, _ = credit(Gain(), forest, scores)
    value, _ = credit(Gain("value"), forest, scores)
    for root, states in enumerate(by_hand):
        assert by_step(forest, gain, root) == np.diff(states).tolist()
        assert by_step(forest, value, root) == states[1:]
        assert sum(by_step(forest, gain, root)) == states[-1] - states[0]


def test_gain_of_a_linear_reward_is_the_noise_that_the_step_added() -> None:
    """Constant velocity, R = x_T: ΔR_i = (α_i − 1) x_i + (b_i + h_i) v + s_i z_i = x_{i+1} − (x_i − h_i v)."""
    forest = grown(probed(5, 2), width=1)
    tree, edges = forest.tree, forest.tree.edges
    rewards = torch.zeros(len(tree.leaves)).double()
    constant = 0.7
    for row, leaf in enumerate(tree.leaves.tolist()):  # the completion of a state under the constant velocity
        node = leaf
        while tree.level[node] == 0 and tree.parent[node] >= 0:
            node = int(tree.parent[node])
        here = torch.tensor([node])
        rewards[row] = float(forest.at(here)) - constant * float(forest.sigma(here))
    gain, _ = credit(Gain(), forest, rewards)
    left, h = tree.parent[edges], forest.sigma(tree.parent[edges]) - forest.sigma(edges)
    expected = forest.at(edges)[:, 0] - (forest.at(left)[:, 0] - h * constant)
    torch.testing.assert_close(gain, expected.double(), rtol=0, atol=1e-6)


def test_without_noise_no_step_gains_anything() -> None:
    """The completion of a state is then the sample itself: all gains are 0, and so are their advantages."""
    forest = grown(probed(6, 3), CPS(0.0))
    ends = forest.at(forest.tree.leaves)
    gain, known = credit(Gain(), forest, ends.square().sum(1).double())
    assert bool(known.all()) and float(gain.abs().max()) < 1e-6
    values = EdgeValues(gain[:, None], known[:, None], ("r",))
    compared = Normalized(within="prompt_step").compare(forest, values, SignalContext())
    assert not bool(compared.values.any()) and compared.zero_std_ratio == 1


def test_a_gain_needs_both_scores() -> None:
    forest = grown(probed(4, 1))
    scores = leaf_scores(forest.tree, {0: [1.0, 2.0, 4.0, 8.0]})
    bad = scores == 2.0
    gain, known = credit(Gain(), forest, torch.where(bad, torch.nan, scores), ~bad)
    assert known.tolist() == [False, False, True] and gain.tolist() == [0, 0, 4]
    assert credit(Gain("value"), forest, scores, ~bad)[1].tolist() == [False, True, True]


@pytest.mark.parametrize("sign", [1, -1], ids=["", "mirrored"])
@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([0.50, 0.40, 0.70, 0.80], [-0.1, 0.4, 0.1]),  # step 1 turns up
        ([0.5, 0.6, 0.4, 0.3], [0.1, -0.3, -0.1]),  # step 1 turns down
        ([0.0, 0.1, 0.3, 0.6], [0.6, 0.2, 0.3]),  # first-step bonus; no later step turns
        ([0.0, 0.0, 0.3, 0.6], [0.0, 0.3, 0.3]),  # a tie has no direction
        ([0.5, 0.4, 0.7, 0.6], [-0.1, 0.3, -0.1]),  # step 1 turns, but what comes after it does not go on
        ([1.0, 0.2, 0.1, 0.4, 0.5], [-0.8, -0.1, 0.3, 0.1]),  # step 2 goes on, but against V_n − V_0
    ],
)
def test_turning_points_golden(states: list[float], expected: list[float], sign: int) -> None:
    forest = grown(probed(len(states), 1))
    scores = sign * leaf_scores(forest.tree, {0: states})
    got, _ = credit(TurningPoint(), forest, scores)
    np.testing.assert_allclose(by_step(forest, got), [sign * r for r in expected], atol=1e-12)
    plain, _ = credit(TurningPoint(first_step=False), forest, scores)
    assert plain[0] == credit(Gain(), forest, scores)[0][0]


def test_without_turning_points_tp_grpo_is_dense_grpo() -> None:
    forest = grown(probed(4, 2))
    scores = leaf_scores(forest.tree, {0: [0.0, 0.1, 0.2, 0.4], 1: [0.0, 0.3, 0.2, -0.1]})
    got, _ = credit(TurningPoint(first_step=False), forest, scores)
    dense, _ = credit(Gain(), forest, scores)
    assert by_step(forest, got, 0) == by_step(forest, dense, 0)
    assert sum(by_step(forest, got, 0)) == pytest.approx(0.4)
    assert by_step(forest, got, 1)[1] == pytest.approx(-0.4)  # the second sample does turn


def test_turning_points_are_balanced_over_the_batch_by_their_own_size() -> None:
    """Two positive ones (.40 and .10) and one negative (−.30): the smaller positive one falls back to its gain."""
    forest = grown(probed(4, 3))
    scores = leaf_scores(forest.tree, {0: [0.5, 0.4, 0.7, 0.8], 1: [0.5, 0.6, 0.4, 0.3], 2: [0.5, 0.48, 0.56, 0.58]})
    all_of_them, _ = credit(TurningPoint(balanced=False), forest, scores)
    balanced, _ = credit(TurningPoint(), forest, scores)
    turned = [float(by_step(forest, all_of_them, root)[1]) for root in range(3)]
    assert turned == pytest.approx([0.4, -0.3, 0.1])
    assert [by_step(forest, balanced, root)[1] for root in range(3)] == pytest.approx([0.4, -0.3, 0.08])
    valid = torch.isin(forest.tree.root[forest.tree.leaves], torch.tensor([0, 2]))
    one_sign, _ = credit(TurningPoint(), forest, scores, valid)  # the negative one is masked: only one sign is left
    assert [by_step(forest, one_sign, root)[1] for root in (0, 2)] == pytest.approx([0.4, 0.1])


def test_turning_points_of_all_prompts_are_balanced_together() -> None:
    """Two up in one prompt, one down in another: each prompt alone has one sign and would keep all of its own."""
    up, down = {0: [0.5, 0.4, 0.7, 0.8], 1: [0.5, 0.48, 0.56, 0.58]}, {0: [0.5, 0.6, 0.4, 0.3], 1: [0.1, 0.1, 0.1, 0.1]}
    both = grown(Tree.cat([probed(4, 2), probed(4, 2)]))
    assert both.tree.num_groups == 2
    joined, _ = credit(TurningPoint(), both, leaf_scores(both.tree, up | {2: down[0], 3: down[1]}))
    assert [by_step(both, joined, root)[1] for root in range(3)] == pytest.approx([0.4, 0.08, -0.3])
    alone = grown(probed(4, 2))
    kept, _ = credit(TurningPoint(), alone, leaf_scores(alone.tree, up))
    assert [by_step(alone, kept, root)[1] for root in range(2)] == pytest.approx([0.4, 0.1])


def test_the_value_of_the_start_is_that_of_the_same_start_noise() -> None:
    """V_0 completes the very state that the chain leaves: bit for bit the sample of an ODE plan with the same keys."""
    noise = KeyedNoise(3, 5, [7], (3,))

    def rolled(plan) -> Forest:
        tree = plan.tree(5, 4, 0, np.random.default_rng(0))
        return rollout(lambda x, s, r: -0.3 * x, noise.start(tree), diffusers_sigmas(5), tree, FlowSDE(), noise.step)

    chains, deterministic = rolled(Probed(Chain())), rolled(Deterministic())
    starts = chains.tree.completion(torch.arange(4))
    assert bool(chains.tree.probe[starts].all())
    torch.testing.assert_close(chains.at(starts), deterministic.at(deterministic.tree.leaves), rtol=0, atol=0)


def test_a_masked_turning_point_takes_no_place_in_the_balance() -> None:
    forest = grown(probed(4, 3))
    states = {0: [0.5, 0.4, 0.7, 0.8], 1: [0.5, 0.6, 0.4, -0.3], 2: [0.5, 0.48, 0.56, 0.58]}
    scores = leaf_scores(forest.tree, states)
    start = (scores == 0.5) & (forest.tree.root[forest.tree.leaves] == 1)
    got, known = credit(TurningPoint(), forest, scores, ~start)
    assert not any(by_step(forest, known, 1))
    assert [by_step(forest, got, root)[1] for root in (0, 2)] == pytest.approx([0.4, 0.1])


def test_turning_points_need_the_start_and_the_end() -> None:
    forest = grown(probed(5, 1))
    scores = leaf_scores(forest.tree, {0: [0.0, 1.0, 3.0, 2.0, 5.0]})
    start, middle = scores == 0.0, scores == 3.0
    assert not bool(credit(TurningPoint(), forest, scores, ~start)[1].any())
    assert credit(TurningPoint(), forest, scores, ~middle)[1].tolist() == [True, False, False, False]
    with pytest.raises(ValueError, match="needs chains"):
        credit(TurningPoint(), grown(split_tree(4, (0, 2))), torch.zeros(4))


# ---------------------------------------------------------------------------------------------- states and sums


def test_process_scores_before_after_and_their_difference() -> None:
    forest = grown(chain(4, 1))
    forest = forest.with_scores("prm", torch.tensor([1.0, 2.0, 4.0, torch.nan, torch.nan]))
    for timing, expected, known in (
        ("pre", [1, 2, 4], [True, True, True]),
        ("post", [2, 4, 0], [True, True, False]),
        ("gain", [1, 2, 0], [True, True, False]),
    ):
        got = Process("prm", timing).assign(forest, torch.zeros(1, 1), everywhere(torch.zeros(1, 1)), ("r",))
        assert got.channels == ("prm",)
        assert got.values[:, 0].tolist() == expected and got.valid[:, 0].tolist() == known
    later = Process("prm", "pre", start=1).assign(forest, torch.zeros(1, 1), everywhere(torch.zeros(1, 1)), ("r",))
    assert later.valid[:, 0].tolist() == [False, True, True] and later.values[:, 0].tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match="start=-1"):
        Process("prm", start=-1)
    with pytest.raises(ValueError, match=r"this rollout has: \['prm'\]"):
        credit(Process("other"), forest, [1.0])


def test_return_to_go_of_gains_is_the_rest_of_the_way() -> None:
    forest = grown(probed(5, 2))
    states = {0: [1.0, 2.0, 0.5, 3.0, 7.0], 1: [0.0, -1.0, 4.0, 4.0, 2.0]}
    scores = leaf_scores(forest.tree, states)
    got, known = credit(ReturnToGo(Gain()), forest, scores)
    assert bool(known.all())
    for root, v in states.items():
        assert by_step(forest, got, root) == pytest.approx([v[-1] - v[k] for k in range(4)])
    half, _ = credit(ReturnToGo(Gain(), discount=0.5), forest, scores)
    assert by_step(forest, half, 0)[2:] == pytest.approx([2.5 + 0.5 * 4.0, 4.0])
    bad = scores == 7.0
    assert not bool(credit(ReturnToGo(Gain()), forest, scores, ~bad)[1][:1].any())


def test_return_to_go_averages_over_branches() -> None:
    forest = grown(split_tree(2, (1,)))  # one step, then two branches
    got, _ = credit(ReturnToGo(Broadcast()), forest, [2.0, 6.0])
    assert got.tolist() == [4.0 + 0.5 * (2.0 + 6.0), 2.0, 6.0]


def test_joined_credits_stand_side_by_side() -> None:
    forest = grown(chain(4, 2)).with_scores("prm", torch.arange(10.0))
    rule = Joined({"outcome": Broadcast(), "process": Process("prm")})
    scores = torch.tensor([[1.0, 5.0], [2.0, 6.0]])
    got = rule.assign(forest, scores, everywhere(scores), ("ocr", "hps"))
    assert got.channels == ("outcome/ocr", "outcome/hps", "process/prm")
    assert torch.equal(got.values[:, :2], Broadcast().assign(forest, scores, everywhere(scores), ("a", "b")).values)
    assert torch.equal(got.values[:, 2], forest.tree.edges.double())


def test_one_credit_is_not_joined_with_anything() -> None:
    with pytest.raises(ValueError, match="at least two credits"):
        Joined({"outcome": Broadcast()})


def test_a_prefix_without_an_end_of_its_own_has_no_value() -> None:
    forest = grown(window(5, 3, 1, 2))
    with pytest.raises(ValueError, match=r"wrap the plan in samplers\.Probed"):
        credit(Gain(), forest, [1.0, 2.0, 3.0])
    values, known = credit(Gain("value"), forest, [1.0, 2.0, 3.0])
    assert known.tolist() == [False] * 3 + [True] * 3 and values.tolist() == [0, 0, 0, 1, 2, 3]
