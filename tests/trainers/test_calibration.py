"""DenseGRPO's noise calibration: a bed in which the signs of gains are known, a resume, the cost, and what it leaves alone."""

import json
from dataclasses import dataclass, replace
from math import erf
from pathlib import Path

import pytest
import torch

from flowalign.advantage import Normalized
from flowalign.credit import Gain
from flowalign.data import PromptRecord
from flowalign.models import Size
from flowalign.models.conditions import Conditions
from flowalign.rollouts.guidance import RewardGuidance
from flowalign.rollouts.task import Rollout, Task
from flowalign.trainers import GainBalance
from flowalign.trainers.base import Setup
from rewards import RewardOutput, RewardSpec
from samplers import CPS, Chain, FlowSDE, Leveled, Probed, RectifiedFlow, TreeWindow, plain_sigmas
from tests.helpers.policy_gradient import PROMPTS, make

STEPS, ELEMENTS = 6, 33
RECORDS = [PromptRecord(uid, f"prompt {uid}") for uid in range(60)]
HALF = {"threshold": 4.0, "per": 8}  # three of four gains of one sign are still balanced


@dataclass
class Bed:
    """Element 0 moves by noise alone (v = 0); of the others the data is 0 (v = x/σ), so the ODE leads to 0 from anywhere."""

    evaluations: int = 0
    path = RectifiedFlow()

    def latent_shape(self, size: Size) -> tuple[int, ...]:
        return (ELEMENTS,)

    def sigmas(self, num_inference_steps: int, latent_shape: tuple[int, ...]) -> torch.Tensor:
        return plain_sigmas(num_inference_steps)

    def rows_per_state(self, guidance_scale: float) -> int:
        return 1 if guidance_scale == 1 else 2

    def encode(self, records, *, negative: bool = False, size: Size | None = None) -> Conditions:
        return Conditions({"rows": torch.zeros(len(records), 1)})

    def start(self, noise: torch.Tensor) -> torch.Tensor:
        return noise

    def velocity(self, x, sigma, conditions, *, guidance_scale=1.0, detach_uncond=False) -> torch.Tensor:
        self.evaluations += len(x)
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:] / sigma[:, None].to(x)], 1)


@dataclass(frozen=True)
class Linear:
    """x_0 − price · Σ x_i² of a clean latent."""

    price: float
    name: str = "linear"
    spec = RewardSpec(inputs=("latents",))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch) -> RewardOutput:
        rest = batch.latents[:, 1:].square().sum(1)
        rest = torch.where(rest < 1e-8, 0.0, rest)  # the ODE's rounding is no loss
        return RewardOutput(batch.latents[:, 0] - self.price * rest, torch.ones(len(rest), dtype=torch.bool))


def bed(price: float, kernel=None, seed: int = 0) -> Task:
    settings = Rollout(Probed(Chain()), kernel or FlowSDE(), groups=4, group_size=3, num_inference_steps=STEPS)
    return Task(Bed(), Linear(price), settings, seed, Size(8, 8), prompts=RECORDS)


def units() -> torch.Tensor:
    """g_i of Flow-SDE at its own level."""
    sigmas = plain_sigmas(STEPS).double()
    bounded = torch.cat([sigmas[1:2], sigmas[1:-1]])
    return 0.7 * (sigmas[:-1] / (1 - bounded)).sqrt()


def test_noise_rises_where_gains_are_symmetric_and_falls_where_all_are_losses() -> None:
    """The last step is stochastic and nothing after it pulls the noise back: its gain is s·z − price·s²·χ², below 0 but for
    one in a million. At the others only element 0 counts, whose gain is symmetric: 60 trajectories, threshold 30, so 3.9 std."""
    rule = GainBalance(trajectories=60, sweeps=2, average=1, plan=Probed(Chain(train_last=True)), **HALF)
    factors = torch.tensor(rule.factors(bed(1.0)))
    expected = torch.tensor([1.0] * (STEPS - 1) + [-1.0]) * 2 * 0.01 / units()
    torch.testing.assert_close(factors, (1 + expected).float(), rtol=1e-5, atol=1e-6)


