"""Reward guidance of rollouts: it sees prompts, replays exactly, is keyed, counted, and refuses what cannot guide."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flowalign.config import load_config
from flowalign.errors import ConfigError
from flowalign.loop import train
from flowalign.objectives import Guard, GuidanceDistillation
from flowalign.rollouts.guidance import Probing, RewardGuidance
from flowalign.run.preflight import forecast
from rewards import RewardBatch, RewardError, RewardOutput, RewardSpec
from samplers import Chain, DanceSDE, Deterministic, KeyedNoise, RectifiedFlow, Selected, Tree, chain, window
from samplers.kernels.guided import GRADIENTS, RATE
from tests.helpers.policy_gradient import PROMPTS, make, run_updates
from tests.helpers.tiny_run import CONFIG, result

STEPS = 4


@dataclass
class Drift:
    """ρ = c·(1 + σ)·Σx, c by the prompt: ∇ρ = c·(1 + σ) everywhere. Remembers what it was asked."""

    name: str = "drift"
    differentiable: bool = True
    seen: int = 0

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(("latents",), "latent", differentiable=self.differentiable)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        self.seen += len(batch)
        slope = torch.tensor([3.0 if "KITE" in prompt else -2.0 for prompt in batch.prompts])
        scores = slope * (1 + batch.sigma) * batch.latents.flatten(1).sum(1)
        return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))


@dataclass
class Red:
    """The red of a picture; no score for pictures darker than `least`."""

    name: str = "red"
    differentiable: bool = False
    least: float = -1.0

    @property
    def spec(self) -> RewardSpec:
        return RewardSpec(differentiable=self.differentiable)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        scores = batch.images[:, 0].mean((1, 2))
        return RewardOutput(scores, scores.detach() > self.least)


def guided(pipeline: Path, guidance: RewardGuidance | None, plan=None, micro_batch: int = 64, **parts):
    _, trainer = make(pipeline, plan or Chain(shared_start=True), DanceSDE(0.25), steps=STEPS, **parts)
    rollout = replace(trainer.task.rollout, reward_guidance=guidance, micro_batch=micro_batch)
    trainer.task = replace(trainer.task, rollout=rollout)
    return trainer


def stepped(tree: Tree) -> Tensor:
    return tree.parents_of_edges


def test_each_state_is_moved_by_the_gradient_at_its_own_prompt_and_level(tiny_pipeline: Path) -> None:
    """λ = scale·h, and λ/b by the kernel's own coefficients."""
    batch = guided(tiny_pipeline, RewardGuidance(Drift(), scale=0.01, start=1)).collect(PROMPTS, 0)
    forest, tree = batch.forest, batch.forest.tree
    inside = stepped(tree)[tree.index[stepped(tree)] >= 1]
    known = forest.velocities[GRADIENTS]
    assert torch.equal((known.row >= 0).nonzero().flatten(), inside)
    slope = torch.where(tree.group[inside] == 0, 3.0, -2.0) * (1 + forest.sigma(inside))
    torch.testing.assert_close(known.at(inside), slope[:, None, None, None].expand(-1, *forest.states.shape[1:]))
    edges = tree.edges[tree.index[tree.parent[tree.edges]] >= 1]
    sigma, then = forest.step_sigmas(edges)
    kernel = DanceSDE(0.25).coefficients(sigma, then)
    rate = (0.01 * (sigma - then).double() / kernel.velocity_coef)[: len(edges)]
    torch.testing.assert_close(forest.scores[RATE][tree.parent[edges]], rate)
    assert bool(forest.scores[RATE][tree.index == 0].isnan().all())
    assert batch.metrics["cost/reward_calls_per_image"] == 1 + 3  # the image, and three states: the last step moves too
    norm = slope.abs().mean() * forest.states[0].numel() ** 0.5
    assert batch.metrics["guidance/gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    h = (sigma - then).double()
    moved = 0.01 * h * slope[torch.searchsorted(inside, tree.parent[edges])].abs() / (0.25 * h.sqrt())
    assert batch.metrics["guidance/shift_per_noise"] == pytest.approx(float(moved.mean()), rel=1e-5)


def test_without_strength_it_is_the_plain_rollout_bit_for_bit(tiny_pipeline: Path) -> None:
    """Euphonium at λ = 0 is DanceGRPO."""
    plain = guided(tiny_pipeline, None).collect(PROMPTS, 0).forest
    none = guided(tiny_pipeline, RewardGuidance(Drift(), scale=0.0)).collect(PROMPTS, 0).forest
    some = guided(tiny_pipeline, RewardGuidance(Drift(), scale=0.01)).collect(PROMPTS, 0).forest
    assert torch.equal(plain.states, none.states) and torch.equal(
        plain.log_prob.nan_to_num(), none.log_prob.nan_to_num()
    )
    leaves = plain.tree.leaves
    up = (some.at(leaves) - plain.at(leaves)).mean((1, 2, 3))
    assert bool((up[plain.tree.group[leaves] == 0] > 1e-3).all()) and bool(
        (up[plain.tree.group[leaves] == 1] < 0).all()
    )


@pytest.mark.parametrize("mode", ["unguided", "guided"])
@pytest.mark.parametrize("plan", [Chain(), Selected(Chain(), {2: 2})], ids=["chain", "selected"])
def test_the_update_replays_exactly_and_asks_no_reward(tiny_pipeline: Path, mode, plan) -> None:
    reward = Drift()
    guidance = RewardGuidance(reward, scale=0.05, log_prob_mean=mode)
    trainer = guided(tiny_pipeline, guidance, plan, anchor="stored", objective=Guard(1e-2))
    batch = trainer.collect(PROMPTS, 0)
    forest, asked = batch.forest, reward.seen
    parents, position = forest.tree.distinct_parents(forest.tree.edges)
    step = forest.edge_steps(forest.tree.edges, forest.velocities["old"].at(parents), position)
    arrived = forest.at(forest.tree.edges)
    assert torch.equal(step.log_prob(arrived), forest.log_prob[forest.tree.edges])
    moved = step.policy.mean - DanceSDE(0.25)(
        forest.at(forest.tree.parent[forest.tree.edges]), forest.velocities["old"].at(parents)[position],
        *forest.step_sigmas(forest.tree.edges),
    ).mean  # fmt: skip
    assert bool((moved != 0).any()) == (mode == "guided")
    run_updates(trainer, batch)
    assert reward.seen == asked
    assert batch.metrics["group/trained_edges"] > 0


def test_probing_is_a_function_of_the_state_and_counts_its_scores(tiny_pipeline: Path) -> None:
    """2M scores per guided state; the estimate of a linear ρ is (∇ρ·u)·u for the state's own u, whatever the batch."""
    guidance = RewardGuidance(Drift(differentiable=False), spsa=Probing(2), scale=0.01, start=2)
    batch = guided(tiny_pipeline, guidance).collect(PROMPTS, 3)
    forest, tree = batch.forest, batch.forest.tree
    inside = stepped(tree)[tree.index[stepped(tree)] >= 2]
    assert batch.metrics["cost/reward_calls_per_image"] == 1 + 2 * 2 * 2
    u = KeyedNoise(0, 3, [0, 1], forest.states.shape[1:]).probes(tree, inside, 2)
    slope = torch.where(tree.group[inside] == 0, 3.0, -2.0) * (1 + forest.sigma(inside))
    along = (slope[:, None, None, None] * u).sum((2, 3, 4), keepdim=True)
    torch.testing.assert_close(forest.velocities[GRADIENTS].at(inside), (along * u).mean(0), rtol=2e-2, atol=2.0)
    small = guided(tiny_pipeline, guidance, micro_batch=1).collect(PROMPTS, 3)
    torch.testing.assert_close(small.forest.states, forest.states, rtol=0, atol=2e-3)
    alone = guided(tiny_pipeline, guidance).collect(PROMPTS[1:], 3).forest
    own = forest.at(tree.leaves[tree.group[tree.leaves] == 1])
    torch.testing.assert_close(alone.at(alone.tree.leaves), own, rtol=0, atol=2e-3)


def test_the_directions_do_not_depend_on_batch_company_or_order() -> None:
    """Key (seed, "spsa", iteration, uid, visit, local, number)."""
    one, two = window(4, 3, 1, 1), chain(4, 2)
    both, swapped = Tree.cat([one, two]), Tree.cat([two, one])
    alone = KeyedNoise(7, 2, [5], (3,)).probes(one, torch.arange(len(one)), 2)
    company = KeyedNoise(7, 2, [5, 6], (3,)).probes(both, (both.group == 0).nonzero().flatten(), 2)
    order = KeyedNoise(7, 2, [6, 5], (3,)).probes(swapped, (swapped.group == 1).nonzero().flatten(), 2)
    assert torch.equal(alone, company) and torch.equal(alone, order)
    assert len(alone.flatten(0, 1).unique(dim=0)) == 2 * len(one)
    for other in (KeyedNoise(8, 2, [5], (3,)), KeyedNoise(7, 3, [5], (3,)), KeyedNoise(7, 2, [4], (3,))):
        assert not bool((other.probes(one, torch.arange(len(one)), 2) == alone).any())
    assert torch.equal(KeyedNoise(7, 2, [5], (3,)).probes(one, torch.tensor([4, 2]), 1)[0], alone[0, [4, 2]])


@pytest.mark.parametrize("spsa", [None, Probing(16, tau=0.05)])
def test_a_reward_of_pictures_guides_at_the_predicted_clean_latent(tiny_pipeline: Path, spsa) -> None:
    """∇ of the decoded x̂0's score, by autograd through the decoder or from its values."""
    guidance = RewardGuidance(Red(differentiable=spsa is None), spsa=spsa, scale=1.0, start=1, end=1)
    trainer = guided(tiny_pipeline, guidance, objective=Guard(1e-2), anchor="stored")
    forest = trainer.collect(PROMPTS, 0).forest
    nodes = stepped(forest.tree)[forest.tree.index[stepped(forest.tree)] == 1]
    sigma = forest.sigma(nodes)[:, None, None, None]
    x0 = (forest.at(nodes) - sigma * forest.velocities["old"].at(nodes)).requires_grad_()
    (exact,) = torch.autograd.grad(trainer.task.policy.decode(x0, grad=True)[:, 0].mean((1, 2)).sum(), x0)
    found = forest.velocities[GRADIENTS].at(nodes)
    if spsa is None:
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-7)
    else:  # 16 directions of 3,456 elements: cosine √(16/3,472) = .07
        cosine = torch.cosine_similarity(found.flatten(1), exact.flatten(1)).mean()
        assert 0.04 < float(cosine) < 0.10


