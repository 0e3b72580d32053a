"""Configuration files that are no YAML, no mapping, or more than they seem."""

from __future__ import annotations

from pathlib import Path

from tests.campaign.case import Case

TRAIN = ("train", "bad.yaml")
OVER = ("train", "tiny.yaml", "bad.yaml")


def alone(name: str, content: str | bytes, says: str = r"bad\.yaml") -> Case:
    return Case(name, files={"bad.yaml": content}, arguments=TRAIN, says=says, seconds=20)


def over(name: str, content: str | bytes, says: str = "", *, fine: bool = False) -> Case:
    """A layer over tiny.yaml."""
    return Case(name, files={"bad.yaml": content}, arguments=OVER, says=says, fine=fine, seconds=20)


def is_folder(folder: Path) -> None:
    (folder / "bad.yaml").mkdir()


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(9)
)
MERGES = "x0: &x0 {k: 1}\n" + "".join(f"x{n}: &x{n} {{<<: [*x{n - 1}, *x{n - 1}], k{n}: 1}}\n" for n in range(1, 30))

CASES = [
    alone("empty", ""),
    alone("only a comment", "# nothing\n"),
    alone("a list", "- run\n- policy\n"),
    alone("a text", "just words\n"),
    alone("a number", "42\n"),
    alone("null", "null\n"),
    alone("a tab", "run:\n\tname: x\n"),
    alone("an open bracket", "run: {name: x\n"),
    alone("an open quote", "run: {name: 'x}\n"),
    alone("a bad indent", "run:\n  name: x\n seed: 1\n"),
    alone("two documents", "run: {name: x}\n---\nrun: {name: y}\n"),
    alone("binary", bytes(range(256))),
    alone("utf-16", "run: {name: x}".encode("utf-16-le")),
    alone("latin-1", "run: {name: \xe4}".encode("latin-1")),
    alone("a NUL", "run: {name: \0}"),
    alone("a PNG", b"\x89PNG\r\n\x1a\n" + bytes(64)),
    alone("JSON cut short", '{"run": {"name": "x"'),
    alone("an unknown anchor", "run: *nothing\n"),
    alone("a python object", "run: !!python/object/apply:os.system ['touch hacked']\n"),
    alone("a python name", "run: !!python/name:os.system\n"),
    alone("an own tag", "run: !mine {name: x}\n"),
    alone("binary tag", "run: !!binary |\n  R0lG\n", "run"),
    alone("a set", "run: !!set {name, seed}\n", "run"),
    alone("alias bomb", BOMB, "alias|node|large|expand"),
    alone("merge bomb", MERGES, "alias|node|large|expand|unknown key"),
    alone("a loop of aliases", "run: &r {name: x, again: *r}\n", "alias|itself|recurs|again"),
    alone("a list in itself", "run: &r [*r]\n", "alias|itself|recurs|run"),
    alone("deep brackets", "run: " + "[" * 5000 + "]" * 5000, "deep|nest|recurs"),
    alone("deep mappings", "run: " + "{a: " * 3000 + "1" + "}" * 3000, "deep|nest|recurs|unknown|a"),
    alone("a key twice", "run: {name: x}\nrun: {name: y}\n", "given twice"),
    alone("a nested key twice", "run: {name: x, name: y}\n", "given twice"),
    alone("a list as key", "? [a, b]\n: 1\n", "key"),
    alone("a mapping as key", "? {a: b}\n: 1\n", "key"),
    alone("a number as key", "1: {name: x}\n", "key"),
    alone("a null key", "~: {name: x}\n", "key"),
    alone("a boolean key", "on: {name: x}\n", "key"),
    Case("a folder", arguments=TRAIN, damage=is_folder, says=r"bad\.yaml"),
    Case("not there", arguments=TRAIN, says=r"bad\.yaml.*does not exist"),
    alone("only run", "run: {name: x}\n", "required|prompts|missing"),
    over("run is a list", "run: [1, 2]\n", "run"),
    over("run is a text", "run: fast\n", "run"),
    over("run is null", "run: null\n", "run"),
    over("policy is null", "policy: null\n", "policy"),
    over("policy is a number", "policy: 7\n", "policy"),
    over("rollout is null", "rollout: null\n", "rollout"),
    over("trainer is null", "trainer: null\n", "trainer"),
    over("trainer is a list", "trainer: []\n", "trainer"),
    over("reward is null", "reward: null\n", "reward"),
    over("reward is a list", "reward: [rewards.JPEGCompressibility]\n", "reward"),
    over("evaluation is null", "evaluation: null\n", "evaluation"),
    over("prompts is null", "prompts: null\n", "prompts"),
    over("prompts is a mapping", "prompts: {a: b}\n", "prompts"),
    over("class_path is a list", "reward: {class_path: [a]}\n", "reward|class_path"),
    over("class_path is null", "reward: {class_path: null}\n", "reward|class_path"),
    over(
        "init_args is a list", "reward: {class_path: rewards.JPEGCompressibility, init_args: [1]}\n", "reward|init_args"
    ),
    over(
        "init_args is a text",
        "reward: {class_path: rewards.JPEGCompressibility, init_args: fast}\n",
        "reward|init_args",
    ),
    over("a sexagesimal", "run: {iterations: 1:30}\n", "run.iterations"),
    over("a date", "run: {name: 2026-11-24}\n", fine=True),
    over("a huge integer", "run: {iterations: 1" + "0" * 400 + "}\n", "run.iterations"),
    over("5000 digits", "run: {iterations: " + "9" * 5000 + "}\n", "iterations|digits|number"),
    over("a windows file with its mark", "\ufeffrun: {seed: 3}\r\n", fine=True),
    over("aliases and merges", "evaluation: &e {count: 2}\n", fine=True),
]
