"""Source images wherever they lie: in files, in archives, in memory."""

import io
import json
import pickle
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowalign.data import PromptRecord, digest, load_prompts, source_images
from flowalign.media import read_image, source_image

RED, BLUE = (200, 10, 20), (20, 10, 200)


def png(color: tuple[int, int, int] = RED) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (6, 4), color).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """cat.png, red, as a file, in photos.zip and in photos.tar; sub/dog.png, blue, in the archives."""
    (tmp_path / "cat.png").write_bytes(png())
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat.png", png())
        archive.writestr("sub/dog.png", png(BLUE))
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for name, content in (("./cat.png", png()), ("./sub/dog.png", png(BLUE))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return tmp_path


def write(folder: Path, *rows: dict) -> str:
    (folder / "edits.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(folder / "edits.jsonl")


@pytest.mark.parametrize("archive", ["photos.zip", "photos.tar"])
def test_a_row_names_members_of_an_archive(folder: Path, archive: str) -> None:
    rows = [
        {"prompt": "a", "image": f"{archive}/cat.png"},
        {"prompt": "b", "images": [f"{archive}/sub/dog.png", "cat.png"]},
    ]
    records = load_prompts(write(folder, *rows))
    assert str(records[0].images[0]) == str(folder / archive / "cat.png")
    (one,), (two, three) = source_images(records) or []
    assert one.shape == (3, 4, 6) and torch.equal(one, three)
    assert (one[:, 0, 0] * 255).round().tolist() == list(RED) and (two[:, 0, 0] * 255).round().tolist() == list(BLUE)


@pytest.mark.parametrize("name", ["no.png", "sub", "sub/no.png"])
@pytest.mark.parametrize("archive", ["photos.zip", "photos.tar"])
def test_what_an_archive_lacks_is_named_with_the_line(folder: Path, archive: str, name: str) -> None:
    lacks = "is a folder" if name == "sub" else "does not exist"
    with pytest.raises(FileNotFoundError, match=rf"edits.jsonl, line 1: image .*{archive}/{name} {lacks}"):
        load_prompts(write(folder, {"prompt": "a", "image": f"{archive}/{name}"}))


@pytest.mark.parametrize("archive", ["photos.zip", "photos.tar"])
def test_a_damaged_archive_is_named_with_the_line(folder: Path, archive: str) -> None:
    (folder / archive).write_bytes((folder / archive).read_bytes()[:300] + b"x" * 400)
    with pytest.raises(ValueError, match=rf"edits.jsonl, line 1: .*{archive} is no whole archive"):
        load_prompts(write(folder, {"prompt": "a", "image": f"{archive}/cat.png"}))


def test_an_archive_that_changed_is_listed_again(folder: Path) -> None:
    source = write(folder, {"prompt": "a", "image": "photos.zip/new.png"})
    with pytest.raises(FileNotFoundError):
        load_prompts(source)
    with zipfile.ZipFile(folder / "photos.zip", "a") as archive:
        archive.writestr("new.png", png(BLUE))
    assert load_prompts(source)[0].images[0].open().getpixel((0, 0)) == BLUE


def test_a_folder_with_the_name_of_an_archive_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").mkdir()
    (tmp_path / "photos.zip" / "cat.png").write_bytes(png())
    assert load_prompts(write(tmp_path, {"prompt": "a", "image": "photos.zip/cat.png"}))[0].images[0].open().size == (
        6,
        4,
    )


def test_pixels_in_memory_are_content(folder: Path) -> None:
    one, same, other = (PromptRecord(0, "a", images=(Image.new("RGB", (6, 4), color),)) for color in (RED, RED, BLUE))
    assert one == same != other and hash(one.images) == hash(same.images)
    assert digest([one]) == digest([same]) != digest([other])
    assert source_image(Image.new("RGB", (4, 6))) != source_image(Image.new("RGB", (6, 4)))
    assert torch.equal(read_image(one.images[0]), read_image(folder / "cat.png"))
    assert one.images[0].open().size == (6, 4) and str(one.images[0]).startswith("in memory, 4×6 pixels")
    assert len(repr(PromptRecord(0, "a", images=(Image.new("RGB", (500, 500)),)))) < 300


def test_a_digest_is_of_the_file_wherever_it_lies(folder: Path) -> None:
    places = ("cat.png", "photos.zip/cat.png", "photos.tar/cat.png")
    assert len({digest([PromptRecord(0, "a", images=(folder / place,))]) for place in places}) == 1


def test_images_go_to_other_processes(folder: Path) -> None:
    images = (folder / "cat.png", str(folder / "photos.zip" / "cat.png"), Image.new("RGB", (6, 4), RED))
    record = PromptRecord(0, "a", images=images)
    record.images[1].open()  # an archive that is open here
    sent = pickle.loads(pickle.dumps(record))
    assert sent == record and [image.open().getpixel((0, 0)) for image in sent.images] == [RED] * 3


def test_what_is_no_image_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match="got 3 as a source image; expected a path, or a picture of Pillow"):
        PromptRecord(0, "a", images=(3,))
    Image.effect_noise((64, 64), 50).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:900])
    with Image.open(folder / "cut.png") as picture, pytest.raises(ValueError, match="cannot be read"):
        PromptRecord(0, "a", images=(picture,))
    (folder / "cut.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match=r"cut.png, which cannot be read \(a Git-LFS pointer: `git lfs pull`"):
        read_image(folder / "cut.png")


def test_the_prompts_of_glyphs_edit_are_read_with_their_pictures() -> None:
    began = time.process_time()
    records = load_prompts("flowalign.glyphs.edit:held_out_prompts")
    assert time.process_time() - began < 2
    assert {image.open().size for record in records for image in record.images} == {(48, 24)}
    assert all(len(record.images) == 1 and "image" not in record.metadata for record in records)
    assert len(digest(records)) == 64
