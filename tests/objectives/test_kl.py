"""KL penalties: which kernels a form's β is meant for."""

import pytest

from flowalign.objectives import KLPenalty
from samplers import CPS, ClippedFlowSDE, DanceSDE, FlowSDE, Kernel, LinearSDE


@pytest.mark.parametrize(
    "kernel", [FlowSDE(), FlowSDE(constants="none"), ClippedFlowSDE(), DanceSDE(), LinearSDE()], ids=str
)
def test_the_form_times_h_is_for_noise_that_grows_with_the_step(kernel: Kernel) -> None:
    KLPenalty(0.04).check(kernel)


@pytest.mark.parametrize("kernel", [CPS(), CPS(constants="full")], ids=str)
def test_other_noise_is_refused(kernel: Kernel) -> None:
    with pytest.raises(ValueError, match=r"set form=exact"):
        KLPenalty(0.04).check(kernel)
    KLPenalty(0.04, "exact").check(kernel)
    KLPenalty(0.0).check(kernel)
