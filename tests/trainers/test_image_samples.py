"""Training on images of files, on the two-dimensional bed: pairs that a reward has labeled, and images of prompts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.distributed.processes import Processes
from flowalign.errors import ConfigError
from flowalign.loop import train
from flowalign.models import Size
from flowalign.models.sampling import sample
from flowalign.rollouts.task import Rollout
from flowalign.run.preflight import forecast
from flowalign.storage import checkpoint
from flowalign.trainers import FromImages, FromPairs, SampleSource, Setup, UpdateEngine
from flowalign.trainers.samples import Samples
from samplers import ODE, Chain, Deterministic, RectifiedFlow, normal
from tests.helpers.bed import MEANS, NAMES, SPREAD, save_pipeline, target_of
from tests.helpers.bed_run import CONFIG, Bed
from tests.helpers.thread_processes import on_processes

DPO, SFT = "configs/methods/diffusion_dpo_offline.yaml", "configs/methods/fm_sft.yaml"
STEP = 4 / 255  # of a latent in an image of 8 bits


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("bed"))


def picture(folder: Path, name: str, place: Tensor) -> str:
    """The image of a latent [2], in a file; returns its name."""
    red, green = ((place.clamp(-2, 2) / 4 + 0.5) * 255).round().int().tolist()
    Image.new("RGB", (1, 1), (red, green, 128)).save(folder / name)
    return name


def write(folder: Path, rows: list[dict[str, Any]], name: str) -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def pairs_file(folder: Path, count: int = 64, *, turned: bool = False) -> str:
    """Pairs of samples of the base model, labeled by which is nearer to the mean that the prompt names; turned: which is not."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = torch.Generator().manual_seed(0), []
    for number in range(count):
        prompt = NAMES[number % 4]
        modes = MEANS[torch.randint(4, (2,), generator=rng)]
        places = modes + SPREAD * torch.randn(2, 2, generator=rng)
        order = (places - target_of(prompt)).norm(dim=1).argsort(descending=turned)
        names = [picture(folder, f"{number}-{side}.png", places[side]) for side in order.tolist()]
        rows.append({"prompt": prompt, "chosen": names[0], "rejected": names[1], "uid": number})
    return write(folder, rows, "pairs.jsonl")


def images_file(folder: Path, mean_of: Callable[[str], Tensor], count: int = 128, spread: float = SPREAD) -> str:
    """Images of the four prompts around `mean_of` each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, rows = torch.Generator().manual_seed(0), []
    for number in range(count):
        prompt = NAMES[number % 4]
        place = mean_of(prompt) + spread * torch.randn(2, generator=rng)
        rows.append({"prompt": prompt, "image": picture(folder, f"{number}.png", place)})
    return write(folder, rows, "images.jsonl")


def bed(pipeline: Path, method: str, file: str, *overrides: str) -> Bed:
    return Bed.of(pipeline, [method], f"trainer.source.init_args.file={file}", "rollout.groups=32", *overrides)


def engine_of(found: Bed, samples: Samples) -> UpdateEngine:
    return UpdateEngine(found.task, samples.conditions, len(samples.places))


def weights_after(folder: Path, pipeline: Path, file: str, *overrides: str) -> dict[str, Tensor]:
    """The trained weights of a run's last checkpoint."""
    settings = [
        f"policy.path={pipeline}",
        f"trainer.source.init_args.file={file}",
        f"run.output={folder}",
        "evaluation.samples_per_prompt=1",
        *overrides,
    ]
    train(*load_config([DPO, CONFIG], settings))
    path = checkpoint.latest(folder / "bed")
    assert path is not None
    return checkpoint.load(path)[0]["role_policy"]


