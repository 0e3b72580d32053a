"""What rewards there are: `python -m rewards`, `flowalign rewards` and docs/rewards.md. Loads no model.

The rewards are those of `rewards.__all__`; of each the list tells its spec, with its default arguments or those of EXAMPLES.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rewards
from rewards.base import Reward, RewardSpec, channels_of, spec_of

OF_PARTS, AS_SET = "of parts", "as set"  # in place of what the arguments decide
OWN = "flowalign's own; no weights"

# class -> arguments that construct it without loading anything, for rewards that have no defaults
EXAMPLES: dict[str, Callable[[], dict[str, Any]]] = {
    "Augmented": lambda: {"reward": rewards.ImageStatistics(("contrast",))},
    "Capped": lambda: {"reward": _statistics(), "high": 0.3, "low": 0.0, "soft": True},
    "Channels": lambda: {"rewards": [rewards.JPEGCompressibility(), rewards.ColorAccuracy()]},
    "Ensemble": lambda: {
        "rewards": [rewards.ImageStatistics(("contrast",), "a"), rewards.ImageStatistics(("edges",), "b")],
        "how": "softmin",
    },
    "FunctionReward": lambda: {"path": "my_rewards:score"},
    "Gated": lambda: {
        "reward": rewards.ImageStatistics(("contrast",)), "gate": rewards.JPEGCompressibility(), "threshold": -1.86,
    },
    "GenEval": lambda: {"detector": rewards.Mask2Former(), "colors": rewards.CLIPColors()},
    "GroupDiversity": lambda: {"near": 0.35},
    "InverseDynamics": lambda: {"model": object()},  # a user's own
    "MotionBand": lambda: {"low": 0.1, "high": 0.5},
    "Offloaded": lambda: {"reward": rewards.CLIPScore()},
    "OnCompletion": lambda: {"reward": _statistics()},
    "OnFrames": lambda: {"reward": _statistics(), "frames": "first_last"},
    "Routed": lambda: {
        "key": "axis", "rewards": {"word": rewards.OCR(), "ink": rewards.ColorAccuracy()}, "default": rewards.ColorCloseness(),
    },
    "Standardized": lambda: {"reward": _statistics(), "loc": 0.2, "scale": 0.1},
    **{
        name: lambda: {"endpoint": rewards.ChatEndpoint("http://127.0.0.1:8000/v1", "MODEL")}
        for name in (
            "DeQA", "EditScore", "PARM", "Questions", "QwenVL", "UnifiedReward", "UnifiedWinRate", "WISE",
        )
    },
    **{
        name: lambda: {"templates": str(Path(__file__).with_name("qwen") / "placeholders.py")}
        for name in ("EditReward", "HPSv3", "VideoAlign")
    },
    **{name: lambda: {"reward": _statistics()} for name in ("Http", "InWorker", "WithTimeout")},
    "Mix": lambda: {"rewards": [rewards.JPEGCompressibility(), rewards.OCR()], "weights": [0.1, 1.0]},
}  # fmt: skip


def _statistics() -> Reward:
    """Two channels, a range and gradients: a part whose spec differs from the defaults."""
    return rewards.ImageStatistics(("contrast", "edges"))


Rule = Callable[[type, RewardSpec, bool], bool]


@dataclass(frozen=True)
class Entry:
    """A reward class, and its spec as far as it is known without arguments and without a model.

    name: of the class in `rewards`. kind: its heading. about: the first sentence of its docstring. reads: its inputs. scope:
    with ", groups" if the reward is groupwise. range: None if it is not known; None as a bound is infinite. The others are as
    in RewardSpec. OF_PARTS or AS_SET in place of what the arguments decide."""

    name: str
    kind: str
    about: str
    reads: tuple[str, ...] | str
    scope: str
    range: tuple[float | None, float | None] | str | None
    channels: tuple[str, ...] | str
    differentiable: bool | str
    memory: str
    checkpoint: str
    licence: str


def _settings(cls: type) -> set[str]:
    """The names of its parameters."""
    return set(inspect.signature(cls).parameters)


def _in(package: str) -> Rule:
    return lambda cls, spec, composed: cls.__module__.startswith(f"rewards.{package}")


# heading -> rule; a reward is of the last kind whose rule holds for (class, spec, made of others)
KINDS: dict[str, Rule] = {
    "image, without a network": lambda cls, spec, composed: True,
    "image, by a network": lambda cls, spec, composed: spec.memory != "cpu",
    "video": lambda cls, spec, composed: "videos" in spec.inputs,
    "editing": lambda cls, spec, composed: "conditions" in spec.inputs,
    "objects, counts, colors and places": _in("geneval."),
    "text in the picture": _in("ocr."),
    "judges behind a chat endpoint": _in("judges."),
    "steps of a rollout": lambda cls, spec, composed: spec.scope != "terminal" or "sigma" in _settings(cls),
    "made of other rewards": lambda cls, spec, composed: composed,
    "in another process or at a server": _in("remote."),
}


def reward_classes() -> dict[str, type]:
    """The rewards of `rewards.__all__` by name: its classes with the members of the contract."""
    found = {name: vars(rewards)[name] for name in rewards.__all__}
    return {
        name: cls
        for name, cls in found.items()
        if inspect.isclass(cls) and {"__call__", "load", "close"} <= {*dir(cls)} and not vars(cls).get("_is_protocol")
    }


def entries() -> list[Entry]:
    """All rewards, kind by kind. ValueError for one that cannot be constructed without arguments and has no example."""
    found = [_entry(name, cls) for name, cls in reward_classes().items()]
    return sorted(found, key=lambda entry: list(KINDS).index(entry.kind))


def example(name: str) -> Reward:
    """The reward with its default arguments, or with those of EXAMPLES."""
    try:
        return reward_classes()[name](**EXAMPLES.get(name, dict)())
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"got rewards.{name}, which cannot be constructed ({error}); expected that it can be described: add its arguments "
            "to EXAMPLES in rewards/listing.py"
        ) from error


def _entry(name: str, cls: type) -> Entry:
    reward, settings = example(name), _settings(cls)
    spec, parts = spec_of(reward), _parts(reward)
    bounds = None if spec.range is None else tuple(bound if math.isfinite(bound) else None for bound in spec.range)
    licence = spec.licence or (AS_SET if "scope" in settings else OWN)
    known: dict[str, Any] = {**vars(spec), "range": bounds, "licence": licence}
    known |= dict.fromkeys(settings & known.keys(), AS_SET)
    known |= dict.fromkeys(_of_parts(reward, parts), OF_PARTS)
    return Entry(
        name, [kind for kind, rule in KINDS.items() if rule(cls, spec, bool(parts))][-1], first_sentence(cls),
        reads=known["inputs"], scope=known["scope"] + ", groups" * spec.groupwise, range=known["range"],
        channels=known["channels"], differentiable=known["differentiable"], memory=known["memory"],
        checkpoint=known["checkpoint"], licence=known["licence"],
    )  # fmt: skip


def _of_parts(reward: Reward, parts: Sequence[Reward]) -> list[str]:
    """The fields of its spec that are those of its parts; none without parts."""
    if not parts:
        return []
    spec, specs = spec_of(reward), [spec_of(part) for part in parts]
    same = {
        "inputs": all(each.inputs == spec.inputs for each in specs),
        "scope": all(each.scope == spec.scope for each in specs),
        "range": spec.range is not None,
        "channels": set(channels_of(reward)) <= {channel for part in parts for channel in channels_of(part)},
        "differentiable": spec.differentiable in (specs[0].differentiable, all(each.differentiable for each in specs)),
        "memory": True, "checkpoint": True, "licence": True,
    }  # fmt: skip
    return [field for field, is_same in same.items() if is_same]


def _parts(reward: Reward) -> list[Reward]:
    """The rewards that it is made of."""
    kept = vars(reward)
    several = kept.get("rewards", [])
    several = several.values() if isinstance(several, dict) else several
    return [*several, *(kept[name] for name in ("reward", "gate", "default") if kept.get(name) is not None)]


def first_sentence(cls: type) -> str:
    """The first sentence of its docstring."""
    paragraph = " ".join((cls.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.]) (?=[A-Zθσ`(])", paragraph)[0].rstrip(":")


def cells(entry: Entry) -> dict[str, str]:
    """An entry as texts, by column of a table."""
    gradient = entry.differentiable
    return {
        "reward": entry.name,
        "reads": _joined(entry.reads) or "prompts",
        "scope": entry.scope,
        "range": _interval(entry.range),
        "channels": _joined(entry.channels) or "1",
        "gradient": gradient if isinstance(gradient, str) else "yes" if gradient else "no",
        "memory": entry.memory,
        "checkpoint": entry.checkpoint or "–",
        "licence": entry.licence,
    }


def _joined(names: tuple[str, ...] | str) -> str:
    return names if isinstance(names, str) else ", ".join(names)


def _interval(bounds: tuple[float | None, float | None] | str | None) -> str:
    if bounds is None or isinstance(bounds, str):
        return bounds or "any"
    low, high = bounds
    return f"{'(-inf' if low is None else f'[{low:g}'}, {'inf)' if high is None else f'{high:g}]'}"


def named(names: Sequence[str]) -> list[Entry]:
    """The entries of the rewards `names`, in any case, with or without `rewards.`; of no names: all. ValueError with near matches
    for a name that is not there."""
    known = {entry.name.lower(): entry for entry in entries()}
    asked = [name.lower().removeprefix("rewards.") for name in names]
    for name, key in zip(names, asked, strict=True):
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {', '.join(known[each].name for each in close)}? " if close else ""
            raise ValueError(
                f"got the reward {name!r}; expected a class of rewards: {hint}without a name all are listed"
            )
    return [known[key] for key in asked] or list(known.values())
