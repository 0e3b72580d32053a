"""What a batch may hold, and what a spec may say: each mistake is named."""

import math
from dataclasses import replace

import pytest
import torch

from rewards import Channels, FunctionReward, Mix, RewardBatch, RewardError, RewardOutput, RewardSpec, score
from tests.helpers.plain_rewards import Plain, brightness

VIDEOS = torch.rand(2, 5, 3, 4, 4)
LATENTS = torch.randn(2, 6)
IMAGE = torch.rand(3, 4, 4)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ({"inputs": ("image",)}, "expected some of"),
        ({"inputs": ("images", "images")}, "each once"),
        ({"scope": "step"}, "scope 'step'"),
        ({"scope": "latent"}, "states are not decoded"),
        ({"channels": ("a", "a")}, "different names"),
        ({"channels": ("a", "")}, "different names"),
        ({"range": (1.0, 0.0)}, "smallest, largest"),
        ({"range": (math.nan, 1.0)}, "smallest, largest"),
    ],
)
def test_a_spec_that_means_nothing_is_refused(spec, named) -> None:
    with pytest.raises(ValueError, match=named):
        RewardSpec(**spec)


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"videos": VIDEOS}, ValueError, "got videos with fps=None"),
        ({"videos": VIDEOS, "fps": 0.0}, ValueError, "fps above 0"),
        ({"fps": 8.0}, ValueError, "got no videos with fps=8.0"),
        ({"videos": VIDEOS[:, 0], "fps": 8.0}, ValueError, r"expected \[N, F, 3, H, W\]"),
        ({"videos": VIDEOS.transpose(1, 2), "fps": 8.0}, ValueError, r"expected \[N, F, 3, H, W\]"),
        ({"latents": LATENTS}, ValueError, "got latents without sigma"),
        ({"sigma": torch.zeros(2)}, ValueError, "got sigma without latents"),
        ({"latents": LATENTS, "sigma": torch.tensor([0.0, 1.5])}, ValueError, r"0 \(data\) to 1 \(noise\)"),
        ({"latents": LATENTS, "sigma": torch.zeros(1)}, ValueError, "'sigma': 1"),
        ({"latents": LATENTS.long(), "sigma": torch.zeros(2)}, ValueError, r"floats \[N, \*\]"),
        ({"conditions": [[IMAGE]]}, ValueError, "'conditions': 1"),
        ({"conditions": [[IMAGE], [IMAGE[None]]]}, ValueError, r"expected of \[3, H, W\] each"),
    ],
)
def test_a_field_that_does_not_fit_is_named(fields, error, named) -> None:
    with pytest.raises(error, match=named):
        RewardBatch(prompts=["a", "b"], **fields)


