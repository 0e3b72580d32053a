"""Source images as the families of edits read them."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from flowalign.data import PromptRecord
from flowalign.models.base import Size


def fitted_images(records: Sequence[PromptRecord], size: Size | None) -> list[Image.Image]:
    """The first source image of each record, at the height and width of what is generated: one size whatever the file's, stretched
    where its sides have another ratio. ValueError without a size, or for a file that is damaged or no image."""
    if size is None:
        raise ValueError(
            "got prompts with source images and no size to fit them to; expected one: encode(records, size=...), or a policy "
            "with `sampling`"
        )
    sides = (size.width, size.height)
    return [record.images[0].open().resize(sides, Image.Resampling.LANCZOS) for record in records]
