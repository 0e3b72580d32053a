"""What prompts show beside their text: images in files, in archives of files, or in memory."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowalign.prompt_files import LFS

ARCHIVES = (".zip", ".tar")


class SourceImage(Protocol):
    """An image that an edit begins with. Two are equal, with equal hashes, if they lie in the same place, or in memory with the same
    pixels; it can be pickled. Its text is its name in messages."""

    def open(self) -> Image.Image:
        """Its pixels in RGB (alpha is dropped); ValueError for one that is damaged or no image."""
        ...

    def digest(self) -> str:
        """SHA-256 of its content, wherever it lies."""
        ...

    def missing(self) -> str | None:
        """What it lacks, such as "does not exist"; None if it is there. It is not decoded. OSError for an archive that is damaged."""
        ...


@dataclass(frozen=True)
class ArchiveMember:
    """A file within a .zip or an uncompressed .tar. name: its path there, without a leading "./"."""

    archive: Path
    name: str

    def __str__(self) -> str:
        return str(self.archive / self.name)

    def is_file(self) -> bool:
        return self.name in _members(self.archive)

    def is_dir(self) -> bool:
        return any(name.startswith(f"{self.name}/") for name in _members(self.archive))

    def read_bytes(self) -> bytes:
        """OSError for an archive without it, or a damaged one."""
        if not self.is_file():
            raise OSError(f"{self.archive} has no member {self.name!r}")
        return _members(self.archive)[self.name].read()


@dataclass(frozen=True)
class ImageFile:
    """An image in a file, or in a member of an archive."""

    file: Path | ArchiveMember

    def __str__(self) -> str:
        return str(self.file)

    def open(self) -> Image.Image:
        try:
            content = self.file.read_bytes()
            if content.startswith(LFS.encode()):
                raise ValueError("a Git-LFS pointer: `git lfs pull` in its repository gets the image itself")
            with Image.open(io.BytesIO(content)) as picture:
                return picture.convert("RGB")
        except (
            OSError,
            ValueError,
            SyntaxError,
            Image.DecompressionBombError,
        ) as error:  # SyntaxError: of a broken PNG
            raise ValueError(
                f"got the image {self}, which cannot be read ({error}); expected a whole image file: replace it, or leave its "
                "prompt out"
            ) from error

    def digest(self) -> str:
        return hashlib.sha256(self.file.read_bytes()).hexdigest()

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
            return ImageFile(file_at(Path(given)))
        case Image.Image():
            try:
                picture = given.convert("RGB")
            except (OSError, ValueError, SyntaxError) as error:  # it reads its file only now
                raise ValueError(
                    f"got the picture {given!r}, which cannot be read ({error}); expected a whole one"
                ) from error
            return ImageInMemory(picture.width, picture.height, picture.tobytes())
    raise TypeError(f"got {given!r} as a source image; expected a path, or a picture of Pillow")


def file_at(path: Path) -> Path | ArchiveMember:
    """The file at a path, which may lead into an archive; whether it exists is not asked."""
    for parent in path.parents:
        if parent.suffix.lower() in ARCHIVES and parent.is_file():
            return ArchiveMember(parent, path.relative_to(parent).as_posix())
    return path


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
