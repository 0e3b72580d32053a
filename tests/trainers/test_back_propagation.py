"""The trainer that back-propagates rewards: on the two-dimensional bed, and on a tiny pipeline with its decoder and a LoRA."""

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from flowalign.config import load_config
from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.loop import train
from flowalign.models import LoRA, Size, load_policy
from flowalign.objectives import KLPenalty
from flowalign.rollouts.task import Rollout, Task
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows, without_time
from flowalign.trainers import BackPropagation
from flowalign.truncations import LastSteps, LowVariance, OneStep
from rewards import RewardBatch, RewardError, RewardOutput, RewardSpec
from samplers import ODE, Deterministic
from tests.helpers.bed import Nearness, save_pipeline
from tests.helpers.bed_run import CONFIG, Bed
from tests.helpers.policy_gradient import PROMPTS, gradients, run_updates
from tests.helpers.thread_processes import on_processes

METHODS = ("refl", "draft", "draft_k", "draft_lv", "alignprop", "drtune", "srpo")
PARTS = {"sparse": "Sparse", "leaps": "TwoLeaps", "independent": "RandomSuffix"}
RANDOM = ("refl", "drtune")  # an iteration may cost less than the forecast
EXACT = ("draft", "draft_k", "draft_lv", "srpo", "sparse", "leaps")
BASE = 0.321  # reward without training
STEPS = 10
GROUP = ("rollout.group_size=12", f"rollout.num_inference_steps={STEPS}")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("bed"))


def bed_of(pipeline: Path, method: str, *overrides: str) -> Bed:
    """A method of configs/methods, or one of PARTS in the place of draft_k's."""
    name = method if method in METHODS else "draft_k"
    part = [f"trainer.truncation=flowalign.truncations.{PARTS[method]}"] if method in PARTS else []
    part += ["trainer.truncation.independent=true"] if method == "independent" else []
    return Bed.of(pipeline, [f"configs/methods/{name}.yaml"], *GROUP, *part, *overrides)


