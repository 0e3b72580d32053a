"""Running statistics of prompts: golden buffers, what an entry is, and a resume that remembers."""

import json

import numpy as np
import pytest
import torch

from flowalign.advantage import Mixed, PromptTracker, SignalContext
from flowalign.credit import Broadcast, EdgeValues, Gain
from samplers import Forest, Tree, chain, window
from tests.helpers.trees import everywhere, grown, probed, split_tree


def chains(*groups: int) -> Forest:
    """Groups of the given sizes, three trained steps a sample."""
    return grown(Tree.cat([chain(4, size) for size in groups]))


def broadcast(forest: Forest, rewards, valid=None) -> EdgeValues:
    scores = torch.tensor(np.array(rewards, dtype=np.float64))[:, None]
    return Broadcast().assign(forest, scores, everywhere(scores) if valid is None else valid[:, None], ("r",))


def per_sample(forest: Forest, advantages) -> list[float]:
    """The advantage of each sample, which all its steps must have."""
    root, values = forest.tree.root[forest.tree.edges], advantages.values[:, 0]
    found = [values[root == number] for number in range(forest.tree.num_roots)]
    assert all(bool((of_steps == of_steps[0]).all()) for of_steps in found)
    return [float(of_steps[0]) for of_steps in found]


def test_the_last_sixteen_rewards_of_the_prompt_count_once_there_are_sixteen() -> None:
    """Two prompts of eight samples: the first iteration compares with the batch, the second with the prompt's sixteen, the
    third no longer knows the first. Three trained steps of a sample are one entry."""
    forest, rule, memory, seen = chains(8, 8), PromptTracker(delta=0.0, clip=1e9), {}, {0: [], 1: []}
    for iteration in range(3):
        rewards = np.random.default_rng(iteration).normal(size=16) * 3 + iteration
        got = rule.compare(forest, broadcast(forest, rewards), SignalContext(uids=(0, 1), memory=memory))
        expected = []
        for prompt, own in enumerate((rewards[:8], rewards[8:])):
            seen[prompt] = (seen[prompt] + own.tolist())[-16:]
            reference = rewards if iteration == 0 else np.array(seen[prompt])
            expected += ((own - reference.mean()) / reference.std()).tolist()
        np.testing.assert_allclose(per_sample(forest, got), expected, rtol=1e-5)
        assert memory == {"r": {"0": pytest.approx(seen[0]), "1": pytest.approx(seen[1])}}


def test_a_whole_group_may_be_better_than_its_prompt_was() -> None:
    """What a group's own z-score cannot say: all of its samples have a positive advantage."""
    forest, memory = chains(4), {}
    rule = PromptTracker(size=8, min_count=8)
    for level in (0.0, 1.0):
        rewards = level + np.array([0.0, 0.1, 0.2, 0.3])
        got = rule.compare(forest, broadcast(forest, rewards), SignalContext(memory=memory))
    assert min(per_sample(forest, got)) > 0.5


def test_prompts_go_by_their_uid_and_not_by_their_place() -> None:
    forest, rewards = chains(3, 3), np.arange(6.0) ** 2
    rule, memories, found = PromptTracker(size=6, min_count=6), [{}, {}], []
    for memory, uids in zip(memories, ((7, 9), (9, 7)), strict=True):
        rule.compare(forest, broadcast(forest, rewards), SignalContext(uids=(7, 9), memory=memory))
        again = broadcast(forest, rewards if uids == (7, 9) else np.roll(rewards, 3))
        found.append(per_sample(forest, rule.compare(forest, again, SignalContext(uids=uids, memory=memory))))
    assert found[1][3:] + found[1][:3] == found[0] and memories[0] == memories[1]


def test_one_prompt_in_two_groups_has_one_buffer() -> None:
    forest, memory = chains(3, 3), {}
    context = SignalContext(uids=(7, 7), memory=memory)
    PromptTracker().compare(forest, broadcast(forest, np.arange(6.0)), context)
    assert memory == {"r": {"7": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}}


def test_it_goes_on_from_json_as_if_never_stopped() -> None:
    forest, rule = chains(5, 5), PromptTracker(size=10, min_count=10)
    whole, parts = {}, {}
    for iteration in range(4):
        rewards = np.random.default_rng(iteration).normal(size=10)
        parts = json.loads(json.dumps(parts))
        one, other = (
            rule.compare(forest, broadcast(forest, rewards), SignalContext(uids=(4, 2), memory=memory))
            for memory in (whole, parts)
        )
        assert torch.equal(one.values, other.values)
    assert whole == parts


def test_an_invalid_sample_is_no_entry() -> None:
    forest, memory, valid = chains(3), {}, torch.tensor([True, False, True])
    rule = PromptTracker(size=2, min_count=2, delta=0.0)
    got = rule.compare(forest, broadcast(forest, [1.0, 1e6, 3.0], valid), SignalContext(memory=memory))
    assert per_sample(forest, got) == [-1.0, 0.0, 1.0] and memory == {"r": {"0": [1.0, 3.0]}}
    assert torch.equal(got.valid[:, 0], valid[forest.tree.root[forest.tree.edges]])


def test_a_share_of_prompts_without_a_spread() -> None:
    forest = chains(2, 2)
    rule = PromptTracker(size=2, min_count=2)
    got = rule.compare(forest, broadcast(forest, [1.0, 1.0, 0.0, 2.0]), SignalContext())
    assert got.zero_std_ratio == 0.5 and per_sample(forest, got)[:2] == [0.0, 0.0]


def test_channels_have_buffers_of_their_own() -> None:
    forest, memory = grown(window(3, 4, 1, 1)), {}
    values = torch.tensor([[1.0, 5.0], [2.0, 5.5], [3.0, 7.0], [4.0, 9.0]], dtype=torch.float64)
    rule = Mixed(PromptTracker(size=4, min_count=4), "keep")
    rule.compare(forest, EdgeValues(values, everywhere(values), ("a", "b")), SignalContext(memory=memory))
    assert memory == {"a": {"0": [1.0, 2.0, 3.0, 4.0]}, "b": {"0": [5.0, 5.5, 7.0, 9.0]}}


def test_a_credit_of_steps_has_no_one_reward_to_remember() -> None:
    forest = grown(probed(4, 3))
    scores = torch.rand(len(forest.tree.leaves), 1, generator=torch.Generator().manual_seed(0)).double()
    gains = Gain().assign(forest, scores, everywhere(scores), ("r",))
    with pytest.raises(ValueError, match="differ between the steps of one sample"):
        PromptTracker().compare(forest, gains, SignalContext())
    tree = grown(split_tree(4, (0, 2)))
    with pytest.raises(ValueError, match="differ between the steps"):
        PromptTracker().compare(tree, broadcast(tree, [0.0, 1.0, 3.0, 2.0]), SignalContext())


@pytest.mark.parametrize("wrong", [{"size": 4}, {"min_count": 1}, {"clip": 0.0}, {"delta": -1.0}], ids=str)
def test_numbers_that_cannot_work(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        PromptTracker(**wrong)
