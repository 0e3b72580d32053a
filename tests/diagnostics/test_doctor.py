"""The doctor: green on a healthy policy, red with the right sentence for each planted fault."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from flowalign import cli
from flowalign.build import policy_of
from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.diagnostics.doctor import Finding, cost, diagnose, examine
from flowalign.diagnostics.doctor.update import drift_margin
from flowalign.diagnostics.measure import StandIn
from flowalign.models import Policy
from flowalign.objectives import Hinge
from flowalign.rollouts import collect
from rewards import RewardBatch, RewardOutput, RewardSpec
from samplers import rollout
from tests.helpers import family_run
from tests.helpers.families import subject

DATA = Path(__file__).parents[1] / "data"
CONFIG = str(DATA / "tiny.yaml")
WARNED = {"clip range", "grid", "noise"}  # of three steps and a clip range that is not said to be of so small latents
GUIDED = ["rollout.guidance_scale=3.0", "rollout.allow_cfg_update=true"]


def red(findings: list[Finding]) -> list[str]:
    return [finding.name for finding in findings if finding.ok is False]


def found(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def examined(
    pipeline: Path, *overrides: str, plant: Callable[[Any], None] = lambda policy: None, reward: Any = None
) -> list[Finding]:
    """The findings about the tiny policy with a fault planted in it."""
    config, _ = load_config(CONFIG, [f"policy.path={pipeline}", *overrides])
    policy = policy_of(config, "cpu")
    plant(policy)
    if reward is not None:
        object.__setattr__(config, "reward", reward)
    return list(examine(config, policy))


# ------------------------------------------------------------------------------------------ green


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [*GUIDED, "policy.negative_prompt=a word"],
        [
            "rollout.plan.class_path=samplers.Chain",
            "trainer.updates_per_rollout=2",
            "rollout.kernel=samplers.CPS",
            "trainer.regularizers.kl.form=exact",
        ],
        ["trainer.objective.class_path=flowalign.objectives.Guard", "trainer.micro_batch=1"],
        [
            "rollout.kernel=samplers.DPMSolver",
            "rollout.kernel.init_args.kernel=samplers.FlowSDE",
            "rollout.num_inference_steps=5",
        ],  # from σ = 1, at it and to 0 the solver is of first order
        ["policy.trainable=full", "policy.reference_copy=true"],
        ["policy.trainable=full", "trainer.regularizers.kl.beta=0"],
        ["policy.dtype=bf16", "trainer.objective.clip_range=0.2"],
        [
            "policy.trainable=full",
            "policy.reference_copy=true",
            "policy.dtype=bf16",
            "trainer.objective.clip_range=0.2",
        ],
        ["policy.roles={old: {update: copy}, fake: {update: trained}}"],
    ],
    ids=["lora", "guided", "chain", "guard", "second-order", "full-reference", "full", "bf16", "full-bf16", "roles"],
)
def test_a_healthy_policy_is_all_green(tiny_pipeline: Path, overrides: list[str]) -> None:
    findings = list(diagnose(CONFIG, [f"policy.path={tiny_pipeline}", *overrides]))
    assert [str(finding) for finding in findings if finding.ok is not True] == []
    names = {finding.name for finding in findings}
    assert {"configuration", "adapters", "parity", "replay", "floor", "gradient", "roles", "merged", "cost"} <= names
    assert all(finding.figure for finding in findings)
    assert {finding.name for finding in findings if finding.advice} <= WARNED


def test_an_epsilon_model_is_all_green(tiny_sd15_pipeline: Path) -> None:
    findings = list(diagnose(str(DATA / "tiny_sd15.yaml"), [f"policy.path={tiny_sd15_pipeline}"]))
    assert [str(finding) for finding in findings if finding.ok is not True] == []


def test_of_two_networks_that_of_the_trained_steps_is_asked(tmp_path: Path) -> None:
    """Of Wan 2.2 the first network, at σ = 1; the other one is not reached, and need not be."""
    window = "rollout.plan={class_path: samplers.Window, init_args: {size: 1, low: 0, high: 1}}"
    own = [*family_run.arguments(subject("wan22"), tmp_path), "rollout.guidance_scale=1"]
    findings = list(diagnose(family_run.CONFIG, [*own, window]))
    assert [str(finding) for finding in findings if finding.ok is not True] == []
    assert (
        "32 of 32 tensors, 0 more cannot act on the velocity, 32 are of networks that work at other steps"
        in found(findings, "reached").figure
    )


def test_a_trainer_with_roles_is_all_green(tiny_pipeline: Path) -> None:
    findings = list(diagnose(str(DATA / "contract.yaml"), [f"policy.path={tiny_pipeline}"]))
    assert [str(finding) for finding in findings if finding.ok is not True] == []


def test_a_trainer_without_a_tree_is_all_green(tiny_pipeline: Path) -> None:
    overrides = [f"policy.path={tiny_pipeline}", "trainer={class_path: tests.helpers.treeless_trainer.Treeless}"]
    findings = list(diagnose(str(DATA / "contract.yaml"), overrides))
    assert [str(finding) for finding in findings if finding.ok is not True] == []
    assert {"dtypes", "cost", "reached", "memory", "time"} <= {finding.name for finding in findings}


def test_the_rows_of_a_copied_reference_are_counted(tiny_pipeline: Path) -> None:
    findings = examined(tiny_pipeline, "policy.trainable=full", "policy.reference_copy=true")
    assert "update 0.67" in found(findings, "cost").figure  # one state of three children, for policy and reference


def test_the_figures_are_what_was_measured(tiny_pipeline: Path) -> None:
    findings = examined(tiny_pipeline, "rollout.plan.init_args.high=1")  # the window is at step 0, whatever is drawn
    assert found(findings, "parity").figure.startswith("0.0e+00")
    assert "24 tensors" not in found(findings, "adapters").figure  # 2 layers × (to_q, to_v, ff.net.2) × (A, B)
    assert "12 tensors" in found(findings, "adapters").figure and "attn.to_q 2" in found(findings, "adapters").figure
    assert "rollout 2.33 rows per image (forecast at most 2.33)" in found(findings, "cost").figure  # (1 + 3·2) / 3
    assert "update 0.67" in found(findings, "cost").figure  # one state of three children, for policy and reference
    assert "step 0 0.0e+00 (allowed 1e-06)" in found(findings, "replay").figure


# ------------------------------------------------------------------------------------------ faults in the configuration


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("rollout.groups=-1", "rollout.groups=-1"),
        ("rollout.group_size=1", "group_size=1"),
        ("policy.lora.targets=[attn.to_nothing]", "attn.to_nothing"),
        ("policy.lora.dropout=0.1", "dropout"),
        ("rollout.kernel.init_args.noise_level=0", "noise"),
        ("rollout.guidance_scale=4.5", "allow_cfg_update"),
        ("trainer.objective.init_args.clip_range=-1e-4", "clip_range"),
        ("rollout.grup_size=4", "group_size"),
    ],
)
def test_a_configuration_that_cannot_work(tiny_pipeline: Path, override: str, named: str) -> None:
    findings = list(diagnose(CONFIG, [f"policy.path={tiny_pipeline}", override]))
    assert red(findings) == ["configuration"] and named in findings[0].advice
    assert [finding.ok for finding in findings[1:]] == [None, None]  # nothing is measured or loaded, and lines show it


def test_the_command_prints_every_line_and_its_exit_code(
    tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.doctor([CONFIG, f"policy.path={tiny_pipeline}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 15 and all(line.startswith(("ok  ", "warn", "      →")) for line in lines)
    assert {line.split()[1] for line in lines if line.startswith("warn")} <= {"clip", "grid", "noise"}
    assert cli.doctor([CONFIG, f"policy.path={tiny_pipeline}", "rollout.groups=0"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  configuration" in out and "→ rollout.groups=0: expected at least 1" in out and "skip  model" in out
    assert cli.doctor([]) == 2


# ------------------------------------------------------------------------------------------ faults in the policy


def other_grid(policy: Any) -> None:
    config = {**policy.model.pipeline.scheduler.config, "shift": 1.0}
    policy.model.pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)


def first_adapter(policy: Any) -> Any:
    return next(module for module in policy.modules()["transformer"].modules() if hasattr(module, "lora_dropout"))


def adapter_dropout(policy: Any) -> None:
    first_adapter(policy).lora_dropout["default"] = nn.Dropout(0.1)


def network_dropout(policy: Any) -> None:
    policy.modules()["transformer"].transformer_blocks[0].attn.to_out[1].p = 0.1
    policy.modules()["transformer"].train()


def train_mode(policy: Any) -> None:
    policy.modules()["transformer"].train()


def all_frozen(policy: Any) -> None:
    policy.modules()["transformer"].requires_grad_(False)


def one_frozen(policy: Any) -> None:
    policy.trainable_parameters()[3][1].requires_grad_(False)


def base_trained(policy: Any) -> None:
    policy.modules()["transformer"].proj_out.weight.requires_grad_(True)


def swapped(policy: Any) -> None:
    encode = policy.encode
    policy.encode = lambda records, **settings: encode(list(records)[::-1], **settings)


def swapped_by_the_encoder(policy: Any) -> None:
    encode = policy.model.pipeline.encode_prompt
    policy.model.pipeline.encode_prompt = lambda prompt, **settings: encode(prompt=prompt[::-1], **settings)


def deaf(policy: Any) -> None:
    encode = policy.encode
    policy.encode = lambda records, **settings: encode(as_records(["a word"] * len(records)), **settings)


def changed_velocity(change: Callable[..., torch.Tensor]) -> Callable[[Any], None]:
    """Plants `change(velocity, x, sigma, conditions, guidance_scale)` in the place of the policy's velocity."""

    def plant(policy: Any) -> None:
        velocity = policy.velocity
        policy.velocity = lambda x, sigma, conditions, *, guidance_scale=1.0, detach_uncond=False: change(
            velocity, x, sigma, conditions, guidance_scale
        )

    return plant


