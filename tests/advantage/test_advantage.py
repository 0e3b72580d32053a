"""Advantages against golden values, mixes by hand, and what masking must not change."""

import numpy as np
import pytest
import torch

from flowalign.advantage import Asymmetric, Mixed, Normalized, PerChannel, SignalContext, VarianceGated
from flowalign.credit import BranchLocal, Broadcast, EdgeValues, Gain, ReturnToGo, SubtreeFusion, TurningPoint
from rewards import RewardBatch, RewardOutput, WithTimeout, score
from samplers import Forest, Tree, chain, window
from tests.helpers.plain_rewards import Plain, batch_of, brightness
from tests.helpers.trees import everywhere, grown, probed, split_tree, trunk


def side_by_side(*groups: int) -> Forest:
    """One stochastic step per sample, groups of the given sizes."""
    return grown(Tree.cat([window(3, size, 1, 1) for size in groups]))


def given(*columns, valid=None, channels=("a", "b", "c")) -> EdgeValues:
    values = torch.tensor(np.array(columns), dtype=torch.float64).T
    return EdgeValues(values, everywhere(values) if valid is None else torch.tensor(valid).T, channels[: len(columns)])


def column(advantages) -> list[float]:
    return advantages.values[:, 0].tolist()


# ---------------------------------------------------------------------------------------------- z-scores


def test_every_step_of_a_chain_counts_its_sample_once() -> None:
    """A chain of nine steps repeats each reward nine times: mean, unbiased std and trimming are those of the samples."""
    rewards = [1.0, 2.0, 3.0, 6.0]
    forest = grown(chain(10, 4))
    of_edge = given([rewards[root] for root in forest.tree.root[forest.tree.edges].tolist()])
    unbiased = Normalized(unbiased=True, delta=0).compare(forest, of_edge, SignalContext()).values[:, 0]
    expected = (np.array(rewards) - 3) / np.std(rewards, ddof=1)
    np.testing.assert_allclose(unbiased, expected[forest.tree.root[forest.tree.edges]], rtol=1e-6)
    trimmed = (
        Normalized(trim=0.3, delta=0).compare(forest, of_edge, SignalContext()).values[:, 0]
    )  # int(0.3·4) = the worst one
    expected = (np.array(rewards) - np.mean(rewards[1:])) / np.std(rewards[1:])
    np.testing.assert_allclose(trimmed, expected[forest.tree.root[forest.tree.edges]], rtol=1e-6)


def test_trimming() -> None:
    forest, rewards = side_by_side(5), np.array([1.0, -100.0, 2.0, 3.0, 50.0])
    low = column(Normalized(trim=0.2, delta=0, clip=1e9).compare(forest, given(rewards), SignalContext()))
    np.testing.assert_allclose(low, (rewards - rewards[[0, 2, 3, 4]].mean()) / rewards[[0, 2, 3, 4]].std(), rtol=1e-6)
    both = column(
        Normalized(trim=0.2, trim_side="both", delta=0, clip=1e9).compare(forest, given(rewards), SignalContext())
    )
    np.testing.assert_allclose(both, (rewards - 2) / np.std([1, 2, 3]), rtol=1e-6)
    last, middle = (Normalized(unbiased=True, trim=0.34, trim_side=side, delta=0, clip=1e9) for side in ("low", "both"))
    got = column(
        last.compare(side_by_side(3), given([0.0, 1.0, 3.0]), SignalContext())
    )  # mean and std of 1 and 3: 2 and √2
    np.testing.assert_allclose(got, (np.array([0.0, 1.0, 3.0]) - 2) / 2**0.5, rtol=1e-6)
    got = column(middle.compare(side_by_side(5), given([0.0, 1.0, 3.0, 4.0, 50.0]), SignalContext()))
    np.testing.assert_allclose(
        got, (np.array([0.0, 1.0, 3.0, 4.0, 50.0]) - 8 / 3) / np.std([1, 3, 4], ddof=1), rtol=1e-6
    )
    assert column(Normalized(trim=0.19).compare(forest, given(rewards), SignalContext())) == column(
        Normalized().compare(forest, given(rewards), SignalContext())
    )
    with pytest.raises(ValueError, match="below 0"):
        Normalized(trim=0.5, trim_side="both")