def perturbed(bed: Bed) -> Bed:
    """With a correction other than 0, so that the policy is not its reference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in bed.policy.trainable_parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return bed


# ---------------------------------------------------------------------------------------------- it learns, at the cost


@pytest.mark.parametrize(
    "method", ["refl", "draft", "draft_lv", "srpo", *PARTS]
)  # all layers: tests/methods/test_bed.py
def test_it_improves_and_costs_what_its_passes_say(pipeline: Path, method: str) -> None:
    bed = bed_of(pipeline, method)
    rollout, trainer = bed.task.rollout, bed.trainer
    forecast, passes = trainer.forecast(rollout), trainer.truncation.passes(STEPS)
    for number in range(6):
        found = bed.iteration(number)
        (row,) = found.updates
        images, forwards = found.batch.images, row["cost/rollout_per_image"] + row["cost/trained_per_image"]
        assert images == 48 and found.evaluations == forwards * images
        assert found.evaluations <= forecast.trained + forecast.rolled
        if method not in RANDOM:
            assert found.evaluations == forecast.trained + forecast.rolled
        if method in EXACT:
            assert row["cost/trained_per_image"] == passes.graph and row["cost/rollout_per_image"] == passes.without
        assert row["cost/reward_calls_per_image"] == passes.scores and row["cost/decodes_per_image"] == 0  # latents
        assert all(math.isfinite(value) for value in row.values())
    assert bed.reward() > BASE + (0.05 if method == "srpo" else 0.2)


def test_the_rows_of_a_run_are_complete_for_a_comparison(pipeline: Path, tmp_path: Path) -> None:
    """Stopped after an iteration and taken up, it ends where the uninterrupted run does, bit for bit."""
    files = ["configs/methods/drtune.yaml", CONFIG]

    def run(name: str, iterations: int) -> None:
        settings = [f"policy.path={pipeline}", f"run.output={tmp_path / name}", f"run.iterations={iterations}", 
                    "rollout.group_size=2", "rollout.num_inference_steps=5", "evaluation.samples_per_prompt=1",
                    "trainer.micro_batch=3"]  # fmt: skip
        train(*load_config(files, settings))

    run("whole", 3)
    run("parts", 1)
    run("parts", 3)
    tensors, rows = [], []
    for name in ("whole", "parts"):
        tensors.append(checkpoint.load(checkpoint.latest(tmp_path / name / "bed"))[0])
        rows.append([without_time(row) for row in read_rows(tmp_path / name / "bed" / "metrics.jsonl")])
    assert rows[0] == rows[1] and len(rows[0]) == 3
    for section, expected in tensors[0].items():
        assert all(torch.equal(tensors[1][section][name], value) for name, value in expected.items())
    wanted = {"reward/mean", "reward/invalid", "loss/policy", "optim/grad_norm", "cost/images", "cost/update_per_image",
              "cost/rollout_per_image", "cost/decodes_per_image", "cost/reward_calls_per_image"}  # fmt: skip
    assert wanted <= rows[0][0].keys()
    assert rows[0][0]["cost/update_per_image"] == 3 * 3  # three steps with forward and backward, of full weights


@pytest.mark.slow
def test_a_run_in_two_processes_ends_where_one_does(pipeline: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    settings = [f"policy.path={pipeline}", "rollout.groups=3", "rollout.group_size=3", "trainer.micro_batch=2",
                "trainer.regularizers.kl={class_path: flowalign.objectives.KLPenalty, init_args: {beta: 0.1, form: velocity}}",
                "rollout.num_inference_steps=5", "evaluation.samples_per_prompt=1"]  # fmt: skip
    files = [str(root / "configs/methods/draft_k.yaml"), str(root / CONFIG)]
    train(*load_config(files, [*settings, f"run.output={tmp_path / 'one'}"]))
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
                   "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    runner = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(root / "scripts/train.py")]
    done = subprocess.run(
        [sys.executable, *runner, *files, *settings, f"run.output={tmp_path / 'two'}"],
        env=environment, timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (read_rows(tmp_path / name / "bed" / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for name in ("reward/mean", "reward/nearness_std", "loss/policy", "loss/kl", "optim/grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-7), name
        assert b["cost/rollout_per_image"] == a["cost/rollout_per_image"] * 10 / 9  # a row that pads is run too
        assert b["cost/reward_calls_per_image"] == 1  # but not scored


# ---------------------------------------------------------------------------------------------- one gradient


def same(one: Tensor, other: Tensor) -> None:
    assert float(one.norm()) > 1e-4
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


VELOCITY = (
    "trainer.regularizers.kl={class_path: flowalign.objectives.KLPenalty, init_args: {beta: 0.3, form: velocity}}"
)


@pytest.mark.parametrize("method", ["draft", "draft_lv", "drtune", "leaps", "srpo"])
def test_micro_batches_and_checkpointing_change_nothing(pipeline: Path, method: str) -> None:
    found = []
    for overrides in (("trainer.checkpoint=false",), ("trainer.micro_batch=7",)):
        small = ("rollout.group_size=4", "rollout.num_inference_steps=5")
        bed = perturbed(bed_of(pipeline, method, VELOCITY, *small, *overrides))
        _, gradient = bed.gradient()
        found.append((gradient, bed.policy.evaluations))
    same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]  # what a backward computes again is not counted


def test_two_processes_share_the_samples_and_pad_without_weight(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three groups of three: the process with two of them sends one's condition along with a sample of it."""
    beds = [
        perturbed(bed_of(pipeline, "draft_k", "rollout.groups=3", "rollout.group_size=3", VELOCITY)) for _ in range(3)
    ]
    _, whole = beds[2].gradient()

    def work(processes: Processes) -> tuple[torch.Tensor, list[int]]:
        bed = beds[processes.rank]
        task = replace(bed.task, processes=processes)
        bed.trainer.prepare(task, {"updates": 0})
        batch = bed.trainer.collect(list(task.prompts)[:3], 0)
        assert len(next(iter(batch.conditions.tensors.values()))) == (2, 1)[processes.rank]
        (update,) = bed.trainer.updates(batch)
        for micro_batch in update.micro_batches:
            micro_batch().backward()
        own = torch.cat([parameter.grad.flatten() for _, parameter in bed.policy.trainable_parameters()])
        return processes.gather(own[None]).sum(0), [len(update.micro_batches)]

    (total, count), (again, others) = on_processes(2, work, monkeypatch)
    assert count == others
    same(whole, total)
    assert torch.equal(total, again)


def _split(flat: Tensor, bed: Bed) -> Sequence[Tensor]:
    return flat.split([parameter.numel() for _, parameter in bed.policy.trainable_parameters()])