def test_guidance_of_the_rollout_does_not_move_what_is_calibrated() -> None:
    rule, plain = GainBalance(trajectories=8, sweeps=1, average=1), bed(1.0)
    guided = replace(plain.rollout, reward_guidance=RewardGuidance(scale=5.0))  # by a process reward of the run
    assert rule.factors(replace(plain, rollout=guided)) == rule.factors(bed(1.0))


@pytest.mark.slow
def test_it_settles_where_the_signs_are_as_unequal_as_the_threshold() -> None:
    """P(gain > 0) of the last step is Φ(−price·s·32) up to the spread of χ²: a quarter more losses where s = .319/(32·price)."""
    full = 0.7 * (plain_sigmas(STEPS)[-2].double() ** 2 / (1 - plain_sigmas(STEPS)[-2].double())).sqrt()
    quantile = 0.3186
    assert erf(quantile / 2**0.5) == pytest.approx(0.25, abs=1e-3)
    price = quantile / (32 * float(full)) / 0.8  # the border is at factor .8
    rule = GainBalance(trajectories=60, sweeps=40, average=20, step=0.01, plan=Probed(Chain(train_last=True)))
    assert rule.factors(bed(price))[-1] == pytest.approx(0.8, abs=0.08)


def test_a_count_as_threshold_lets_noise_fall_even_where_gains_are_symmetric() -> None:
    """The paper's words at 60 trajectories: balanced by chance only, in one sweep of ten."""
    rule = GainBalance(trajectories=60, sweeps=2, average=1, per=None)
    moves = (torch.tensor(rule.factors(bed(0.0)), dtype=torch.float64) - 1)[:-1] * units()[:-1] / 0.01
    assert float(moves.sum()) < 0 and float(moves.min()) == pytest.approx(-2)


def test_zeros_are_neither_gains_nor_losses_and_untrained_steps_keep_their_level() -> None:
    rule, unit = GainBalance(trajectories=8, lowest=0.5, highest=1.5, step=0.2), torch.tensor([1.0, 1.0, 1.0, 0.1, 1.0])
    excess, count = torch.tensor([0.0, 2.0, -8.0, 0.0, 0.0]), torch.tensor([8.0, 8.0, 8.0, 8.0, 0.0])
    got = rule.moved(torch.ones(5), excess, count, unit)
    torch.testing.assert_close(got, torch.tensor([1.2, 0.8, 0.8, 1.5, 1.0]))  # the fourth is kept inside its bounds
    assert rule.factors(bed(0.0))[-1] == 1.0


def test_the_calibrated_level_is_the_diffusion_coefficient() -> None:
    task = bed(0.0)
    factors = (0.5, 0.8, 1.0, 1.1, 1.3, 1.0)
    sigmas, h = plain_sigmas(STEPS).double(), -plain_sigmas(STEPS).double().diff()
    kernel = task.rollout.kernel
    std = kernel.coefficients(sigmas[:-1], sigmas[1:], torch.tensor(factors).double(), torch.arange(STEPS)).std
    torch.testing.assert_close(std / h.sqrt(), torch.tensor(factors).double() * units(), rtol=1e-6, atol=0)


def prepared(pipeline: Path, calibration, state=None, **task):
    policy, trainer = make(
        pipeline, Probed(Chain()), credit=Gain(), advantage=Normalized(within="prompt_step"), calibration=calibration,
        group_size=2,
    )  # fmt: skip
    before = policy.evaluations
    trainer.prepare(replace(trainer.task, prompts=PROMPTS * 3, **task), state)
    return policy, trainer, policy.evaluations - before


RULE = GainBalance(trajectories=5, sweeps=3, step=0.2)


