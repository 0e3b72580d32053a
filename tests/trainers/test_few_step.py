"""TDM-R1 on Gaussians, where every network is known; then through the main loop on the bed."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.loop import train
from flowalign.objectives.distribution_matching import directional_loss
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows, without_time
from flowalign.trainers import AdamWConfig, Directions, FewStep, Surrogate
from flowalign.trainers.base import Update
from flowalign.trainers.boundaries import Boundaries
from samplers import plain_sigmas
from tests.helpers.bed_run import Bed
from tests.helpers.families import subject
from tests.helpers.gaussian_roles import GaussianRoles, clean_mean, task_of
from tests.helpers.thread_processes import on_processes

M, S = 0.7, 0.5  # of the teacher
LAWS = {
    "policy": (0.2, 0.9),
    "fake": (0.3, 0.8),
    "surrogate": (1.1, 0.6),
    "surrogate_ema": (1.0, 0.6),
    "reference": (M, S),
}
CONFIG = [
    "configs/methods/tdm_r1.yaml",
    "tests/data/bed.yaml",
]


class Setting:
    """A trainer on Gaussians with one batch, and the trajectories that it makes of it."""

    def __init__(
        self, trainer: FewStep, policy: GaussianRoles, groups: int = 2, group_size: int = 3, steps: int = 4,
        processes: Processes | None = None,
    ) -> None:  # fmt: skip
        task = replace(task_of(policy, groups, group_size, steps), processes=processes or Processes())
        trainer.prepare(task, None)
        self.policy, self.trainer = policy, trainer
        self.batch = trainer.collect(as_records([f"prompt {number}" for number in range(groups)]), 3)
        forest = self.batch.forest  # whose states a rollout stores in single precision
        self.batch = replace(self.batch, forest=replace(forest, states=forest.states.double()))
        self.ways = Boundaries.of(self.batch, task.seed, policy.path, trainer.shift, trainer.margin)
        self.steps = self.ways.random_steps(trainer.boundaries)

    def loss(self, role: str) -> Tensor:
        """Of the update of a role, with graph; the updates before it are made but not stepped."""
        for update in self.trainer.updates(self.batch):
            if update.role == role:
                return total(update)
        raise AssertionError(role)

    def gradient(self, role: str) -> Tensor:
        """[2] by its mean and std."""
        (found,) = torch.autograd.grad(self.loss(role), self.policy.laws[role])
        return found

    def clean(
        self, role: str, stream: str, steps: list[int], low: float = 0.0, shift: float = 0.0, shared: bool = False
    ):
        """E[x0 | x_τ] under a role at the states of a stream."""
        levels = self.ways.levels(steps, "fake 0" if stream == "generator" else stream, low, shared=shared)
        states, _ = self.ways.noised(steps, levels, stream, shared=shared)
        mean, std = self.policy.laws[role].detach()
        return clean_mean(states.x, states.sigma, mean + shift, std)


def total(update: Update) -> Tensor:
    return torch.stack([micro_batch() for micro_batch in update.micro_batches]).sum()


def few_step(**settings) -> FewStep:
    return FewStep(**{"micro_batch": 5, "boundaries": 2, **settings})


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_have_the_gradients_of_one(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Three groups of three trajectories: of two processes one has two, and sends states of one; one step is not rewarded."""

    def work(processes: Processes) -> list[Tensor]:
        trainer = few_step(directions=Directions(steps=2), boundaries=3)
        setting, found = Setting(trainer, GaussianRoles.of(**LAWS), groups=3, processes=processes), []
        for update in trainer.updates(setting.batch):
            (own,) = torch.autograd.grad(total(update), setting.policy.laws[update.role])
            found.append(processes.gather(own[None]).sum(0))
            metrics = update.after()
            found.append(
                torch.tensor([value for name, value in sorted(metrics.items()) if name.startswith(("loss", "dir"))])
            )
        return found

    expected = work(Processes())
    assert len(expected) == 6 and all(bool(gradient.any()) for gradient in expected[::2])
    for found in on_processes(count, work, monkeypatch):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------------ states