def test_the_gradient_is_that_of_finite_differences_with_a_regularizer_on_the_way(pipeline: Path) -> None:
    """The states of later steps depend on the weights, and so does the divergence there."""
    bed = perturbed(bed_of(pipeline, "draft", VELOCITY, "rollout.num_inference_steps=3", "rollout.group_size=2"))
    _, gradient = bed.gradient()
    direction = gradient / gradient.norm()

    def loss(length: float) -> float:
        with torch.no_grad():
            for (_, parameter), part in zip(bed.policy.trainable_parameters(), _split(direction, bed), strict=True):
                parameter += length * part.view_as(parameter)
            (update,) = bed.trainer.updates(bed.trainer.collect(list(bed.task.prompts)[:4], 0))
            found = sum(float(micro_batch()) for micro_batch in update.micro_batches)
            for (_, parameter), part in zip(bed.policy.trainable_parameters(), _split(direction, bed), strict=True):
                parameter -= length * part.view_as(parameter)
        return found

    slope = (loss(2e-2) - loss(-2e-2)) / 4e-2
    assert slope == pytest.approx(float(gradient.norm()), rel=5e-3)


# ---------------------------------------------------------------------------------------------- rewards


@dataclass(frozen=True, eq=False)
class Picky:
    """Nearness, but of `north` prompts no sample, or with `all_invalid` of none."""

    name: str = "nearness"
    all_invalid: bool = False
    spec = RewardSpec(("latents",), differentiable=True)
    seen: list[str] = field(default_factory=list)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        self.seen.extend(batch.prompts)
        output = Nearness()(batch)
        valid = torch.tensor([not (self.all_invalid or prompt == "north east") for prompt in batch.prompts])
        return replace(output, scores=torch.where(valid, output.scores, torch.nan), valid=valid)


def test_a_sample_without_a_score_has_no_gradient_and_leaves_the_mean(pipeline: Path) -> None:
    bed = perturbed(bed_of(pipeline, "draft_k"))
    records = [record for record in bed.task.prompts if record.prompt != "north east"]
    plain = bed.rewarded(Nearness(), [])
    batch = plain.trainer.collect(records, 0)
    (update,) = plain.trainer.updates(batch)
    for micro_batch in update.micro_batches:
        micro_batch().backward()
    others, mean = gradients(bed.policy), update.after()["reward/mean"]
    picky = bed.rewarded(Picky(), [])
    batch = picky.trainer.collect(list(bed.task.prompts), 0)
    (update,) = picky.trainer.updates(batch)
    for micro_batch in update.micro_batches:
        micro_batch().backward()
    found, metrics = gradients(bed.policy), update.after()
    assert metrics["reward/invalid"] == 12 and metrics["reward/mean"] == pytest.approx(mean, rel=1e-5)
    for name, value in others.items():  # divided by the number of all
        torch.testing.assert_close(found[name] * 4 / 3, value, rtol=1e-4, atol=1e-7)


def test_a_reward_that_fails_stops_the_run(pipeline: Path) -> None:
    bed = bed_of(pipeline, "draft_k").rewarded(Picky(all_invalid=True), [])
    before = bed.weights()
    with pytest.raises(RewardError, match="48 of 48 samples have no score"):
        bed.iteration(0)
    torch.testing.assert_close(bed.weights(), before)  # the gradient of no score is 0


def test_srpo_asks_the_reward_with_wanted_and_unwanted_words(pipeline: Path) -> None:
    bed = bed_of(pipeline, "srpo", "trainer.truncation.wanted=Sharp", "trainer.truncation.unwanted=Dull")
    reward = Picky()
    bed.rewarded(reward, []).iteration(0)
    assert {prompt.partition(". ")[0] for prompt in reward.seen} == {"Sharp", "Dull"}


# ---------------------------------------------------------------------------------------------- decoder and LoRA


@dataclass(frozen=True)
class Bright:
    """Mean of the pixels times themselves: a gradient that differs from pixel to pixel."""

    name: str = "bright"
    spec = RewardSpec(differentiable=True)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        scores = batch.images.square().mean((1, 2, 3))
        return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))