def test_arguments_cannot_be_swapped() -> None:
    """By keyword only, and each of its own type: a text is not a list of texts, an image no batch of them."""
    images, prompts = torch.rand(2, 3, 4, 4), ["a", "b"]
    for positional in ((prompts, images), (images, prompts), (prompts,)):
        with pytest.raises(TypeError, match="positional"):
            RewardBatch(*positional)  # type: ignore[misc]
    for named in (images, "ab", ("a", "b"), ["a", None]):
        with pytest.raises(TypeError, match="expected a list of texts, one per sample"):
            RewardBatch(prompts=named, images=images)  # type: ignore[arg-type]
    for wrong in (prompts, list(images), [images[0], images[1, :, :2]]):  # of one size or of several
        with pytest.raises(TypeError, match=r"got images of type list; expected a tensor \[N, 3, H, W\]"):
            RewardBatch(prompts=prompts, images=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        score(Plain(brightness), RewardBatch(prompts=prompts, images=images), True)  # type: ignore[misc]


def full() -> RewardBatch:
    return RewardBatch(
        prompts=["a", "b"], videos=(VIDEOS * 255).to(torch.uint8), fps=8.0, latents=LATENTS.clone(), sigma=torch.tensor([0.2, 0.7]),
        conditions=[[IMAGE], [IMAGE, IMAGE.flip(2)]],
    )  # fmt: skip


def test_select_and_to_keep_every_field() -> None:
    picked = replace(full(), latents=None, sigma=None).select([1, 1]).to("meta")  # the levels of states are looked at
    assert picked.videos.dtype == torch.float32 and picked.videos.shape == (2, 5, 3, 4, 4) and picked.videos.is_meta
    assert all(image.is_meta for images in picked.conditions for image in images)
    picked = full().select(torch.tensor([False, True]))
    assert (
        picked.fps == 8.0 and picked.sigma.tolist() == pytest.approx([0.7]) and torch.equal(picked.latents, LATENTS[1:])
    )
    assert [len(images) for images in picked.conditions] == [2] and picked.sample_ids == [1]


@pytest.mark.parametrize("broken", ["videos", "latents", "conditions"])
def test_a_sample_that_is_not_finite_is_masked_alone(broken: str) -> None:
    batch = full()
    tensor = batch.conditions[1][1] if broken == "conditions" else vars(batch)[broken][1]
    tensor.view(-1)[0] = torch.nan
    seen = Plain(lambda batch: RewardOutput(torch.ones(len(batch)), torch.ones(len(batch)).bool()), RewardSpec(()))
    output = score(seen, batch)
    assert output.valid[:, 0].tolist() == [True, False] and seen.seen[0].prompts == ["a"]


def test_a_batch_that_lacks_an_input_names_reward_and_input() -> None:
    video = Plain(brightness, RewardSpec(("videos",)))
    with pytest.raises(RewardError, match="'plain': got a batch with images; expected videos"):
        score(video, RewardBatch(prompts=["a"], images=IMAGE[None]))


def test_a_class_without_a_spec_is_told_what_to_write() -> None:
    class Old:
        name = "old"

    class Wrong:
        name, spec = "wrong", ("images",)

    for made in (lambda reward: score(reward, full()), lambda reward: Channels([reward])):
        with pytest.raises(ValueError, match=r"got Old, a reward without `spec`.*write `spec = RewardSpec\(\)`"):
            made(Old())
        with pytest.raises(ValueError, match=r"got Wrong\.spec=\('images',\); expected a rewards\.RewardSpec"):
            made(Wrong())


def test_a_score_outside_the_stated_range_is_an_error() -> None:
    answer = RewardOutput(torch.tensor([0.0, 1.0]), torch.ones(2).bool())
    assert score(Plain(lambda batch: answer, RewardSpec((), range=(0, 1))), full()).valid.all()
    with pytest.raises(RewardError, match=r"got scores from 0 to 1; expected 0 to 0\.9"):
        score(Plain(lambda batch: answer, RewardSpec((), range=(0, 0.9))), full())
    assert score(Plain(lambda batch: answer, RewardSpec((), range=(0, math.inf))), full()).valid.all()


# ---------------------------------------------------------------------------------------------- channels


def two_channels(batch: RewardBatch) -> RewardOutput:
    scores = torch.stack([torch.arange(len(batch)).float(), torch.full((len(batch),), 5.0)], 1)
    valid = torch.ones_like(scores, dtype=torch.bool)
    valid[0, 1] = False
    return RewardOutput(scores, valid, {"part": scores[:, 0]}, uncertainty=scores / 10)


TWO = RewardSpec((), channels=("first", "second"))
NAMED = RewardBatch(prompts=["a", "b", "c"])


def test_several_channels_are_masked_each() -> None:
    output = score(Plain(two_channels, TWO), NAMED)
    assert output.channels == ("first", "second") and output.valid.tolist() == [
        [True, False],
        [True, True],
        [True, True],
    ]
    assert output.scores[0].tolist() == pytest.approx([0.0, math.nan], nan_ok=True)
    assert output.components["part"].tolist() == [0, 1, 2]  # the sample has a score in one channel
    assert output.uncertainty[:, 1].tolist() == pytest.approx([math.nan, 0.5, 0.5], nan_ok=True)
    with pytest.raises(RewardError, match="1 of 3 samples have no score in channel 'second'"):
        score(Plain(two_channels, TWO), NAMED, max_fail_rate=0.3)
    with pytest.raises(RewardError, match=r"scores has shape \[3, 2\]; expected \[3, 3\]"):
        score(Plain(two_channels, RewardSpec((), channels=("a", "b", "c"))), NAMED)


def test_channels_stand_side_by_side_and_nothing_is_summed() -> None:
    one = Plain(
        lambda batch: RewardOutput(torch.full((len(batch),), 9.0), torch.ones(len(batch)).bool()), RewardSpec(())
    )
    two = Plain(two_channels, TWO)
    two.name = "pair"
    output = score(Channels([one, two]), NAMED)
    assert output.channels == ("plain", "pair/first", "pair/second")
    assert output.scores[1].tolist() == [9, 1, 5] and output.valid[0].tolist() == [True, True, False]
    assert output.components["pair/part"].tolist() == [0, 1, 2]
    assert output.uncertainty[2].tolist() == pytest.approx([math.nan, 0.2, 0.5], nan_ok=True)
    with pytest.raises(ValueError, match=r"rewards\.Channels"):
        Mix([one, two], [1.0, 1.0])
    with pytest.raises(ValueError, match="different names"):
        Channels([one, one])


def test_a_latent_and_a_terminal_reward_do_not_mix() -> None:
    state = Plain(brightness, RewardSpec(("latents",), "latent"))
    state.name = "state"
    for made in (lambda parts: Mix(parts, [1.0, 1.0]), Channels):
        with pytest.raises(ValueError, match="scopes"):
            made([Plain(brightness), state])


def test_a_sum_is_as_uncertain_as_its_parts_together() -> None:
    def unsure(value: float, by: float) -> Plain:
        part = Plain(lambda batch: RewardOutput(
            torch.full((len(batch),), value), torch.ones(len(batch)).bool(), uncertainty=torch.full((len(batch),), by)
        ), RewardSpec(()))  # fmt: skip
        part.name = f"p{value}"
        return part

    output = score(Mix([unsure(1.0, 0.25), unsure(2.0, 0.5)], [2.0, -1.0]), NAMED)
    assert output.scores[:, 0].tolist() == [0] * 3 and output.uncertainty[:, 0].tolist() == [1.0] * 3


def test_functions_name_what_they_read(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def motion(prompts, videos, fps):\n    return (videos[:, 1:] - videos[:, :-1]).abs().mean((1, 2, 3, 4)) * fps\n"
        "def quiet(prompts, latents, sigma, word=None):\n    return [[float(s), None] for s in sigma]\n"
        "def lost(images, prompts, latents):\n    return latents[:, 0]\n"
    )
    motion = FunctionReward(f"{file}:motion", inputs=("videos",))
    expected = (full().videos.diff(dim=1)).abs().mean((1, 2, 3, 4)) * 8
    torch.testing.assert_close(score(motion, full()).scores[:, 0], expected)
    quiet = FunctionReward(f"{file}:quiet", channels=("sigma", "none"), inputs=("latents",), scope="latent")
    output = score(quiet, full(), max_fail_rate=1.0)
    assert output.scores[:, 0].tolist() == pytest.approx([0.2, 0.7]) and output.valid.tolist() == [[True, False]] * 2
    with pytest.raises(RewardError, match="takes 'latents', which its batch does not have"):
        score(FunctionReward(f"{file}:lost"), RewardBatch(prompts=["a"], images=IMAGE[None]))
