"""Distillation against closed forms: affine students and teachers, of which every gradient, law and fixed point is known."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flowalign.advantage import Normalized
from flowalign.distributed.processes import Processes
from flowalign.models.roles import Role
from flowalign.objectives import ClippedRatio, Gate, KLPenalty, Match, Steps, TeacherTargets
from flowalign.rollouts.unscored import BetaStep
from flowalign.trainers import (
    ColdStart,
    Distillation,
    ManifoldAnchor,
    PolicyGradient,
    Route,
    Setup,
    Signal,
    Teacher,
)
from rewards import RewardBatch, RewardOutput, RewardSpec
from samplers import CPS, DDIM, ODE, Chain, DanceSDE, Deterministic, FlowSDE, RectifiedFlow, Sliding, Window
from samplers.noise import generator
from tests.helpers.affine_policy import AffinePolicy, exact, gradient, gradient_of, prepared, records, rollout
from tests.helpers.kernels import VP
from tests.helpers.thread_processes import on_processes

STEPS = 6
FINITE = torch.tensor([0.066, 0.127, 0.227, 0.355, 0.541, 1.027]).double()
PATHWISE = torch.tensor([0.034, 0.059, 0.137, 0.251, 0.455, 1.026]).double()


def expected_cost(theta: Tensor, slope: float = -0.4, shift: float = 0.5) -> Tensor:
    """[T] E[D_k] of a student of shift θ_k and a teacher whose velocity differs by −slope·x − shift from the exact one."""
    sigmas = torch.linspace(1, 0, STEPS + 1).double()
    step = FlowSDE(0.7).coefficients(sigmas[:-1], sigmas[1:], 1.0, torch.arange(STEPS))
    own_slope, own_shift = exact(sigmas[:-1])
    mean, variance, found = torch.tensor(0.0).double(), torch.tensor(1.0).double(), []
    for k in range(STEPS):
        weight = step.velocity_coef[k] ** 2 / (2 * step.std[k] ** 2)
        found.append(weight * ((slope * mean + shift + theta[k]) ** 2 + slope**2 * variance))
        ratio = step.alpha[k] + step.velocity_coef[k] * own_slope[k]
        mean = ratio * mean + step.velocity_coef[k] * (own_shift[k] + theta[k])
        variance = ratio**2 * variance + step.std[k] ** 2
    return torch.stack(found)


# ------------------------------------------------------------------------------------------ the right gradient


def of_the_bed() -> dict[str, tuple[Tensor, Tensor]]:
    """(mean, standard error) [T] of the estimated gradient of Σ D_k by the shifts, over independent rollouts, by horizon."""
    policy = AffinePolicy.of(STEPS, policy=0.1, teacher=-0.5)
    policy.slopes["teacher"] += 0.4
    full = Distillation({"teacher": Teacher()}, horizon="full", score_images=False, micro_batch=4096)
    trainers, found = {"full": full, "myopic": replace(full, horizon="myopic")}, {"full": [], "myopic": []}
    for trainer in trainers.values():
        prepared(policy, trainer, rollout(1, 250, STEPS))
    for number in range(8):
        batch = full.collect(records("a"), number)
        for horizon, trainer in trainers.items():
            found[horizon].append(STEPS * gradient_of(trainer, batch)[0][:, 0])
    stacked = {horizon: torch.stack(each) for horizon, each in found.items()}
    return {horizon: (each.mean(0), each.std(0) / len(each) ** 0.5) for horizon, each in stacked.items()}


def test_the_full_horizon_has_the_gradient_of_the_expected_sum_and_the_myopic_one_a_part_of_it() -> None:
    theta = torch.full((STEPS,), 0.1).double().requires_grad_()
    (truth,) = torch.autograd.grad(expected_cost(theta).sum(), theta)
    part = torch.stack(
        [torch.autograd.grad(cost, theta, retain_graph=True)[0][k] for k, cost in enumerate(expected_cost(theta))]
    )
    torch.testing.assert_close(truth, FINITE, rtol=0, atol=6e-4)
    torch.testing.assert_close(part, PATHWISE, rtol=0, atol=1.5e-3)  # a Monte-Carlo figure
    found = of_the_bed()
    for horizon, value in (("full", truth), ("myopic", part)):
        mean, error = found[horizon]
        assert bool(((mean - value).abs() < 3 * error + 1e-6).all()), horizon
    score_term = found["full"][0] - found["myopic"][0]  # of the same rollouts: less noise
    assert float(score_term[1:5].min()) > 0.03 and abs(float(score_term[5])) < 1e-6


@pytest.mark.parametrize("kernel", [FlowSDE(reduce="sum"), DanceSDE(reduce="sum"), CPS(0.5, reduce="sum")], ids=str)
def test_the_kl_of_a_step_is_the_expected_log_ratio(kernel) -> None:
    draws, random = 200_000, torch.Generator().manual_seed(0)
    sigma, sigma_next = torch.tensor([0.6]).double(), torch.tensor([0.45]).double()
    x, v, other = torch.randn(3, 1, 2, generator=random).double()
    found = Match().weight(
        kernel, RectifiedFlow(), Steps(torch.zeros(1), sigma, sigma_next, torch.ones(1).double(), torch.ones(1))
    )
    kl = float(found * Match().error(v, other, "sum"))
    affine = kernel.coefficients(sigma, sigma_next)
    means = [affine.alpha * x + affine.velocity_coef * each for each in (v, other)]
    arrived = means[0] + affine.std * torch.randn(draws, 2, generator=random).double()
    ratio = ((arrived - means[1]).square() - (arrived - means[0]).square()).sum(1) / (2 * affine.std**2)
    assert abs(float(ratio.mean()) - kl) < 4 * float(ratio.std()) / draws**0.5 and kl > 0.1


def test_the_forms_are_one_regression_with_other_weights() -> None:
    steps = Steps(
        torch.zeros(1),
        torch.tensor([0.6]).double(),
        torch.tensor([0.4]).double(),
        torch.ones(1).double(),
        torch.ones(1),
    )
    step = FlowSDE().coefficients(steps.sigma, steps.sigma_next, 1.0, steps.index)
    weights = {
        form: float(Match(form).weight(FlowSDE(), RectifiedFlow(), steps)) for form in ("ode", "mean", "velocity", "x0")
    }
    assert weights == pytest.approx(
        {"ode": 0.2**2 / 2, "mean": float(step.velocity_coef**2), "velocity": 1.0, "x0": 0.36}
    )
    kernel = DDIM(1.0).bind(VP)
    on_levels = Steps(
        torch.zeros(1), VP.nearest(torch.tensor([0.5])), VP.nearest(torch.tensor([0.3])), torch.ones(1), torch.ones(1)
    )
    b = VP.mix(on_levels.sigma.double())[1]
    assert float(Match("x0").weight(kernel, VP, on_levels)) == pytest.approx(float(b**2))
    v, other = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    plain, own = (Match("velocity", normalized=each).error(v, other, "mean") for each in (False, True))
    torch.testing.assert_close(own, plain / (v - other).abs().mean(1))
    with pytest.raises(ValueError, match="draws no noise"):
        Match().weight(ODE(), RectifiedFlow(), steps)


# ------------------------------------------------------------------------------------------ fixed points


PLANS = {
    "kl": Chain(train_last=True),
    "ode": Deterministic(),
    "mean": Chain(),
    "velocity": Deterministic(),
    "x0": Window(2, 1, 4),
}


@pytest.mark.parametrize("form", PLANS)
def test_a_student_that_is_its_teacher_stays_whatever_the_weight(form: str) -> None:
    policy = AffinePolicy.of(4, policy=0.3, teacher=0.3)
    trainer = Distillation({"teacher": Teacher()}, match=Match(form), score_images=False)
    trainer = prepared(policy, trainer, rollout(2, 3, 4, plan=PLANS[form]))
    for found in gradient(trainer, records("a", "b")):
        assert float(found.abs().max()) < 1e-6
    policy.shifts["teacher"] += 0.5
    shift, _ = gradient(trainer, records("a", "b"))
    assert float(shift[:, :2].abs().sum(1).max()) > 0.005 and float(shift.max()) <= 1e-7


def test_with_an_anchor_the_optimum_is_the_weighted_average() -> None:
    scale, steps = 0.3, 5
    policy = AffinePolicy.of(steps, policy=0.0, teacher=1.0, looks=-0.5)
    settings = rollout(1, 4, steps)
    trainer = Distillation({"teacher": Teacher()}, anchor=ManifoldAnchor(scale, "looks"), score_images=False)
    prepared(policy, trainer, settings)
    sigmas = policy.grid
    step = FlowSDE(0.7).coefficients(sigmas[:-1], sigmas[1:], 1.0, torch.arange(steps))
    weight = step.velocity_coef**2 / (2 * step.std**2)
    best = (weight * 1.0 + scale * -0.5) / (weight + scale)
    with torch.no_grad():
        policy.shifts["policy"].copy_(best[:, None])
    shift, slope = gradient(trainer, records("a"))
    assert float(shift.abs().max()) < 1e-6 and float(slope.abs().max()) < 1e-6
    assert float(best.max() - best.min()) > 0.2
    with torch.no_grad():
        policy.shifts["policy"] += 0.01
    torch.testing.assert_close(
        gradient(trainer, records("a"))[0][:, 0], 2 * 0.01 * (weight + scale) / steps, rtol=1e-4, atol=1e-7
    )


def test_an_anchor_has_a_guidance_of_its_own() -> None:
    """Teacher at 1, anchor at 3.5: the student stops between v_c and u + 3.5·(c − u) of the anchor."""
    policy = AffinePolicy.of(4, policy=0.0, teacher=(0.2, 0.2, -0.1), looks=(0.4, 0.4, -0.1))
    anchor = ManifoldAnchor(0.5, "looks", guidance_scale=3.5)
    trainer = Distillation({"teacher": Teacher()}, match=Match("velocity"), anchor=anchor, score_images=False)
    prepared(policy, trainer, rollout(1, 3, 4))
    with torch.no_grad():
        policy.shifts["policy"].fill_((0.2 + 0.5 * (-0.1 + 3.5 * 0.5)) / 1.5)
    assert float(gradient(trainer, records("a"))[0].abs().max()) < 1e-6


ROUTE = Route("task", {"a": "one", "b": "two"})


def test_each_label_learns_from_its_own_teacher_and_each_state_is_evaluated_once() -> None:
    policy = AffinePolicy.of(4, policy=(0.5, -0.5, 9.0), one=0.5, two=-0.5)
    trainer = Distillation({"one": Teacher(), "two": Teacher()}, ROUTE, score_images=False, updates_per_rollout=2)
    prepared(policy, trainer, rollout(4, 3, 4))
    batch = trainer.collect(records("a", "b", "b", "b"), 0)
    policy.calls.clear()
    list(trainer.updates(batch))
    assert sorted(policy.calls) == [("one", 12), ("two", 36)]
    assert batch.metrics["cost/frozen_per_image"] == batch.metrics["cost/rollout_per_image"] == 4.0
    assert float(gradient(trainer, records("a", "b", "b", "b"))[0].abs().max()) < 1e-6
    policy.shifts["two"] += 0.2
    shift, _ = gradient(trainer, records("a", "b", "b", "b"))
    assert float(shift[:, 0].abs().max()) < 1e-6 and float(shift[:, 1].max()) < -1e-3


def test_one_teacher_at_a_time_takes_an_update_for_each() -> None:
    policy = AffinePolicy.of(4, policy=0.0, one=0.5, two=-0.5)
    trainer = Distillation({"one": Teacher(), "two": Teacher()}, ROUTE, score_images=False, split="teacher")
    prepared(policy, trainer, rollout(4, 3, 4))
    for labels, counts in (("abbb", (12, 36)), ("bbbb", (48,))):
        batch, rows = trainer.collect(records(*labels), 0), []
        for update in trainer.updates(batch):
            before = policy.evaluations
            for micro_batch in update.micro_batches:
                micro_batch()
            rows.append(policy.evaluations - before)
        assert tuple(rows) == counts
    assert trainer.forecast(rollout(4, 3, 4)).updates == 2


def test_a_guided_teacher_is_absorbed() -> None:
    """Student without guidance, teacher at 3.5: it stops at v_u + g(v_c − v_u), and a state costs two rows more."""
    policy = AffinePolicy.of(4, policy=0.0, teacher=(0.4, 0.2, -0.1))
    trainer = Distillation({"teacher": Teacher(3.5)}, match=Match("velocity"), score_images=False)
    settings = rollout(2, 3, 4, plan=Deterministic())
    prepared(policy, trainer, settings)
    with torch.no_grad():
        policy.shifts["policy"].copy_(torch.tensor([-0.1 + 3.5 * 0.5, -0.1 + 3.5 * 0.3, 0.0]))
    batch = trainer.collect(records("a", "b"), 0)
    list(trainer.updates(batch))
    assert batch.metrics["cost/rollout_per_image"] == 4 and batch.metrics["cost/frozen_per_image"] == 8
    assert (
        trainer.forecast(settings).frozen == 8 * batch.images and trainer.forecast(settings).trained == 4 * batch.images
    )
    assert float(gradient(trainer, records("a", "b"))[0].abs().max()) < 1e-6


# ------------------------------------------------------------------------------------------ one state of each rollout


LAW = (0, 0.0002, 0.0010, 0.0035, 0.0086, 0.0174, 0.0305, 0.0483, 0.0701, 0.0947, 0.1194, 0.1404, 0.1521, 0.1474, 0.1170, 0.0495)  # fmt: skip


def test_the_law_of_the_step_at_which_a_rollout_stops() -> None:
    draws = BetaStep().draw(generator(0), 200_000, 16)
    share = torch.bincount(draws, minlength=16) / len(draws)
    torch.testing.assert_close(share, torch.tensor(LAW), rtol=0, atol=3e-3)
    u = torch.arange(17).double() / 16
    exactly = (6 * u**5 - 5 * u**6).diff()  # the distribution function of Beta(5, 2)
    torch.testing.assert_close(exactly, torch.tensor(LAW).double(), rtol=0, atol=6e-5)
    assert float((exactly * torch.arange(16)).sum()) == pytest.approx(10.93, abs=5e-3)
    assert float(draws.double().mean()) == pytest.approx(10.93, abs=0.02)


@pytest.mark.parametrize("plan", [Deterministic(), Chain()], ids=["ode", "sde"])
def test_a_rollout_that_stops_costs_its_steps_and_ends_where_the_whole_one_was(plan) -> None:
    policy = AffinePolicy.of(16, policy=0.0, teacher=0.5)
    trainer = Distillation({"teacher": Teacher()}, match=Match("velocity"), query=BetaStep(), score_images=False)
    settings = rollout(3, 4, 16, plan=plan)
    prepared(policy, trainer, settings)
    batch = trainer.collect(records("a", "b", "a"), 2)
    tree = batch.forest.tree
    ends = torch.tensor([node for node in range(len(tree)) if node not in tree.evaluated.tolist()])
    assert batch.images == 12 and len(ends) == 12 and len(tree.index[ends].unique()) > 3
    assert batch.metrics["cost/rollout_per_image"] == float(tree.index[ends].double().mean())
    whole = replace(trainer, query=None)
    prepared(policy, whole, settings)
    full = whole.collect(records("a", "b", "a"), 2).forest
    for end in ends.tolist():
        same = (full.tree.root == tree.root[end]) & (full.tree.index == tree.index[end])
        torch.testing.assert_close(
            full.at(same.nonzero().flatten()), batch.forest.at(torch.tensor([end])), rtol=0, atol=0
        )
    before = policy.evaluations
    shift, _ = gradient(trainer, records("a", "b", "a"), 2)
    assert trainer.forecast(settings).trained == trainer.forecast(settings).frozen == 12
    assert policy.evaluations - before == int(tree.index[ends].sum()) + 12 + 12
    expected = torch.zeros(16, 3).double()
    for end in ends.tolist():
        expected[tree.index[end], (0, 1, 0)[tree.group[end]]] += 2 * -0.5 / 12
    torch.testing.assert_close(shift, expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------ gate


@dataclass
class Positive:
    """1 where the latent is positive, else 0. unscored: the first sample has no score."""

    unscored: bool = True
    name: str = "positive"
    spec = RewardSpec(("latents",))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        valid = torch.ones(len(batch.latents), dtype=torch.bool)
        valid[0] = not self.unscored
        return RewardOutput((batch.latents.flatten(1)[:, 0] > 0).float(), valid)


def gated(min_reward: float | None, least: int = 1, anchor: ManifoldAnchor | None = None):
    policy = AffinePolicy.of(4, policy=0.0, teacher=0.5, looks=0.0)
    gate = None if min_reward is None else Gate(min_reward, least=least)
    trainer = Distillation({"teacher": Teacher()}, gate=gate, anchor=anchor)
    prepared(policy, trainer, rollout(2, 8, 4), Positive())
    batch = trainer.collect(records("a", "a"), 0)
    list(trainer.updates(batch))
    return batch, gradient(trainer, records("a", "a"))[0][:, 0]


def test_the_gate_takes_the_kept_samples_and_divides_by_their_number() -> None:
    open_batch, everything = gated(None)
    low, kept_all = gated(float("-inf"), least=1)
    assert low.metrics["distill/kept"] == 15 / 16  # one has no score
    torch.testing.assert_close(kept_all, everything, rtol=1e-6, atol=1e-9)  # the pull is the same at every sample here
    half, kept = gated(1.0)
    count = int((open_batch.scored.scores[1:, 0] > 0.5).sum())
    assert half.metrics["distill/kept"] == count / 16 and 0 < count < 16
    assert half.metrics["cost/frozen_per_image"] == 4 * count / 16
    torch.testing.assert_close(kept, everything, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gated(1.0, least=2 * count)[1], everything / 2, rtol=1e-6, atol=1e-9)
    none, nothing = gated(float("inf"))
    assert none.metrics["distill/kept"] == 0 and float(nothing.abs().max()) == 0


def test_an_anchor_counts_at_the_states_that_the_gate_leaves_out() -> None:
    plain, with_anchor = (gated(1.0, anchor=anchor)[1] for anchor in (None, ManifoldAnchor(0.5, "looks")))
    torch.testing.assert_close(plain, with_anchor)  # the student is its anchor
    batch, pulled = gated(float("inf"), anchor=ManifoldAnchor(0.5, "teacher"))
    assert batch.metrics["cost/frozen_per_image"] == 8.0 and float(pulled.max()) < -0.01


# ------------------------------------------------------------------------------------------ beside a policy gradient


def of_kepo(**parts) -> Tensor:
    """The gradient by the shifts [T] of a policy gradient with these parts, on rewards that differ within the group."""
    policy = AffinePolicy.of(4, policy=0.1, teacher=0.5)
    policy.slopes["teacher"] += 0.3
    signal = Signal(Normalized())
    trainer = PolicyGradient(signal, ClippedRatio(0.1), micro_batch=64, **parts)
    prepared(policy, trainer, rollout(2, 8, 4, plan=Chain()), Positive(unscored=False))
    return gradient(trainer, records("a", "a"))[0][:, 0]


def test_kepo_is_grpo_and_a_gated_distillation() -> None:
    """Without the gate it is GRPO with the exact KL to the teacher, behind a closed one GRPO alone."""
    plain = of_kepo()
    ungated = of_kepo(supervision={"opd": TeacherTargets("teacher", 0.3)})
    kl = of_kepo(regularizers={"opd": KLPenalty(0.3, "exact", "teacher")})
    torch.testing.assert_close(ungated, kl, rtol=1e-4, atol=1e-6)
    closed, opened, half = (
        of_kepo(supervision={"opd": TeacherTargets("teacher", 0.3, gate=Gate(level))})
        for level in (math.inf, -math.inf, 1.0)
    )
    assert torch.equal(closed, plain) and torch.equal(opened, ungated)
    assert not torch.allclose(half, ungated) and not torch.allclose(half, plain) and not torch.allclose(plain, ungated)


def test_a_gate_beside_a_policy_gradient_is_refused_where_it_could_not_act() -> None:
    with pytest.raises(ValueError, match="expected one, which it reads"):
        TeacherTargets("teacher", gate=Gate(1.0)).check(RectifiedFlow(), ("a", "b"))
    with pytest.raises(ValueError, match="this term has neither"):
        TeacherTargets("teacher", gate=Gate(1.0, least=2))
    trainer = PolicyGradient(Signal(Normalized()), ClippedRatio(0.1), supervision={"opd": TeacherTargets("nobody")})
    with pytest.raises(ValueError, match=r"opd\.role='nobody'"):
        trainer.check(setup(rollout=rollout(4, 3, 4, plan=Chain())))


# ------------------------------------------------------------------------------------------ processes


KINDS = {
    "full": {"horizon": "full", "score_images": False},
    "stopped": {"match": Match("velocity"), "query": BetaStep(), "score_images": False},
    "gated": {"gate": Gate(1.0), "anchor": ManifoldAnchor(0.3, "looks"), "updates_per_rollout": 3},
    "one by one": {"split": "teacher"},
    "cold": {"cold_start": ColdStart(1, draws=2), "score_images": False},
}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_gradient_and_the_costs_of_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = records("a", "b", "b")

    def work(processes: Processes) -> tuple[Tensor, Tensor, dict[str, float]]:
        policy = AffinePolicy.of(4, policy=0.0, one=0.5, two=(0.1, -0.5, 0.2), looks=1.0)
        trainer = Distillation({"one": Teacher(2.0), "two": Teacher()}, ROUTE, micro_batch=4, **KINDS[kind])
        prepared(policy, trainer, rollout(3, 3, 4), Positive(unscored=False), processes)
        batch = trainer.collect(prompts, 0)
        shift, slope = gradient_of(trainer, batch)
        costs = {name: value for name, value in batch.metrics.items() if not name.startswith("time/")}
        return *(processes.gather(each[None]).sum(0) for each in (shift, slope)), costs

    alone = work(Processes())
    for shift, slope, costs in on_processes(2, work, monkeypatch):
        torch.testing.assert_close(shift, alone[0], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(slope, alone[1], rtol=1e-5, atol=1e-7)
        assert costs == pytest.approx(alone[2])
    assert float(alone[0].abs().max()) > 1e-3


# ------------------------------------------------------------------------------------------ refusals


def setup(**changes) -> Setup:
    settings = changes.pop("rollout", rollout(4, 3, 4))
    roles = {"one": Role(init="some/folder"), "two": Role(init="other/folder"), "copy": Role()}
    prompts = changes.pop("prompts", records("a", "b"))
    return Setup(settings, RectifiedFlow(), ("r",), roles, prompts=prompts, **changes)


BOTH = {"one": Teacher(), "two": Teacher()}
REFUSED = {
    "expected 'reference' or one of policy.roles": (Distillation({"nobody": Teacher()}), setup()),
    "nothing to teach": (Distillation({"copy": Teacher()}), setup()),
    "one teacher without a route": (Distillation(BOTH), setup()),
    "leads to each of them": (Distillation(BOTH, Route("task", {"a": "one", "b": "one"})), setup()),
    "expected one of \\['a', 'b'\\]": (Distillation(BOTH, ROUTE), setup(prompts=records("a", "b", ""))),
    "KL is infinite": (Distillation({"one": Teacher()}), setup(rollout=rollout(4, 3, 4, plan=Deterministic()))),
    "draws no noise": (Distillation({"one": Teacher()}), setup(rollout=rollout(4, 3, 4, kernel=CPS(0.5)))),
    "stops at the state": (Distillation({"one": Teacher()}, query=BetaStep(), score_images=False), setup()),
    "nothing is decoded": (Distillation({"one": Teacher()}, match=Match("velocity"), query=BetaStep()), setup()),
    "deterministic step arrives at": (
        Distillation({"one": Teacher()}, horizon="full"),
        setup(rollout=rollout(4, 3, 4, plan=Window(2, 1, 4, shared_start=False))),
    ),
    "of the policy that rolled out": (Distillation({"one": Teacher()}, horizon="full", updates_per_rollout=2), setup()),
    "the gate reads the scores": (Distillation({"one": Teacher()}, gate=Gate(0.5), score_images=False), setup()),
    "equal parts": (Distillation({"one": Teacher()}, updates_per_rollout=3), setup()),
    "Distillation does not read": (Distillation({"one": Teacher()}), setup(state_channels=("prm",))),
    "groups of one teacher": (Distillation({"one": Teacher()}, split="teacher"), setup()),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_work_is_refused(reason: str) -> None:
    trainer, given = REFUSED[reason]
    with pytest.raises(ValueError, match=reason):
        trainer.check(given)


def test_a_window_that_moves_away_from_the_start_is_refused_when_it_does() -> None:
    """The first iteration's steps are the first ones; those of the second come after a deterministic one."""
    trainer = Distillation({"teacher": Teacher()}, horizon="full", score_images=False)
    settings = rollout(1, 3, 4, plan=Window(2, position=Sliding(every=1), shared_start=False))
    prepared(AffinePolicy.of(4, policy=0.1, teacher=-0.5), trainer, settings)
    gradient_of(trainer, trainer.collect(records("a"), 0))
    with pytest.raises(ValueError, match="deterministic step arrives at"):
        gradient_of(trainer, trainer.collect(records("a"), 1))


def test_what_works_is_not_refused() -> None:
    Distillation(BOTH, ROUTE, horizon="full", anchor=ManifoldAnchor(0.1)).check(setup())
    Distillation({"copy": Teacher(4.5)}, match=Match("velocity")).check(
        setup(rollout=rollout(4, 3, 4, plan=Deterministic()))
    )
    with pytest.raises(ValueError, match="'myopic' or 'full'"):
        Distillation(BOTH, ROUTE, horizon="same_step")