def unguided_update(velocity: Any, x: Any, sigma: Any, conditions: Any, scale: float) -> torch.Tensor:
    return velocity(x, sigma, conditions, guidance_scale=1.0 if torch.is_grad_enabled() else scale)


def in_bf16(velocity: Any, x: Any, sigma: Any, conditions: Any, scale: float) -> torch.Tensor:
    return velocity(x, sigma, conditions, guidance_scale=scale).bfloat16()


def twice(velocity: Any, x: Any, sigma: Any, conditions: Any, scale: float) -> torch.Tensor:
    velocity(x, sigma, conditions, guidance_scale=scale)
    return velocity(x, sigma, conditions, guidance_scale=scale)


def detached(velocity: Any, x: Any, sigma: Any, conditions: Any, scale: float) -> torch.Tensor:
    return velocity(x, sigma, conditions, guidance_scale=scale).detach() + 0 * next(iter(TRAINED)).sum()


TRAINED: list[torch.Tensor] = []


def no_gradient(policy: Any) -> None:
    TRAINED[:] = [policy.trainable_parameters()[0][1]]
    changed_velocity(detached)(policy)


def gray(policy: Any) -> None:
    decode = policy.decode
    policy.decode = lambda latents, grad=False: torch.zeros_like(decode(latents, grad))