@pytest.mark.parametrize("truncation", [LastSteps(None), LowVariance(1), OneStep()], ids=str)
def test_through_decoder_and_lora_checkpointing_gives_the_same_gradient(tiny_pipeline: Path, truncation) -> None:
    """Under guidance, with the reference (the network without its LoRA) on the way; a backward outside the role would differ."""
    torch.manual_seed(0)
    policy = load_policy(str(tiny_pipeline), lora=LoRA(rank=4, alpha=8, targets=("attn.to_q", "attn.to_v", "ff.net.2")))
    for name, parameter in policy.trainable_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    settings = Rollout(
        Deterministic(), ODE(), groups=2, group_size=1, num_inference_steps=3, guidance_scale=2.0, detach_uncond=True
    )
    task = Task(policy, Bright(), settings, 0, Size(24, 48))
    found = []
    for checkpointed in (False, True):
        trainer = BackPropagation(
            truncation, regularizers={"kl": KLPenalty(5.0, "velocity")}, micro_batch=1, checkpoint=checkpointed
        )
        trainer.prepare(task, None)
        run_updates(trainer, trainer.collect(PROMPTS, 0))
        found.append(gradients(policy))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 0
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-7)
    (update,) = trainer.updates(trainer.collect(PROMPTS, 0))
    for micro_batch in update.micro_batches:
        micro_batch().backward()
    metrics, passes = update.after(), truncation.passes(3)
    assert metrics["cost/decodes_per_image"] == passes.decodes
    assert metrics["cost/frozen_per_image"] == metrics["cost/trained_per_image"] == 2 * passes.graph  # guidance
    assert {parameter.grad is not None for _, parameter in policy.trainable_parameters()} == {True}


# ---------------------------------------------------------------------------------------------- what is refused

CHAIN = "rollout.plan=samplers.Chain"
REFUSED = {
    "no gradient": (["reward=rewards.JPEGCompressibility"], "has no gradient.*CLIPScore"),
    "shared start": ([CHAIN, "rollout.plan.shared_start=true", "rollout.kernel=samplers.FlowSDE"], "independent chains"),
    "windows that differ": (["rollout.plan=samplers.Window", "rollout.plan.shared_start=false"], "draw=iteration"),
    "process rewards": (["process_rewards=[tests.helpers.bed.Potential]"], "does not read"),
    "a KL without noise": (
        ["trainer.regularizers.kl={class_path: flowalign.objectives.KLPenalty, init_args: {beta: 0.1}}"],
        "form=velocity",
    ),
    "an unknown role": (
        ["trainer.regularizers.kl={class_path: flowalign.objectives.KLPenalty, init_args: {beta: 0.1, role: old}}"],
        r"policy\.roles",
    ),
    "more steps than there are": (["trainer.truncation.count=11"], "num_inference_steps=10"),
    "more equally spaced steps than there are": (
        ["trainer.truncation={class_path: flowalign.truncations.EquallySpaced, init_args: {count: 11}}"], "num_inference_steps=10",
    ),
    "jumps over noise": (
        ["trainer.truncation=flowalign.truncations.TwoLeaps", CHAIN, "rollout.kernel=samplers.FlowSDE"], "jumps",
    ),
    "correlated noise": (["rollout.branch_scale=4.0"], r"rollout\.branch_scale"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(pipeline: Path, case: str) -> None:
    overrides, sentence = REFUSED[case]
    with pytest.raises(ConfigError, match=sentence):
        load_config(["configs/methods/draft_k.yaml", CONFIG], [f"policy.path={pipeline}", *GROUP, *overrides])


def test_stochastic_chains_learn_with_the_kl_of_their_path(pipeline: Path, tmp_path: Path) -> None:
    kl = {"class_path": "flowalign.objectives.KLPenalty", "init_args": {"beta": 1e-3, "form": "exact"}}
    layer = {"trainer": {"init_args": {"regularizers": {"kl": kl}}}}
    (tmp_path / "kl.yaml").write_text(yaml.safe_dump(layer))
    settings = [CHAIN, "rollout.plan.train_last=true", "rollout.kernel=samplers.FlowSDE", *GROUP]
    bed = Bed.of(pipeline, ["configs/methods/draft.yaml", str(tmp_path / "kl.yaml")], *settings)
    rows = [bed.iteration(number).updates[0] for number in range(6)]
    assert rows[0]["loss/kl"] == 0 and rows[-1]["loss/kl"] > 0
    assert bed.reward() > BASE + 0.2
