"""The frame that all pages share: one file with its style and script inside, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib.resources import files

import jinja2
from markupsafe import Markup


@dataclass(frozen=True)
class Parts:
    """Style and script of every page, and the Content-Security-Policy that lets these two in and nothing else."""

    css: Markup
    js: Markup

    @property
    def policy(self) -> str:
        return (
            f"default-src 'none'; img-src data:; media-src data:; style-src '{_sha256(self.css)}'; script-src '{_sha256(self.js)}'; "
            "base-uri 'none'; form-action 'none'"
        )


def template(package: str, name: str) -> jinja2.Template:
    """A page of the package, which may extend and import "parts/…". Pictures are written into it: `{{ … | png_url }}`."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda file: _read("flowalign.report" if file.startswith("parts/") else package, file)),
    )  # fmt: skip
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["png_url"] = lambda data: data_url("image/png", data)
    environment.filters["svg_url"] = lambda svg: data_url("image/svg+xml", svg.encode())
    environment.globals["url"] = data_url
    css, js = (Markup(_read("flowalign.report", f"parts/page.{kind}")) for kind in ("css", "js"))
    environment.globals["parts"] = Parts(css, js)
    return environment.get_template(name)


def data_url(kind: str, data: bytes) -> str:
    """kind: the MIME type, such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _read(package: str, name: str) -> str:
    return (files(package) / name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