def rounded_by_batch(velocity: Any, x: Any, sigma: Any, conditions: Any, scale: float) -> torch.Tensor:
    return velocity(x, sigma, conditions, guidance_scale=scale) + (1e-4 if len(x) == 1 else 0.0)


def freezing_role(policy: Any) -> None:
    role = policy.role

    @contextmanager
    def frozen(name: str) -> Iterator[None]:  # what peft's disable_adapters does
        trained = [parameter for _, parameter in policy.trainable_parameters()]
        with role(name):
            if name == "reference":
                for parameter in trained:
                    parameter.requires_grad_(False)
            yield

    policy.role = frozen


def role_left_on(policy: Any) -> None:
    @contextmanager
    def left(name: str) -> Iterator[None]:
        if name == "reference":
            for module in policy.modules()["transformer"].modules():
                if hasattr(module, "_disable_adapters"):
                    module._disable_adapters = True
        yield

    policy.role = left


def unused_adapter(policy: Any) -> None:
    module = first_adapter(policy)
    for name in ("lora_A", "lora_B"):  # trained by name, but the layer answers without it
        vars(module)["_modules"]["spare_" + name] = getattr(module, name)
    module._disable_adapters = True


@pytest.mark.parametrize(
    ("plant", "overrides", "name", "sentence"),
    [
        (other_grid, [], "parity", "scheduler (class, shift, spacing)"),
        (adapter_dropout, [], "modes", "dropout in transformer."),
        (network_dropout, [], "modes", "dropout in transformer."),
        (train_mode, [], "modes", "call .eval()"),
        (all_frozen, [], "adapters", "adapter tensors are frozen"),
        (one_frozen, [], "adapters", "1 adapter tensors are frozen"),
        (base_trained, [], "adapters", "proj_out.weight"),
        (swapped, [], "parity", "order of prompts"),
        (swapped, [], "conditions", "rows are swapped"),
        (swapped_by_the_encoder, [], "parity", "order of prompts"),
        (deaf, [], "conditions", "does not reach the network"),
        (changed_velocity(unguided_update), GUIDED, "velocity", "one guidance_scale"),
        (changed_velocity(in_bf16), [], "velocity", "return fp32"),
        (changed_velocity(twice), [], "cost", "each distinct state once"),
        (no_gradient, [], "roles", "the velocity has no gradient at all"),
        (gray, [], "gradient", "every advantage is 0"),
        (changed_velocity(rounded_by_batch), ["trainer.objective.clip_range=1e-9", "trainer.anchor=stored"], "floor", "set objective.clip_range"),
        (freezing_role, [], "roles", "flip only the layers' disabled flag"),
        (role_left_on, [], "roles", "must restore what it switched"),
        (unused_adapter, [], "reached", "take their layers out of policy.lora.targets"),
    ],
)  # fmt: skip
def test_a_planted_fault_is_red_with_its_sentence(
    tiny_pipeline: Path, plant: Callable[[Policy], None], overrides: list[str], name: str, sentence: str
) -> None:
    findings = examined(tiny_pipeline, *overrides, plant=plant)
    assert name in red(findings), [str(finding) for finding in findings]
    assert sentence in found(findings, name).advice


