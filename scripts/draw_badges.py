"""Draws the README's badges into docs/pictures/badges, from pyproject.toml: local files that say what it says."""

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures" / "badges"
WIDTH, PAD = 6.6, 8  # pixels a character, at 11 pixels of Verdana; beside a text


def texts() -> dict[str, tuple[str, str]]:
    """File name -> label and value."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {
        "license.svg": ("license", project["license"]),
        "python.svg": ("python", project["requires-python"].replace(">=", "≥ ")),
        "gpu.svg": ("GPU", "not needed to try"),
    }


def badge(label: str, value: str) -> str:
    """An SVG of 20 pixels' height, the label on gray and the value on blue."""
    left, right = (round(len(text) * WIDTH) + 2 * PAD for text in (label, value))
    return f"""<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img">
<title>{escape(label)}: {escape(value)}</title>
<clipPath id="c"><rect width="{left + right}" height="20" rx="3"/></clipPath>
<g clip-path="url(#c)"><path fill="#4a5060" d="M0 0h{left}v20H0z"/><path fill="#1f6f9f" d="M{left} 0h{right}v20H{left}z"/></g>
<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="{left / 2:g}" y="14">{escape(label)}</text><text x="{left + right / 2:g}" y="14">{escape(value)}</text>
</g></svg>
"""


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, words in texts().items():
        (FOLDER / name).write_text(badge(*words), encoding="utf-8")
