"""Searches by score alone: what they try, what they keep, and what they cost."""

import pytest
import torch

import flowalign as fa
from flowalign.models.base import Sampling, Size
from flowalign.noise_optimization import BestOfN, PathSearch, PreviewSelect, ZeroOrder, optimize_noise
from flowalign.noise_optimization.objective import Objective, best_rows
from flowalign.noise_optimization.optimize import METHODS
from samplers import normal
from tests.helpers.linear_policy import LinearPolicy, Nearness

D = 6
Y = torch.linspace(-1, 1, D)


def policy(steps: int = 1) -> LinearPolicy:
    return LinearPolicy(torch.eye(D), sampling=Sampling(steps, 1.0, Size(1, D)))


def run(method, steps, policy_steps=1, prompts=("a", "b"), **settings):
    return optimize_noise(
        policy(policy_steps), list(prompts), Nearness(Y, differentiable=False), steps=steps, method=method, progress=False,
        **settings,
    )  # fmt: skip


def total_of(noise):
    return -0.5 * (noise.flatten(1) - Y).square().sum(1)


def test_best_of_n_is_the_best_of_the_samples_that_evaluation_makes():
    found = run(BestOfN(candidates=3), 4, seed=5)
    for uid in range(2):
        samples = torch.stack([normal((1, 1, D), 5, "start", "evaluate", uid, number) for number in range(12)])
        totals = total_of(samples)
        torch.testing.assert_close(found.total[uid], totals.max())
        assert torch.equal(found.noise[uid], samples[totals.argmax()]) and torch.equal(found.start[uid], samples[0])
        assert int(found.best_step[uid]) == int(totals.argmax()) // 3
    assert found.evaluations == found.decoded == 24


def test_the_picture_draws_the_total_of_the_start_and_numbers_images_as_its_axis():
    """The best of eight candidates of the first iteration is not the start."""
    found = run(BestOfN(candidates=8), 3, prompts=["a"])
    assert found.history["total"][0, 0] > found.first_total[0]
    curve, *images = found.plot().axes
    assert curve.lines[-1].get_ydata()[0] == pytest.approx(float(found.first_total[0]))
    assert [axis.get_title() for axis in images] == ["start", "0", "1", "2"]


def test_zero_order_moves_only_to_better_neighbors_at_the_given_distance():
    found = run(ZeroOrder(neighbors=3, distance=0.2), 30)
    running = found.history["total"].cummax(0).values[-1]
    torch.testing.assert_close(running, found.total)
    assert bool((found.total > found.first_total).all()) and found.evaluations == 2 * 3 * 30
    one = run(ZeroOrder(neighbors=1, distance=0.2), 2, prompts=["a"])
    fresh = normal((1, 1, D), 0, "zero order", 1, 0, 0)
    neighbor = (1 - 0.2**2) ** 0.5 * one.start[0] + 0.2 * fresh
    torch.testing.assert_close(one.history["total"][1, 0], total_of(neighbor[None])[0])


def test_preview_select_makes_in_full_what_its_previews_promise():
    """The sampler's result does not depend on its number of steps here, so the previews are right."""
    found = run(PreviewSelect(candidates=8, keep=2, preview_steps=1), 1, policy_steps=4, prompts=["a"])
    samples = torch.stack([normal((1, 1, D), 0, "start", "evaluate", 0, number) for number in range(9)])
    assert found.evaluations == 8 * 1 + (1 + 2) * 4 and found.decoded == 8 + 3
    # of the start and the two whose one-step previews are best
    one_step = total_of(samples)
    best = max([0, *(1 + one_step[1:].topk(2).indices).tolist()], key=lambda row: float(one_step[row]))
    assert torch.equal(found.noise[0], samples[best])


