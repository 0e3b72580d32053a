"""The process reward of Glyphs-Video: words are cut out where the renderer draws them, and read for what the prompt asks for; its gradient;
the states that it is trained on."""

from itertools import product

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from flowalign.glyphs.process_reward import CLASSES
from flowalign.glyphs.process_training import Drawn, Source, States, agreement, roll_out, train
from flowalign.glyphs.process_worlds import WORLDS, clip_reader, judged_frames
from flowalign.glyphs.prompts import LETTERS
from flowalign.glyphs.renderer import letter_masks
from flowalign.glyphs.video import FPS, PIPELINE, held_out_prompts, make_prompt, parse_prompt, train_prompts
from flowalign.glyphs.video.pretrain import principal_components, sample_batch, scaled_latents
from flowalign.glyphs.video.process_reward import (
    JUDGED,
    MARGIN,
    WEIGHTS,
    ClipReader,
    ClipScenes,
    GlyphsVideoProcessReward,
    cut,
    frames_of,
)
from flowalign.glyphs.video.prompts import DIRECTIONS, FRAMES, Scene
from flowalign.glyphs.video.renderer import ROWS, render
from rewards import OCR, OnFrames, RewardBatch, RewardError, close, score
from samplers import ODE


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def components(clips: Tensor) -> Tensor:
    """Latents in closed form: of clips in [0, 1]."""
    return principal_components(clips.transpose(1, 2) * 2 - 1)


def latents_of(scenes: list[Scene]) -> Tensor:
    """What the pipeline's VAE makes of drawn clips."""
    vae = AutoencoderKLWan.from_pretrained(PIPELINE, subfolder="vae")
    return scaled_latents(vae, render(scenes))


def scored(prompts: list[str], x: Tensor, sigma: float | Tensor = 0.0) -> Tensor:
    batch = RewardBatch(prompts=prompts, latents=x, sigma=torch.as_tensor(sigma).expand(len(x)).clone())
    return score(GlyphsVideoProcessReward(), batch).scores[:, 0]


# ------------------------------------------------------------------------------------------ where it looks


def test_words_are_cut_out_where_the_renderer_draws_them() -> None:
    """On all 16 paths every frame gives the masks of the letters, and one pixel of paper around them."""
    scenes = [Scene("CAB", "black", "black", "white", *path) for path in product(DIRECTIONS, DIRECTIONS)]
    words = cut(render(scenes), ClipScenes.of([make_prompt(scene) for scene in scenes]).corners)
    masks = torch.cat([letter_masks()[LETTERS.index(letter), ROWS] for letter in "CAB"], 1)
    expected = 1 - torch.nn.functional.pad(masks, [MARGIN] * 4)
    torch.testing.assert_close(words, expected.expand(16, FRAMES, 3, -1, -1), rtol=0, atol=0)


def test_outside_of_the_frame_is_its_nearest_pixel() -> None:
    frame = torch.arange(32.0)[:, None].expand(1, 1, 1, 32, 64)
    assert cut(frame, torch.tensor([[[16, 10]]]))[0, 0, 0, :, 0].tolist() == [*range(15, 32), 31, 31, 31]


def test_the_pixels_of_an_untrained_network_are_those_of_the_principal_components(generator: torch.Generator) -> None:
    """What its linear map makes of the coefficients is the clip again, as far as 20 of 96 coefficients hold it."""
    clips = sample_batch(8, generator).clips
    found = frames_of(clip_reader().pixels(components(clips)))
    assert found.shape == clips.shape
    late = clips[:, [0, *range(FRAMES - 1)]]
    right, wrong = (float((found - (2 * shown - 1)).detach().square().mean()) for shown in (clips, late))
    assert right < 0.02 < 0.04 < wrong


def test_the_score_is_that_of_the_frames_which_the_outcome_reward_sees() -> None:
    """By hand: probabilities 1/2 of all letters of the first frame, 1/8 of one of the last; it is the mean of geometric means."""
    assert OnFrames(OCR(), frames=3).seen(FRAMES, FPS) == list(JUDGED)
    scenes = ClipScenes.of([train_prompts()[0]["prompt"]])
    wanted = torch.tensor([0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 0.125, 1.0])
    chances = ((1 - wanted) / (CLASSES - 1))[None, :, None].expand(1, 9, CLASSES).clone()
    chances.scatter_(2, scenes.places[..., None], wanted[None, :, None])
    found = ClipReader.score_of((chances + 1e-30).log(), scenes)
    torch.testing.assert_close(found, torch.tensor([(0.5 + 1.0 + 0.5) / 3]))