def test_a_resumed_run_rolls_out_with_the_same_levels_and_calibrates_no_more(tiny_pipeline: Path) -> None:
    _, first, rows = prepared(tiny_pipeline, RULE)
    assert rows == RULE.forecast(first.task.rollout)[0] == 3 * 5 * (4 + 3 + 2 + 1)
    assert RULE.forecast(first.task.rollout)[1] == 3 * 5 * 4
    state = json.loads(json.dumps(first.state()))
    factors = state["factors"]
    assert len(factors) == 4 and factors[3] == 1.0 and all(factor != 1.0 for factor in factors[:3])
    _, second, none = prepared(tiny_pipeline, RULE, state)
    assert none == 0 and second.state() == first.state()
    one, other = first.collect(PROMPTS, 0), second.collect(PROMPTS, 0)
    assert torch.equal(one.forest.states, other.forest.states) and torch.equal(one.scores, other.scores)
    tree = one.forest.tree
    of_edge = torch.tensor(factors, dtype=torch.float64)[tree.index[tree.parent[tree.edges]]]
    assert torch.equal(tree.level[tree.edges], of_edge)


def test_its_rollouts_are_counted_and_gains_still_telescope(tiny_pipeline: Path) -> None:
    policy, trainer, rows = prepared(tiny_pipeline, RULE)
    counts, scored = trainer.task.counts, RULE.forecast(trainer.task.rollout)[1]
    assert (policy.evaluations, counts.decodes, counts.reward_calls) == (rows, scored, scored)
    batch = trainer.collect(PROMPTS, 0)
    assert policy.evaluations == rows + 10 * batch.images and counts.decodes == scored + 4 * batch.images
    forest, scores = batch.forest, batch.scores.double()
    gains, valid = (vars(Gain().assign(forest, scores, batch.valid, ("r",)))[name] for name in ("values", "valid"))
    assert bool(valid.all())
    tree = forest.tree
    place = torch.zeros(len(tree), dtype=torch.int64)
    place[tree.leaves] = torch.arange(len(tree.leaves))
    for root in range(tree.num_roots):
        edges = tree.root[tree.edges] == root
        ends = tree.completion(torch.stack([tree.edges[edges][-1], torch.tensor(root)]))
        last, start = scores[place[ends], 0]
        assert float(gains[edges].sum()) == pytest.approx(float(last - start), abs=1e-6)
    (update,) = trainer.updates(batch)  # the replay knows the levels
    for micro_batch in update.micro_batches:
        micro_batch()
    assert update.after()["ratio/drift_max"] < 1e-6


def test_training_draws_what_it_would_without(tiny_pipeline: Path) -> None:
    """Same start noise and prompts; with factors of 1 the very same rollout."""
    _, plain, _ = prepared(tiny_pipeline, None)
    _, calibrated, _ = prepared(tiny_pipeline, replace(RULE, step=1e-300))
    assert plain.state()["factors"] is None and calibrated.state()["factors"] == [1.0] * 4
    one, other = plain.collect(PROMPTS, 0), calibrated.collect(PROMPTS, 0)
    assert torch.equal(one.forest.states, other.forest.states)


def test_without_prompts_there_is_none(tiny_pipeline: Path) -> None:
    """A task made by hand, without a training set."""
    _, trainer = make(tiny_pipeline, Probed(Chain()), credit=Gain(), calibration=RULE)
    assert trainer.state()["factors"] is None and trainer.task.policy.evaluations == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"trajectories": 0}, {"sweeps": 0}, {"average": 11}, {"per": 0}, {"lowest": 1.1}, {"highest": 0.9}, {"step": 0.0},
        {"threshold": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_cannot_work(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        GainBalance(**wrong)


def test_the_highest_factor_meets_the_levels_of_the_plan() -> None:
    """CPS at .4 bears a factor 2, not on top of 1.5 times its level at the last split."""

    def check(growth: float) -> None:
        settings = replace(bed(0.0).rollout, plan=TreeWindow(2, 2, growth), kernel=CPS(0.4), group_size=4)
        GainBalance().check(Setup(settings, RectifiedFlow(), ("linear",)))

    check(0.0)
    with pytest.raises(ValueError, match=r"levels up to 1\.5"):
        check(0.5)


def test_factors_are_one_per_step() -> None:
    with pytest.raises(ValueError, match="expected one per step"):
        Leveled(Chain(), (1.0, 0.5)).tree(3, 2, 0, None)
    with pytest.raises(ValueError, match="above 0"):
        Leveled(Chain(), (1.0, 0.0))
