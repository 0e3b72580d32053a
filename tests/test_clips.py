"""Clips to train on: what each kind of file gives, and that a tiny Wan learns from them."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flowalign.clips import digest_of_sample, missing, read_sample
from flowalign.image_sets import check_images_of, load_labeled, load_pairs
from flowalign.media import place_at
from flowalign.trainers.image_samples import ImageLatents
from tests.helpers.families import subject
from tests.helpers.family_run import trained

HEIGHT, WIDTH, FRAMES = 16, 32, 5


def clip(seed: int, height: int = HEIGHT, width: int = WIDTH, frames: int = FRAMES) -> Tensor:
    """uint8 [F, 3, H, W] of few colors."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(4, (frames, 3, 1, 1), generator=rng).expand(-1, -1, height, width).mul(80).byte()


def pictures(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in pixels.permute(0, 2, 3, 1).contiguous().numpy()]


def animated(path: Path, pixels: Tensor) -> Path:
    first, *others = pictures(pixels)
    lossless = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=100, **lossless)
    return path


def video(path: Path, pixels: Tensor) -> Path:
    """Without loss but for the colors' rounding."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264rgb", 8, options={"crf": "0"})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[-2:], "rgb24"
        for picture in pictures(pixels):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), "rgb24")))
        container.mux(stream.encode(None))
    return path


def folder(path: Path, pixels: Tensor) -> Path:
    """2.png … 10.png: in the order of the alphabet 10 would be the first."""
    path.mkdir()
    for number, picture in zip(range(10, 10 - len(pixels), -1), pictures(pixels.flip(0)), strict=True):
        picture.save(path / f"frame{number}.png")
    (path / ".hidden").write_text("no frame")
    return path


@pytest.mark.parametrize("kind", ["clip.mp4", "clip.webp", "clip.gif", "frames"])
def test_every_kind_gives_its_frames_in_order(kind: str, tmp_path: Path) -> None:
    make = {"clip.mp4": video, "clip.webp": animated, "clip.gif": animated, "frames": folder}[kind]
    found = read_sample(make(tmp_path / kind, clip(0)))
    assert found.dtype == torch.uint8 and torch.equal(found, clip(0))
    assert len({tuple(frame[:, 0, 0].tolist()) for frame in found}) > 3


@pytest.mark.parametrize("name", ["clips.zip/clip.webp", "clips.zip/frames"])
def test_clips_lie_in_archives_too(name: str, tmp_path: Path) -> None:
    files = [animated(tmp_path / "clip.webp", clip(0)), *sorted(folder(tmp_path / "frames", clip(0)).iterdir())]
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        for file in files:
            archive.write(file, file.relative_to(tmp_path))
    place = place_at(tmp_path / name)
    assert torch.equal(read_sample(place), clip(0))
    assert digest_of_sample(place) == digest_of_sample(tmp_path / Path(name).name)


def test_one_frame_of_a_file_is_an_image_and_of_a_folder_a_clip(tmp_path: Path) -> None:
    pictures(clip(0))[0].save(tmp_path / "a.png")
    assert read_sample(tmp_path / "a.png").shape == (3, HEIGHT, WIDTH)
    assert read_sample(folder(tmp_path / "one", clip(0)[:1])).shape == (1, 3, HEIGHT, WIDTH)


def test_what_is_no_whole_clip_is_refused(tmp_path: Path) -> None:
    path = video(tmp_path / "cut.mp4", clip(0))
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"got .*cut.mp4, which cannot be read .*expected a whole image or clip"):
        read_sample(path)
    mixed = folder(tmp_path / "mixed", clip(0))
    pictures(clip(0, width=WIDTH + 2))[0].save(mixed / "frame99.png")
    with pytest.raises(ValueError, match=r"the clip .*mixed with frames of 2 sizes"):
        read_sample(mixed)
    (tmp_path / "empty").mkdir()
    assert missing(tmp_path / "empty") == "is a folder without files" and missing(mixed) is None


def test_the_policys_frames_are_the_clips(tmp_path: Path) -> None:
    for seed in (0, 1):
        animated(tmp_path / f"{seed}.webp", clip(seed))
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "video": "0.webp"}\n{"prompt": "b", "image": "1.webp"}')
    rows = load_labeled(str(tmp_path / "a.jsonl"))
    assert [row.image.name for row in rows] == ["0.webp", "1.webp"] and rows[0].record.metadata == {}
    check_images_of(rows, HEIGHT, WIDTH, FRAMES)
    with pytest.raises(ValueError, match=r"line 1: got .*0.webp, a clip of 5 frames; expected a clip of 9 frames"):
        check_images_of(rows, HEIGHT, WIDTH, 9)
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "chosen": "0.webp", "rejected": "1.webp"}')
    check_images_of(load_pairs(str(tmp_path / "b.jsonl")), HEIGHT, WIDTH, FRAMES)
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "image": "0.webp", "video": "1.webp"}')
    with pytest.raises(ValueError, match="line 1: got 'video' beside 'image'"):
        load_labeled(str(tmp_path / "c.jsonl"))


def test_a_tiny_wan_learns_from_clips(tmp_path: Path) -> None:
    """The samples are what its VAE makes of the files' frames, and each weight that is trained moves."""
    family = subject("wan21")
    size, rows = family.size, []
    for seed in range(2):
        name = animated(tmp_path / f"{seed}.webp", clip(seed, size.height, size.width, size.frames)).name
        rows.append({"prompt": "a word", "video": name})
    (tmp_path / "clips.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    overrides = [f"trainer.source.init_args.file={tmp_path / 'clips.jsonl'}", "trainer.optimizer.lr=0.001"]
    policy = family.policy()
    wanted = policy.encode_images(clip(0, size.height, size.width, size.frames)[None] / 255)

    class Task:
        pass

    Task.policy = policy
    assert torch.equal(ImageLatents().of(Task, [tmp_path / "0.webp"]), wanted) and wanted.shape[2] > 1
    row, weights = trained(family, tmp_path, *overrides, layers=["methods/fm_sft.yaml"])
    moved = {name: bool(tensor.abs().max() > 0) for name, tensor in weights.items() if "lora_B" in name}
    assert moved and all(moved.values()) and row["cost/rollout_per_image"] == 0
