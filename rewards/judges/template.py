"""The wording of a judge's questions: the canonical text where the user has it, else ours, and whether it is canonical.

A judge that was trained on one wording scores otherwise with another, even of white space. Canonical texts belong to others
and are not shipped: they come from a file, or from the installed package of the judge, and are known by SHA-256."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Wording:
    """One text of a judge. ours: our own, noncanonical. fingerprints: the first 16 hex digits of the SHA-256 of the texts that
    are canonical (UTF-8, placeholders as they are); () if none is known. variable: its name in the judge's code.
    placeholders: what is replaced in it, which has to be there."""

    ours: str
    fingerprints: tuple[str, ...] = ()
    variable: str = ""
    placeholders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Templates:
    """texts by name. noncanonical: at least one of them is not canonical."""

    texts: Mapping[str, str]
    noncanonical: bool


def load_templates(source: str | None, wordings: Mapping[str, Wording]) -> Templates:
    """The texts of a judge from `source`: None (ours), a folder with a `<name>.txt` of each, a text file (of the judge's only
    text), a Python file, or a module of an installed package ("editscore.vie_prompts"). Python is read, not run: the text is
    what is assigned to `variable`, with `{name}` for each name in an f-string.

    ValueError if one is not there, or lacks a placeholder."""
    texts = {
        name: wording.ours if source is None else _text(source, name, wording, len(wordings))
        for name, wording in wordings.items()
    }
    for name, wording in wordings.items():
        if lacks := [each for each in wording.placeholders if each not in texts[name]]:
            raise ValueError(
                f"got the template {name!r} of {source} without {lacks}; expected them: they are filled in"
            )
    canonical = all(fingerprint(texts[name]) in wording.fingerprints for name, wording in wordings.items())
    return Templates(texts, not canonical)


def fingerprint(text: str) -> str:
    """The first 16 hex digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _text(source: str, name: str, wording: Wording, count: int) -> str:
    path = Path(source)
    if path.is_dir():
        return _read(path / f"{name}.txt")
    if path.suffix == ".txt":
        if count > 1:
            raise ValueError(
                f"got the file {source} for {count} templates; expected a folder with {name}.txt and others"
            )
        return _read(path)
    if path.suffix != ".py" and path.exists():
        raise ValueError(f"got templates={source!r}; expected a folder, a .txt or .py file, or a module")
    return _assigned(path if path.suffix == ".py" else _module_file(source), wording.variable)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # read_text would change line ends, hence the fingerprint
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"got the template file {path}, which cannot be read ({error})") from error


def _module_file(module: str) -> Path:
    """Of an installed module, which is not imported."""
    first, *rest = module.split(".")
    spec = find_spec(first) if first.isidentifier() else None
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders if (path := Path(folder, *rest).with_suffix(".py")).exists()]
    if not rest or not files:
        raise ValueError(f"got templates={module!r}, no file and no installed module; expected one of them")
    return files[0]


def _assigned(path: Path, variable: str) -> str:
    try:
        tree = ast.parse(_read(path))
    except SyntaxError as error:
        raise ValueError(f"got the template file {path}, which is no Python ({error})") from error
    assignments = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    values = [node.value for node in assignments if variable in [ast.unparse(target) for target in node.targets]]
    found = {text for value in values if (text := _literal(value)) is not None}
    if len(found) != 1:
        raise ValueError(f"got {len(found)} texts under the name {variable!r} in {path}; expected one")
    return found.pop()


def _literal(value: ast.expr) -> str | None:
    """The text of a string, with `{name}` for a name in an f-string; None for another expression."""
    if isinstance(value, ast.Constant):
        return value.value if isinstance(value.value, str) else None
    if not isinstance(value, ast.JoinedStr):
        return None
    parts = [
        f"{{{ast.unparse(part.value)}}}" if isinstance(part, ast.FormattedValue) else _literal(part)
        for part in value.values
    ]
    return "".join(part for part in parts if part is not None)