# ------------------------------------------------------------------------------------------ what it is trained on


def test_states_of_a_rollout_are_labelled_by_what_is_read_at_its_end(generator: torch.Generator) -> None:
    """Of a velocity that leads to one drawn clip each: straight lines to its latents; every second prompt asks for another word."""
    records = train_prompts()[:6]
    scenes = [parse_prompt(record["prompt"]) for record in records]
    x0 = components(render(scenes))
    row = {record["prompt"]: number for number, record in enumerate(records)}

    def velocity(x: Tensor, sigma: Tensor, prompts: list[str]) -> Tensor:
        return (x - x0[[row[prompt] for prompt in prompts]]) / sigma.to(x)[:, None, None, None, None]

    def decode(x: Tensor) -> Tensor:
        torch.testing.assert_close(x, x0, rtol=1e-4, atol=1e-4)
        shown = [s if n % 2 else s._replace(word=s.word[::-1]) for n, s in enumerate(scenes)]
        return render(shown)

    judge = OCR(metric="soft", fold={"0": "O"})
    states = roll_out(WORLDS["glyphs_video"], velocity, decode, judge, records, Source(6, ODE(), 4, 3.0), 0)
    close(judge)
    assert len(states) == 6 * 5 and sorted(set(states.sigma.tolist())) == pytest.approx([0, 0.5, 0.75, 0.9, 1])
    for number, scene in enumerate(scenes):
        own = states.sample == number
        letters = [LETTERS.index(letter) for letter in (scene.word if number % 2 else scene.word[::-1])]
        assert states.read[own].tolist() == [letters * 3] * 5
        assert bool((states.score[own] > 0.8).all()) == (number % 2 == 1 or scene.word == scene.word[::-1])
        assert torch.equal(states.scenes.at(own.nonzero().flatten()).letters, states.scenes.letters[own])
        start, half = (states.x[own & (states.sigma - level).abs().lt(1e-6)][0] for level in (1.0, 0.5))
        torch.testing.assert_close(half, (start + x0[number]) / 2, rtol=1e-4, atol=1e-4)


def test_of_a_clip_three_frames_are_judged() -> None:
    clips = torch.arange(9.0)[None, :, None, None, None].expand(2, 9, 3, 4, 4)
    assert judged_frames(clips)[0, :, 0, 0, 0].tolist() == [0, 4, 8]


@pytest.mark.slow
def test_training_learns_what_the_finished_clips_score(generator: torch.Generator) -> None:
    """States of drawn clips, a third of them asked for as another word: 80 steps tell them apart at σ = 0, from one σ for all."""
    batch = sample_batch(256, generator)
    x0, shown = components(batch.clips), ClipScenes.of(batch.prompts)
    sigma = torch.cat([torch.zeros(256), torch.full((256,), 0.95)])
    level = sigma[:, None, None, None, None]
    x = (1 - level) * x0.repeat(2, 1, 1, 1, 1) + level * torch.randn(512, *x0.shape[1:], generator=generator)
    wrong = (torch.arange(256) % 3 == 0)[:, None]
    scenes = shown.asking(torch.where(wrong, shown.letters.flip(1), shown.letters))
    found = (shown.letters == scenes.letters).float().mean(1)
    states = States(
        x, sigma, ClipScenes.cat([scenes] * 2), found.repeat(2), shown.places.repeat(2, 1), torch.arange(256).repeat(2)
    )
    network = train(states, Drawn(x0, shown), clip_reader, moved=0, epochs=16, batch=96)
    (high, _), (low, error) = agreement(network, states)[sigma[-1].item()], agreement(network, states)[0.0]
    assert low > 0.7 > high and error < 0.35


# ------------------------------------------------------------------------------------------ the shipped weights