def test_a_clip_range_just_above_the_measured_rounding_is_red_and_the_advised_one_is_green(tiny_pipeline: Path) -> None:
    """A run meets larger rounding than the few steps of the doctor: it would die of it some iterations later."""
    plant = changed_velocity(rounded_by_batch)

    def floor(clip_range: str) -> Finding:
        return found(
            examined(tiny_pipeline, "trainer.anchor=stored", f"trainer.objective.clip_range={clip_range}", plant=plant),
            "floor",
        )

    measured = max(float(drift) for drift in re.findall(r"step \d+ ([\d.e-]+)", floor("0.5").figure))
    assert measured > 0 and floor("0.5").ok is True
    near = floor(f"{1.1 * measured:.3e}")
    assert near.ok is False
    advised = re.findall(r"set objective.clip_range to at least ([\d.e-]+)", near.advice)[0]
    assert 2 * measured < float(advised) < 8 * measured and floor(advised).ok is True


def test_the_margin_covers_a_run_of_a_million_edges() -> None:
    """Drifts are half-normal here: `count` are measured, then the largest of a million is drawn by its inverse."""
    generator = torch.Generator().manual_seed(0)
    for count in (6, 24, 480):
        measured = torch.randn(4000, count, generator=generator, dtype=torch.float64).abs().amax(1)
        quantile = torch.rand(4000, generator=generator, dtype=torch.float64) ** 1e-6
        largest = torch.special.ndtri((1 + quantile) / 2)
        missed = float((largest > drift_margin(count) * measured).double().mean())
        assert 0.002 < missed < 0.05, (count, missed)  # neither too small nor wider than it must be


def test_what_depends_on_a_failed_check_is_skipped(tiny_pipeline: Path) -> None:
    findings = examined(tiny_pipeline, plant=all_frozen)
    assert red(findings) == ["adapters"]
    skipped = {finding.name for finding in findings if finding.ok is None}
    assert {"dtypes", "replay", "floor", "gradient", "reached", "roles", "merged", "cost", "time"} <= skipped
    assert found(findings, "gradient").figure == "needs replay, floor"
    assert found(findings, "parity").ok is True