def test_a_pair_is_two_samples_with_the_draws_of_both_shared(pipeline: Path, tmp_path: Path) -> None:
    found = bed(pipeline, DPO, pairs_file(tmp_path))
    batch = found.trainer.collect(list(found.task.prompts), 3)
    samples = batch.samples
    assert batch.images == len(samples.places) == 8 and samples.places.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert samples.scores.flatten().tolist() == [1, 0] * 4 and samples.channels == ("chosen",)
    pairs = found.trainer.source._pairs
    for group, uid in enumerate(samples.uids):
        target = target_of(pairs[uid].record.prompt)
        near, far = (samples.latents.values[2 * group + side].flatten() for side in (0, 1))
        assert (near - target).norm() < (far - target).norm() and torch.equal(
            samples.conditions.tensors["target"][group], target
        )
        with Image.open(pairs[uid].chosen) as image:
            pixels = torch.tensor(image.getpixel((0, 0))[:2]) / 255
        torch.testing.assert_close(near, pixels * 4 - 2)
    draws = found.trainer.drawn(engine_of(found, samples), samples, torch.arange(8), torch.tensor([1.0, -1.0] * 4))
    sigma, noise = draws.states.sigma, draws.target.values.flatten(1) + samples.latents.values.flatten(1)
    assert torch.equal(sigma[::2], sigma[1::2]) and len(sigma[::2].unique()) == 4
    torch.testing.assert_close(noise[::2], noise[1::2])  # u = ε − x0