def test_the_shipped_weights_are_small_and_read_held_out_words() -> None:
    """At σ = 0 the word that is drawn scores more than the same clip under a word of which a letter differs; so does one
    that moves as the prompt says."""
    assert WEIGHTS.stat().st_size <= 500_000
    scenes = [parse_prompt(record["prompt"]) for record in held_out_prompts()[:64]]
    other = [s._replace(word=s.word[:1] + LETTERS[(LETTERS.index(s.word[1]) + 9) % 26] + s.word[2:]) for s in scenes]
    x = latents_of(scenes)
    right, wrong = (scored([make_prompt(scene) for scene in asked], x) for asked in (scenes, other))
    assert float((right > wrong).float().mean()) > 0.95
    assert float(right.mean()) > float(wrong.mean()) + 0.2
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    turned = [s._replace(first=opposite[s.first], second=opposite[s.second]) for s in scenes]
    assert float(right.mean()) > float(scored([make_prompt(scene) for scene in turned], x).mean()) + 0.2


def test_the_order_of_the_prompts_is_that_of_the_states(generator: torch.Generator) -> None:
    scenes = [parse_prompt(record["prompt"]) for record in held_out_prompts()[:16]]
    prompts, x = [make_prompt(scene) for scene in scenes], latents_of(scenes)
    sigma, order = torch.rand(16, generator=generator), torch.randperm(16, generator=generator)
    found = scored(prompts, x, sigma)
    torch.testing.assert_close(scored([prompts[row] for row in order.tolist()], x[order], sigma[order]), found[order])
    assert float((scored(prompts, x[order]) - scored(prompts, x)).abs().mean()) > 0.2


def test_every_judged_frame_counts(generator: torch.Generator) -> None:
    """A clip whose last two frames are another word's loses about a third, one whose others are, about two."""
    scenes = [parse_prompt(record["prompt"]) for record in held_out_prompts()[:32]]
    other = [scene._replace(word=scene.word[::-1]) for scene in scenes]
    prompts, x, y = [make_prompt(scene) for scene in scenes], latents_of(scenes), latents_of(other)
    all_right = float(scored(prompts, x).mean())
    last = float(scored(prompts, torch.cat([x[:, :, :-1], y[:, :, -1:]], 2)).mean())
    most = float(scored(prompts, torch.cat([y[:, :, :-1], x[:, :, -1:]], 2)).mean())
    assert all_right > last + 0.1 > most + 0.2


def test_noise_blurs_what_it_knows(generator: torch.Generator) -> None:
    """Another clip under the same prompt changes the score much at σ = 0.2 and not at σ = 1."""
    scenes = [parse_prompt(record["prompt"]) for record in held_out_prompts()[:16]]
    x, prompts = latents_of(scenes), [make_prompt(scene) for scene in scenes]
    noise, change = torch.randn(x.shape, generator=generator), []
    for level in (0.2, 1.0):
        one, other = (
            scored(prompts, (1 - level) * shown + level * noise, torch.tensor(level)) for shown in (x, x.roll(1, 0))
        )
        change.append(float((one - other).abs().mean()))
    assert change[0] > 0.2 and change[1] == 0


def test_its_gradient_is_that_of_finite_differences(generator: torch.Generator) -> None:
    scenes = [parse_prompt(record["prompt"]) for record in held_out_prompts()[:2]]
    x, prompts = latents_of(scenes), [make_prompt(scene) for scene in scenes]
    x = (0.6 * x + 0.4 * torch.randn(x.shape, generator=generator)).requires_grad_()
    direction = torch.randn(x.shape, generator=generator)

    def at(latents: Tensor, grad: bool = False) -> Tensor:
        batch = RewardBatch(prompts=prompts, latents=latents, sigma=torch.tensor([0.4, 0.4]))
        return score(GlyphsVideoProcessReward(), batch, grad=grad).scores[:, 0]

    (gradient,) = torch.autograd.grad(at(x, grad=True).sum(), x)
    assert bool((gradient.flatten(1).norm(dim=1) > 1e-5).all())
    with torch.no_grad():
        ahead, behind = at(x + 1e-3 * direction), at(x - 1e-3 * direction)
    expected = (ahead - behind) / 2e-3
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), expected, rtol=5e-2, atol=1e-3)


def test_other_prompts_are_refused() -> None:
    batch = RewardBatch(prompts=["a cat"], latents=torch.zeros(1, 20, 5, 8, 16), sigma=torch.ones(1))
    with pytest.raises(RewardError, match=r"process.*a cat"):
        score(GlyphsVideoProcessReward(), batch)