def test_per_prompt_advantages_do_not_know_the_scale_of_the_reward() -> None:
    forest, rewards = side_by_side(3, 3), np.array([1.0, 5.0, 2.0, 7.0, 7.5, 9.0])
    plain, moved = (
        Normalized(delta=0).compare(forest, given(r), SignalContext()).values for r in (rewards, 30 * rewards - 4)
    )
    torch.testing.assert_close(plain, moved)
    assert float(plain[:3].sum().abs()) < 1e-6 and float(plain[:3].square().mean()) == pytest.approx(1, rel=1e-6)


def test_with_the_std_of_the_batch_only_the_scale_of_the_whole_batch_is_unknown() -> None:
    forest, rewards = side_by_side(3, 3), np.array([1.0, 5.0, 2.0, 7.0, 7.5, 9.0])
    shifted, one_prompt = 30 * rewards - 4, np.where(np.arange(6) < 3, 30 * rewards, rewards)
    plain, all_scaled, one_scaled = (
        Normalized(std="batch", delta=0).compare(forest, given(r), SignalContext()).values[:, 0]
        for r in (rewards, shifted, one_prompt)
    )
    torch.testing.assert_close(plain, all_scaled)
    assert float(plain[:3].sum().abs()) < 1e-6 and float(plain[3:].sum().abs()) < 1e-6
    assert float((one_scaled / plain)[:3].min()) > 1.5 and float((one_scaled / plain)[3:].max()) < 0.5


@pytest.mark.parametrize(
    "rule", [Normalized(), Normalized(std="none"), VarianceGated(low=0.0, high=0.0), Asymmetric(alpha=0.01)], ids=str
)
def test_advantages_are_clipped_at_5(rule) -> None:
    """One of 101 samples differs: its z-score is 10 (A-GRAE weighs it 50 times as much)."""
    scale = 100.0 if rule == Normalized(std="none") else 1.0
    assert max(column(rule.compare(side_by_side(101), given([scale] + [0.0] * 100), SignalContext()))) == 5.0


@pytest.mark.parametrize(("rewards", "encouraged"), [([0.98, 1.0], 1.0), ([0.0, 0.02], 0.02)])
def test_success_rates_near_0_and_1_weigh_as_one_half_sample(rewards: list[float], encouraged: float) -> None:
    """A-GRAE, G = 2: p stays inside [1/4, 3/4], so both ends weigh ω/(2√p) + (1-ω)/(2√(1-p)) with p at its bound."""
    focus = 0.99 / (2 * 0.75**0.5) + 0.01 / (2 * 0.25**0.5)
    got = column(Asymmetric(alpha=0.5).compare(side_by_side(2), given(rewards), SignalContext()))
    np.testing.assert_allclose(got, [-focus, encouraged * focus], rtol=1e-6)


def test_the_scale_may_be_that_of_the_set_which_differs_most() -> None:
    got = Normalized(std="largest", delta=0).compare(side_by_side(2, 2), given([0.0, 2.0, 10.0, 16.0]), SignalContext())
    np.testing.assert_allclose(column(got), [-1 / 3, 1 / 3, -1, 1], rtol=1e-6)


def test_the_scale_may_be_that_of_all_values_less_the_means_of_their_sets() -> None:
    """±1 and ±3 around means of 1 and 13: √((1 + 9)/2)."""
    got = Normalized(std="pooled", delta=0).compare(side_by_side(2, 2), given([0.0, 2.0, 10.0, 16.0]), SignalContext())
    np.testing.assert_allclose(column(got), np.array([-1, 1, -3, 3]) / 5**0.5, rtol=1e-6)


