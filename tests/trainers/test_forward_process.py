"""ForwardProcess through its own updates on the bed: what must not change a gradient, keyed draws, what is left out and refused."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowalign.advantage import Best, BestAndWorst, Normalized
from flowalign.config import load_config
from flowalign.distributed.processes import Processes
from flowalign.loop import train
from flowalign.models.roles import Role
from flowalign.objectives import NFT, AdvantageWeighted, CenteredReward, GroupPreference, NormGuard, VelocityAnchor
from flowalign.rollouts.guidance import RewardGuidance
from flowalign.rollouts.task import Rollout
from flowalign.run.run import Run
from flowalign.selectors import NonZeroAdvantage
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows, without_time
from flowalign.trainers import ForwardProcess, FromRollout, Setup, Signal
from flowalign.trainers.samples import Samples
from flowalign.trainers.state_update import Draws
from flowalign.trainers.update_engine import UpdateEngine
from rewards import RewardBatch, RewardOutput, RewardSpec
from samplers import ODE, Deterministic, GridSigma, RectifiedFlow, UniformSigma
from tests.helpers.bed import Nearness, save_pipeline
from tests.helpers.bed_run import CONFIG, Bed
from tests.helpers.thread_processes import on_processes

SMALL = (
    "rollout.group_size=3",
    "rollout.num_inference_steps=4",
    "trainer.law=samplers.UniformSigma",
    "trainer.draws=3",
)
METHODS = ("nft", "elbo_pepg", "dgpo", "crd")  # two alone, two coupled in their groups


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("bed"))


@pytest.fixture(scope="module")
def beds(pipeline: Path) -> dict[str, Bed]:
    """One of each method, all on one policy, which has left its roles behind; for tests that step no weight."""
    roles = "policy.roles={old: {update: copy}, fast: {update: copy}, sampling: {update: copy}}"
    first = Bed.of(pipeline, ["configs/methods/nft.yaml"], *SMALL, roles)
    shift(first)
    found = {"nft": first}
    for method in METHODS[1:]:
        config, _ = load_config([f"configs/methods/{method}.yaml", CONFIG], [*SMALL, f"policy.path={pipeline}"])
        config.trainer.prepare(first.task, None)
        found[method] = Bed(config, first.policy, first.task, config.trainer)
    return found


def shift(bed: Bed) -> None:
    """Moves the policy's weights, and no role's."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in bed.policy.trainable_parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def changed(bed: Bed, *, rollout_batch: int = 4096, reward: Any = None, **trainer: Any) -> Bed:
    """The same policy with other settings of the trainer."""
    own: Any = bed.trainer
    task = replace(
        bed.task, rollout=replace(bed.task.rollout, micro_batch=rollout_batch), reward=reward or bed.task.reward
    )
    other = replace(own, **trainer)
    other.prepare(task, None)
    return Bed(bed.config, bed.policy, task, other)


def samples_of(bed: Bed, iteration: int = 0) -> Samples:
    return bed.trainer.collect(list(bed.task.prompts)[:4], iteration).samples  # type: ignore[attr-defined]


def drawn(bed: Bed, samples: Samples, rows: list[int] | None = None, epoch: int = 0) -> Draws:
    chosen = torch.arange(len(samples.places)) if rows is None else torch.tensor(rows)
    trainer: Any = bed.trainer
    engine = UpdateEngine(bed.task, samples.conditions, len(samples.places))
    found: Draws = trainer.drawn(engine, samples, chosen, torch.zeros(len(chosen)), epoch)
    return found


def noise_of(draws: Draws, samples: Samples, rows: list[int] | None = None) -> Tensor:
    """[draws, n, *] ε = u + x0."""
    latents = samples.latents.at(torch.arange(len(samples.places)) if rows is None else torch.tensor(rows))
    return draws.target.values.reshape(-1, *latents.shape) + latents


