"""GenEval's rules on given detections: what counts as found, as colored and as placed, and four scores of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.geneval.clauses import Clause, Record
from rewards.geneval.detections import Detections

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidence above which an object counts; the second for the tag "counting"
MAX_OBJECTS = 16  # of a class, the most confident ones
MARGIN = 0.1  # of the sizes of two objects, by which their offset is shortened before it says a direction

ColorsOf = Callable[[Detections, str], list[str]]  # objects and their class -> their colors


@dataclass(frozen=True)
class Found:
    """What was found for a clause to include. count: objects of its class. colored: those of the right color among the most
    confident `clause.count`, None if no color was looked at. placed: whether they all stand in the relation to all objects of the
    target, None if that was not looked at. met: whether the clause is. objects: the most confident ones, for later clauses."""

    clause: Clause
    count: int
    colored: int | None
    placed: bool | None
    met: bool
    objects: Detections


def kept(found: Detections, label: int, tag: str) -> Detections:
    """The objects of a class that count, most confident first."""
    limit = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    mine = ((found.labels == label) & (found.scores > limit)).nonzero().flatten()
    return _rows(found, mine[found.scores[mine].argsort(descending=True, stable=True)][:MAX_OBJECTS])


def judge(record: Record, objects: dict[str, Detections], colors_of: ColorsOf, *, exact: bool) -> list[Found]:
    """Each include clause on the objects by class. exact: a count is met by equality (reward-server's strict rule), else by
    at least as many (GenEval's). Color and position are looked at on the most confident `count` objects, the position only if
    the rest of the clause is met; a position whose target clause is not met is not either."""
    found: list[Found] = []
    for clause in record.include:
        mine = objects[clause.name]
        count = len(mine.boxes)
        met = count == clause.count if exact else count >= clause.count
        best = _rows(mine, torch.arange(min(count, clause.count)))
        colored, placed = None, None
        if met and clause.color is not None:
            colored = colors_of(best, clause.name).count(clause.color)
            met = colored == clause.count
        if met and clause.relation is not None:
            target = found[clause.target]
            placed = target.met and _all_stand(clause.relation, best.boxes, target.objects.boxes)
            met = placed
        found.append(Found(clause, count, colored, placed, met, best))
    return found


def excluded(record: Record, objects: dict[str, Detections]) -> list[bool]:
    """Whether each exclude clause is kept: fewer objects than it counts."""
    return [len(objects[clause.name].boxes) < clause.count for clause in record.exclude]


def soft_score(found: list[Found], kept_out: list[bool]) -> float:
    """In [0, 1], of exact findings: the mean over all that is asked for. A count scores max(0, 1 − |asked − found|/asked); a color the
    share of objects that have it, a position 1 or 0, both 0 where they could not be looked at; an exclude clause 1 or 0."""
    terms = [float(term) for term in kept_out]
    for each in found:
        asked = each.clause.count
        terms.append(max(0.0, 1 - abs(asked - each.count) / asked))
        if each.clause.color is not None:
            terms.append((each.colored or 0) / asked)
        if each.clause.relation is not None:
            terms.append(float(bool(each.placed)))
    return sum(terms) / len(terms)


def flow_grpo_score(found: list[Found]) -> float:
    """yifan123/reward-server's `score` of exact findings, which Flow-GRPO trains on, at most 1, with no lower bound but that of 16
    objects (asked for 1, found 5: −3). Against `soft_score`: counts are not clipped; a clause with a wrong count has one 0 for color and
    position together; a position is not looked at where the color is wrong; a position that is not met has a 0 and a 1, unless
    its target is not met; exclude is ignored."""
    terms: list[float] = []
    targets = [each.met for each in found]
    for each in found:
        asked, wants = each.clause.count, (each.clause.color, each.clause.relation)
        terms.append(1 - abs(asked - each.count) / asked)
        if each.count != asked:
            terms += [0.0] if wants != (None, None) else []
            continue
        if each.colored is not None:
            terms.append(each.colored / asked)
        if each.placed is not None:
            terms += [] if each.placed else [0.0]
            terms += [1.0] if targets[each.clause.target] else []
    return sum(terms) / len(terms)


def relations(a: Tensor, b: Tensor) -> set[str]:
    """Where box a [4] is, seen from box b [4]: the offset of its center, shortened on each axis by MARGIN times the sum of both sizes,
    over the length of the whole offset, is beyond ½ in that direction; up to two directions, or none."""
    offset = (a[:2] + a[2:] - b[:2] - b[2:]).double() / 2
    sizes = (a[2:] - a[:2] + b[2:] - b[:2]).double()
    shortened = (offset.abs() - MARGIN * sizes).clamp(min=0) * offset.sign()
    if not bool((shortened.abs() >= 1e-3).any()):
        return set()
    dx, dy = (shortened / offset.norm()).tolist()
    seen = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}  # y counts downwards
    return {name for name, true in seen.items() if true}


def _all_stand(relation: str, boxes: Tensor, targets: Tensor) -> bool:
    return all(relation in relations(box, target) for box in boxes for target in targets)


def _rows(found: Detections, rows: Tensor | Sequence[int]) -> Detections:
    masks = None if found.masks is None else found.masks[rows]
    return Detections(found.boxes[rows], found.scores[rows], found.labels[rows], masks)