def test_depths_are_compared_inside_one_tree() -> None:
    """Two independent chains of a prompt are two trees: a depth of one tree has one step, and nothing to compare."""
    credit = given(np.arange(6.0))
    assert not bool(Normalized(within="tree_depth").compare(grown(chain(4, 2)), credit, SignalContext()).valid.any())
    assert bool(Normalized(within="prompt_step").compare(grown(chain(4, 2)), credit, SignalContext()).valid.all())


def test_a_seed_group_standardizes_the_noise_of_its_own_step() -> None:
    """TempFlow-GRPO, R = x_T of a linear world: inside a seed group the advantage is the standardized noise."""
    forest = grown(trunk(4, 2, 5), width=1)
    tree, edges = forest.tree, forest.tree.edges
    rewards = forest.at(tree.leaves).double()
    credit = BranchLocal().assign(forest, rewards, everywhere(rewards), ("r",))
    got = Normalized(within="seed_step", delta=0).compare(forest, credit, SignalContext()).values[:, 0]
    noise = forest.at(edges)[:, 0].double()  # the mean is common to a seed group and leaves with the baseline
    for parent in tree.parents_of_edges:
        own = tree.parent[edges] == parent
        z = noise[own]
        np.testing.assert_allclose(got[own], (z - z.mean()) / z.std(correction=0), atol=2e-4)


def test_two_nodes_of_one_depth_keep_only_their_sign() -> None:
    """BranchGRPO with a split at step 0: ±0.7071 with the unbiased std; constant between splits."""
    forest = grown(split_tree(5, (0, 3)))
    rewards = torch.tensor([[3.0], [5.0], [1.0], [0.5]])
    credit = Broadcast().assign(forest, rewards, everywhere(rewards), ("r",))
    got = Normalized(within="tree_depth", unbiased=True, delta=0).compare(forest, credit, SignalContext()).values[:, 0]
    np.testing.assert_allclose(got[:6], [0.70711, -0.70711] * 3, atol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        Normalized(), Normalized(std="batch"), Normalized(std="largest"), Normalized(unbiased=True),
        Normalized(trim=0.3), VarianceGated(), VarianceGated(low=0.1, high=0.4), Asymmetric(rescale="quantiles"),
    ],
    ids=str,
)  # fmt: skip
def test_a_masked_sample_is_a_sample_left_out(rule) -> None:
    whole, rest = side_by_side(4, 3), side_by_side(3, 3)
    rewards = [0.1, 0.9, 0.4, 0.35, 0.2, 0.8, 0.3]
    mask = [True, True, False, True, True, True, True]
    poisoned = [1e6 if not ok else r for r, ok in zip(rewards, mask, strict=True)]
    masked = rule.compare(whole, given(poisoned, valid=[mask]), SignalContext())
    left_out = rule.compare(rest, given([r for r, ok in zip(rewards, mask, strict=True) if ok]), SignalContext())
    assert masked.valid[:, 0].tolist() == mask
    torch.testing.assert_close(masked.values[torch.tensor(mask)], left_out.values)
    assert float(masked.values[2]) == 0 and masked.zero_std_ratio == left_out.zero_std_ratio


def test_a_sample_whose_reward_explodes_costs_that_sample_only() -> None:
    """From the exception to the advantages: its group has those of a group without it."""

    def explosive(batch: RewardBatch) -> RewardOutput:
        if 4 in batch.sample_ids:
            raise ZeroDivisionError("boom")
        return brightness(batch)

    output = score(WithTimeout(Plain(explosive), on_error="mask", batch_size=1), batch_of(7))
    assert output.valid[:, 0].tolist() == [row != 4 for row in range(7)] and "boom" in output.info[4]
    whole = given(output.scores[:, 0].numpy(), valid=[output.valid[:, 0].tolist()])
    rest = given(score(Plain(brightness), batch_of(7)).scores[output.valid[:, 0], 0].numpy())
    with_it = Normalized().compare(side_by_side(4, 3), whole, SignalContext()).values
    without = Normalized().compare(side_by_side(4, 2), rest, SignalContext()).values
    torch.testing.assert_close(with_it[output.valid[:, 0]], without)
    assert float(with_it[4]) == 0


