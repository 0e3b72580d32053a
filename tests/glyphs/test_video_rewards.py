"""The reward layers of Glyphs-Video on rendered clips, of which every score is known; the two inverse dynamics models."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from jsonargparse import ArgumentParser
from torch import Tensor

from flowalign.config.layers import read_layer
from flowalign.glyphs.video import FPS, PIPELINE
from flowalign.glyphs.video.dynamics_training import (
    LAWS,
    STILL,
    Walks,
    accuracy,
    entropy,
    held_out_walks,
    held_out_words,
    reconstructed,
    sample_walks,
)
from flowalign.glyphs.video.inverse_dynamics import NETWORKS, GlyphsInverseDynamics, Weights, read_weights, weights_file
from flowalign.glyphs.video.prompts import DIRECTIONS, Scene, VideoPrompt, held_out_prompts, parse_prompt
from flowalign.glyphs.video.renderer import STEP, render
from rewards import InverseDynamics, Reward, RewardBatch, close, score

LAYERS = ("ocr", "color", "actions")
KINDS = list(NETWORKS)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def batch_of(videos: Tensor, records: Sequence[VideoPrompt]) -> RewardBatch:
    return RewardBatch(
        prompts=[record["prompt"] for record in records], videos=videos, fps=FPS, metadata=[dict(r) for r in records]
    )


def rendered(count: int) -> RewardBatch:
    """Clips as the first held-out prompts ask for them."""
    records = held_out_prompts()[:count]
    return batch_of(render([parse_prompt(record["prompt"]) for record in records]), records)


def recovered(weights: Weights, **settings: bool) -> InverseDynamics:
    """The reward of a model, as the layers have it."""
    return InverseDynamics(GlyphsInverseDynamics(weights), FPS, axes={"action": list(DIRECTIONS)}, **settings)


# ------------------------------------------------------------------------------------------ the models


@pytest.mark.parametrize("weights", KINDS)
def test_the_models_read_clean_and_spoilt_clips_of_held_out_words(weights: Weights, generator: torch.Generator) -> None:
    network = read_weights(weights, weights_file(weights))
    clean = sample_walks(96, held_out_words(), 0.25, generator, changing=0.0)
    assert accuracy(network, clean) >= 0.99
    for law in LAWS.values():
        assert accuracy(network, law.degrade(law.walk(96, held_out_words(), generator), generator)) >= 0.9


@pytest.mark.parametrize("weights", KINDS)
def test_the_models_read_what_the_vae_makes_of_clips(weights: Weights, generator: torch.Generator) -> None:
    """Of the pipeline's own VAE, with noise in the latents: the smears of generated clips."""
    vae = AutoencoderKLWan.from_pretrained(PIPELINE, subfolder="vae")
    clean = held_out_walks(48)
    assert accuracy(read_weights(weights, weights_file(weights)), reconstructed(clean, vae, generator)) >= 0.95


def test_the_two_models_differ_and_are_small() -> None:
    one, other = (read_weights(weights, weights_file(weights)) for weights in KINDS)
    assert type(one) is not type(other)
    assert not {tuple(p.shape) for p in one.parameters() if p.ndim > 1} & {
        tuple(p.shape) for p in other.parameters() if p.ndim > 1
    }
    reward, held_out = LAWS["reward"], LAWS["held_out"]
    assert reward.seed != held_out.seed and set(reward.degradations) != set(held_out.degradations)
    assert all(weights_file(weights).stat().st_size < 300_000 for weights in KINDS)


@pytest.mark.parametrize("weights", KINDS)
def test_a_row_depends_on_its_own_video_and_a_step_on_its_own_frames(weights: Weights) -> None:
    model = GlyphsInverseDynamics(weights)
    videos = rendered(3).videos
    assert videos is not None
    (together,) = model.logits(videos)
    assert together.shape == (3, 8, 4)
    alone = torch.cat([model.logits(video[None])[0] for video in videos])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    (cut,) = model.logits(videos[:, 3:6])  # a second half cannot be read from the first
    torch.testing.assert_close(together[:, 3:5], cut, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", KINDS)
def test_a_still_shows_no_direction(weights: Weights) -> None:
    """Its probability is about a quarter each: under `soft`, standing still earns no more than guessing."""
    batch = rendered(32)
    assert batch.videos is not None
    still = replace(batch, videos=batch.videos[:, :1].expand(-1, 9, -1, -1, -1))
    reward = recovered(weights, soft=True)
    assert float(score(reward, batch).scores.mean()) > 0.97
    earned = score(reward, still).scores
    assert float(earned.mean()) == pytest.approx(0.25, abs=0.03)
    assert float((earned - 0.25).abs().max()) < 0.15


@pytest.mark.parametrize("weights", KINDS)
def test_soft_has_a_gradient_to_the_pixels(weights: Weights, generator: torch.Generator) -> None:
    batch = rendered(2)
    assert batch.videos is not None
    videos = torch.lerp(
        batch.videos[:, :1], batch.videos, 0.4
    ).requires_grad_()  # a word beside its still copy: not sure
    direction = torch.randn(videos.shape, generator=generator)

    def at(pixels: Tensor, grad: bool = False) -> Tensor:
        return score(recovered(weights, soft=True), replace(batch, videos=pixels), grad=grad).scores.sum()

    (gradient,) = torch.autograd.grad(at(videos, grad=True), videos)
    with torch.no_grad():
        slope = (at(videos + 1e-3 * direction) - at(videos - 1e-3 * direction)) / 2e-3
    assert float(gradient.abs().max()) > 1e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=5e-2, atol=1e-3)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got weights='other'; expected one of \['reward', 'held_out'\]"):
        GlyphsInverseDynamics("other")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ their clips


