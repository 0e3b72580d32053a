"""Images and videos become the patches that the processors of transformers make of them."""

import pytest
import torch
from torch import Tensor

from rewards.image.preprocess import CLIP_STD
from rewards.qwen.vision import Eye, patchify, smart_resize

PIXELS = 256 * 28 * 28


def pictures(count: int, height: int, width: int) -> Tensor:
    """uint8 [count, 3, height, width]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def test_sizes_by_hand() -> None:
    for size, limits, expected in (
        ((448, 448), (PIXELS, PIXELS), (448, 448)),
        ((1024, 1024), (PIXELS, PIXELS), (448, 448)),
        ((100, 100), (PIXELS, PIXELS), (448, 448)),
        ((480, 832), (PIXELS // 2, PIXELS), (336, 588)),  # 340.3 x 589.9, rounded down
        ((50, 70), (1, PIXELS), (56, 56)),  # 1.79 and 2.5 times 28, half to even
        ((10, 40), (1, PIXELS), (28, 28)),  # at least one multiple
        ((10, 1900), (1, 784), (28, 364)),
    ):
        assert smart_resize(*size, 28, *limits) == expected, size


def test_sizes_are_those_of_transformers_from_one_token_up() -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as theirs

    for height in range(28, 1300, 97):
        for width in range(28, 1300, 89):
            for low, high in ((PIXELS, PIXELS), (PIXELS // 2, PIXELS), (3136, 12845056)):
                assert smart_resize(height, width, 28, low, high) == theirs(height, width, 28, low, high), (
                    height,
                    width,
                )


def test_an_image_that_is_too_long_is_refused() -> None:
    assert smart_resize(10, 2000, 28, 1, PIXELS)
    with pytest.raises(ValueError, match="got an image of 10 x 2001 pixels; expected an aspect of at most 200"):
        smart_resize(10, 2001, 28, 1, PIXELS)


def test_rows_are_ordered_by_the_tokens_they_become() -> None:
    y, x = torch.meshgrid(torch.arange(56), torch.arange(84), indexing="ij")
    image = torch.stack([y * 1000 + x, y * 1000 + x + 0.25, y * 1000 + x + 0.5])[None].double()
    patches = patchify(image)
    assert patches.grid == (1, 4, 6) and patches.rows.shape == (24, 1176)
    corners = [(int(row[0]) // 1000 // 14, int(row[0]) % 1000 // 14) for row in patches.rows]
    assert corners[:6] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3)] and corners[12] == (2, 0)
    numbers = patches.rows[2].reshape(3, 2, 14, 14)  # color, time, y, x
    assert torch.equal(numbers[1, 1], image[0, 1, 14:28, :14]) and torch.equal(numbers[:, 0], numbers[:, 1])
    assert patchify(torch.zeros(1, 3, 448, 448)).rows.shape == (1024, 1176)


def test_frames_go_by_two_and_the_last_is_repeated() -> None:
    video = torch.arange(5.0)[:, None, None, None].expand(5, 3, 28, 28)
    patches = patchify(video)
    assert patches.grid == (3, 2, 2)
    times = patches.rows.reshape(3, 4, 3, 2, 196)[:, :, 0, :, 0]
    assert times[:, 0].tolist() == [[0, 1], [2, 3], [4, 4]] and bool((times == times[:, :1]).all())


def test_every_pixel_of_an_image_is_seen_twice() -> None:
    image = torch.rand(1, 3, 56, 28, requires_grad=True)
    (gradient,) = torch.autograd.grad(patchify(image).rows.sum(), image)
    assert torch.equal(gradient, torch.full_like(image, 2))


@pytest.mark.parametrize(("height", "width"), [(56, 140), (75, 131), (300, 200), (20, 33)])
def test_images_are_those_of_the_processor_of_transformers(height: int, width: int) -> None:
    """Of floats to rounding; of 8 bits to two levels, since torch's resize of bytes rounds between its two passes, as Pillow."""
    from transformers import Qwen2VLImageProcessor

    low, high = 8 * 784, 16 * 784
    theirs = Qwen2VLImageProcessor(size={"shortest_edge": low, "longest_edge": high})
    image = pictures(1, height, width)
    expected = theirs(images=list(image / 255), do_rescale=False, return_tensors="pt")
    ours = Eye(low, high)(image / 255)
    assert ours.grid == tuple(expected["image_grid_thw"][0].tolist())
    torch.testing.assert_close(ours.rows, expected["pixel_values"], rtol=0, atol=1e-5)
    of_bytes, pil = (
        theirs(images=list(image), return_tensors="pt")["pixel_values"],
        Eye(low, high)(image / 255, mode="pil").rows,
    )
    assert float((pil - of_bytes).abs().max()) < 2.01 / 255 / min(CLIP_STD)


def test_videos_are_those_of_the_processor_of_transformers() -> None:
    from transformers import Qwen2VLVideoProcessor

    low, high = 4 * 784, 8 * 784
    theirs = Qwen2VLVideoProcessor(size={"shortest_edge": low, "longest_edge": high}, cap_pixels_per_frame=False)
    for count in (4, 5):
        video = pictures(count, 70, 90)
        expected = theirs(videos=[video / 255], do_rescale=False, return_tensors="pt")
        ours = Eye(low, high)(video / 255)
        assert ours.grid == tuple(expected["video_grid_thw"][0].tolist())
        torch.testing.assert_close(ours.rows, expected["pixel_values_videos"], rtol=0, atol=1e-5)