@pytest.mark.parametrize("how", ["reward_sum", "advantage_sum", "gdpo", "keep"])
def test_a_masked_sample_of_a_mix_is_a_sample_left_out(how) -> None:
    rule, kept = Mixed(Normalized(), how), np.array([True, True, False, True, True, True, True])
    first, second = (np.array(r) for r in ([0.1, 0.9, 9e9, 0.4, 0.2, 0.8, 0.3], [3.0, 1.0, -9e9, 2.0, 5.0, 4.0, 4.5]))
    masked = rule.compare(side_by_side(4, 3), given(first, second, valid=[kept.tolist()] * 2), SignalContext())
    left_out = rule.compare(side_by_side(3, 3), given(first[kept], second[kept]), SignalContext())
    torch.testing.assert_close(masked.values[torch.tensor(kept)], left_out.values)
    assert not bool(masked.values[2].any()) and not bool(masked.valid[2].any())


@pytest.mark.parametrize("rule", [Broadcast(), Gain(), TurningPoint(), ReturnToGo(Gain())], ids=str)
def test_a_masked_sample_of_a_probed_chain_is_one_left_out(rule) -> None:
    whole, rest = grown(probed(5, 5)), grown(probed(5, 4))
    scores = torch.randn(len(whole.tree.leaves), 1, generator=torch.Generator().manual_seed(2)).double()
    kept = whole.tree.root[whole.tree.leaves] != 4
    masked = rule.assign(whole, torch.where(kept[:, None], scores, torch.nan), kept[:, None], ("r",))
    left_out = rule.assign(rest, scores[kept], everywhere(scores[kept]), ("r",))
    of_kept = whole.tree.root[whole.tree.edges] != 4
    assert not bool(masked.valid[~of_kept].any())
    torch.testing.assert_close(masked.values[of_kept], left_out.values)
    compare = Normalized(within="prompt_step")
    advantages = compare.compare(whole, masked, SignalContext())
    torch.testing.assert_close(advantages.values[of_kept], compare.compare(rest, left_out, SignalContext()).values)
    assert not bool(advantages.values[~of_kept].any())


def test_per_step_advantages_of_gains_have_mean_zero() -> None:
    forest = grown(probed(6, 4))
    scores = torch.randn(len(forest.tree.leaves), 1, generator=torch.Generator().manual_seed(2)).double()
    credit = Gain().assign(forest, scores, everywhere(scores), ("r",))
    got = Normalized(within="prompt_step").compare(forest, credit, SignalContext()).values[:, 0]
    step = forest.tree.index[forest.tree.parent[forest.tree.edges]]
    for i in step.unique():
        assert float(got[step == i].sum().abs()) < 1e-5


# ---------------------------------------------------------------------------------------------- equivalent methods


def test_branch_grpo_that_splits_at_the_start_is_grpo_with_a_shared_start() -> None:
    """B = {0}, K = G; the depth-wise set is then the group."""
    tree_forest, chain_forest = grown(split_tree(4, (0,), 5)), grown(chain(4, 5, shared_start=True, train_last=True))
    rewards = torch.tensor([[0.3], [1.0], [-2.0], [0.7], [5.0]])
    fused = SubtreeFusion().assign(tree_forest, rewards, everywhere(rewards), ("r",))
    plain = Broadcast().assign(chain_forest, rewards, everywhere(rewards), ("r",))
    a = Normalized(within="tree_depth").compare(tree_forest, fused, SignalContext())
    b = Normalized(within="prompt").compare(chain_forest, plain, SignalContext())
    torch.testing.assert_close(a.values, b.values)
    assert torch.equal(tree_forest.tree.parent, chain_forest.tree.parent)