def test_a_state_without_a_score_is_an_error(tiny_pipeline: Path) -> None:
    guidance = RewardGuidance(Red(least=2.0), spsa=Probing())
    with pytest.raises(RewardError, match=r"'red'.*have no score"):
        guided(tiny_pipeline, guidance).collect(PROMPTS, 0)


# ---------------------------------------------------------------------------------------------- from YAML

HERE = "tests.rollouts.test_guidance"
GUIDE = {"reward": f"{{class_path: {HERE}.Drift}}", "scale": "0.01", "start": "1"}


def overrides(**changed: str) -> list[str]:
    keys = {key: value for key, value in {**GUIDE, **changed}.items() if value}
    text = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return ["rollout.plan={class_path: samplers.Chain}", f"rollout.reward_guidance={{{text}}}"]


def test_a_configuration_guides_and_its_forecast_counts() -> None:
    config, _ = load_config(CONFIG, overrides(spsa="{directions: 3}"))
    assert config.rollout.reward_guidance == RewardGuidance(Drift(), spsa=Probing(3), scale=0.01, start=1)
    assert [reward.name for reward in config.rollout_rewards] == [config.reward.name, "drift"]
    # three chains of three steps, the last one deterministic but moved by `scale` too
    assert "at most 12.00 more scores per image" in forecast(config)