@torch.no_grad()
def test_the_prediction_of_a_state_is_what_its_straight_line_leads_to() -> None:
    setting = Setting(few_step(), GaussianRoles.of(**LAWS))
    leaves = setting.ways.forest.at(setting.ways.forest.tree.leaves)
    torch.testing.assert_close(setting.ways.predictions([2, 0]), leaves.repeat(2, 1, 1, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(setting.ways.states([0]).sigma, torch.ones(6))


@torch.no_grad()
def test_targets_are_the_derivative_of_the_noised_states_and_clean_ones_those_of_the_forward_process() -> None:
    ways = Setting(few_step(), GaussianRoles.of(**LAWS)).ways
    steps, small = [3, 1], 1e-6
    levels = ways.levels(steps, "s", 0.3, shared=True).double()
    (ahead, _), (behind, _), (states, target) = (
        ways.noised(steps, levels + step, "s", shared=True) for step in (small, -small, 0.0)
    )
    torch.testing.assert_close(target, (ahead.x - behind.x) / (2 * small), rtol=1e-5, atol=1e-6)
    x0, sigma = ways.forest.at(ways.forest.tree.leaves), levels[:6].view(-1, 1, 1, 1)
    eps = (states.x[:6] - (1 - sigma) * x0) / sigma
    torch.testing.assert_close(target[:6], eps - x0)
    torch.testing.assert_close(eps[:3], eps[:1].expand(3, -1, -1, -1))
    assert not torch.allclose(eps[0], eps[3])


@torch.no_grad()
def test_noise_levels_lie_above_the_end_of_their_step_in_unshifted_time() -> None:
    setting = Setting(few_step(), GaussianRoles.of(**LAWS), group_size=200)
    grid = plain_sigmas(4)
    for step in range(4):
        for low in (0.0, 0.55):
            levels = setting.ways.levels([step], f"{step} {low}", low, shared=False).double()
            begin = max(float(grid[step + 1]), low)
            unshifted, least = levels / (3 - 2 * levels), begin / (3 - 2 * begin) + 0.02
            assert float(unshifted.min()) > least and float(levels.max()) < 1
            share = (unshifted - least) / (1 - least)
            assert float(share.mean()) == pytest.approx(0.5, abs=0.05)  # uniform: a standard error is 0.014
    shared = setting.ways.levels([1], "s", 0.0, shared=True).view(2, 200)
    assert len(shared.unique()) == 2


def test_late_steps_are_drawn_in_proportion_to_their_number() -> None:
    ways = Setting(few_step(), GaussianRoles.of(**LAWS)).ways
    drawn = torch.tensor([ways.late_steps(2, number) for number in range(1000)]).flatten()
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.03, rtol=0)


# ------------------------------------------------------------------------------------------ fake


def test_fake_learns_the_moments_of_what_the_generator_makes() -> None:
    """One step: samples N(0.2, 0.9²), whose exact velocity is affine with these moments."""
    setting = Setting(
        few_step(boundaries=1, fake_kl=0.0, micro_batch=4096),
        GaussianRoles.of(**LAWS),
        groups=1,
        group_size=1000,
        steps=1,
    )
    law = setting.policy.laws["fake"]
    update = next(iter(setting.trainer.updates(setting.batch)))
    optimizer = torch.optim.LBFGS([law], max_iter=30)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = total(update)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert law.tolist() == pytest.approx([0.2, 0.9], abs=0.03)  # 6,000 numbers: a standard error is 0.012


def test_the_anchor_of_fake_is_to_the_teacher() -> None:
    setting = Setting(few_step(fake_kl=1e6), GaussianRoles.of(**{**LAWS, "fake": (M + 0.01, S)}))
    assert setting.gradient("fake")[0] > 0  # whatever the samples are
    free, held = (Setting(few_step(fake_kl=kl), GaussianRoles.of(**LAWS)).gradient("fake") for kl in (0.0, 0.02))
    assert not torch.allclose(free, held)


# ------------------------------------------------------------------------------------------ surrogate


def errors(setting: Setting, steps: list[int], role: str) -> Tensor:
    """ℓ [S] of a role at the surrogate's states."""
    levels = setting.ways.levels(steps, "surrogate 0", setting.trainer.surrogate.min_sigma, shared=True)
    states, target = setting.ways.noised(steps, levels, "surrogate 0", shared=True)
    mean, std = setting.policy.laws[role]
    level = states.sigma.to(states.x).view(-1, 1, 1, 1)
    velocity = (states.x - clean_mean(states.x, states.sigma, mean, std)) / level
    return (velocity - target).square().flatten(1).mean(1)


def of_the_surrogate(setting: Setting) -> tuple[list[int], Tensor, Tensor]:
    """(The late steps of its update, their weights [2, 1, 1], the advantages [2, 3]) of two groups of three samples."""
    steps, scores = setting.ways.late_steps(2, 0), setting.batch.scores[:, 0].view(2, 3)
    advantage = (scores - scores.mean(1, keepdim=True)) / (scores.std(correction=0) + 1e-4)
    return steps, torch.tensor([(step + 1) / 4 for step in steps])[:, None, None], advantage


FREE = Surrogate(beta=3.0, kl=0.0, clip=1e6, max_distance=1e6)


def test_a_group_of_two_is_diffusion_dpo() -> None:
    """Its gradient over β: −log σ(−z), z = (β/2)·[(ℓ_w − ℓ_w^ref) − (ℓ_l − ℓ_l^ref)], at the same level and noise."""
    setting = Setting(few_step(surrogate=FREE, boundaries=1), GaussianRoles.of(**LAWS), groups=1, group_size=2, steps=1)
    ours = setting.gradient("surrogate")
    gap = errors(setting, [0], "surrogate") - errors(setting, [0], "reference").detach()
    winner = int(setting.batch.scores[:, 0].argmax())
    z = FREE.beta / 2 * (gap[winner] - gap[1 - winner])
    (expected,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(-z), setting.policy.laws["surrogate"])
    advantage = 1 / (1 + 1e-4 / float(setting.batch.scores.std(correction=0)))  # not quite 1
    torch.testing.assert_close(ours, expected / FREE.beta, rtol=5e-3, atol=0)
    assert advantage == pytest.approx(1, abs=5e-3)


def test_the_gate_of_a_group_is_over_all_of_it_and_late_steps_weigh_more() -> None:
    setting = Setting(few_step(surrogate=FREE), GaussianRoles.of(**LAWS), groups=2, group_size=3)
    steps, late, advantage = of_the_surrogate(setting)
    now, reference = (errors(setting, steps, role).view(2, 2, 3) for role in ("surrogate", "reference"))
    gate = (FREE.beta / 3 * (advantage * (now - reference)).sum(2)).sigmoid().detach()
    loss = (late * gate[..., None] * advantage * now).mean()
    (expected,) = torch.autograd.grad(loss, setting.policy.laws["surrogate"])
    torch.testing.assert_close(setting.gradient("surrogate"), expected, rtol=1e-5, atol=1e-8)


def test_the_kl_of_the_surrogate_has_the_weight_of_its_step() -> None:
    """What it adds to the gradient: that of kl·(j + 1)/K·⟨(v − v_teacher)²⟩, v = (x − x̂0)/σ."""
    free, held = (Setting(few_step(surrogate=replace(FREE, kl=kl)), GaussianRoles.of(**LAWS)) for kl in (0.0, 0.5))
    steps, late, _ = of_the_surrogate(held)
    levels, laws = held.ways.levels(steps, "surrogate 0", 0.3, shared=True), held.policy.laws
    states, _ = held.ways.noised(steps, levels, "surrogate 0", shared=True)
    own, teacher = (clean_mean(states.x, states.sigma, *laws[role]) for role in ("surrogate", "reference"))
    gap = ((own - teacher) / levels.double().view(-1, 1, 1, 1)).square().flatten(1).mean(1).view(2, 2, 3)
    (expected,) = torch.autograd.grad(0.5 * (late * gap).mean(), laws["surrogate"])
    assert float(late.min()) < 1
    torch.testing.assert_close(held.gradient("surrogate") - free.gradient("surrogate"), expected, rtol=1e-5, atol=1e-8)


def test_at_the_teacher_every_gate_is_a_half() -> None:
    laws = {**LAWS, "surrogate": (M, S), "surrogate_ema": (M, S)}
    for beta in (1.0, 1000.0):
        setting = Setting(few_step(surrogate=Surrogate(beta=beta)), GaussianRoles.of(**laws))
        steps, late, advantage = of_the_surrogate(setting)
        loss = (0.5 * late * advantage * errors(setting, steps, "surrogate").view(2, 2, 3)).mean()
        (expected,) = torch.autograd.grad(loss, setting.policy.laws["surrogate"])
        torch.testing.assert_close(setting.gradient("surrogate"), expected, rtol=1e-5, atol=1e-8)


def test_a_sample_stops_outside_the_clip_range_and_beyond_the_teacher() -> None:
    """The guard is the surrogate's average; a distance of 0.16·(1−τ)… is far, one of 1e6 is not."""
    policy = GaussianRoles.of(**LAWS)
    free = Setting(few_step(surrogate=FREE), policy).gradient("surrogate")
    narrow = Setting(few_step(surrogate=Surrogate(3.0, 0.0, 1e-9, 1e6)), policy).gradient("surrogate")
    near = Setting(few_step(surrogate=Surrogate(3.0, 0.0, 1e6, 1e-9)), policy).gradient("surrogate")
    assert not torch.allclose(free, narrow) and not torch.allclose(free, near)
    both = Setting(few_step(surrogate=Surrogate(3.0, 0.0, 1e-9, 1e-9)), policy)
    steps, late, advantage = of_the_surrogate(both)
    now, old, reference = (
        errors(both, steps, role).view(2, 2, 3) for role in ("surrogate", "surrogate_ema", "reference")
    )
    stopped = (advantage * (old - now) > 0) | (advantage * (reference - now) > 0)
    gate = (3.0 / 3 * (advantage * (now - reference)).sum(2)).sigmoid().detach()
    loss = (late * gate[..., None] * advantage * torch.where(stopped, now.detach(), now)).mean()
    (expected,) = torch.autograd.grad(loss, policy.laws["surrogate"])
    assert 0 < int(stopped.sum()) < stopped.numel()
    torch.testing.assert_close(both.gradient("surrogate"), expected, rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------------ generator


@pytest.mark.parametrize("rewarded", [4, 2, 0])
def test_the_generator_moves_along_the_three_directions_and_through_its_prediction_alone(rewarded: int) -> None:
    """Closed forms of the predictions of Gaussians at the draws of the update; x_τ depends on the generator, its gradient not."""
    directions = Directions(0.3, guidance_scale=4.5, reward_guidance_scale=2.0, min_sigma=0.3, steps=rewarded)
    setting = Setting(few_step(directions=directions), GaussianRoles.of(0.4, **LAWS))
    steps, ways = setting.steps, setting.ways
    real, fake = (setting.clean(role, "generator", steps) for role in ("reference", "fake"))
    without = setting.clean("reference", "generator", steps, shift=-0.4)
    guided = without + 4.5 * (real - without)
    (mean, std), here = setting.policy.laws["policy"], ways.states(steps)
    level = here.sigma.to(here.x).view(-1, 1, 1, 1)
    noise = (here.x - (1 - level) * mean) / ((1 - level) * std + level)  # which the straight line came from
    x0 = here.x - level * (noise - mean - std * noise)
    inside = torch.tensor([step < rewarded for step in steps]).repeat_interleave(len(ways))
    loss = (torch.where(inside, 1.0, 0.3) * directional_loss(x0, real - fake, guided)).mean()
    loss = loss + 0.3 * directional_loss(x0, 3.5 * (real - without), guided).mean()
    if some := [step for step in steps if step < rewarded]:
        prompt, plain, reference = (
            setting.clean(role, "reward", some, 0.3, shift, shared=True)
            for role, shift in (("surrogate", 0.0), ("surrogate", -0.4), ("reference", 0.0))
        )
        surrogate = plain + 2.0 * (prompt - plain)
        rows = directional_loss(x0[inside], surrogate - reference, surrogate)
        loss = loss + 0.7 * rows.sum() / len(x0)
    (expected,) = torch.autograd.grad(loss, setting.policy.laws["policy"])
    torch.testing.assert_close(setting.gradient("policy"), expected, rtol=1e-5, atol=1e-8)


def test_distribution_matching_is_at_rest_where_the_generator_makes_what_the_teacher_knows() -> None:
    """Fake exact: d_kl is 0 at m_g = m and pulls there from both sides."""
    still = Directions(0.0, 1.0, 1.0, steps=0)  # d_kl has the weight of the distillation, then: no reward, no guidance
    only_kl = Directions(1.0, 1.0, 1.0, steps=4)  # the reward has weight 0, and guidance 1 no direction
    for mean, sign in ((M - 0.3, -1), (M, 0), (M + 0.3, 1)):
        laws = {**LAWS, "policy": (mean, S), "fake": (mean, S)}
        setting = Setting(few_step(directions=only_kl, boundaries=1), GaussianRoles.of(**laws), group_size=20, steps=1)
        assert float(setting.gradient("policy")[0].sign()) == sign
        setting = Setting(few_step(directions=still, boundaries=1), GaussianRoles.of(**laws), group_size=20, steps=1)
        assert torch.equal(setting.gradient("policy"), torch.zeros(2).double())


def test_a_shifted_surrogate_moves_the_generator_by_the_predicted_amount() -> None:
    """Surrogate N(m + δ, s²), fake exact: d_kl = (m − m_g)·g(τ) and d_reward = δ·g(τ'), g(σ) = σ²/V(σ), so that it rests at
    m_g = m + δ·w·E[g(τ')/n']/E[g(τ)/n] with the distances n of the draws, found by iteration."""
    delta, directions = 0.2, Directions(0.6, 1.0, 1.0, min_sigma=0.3, steps=4)

    def at(mean: float) -> Setting:
        laws = {**LAWS, "policy": (mean, S), "fake": (mean, S), "surrogate": (M + delta, S)}
        return Setting(few_step(directions=directions, boundaries=1), GaussianRoles.of(**laws), group_size=24, steps=1)

    def predicted(setting: Setting) -> float:
        real, surrogate = (
            setting.clean("reference", "generator", [0]),
            setting.clean("surrogate", "reward", [0], 0.3, 0.0, True),
        )
        x0, ways = setting.ways.predictions([0]), setting.ways
        near, far = ((x0 - y).abs().flatten(1).mean(1) for y in (real, surrogate))
        kl, reward = (
            (sigma**2 / ((1 - sigma) ** 2 * S**2 + sigma**2) / distance).mean()
            for sigma, distance in (
                (ways.levels([0], "fake 0", 0.0, shared=False).double(), near),
                (ways.levels([0], "reward", 0.3, shared=True).double(), far),
            )
        )
        return M + delta * 0.4 * float(reward / kl)

    mean = M
    for _ in range(12):
        mean = predicted(at(mean))
    assert M + 0.02 < mean < M + 0.4
    assert float(at(mean).gradient("policy")[0]) == pytest.approx(0, abs=1e-6)
    assert float(at(mean - 0.05).gradient("policy")[0]) < -1e-3
    assert float(at(mean + 0.05).gradient("policy")[0]) > 1e-3


# ------------------------------------------------------------------------------------------ cost and refusals


def test_it_costs_thirteen_forwards_and_three_backwards_of_a_sample_and_step() -> None:
    setting = Setting(few_step(), GaussianRoles.of(**LAWS))
    before, forecast = setting.policy.evaluations, setting.trainer.forecast(setting.trainer.task.rollout)
    frozen = trained = 0.0
    for update in setting.trainer.updates(setting.batch):
        total(update)
        measured = update.after()
        frozen += measured["cost/frozen_per_image"]
        trained += measured["cost/trained_per_image"]
    assert (frozen, trained) == (10 * 2, 3 * 2)
    assert setting.policy.evaluations - before == forecast.frozen + forecast.trained == (10 + 3) * 2 * 6
    assert forecast.updates == 3


def test_a_scale_that_the_generator_takes_as_an_input_is_allowed(large_machine: None) -> None:
    layers = [f"configs/{layer}.yaml" for layer in ("methods/tdm_r1", "models/flux1_dev", "rewards/jpeg")]
    config, _ = load_config(layers, [f"policy.path={subject('flux1_dev').folder}"])
    assert config.rollout.guidance_scale == 3.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.plan=samplers.Chain", "rollout.kernel=samplers.FlowSDE"], "expected samplers.Deterministic"),
        (["rollout.guidance_scale=2"], "has the guidance in its weights"),
        (["rollout.kernel={class_path: samplers.DPMSolver, init_args: {kernel: samplers.ODE}}"], "Euler's steps"),
        (["rollout.group_size=1"], "compares no two samples"),
        (["trainer.boundaries=5"], "at most one for each"),
        (["trainer.surrogate.min_sigma=0.999"], "leaves no level"),
        (["policy.reference_copy=false"], "reference_copy"),
        (["trainer.fake_updates=0"], "fake_updates=0"),
        (["process_rewards=[tests.helpers.bed.Potential]"], "FewStep does not read"),
        (
            ["policy.roles={fake: {update: ema}}"],
            r"roles\.fake\.update=ema, a role that FewStep steps itself; expected trained",
        ),
        (
            ["policy.roles={surrogate_ema: {update: trained}}"],
            "that FewStep does not step; expected frozen, copy or ema",
        ),
        (["trainer.teacher=nowhere/at/all"], "the role teacher.*starts from a pipeline"),
    ],
)
def test_what_cannot_be_is_refused(pipeline: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, [f"policy.path={pipeline}", *overrides])


