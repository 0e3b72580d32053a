"""Whether a sampler's velocity is the mean of u over its own samples: exact laws, planted slopes, and the bed from end to end."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign.build import policy_of
from flowalign.config import load_config
from flowalign.diagnostics.doctor import Finding, examine
from flowalign.diagnostics.doctor.objective import Slope, check_canonical
from flowalign.trainers import EndpointDraws
from tests.helpers.bed import save_pipeline
from tests.helpers.bed_run import CONFIG
from tests.helpers.gaussian import gaussian_velocity

SIGMA = torch.tensor([0.2, 0.5, 0.9]).double()
MEAN, SPREAD = 0.5, 0.8


def draws(change: Callable[[Tensor], Tensor] = lambda v: v, spread: float = SPREAD, count: int = 400) -> EndpointDraws:
    """Samples of N(MEAN, spread²) in 8 elements, and the exact velocity of N(MEAN, SPREAD²), changed."""
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, count, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    clean, level = MEAN + spread * clean, SIGMA[:, None, None]
    state = (1 - level) * clean + level * noise
    exact = gaussian_velocity(MEAN, SPREAD)[0]
    velocity = torch.stack([exact(x, sigma) for x, sigma in zip(state, SIGMA, strict=True)])
    return EndpointDraws(SIGMA, state, noise - clean, change(velocity), True)


def slopes(found: EndpointDraws) -> list[list[Slope]]:
    """Of each level on v and on x."""
    rows = zip(found.state, found.target, found.velocity, strict=True)
    return [[Slope.of(target - v, function) for function in (v, state)] for state, target, v in rows]


def judged(found: EndpointDraws) -> Finding:
    return check_canonical(lambda batch: found, lambda: None)


def test_an_exact_velocity_has_no_slope() -> None:
    for level in slopes(draws()):
        for slope in level:
            assert abs(slope.value) < 4 * slope.error < 0.2 and slope.share < 0.01
    assert judged(draws()).ok


def test_the_standard_error_is_that_of_repeated_samples() -> None:
    found = draws(count=8000)
    parts = [
        Slope.of((found.target - found.velocity)[0, rows], found.state[0, rows])
        for rows in torch.arange(8000).split(80)
    ]
    spread = torch.tensor([part.value for part in parts]).std()
    stated = torch.tensor([part.error for part in parts]).mean()
    assert float(spread / stated) == pytest.approx(1, abs=0.2)


def test_a_velocity_that_is_too_long_by_a_quarter_has_the_slope_of_that() -> None:
    """u − 1.25·v = (u − v) − .25·v, so the slope on 1.25·v is −.2."""
    for level in slopes(draws(lambda v: 1.25 * v, count=4000)):
        assert level[0].value == pytest.approx(-0.2, abs=0.02)
    failed = judged(draws(lambda v: 1.25 * v))
    assert failed.ok is False and "NFT, tilt matching, RAM, DGPO" in failed.advice


def test_samples_of_too_little_variance_have_the_slope_of_their_own_law() -> None:
    """On x, with both means 0: the coefficient of x in the velocity of the samples less that in the model's."""
    own, model = (gaussian_velocity(0.0, spread)[1] for spread in (0.4, SPREAD))
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(20_000, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    for sigma in SIGMA:
        state = (1 - sigma) * 0.4 * clean + sigma * noise
        found = Slope.of(noise - 0.4 * clean - model(sigma) * state, state)
        assert found.value == pytest.approx(float(own(sigma) - model(sigma)), abs=5 * found.error)
    assert judged(draws(spread=0.4)).ok is False


def test_samples_of_the_guided_velocity_have_slope_one_on_what_guidance_adds() -> None:
    """The update's velocity is another one than the samples'; or it is the samples' own, and the slope is 0."""
    found, shift = draws(count=4000), torch.tensor([1.0, -1.0]).double().repeat(4)
    for velocity, guided, expected in (
        (found.velocity - 0.3 * shift, found.velocity, 1.0),
        (found.velocity, found.velocity + 0.3 * shift, 0.0),
    ):
        mixed = EndpointDraws(found.sigma, found.state, found.target, velocity, True, guided)
        finding = judged(mixed)
        for target, v, g in zip(found.target, velocity, guided, strict=True):
            assert Slope.of(target - v, g - v).value == pytest.approx(expected, abs=0.12)
        assert finding.ok is (expected == 0) and "on v, x, guidance" in finding.figure
        assert finding.ok or "lower rollout.guidance_scale" in finding.advice


def test_where_nothing_is_assumed_nothing_fails() -> None:
    found = draws(lambda v: 2 * v)
    fine = judged(EndpointDraws(found.sigma, found.state, found.target, found.velocity, False))
    assert fine.ok and fine.figure.endswith("this objective does not need it")
    assert check_canonical(None, lambda: None).ok


# ------------------------------------------------------------------------------------------ from end to end


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("bed") / "pipeline")


def examined(bed: Path, method: str, *overrides: str) -> dict[str, Finding]:
    layers = [f"configs/methods/{method}.yaml", CONFIG]
    config, _ = load_config(layers, [f"policy.path={bed}", "rollout.group_size=64", *overrides])
    names = {"canonical", "anchors"}
    return {found.name: found for found in examine(config, policy_of(config, "cpu")) if found.name in names}


def test_the_bed_is_canonical_with_many_steps_and_not_with_three(bed: Path) -> None:
    found = examined(bed, "nft", "rollout.num_inference_steps=60")
    assert found["canonical"].ok, found["canonical"]
    assert "kl → reference κ/(c·w) = " in found["anchors"].figure
    few = examined(bed, "nft", "rollout.num_inference_steps=3", "trainer.draws=2")
    assert few["canonical"].ok is False and "num_inference_steps" in few["canonical"].advice


def test_a_regression_on_selected_samples_assumes_nothing(bed: Path) -> None:
    found = examined(bed, "raft", "rollout.num_inference_steps=3")
    assert found["canonical"].ok and "does not need it" in found["canonical"].figure
    assert found["anchors"].figure.startswith("none")


def test_rams_two_numbers_are_one_hundredth(bed: Path) -> None:
    found = examined(bed, "ram", "rollout.num_inference_steps=10")
    assert found["anchors"].figure.startswith("reference → reference κ/(c·w) = 0.01 at advantage 1")