def test_a_walk_is_what_its_actions_say(generator: torch.Generator) -> None:
    """Where its word neither changes nor fades, a frame is the one before, moved by STEP pixels, or the same."""
    walks = sample_walks(64, held_out_words(), 0.25, generator, changing=0.0)
    assert float(walks.clips.min()) >= 0 and float(walks.clips.max()) <= 1
    steps = torch.tensor([*DIRECTIONS.values(), (0, 0)]) * STEP
    masks = (walks.clips - walks.clips[:, :, :, :1, :1]).abs().sum(2) > 1e-3  # against the paper
    for clip, actions in zip(masks, walks.actions, strict=True):
        for number, action in enumerate(actions.tolist()):
            moved = clip[number].roll(tuple(steps[action].tolist()), (0, 1))
            assert torch.equal(moved[2:-2, 2:-2], clip[number + 1][2:-2, 2:-2])
    assert set(walks.actions.unique().tolist()) == {0, 1, 2, 3}


def test_halting_walks_repeat_the_place(generator: torch.Generator) -> None:
    walks = sample_walks(256, held_out_words(), 0.25, generator)
    halting = walks.actions == STILL
    assert 0.01 < float(halting.float().mean()) < 0.1
    same = (walks.clips.diff(dim=1).abs().flatten(2).amax(2) < 1e-6) & ~halting
    assert not bool(same.any()), "only what halts may stand still"


@pytest.mark.parametrize(("stay", "repeats"), [(0.0, 1 / 4), (0.6, 0.6 + 0.4 / 4)])
def test_actions_repeat_as_often_as_the_law_says(stay: float, repeats: float, generator: torch.Generator) -> None:
    actions = sample_walks(512, held_out_words(), stay, generator, changing=0.0).actions
    found = float((actions[:, 1:] == actions[:, :-1]).float().mean())
    assert found == pytest.approx(repeats, abs=4 * (repeats * (1 - repeats) / (512 * 7)) ** 0.5)
    assert float((actions == 0).float().mean()) == pytest.approx(0.25, abs=0.04)


def test_the_loss_of_a_still_is_least_where_all_directions_are_as_probable() -> None:
    actions = torch.tensor([[STILL, 2]])
    even, sure = torch.zeros(1, 2, 4), torch.tensor([[[9.0, 0, 0, 0], [0, 0, 9.0, 0]]])
    assert float(entropy(even, actions)) == pytest.approx(torch.log(torch.tensor(4.0)).item())
    assert float(entropy(sure[:, 1:], actions[:, 1:])) < 0.01 < 1.3 < float(entropy(even[:, :1], actions[:, :1]))
    assert float(entropy(sure[:, :1], actions[:, :1])) > float(entropy(even[:, :1], actions[:, :1]))


def test_accuracy_counts_what_moves() -> None:
    class Left(torch.nn.Module):
        def forward(self, clips: Tensor) -> Tensor:
            return torch.eye(4)[torch.zeros(clips.shape[0], clips.shape[1] - 1, dtype=torch.long)]

    assert accuracy(Left(), Walks(torch.zeros(2, 3, 3, 4, 4), torch.tensor([[0, STILL], [1, 0]]))) == pytest.approx(
        2 / 3
    )


# ------------------------------------------------------------------------------------------ the layers


@cache
def part(layer: str, key: str) -> Reward:
    """The reward that configs/rewards/<layer>_glyphs_video.yaml trains on (key "train"), or the one of that name under evaluation."""
    plain = yaml.SafeLoader("").construct_document(read_layer(f"configs/rewards/{layer}_glyphs_video.yaml"))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=list[Reward])
    given = [plain["reward"]] if key == "train" else plain["evaluation"]["rewards"]
    made = parser.instantiate(parser.parse_object({"rewards": given})).rewards
    return made[0] if key == "train" else next(reward for reward in made if reward.name == key)


def mean(layer: str, key: str, batch: RewardBatch) -> list[float]:
    """Mean scores of the channels; every sample has them."""
    reward = part(layer, key)
    output = score(reward, batch)
    close(reward)
    assert bool(output.valid.all())
    return output.scores.mean(0).tolist()