# ------------------------------------------------------------------------------------------ through the main loop


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.bed import save_pipeline

    return save_pipeline(tmp_path_factory.mktemp("bed"))


def run_it(pipeline: Path, output: Path, *overrides: str) -> tuple[dict, dict, list]:
    """What two equal runs agree on: tensors and state of the last checkpoint, and metrics, less the clock."""
    small = ["rollout.group_size=6", "rollout.groups=2", "evaluation.samples_per_prompt=1"]
    train(*load_config(CONFIG, [f"policy.path={pipeline}", f"run.output={output}", *small, *overrides]))
    tensors, state = checkpoint.load(checkpoint.latest(output / "bed"))
    flat = {f"{section}/{name}": value for section, part in tensors.items() for name, value in part.items()}
    state = {key: value for key, value in state.items() if not key.startswith("time/")}
    return flat, state, [without_time(row) for row in read_rows(output / "bed" / "metrics.jsonl")]


def test_a_resumed_run_is_the_same_with_three_optimizers_and_four_roles(pipeline: Path, tmp_path: Path) -> None:
    teacher = f"trainer.teacher={pipeline}"
    whole = run_it(pipeline, tmp_path / "whole", teacher, "run.iterations=2")
    run_it(pipeline, tmp_path / "parts", teacher, "run.iterations=1")
    resumed = run_it(pipeline, tmp_path / "parts", teacher, "run.iterations=2")
    assert whole[0].keys() == resumed[0].keys() and whole[1] == resumed[1] and whole[2] == resumed[2]
    assert all(torch.equal(value, resumed[0][name]) for name, value in whole[0].items())
    sections = {name.partition("/")[0] for name in whole[0]}
    roles = {f"role_{name}" for name in ("policy", "teacher", "fake", "surrogate", "surrogate_ema")}
    assert roles | {f"optimizer_{name}" for name in ("policy", "fake", "surrogate")} <= sections
    assert whole[1]["trainer"] == {"memory": {}, "policy": 2, "fake": 2, "surrogate": 2}


