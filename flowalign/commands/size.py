"""`--size` of commands."""

from __future__ import annotations

import re

from flowalign.errors import ConfigError
from flowalign.models import Size


def size_of(text: str, frames: int) -> Size:
    """HEIGHTxWIDTH, with `frames`, or HEIGHTxWIDTHxFRAMES. ConfigError for another form."""
    if not re.fullmatch(r"\d+x\d+(x\d+)?", text):
        raise ConfigError(f"got --size {text}; expected HEIGHTxWIDTH such as 512x512, or with frames 480x832x81")
    height, width, *own = map(int, text.split("x"))
    return Size(height, width, own[0] if own else frames)
