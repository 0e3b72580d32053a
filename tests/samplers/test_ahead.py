"""Noise drawn ahead by a thread: the same values, and drawn while the network is at work."""

import threading

import pytest
import torch

from samplers import Branch, Chain, FlowSDE, KeyedNoise, Selected, Tree, drawn_ahead, rollout
from tests.helpers.gaussian import gaussian_velocity

GPU = torch.device("meta")  # any device but the CPU: the values stay on the host


def grown(plan) -> Tree:
    return Tree.cat([plan.tree(4, 6, 0, None) for _ in range(2)])


@pytest.mark.parametrize("plan", [Chain(), Branch(3), Selected(Chain(), {2: 2})], ids=["chain", "tree", "selected"])
def test_a_rollout_with_noise_drawn_ahead_is_the_same_bit_for_bit(plan) -> None:
    tree, noise = grown(plan), KeyedNoise(0, 0, [3, 5], (2, 3))
    select = plan.select(lambda tree, nodes, previews: previews.flatten(1).sum(1))

    def rolled(step):
        return rollout(
            gaussian_velocity()[0], noise.start(tree), torch.linspace(1, 0, 5), tree, FlowSDE(),
            step, select=select,
        )  # fmt: skip

    with drawn_ahead(noise.step, tree, GPU) as step:
        ahead = rolled(step)
    assert torch.equal(ahead.states, rolled(noise.step).states)


def test_the_next_generation_is_drawn_before_it_is_asked_for() -> None:
    tree, noise, drawn = grown(Chain()), KeyedNoise(0, 0, [3, 5], (2, 3)), [threading.Event() for _ in range(4)]

    def step(tree: Tree, nodes: torch.Tensor) -> torch.Tensor:
        assert threading.current_thread() is not threading.main_thread()
        drawn[int(tree.index[nodes[0]]) - 1].set()
        return noise.step(tree, nodes)

    with drawn_ahead(step, tree, GPU) as asked:
        for number, nodes in enumerate(tree.generations[1:-1]):  # the last step of a chain has no noise
            assert drawn[number].wait(10)
            assert torch.equal(asked(tree, nodes), noise.step(tree, nodes))
    assert not any(thread.name.startswith("noise") and thread.is_alive() for thread in threading.enumerate())


def test_what_drawing_raises_is_raised_where_it_is_asked_for() -> None:
    tree = grown(Chain())

    def broken(tree: Tree, nodes: torch.Tensor) -> torch.Tensor:
        raise ValueError("no noise")

    with drawn_ahead(broken, tree, GPU) as asked, pytest.raises(ValueError, match="no noise"):
        asked(tree, tree.generations[1])


def test_on_the_cpu_no_thread_takes_from_the_network() -> None:
    tree, noise = grown(Chain()), KeyedNoise(0, 0, [3, 5], (2, 3))
    with drawn_ahead(noise.step, tree, torch.device("cpu")) as step:
        assert step == noise.step
