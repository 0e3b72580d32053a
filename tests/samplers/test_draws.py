"""Keyed draws: functions of their key alone, with the laws that they claim."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import (
    SPSA,
    Deterministic,
    GridSigma,
    KeyedNoise,
    LogitNormalSigma,
    SampleKeys,
    ShiftedUniform,
    SigmaLaw,
    SquareRootSigma,
    Tree,
    UniformSigma,
    plain_sigmas,
)
from tests.helpers.kernels import F64, FLOW, VP

GRID = plain_sigmas(10, 3.0)
ROWS = tuple((uid, visit, sample) for uid in (7, 3) for visit in (0, 1) for sample in (0, 1, 2))
KEYS = SampleKeys(seed=5, iteration=2, rows=ROWS)
MANY = SampleKeys(0, 0, tuple((uid, 0, 0) for uid in range(3000)))


def logit_normal(mean: float, std: float, k: float) -> Callable[[float], float]:
    def distribution(sigma: float) -> float:
        unshifted = sigma / (k - (k - 1) * sigma)
        return NormalDist(mean, std).cdf(math.log(unshifted / (1 - unshifted)))

    return distribution


# law -> its distribution function
LAWS: dict[str, tuple[SigmaLaw, Callable[[float], float]]] = {
    "uniform": (UniformSigma(), lambda sigma: sigma),
    "a part": (UniformSigma(0.2, 0.6), lambda sigma: (sigma - 0.2) / 0.4),
    "square root": (SquareRootSigma(), lambda sigma: sigma**2),
    "logit-normal": (LogitNormalSigma(), logit_normal(0.0, 1.0, 1.0)),
    "shifted": (LogitNormalSigma(-0.4, 0.8, 3.0), logit_normal(-0.4, 0.8, 3.0)),
    "above a boundary": (ShiftedUniform(0.75, 3.0, 0.02), lambda sigma: (sigma / (3 - 2 * sigma) - 0.52) / 0.48),
    "uniform strata": (UniformSigma(strata=True), lambda sigma: sigma),
    "square root strata": (SquareRootSigma(strata=True), lambda sigma: sigma**2),
    "logit-normal strata": (LogitNormalSigma(0.3, 1.2, strata=True), logit_normal(0.3, 1.2, 1.0)),
}


def everything(keys: SampleKeys) -> dict[str, Tensor]:
    """Every kind of draw, row by row."""
    return {
        **{name: keys.sigmas(law, 4, GRID, FLOW) for name, (law, _) in LAWS.items()},
        "grid": keys.sigmas(GridSigma(), 4, GRID, FLOW),
        "noise": keys.noise((2, 3), 1),
        "bridge": keys.noise((2, 3), 1, "bridge"),
        "signs": keys.signs((2, 8), 1),
    }


@pytest.mark.parametrize("name", LAWS)
def test_levels_have_the_distribution_of_their_law(name: str) -> None:
    """Kolmogorov-Smirnov at a level of about 0.1 %, over all draws together and over the first one of each sample."""
    law, distribution = LAWS[name]
    drawn = MANY.sigmas(law, 4, GRID, FLOW).double()
    for levels in (drawn.flatten(), *([] if "strata" in name else [drawn[:, 0]])):
        expected = np.array([distribution(value) for value in levels.sort().values.tolist()])
        steps = np.arange(len(levels) + 1) / len(levels)
        distance = max(np.abs(expected - steps[1:]).max(), np.abs(expected - steps[:-1]).max())
        assert distance < 1.95 / math.sqrt(len(levels))


@pytest.mark.parametrize("name", [name for name in LAWS if "strata" in name])
def test_strata_give_every_sample_one_draw_of_each_part(name: str) -> None:
    law, distribution = LAWS[name]
    for row in SampleKeys(0, 0, MANY.rows[:200]).sigmas(law, 4, GRID, FLOW).tolist():
        assert [math.floor(4 * distribution(sigma)) for sigma in row] == [0, 1, 2, 3]


@pytest.mark.parametrize(("fraction", "count", "levels"), [(0.99, 9, 9), (0.99, 3, 9), (1.0, 10, 10), (0.3, 2, 3)])
def test_grid_levels_are_drawn_without_replacement_and_equally_often(fraction: float, count: int, levels: int) -> None:
    drawn = SampleKeys(0, 0, MANY.rows[:1000]).sigmas(GridSigma(fraction), count, GRID, FLOW)
    assert all(len(set(row)) == count for row in drawn.tolist())
    found, often = drawn.unique(return_counts=True)
    assert torch.equal(found.flip(0), GRID[:levels])  # the noisiest ones, bit for bit
    probability = count / levels
    spread = math.sqrt(1000 * probability * (1 - probability))
    assert bool(((often - 1000 * probability).abs() <= 4 * spread).all())
    with pytest.raises(ValueError, match=f"got {levels + 1} draws of the {levels} levels"):
        KEYS.sigmas(GridSigma(fraction), levels + 1, GRID, FLOW)


def test_noise_and_signs_are_standard_and_independent_over_rows_draws_and_streams() -> None:
    keys = SampleKeys(0, 0, MANY.rows[:4])
    parts = [keys.noise((50_000,), draw).double() for draw in (0, 1)]
    parts += [keys.noise((50_000,), 0, "bridge").double(), keys.signs((50_000,), 0).double()]
    values = torch.cat(parts)
    assert set(keys.signs((50,), 3).flatten().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(values @ values.T / 50_000, torch.eye(16, dtype=F64), rtol=0, atol=5 / math.sqrt(25_000))
    assert float(values.mean(1).abs().max()) < 4.5 / math.sqrt(50_000)


def test_a_draw_is_a_function_of_its_key_whatever_the_batch() -> None:
    together = everything(KEYS)
    order = [4, 0, 11, 4]
    for name, values in everything(SampleKeys(5, 2, tuple(ROWS[row] for row in order))).items():
        assert torch.equal(values, together[name][order])
    for row in range(len(ROWS)):
        for name, values in everything(SampleKeys(5, 2, ROWS[row : row + 1])).items():
            assert torch.equal(values, together[name][row : row + 1])


@pytest.mark.parametrize("other", [SampleKeys(6, 2, ROWS), SampleKeys(5, 3, ROWS)], ids=["seed", "iteration"])
def test_another_seed_or_iteration_draws_anew(other: SampleKeys) -> None:
    for name, values in everything(other).items():
        assert not torch.equal(values[0], everything(KEYS)[name][0])


def test_samples_visits_uids_and_draws_differ() -> None:
    for name, values in everything(KEYS).items():
        assert len(values.flatten(1).unique(dim=0)) == len(ROWS) or name in ("signs", "grid")
    assert not torch.equal(KEYS.noise((2,), 0), KEYS.noise((2,), 1))
    assert not torch.equal(KEYS.noise((2,), 0), KEYS.noise((2,), 0, "bridge"))


def test_shared_keys_give_a_group_one_draw_and_other_groups_others() -> None:
    for values in everything(KEYS.shared()).values():
        groups = values.reshape(4, 3, -1)
        assert torch.equal(groups, groups[:, :1].expand_as(groups)) and len(groups[:, 0].unique(dim=0)) == 4
    assert not torch.equal(KEYS.shared().noise((2,), 0)[0], KEYS.noise((2,), 0)[0])


def test_keys_of_leaves_do_not_change_with_the_batch_or_with_selection() -> None:
    one = Deterministic().tree(3, 4, 0, np.random.default_rng(0))
    both = Tree.cat([one, one, one])
    all_keys = SampleKeys.of(1, 0, both, both.leaves, [7, 3, 7])
    assert [row[:2] for row in all_keys.rows[::4]] == [(7, 0), (3, 0), (7, 1)]
    assert SampleKeys.of(1, 0, one, one.leaves, [3]).rows == all_keys.rows[4:8]
    assert SampleKeys.of(1, 0, one, one.leaves, [7], [1]).rows == all_keys.rows[8:]
    kept = one.keep(one.root != 1)
    assert SampleKeys.of(1, 0, kept, kept.leaves, [3]).rows == tuple(all_keys.rows[row] for row in (4, 6, 7))
    with pytest.raises(ValueError, match="one uid per group"):
        SampleKeys.of(1, 0, both, both.leaves, [7])


def test_on_discrete_levels_the_nearest_is_taken() -> None:
    drawn = MANY.sigmas(UniformSigma(), 1, GRID, VP)
    levels, often = drawn.unique(return_counts=True)
    torch.testing.assert_close(levels, torch.arange(1, 11) / 10)
    VP.mix(levels)  # all exist
    expected = 3000 * torch.tensor([0.15] + [0.1] * 8 + [0.05])
    assert bool(((often - expected).abs() < 4 * expected.sqrt()).all())


def test_the_signs_are_directions_for_spsa() -> None:
    """Unbiased for a linear score: with M draws the mean of M estimates, whose variance for one element is 0."""
    topology = Deterministic().tree(2, 3, 0, np.random.default_rng(0))
    x = KeyedNoise(0, 0, [4], (1,)).start(topology)

    class Linear:
        def score(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            return 2.5 * x[:, 0]

    def directions(nodes: Tensor) -> Tensor:
        keys = SampleKeys.of(0, 0, topology, nodes, [4])
        return torch.stack([keys.signs((1,), draw) for draw in range(2)])

    found = SPSA(Linear(), directions).gradient(x, 0 * x, torch.tensor(0.5), torch.arange(3), torch.arange(3))
    torch.testing.assert_close(found, torch.full((3, 1), 2.5), rtol=1e-4, atol=0)


def test_a_logit_beyond_the_largest_exponent_is_the_level_that_it_tends_to() -> None:
    assert LogitNormalSigma(-1e4).draw(np.random.default_rng(0), 2, GRID) == pytest.approx([0, 0])
    assert LogitNormalSigma(1e4).draw(np.random.default_rng(0), 2, GRID) == [1, 1]


def test_what_cannot_be_is_refused() -> None:
    for law, arguments in (
        (UniformSigma, {"low": 0.5, "high": 0.5}),
        (LogitNormalSigma, {"std": 0.0}),
        (LogitNormalSigma, {"k": 0.0}),
        (ShiftedUniform, {"margin": 0.0}),
        (ShiftedUniform, {"low": 0.999}),
        (GridSigma, {"fraction": 0.0}),
    ):
        with pytest.raises(ValueError, match="expected"):
            law(**arguments)
    with pytest.raises(ValueError, match="count=0"):
        KEYS.sigmas(UniformSigma(), 0, GRID, FLOW)

    class Timesteps:
        def draw(self, rng, count, grid):
            return [1000 * level for level in grid[:count]]

    with pytest.raises(ValueError, match="inside"):
        KEYS.sigmas(Timesteps(), 2, GRID, FLOW)