def test_every_pair_comes_once_an_epoch_and_is_encoded_once(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bed(pipeline, DPO, pairs_file(tmp_path, 12))
    encoded, encode = [], found.policy.encode_images
    monkeypatch.setattr(found.policy, "encode_images", lambda images: encoded.append(len(images)) or encode(images))
    orders = []
    for epoch in range(2):
        batches = [found.trainer.collect(list(found.task.prompts), 3 * epoch + number) for number in range(3)]
        orders.append([uid for batch in batches for uid in batch.samples.uids])
        assert sorted(orders[-1]) == list(range(12)) and encoded == [1] * 24
    assert orders[0] != orders[1]
    again = found.trainer.collect(list(found.task.prompts), 4).samples
    assert again.uids == tuple(orders[1][4:8]) and again.latents.values.device.type == "cpu"


def test_two_processes_encode_their_own_pairs_and_have_the_gradient_of_one(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pairs: the process with two of them sends a latent with its prompt's condition."""
    file = pairs_file(tmp_path, 3)
    beds = [bed(pipeline, DPO, file, "rollout.groups=3", "trainer.draws=3") for _ in range(3)]

    def work(processes: Processes) -> tuple[Tensor, int]:
        found = beds.pop()
        task = replace(found.task, processes=processes)
        found.trainer.prepare(task, None)
        batch = found.trainer.collect(list(task.prompts)[:3], 0)
        for update in found.trainer.updates(batch):
            for micro_batch in update.micro_batches:
                micro_batch().backward()
        own = torch.cat([p.grad.flatten() for _, p in found.policy.trainable_parameters()])
        return processes.gather(own[None]).sum(0), len(batch.samples.latents.values)

    expected, held = work(Processes())
    assert held == 6 and bool(expected.any())
    found = on_processes(2, work, monkeypatch)
    assert [held for _, held in found] == [4, 2]
    for gradient, _ in found:
        assert float((gradient - expected).norm()) < 1e-5 * float(expected.norm())


def test_offline_dpo_raises_the_reward_that_labeled_the_pairs(pipeline: Path, tmp_path: Path) -> None:
    gains = []
    for turned in (False, True):
        found = bed(
            pipeline,
            DPO,
            pairs_file(tmp_path / str(turned), 256, turned=turned),
            "trainer.objective.init_args.beta=10",
            "trainer.draws=4",
        )
        before, first = found.reward(), None
        for number in range(10):
            iteration = found.iteration(number)
            first = first or iteration
        gains.append(found.reward() - before)
        update = found.trainer.forecast(found.task.rollout)
        assert first.rolled == 0 and first.reward_calls == 0
        assert (
            first.evaluations == update.trained + update.frozen == 3 * 64 * 4
        )  # policy twice: gate, then gradient; reference
    assert gains[0] > 0.07 and gains[1] < -0.05, gains


def test_the_draws_of_fine_tuning_have_their_minimum_at_the_mean_of_the_data(pipeline: Path, tmp_path: Path) -> None:
    """For data N(m, τ²) the exact velocity is v_m = A·x − (A·(1 − σ) + 1)·m, A = (σ − (1 − σ)τ²)/V, V = (1 − σ)²τ² + σ². The m
    that fits the trainer's own draws best is that of the images, and the error there is E Var(u|x) = E τ²/V."""
    goal = torch.tensor([0.6, -0.3])
    found = bed(pipeline, SFT, images_file(tmp_path, lambda prompt: goal, 256), "trainer.draws=16")
    samples = found.trainer.collect([found.task.prompts[0]] * 256, 0).samples
    images = samples.latents.values.flatten(1).double()
    assert sorted(samples.uids) == list(range(256)) and (images.mean(0) - goal).norm() < 3 * SPREAD / 16 + STEP
    draws = found.trainer.drawn(engine_of(found, samples), samples, torch.arange(256), torch.ones(256))
    x, sigma, target = (
        draws.states.x.flatten(1).double(),
        draws.states.sigma[:, None].double(),
        draws.target.values.flatten(1),
    )
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    slope = (sigma - (1 - sigma) * SPREAD**2) / variance
    factor, rest = slope * (1 - sigma) + 1, slope * x - target.double()
    best = (factor * rest).sum(0) / factor.square().sum(0)
    noise = float((factor.square() * SPREAD**2 / variance).sum().sqrt() / factor.square().sum())
    assert (best - images.mean(0)).abs().max() < 3 * noise < 0.05
    error = (rest - factor * best).square().mean()
    assert float(error) == pytest.approx(float((SPREAD**2 / variance).mean()), rel=0.1)


def test_fine_tuning_moves_to_the_mean_of_the_data(pipeline: Path, tmp_path: Path) -> None:
    goal = {name: torch.tensor([0.6, -0.3]) * (1 if number % 2 else -1) for number, name in enumerate(NAMES)}
    found = bed(pipeline, SFT, images_file(tmp_path, lambda prompt: goal[prompt]), "trainer.draws=4")
    records = as_records(list(NAMES))

    def distance() -> float:
        """Of the mean of samples from that of the images, over the prompts."""
        apart = []
        for row, name in enumerate(NAMES):
            conditions, noise = found.policy.encode([records[row]] * 64), normal((64, 2, 1, 1), 0, "start", row)
            apart.append((sample(found.policy, conditions, noise, 10, 1.0).flatten(1).mean(0) - goal[name]).norm())
        return float(torch.stack(apart).mean())

    before = distance()
    for number in range(40):
        update = found.iteration(number)
    assert before > 0.6 and distance() < 0.25 * before
    assert update.evaluations == 32 * 4 and update.updates[0]["draws/curvature_min"] == 1


def test_offline_raft_keeps_the_best_of_given_images(pipeline: Path, tmp_path: Path) -> None:
    changes = (
        "trainer.source.init_args.scored=true", "rollout.group_size=8", "trainer.signal.advantage=flowalign.advantage.Best",
        "trainer.signal.select=flowalign.selectors.NonZeroAdvantage", "trainer.draws=8",
    )  # fmt: skip
    anywhere = images_file(tmp_path, lambda prompt: torch.zeros(2), 128, spread=1.0)
    found = bed(pipeline, SFT, anywhere, *changes)
    before, first = found.reward(), found.iteration(0)
    samples = first.batch.samples
    near = (
        samples.latents.at(torch.arange(256)).flatten(1)
        - torch.stack(
            [target_of(found.trainer.source._rows[uid].record.prompt) for uid in samples.uids for _ in range(8)]
        )
    ).norm(dim=1)
    assert torch.equal(samples.scores.flatten().reshape(-1, 8).argmax(1), near.reshape(-1, 8).argmin(1))
    assert first.reward_calls == 256 and first.batch.metrics["cost/reward_calls_per_image"] == 1
    assert first.batch.metrics["group/trained_samples"] == 32 and first.evaluations == 32 * 8 and first.rolled == 0
    assert len({tuple(row.tolist()) for row in samples.latents.values[:8].flatten(1)}) == 8  # different images
    for number in range(1, 20):
        found.iteration(number)
    assert found.reward() > before + 0.07


def test_a_stopped_run_goes_on_as_if_it_had_not_been(pipeline: Path, tmp_path: Path) -> None:
    file = pairs_file(tmp_path / "data", 12)
    whole = weights_after(tmp_path / "whole", pipeline, file, "run.iterations=4")
    weights_after(tmp_path / "parts", pipeline, file, "run.iterations=2", "run.checkpoint_every=1")
    parts = weights_after(tmp_path / "parts", pipeline, file, "run.iterations=4", "run.checkpoint_every=1")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    picture(tmp_path / "data", "0-0.png", torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"data of trainer.source=.* have changed since the checkpoint"):
        weights_after(tmp_path / "parts", pipeline, file, "run.iterations=5", "run.checkpoint_every=1")


def test_what_cannot_work_is_said_before_a_model_is_loaded(pipeline: Path, tmp_path: Path) -> None:
    pairs, images = pairs_file(tmp_path, 8), images_file(tmp_path, target_of, 12)
    row = {"prompt": "the north east", "chosen": "0-0.png", "rejected": "0-1.png"}
    held_out = write(tmp_path, [row], "held_out.jsonl")
    Image.new("RGB", (2, 1)).save(tmp_path / "wide.png")
    wide = write(tmp_path, [{**row, "rejected": "wide.png"}], "wide.jsonl")
    two = Rollout(Deterministic(), ODE(), group_size=2)
    chain, again = replace(two, plan=Chain()), replace(two, refill=1)

    def refused(source: SampleSource, rollout: Rollout, said: str, **changes: Any) -> None:
        setup = Setup(rollout, RectifiedFlow(), ("nearness",), size=Size(1, 1), held_out=as_records(["the north east"]))
        with pytest.raises((ValueError, FileNotFoundError), match=said):
            source.check(replace(setup, **changes))

    refused(FromPairs(pairs), replace(two, group_size=3), "group_size=3 with pairs of images; expected 2")
    refused(FromPairs(pairs), chain, "rollout.plan=Chain.*nothing is rolled out")
    refused(FromPairs(pairs), again, "rollout.refill=1 with")
    refused(FromPairs(pairs), two, "process_rewards=.*potential", state_channels=("potential",))
    refused(
        FromPairs(pairs), two, "png, an image; expected a clip of 4 frames, as policy.frames says", size=Size(1, 1, 4)
    )
    refused(FromPairs(pairs), two, "of 1×1 pixels; expected 8×1, the policy's", size=Size(8, 1))
    refused(FromPairs(wide), two, "line 1: got .*wide.png of 1×2 pixels; expected 1×1, the policy's")
    refused(FromPairs(str(tmp_path / "none.jsonl")), two, "none.jsonl does not exist")
    refused(
        FromPairs(held_out), two, "line 1: got the prompt 'the north east', which is among those of evaluation.prompts"
    )
    refused(FromImages(images), two, "group_size=2 with images that are not scored; expected 1")
    refused(
        FromImages(images, scored=True),
        replace(two, group_size=4),
        r"line 1: got 3 image\(s\) of this prompt; expected at least",
    )


def test_the_configuration_is_checked_with_the_files_and_costs_no_rollout(pipeline: Path, tmp_path: Path) -> None:
    pairs_file(tmp_path, 1)
    file = write(tmp_path, [{"prompt": "the north east", "chosen": "0-0.png", "rejected": "0-1.png"}], "votes.jsonl")
    given = [f"policy.path={pipeline}", f"trainer.source.init_args.file={file}"]
    with pytest.raises(ConfigError, match="line 1: got the prompt 'the north east', which is among"):
        load_config([DPO, CONFIG], given)
    config, _ = load_config([DPO, CONFIG], [*given, "evaluation.allow_training_prompts=true"])
    text = forecast(config)
    assert f"samples: 1 pairs of {file}" in text and "rollout 0.00, update at most 1.00" in text