def test_branches_of_one_seed_at_one_step_are_flow_grpo_fast() -> None:
    """TempFlow with one seed and one branching step, Flow-GRPO-Fast with a window of 1."""
    forest = grown(window(5, 6, 2, 1))
    rewards = torch.randn(6, 1, generator=torch.Generator().manual_seed(0)).double()
    local = BranchLocal().assign(forest, rewards, everywhere(rewards), ("r",))
    broadcast = Broadcast().assign(forest, rewards, everywhere(rewards), ("r",))
    assert torch.equal(local.values, broadcast.values)
    a, b = (
        Normalized(within="seed_step").compare(forest, local, SignalContext()),
        Normalized().compare(forest, broadcast, SignalContext()),
    )
    assert torch.equal(a.values, b.values)


# ---------------------------------------------------------------------------------------------- gated, asymmetric


def test_the_gate_opens_between_its_thresholds() -> None:
    def gated(spread: float, low: float, high: float) -> np.ndarray:
        forest = side_by_side(2)
        return np.array(
            column(VarianceGated(low=low, high=high).compare(forest, given([0.0, 2 * spread]), SignalContext()))
        )

    np.testing.assert_allclose(gated(0.09, 0.1, 0.5), [0, 0])
    np.testing.assert_allclose(gated(0.3, 0.1, 0.5), [-0.5 * 0.6, 0.5 * 0.6], rtol=1e-5)
    np.testing.assert_allclose(gated(0.8, 0.1, 0.5), [-1, 1], rtol=1e-6)
    for threshold in (0.1, 0.5):  # continuous at both
        np.testing.assert_allclose(gated(threshold - 1e-7, 0.1, 0.5), gated(threshold + 1e-7, 0.1, 0.5), atol=1e-5)
    np.testing.assert_allclose(gated(0.3, 0.0, 0.0), [-1, 1], rtol=1e-6)  # no gate: the plain z-score without delta
    np.testing.assert_allclose(1e6 * gated(0.3, 0.0, 1e6), 1e6 * gated(0.15, 0.0, 1e6) * 4, rtol=1e-4)
    for spread in (0.05, 0.2, 0.45, 3.0):
        assert abs(gated(spread, 0.1, 0.5)[1]) <= 1 + 1e-6


def test_gate_thresholds_are_quantiles_of_the_batch() -> None:
    forest = side_by_side(2, 2, 2)
    rewards = given([0.0, 0.2, 0.0, 2.0, 0.0, 4.0])  # stds .1, 1, 2: low = .28, high = 1
    got = column(VarianceGated().compare(forest, rewards, SignalContext()))
    np.testing.assert_allclose(got, [0, 0, -1, 1, -1, 1], atol=1e-6)
    with pytest.raises(ValueError, match="two numbers, or neither"):
        VarianceGated(low=0.1)


def test_gate_thresholds_may_remember_earlier_batches() -> None:
    """stds 1 and 2, then .1 and .5 beside them: the second batch is gated by the quantiles of all four."""
    forest, memory = side_by_side(2, 2), {}
    rule, second = VarianceGated(history=3), given([0.0, 0.2, 0.0, 1.0])
    rule.compare(forest, given([0.0, 2.0, 0.0, 4.0]), SignalContext(memory=memory))
    assert memory == {"a": [1.0, 2.0]}
    got = column(rule.compare(forest, second, SignalContext(memory=memory)))
    low, high = np.quantile([1.0, 2.0, 0.1, 0.5], [0.1, 0.5])
    gated = 0.5 * (0.5 - low) / (high - low) / high
    np.testing.assert_allclose(got, [0, 0, -gated, gated], atol=1e-6)
    assert memory == {"a": [2.0, pytest.approx(0.1), 0.5]}
    np.testing.assert_allclose(column(VarianceGated().compare(forest, second, SignalContext())), [0, 0, -1, 1])
    with pytest.raises(ValueError, match="history"):
        VarianceGated(low=0.1, high=0.2, history=8)


