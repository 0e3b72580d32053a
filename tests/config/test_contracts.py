"""A user's class that does not satisfy a contract is told what is missing or differs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import pytest

from flowalign.config import load_config
from flowalign.config.contracts import check_attributes
from flowalign.errors import ConfigError

TINY = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
COMPLETE = """
from rewards import RewardBatch, RewardOutput, RewardSpec

class Mine:
    name = "mine"
    spec = RewardSpec()
    def __call__(self, batch: RewardBatch) -> RewardOutput: ...
    def load(self) -> None: ...
    def close(self) -> None: ...
"""


class HasName(Protocol):
    @property
    def name(self) -> str: ...


class HasSize(Protocol):
    @property
    def size(self) -> int: ...


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("    def load(self) -> None: ...\n", "", r"it has no method `load\(self\) -> None`"),
        (
            "    def __call__(self, batch: RewardBatch) -> RewardOutput: ...\n",
            "",
            r"it has no method `__call__\(self, batch",
        ),
        (
            "batch: RewardBatch)",
            "batch: RewardBatch, more: int)",
            r"cannot be called as `__call__\(self, batch: RewardBatch",
        ),
        ("batch: RewardBatch)", "samples: RewardBatch)", r"its `__call__\(self, samples.* cannot be called as"),
        ('    name = "mine"\n', "", r"reward=Mine, which has no attribute 'name'.*rewards.base.Reward"),
    ],
)
def test_it_is_told_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, named: str) -> None:
    assert old in COMPLETE
    module = f"mine_{abs(hash((old, new)))}"
    (tmp_path / f"{module}.py").write_text(COMPLETE.replace(old, new))
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=named):
        load_config(TINY, [f"reward={module}.Mine"])


@pytest.mark.parametrize(
    "text",
    [
        COMPLETE,
        "from __future__ import annotations\n" + COMPLETE,
        COMPLETE.replace(": RewardBatch)", ")").replace(" -> None", ""),
    ],
)
def test_a_complete_class_is_taken_however_it_is_annotated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    module = f"complete_{len(text)}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_config(TINY, [f"reward={module}.Mine"])[0].reward.name == "mine"


@pytest.mark.parametrize(
    ("made", "arguments"),
    [
        (COMPLETE.replace("class Mine:", "class Mine(Module):").replace("__call__", "forward"), "{}"),
        (COMPLETE.replace("    def load(self)", "    @staticmethod\n    def load()"), "{}"),
        (
            COMPLETE.replace("class Mine:", "@dataclass\nclass Mine:\n    parts: tuple[Reward, ...]"),
            "{parts: [rewards.JPEGCompressibility]}",
        ),
        (
            COMPLETE.replace(
                "class Mine:", "@dataclass\nclass Mine:\n    _x: 'Unread | None' = field(default=None, init=False)"
            ),
            "{}",
        ),
    ],
)
def test_a_class_that_can_be_called_is_taken_however_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: str, arguments: str
) -> None:
    module = f"made_{len(made)}"
    imports = "from dataclasses import dataclass, field\nfrom torch.nn import Module\nfrom rewards import Reward\n"
    (tmp_path / f"{module}.py").write_text(imports + made)
    monkeypatch.syspath_prepend(tmp_path)
    config, _ = load_config(TINY, [f"reward={{class_path: {module}.Mine, init_args: {arguments}}}"])
    assert config.reward.name == "mine"


def test_a_part_may_be_the_default_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself the configuration parser would turn it into its fields, without its class."""
    credit = """
from dataclasses import dataclass, field
from flowalign.credit import Broadcast, Credit, SubtreeFusion

@dataclass(frozen=True)
class Outer:
    inner: Credit = field(default_factory=lambda: SubtreeFusion(0.5))
    def assign(self, forest, scores, valid, channels):
        return self.inner.assign(forest, scores, valid, channels)
"""
    (tmp_path / "outer_credit.py").write_text(credit)
    monkeypatch.syspath_prepend(tmp_path)
    config, plain = load_config(TINY, ["trainer.signal.credit=outer_credit.Outer"])
    assert config.trainer.signal.credit.inner.beta == 0.5
    inner = plain["trainer"]["init_args"]["signal"]["credit"]["init_args"]["inner"]
    assert inner == {"class_path": "flowalign.credit.SubtreeFusion", "init_args": {"beta": 0.5}}


def test_attributes_are_looked_for_only_where_a_contract_must_hold() -> None:
    """In a union one contract is enough, and of nested containers the members are looked at."""

    @dataclass
    class Named:
        name: str = "n"

    @dataclass
    class Holder:
        either: "HasName | HasSize" = field(default_factory=Named)
        text: "HasSize | str" = "plain"
        made: "Callable[[HasSize], int]" = len
        nested: "dict[str, list[HasName]]" = field(default_factory=lambda: {"a": [Named()]})
        pairs: "tuple[tuple[HasName, ...], ...]" = ((Named(), Named()),)
        none: "HasSize | None" = None

    check_attributes(Holder())
    for name, value in {"either": 3, "nested": {"a": [3]}, "pairs": ((Named(), 3),), "none": Named()}.items():
        with pytest.raises(ValueError, match=rf"got holder\.{name}=\w+, which has no attribute"):
            check_attributes(Holder(**{name: value}), "holder")