def test_the_only_process_reward_guides_by_default() -> None:
    credit = "{class_path: flowalign.credit.Process, init_args: {score: drift}}"
    config, _ = load_config(
        CONFIG,
        [*overrides(reward=""), f"process_rewards=[{{class_path: {HERE}.Drift}}]", f"trainer.signal.credit={credit}"],
    )
    guidance = config.rollout.reward_guidance
    assert guidance is not None and guidance.judge(config.process_rewards) is config.process_rewards[0]
    assert len(config.rollout_rewards) == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reward": f"{{class_path: {HERE}.Red}}"}, "not differentiable.*spsa"),
        ({"reward": f"{{class_path: {HERE}.Red}}", "spsa": "{}", "at": "state"}, "scores finished samples"),
        ({"reward": ""}, "without a reward beside 0 process_rewards"),
        ({"scale": "", "start": "9"}, "start=9.*inside the 3 steps"),
        ({"scale": "0"}, "its rate is 0"),
        ({"form": "full_tilt", "scale": "", "start": "0"}, "set start=1"),
        ({"spsa": "{directions: 0}"}, "spsa.directions=0"),
        ({"form": "half"}, "form"),
        ({"scael": "1"}, "scael"),
    ],
)
def test_what_cannot_guide_is_refused_before_loading(changed: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CONFIG, overrides(**changed))


