"""The process reward of Glyphs: it reads what is drawn, for the word that was asked for; its gradient; its training."""

import pytest
import torch
from diffusers import AutoencoderKL

from flowalign.glyphs import PIPELINE
from flowalign.glyphs.pretrain import scaled_latents
from flowalign.glyphs.process_reward import WEIGHTS, GlyphsProcessReward, LetterReader, Scenes
from flowalign.glyphs.process_training import Drawn, States, agreement, train
from flowalign.glyphs.prompts import LETTERS, held_out_prompts, make_prompt
from flowalign.glyphs.renderer import render
from rewards import RewardBatch, RewardError, score


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def latents_of(words: list[str], ink: str = "red", paper: str = "yellow") -> torch.Tensor:
    """What the pipeline's VAE makes of drawn pictures."""
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    return scaled_latents(vae, 2 * render(words, [ink] * len(words), [paper] * len(words)) - 1)


def asked(words: list[str]) -> list[str]:
    return [make_prompt(word, "red", "yellow") for word in words]


def test_the_shipped_weights_are_small_and_read_held_out_words() -> None:
    """At σ = 0 the word that is drawn scores more than the same picture under a word of which a letter differs, and less
    the more letters do."""
    assert WEIGHTS.stat().st_size <= 500_000
    words = [record["target"] for record in held_out_prompts()[:64]]
    other = [word[:1] + LETTERS[(LETTERS.index(word[1]) + 9) % 26] + word[2:] for word in words]
    third = [word[::-1] for word in other]
    x, reward = latents_of(words), GlyphsProcessReward()
    right, wrong, worse = (
        score(reward, RewardBatch(prompts=asked(given), latents=x, sigma=torch.zeros(len(x)))).scores[:, 0]
        for given in (words, other, third)
    )
    assert float((right > wrong).float().mean()) > 0.95
    assert float(right.mean()) > float(wrong.mean()) + 0.2 and float(wrong.mean()) > float(worse.mean()) + 0.05


def test_noise_blurs_what_it_knows(generator: torch.Generator) -> None:
    """Another picture under the same word changes the score much at σ = 0.2 and little at σ = 1."""
    words = [record["target"] for record in held_out_prompts()[:32]]
    x, noise = latents_of(words), torch.randn(32, 3, 24, 48, generator=generator)
    change = []
    for level in (0.2, 1.0):
        one, other = (
            score(
                GlyphsProcessReward(),
                RewardBatch(
                    prompts=asked(words), latents=(1 - level) * shown + level * noise, sigma=torch.full((32,), level)
                ),
            ).scores
            for shown in (x, x.roll(1, 0))
        )
        change.append(float((one - other).abs().mean()))
    assert change[0] > 0.2 and change[1] == 0


def test_its_gradient_is_that_of_finite_differences(generator: torch.Generator) -> None:
    reward, x = GlyphsProcessReward(), latents_of(["KITE", "MOON"])
    x = (0.6 * x + 0.4 * torch.randn(x.shape, generator=generator)).requires_grad_()
    direction = torch.randn(x.shape, generator=generator)

    def at(latents: torch.Tensor, grad: bool = False) -> torch.Tensor:
        batch = RewardBatch(prompts=asked(["KITE", "MOAN"]), latents=latents, sigma=torch.tensor([0.4, 0.4]))
        return score(reward, batch, grad=grad).scores[:, 0]

    (gradient,) = torch.autograd.grad(at(x, grad=True).sum(), x)
    assert bool((gradient.flatten(1).norm(dim=1) > 1e-4).all())
    with torch.no_grad():
        ahead, behind = at(x + 1e-3 * direction), at(x - 1e-3 * direction)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), (ahead - behind) / 2e-3, rtol=2e-2, atol=1e-4)


def test_other_prompts_are_refused() -> None:
    batch = RewardBatch(prompts=["a cat"], latents=torch.zeros(1, 3, 24, 48), sigma=torch.ones(1))
    with pytest.raises(RewardError, match=r"process.*a cat"):
        score(GlyphsProcessReward(), batch)


@pytest.mark.slow
def test_training_learns_what_the_finished_pictures_score(generator: torch.Generator) -> None:
    """States of drawn words, a third of them asked for as another word: 60 steps tell them apart at σ = 0."""
    words = ["".join(LETTERS[i] for i in torch.randint(26, (4,), generator=generator)) for _ in range(384)]
    x0 = latents_of(words).repeat(2, 1, 1, 1)
    sigma = torch.cat([torch.zeros(384), torch.full((384,), 0.9)])
    x = (1 - sigma)[:, None, None, None] * x0 + sigma[:, None, None, None] * torch.randn(x0.shape, generator=generator)
    wrong = torch.arange(384) % 3 == 0
    scenes = Scenes.of(
        asked([word[::-1] if bad else word for word, bad in zip(words, wrong.tolist(), strict=True)] * 2)
    )
    drawn = Scenes.of(asked(words * 2))
    found = (drawn.letters == scenes.letters).float().mean(1)
    states = States(x, sigma, scenes, found, drawn.letters, torch.arange(384).repeat(2))
    network = train(states, Drawn(x0[:384], drawn.at(torch.arange(384))), epochs=8, batch=96)
    (high, _), (low, error) = agreement(network, states)[sigma[-1].item()], agreement(network, states)[0.0]
    assert low > 0.7 > high and error < 0.35
    untrained, _ = agreement(LetterReader().eval().requires_grad_(False), states)[0.0]
    assert abs(untrained) < 0.4