def test_it_begins_from_the_teacher_which_stays_as_it_is(pipeline: Path, tmp_path: Path) -> None:
    """The average follows the surrogate once, with the decay 0.001."""
    flat, _, _ = run_it(pipeline, tmp_path, f"trainer.teacher={pipeline}", "run.iterations=1")
    weights = {
        role: torch.cat([v.flatten() for n, v in sorted(flat.items()) if n.startswith(f"role_{role}/")])
        for role in ("policy", "teacher", "fake", "surrogate", "surrogate_ema")
    }
    base = run_weights(pipeline)
    assert torch.equal(weights["teacher"], base)
    moved = {role: float((value - base).norm()) for role, value in weights.items()}
    assert min(moved[role] for role in ("policy", "fake", "surrogate")) > 0
    expected = 0.001 * base + 0.999 * weights["surrogate"]
    torch.testing.assert_close(weights["surrogate_ema"], expected, rtol=1e-6, atol=1e-7)


def run_weights(pipeline: Path) -> Tensor:
    from flowalign.models import load_policy

    policy = load_policy(str(pipeline), family="tests.helpers.bed.FAMILY", trainable="full")
    return torch.cat([p.detach().flatten() for _, p in sorted(policy.trainable_parameters())])


def test_it_improves_a_reward_without_a_gradient(pipeline: Path) -> None:
    """Three steps end between the four modes: one sample in fifteen is a hit."""
    hit = [
        "reward=tests.helpers.bed.Hit",
        "evaluation.rewards=[tests.helpers.bed.Hit]",
        "rollout.num_inference_steps=3",
    ]
    rates = ["optimizer.lr=1e-2", "fake_optimizer.lr=3e-3", "surrogate_optimizer.lr=3e-3"]
    steps = ["rollout.group_size=12", "evaluation.num_inference_steps=3", *(f"trainer.{rate}" for rate in rates)]
    bed = Bed.of(pipeline, CONFIG[:1], *hit, *steps)
    before = bed.reward()
    for number in range(8):
        bed.iteration(number)
    after = bed.reward()
    assert before < 0.1 and after > before + 0.1


def test_optimizers_have_settings_of_their_own() -> None:
    trainer = few_step(optimizer=AdamWConfig(lr=1e-3), fake_optimizer=AdamWConfig(lr=2e-3))
    setting = Setting(trainer, GaussianRoles.of(**LAWS))
    rates = {role: optimizer.param_groups[0]["lr"] for role, optimizer in setting.trainer.optimizers.items()}
    assert rates == {"policy": 1e-3, "fake": 2e-3, "surrogate": 3e-4}
