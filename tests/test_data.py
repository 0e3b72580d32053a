"""Prompt files as people save them: what is read, and what a message must say of what cannot be."""

from pathlib import Path

import pytest

from flowalign.data import PromptRecord, digest, load_prompts


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
        ("a.jsonl", b'{"prompt": "a"}\n[1]\n', r"a\.jsonl, line 2: got list; expected a JSON object"),
        ("a.jsonl", b'{"prompt": "a"}\n{"text": "b"}\n', r"a\.jsonl, prompt 2: got .*; expected a non-empty text"),
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
    assert one.images == (tmp_path / "a.png",) and one.metadata == {"kind": 1} and one.negative_prompt is None
    assert two.images == (tmp_path / "a.png", tmp_path / "b.png") and two.metadata == {} and two.negative_prompt == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "image": "no.png"}', r"prompt 1: image .*no\.png does not exist"),
        ('{"prompt": "a", "image": 3}', r"got images \[3\]; expected a path"),
        ('{"prompt": "a", "images": "a.png"}', "list of paths under 'images'"),
        ('{"prompt": "a", "image": "a.png", "images": []}', "expected one of them"),
        ('{"prompt": "a", "negative_prompt": 1}', "negative_prompt=1; expected a text"),
    ],
)
def test_bad_images_and_negative_prompts(line, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_prompts(str(tmp_path / "a.jsonl"))


def test_the_digest_of_text_prompts_is_that_of_earlier_versions():
    assert digest([PromptRecord(0, "a", {"k": 1})]).startswith("d5b6f1fd8572")
