"""What prompts show beside their text, images in files, in archives of files, or in memory; and sizes of images and videos."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from flowalign.prompt_files import LFS

ARCHIVES = (".zip", ".tar")
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # SyntaxError: of a broken PNG


@dataclass(frozen=True)
class Size:
    """What is generated: `frames` images of height × width pixels; one frame is an image. The groups of an iteration have one size, so
    the latents of a forest have one shape."""

    height: int
    width: int
    frames: int = 1

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return self.height * self.width * self.frames


class SourceImage(Protocol):
    """An image that an edit begins with. Two are equal, with equal hashes, if they lie in the same place, or in memory with the same
    pixels; it can be pickled. Its text is its name in messages."""

    def open(self) -> Image.Image:
        """Its pixels in RGB (alpha is dropped); ValueError for one that is damaged or no image."""
        ...

    def sides(self) -> tuple[int, int]:
        """Its height and width in pixels, without decoding it; ValueError as from `open`."""
        ...

    def digest(self) -> str:
        """SHA-256 of its content, wherever it lies."""
        ...

    def missing(self) -> str | None:
        """What it lacks, such as "does not exist"; None if it is there. It is not decoded. OSError for an archive that is damaged."""
        ...


@dataclass(frozen=True)
class ArchiveMember:
    """A file or folder within a .zip or an uncompressed .tar, with what a Path has of methods. member: its path there, without a leading
    "./". OSError for an archive that is damaged."""

    archive: Path
    member: str

    def __str__(self) -> str:
        return str(self.archive / self.member)

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name

    def is_file(self) -> bool:
        return self.member in _members(self.archive)

    def is_dir(self) -> bool:
        return any(name.startswith(f"{self.member}/") for name in _members(self.archive))

    def iterdir(self) -> Iterator[ArchiveMember]:
        """The files of a folder; folders in it are left out."""
        for name in _members(self.archive):
            if str(PurePosixPath(name).parent) == self.member:
                yield ArchiveMember(self.archive, name)

    def open(self, mode: Literal["rb"]) -> BinaryIO:
        return io.BytesIO(self.read_bytes())

    def read_bytes(self) -> bytes:
        if not self.is_file():
            raise OSError(f"{self.archive} has no member {self.member!r}")
        return _members(self.archive)[self.member].read()


Place = Path | ArchiveMember


@dataclass(frozen=True)
class ImageFile:
    """An image in a file, or in a member of an archive."""

    file: Place

    def __str__(self) -> str:
        return str(self.file)

    def open(self) -> Image.Image:
        with self._opened() as picture:
            return picture.convert("RGB")

    def sides(self) -> tuple[int, int]:
        with self._opened() as picture:
            return picture.height, picture.width

    @contextmanager
    def _opened(self) -> Iterator[Image.Image]:
        try:
            with opened(self.file) as file, picture_of(file) as picture:
                yield picture
        except UNREADABLE as error:
            raise ValueError(
                f"got the image {self}, which cannot be read ({error}); expected a whole image file: replace it, or leave its "
                "prompt out"
            ) from error

    def digest(self) -> str:
        return digest_of_file(self.file)

    def missing(self) -> str | None:
        if self.file.is_file():
            return None
        return "is a folder" if self.file.is_dir() else "does not exist"


@dataclass(frozen=True)
class ImageInMemory:
    """An image of width × height pixels, RGB bytes row after row."""

    width: int
    height: int
    pixels: bytes = field(repr=False)

    def __str__(self) -> str:
        return f"in memory, {self.height}×{self.width} pixels, {self.digest()[:8]}"

    def open(self) -> Image.Image:
        return Image.frombytes("RGB", (self.width, self.height), self.pixels)

    def sides(self) -> tuple[int, int]:
        return self.height, self.width

    def digest(self) -> str:
        return hashlib.sha256(f"RGB {self.width} {self.height}\n".encode() + self.pixels).hexdigest()

    def missing(self) -> str | None:
        return None


def source_image(given: object) -> SourceImage:
    """Of a path, which may lead into an archive (`photos.zip/cat.png`), or a picture of Pillow, of which the pixels are kept; one that is
    a source image stays as it is. TypeError for anything else, ValueError for a picture that cannot be read."""
    match given:
        case ImageFile() | ImageInMemory():
            return given
        case str() | Path():
            return ImageFile(place_at(Path(given)))
        case Image.Image():
            try:
                picture = given.convert("RGB")
            except UNREADABLE as error:  # it reads its file only now
                raise ValueError(
                    f"got the picture {given!r}, which cannot be read ({error}); expected a whole one"
                ) from error
            return ImageInMemory(picture.width, picture.height, picture.tobytes())
    raise TypeError(f"got {given!r} as a source image; expected a path, or a picture of Pillow")


def place_at(path: Path) -> Place:
    """The file or folder at a path, which may lead into an archive; whether it exists is not asked."""
    for parent in path.parents:
        if parent.suffix.lower() in ARCHIVES and parent.is_file():
            return ArchiveMember(parent, path.relative_to(parent).as_posix())
    return path


@contextmanager
def opened(file: Place) -> Iterator[BinaryIO]:
    """Its bytes; OSError for a file that cannot be read, ValueError for a Git-LFS pointer in its place."""
    with file.open("rb") as stream:
        if stream.read(len(LFS)) == LFS.encode():
            raise ValueError("a Git-LFS pointer: `git lfs pull` in its repository gets the file itself")
        stream.seek(0)
        yield stream


def picture_of(file: BinaryIO) -> Image.Image:
    """Opened, not decoded; ValueError for bytes that are no image."""
    try:
        return Image.open(file)
    except UnidentifiedImageError as error:  # its message names the buffer
        raise ValueError("it has no format that Pillow knows") from error


def digest_of_file(file: Place) -> str:
    """SHA-256 of its content."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read_image(image: object) -> Tensor:
    """[3, H, W] in [0, 1] of what `source_image` takes; ValueError for one that is damaged or no image."""
    return torch.from_numpy(np.array(source_image(image).open())).permute(2, 0, 1).float() / 255


class _Member(Protocol):
    def read(self) -> bytes: ...


@dataclass(frozen=True)
class _Zipped:
    archive: zipfile.ZipFile
    info: zipfile.ZipInfo

    def read(self) -> bytes:
        try:
            return self.archive.read(self.info)
        except (
            zipfile.BadZipFile,
            RuntimeError,
            NotImplementedError,
        ) as error:  # damaged, encrypted, or another compression
            raise OSError(str(error)) from error


@dataclass(frozen=True)
class _Extent:
    """Bytes of a file: an uncompressed tar is its members one after another."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def _members(archive: Path) -> Mapping[str, _Member]:
    """The files within, by name. OSError for one that is damaged."""
    about = archive.stat()
    return _listed(archive, about.st_mtime_ns, about.st_size, os.getpid())


@lru_cache(maxsize=16)
def _listed(archive: Path, changed: int, size: int, process: int) -> Mapping[str, _Member]:
    """Listed once: an archive has no index, or a long one. A file that is open is not shared with a forked process."""
    try:
        if archive.suffix.lower() == ".zip":
            zipped = zipfile.ZipFile(archive)
            return {_plain(info.filename): _Zipped(zipped, info) for info in zipped.infolist() if not info.is_dir()}
        with tarfile.open(archive, "r:") as tar:
            return {_plain(info.name): _Extent(archive, info.offset_data, info.size) for info in tar if info.isreg()}
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise OSError(
            f"{archive} is no whole archive ({error}); expected a .zip, or a .tar without compression"
        ) from error


def _plain(name: str) -> str:
    return PurePosixPath(name).as_posix()