@pytest.mark.parametrize("layer", LAYERS)
def test_what_is_rendered_has_the_highest_score(layer: str) -> None:
    batch = rendered(32)
    assert mean(layer, "train", batch)[0] >= 0.995
    if layer == "ocr":
        for key in ("color_first", "color_last", "actions_held_out", "motion"):
            assert mean(layer, key, batch)[0] >= 0.995, key
        flicker, consistency = mean(layer, "video", batch)
        assert 0.004 < flicker < 0.025 and 0.992 < consistency < 0.9995
        assert mean(layer, "ocr_exact", batch)[0] >= 0.97


def test_all_layers_evaluate_the_same() -> None:
    sources = [
        Path(f"configs/rewards/{layer}_glyphs_video.yaml").read_text().split("evaluation:")[1] for layer in LAYERS
    ]
    lines = [{line.strip() for line in source.splitlines() if "palette" not in line} for source in sources]
    assert all(len(each ^ lines[0]) <= 3 for each in lines)  # the palette, written out once


def test_a_still_reads_well_and_does_not_move() -> None:
    batch = rendered(32)
    assert batch.videos is not None
    still = replace(batch, videos=batch.videos[:, :1].expand(-1, 9, -1, -1, -1))
    assert mean("ocr", "train", still)[0] >= 0.995
    assert mean("ocr", "motion", still) == [0.0]
    assert mean("ocr", "video", still)[0] == 0.0
    turning = torch.tensor([record["ink"] == record["last_ink"] for record in still.metadata]).float().mean()
    assert mean("ocr", "color_last", still)[0] == pytest.approx(float(turning))
    assert mean("actions", "train", still)[0] < 0.6


def test_an_order_of_frames_that_is_not_that_of_time_loses_actions_and_consistency() -> None:
    batch = rendered(64)
    assert batch.videos is not None
    shuffled = replace(batch, videos=batch.videos[:, [4, 0, 7, 2, 8, 1, 6, 3, 5]])
    reversed_ = replace(batch, videos=batch.videos.flip(1))
    for key in ("train", "actions_held_out"):
        assert mean("actions", key, shuffled)[0] < 0.7
        scenes = [parse_prompt(prompt) for prompt in batch.prompts]
        turned = [(a.second, a.first) for a in scenes]
        opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
        right = [
            [opposite[b] == a for a, b in zip((s.first, s.second), t, strict=True)]
            for s, t in zip(scenes, turned, strict=True)
        ]
        assert mean("actions", key, reversed_)[0] == pytest.approx(torch.tensor(right).float().mean().item(), abs=0.01)
    assert mean("actions", "video", shuffled)[0] > 1.5 * mean("actions", "video", batch)[0]


def test_other_actions_score_the_share_that_is_the_same() -> None:
    """A clip moves as another prompt says: of its eight actions those count that both have."""
    records = held_out_prompts()[:64]
    scenes = [parse_prompt(record["prompt"]) for record in records]
    moved = [
        scene._replace(first=other.first, second=other.second)
        for scene, other in zip(scenes, scenes[1:] + scenes[:1], strict=True)
    ]
    batch = batch_of(render(moved), records)
    expected = torch.tensor([_equal(scene, other) for scene, other in zip(scenes, moved, strict=True)])
    for key in ("train", "actions_held_out"):
        scores = score(part("actions", key), batch).scores[:, 0]
        assert float(((scores - expected).abs() < 1e-6).float().mean()) >= 0.97
    assert 0.1 < float(expected.mean()) < 0.5
    assert mean("ocr", "train", batch)[0] >= 0.995 and mean("color", "train", batch)[0] == 1.0


def _equal(one: Scene, other: Scene) -> float:
    pairs = list(zip(one.actions, other.actions, strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def test_colors_that_turn_to_another_lose_the_last_frame() -> None:
    """Of the first frame both colors are right, of the last one the paper: 3/4."""
    scene = Scene("CAT", "red", "blue", "white", "left", "up")
    record = next(record for record in held_out_prompts() if record["ink"] == record["last_ink"] == "red")
    wrong = parse_prompt(record["prompt"])._replace(last_ink=scene.last_ink)
    batch = batch_of(render([wrong]), [record])
    assert mean("color", "train", batch) == [0.75]
    assert mean("color", "color_first", batch) == [1.0] and mean("color", "color_last", batch) == [0.0]


def test_another_word_is_not_the_one_that_was_asked_for() -> None:
    """One wrong letter of three: the reward is the geometric mean of their probabilities."""
    records = held_out_prompts()[:16]
    scenes = [parse_prompt(record["prompt"]) for record in records]
    other = [scene._replace(word="X" + scene.word[1:]) for scene in scenes if scene.word[0] != "X"]
    batch = batch_of(render(other), [record for record in records if record["target"][0] != "X"])
    assert mean("ocr", "train", batch)[0] < 0.05
    assert mean("ocr", "ocr_exact", batch)[0] == 0.0
