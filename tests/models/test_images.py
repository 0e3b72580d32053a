"""What `generate` gives: files that hold exactly the pixels, pictures of several, videos, what a notebook shows."""

import io
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import flowalign as fa


def bytes_of(images: fa.Images) -> np.ndarray:
    return (images.pixels * 255).round().byte().movedim(-3, -1).numpy()


def some(*shape: int) -> fa.Images:
    """uint8 values, so that 8 bits hold them exactly."""
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    fps = 10.0 if len(shape) == 5 else None
    return fa.Images(values.float() / 255, [f"prompt {number}" for number in range(shape[0])], fps)


def test_the_example_of_thirty_seconds(tmp_path: Path) -> None:
    policy = fa.load_policy("glyphs")
    path = policy.generate('the word "KITE" in red on a yellow background').save(tmp_path / "kite.png")
    assert path == tmp_path / "kite.png"
    with Image.open(path) as picture:
        assert picture.size == (48, 24)
        red, _, blue = np.asarray(picture).astype(float).mean((0, 1))
    assert red > 150 > 100 > blue  # yellow and red


@pytest.mark.parametrize("suffix", [".png", ".webp", ".PNG"])
def test_one_image_is_saved_without_loss_at_its_own_size(suffix: str, tmp_path: Path) -> None:
    images = some(3, 3, 7, 11)
    path = images[1].save(str(tmp_path / "new" / f"one{suffix}"))
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture.convert("RGB")), bytes_of(images)[1])
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no temporary file is left


def test_a_jpeg_is_close(tmp_path: Path) -> None:
    images = replace(some(1, 3, 16, 16), pixels=torch.linspace(0, 1, 16).expand(1, 3, 16, 16))
    with Image.open(images.save(tmp_path / "one.jpg")) as picture:
        assert picture.format == "JPEG"
        assert np.abs(np.asarray(picture).astype(int) - bytes_of(images)[0]).max() <= 4


def test_several_stand_side_by_side_in_rows(tmp_path: Path) -> None:
    images = some(5, 3, 4, 6)
    with Image.open(images.save(tmp_path / "all.png")) as picture:
        found = np.asarray(picture)
    assert found.shape == (2 + 2 * (4 + 2), 2 + 3 * (6 + 2), 3)
    for place, expected in enumerate(bytes_of(images)):
        row, column = divmod(place, 3)
        top, left = 2 + row * 6, 2 + column * 8
        assert np.array_equal(found[top : top + 4, left : left + 6], expected)
    assert found[0].min() == 255  # white between them


def test_places_and_slices_are_images_with_their_prompts() -> None:
    images = some(4, 3, 2, 2)
    assert len(images) == 4 and len(images[-1]) == 1 and images[-1].prompts == ["prompt 3"]
    assert torch.equal(images[-1].pixels, images.pixels[3:])
    assert images[1:3].prompts == ["prompt 1", "prompt 2"] and torch.equal(images[1:3].pixels, images.pixels[1:3])
    assert [one.prompts for one in images] == [[prompt] for prompt in images.prompts]
    assert [np.asarray(picture).tolist() for picture in images.pil] == bytes_of(images).tolist()
    with pytest.raises(IndexError):
        images[4]
    with pytest.raises(ValueError, match="at least one image"):
        images[2:2]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_a_video_moves(suffix: str, tmp_path: Path) -> None:
    shades = torch.tensor([0.0, 0.5, 1.0])[None, :, None, None, None].expand(2, 3, 3, 8, 8)
    videos = fa.Images(shades, ["a", "b"], fps=10)
    assert len(videos.pil) == 6 and len(videos[1].pil) == 3
    for made, width in ((videos[0], 8), (videos, 2 + 2 * (8 + 2))):
        with Image.open(made.save(tmp_path / f"video{suffix}")) as picture:
            assert picture.n_frames == 3 and picture.width == width
            for frame, shade in enumerate((0, 128, 255)):
                picture.seek(frame)
                picture.load()
                assert picture.info["duration"] == 100
                assert abs(int(np.asarray(picture.convert("RGB"))[4, 4, 0]) - shade) <= 4


def test_a_webp_of_a_video_has_exactly_its_pixels(tmp_path: Path) -> None:
    videos = some(1, 3, 3, 7, 11)
    with Image.open(videos.save(tmp_path / "video.webp")) as picture:
        for number, expected in enumerate(bytes_of(videos)[0]):
            picture.seek(number)
            assert np.array_equal(np.asarray(picture.convert("RGB")), expected)


def test_a_video_is_saved_as_mp4(tmp_path: Path) -> None:
    shades = torch.tensor([0.0, 0.5, 1.0])[None, :, None, None, None].expand(2, 3, 3, 32, 64)
    videos = fa.Images(shades, ["a", "b"], fps=10)
    for made, height, width in ((videos[0], 6 * 32, 6 * 64), (videos, 2 * (2 + 34), 2 * (2 + 2 * 66))):
        with av.open(made.save(tmp_path / "clip.MP4")) as container:
            assert container.streams.video[0].average_rate == 10 and container.streams.video[0].codec.name == "h264"
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert [frame.shape for frame in frames] == [(height, width, 3)] * 3
        for frame, shade in zip(frames, (0, 128, 255), strict=True):
            assert np.abs(frame[20:40, 20:40].astype(int) - shade).max() <= 4


@pytest.mark.parametrize(
    ("shape", "name", "message"),
    [
        (
            (1, 3, 4, 4),
            "a.bmp",
            r"got '.*a\.bmp' for images; expected a name that ends in \.png, \.jpg, \.jpeg, \.webp",
        ),
        ((1, 3, 4, 4), "a.gif", r"for images; expected"),
        ((1, 3, 4, 4), "a", r"for images; expected"),
        ((1, 2, 3, 4, 4), "a.png", r"for videos; expected a name that ends in \.mp4, \.webp, \.gif"),
        ((1, 3, 4, 4), "a.mp4", r"for images; expected"),
    ],
)
def test_another_suffix_is_refused(shape: tuple[int, ...], name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        some(*shape).save(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got pixels of shape \(1, 3, 4, 4\) and 2 prompts; expected"):
        fa.Images(torch.zeros(1, 3, 4, 4), ["a", "b"])
    with pytest.raises(ValueError, match=r"got pixels of shape \(3, 4, 4\)"):
        fa.Images(torch.zeros(3, 4, 4), ["a"])
    with pytest.raises(ValueError, match="got videos without fps; expected frames per second"):
        replace(some(1, 2, 3, 4, 4), fps=None).save(tmp_path / "a.gif")


def test_a_notebook_shows_each_pixel_of_a_small_image_as_a_square() -> None:
    images = some(1, 3, 24, 48)
    with Image.open(io.BytesIO(images._repr_png_())) as picture:
        found = np.asarray(picture)
    assert found.shape == (192, 384, 3)  # 8 times
    assert np.array_equal(found, bytes_of(images)[0].repeat(8, 0).repeat(8, 1))
    with Image.open(io.BytesIO(some(1, 2, 3, 300, 400)._repr_png_())) as picture:
        assert picture.size == (400, 300)