def test_asymmetric_golden() -> None:
    """A-GRAE: p = .25, batch mean ω = .5, alpha 1."""
    got = column(Asymmetric(alpha=1.0).compare(side_by_side(4, 4), given([1, 0, 0, 0, 1, 1, 1, 0]), SignalContext()))
    np.testing.assert_allclose(got[:4], [0.683013, -0.455342, -0.455342, -0.455342], atol=1e-6)
    undamped = column(
        Asymmetric(alpha=0.5).compare(side_by_side(4, 4), given([1, 0, 0, 0, 1, 1, 1, 0]), SignalContext())
    )
    np.testing.assert_allclose(undamped[:4], 0.788675 * np.array([3, -1, -1, -1]) / 3**0.5, atol=1e-6)
    rare = np.array([0.1, 0, 0, 0])  # p = .025 counts as 1/2G = .125
    z = (rare - rare.mean()) / rare.std()
    focus = 0.025 / (2 * 0.125**0.5) + 0.975 / (2 * 0.875**0.5)
    got = column(Asymmetric(alpha=0.025).compare(side_by_side(4), given(rare), SignalContext()))
    np.testing.assert_allclose(got, z * focus, rtol=1e-6)
    chains = grown(chain(4, 4))  # three steps each: still four samples
    of_edge = given(rare[chains.tree.root[chains.tree.edges]])
    got = Asymmetric(alpha=0.025).compare(chains, of_edge, SignalContext()).values[:, 0]
    np.testing.assert_allclose(got, (z * focus)[chains.tree.root[chains.tree.edges]], rtol=1e-6)
    flat = Asymmetric().compare(side_by_side(2, 2), given([1, 1, 1, 0]), SignalContext())
    assert column(flat)[:2] == [0, 0] and flat.zero_std_ratio == 0.5  # groups with p in {0, 1} are skipped


def test_asymmetric_needs_rewards_between_0_and_1() -> None:
    with pytest.raises(ValueError, match="set rescale='quantiles'"):
        Asymmetric().compare(side_by_side(3), given([0.1, 24.0, 3.0]), SignalContext())
    rewards = np.array([21.0, 22.0, 23.0, 24.0])
    low, high = np.quantile(rewards, [0.05, 0.95])
    mapped = ((rewards - low) / (high - low)).clip(0, 1)
    got = column(Asymmetric(rescale="quantiles").compare(side_by_side(4), given(rewards), SignalContext()))
    rate = mapped.mean()  # of the prompt and of the batch, .5; the z-scores are those of the rewards themselves
    focus = rate / (2 * rate**0.5) + (1 - rate) / (2 * (1 - rate) ** 0.5)
    np.testing.assert_allclose(got, focus * (rewards - rewards.mean()) / rewards.std(), rtol=1e-6)


def test_rescaling_for_success_rates_ties_no_samples() -> None:
    """The best of 41 samples lies beyond the 95 % quantile: it keeps its z-score and is better than the second best."""
    rewards = np.append(np.linspace(0.0, 1.0, 40), 8.0)
    got = np.array(
        column(Asymmetric(rescale="quantiles", clip=1e9).compare(side_by_side(41), given(rewards), SignalContext()))
    )
    assert got[40] > got[39] > got[38]
    z = (rewards - rewards.mean()) / rewards.std()
    np.testing.assert_allclose(got / got[0], np.where(z < 0, z / z[0], got / got[0]), rtol=1e-6)
    np.testing.assert_allclose(got[40] / got[39], z[40] / z[39], rtol=1e-6)


# ---------------------------------------------------------------------------------------------- channels


A, B = np.array([1.0, 2.0, 3.0, 6.0]), np.array([0.0, 30.0, -10.0, 0.0])


def z(values: np.ndarray) -> np.ndarray:
    return (values - values.mean()) / (values.std() + 1e-4)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("reward_sum", [z(2 * A + 0.5 * B)]),
        ("advantage_sum", [2 * z(A) + 0.5 * z(B)]),
        ("gdpo", [z(2 * z(A) + 0.5 * z(B))]),
        ("keep", [2 * z(A), 0.5 * z(B)]),
    ],
)
def test_mixes(how, expected) -> None:
    got = Mixed(Normalized(), how, {"a": 2.0, "b": 0.5}).compare(side_by_side(4), given(A, B), SignalContext()).values
    np.testing.assert_allclose(got.T, expected, atol=1e-5)


