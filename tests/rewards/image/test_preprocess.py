"""Resizing, cropping and padding equal Pillow's, torchvision's and transformers', and keep the gradient."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from rewards.image.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    Preprocess,
    center_crop,
    resize,
    resize_long_pad,
    resize_short,
    resize_with_pil,
    to_8_bits,
)

SIZES = [(50, 71), (71, 50), (33, 224), (64, 64), (24, 48), (225, 301), (32, 33)]
STD = torch.tensor(CLIP_STD)[:, None, None]
MEAN = torch.tensor(CLIP_MEAN)[:, None, None]


def pictures(height: int, width: int, count: int = 2) -> torch.Tensor:
    """uint8 [N, 3, H, W]: smooth, with some noise."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return ((0.9 * smooth + 0.1 * torch.rand(smooth.shape, generator=generator)) * 255).byte()


def as_pil(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_quantized_tensors_differ_from_pillow_by_one_level_at_most(height: int, width: int) -> None:
    images = pictures(height, width).float() / 255
    theirs = resize_with_pil(images, 32, 40)
    ours = to_8_bits(resize(to_8_bits(images), 32, 40))
    assert float((ours - theirs).abs().max()) < 1.01 / 255 and float((ours - theirs).abs().mean()) < 0.3 / 255
    by_hand = np.asarray(as_pil(pictures(height, width)[0]).resize((40, 32), Image.Resampling.BICUBIC))
    torch.testing.assert_close(theirs[0] * 255, torch.tensor(by_hand).permute(2, 0, 1).float())


def test_without_antialiasing_a_smaller_image_is_another_one() -> None:
    images = pictures(225, 301).float() / 255
    theirs = resize_with_pil(images, 32, 43)
    aliased = F.interpolate(images, size=(32, 43), mode="bicubic", align_corners=False)
    assert float((aliased - theirs).abs().mean()) > 10 * float((resize(images, 32, 43) - theirs).abs().mean())


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("size", [32, 24])
def test_the_crop_is_torchvisions(height: int, width: int, size: int) -> None:
    images = pictures(height, width).float() / 255
    theirs = Resize(size, InterpolationMode.BICUBIC, antialias=True)(images)
    ours = resize_short(images, size)
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(center_crop(ours, size), CenterCrop(size)(theirs))


def test_floor_and_round_halve_an_odd_difference_differently() -> None:
    column = torch.arange(35.0).expand(1, 3, 32, 35)
    assert center_crop(column, 32, "floor")[0, 0, 0, 0] == 1  # 3 // 2
    assert center_crop(column, 32, "round")[0, 0, 0, 0] == 2  # round(1.5)
    assert center_crop(column[..., :33], 32, "round")[0, 0, 0, 0] == 0  # round(0.5), half to even


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_reference_modes_are_the_published_pipelines(height: int, width: int) -> None:
    """Pillow, ToTensor, Normalize of torchvision (ImageReward), and the image processor of transformers (PickScore)."""
    from transformers import CLIPImageProcessor

    raw = pictures(height, width)
    pipeline = Compose(
        [Resize(32, InterpolationMode.BICUBIC), CenterCrop(32), ToTensor(), Normalize(CLIP_MEAN, CLIP_STD)]
    )
    theirs = torch.stack([pipeline(as_pil(picture)) for picture in raw])
    torch.testing.assert_close(Preprocess(32)(raw.float() / 255, "pil"), theirs)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    floor = Preprocess(32, crop_offset="floor")
    theirs = processor(list(raw), return_tensors="pt").pixel_values
    assert float((floor(raw.float() / 255, "pil") - theirs).abs().max()) < 1.01 / 255 / min(CLIP_STD)


@pytest.mark.parametrize(("height", "width"), [(168, 224), (224, 168), (100, 300), (24, 48), (224, 224), (223, 150)])
def test_the_long_side_is_scaled_and_the_rest_is_black_before_normalizing(height: int, width: int) -> None:
    images = 0.2 + 0.6 * pictures(height, width).float() / 255
    scale = 224 / max(height, width)
    rows, columns = round(height * scale), round(width * scale)
    inner = resize(images, rows, columns)
    expected = torch.zeros(2, 3, 224, 224)
    top, left = (224 - rows) // 2, (224 - columns) // 2
    expected[:, :, top : top + rows, left : left + columns] = inner
    assert torch.equal(resize_long_pad(images, 224), expected)
    torch.testing.assert_close(Preprocess(224, fit="pad")(images), (expected - MEAN) / STD)


def test_squash_ignores_the_aspect_and_fill_pads() -> None:
    images = pictures(50, 71).double() / 255
    squashed = Preprocess(32, fit="squash", interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3)(images)
    expected = F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)
    assert squashed.dtype == torch.float64 and torch.equal(squashed, expected)
    assert float(resize_long_pad(images, 32, fill=0.5)[0, 0, 0, 0]) == 0.5


def test_rounding_to_8_bits_passes_the_gradient_through() -> None:
    images = torch.linspace(-0.01, 1.01, 1000, dtype=torch.float64).requires_grad_()
    rounded = to_8_bits(images)
    torch.testing.assert_close(rounded * 255, (images.clamp(0, 1) * 255).round())
    (gradient,) = torch.autograd.grad((rounded**2).sum(), images)
    torch.testing.assert_close(gradient, 2 * rounded)


def test_quantizing_changes_pixels_by_a_level_and_keeps_the_gradient() -> None:
    images = (pictures(50, 71).double() / 255 + 0.001).clamp(0, 1).requires_grad_()
    plain, quantized = (Preprocess(32)(images, quantize=quantize) for quantize in (False, True))
    difference = float((plain - quantized).detach().abs().max())
    assert 0 < difference < 2 / 255 / min(CLIP_STD)
    ours, theirs = (torch.autograd.grad(pixels.sum(), images)[0] for pixels in (quantized, plain))
    torch.testing.assert_close(ours, theirs)
