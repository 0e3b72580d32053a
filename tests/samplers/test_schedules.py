"""Schedules as parts: the grids they give, what is refused before and during a rollout."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from samplers import (
    FamilyGrid,
    Listed,
    PlainShift,
    Schedule,
    check_schedule,
    diffusers_sigmas,
    even_sigmas,
    shift,
    sigmas_of,
)
from tests.helpers.kernels import FLOW, VP


def own(num_steps: int) -> Tensor:
    return diffusers_sigmas(num_steps, 3.0)


@dataclass(frozen=True)
class Given:
    """A user's schedule that returns whatever it is given."""

    grid: Tensor

    def sigmas(self, num_steps: int, own) -> Tensor:
        return self.grid


def test_a_plain_shift_is_the_shift_of_equal_steps_and_does_not_waste_the_last() -> None:
    """TDM's four steps (2503.06674); diffusers shifts twice, so that its last of four steps is nearly empty."""
    assert PlainShift(3.0).sigmas(4, own).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert float(own(4)[-2]) < 0.01
    levels = PlainShift(5.0).sigmas(7, own)
    unshifted = levels.double().numpy() / (5.0 - 4.0 * levels.double().numpy())  # the inverse of the shift
    np.testing.assert_allclose(unshifted, 1 - np.arange(8) / 7, atol=1e-6)
    assert float(shift(0.5, 5.0)) == pytest.approx(5 / 6)


def test_the_family_grid_is_what_no_schedule_gives() -> None:
    for schedule in (None, FamilyGrid()):
        assert torch.equal(sigmas_of(schedule, 5, own), own(5))


def test_listed_levels_get_their_zero_and_have_one_number_of_steps() -> None:
    few = Listed((1.0, 0.9, 0.75, 0.5))
    assert torch.equal(sigmas_of(few, 4, own), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    with pytest.raises(ValueError, match="num_inference_steps=10 with the 4 levels"):
        sigmas_of(few, 10, own)
    for levels in ((), (1.0, 1.0), (0.5, 0.9), (1000.0, 500.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="expected"):
            Listed(levels)


@pytest.mark.parametrize(
    "grid",
    [
        torch.tensor([0.8, 0.4, 0.0]),  # the states are pure noise, but 0.8 is not its level
        torch.tensor([1.0, 0.5, 0.1]),  # ends in noise
        torch.tensor([1.0, 0.0]),  # too few
        torch.tensor([0.0, 0.5, 1.0]),
        torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64),
    ],
    ids=["start", "end", "length", "reversed", "dtype"],
)
def test_a_grid_that_a_rollout_cannot_step_over_is_refused(grid: Tensor) -> None:
    with pytest.raises(ValueError, match="expected"):
        sigmas_of(Given(grid), 2, own)
    with pytest.raises(ValueError, match="expected"):
        check_schedule(Given(grid), 2, FLOW)


def test_a_grid_may_end_where_its_family_ends() -> None:
    """Stable Diffusion 1.5 ends at timestep 0, σ = 0.001."""
    grid = torch.tensor([1.0, 0.5, 0.001])
    assert torch.equal(sigmas_of(FamilyGrid(), 2, lambda steps: grid), grid)


@pytest.mark.parametrize("schedule", [PlainShift(5.0), PlainShift(3.0), Listed((1.0,))])
def test_discrete_levels_take_their_own_grid_only(schedule: Schedule) -> None:
    check_schedule(schedule, 1, FLOW)
    with pytest.raises(ValueError, match="takes no other"):
        check_schedule(schedule, 1, VP)
    for fitting in (None, FamilyGrid()):
        check_schedule(fitting, 1, VP)


def test_equal_steps_are_on_levels_that_the_path_knows() -> None:
    """Thirds of a thousand are no level of a model on discrete ones."""
    assert even_sigmas(4, FLOW).tolist() == [1, 0.75, 0.5, 0.25, 0]
    known = len(VP.alphas_cumprod)
    levels = even_sigmas(3, VP).double() * known
    assert levels.tolist() == pytest.approx([known, round(2 * known / 3), round(known / 3), 0], abs=1e-3)
    VP.alpha_bar(even_sigmas(3, VP))
