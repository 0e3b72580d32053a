"""Color accuracy on synthetic pictures."""

import pytest
import torch

from rewards import ColorAccuracy, RewardBatch, RewardError, score
from rewards.color import ink_color, paper_color
from tests.helpers.reward_parts import in_parts

PALETTE = {"red": (200, 0, 0), "blue": (0, 0, 220), "white": (255, 255, 255), "yellow": (255, 230, 0)}


def page(ink, paper, height=24, width=48):
    """A sheet of paper with an ink block and, as an anti-aliased edge has, a row half of each."""
    rgb = {name: torch.tensor(value) / 255 for name, value in PALETTE.items()}
    image = rgb[paper][:, None, None].expand(3, height, width).clone()
    image[:, 8:14, 10:24] = rgb[ink][:, None, None]
    image[:, 14, 10:24] = ((rgb[ink] + rgb[paper]) / 2)[:, None]
    return image


def batch_of(pages, wanted):
    return RewardBatch(
        prompts=["p"] * len(pages),
        images=torch.stack(pages),
        metadata=[{"ink": ink, "paper": paper} for ink, paper in wanted],
    )


def judge(image, ink, paper, **options):
    return score(ColorAccuracy(palette=PALETTE, **options), batch_of([image], [(ink, paper)]))


@pytest.mark.parametrize("ink", ["red", "blue"])
@pytest.mark.parametrize("paper", ["white", "yellow"])
def test_right_colors(ink, paper):
    output = judge(page(ink, paper), ink, paper)
    assert output.scores.item() == 1 and output.info == [f"{ink} on {paper}"]


def test_components_tell_ink_from_paper():
    batch = batch_of(
        [page("red", "white")] * 4, [("red", "white"), ("blue", "white"), ("red", "yellow"), ("blue", "yellow")]
    )
    mean = score(ColorAccuracy(palette=PALETTE), batch)
    assert mean.scores[:, 0].tolist() == [1, 0.5, 0.5, 0]
    assert mean.components["ink"].tolist() == [1, 0, 1, 0] and mean.components["paper"].tolist() == [1, 1, 0, 0]
    assert score(ColorAccuracy(palette=PALETTE, metric="both"), batch).scores[:, 0].tolist() == [1, 0, 0, 0]


def test_exact_medians():
    image = page("red", "yellow")[None]
    paper = paper_color(image)
    ink, strength = ink_color(image, paper)
    assert torch.equal(paper[0], torch.tensor([255, 230, 0]) / 255)
    assert torch.equal(ink[0], torch.tensor([200, 0, 0]) / 255)
    assert strength.item() == pytest.approx((55**2 + 230**2) ** 0.5 / 255)


def test_noise_and_stray_pixels_do_no_harm():
    image = page("red", "yellow") + 0.05 * torch.randn(3, 24, 48, generator=torch.Generator().manual_seed(0))
    image[:, 2, 2:22] = torch.tensor([0.0, 0.0, 1.0])[:, None]  # 20 of 1152 pixels, farther from yellow than red is
    assert judge(image.clamp(0, 1), "red", "yellow").scores.item() == 1


def test_blank_paper_has_its_ink_wrong():
    blank = (torch.tensor(PALETTE["white"]) / 255)[:, None, None].expand(3, 24, 48)
    output = judge(blank, "red", "white")
    assert output.scores.item() == 0.5 and output.info == ["none on white"]


def test_ink_that_is_named_paper_is_wrong():
    assert judge(page("red", "white"), "white", "red").scores.item() == 0


def test_palette_from_the_metadata():
    batch = batch_of([page("red", "white")] * 2, [("red", "white")] * 2)
    batch.metadata[0]["palette"] = PALETTE
    output = score(ColorAccuracy(), batch)
    assert output.valid[:, 0].tolist() == [True, False] and output.scores[0] == 1 and "no palette" in output.info[1]


def test_missing_or_unknown_name_is_invalid():
    batch = batch_of([page("red", "white")] * 4, [("red", "white")] * 2 + [(None, "white"), ("red", "wite")])
    output = score(ColorAccuracy(palette=PALETTE), batch)
    assert output.valid[:, 0].tolist() == [True, True, False, False]
    assert "metadata['ink'] is None" in output.info[2] and "metadata['paper'] is 'wite'" in output.info[3]
    with pytest.raises(RewardError, match="reward 'color'"):
        score(ColorAccuracy(palette=PALETTE), batch.select([2, 3]))


def test_batch_mates_do_not_matter():
    pages = [page("red", "white"), page("blue", "yellow"), page("red", "yellow")]
    batch = batch_of(pages, [("red", "white"), ("red", "yellow"), ("red", "white")])
    reward = ColorAccuracy(palette=PALETTE)
    whole = score(reward, batch).scores
    assert whole[:, 0].tolist() == [1, 0.5, 0.5]
    assert torch.equal(torch.cat([score(reward, part).scores for part in in_parts(batch)]), whole)
    assert torch.equal(score(reward, batch.select([2, 0, 1])).scores, whole[[2, 0, 1]])


def test_empty_batch():
    empty = RewardBatch(prompts=[], images=torch.zeros(0, 3, 24, 48))
    assert ColorAccuracy(palette=PALETTE)(empty).scores.shape == (0,)


@pytest.mark.parametrize("color", [(0.5, 0.0, 0.0), (300, 0, 0), (1, 2)])
def test_palette_is_checked_at_construction(color):
    with pytest.raises(ValueError, match="three integers from 0 to 255"):
        ColorAccuracy(palette={"red": color})
    with pytest.raises(ValueError, match="got metric='all'"):
        ColorAccuracy(metric="all")
