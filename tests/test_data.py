"""Prompt files as people save them: what is read, and what a message must say of what cannot be."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flowalign.config import load_config
from flowalign.data import PromptRecord, as_records, digest, load_prompts, source_images
from flowalign.errors import ConfigError
from flowalign.media import source_image
from flowalign.run.preflight import Prompts

TINY = str(Path(__file__).parent / "data" / "tiny.yaml")


def prompts(path: Path, content: bytes) -> list[str]:
    path.write_bytes(content)
    return [record.prompt for record in load_prompts(str(path))]


def test_byte_order_mark_windows_lines_blank_lines_and_repeats(tmp_path: Path) -> None:
    assert prompts(tmp_path / "a.txt", "\ufeffa cat\r\n\r\n a dog \r\na cat".encode()) == ["a cat", "a dog", "a cat"]
    assert prompts(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"prompt": "a cat"}\r\n') == ["a cat"]


def test_a_line_ends_at_a_newline_alone(tmp_path: Path) -> None:
    """str.splitlines would cut JSON texts at U+2028, which JSON allows inside a text."""
    assert prompts(tmp_path / "a.jsonl", '{"prompt": "a\u2028b"}\n'.encode()) == ["a\u2028b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no prompts"),
        ("a.txt", "café".encode("latin-1"), r"a\.txt is not UTF-8.*save it as UTF-8"),
        ("a.jsonl", b'{"prompt": "a"}\n\n\n{broken\n', r"a\.jsonl, line 4: not JSON"),
        ("a.txt", b" \n\t\n", "holds no prompts"),
        ("a.txt", b"a cat\na\x00dog\n", r"a\.txt, line 2: got the control character U\+0000 in .*; expected text"),
        ("a.txt", b"\x1b[31mred", r"line 1: got the control character U\+001B"),
        ("a.txt", b"word " * 9999, r"a\.txt, line 1: got a text of 49,994 characters, .*expected at most 10,000"),
        ("a.jsonl", b'{"prompt": "a", "n": NaN}', r"a\.jsonl, line 1: not JSON \(NaN is no JSON number\)"),
        ("a.jsonl", b'{"prompt": "a", "n": ' + b"9" * 9999 + b"}", r"a\.jsonl, line 1: not JSON"),
        ("a.jsonl", b"[" * 99_999, r"a\.jsonl, line 1: not JSON \(maximum recursion"),
        ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', r"line 1: not JSON \(the key 'prompt' stands there twice"),
        ("a.jsonl", b'{"prompt": "a \\ud800"}', r"line 1: got the control character U\+D800"),
        ("a.jsonl", b'{"prompt": 3}', r"line 1: got \{'prompt': 3\}; expected a non-empty text"),
        ("a.jsonl", b'{"prompt": "a", "negative_prompt": "\\u0000"}', r"line 1: got the control character U\+0000"),
        ("a.jsonl", b'{"text": "' + b"x" * 9999 + b'"}', r"line 1: got .{100,200}…; expected a non-empty text"),
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', r"a\.jsonl, line 2: got list; expected a JSON object"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', r"a\.jsonl, line 2: got .*; expected a non-empty text"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompts(tmp_path / name, content)


@pytest.mark.parametrize(
    "source", ["flowalign.glyphs:PIPELINE", "os:getcwd", "os:getpid", ":x", ".x:y", "a b:c", "os:"]
)
def test_a_bad_function_is_named(source: str) -> None:
    with pytest.raises(ValueError, match=f"prompt source {source!r}"):
        load_prompts(source)


def test_a_line_may_name_source_images_and_a_negative_prompt(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "edits.jsonl").write_text(
        '{"prompt": "a", "image": "a.png", "kind": 1}\n{"prompt": "b", "images": ["a.png", "b.png"], "negative_prompt": ""}\n'
    )
    one, two = load_prompts(str(tmp_path / "edits.jsonl"))
    assert (
        one.images == (source_image(tmp_path / "a.png"),)
        and one.metadata == {"kind": 1}
        and one.negative_prompt is None
    )
    assert (
        two.images == tuple(source_image(tmp_path / name) for name in ("a.png", "b.png"))
        and two.metadata == {}
        and two.negative_prompt == ""
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "image": "no.png"}', r"line 1: image .*no\.png does not exist"),
        ('{"prompt": "a", "image": 3}', r"got images \[3\]; expected a path"),
        ('{"prompt": "a", "images": "a.png"}', "list of paths under 'images'"),
        ('{"prompt": "a", "image": "a.png", "images": []}', "expected one of them"),
        ('{"prompt": "a", "video": "a.mp4"}', "got 'video'='a.mp4'; expected none: no model here reads a source clip"),
        ('{"prompt": "a", "negative_prompt": 1}', "negative_prompt=1; expected a text"),
    ],
)
def test_bad_images_and_negative_prompts(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_prompts(str(tmp_path / "a.jsonl"))


def test_the_digest_of_text_prompts_is_that_of_earlier_versions():
    assert digest([PromptRecord(0, "a", {"k": 1})]).startswith("d5b6f1fd8572")


def test_a_folder_is_no_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(FileNotFoundError, match=r"a\.txt is a folder .*; expected a file with a prompt a line"):
        load_prompts(str(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(): return 1 / 0", "ZeroDivisionError: division by zero; expected a function"),
        ("def f(): raise SystemExit(3)", "SystemExit: 3; expected a function"),
        ("def f(): return [3]", "TypeError: .*; expected a function .* that returns texts, or objects"),
        ("import sys; sys.exit(4)", r"cannot import 'prompts_\d+' \(SystemExit: 4\)"),
        ("def f(:", r"cannot import 'prompts_\d+' \(SyntaxError"),
    ],
)
def test_a_function_that_fails_is_named(body: str, message: str, tmp_path: Path, monkeypatch) -> None:
    name = f"prompts_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=f"prompt source '{name}:f': {message}"):
        load_prompts(f"{name}:f")


def test_a_function_may_return_texts(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "plain_texts.py").write_text("def f(): return ['a cat', {'prompt': 'a dog', 'kind': 1}]")
    monkeypatch.syspath_prepend(tmp_path)
    assert [(record.prompt, record.metadata) for record in load_prompts("plain_texts:f")] == [
        ("a cat", {}), ("a dog", {"kind": 1}),
    ]  # fmt: skip


def png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    "content", [b"", b"no image", png()[:900], png()[:20]], ids=["empty", "text", "cut", "header cut"]
)
def test_a_broken_source_image_is_named_before_a_run(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "bad.png").write_bytes(content)
    (tmp_path / "edits.jsonl").write_text('{"prompt": "a", "image": "good.png"}\n{"prompt": "b", "image": "bad.png"}')
    source = str(tmp_path / "edits.jsonl")
    with pytest.raises(ValueError, match=rf"the image {tmp_path}/bad\.png, which cannot be read .*; expected a whole"):
        source_images(load_prompts(source))
    config = replace(load_config(TINY)[0], prompts=source)
    with pytest.raises(ConfigError, match=r"bad\.png, which cannot be read"):
        Prompts.of(config)


def test_images_of_a_call_are_one_for_all_or_one_or_several_for_each(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (4, 2), color) for color in ("red", "blue"))
    red.save(tmp_path / "red.png")

    def colors(prompts: str | list[str], images: object) -> list[list[tuple[int, ...]]]:
        records = as_records(prompts, images)  # type: ignore[arg-type]
        return [[image.open().getpixel((0, 0)) for image in record.images] for record in records]

    r, b = (255, 0, 0), (0, 0, 255)
    assert colors("a", red) == colors("a", str(tmp_path / "red.png")) == colors("a", [tmp_path / "red.png"]) == [[r]]
    assert colors("a", [red, blue]) == colors("a", [[red, blue]]) == [[r, b]]
    assert colors(["a", "b"], blue) == [[b], [b]] and colors(["a", "b"], [red, blue]) == [[r], [b]]
    assert colors(["a", "b"], [[red, blue], blue]) == [[r, b], [b]]
    with pytest.raises(ValueError, match="got 3 images for 2 prompts; expected one for all"):
        as_records(["a", "b"], [red] * 3)
    with pytest.raises(ValueError, match="'a', which has source images of its own"):
        as_records(as_records("a", red), blue)
    with pytest.raises(FileNotFoundError, match=r"no.png does not exist"):
        as_records("a", tmp_path / "no.png")
