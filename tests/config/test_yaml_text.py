"""YAML that cannot be a configuration ends soon, in a sentence that names the file and the line."""

import time
from pathlib import Path

import pytest
import yaml

from flowalign.config import load_config
from flowalign.config.yaml_text import MAX_NODES, compose
from flowalign.errors import ConfigError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (BOMB, rf"line \d+: more than {MAX_NODES:,} values with every alias written out"),
        ("run: &r\n  name: a\n  again: *r\n", r"line \d: an alias that contains itself"),
        ("run: &r [1, *r]\n", r"line 1: an alias that contains itself"),
        ("run: " + "[" * 60 + "]" * 60, "line 1: nested too deeply; expected at most 50"),
        ("run: " + "[" * 500_000, "nested too deeply"),
        ("- " * 50_000, "nested too deeply"),
        ("run: " + "{a: " * 60 + "1" + "}" * 60, "line 1: nested too deeply"),
        ("run: !!python/object/apply:os.system [ls]\n", "line 1: got run with the tag 'python/object/apply:os.system'"),
        ("run: !mine {name: a}\n", "line 1: got run with the tag '!mine'; expected plain YAML"),
        ("run: {name: a}\nreward: !!binary aGVsbG8=\n", "line 2: got reward with the tag 'binary'"),
        ("run:\n  1.5: a\n", 'line 2: the key 1.5 is no text; write it in quotes, "1.5"'),
        ("run: {name: a}\non: 3\n", 'line 2: the key on is no text; write it in quotes, "on"'),
        ("? [a, b]\n: 3\n", "line 1: the key of several values is no text"),
        ("run: {null: 3}\n", "line 1: the key null is no text"),
        ("run: {name: *nowhere}\n", "not valid YAML: found undefined alias"),
        ("run: {name: a}\n---\nrun: {name: b}\n", "not valid YAML: expected a single document"),
        ("run:\n\tname: a\n", "not valid YAML"),
        ("run: {name: a\x00}\n", "not valid YAML"),
        ("", "expected sections such as run, policy, rollout; got nothing"),
        ("# only a comment\n", "got nothing"),
        ("3", "got a single value"),
        ("x: " + "y" * 2**20, "more than 1,048,576 bytes"),
        ("run: {<<: 3, name: a}\n", "not valid YAML"),
    ],
)
def test_it_is_named_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"c\.yaml.*{said}"):
        load_config(str(tmp_path / "c.yaml"))
    assert time.monotonic() - began < 5


def test_a_byte_order_mark_aliases_and_merge_keys_are_read(tmp_path: Path) -> None:
    text = "base: &b {groups: 2, group_size: 4}\nrollout: {<<: *b, group_size: 8}\n"
    node = compose(text, "c.yaml")
    assert node is not None
    assert yaml.safe_load(yaml.serialize(node))["rollout"] == {"groups": 2, "group_size": 8}
    file = tmp_path / "c.yaml"
    file.write_bytes(b"\xef\xbb\xbfrolout: {groups: 2}\n")
    with pytest.raises(ConfigError, match=r"unknown key 'rolout': did you mean 'rollout'\?.*c\.yaml, line 1"):
        load_config(str(file))


def test_a_folder_is_not_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder .*expected a YAML file"):
        load_config(str(tmp_path))
