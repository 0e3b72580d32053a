"""What is wrong with a page that has to be one file, valid, and usable without eyes or mouse."""

import base64
import hashlib
import re
from html.parser import HTMLParser

VOID = {"meta", "img", "input", "br", "hr", "link"}
NAMED = {"button", "select", "textarea", "progress", "input"}


class Reader(HTMLParser):
    """Reads a page; `problems` are sentences. A control is named by its text, a label around it, or aria-label."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.unnamed: str | None = None  # a button without text so far
        self.headings: list[int] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        for name in ("src", "href", "data", "poster"):
            if name in given and not str(given[name]).startswith(("data:", "#")):
                self.problems.append(f"<{tag}> loads {given[name]}")
        self.problems += [f"<{tag}> has {name}" for name in given if name == "style" or name.startswith("on")]
        self.ids += [str(given["id"])] if "id" in given else []
        self.refers += str(given.get("aria-labelledby", "")).split()
        if str(given.get("href", "")).startswith("#"):
            self.refers.append(str(given["href"])[1:])
        if (tag == "img" and not given.get("alt")) or (tag == "video" and not given.get("aria-label")):
            self.problems.append(f"<{tag}> has no text in its place")
        if tag in NAMED - {"button"} and "label" not in self.open and not given.get("aria-label"):
            self.problems.append(f"<{tag} {given}> has no name")
        if tag == "button":
            self.unnamed = None if given.get("aria-label") else str(given)
        if tag in ("h1", "h2", "h3"):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")
        if tag == "button" and self.unnamed:
            self.problems.append(f"<button {self.unnamed}> has no name")

    def handle_data(self, text: str) -> None:
        if text.strip():
            self.unnamed = None


def problems(page: str) -> list[str]:
    reader = Reader()
    reader.feed(page)
    found = [*reader.problems, *(f"<{tag}> is not closed" for tag in reader.open)]
    found += [f"id {each} twice" for each in {name for name in reader.ids if reader.ids.count(name) > 1}]
    found += [f"nothing has the id {name}" for name in reader.refers if name not in reader.ids]
    if reader.headings.count(1) != 1 or any(
        b > a + 1 for a, b in zip(reader.headings, reader.headings[1:], strict=False)
    ):
        found.append(f"headings {reader.headings}")
    found += [f"{word} loads" for word in ("url(", "@import", "fetch(", "XMLHttpRequest", "import(") if word in page]
    return found + _policy(page)


def _policy(page: str) -> list[str]:
    """The Content-Security-Policy lets in what the page holds, by its hash, and nothing else."""
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    if found is None:
        return ["no policy"]
    parts = dict(part.strip().split(" ", 1) for part in found.group(1).replace("&#39;", "'").split(";"))
    expected = {
        "default-src": "'none'",
        "img-src": "data:",
        "media-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        if len(texts) != 1:
            return [f"{len(texts)} <{tag}>"]
        expected[name] = f"'sha256-{base64.b64encode(hashlib.sha256(texts[0].encode()).digest()).decode()}'"
    return [] if parts == expected else [f"policy {parts}; expected {expected}"]