# ------------------------------------------------------------------------------------------ what must not matter


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_do_not_change_the_gradient(beds: dict[str, Bed], method: str) -> None:
    """Of 36 draws: one by one, in sevens, all together, and rolled out five states at a time."""
    _, expected = changed(beds[method], micro_batch=4096).gradient()
    assert float(expected.norm()) > 1e-4
    for size, rollout_batch in ((1, 4096), (7, 4096), (4096, 5)):
        _, found = changed(beds[method], micro_batch=size, rollout_batch=rollout_batch).gradient()
        assert float((found - expected).norm()) < 2e-5 * float(expected.norm())


@pytest.mark.parametrize("method", ["nft", "crd"])
def test_updates_on_shares_of_the_groups_have_the_gradient_of_one_update_together(
    beds: dict[str, Bed], method: str
) -> None:
    """At fixed weights, twice as large: each is the mean over its own half."""
    _, whole = beds[method].gradient()
    _, halves = changed(beds[method], updates_per_rollout=2).gradient()
    assert float((halves - 2 * whole).norm()) < 2e-5 * float(halves.norm())


def test_two_processes_do_what_one_does(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a coupled objective with a guard, an anchor, and a sample without a score: one of them repeats a draw."""
    layers = ["configs/methods/dgpo.yaml"]
    own = [Bed.of(pipeline, layers, *SMALL, "trainer.micro_batch=4") for _ in range(2)]  # threads cannot share a policy
    for bed in own:
        shift(bed)

    def work(processes: Processes) -> tuple[Tensor, dict[str, float]]:
        bed = own[processes.rank]
        task = replace(bed.task, processes=processes, reward=Partly(0.0, 1.2))
        bed.trainer.prepare(task, None)
        batch = bed.trainer.collect(list(task.prompts)[:4], 0)
        (update,) = bed.trainer.updates(batch)
        for micro_batch in update.micro_batches:
            micro_batch().backward()
        told = {**batch.metrics, **update.after()}
        found = torch.cat([p.grad.flatten() for _, p in bed.policy.trainable_parameters() if p.grad is not None])
        for _, parameter in bed.policy.trainable_parameters():
            parameter.grad = None
        return processes.gather(found[None]).sum(0), told

    [(expected, metrics)] = on_processes(1, work, monkeypatch)
    draws = round(metrics["cost/trained_per_image"] * 12)
    assert draws % 2 == 1
    for found, told in on_processes(2, work, monkeypatch):
        assert float((found - expected).norm()) < 2e-5 * float(expected.norm())
        assert told.keys() == metrics.keys()
        assert told["cost/trained_per_image"] * 12 == pytest.approx(draws + 1)
        assert told["cost/frozen_per_image"] * 12 == pytest.approx(
            3 * draws + 1
        )  # two roles, and the errors of the members
        for name in told:
            if not name.startswith(("time/", "cost/trained", "cost/frozen")):
                assert told[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


def test_a_stopped_run_goes_on_where_it_was(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four updates of a rollout, two passes over halves of the groups, killed between the second and the third of them."""

    def run(output: Path) -> tuple[dict[str, dict[str, Tensor]], list[Any]]:
        small = ["evaluation.samples_per_prompt=1", "run.checkpoint_every=1", "trainer.epochs=2",
                 "trainer.updates_per_rollout=2", f"policy.path={pipeline}", f"run.output={output}"]  # fmt: skip
        train(*load_config(["configs/methods/crd.yaml", CONFIG], [*SMALL, *small]))
        tensors, _ = checkpoint.load(checkpoint.latest(output / "bed"))
        return tensors, [without_time(row) for row in read_rows(output / "bed" / "metrics.jsonl")]

    expected, expected_rows = run(tmp_path / "whole")
    original, steps = Run.step, []

    def dies(self: Run, update: Any) -> None:
        steps.append(1)
        if len(steps) == 7:
            raise KeyError("killed")
        original(self, update)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", dies)
        with pytest.raises(KeyError):
            run(tmp_path / "stopped")
    found, rows = run(tmp_path / "stopped")
    assert rows == expected_rows and found.keys() == expected.keys()
    for section, tensors in expected.items():
        assert tensors.keys() == found[section].keys()
        assert all(torch.equal(found[section][name], tensors[name]) for name in tensors), section


# ------------------------------------------------------------------------------------------ draws


def test_draws_are_functions_of_their_keys(beds: dict[str, Bed]) -> None:
    """The same in a repeated iteration and in a part of the samples; others in another epoch or iteration."""
    bed = beds["nft"]
    samples = samples_of(bed)
    first = drawn(bed, samples)
    again = drawn(bed, samples_of(bed))
    for one, other in (
        (first.states.x, again.states.x),
        (first.states.sigma, again.states.sigma),
        (first.target.values, again.target.values),
    ):
        assert torch.equal(one, other)
    rows = [7, 2, 10]
    part = drawn(bed, samples, rows)
    assert torch.equal(part.states.x.reshape(3, 3, 2, 1, 1), first.states.x.reshape(3, 12, 2, 1, 1)[:, rows])
    assert torch.equal(part.states.sigma.reshape(3, 3), first.states.sigma.reshape(3, 12)[:, rows])
    assert part.ids.group.tolist() == 3 * [2, 0, 3] and part.ids.number.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    for other in (drawn(bed, samples, epoch=1), drawn(bed, samples, epoch=2), drawn(bed, samples_of(bed, 1))):
        assert not bool((other.states.sigma == first.states.sigma).any())
    noise = noise_of(first, samples)
    later = noise_of(drawn(bed, samples, epoch=1), samples)
    assert float((later - noise).abs().min()) > 1e-5
    assert len(first.states.sigma.unique()) == 36 and len(noise[..., 0, 0, 0].unique()) == 36


def test_a_draw_is_on_its_path_with_the_path_s_own_target(beds: dict[str, Bed]) -> None:
    bed = beds["nft"]
    samples = samples_of(bed)
    draws = drawn(bed, samples)
    noise, sigma = noise_of(draws, samples).flatten(0, 1), draws.states.sigma[:, None, None, None]
    x0 = samples.latents.at(torch.arange(12)).repeat(3, 1, 1, 1)
    torch.testing.assert_close(draws.states.x, (1 - sigma) * x0 + sigma * noise, atol=1e-6, rtol=0)
    assert torch.equal(draws.noise, draws.states.sigma.double()) and torch.equal(draws.states.rows, draws.ids.group)
    means = noise.flatten(1).mean(1)
    assert float(means.abs().max()) > 0.3 and abs(float(noise.mean())) < 0.4


def test_members_of_a_group_share_their_draws_whatever_is_batched_with_them(beds: dict[str, Bed]) -> None:
    bed = beds["dgpo"]
    samples = samples_of(bed)
    draws = drawn(bed, samples)
    sigma, noise = draws.states.sigma.reshape(3, 4, 3), noise_of(draws, samples).reshape(3, 4, 3, 2)
    assert torch.equal(sigma, sigma[..., :1].expand_as(sigma))
    torch.testing.assert_close(noise, noise[:, :, :1].expand_as(noise), atol=1e-6, rtol=0)
    assert len(sigma.unique()) == 12  # of four groups and three draws
    gaps = (noise[:, :, None, 0] - noise[:, None, :, 0]).abs().sum(-1) + torch.eye(4)
    assert float(gaps.min()) > 1e-3
    assert len(draws.ids.cell.unique()) == 12
    rows = [11, 1, 9]
    assert torch.equal(drawn(bed, samples, rows).states.sigma.reshape(3, 3), sigma.reshape(3, 12)[:, rows])
    own = drawn(changed(bed, shared_draws=False), samples)
    assert len(own.states.sigma.unique()) == 36


def test_every_epoch_passes_over_all_samples_with_new_draws(beds: dict[str, Bed]) -> None:
    """And each update reads the roles as they are then: at fixed weights two epochs differ only in their draws."""
    bed = changed(beds["nft"], epochs=2, updates_per_rollout=2)
    batch = bed.trainer.collect(list(bed.task.prompts)[:4], 0)
    losses = []
    for update in bed.trainer.updates(batch):
        total = sum(float(micro_batch().detach()) for micro_batch in update.micro_batches)
        losses.append(total)
        assert update.after()["cost/trained_per_image"] * 12 == 18
    assert len(losses) == 4 and len(set(losses)) == 4
    assert bed.trainer.state()["updates"] == 4


def test_norms_are_measured_beside_each_anchor_s_role_without_a_hinge_too(beds: dict[str, Bed]) -> None:
    bed = changed(beds["nft"], anchors={"norm": NormGuard()}, micro_batch=7)
    batch: Any = bed.trainer.collect(list(bed.task.prompts)[:4], 0)
    (update,) = bed.trainer.updates(batch)
    for micro_batch in update.micro_batches:
        micro_batch()
    found, states = update.after(), drawn(bed, batch.samples).states
    engine = UpdateEngine(bed.task, batch.samples.conditions, batch.images, 1.0)
    length, reference = (
        engine.frozen(states, role)[0].values.flatten(1).norm(dim=1) for role in ("policy", "reference")
    )
    assert found["loss/norm"] == 0
    assert found["norm/reference"] == pytest.approx(float((length / reference).mean())) != 1


# ------------------------------------------------------------------------------------------ samples that are left out


@dataclass(frozen=True)
class Partly:
    """Nearness without an answer where the image is far to the east; what it says there is `nonsense`."""

    nonsense: float
    east: float = 0.85
    name: str = "partly"
    spec = RewardSpec(("latents",))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        plain = Nearness()(batch)
        valid = batch.latents[:, 0, 0, 0] < self.east
        return RewardOutput(torch.where(valid, plain.scores, self.nonsense), valid)


@pytest.mark.parametrize("method", METHODS)
def test_a_sample_without_a_score_leaves_the_statistics_and_the_update(beds: dict[str, Bed], method: str) -> None:
    found = {}
    for nonsense in (0.0, 1e6):
        bed = changed(beds[method], reward=Partly(nonsense))
        before = bed.policy.evaluations
        batch, found[nonsense] = bed.gradient()
        valid = batch.samples.valid[:, 0]
        count = valid.reshape(4, 3).sum(1)
        used = int(count[count >= 2].sum())
        assert 0 < used < 12
        assert batch.metrics["group/trained_samples"] == used
        own: Any = bed.trainer
        roles = {*own.objective.needs, *(anchor.role for anchor in own.anchors.values())}
        per_draw = 1 + len(roles) + int(own.objective.coupled)
        assert bed.policy.evaluations - before == 12 * 4 + 3 * used * per_draw
    assert torch.equal(found[0.0], found[1e6]) and bool(found[0.0].isfinite().all())


def test_where_no_sample_is_left_the_update_has_nothing_to_do(beds: dict[str, Bed]) -> None:
    bed = changed(
        beds["dgpo"], reward=Nearness(constant=True), signal=Signal(BestAndWorst(), select=NonZeroAdvantage())
    )
    batch = bed.trainer.collect(list(bed.task.prompts)[:4], 0)
    (update,) = bed.trainer.updates(batch)
    assert not update.micro_batches and update.after()["cost/trained_per_image"] == 0
    assert batch.metrics["group/trained_samples"] == 0 and bed.trainer.state()["updates"] == 0


# ------------------------------------------------------------------------------------------ refusals

SIGNAL = Signal(Normalized())
PLAIN = ForwardProcess(SIGNAL, AdvantageWeighted(), law=UniformSigma())
SETUP = Setup(Rollout(Deterministic(), ODE(), groups=4, group_size=4, num_inference_steps=5), RectifiedFlow(), ("r",))


def test_a_plain_configuration_passes() -> None:
    PLAIN.check(SETUP)


@pytest.mark.parametrize(
    ("trainer", "rollout", "message"),
    [
        ({"updates_per_rollout": 3}, {}, r"got rollout\.groups=4 .* expected equal parts: choose a divisor"),
        ({"guidance_scale": 4.5}, {}, r"trainer\.guidance_scale=4\.5 with rollout\.guidance_scale=1.*; expected 1 too"),
        ({"anchors": {"policy": VelocityAnchor(1.0)}}, {}, "anchor named 'policy'.*: rename it"),
        ({"anchors": {"kl": VelocityAnchor(1.0, "policy")}}, {}, r"anchors\.kl\.role=policy.*: name another role"),
        ({"objective": NFT()}, {}, "old='old' and samples of trainer.source.role='policy'; expected one role for both"),
        ({"objective": AdvantageWeighted(ratio="epg"), "source": FromRollout("old")}, {}, "old='policy' and samples of"),
        ({"objective": GroupPreference()}, {"group_size": 1}, "group_size=1 with .* expected groups of at least 2"),
        ({"objective": GroupPreference()}, {}, "got trainer.shared_draws=false with GroupPreference.*: set trainer.shared_draws=true"),
        ({"objective": AdvantageWeighted(ratio="epg"), "epochs": 2}, {}, "old=policy and 2 updates per rollout.* expected a role"),
        ({"objective": AdvantageWeighted(residual="old"), "updates_per_rollout": 4}, {}, "and 4 updates per rollout"),
        ({"law": GridSigma(0.6)}, {}, "got 4 draws of the 3 levels .* expected at most as many: draw fewer"),
        ({}, {"detach_uncond": True, "guidance_scale": 4.5}, "detach_uncond=true .* no unconditional half; expected false"),
        ({"signal": Signal(Best(12), select=NonZeroAdvantage())}, {"group_size": 12}, "group_size=12 samples the same weights whatever"),
        ({}, {"group_size": 1}, "nothing would be trained: .* compares no two samples: take within=prompt"),
    ],
)  # fmt: skip
def test_what_would_do_something_else_is_refused(trainer: Any, rollout: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **trainer).check(replace(SETUP, rollout=replace(SETUP.rollout, **rollout)))


def test_an_update_at_a_scale_of_its_own_is_refused_where_the_scale_is_an_input() -> None:
    embedded = replace(
        SETUP, guidance="embedded", rollout=replace(SETUP.rollout, guidance_scale=2.5), rows_per_state=lambda scale: 1
    )
    with pytest.raises(
        ValueError, match=r"another velocity would be trained than samples; .* set trainer\.guidance_scale=2\.5"
    ):
        PLAIN.check(embedded)
    replace(PLAIN, guidance_scale=2.5).check(embedded)
    PLAIN.check(replace(embedded, guidance="none"))


def test_process_rewards_that_nothing_reads_are_refused() -> None:
    judged = replace(SETUP, state_channels=("prm",))
    for guided in (None, RewardGuidance(Nearness())):
        with pytest.raises(ValueError, match=r"got process_rewards \['prm'\], which ForwardProcess does not read"):
            PLAIN.check(replace(judged, rollout=replace(SETUP.rollout, reward_guidance=guided)))
    PLAIN.check(replace(judged, rollout=replace(SETUP.rollout, reward_guidance=RewardGuidance())))


OLD_AS_SAMPLER = [
    {"objective": NFT()}, {"objective": AdvantageWeighted(ratio="epg", old="old")},
    {"objective": AdvantageWeighted(), "anchors": {"old": VelocityAnchor(1.0, "old")}},
]  # fmt: skip


@pytest.mark.parametrize("trainer", OLD_AS_SAMPLER, ids=range(3))
def test_the_role_that_sampled_stays_while_its_samples_are_trained(trainer: Any) -> None:
    own = replace(PLAIN, source=FromRollout("old"), updates_per_rollout=2, epochs=2, **trainer)
    for every, right in ((1, False), (2, False), (4, True), (8, True)):
        setup = replace(SETUP, roles={"old": Role(update="ema", every=every)})
        if right:
            own.check(setup)
            continue
        with pytest.raises(
            ValueError, match=rf"roles\.old\.every={every} with 4 updates per rollout.*set policy\.roles\.old\.every=4"
        ):
            own.check(setup)
    assert own.roles()["old"].every == 4
    replace(own, updates_per_rollout=1, epochs=1).check(replace(SETUP, roles={"old": Role(update="ema")}))


def test_a_guard_may_follow_every_update() -> None:
    own = replace(
        PLAIN, objective=GroupPreference(guard="old", clip=0.1), source=FromRollout("old"), epochs=2, shared_draws=True
    )
    own.check(replace(SETUP, roles={"old": Role(update="ema")}))


def test_the_forecast_says_that_samples_are_guided_and_the_regression_is_not() -> None:
    def noted(own: ForwardProcess, scale: float) -> bool:
        notes = own.forecast(replace(SETUP.rollout, guidance_scale=scale)).notes
        return any("samples have guidance" in note and "rollout.guidance_scale=" in note for note in notes)

    assert noted(PLAIN, 4.5) and not noted(PLAIN, 1.0)
    assert not noted(replace(PLAIN, guidance_scale=4.5), 4.5)


def test_a_role_that_nobody_configured_is_refused() -> None:
    """It would be a copy of the policy, whatever its name says; only the one that samples may be that."""
    anchored = replace(PLAIN, anchors={"ema": VelocityAnchor(1.0, role="emma")})
    with pytest.raises(
        ValueError, match=r"got trainer\.anchors\.ema\.role='emma'; expected 'reference' or one of policy\.roles"
    ):
        anchored.check(SETUP)
    anchored.check(replace(SETUP, roles={"emma": Role(update="ema")}))
    guarded = replace(PLAIN, objective=GroupPreference(guard="fast", clip=0.1), shared_draws=True)
    with pytest.raises(ValueError, match=r"got a role of trainer\.objective='fast'; expected"):
        guarded.check(SETUP)
    guarded.check(replace(SETUP, roles={"fast": Role(update="ema")}))


def test_a_selection_that_leaves_nothing_is_refused() -> None:
    @dataclass(frozen=True)
    class Nothing:
        def choose(self, forest: Any, advantages: Any, context: Any) -> Tensor:
            return torch.zeros(len(advantages.valid), dtype=torch.bool)

    with pytest.raises(ValueError, match="leaves out every sample: take AllEdges"):
        replace(PLAIN, signal=Signal(Normalized(), select=Nothing())).check(SETUP)


WRONG = [
    lambda: replace(PLAIN, draws=0), lambda: replace(PLAIN, updates_per_rollout=0), lambda: replace(PLAIN, epochs=0),
    lambda: replace(PLAIN, micro_batch=0), lambda: replace(PLAIN, guidance_scale=0.5),
    lambda: replace(PLAIN, guidance_scale=float("nan")), lambda: AdvantageWeighted(weight="snr"),  # type: ignore[arg-type]
    lambda: AdvantageWeighted(scale=0.0), lambda: AdvantageWeighted(residual="both"),  # type: ignore[arg-type]
    lambda: AdvantageWeighted(clip=0.1), lambda: AdvantageWeighted(ratio="epg", clip=0.0),
    lambda: AdvantageWeighted(old="old"), lambda: NFT(beta=0.0), lambda: NFT(advantage_clip=0.0),
    lambda: GroupPreference(beta=0.0), lambda: GroupPreference(guard="fast"), lambda: GroupPreference(clip=0.1),
    lambda: GroupPreference(guard="fast", clip=-1.0), lambda: CenteredReward(beta=0.0),
    lambda: CenteredReward(weight="none"), lambda: VelocityAnchor(-1.0),  # type: ignore[arg-type]
    lambda: VelocityAnchor(1.0, space="score"),  # type: ignore[arg-type]
]  # fmt: skip


@pytest.mark.parametrize("make", WRONG, ids=range(len(WRONG)))
def test_bad_values_say_what_was_expected(make: Any) -> None:
    with pytest.raises(ValueError, match=r"^got .*(expected|would not read it: leave it out)"):
        make()
