"""What a folder holds, to compare two of them."""

import re
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file by its path, less the seconds that something took; hidden files are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            data = path.read_bytes()
            if path.suffix == ".json":
                data = re.sub(rb'"seconds": [0-9.e+-]+', b'"seconds": 0', data)
            found[str(path.relative_to(folder))] = data
    return found
