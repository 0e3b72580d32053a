"""Pref-GRPO's win rate: the noise-free golden, ties, chains, and what it does not see."""

import numpy as np
import pytest
import torch

from flowalign.advantage import SignalContext, WinRate
from flowalign.credit import EdgeValues
from samplers import Forest, Tree, chain, window
from tests.helpers.trees import everywhere, grown

GOLDEN = [-1.527525, -1.091089, -0.654654, -0.218218, 0.218218, 0.654654, 1.091089, 1.527525]


def advantages(rule: WinRate, rewards, forest: Forest | None = None, valid=None) -> np.ndarray:
    forest = forest or grown(window(3, len(rewards), 1, 1))
    values = torch.tensor(np.array(rewards, dtype=np.float64))[:, None]
    credit = EdgeValues(values, everywhere(values) if valid is None else torch.tensor(valid)[:, None], ("r",))
    return rule.compare(forest, credit, SignalContext()).values[:, 0].numpy()


def test_eight_samples_in_order() -> None:
    """w = k/7: mean ½, population std .327327."""
    assert np.arange(8).mean() / 7 == pytest.approx(0.5) and (np.arange(8) / 7).std() == pytest.approx(
        0.327327, abs=1e-6
    )
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    got = advantages(WinRate(decimals=None, delta=0.0), order)
    np.testing.assert_allclose(got, np.array(GOLDEN)[order], atol=1e-6)
    rates = np.round(np.arange(8) / 7, 3)
    rounded = advantages(WinRate(delta=0.0), order)
    np.testing.assert_allclose(rounded, ((rates - rates.mean()) / rates.std())[order], atol=1e-6)
    assert np.abs(rounded - got).max() > 1e-5


def test_gaps_do_not_matter_and_ties_count_half() -> None:
    rule = WinRate(decimals=None, delta=0.0)
    np.testing.assert_array_equal(advantages(rule, [0.0, 1e-5, 1.0, 900.0]), advantages(rule, [1.0, 2.0, 3.0, 4.0]))
    rates = np.array([0.5, 0.5, 2.0, 3.0]) / 3  # the first two tie
    np.testing.assert_allclose(advantages(rule, [1.0, 1.0, 2.0, 5.0]), (rates - 0.5) / rates.std(), rtol=1e-6)


def test_identical_images_get_nothing() -> None:
    assert not advantages(WinRate(), [0.7] * 8).any()


def test_the_steps_of_one_sample_are_no_opponents() -> None:
    """Eight chains of three trained steps are eight samples."""
    forest = grown(chain(4, 8))
    root = forest.tree.root[forest.tree.edges]
    got = advantages(WinRate(decimals=None, delta=0.0), root.double().numpy(), forest)
    np.testing.assert_allclose(got, np.array(GOLDEN)[root], atol=1e-6)
    per_step = advantages(WinRate("prompt_step", decimals=None, delta=0.0), root.double().numpy(), forest)
    np.testing.assert_allclose(per_step, got, atol=1e-6)


def test_groups_do_not_play_against_each_other_and_invalid_samples_do_not_play() -> None:
    forest = grown(Tree.cat([window(3, 4, 1, 1), window(3, 3, 1, 1)]))
    rule, mask = WinRate(decimals=None, delta=0.0), [True, True, False, True, True, True, True]
    got = advantages(rule, [4.0, 5.0, np.nan, 6.0, 1.0, 2.0, 3.0], forest, mask)
    three = (np.arange(3) / 2 - 0.5) / (np.arange(3) / 2).std()
    np.testing.assert_allclose(got, [three[0], three[1], 0.0, three[2], *three], atol=1e-6)


@pytest.mark.parametrize("wrong", [{"decimals": 0}, {"clip": 0.0}, {"delta": -1.0}], ids=str)
def test_numbers_that_cannot_work(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        WinRate(**wrong)
