"""GenEval's records: what a picture has to show, and must not, clause by clause; the 80 classes and ten colors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# COCO in the order of detectors, with GenEval's three renames: computer mouse, tv remote, computer keyboard
CLASSES = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,bird,cat,dog,
    horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,
    baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,
    orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,
    computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,
    toothbrush""".replace("\n    ", "").split(",")
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(frozen=True)
class Clause:
    """`count` objects of a class; of a color, and in a relation to the objects of an earlier include clause, if it says so."""

    name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int = -1


@dataclass(frozen=True)
class Record:
    """All clauses of a prompt: each of `include` has to be met, none of `exclude` (as many objects as it counts, or more)."""

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def parse(metadata: dict[str, Any], classes: tuple[str, ...] = CLASSES) -> Record:
    """A record of GenEval's jsonl: {"tag", "include": [{"class", "count", "color"?, "position"?: [relation, number of an earlier
    clause]}], "exclude"?: [{"class", "count"}]}; other keys are ignored. ValueError says what is wrong with it."""
    tag, include, exclude = (
        metadata.get(key, default) for key, default in (("tag", ""), ("include", []), ("exclude", []))
    )
    if not isinstance(tag, str) or not isinstance(include, list) or not isinstance(exclude, list) or not include:
        raise ValueError(
            f"got metadata with tag {tag!r}, include {include!r}, exclude {exclude!r}; expected GenEval's record: a tag, a list of "
            "at least one clause to include, and perhaps one of clauses to exclude"
        )
    record = Record(
        tag,
        tuple(_clause(clause, number, classes) for number, clause in enumerate(include)),
        tuple(_clause(clause, 0, classes) for clause in exclude),
    )
    if any(clause.color or clause.relation for clause in record.exclude):
        raise ValueError(f"got exclude {exclude!r}; expected a class and a count only")
    return record


def _clause(clause: Any, number: int, classes: tuple[str, ...]) -> Clause:
    """The clause with that number among those to include."""
    known = {"class", "count", "color", "position"}
    if not isinstance(clause, dict) or not {"class", "count"} <= set(clause) <= known:
        raise ValueError(
            f"got the clause {clause!r}; expected a mapping of class, count and perhaps color and position"
        )
    name, count, color, position = (clause.get(key) for key in ("class", "count", "color", "position"))
    if name not in classes:
        raise ValueError(f"got the class {name!r}; expected one of the detector's: {', '.join(classes)}")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"got the count {count!r} of {name!r}; expected an integer of at least 1")
    if color is not None and color not in COLORS:
        raise ValueError(f"got the color {color!r} of {name!r}; expected one of {COLORS}")
    if position is None:
        return Clause(name, count, color)
    if not isinstance(position, list | tuple) or len(position) != 2 or position[0] not in RELATIONS:
        raise ValueError(
            f"got the position {position!r} of {name!r}; expected [one of {RELATIONS}, number of a clause]"
        )
    relation, target = position
    if not isinstance(target, int) or not 0 <= target < number:
        raise ValueError(f"got the position {position!r} in clause {number}; expected the number of an earlier clause")
    return Clause(name, count, color, relation, target)