def test_path_search_costs_what_its_formula_says_and_finds_better_paths():
    """5 steps; from index 2: re-noised to 1, stepped to 3, previewed; to 2, to 4, previewed; to 3, to 5."""
    paths, children = 2, 3
    found = run(PathSearch(paths=paths, children=children, start=2, back=1, ahead=1), 1, policy_steps=5, prompts=["a"])
    tree = paths * 2 + paths * children * (3 * 2) + paths * children * 2
    assert found.evaluations == tree + 5  # and the plain sample of the start noise
    assert found.decoded == 2 * paths * children + paths * children + 1
    assert float(found.total[0]) >= float(found.first_total[0])
    several = run(PathSearch(paths=paths, children=children), 10, policy_steps=4)
    assert bool((several.total > several.first_total).all())


def test_a_path_returns_the_noise_that_it_began_with_and_its_own_latents():
    found = run(PathSearch(paths=1, children=1), 1, policy_steps=3, prompts=["a"])
    begun = normal((1, 1, D), 0, "start", "evaluate", 0, 1)
    is_start = torch.equal(found.noise[0], found.start[0])
    assert is_start or torch.equal(found.noise[0], begun)
    torch.testing.assert_close(total_of(found.latents), found.total)


def test_a_path_depends_on_the_noise_that_it_began_with():
    """v = 0, so a path is its start noise re-noised; what is left of it after each re-noising is (1 − σ')/(1 − σ)."""
    search, levels = PathSearch(paths=1, children=1), torch.linspace(1, 0, 5)
    begun, other = (normal((1, 1, 1, D), 0, "start", "evaluate", uid, 1) for uid in (0, 1))
    left = (1 - levels[1]) / (1 - levels[2]) * (1 - levels[2]) / (1 - levels[3])

    def end_of(start):
        walk = search.begin(_objective(policy(4)), torch.zeros(1, 1, 1, D))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flowalign.noise_optimization.searches.start_noise", lambda *_: start[0])
            return walk.step(torch.arange(1)).latents[1]

    torch.testing.assert_close(end_of(begun) - end_of(other), left * (begun - other)[0])


def _objective(policy):
    records = fa.as_records("a")
    return Objective(policy, records, policy.encode(records), policy.sampling, [(Nearness(Y), 1.0)], 0, 4)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_begins_with_the_plain_sample_and_never_ends_below_it(method):
    found = optimize_noise(policy(3), ["a", "b"], Nearness(Y), steps=3, method=method(), seed=2, progress=False)
    start = torch.stack([normal((1, 1, D), 2, "start", "evaluate", uid, 0) for uid in range(2)])
    assert torch.equal(found.start, start)
    torch.testing.assert_close(found.first_total, total_of(start))
    assert bool((found.total >= found.first_total).all())
    torch.testing.assert_close(total_of(found.latents), found.total)
    again = optimize_noise(policy(3), ["a", "b"], Nearness(Y), steps=3, method=method(), seed=2, progress=False)
    assert torch.equal(again.noise, found.noise) and torch.equal(again.history["total"], found.history["total"])


def test_best_rows_keeps_the_first_of_equals_and_puts_nan_last():
    totals = torch.tensor([1.0, 2.0, 2.0, torch.nan, -1.0, torch.nan])
    assert best_rows(totals, 2, 1).tolist() == [1, 4]
    assert best_rows(totals, 2, 2).tolist() == [1, 2, 3, 4]
    assert best_rows(torch.full((3,), torch.nan), 1, 1).tolist() == [0]


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (lambda: BestOfN(0), "at least 1"),
        (lambda: ZeroOrder(distance=0.0), r"expected a number in \(0, 1\]"),
        (lambda: PreviewSelect(2, 2), "nothing is chosen"),
        (lambda: PathSearch(start=1, back=1), "expected less: re-noised up to the start"),
        (lambda: fa.SPSA(directions=0), "at least one direction"),
        (lambda: fa.Ascent(momentum=1.0), r"a momentum in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be_are_refused(method, match):
    with pytest.raises(ValueError, match=match):
        method()


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (PreviewSelect(preview_steps=2), "expected fewer: a preview"),
        (PathSearch(), "expected an index before its end"),
        (fa.Gradient(last_steps=3), "expected 1 to 2"),
    ],
)
def test_what_does_not_fit_the_sampler_is_refused(method, match):
    with pytest.raises(ValueError, match=match):
        optimize_noise(policy(2), "a", Nearness(Y), method=method, progress=False)