def test_gdpo_normalizes_over_the_batch_and_not_the_group() -> None:
    forest = side_by_side(2, 4)
    rewards = np.concatenate([[0.0, 1.0], A])
    summed = np.concatenate([z(rewards[:2]), z(A)])
    equal = np.ones(6)  # a channel in which nothing differs adds 0
    np.testing.assert_allclose(
        column(Mixed(Normalized(), "gdpo").compare(forest, given(rewards, equal), SignalContext())),
        z(summed),
        atol=1e-5,
    )


@pytest.mark.parametrize("how", ["advantage_sum", "gdpo"])
def test_sums_of_advantages_are_clamped(how) -> None:
    """Four channels agree that one of 12 samples is best: the z-scores of 3.3 add up to 13, MixGRPO clamps at 5."""
    rewards = [np.array([1.0] + [0.0] * 11)] * 4
    credit = given(*rewards, channels=("a", "b", "c", "d"))
    got = column(Mixed(Normalized(), how).compare(side_by_side(12), credit, SignalContext()))
    loose = column(Mixed(Normalized(), how, clip=1e9).compare(side_by_side(12), credit, SignalContext()))
    assert max(loose) == pytest.approx(4 * 11**0.5 if how == "advantage_sum" else 11**0.5, rel=1e-3)
    assert max(got) == pytest.approx(min(5.0, max(loose))) and min(got) == min(loose)


@pytest.mark.parametrize(
    "rule",
    [
        *(Mixed(Normalized(), how) for how in ("reward_sum", "advantage_sum", "gdpo", "keep")),
        PerChannel({"a": Normalized()}),
    ],
    ids=str,
)
def test_one_channel_is_no_mix(rule) -> None:
    with pytest.raises(ValueError, match="Take the advantage alone"):
        rule.compare(side_by_side(3), given([1.0, 2.0, 3.0]), SignalContext())


def test_a_sum_needs_all_its_channels() -> None:
    valid = [[True, True, True, True], [True, False, True, True]]
    for how in ("reward_sum", "advantage_sum", "gdpo"):
        got = Mixed(Normalized(), how).compare(side_by_side(4), given(A, B, valid=valid), SignalContext())
        assert got.valid[:, 0].tolist() == valid[1] and float(got.values[1]) == 0
        ignored = Mixed(Normalized(), how, {"a": 1.0, "b": 0.0}).compare(
            side_by_side(4), given(A, B, valid=valid), SignalContext()
        )
        assert bool(ignored.valid.all())
    kept = Mixed(Normalized(), "keep").compare(side_by_side(4), given(A, B, valid=valid), SignalContext())
    assert kept.valid.T.tolist() == valid
    with pytest.raises(ValueError, match="one for each channel"):
        Mixed(Normalized(), "keep", {"a": 1.0}).compare(side_by_side(4), given(A, B), SignalContext())


def test_each_channel_in_its_own_set() -> None:
    """Euphonium: outcome inside the prompt, process inside prompt and step."""
    forest = grown(chain(4, 3))
    outcome, process = np.arange(9.0) ** 2, np.sin(np.arange(9.0))
    rule = PerChannel({"outcome": Normalized(), "process": Normalized(within="prompt_step")})
    credit = given(outcome, process, channels=("outcome/hps", "process/prm"))
    got = rule.compare(forest, credit, SignalContext())
    one = given(process)
    torch.testing.assert_close(got.values[:, [0]], Normalized().compare(forest, given(outcome), SignalContext()).values)
    torch.testing.assert_close(
        got.values[:, [1]], Normalized(within="prompt_step").compare(forest, one, SignalContext()).values
    )
    with pytest.raises(ValueError, match="got channel 'process/prm'"):
        PerChannel({"outcome": Normalized()}).compare(forest, credit, SignalContext())
    with pytest.raises(ValueError, match=r"parts \['other'\] match none"):
        PerChannel({"outcome": Normalized(), "process": Normalized(), "other": Normalized()}).compare(
            forest, credit, SignalContext()
        )