def test_a_check_that_raises_is_a_failure_with_its_text(tiny_pipeline: Path) -> None:
    def raising(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("out of\nrange")

    findings = examined(tiny_pipeline, plant=changed_velocity(raising))
    assert found(findings, "velocity") == Finding("velocity", False, "RuntimeError", "out of range")


def test_states_stored_in_bf16(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "rollout", partial(rollout, store_dtype=torch.bfloat16))
    finding = found(examined(tiny_pipeline), "dtypes")
    assert finding.ok is False and finding.advice.startswith("states lost bits")


def test_log_probs_of_another_policy_do_not_replay(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What bf16 log-probs, another grid or another guidance in the rollout come to."""

    def rounded(*arguments: Any, **settings: Any) -> Any:
        forest = rollout(*arguments, **settings)
        forest.log_prob.copy_(forest.log_prob.bfloat16())
        return forest

    monkeypatch.setattr(collect, "rollout", rounded)
    finding = found(examined(tiny_pipeline), "replay")
    assert finding.ok is False and "same guidance_scale" in finding.advice


def test_memory_that_does_not_fit_is_told_before_the_model_is_loaded(tiny_pipeline: Path) -> None:
    findings = list(diagnose(CONFIG, [f"policy.path={tiny_pipeline}", "run.device_memory=0.4"]))
    assert red(findings) == ["memory"] and findings[-1].name == "model" and findings[-1].ok is None
    assert "expected at most the 410 MiB of the device" in found(findings, "memory").advice


def test_hours_are_timings_times_counts(tiny_pipeline: Path) -> None:
    """Two of the three prompts: 7 rows each in 2 s, 6 decodes in 3 s. Of the run: 3 iterations × 2 prompts, and 8 evaluated images of 2 rows.
    A score takes 4 s, an update 5 s per image."""
    config, _ = load_config(
        CONFIG, [f"policy.path={tiny_pipeline}", "rollout.plan.init_args.high=1", "run.device_count=4"]
    )
    metrics = {
        "cost/rollout_per_image": 14 / 6, "cost/decodes_per_image": 1.0, "time/rollout": 2.0, "time/decode": 3.0,
    }  # fmt: skip
    batch: Any = SimpleNamespace(metrics=metrics, images=6)
    figure = cost.check_time(config, batch, update=5.0, reward=4.0).figure
    rollout, reward, update, evaluation = 3 * (2 + 3), 18 * 4, 18 * 5, 16 * 2 / 14 + 8 * (0.5 + 4)
    total = (rollout + reward + update + evaluation) / 3600
    assert f"about {2 + 3 + 6 * 4 + 6 * 5:.1f} s of one device per iteration" in figure
    assert f"whole run {total:.2g} GPU-hours" in figure and f"at best {total / 4:.2g} hours on 4 devices" in figure


# ------------------------------------------------------------------------------------------ faults in the reward


class Planted:
    """A reward of which the scores are `scores(images, number of the call)`."""

    name = "planted"
    spec = RewardSpec(licence="ours")

    def __init__(self, scores: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        self.scores, self.calls, self.closed = scores, 0, False

    def load(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    def __call__(self, batch: Any) -> RewardOutput:
        self.calls += 1
        scores = self.scores(batch.images, self.calls)
        return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        (lambda images, call: images.mean((1, 2, 3)) * torch.nan, "no score"),
        (lambda images, call: torch.ones(len(images)), "every advantage is 0"),
        (lambda images, call: images.mean((1, 2, 3)) + call, "asked again in another order"),
        (lambda images, call: images.mean((1, 2, 3)) + torch.arange(len(images)), "asked again in another order"),
        (lambda images, call: images.mean((1, 2, 3)) - images.mean(), "depend on the rest of the batch"),
        (
            lambda images, call: torch.nn.functional.normalize(images.mean((1, 2, 3)), dim=0),
            "depend on the rest of the batch",
        ),
        (lambda images, call: images.nope, "nope"),
    ],
    ids=["nan", "constant", "not-deterministic", "by-place-in-the-batch", "batch-mean", "batch-norm", "raises"],
)
def test_a_reward_that_lies(tiny_pipeline: Path, scores: Any, sentence: str) -> None:
    reward = Planted(scores)
    findings = examined(tiny_pipeline, reward=reward)
    assert red(findings) == ["reward planted"] and sentence in found(findings, "reward planted").advice
    assert found(findings, "gradient").ok is True and found(findings, "time").ok is None and reward.closed
    assert sentence == "nope" or "licence ours" in found(findings, "reward planted").figure


def test_the_reward_that_stands_in_is_below_the_margin_of_every_hinge() -> None:
    images = torch.ones(2, 3, 4, 4) * torch.tensor([0.2, 1.0]).view(2, 1, 1, 1)
    scores = StandIn(("a", "b"))(RewardBatch(prompts=["x"] * 2, images=images.requires_grad_())).scores
    assert float(scores.detach().max()) == 0
    (gradient,) = torch.autograd.grad(Hinge(0.7).of(scores).sum(), images)
    assert bool((gradient != 0).all())