def test_steps_without_noise_are_not_guided_by_their_noise() -> None:
    """score_half is a factor of s²: 0 in an ODE, which `scale` and full_tilt do move."""
    tree, path = Deterministic().tree(4, 2, 0, None), RectifiedFlow()
    for guidance, count in (
        (RewardGuidance(Drift()), 0),
        (RewardGuidance(Drift(), scale=0.1), 8),
        (RewardGuidance(Drift(), form="full_tilt", start=1), 6),
    ):
        assert guidance.calls(tree, DanceSDE(), path) == count


def test_distillation_without_guidance_is_refused() -> None:
    term = "{distill: {class_path: flowalign.objectives.GuidanceDistillation}}"
    with pytest.raises(ConfigError, match=r"supervision.distill.*set rollout.reward_guidance"):
        load_config(CONFIG, [f"trainer.supervision={term}"])
    config, _ = load_config(CONFIG, [*overrides(), f"trainer.supervision={term}"])
    assert vars(config.trainer)["supervision"] == {"distill": GuidanceDistillation()}


def test_the_loss_of_a_distilled_rollout_is_the_squared_move(tiny_pipeline: Path) -> None:
    """At unchanged weights v − v_T = −(λ/b)·∇ρ, so the term is the mean of (λ/b)²⟨∇ρ²⟩ over the guided states."""
    trainer = guided(
        tiny_pipeline,
        RewardGuidance(Drift(), scale=0.05, start=1),
        supervision={"distill": GuidanceDistillation(scale=2.0)},
    )
    batch = trainer.collect(PROMPTS, 0)
    (update,) = trainer.updates(batch)
    for micro_batch in update.micro_batches:
        micro_batch().backward()
    forest = batch.forest
    nodes = (forest.velocities[GRADIENTS].row >= 0).nonzero().flatten()
    size = forest.scores[RATE][nodes] ** 2 * forest.velocities[GRADIENTS].at(nodes).square().mean((1, 2, 3))
    assert update.after()["loss/distill"] == pytest.approx(2 * float(size.mean()), rel=1e-4)


@pytest.mark.slow
def test_the_layer_of_euphonium_runs_and_resumes(tiny_pipeline: Path, tmp_path: Path) -> None:
    """One run of two iterations, and one that is stopped after the first and resumed, end the same; ratios start at 1."""
    term = "trainer.supervision={distill: {class_path: flowalign.objectives.GuidanceDistillation, init_args: {scale: 0.1}}}"
    ends = []
    for output, lengths in ((tmp_path / "one", [2]), (tmp_path / "two", [1, 2])):
        for length in lengths:
            settings = [f"policy.path={tiny_pipeline}", f"run.output={output}", f"run.iterations={length}", term]
            config, plain = load_config([CONFIG, "configs/methods/euphonium.yaml"], [*settings, "rollout.group_size=3"])
            train(config, plain)
        ends.append(result(output))
    (tensors, _, rows), (others, _, other_rows) = ends
    assert rows == other_rows and all(torch.equal(tensors[name], others[name]) for name in tensors)
    for row in rows:
        assert row["guidance/gradient_norm"] > 0 and row["loss/distill"] > 0
        assert row["ratio/drift_max"] <= 1e-6 and row["ratio/clip_fraction"] == 0
        assert row["cost/reward_calls_per_image"] == pytest.approx(1 + 4 + 15 + 1 / 3)  # leaf, guided, scored states
