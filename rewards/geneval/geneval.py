"""GenEval as a reward: objects, counts, colors and positions, by any detector and any color classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rewards.base import RewardBatch, RewardOutput, RewardSpec
from rewards.geneval.clauses import CLASSES, COLORS, TAGS, Record, parse
from rewards.geneval.detections import ColorClassifier, Detections, Detector
from rewards.geneval.logic import Found, excluded, flow_grpo_score, judge, kept, soft_score

METRICS = ("official", "strict", "soft", "flow_grpo")


@dataclass(frozen=True, eq=False)
class GenEval:
    """GenEval (2310.11513): does the picture show what the clauses of the prompt's metadata (`clauses.parse`) ask for?

    metric: what becomes the score; all of them are components.
      "soft"       share of what is asked for that is there, in [0, 1]; see logic.soft_score
      "official"   the benchmark's: 1 if every include clause is met by at least as many objects and no exclude clause is, else 0
      "strict"     the same with exact counts
      "flow_grpo"  the score that Flow-GRPO (2505.05470) trains on, not bounded below; see logic.flow_grpo_score

    detector: `rewards.Mask2Former()`, say. The benchmark's is the same model with the weights of mmdet 2; with any other, call the
    results GenEval-like. colors: `rewards.CLIPColors()`, or None: a prompt that asks for a color then has no score. A sample whose
    metadata is no valid record has none either, `info` says why. The benchmark's figure is the mean of six task means (`overall`).
    Not kept: JPEG at quality 75 before detection (reward-server), non-maximum suppression (off in the benchmark)."""

    detector: Detector
    colors: ColorClassifier | None = None
    metric: Literal["soft", "official", "strict", "flow_grpo"] = "soft"
    name: str = "geneval"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"got metric={self.metric!r}; expected one of {METRICS}")

    @property
    def spec(self) -> RewardSpec:
        used = (self.detector.checkpoint, "" if self.colors is None else self.colors.checkpoint)
        checkpoint = "; ".join(filter(None, used))
        return RewardSpec(
            range=(-float("inf"), 1.0) if self.metric == "flow_grpo" else (0.0, 1.0),
            licence="code MIT; weights: see the cards of the checkpoints" if checkpoint else "code MIT; no weights",
            checkpoint=checkpoint,
            memory=("S" if self.colors is None else "M") if checkpoint else "cpu",
        )

    def load(self) -> None:
        self.detector.load()
        if self.colors is not None:
            self.colors.load()

    def close(self) -> None:
        self.detector.close()
        if self.colors is not None:
            self.colors.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        records = [self._record(metadata) for metadata in batch.metadata]
        wanted = [i for i, record in enumerate(records) if isinstance(record, Record)]
        images = batch.pixels()
        answers = self.detector.detect(images[wanted], CLASSES) if wanted else []
        if len(answers) != len(wanted):
            raise ValueError(f"got {len(answers)} answers of the detector; expected {len(wanted)}, one per image")
        found = dict(zip(wanted, answers, strict=True))
        rows: list[dict[str, float]] = []
        info: list[str] = []
        for i, record in enumerate(records):
            if isinstance(record, str):
                rows.append(dict.fromkeys(METRICS, float("nan")))
                info.append(record)
                continue
            row, text = self._judge(record, found[i], images[i])
            rows.append(row)
            info.append(text)
        components = {key: torch.tensor([row[key] for row in rows], dtype=torch.float32) for key in METRICS}
        scores = components[self.metric]
        return RewardOutput(scores, ~scores.isnan(), components, info)

    def _record(self, metadata: dict[str, object]) -> Record | str:
        """The record, or why there is none."""
        try:
            record = parse(metadata)
        except ValueError as error:
            return str(error)
        if self.colors is None and any(clause.color for clause in record.include):
            return "the prompt asks for a color, and GenEval has no color classifier: set `colors`"
        return record

    def _judge(self, record: Record, detections: Detections, image: Tensor) -> tuple[dict[str, float], str]:
        """The score by each metric, and what was found."""
        named = {clause.name for clause in record.include + record.exclude}
        objects = {name: kept(detections, CLASSES.index(name), record.tag) for name in named}
        seen: dict[str, list[str]] = {}

        def colors_of(best: Detections, name: str) -> list[str]:
            assert self.colors is not None
            ask = len(best.boxes) > len(seen.get(name, []))  # a longer list begins with the shorter one
            if ask:
                seen[name] = self.colors.classify(image, best.boxes, best.masks, name, COLORS)
            return seen[name][: len(best.boxes)]

        official = judge(record, objects, colors_of, exact=False)
        exact = judge(record, objects, colors_of, exact=True)
        none_out = excluded(record, objects)
        scores = {
            "official": float(all(each.met for each in official) and all(none_out)),
            "strict": float(all(each.met for each in exact) and all(none_out)),
            "soft": soft_score(exact, none_out),
            "flow_grpo": flow_grpo_score(exact),
        }
        return scores, _told(official, none_out)


def _told(found: list[Found], none_out: list[bool]) -> str:
    """ "dog: 2 of 1; cat: 1 of 1, 0 red, not left of 0"."""
    texts = []
    for each in found:
        clause, text = each.clause, f"{each.clause.name}: {each.count} of {each.clause.count}"
        text += "" if each.colored is None else f", {each.colored} {clause.color}"
        if each.placed is not None:
            text += f", {'' if each.placed else 'not '}{clause.relation} {clause.target}"
        texts.append(text)
    return "; ".join(texts + ["too many of what is excluded"] * (not all(none_out)))


def overall(scores: Sequence[float], tags: Sequence[str]) -> dict[str, float]:
    """Mean score per task of GenEval, and as "overall" the mean of the task means; a ValueError for a tag that is none of its six."""
    unknown = sorted(set(tags) - set(TAGS))
    if unknown or not tags:
        raise ValueError(f"got tags {unknown or 'none'}; expected some of {TAGS}")
    pairs = list(zip(scores, tags, strict=True))
    tasks = {tag: [value for value, own in pairs if own == tag] for tag in TAGS if tag in tags}
    means = {tag: sum(values) / len(values) for tag, values in tasks.items()}
    return means | {"overall": sum(means.values()) / len(means)}
