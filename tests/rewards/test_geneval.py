"""GenEval on detections made by hand: every clause, three rules and flow_grpo's score, records that are none, batch laws."""

import math

import pytest
import torch

from rewards import Detections, GenEval, RewardBatch, RewardError, score
from rewards.geneval import overall
from rewards.geneval.clauses import CLASSES, COLORS, Clause, Record, parse
from rewards.geneval.logic import relations
from tests.helpers.reward_parts import in_parts

NAN = math.nan


def thing(name, x=0.0, y=0.0, size=2.0, score=0.95):
    """An object: class, center, side, confidence."""
    return name, (x - size / 2 + 50, y - size / 2 + 50, x + size / 2 + 50, y + size / 2 + 50), score


def detections(*things):
    return Detections(
        torch.tensor([box for _, box, _ in things]).reshape(-1, 4),
        torch.tensor([confidence for *_, confidence in things]),
        torch.tensor([CLASSES.index(name) for name, *_ in things], dtype=torch.long),
    )


class Table:
    """A detector that finds, in the image of shade k, the things of row k."""

    checkpoint = ""

    def __init__(self, *rows):
        self.rows = rows

    def detect(self, images, classes):
        assert images.dtype == torch.uint8 and tuple(classes) == CLASSES
        return [detections(*self.rows[image[0, 0, 0]]) for image in images]

    def load(self): ...

    def close(self): ...


class Painted:
    """A color classifier that knows a box by its left side."""

    checkpoint = ""

    def __init__(self, colors):
        self.colors, self.asked = colors, []

    def classify(self, image, boxes, masks, name, colors):
        assert tuple(colors) == COLORS and masks is None
        self.asked.append((name, len(boxes)))
        return [self.colors[round(box[0].item() - 49)] for box in boxes]

    def load(self): ...

    def close(self): ...


def batch(records, shades=None):
    shades = list(range(len(records))) if shades is None else shades
    images = torch.tensor(shades, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    return RewardBatch(prompts=["p"] * len(records), images=images, metadata=records)


def judged(things, include, exclude=(), tag="two_object", colors=None):
    """(official, strict, soft, flow_grpo) of one picture."""
    reward = GenEval(Table(things), None if colors is None else Painted(colors))
    output = score(reward, batch([{"tag": tag, "include": include, "exclude": list(exclude)}]))
    return [output.components[key].item() for key in ("official", "strict", "soft", "flow_grpo")]


DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
COUNTING = {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}], "tag": "counting"}
RED_DOG = {"class": "dog", "count": 1, "color": "red"}
LEFT = {"class": "dog", "count": 1, "position": ["left of", 0]}


@pytest.mark.parametrize(
    ("things", "clauses", "expected"),
    [
        ([thing("dog")], {"include": [DOG]}, [1, 1, 1, 1]),
        ([], {"include": [DOG]}, [0, 0, 0, 0]),
        ([thing("dog", score=0.3)], {"include": [DOG]}, [0, 0, 0, 0]),  # has to be above the threshold
        ([thing("dog", score=0.31)], {"include": [DOG]}, [1, 1, 1, 1]),
        ([thing("dog")] * 2, {"include": [DOG]}, [1, 0, 0, 0]),  # official: at least; else exactly
        ([thing("dog")] * 5, {"include": [DOG]}, [1, 0, 0, -3]),
        ([thing("dog")], {"include": [DOG, CAT]}, [0, 0, 0.5, 0.5]),
        ([thing("dog"), thing("cat")], {"include": [DOG, CAT]}, [1, 1, 1, 1]),
        ([thing("dog")] * 2, COUNTING, [1, 1, 1, 1]),
        ([thing("dog")] * 3, COUNTING, [0, 0, 0.25, 0.5]),  # the count scores 1/2, the exclusion 0
        ([thing("dog")], COUNTING, [0, 0, 0.75, 0.5]),
        ([thing("dog", score=0.89)] * 2, COUNTING, [0, 0, 0.5, 0]),  # counting asks for 0.9
        ([thing("dog"), thing("cat")], {"include": [DOG], "exclude": [CAT]}, [0, 0, 0.5, 1]),  # flow_grpo ignores it
    ],
)
def test_counts(things, clauses, expected):
    assert judged(things, **clauses) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("things", "clause", "expected"),
    [
        ([thing("dog", 0)], RED_DOG, [1, 1, 1, 1]),
        ([thing("dog", 1)], RED_DOG, [0, 0, 0.5, 0.5]),
        ([thing("dog", 0, score=0.9), thing("dog", 1, score=0.8)], RED_DOG, [1, 0, 0, 0]),  # the surest is red
        ([thing("dog", 0, score=0.8), thing("dog", 1, score=0.9)], RED_DOG, [0, 0, 0, 0]),
        ([], RED_DOG, [0, 0, 0, 0]),
        ([thing("dog", 0), thing("dog", 1)], {**RED_DOG, "count": 2}, [0, 0, 0.75, 0.75]),
        ([thing("dog", 0), thing("dog", 2)], {**RED_DOG, "count": 2}, [1, 1, 1, 1]),
        ([thing("dog", 0)], {**RED_DOG, "count": 2}, [0, 0, 0.25, 0.25]),
    ],
)
def test_colors(things, clause, expected):
    found = judged(things, [clause], tag="colors", colors={0: "red", 1: "blue", 2: "red"})
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("things", "include", "expected"),
    [
        ([thing("cat"), thing("dog", -9)], [CAT, LEFT], [1, 1, 1, 1]),
        ([thing("cat"), thing("dog", 9)], [CAT, LEFT], [0, 0, 2 / 3, (1 + 1 + 0 + 1) / 4]),  # flow_grpo: half of it
        ([thing("dog", -9)], [CAT, LEFT], [0, 0, 1 / 3, (0 + 1 + 0) / 3]),  # no target
        ([thing("cat")], [CAT, LEFT], [0, 0, 1 / 3, (1 + 0 + 0) / 3]),
        # every found object against every target: official looks at the surest dog, which is on the left
        ([thing("cat"), thing("dog", -9, score=0.9), thing("dog", 9, score=0.8)], [CAT, LEFT], [1, 0, 1 / 3, (1 + 0 + 0) / 3]),
        ([thing("cat"), thing("cat", -20), thing("dog", -9)], [{**CAT, "count": 2}, LEFT], [0, 0, 2 / 3, (1 + 1 + 0 + 1) / 4]),
        # a second cat: official keeps the surest one as the target, exactly it is no target
        ([thing("cat"), thing("cat", 5, score=0.5), thing("dog", -9)], [CAT, LEFT], [1, 0, 1 / 3, (0 + 1 + 0) / 3]),
    ],
)  # fmt: skip
def test_positions(things, include, expected):
    assert judged(things, include, tag="position") == pytest.approx(expected)


def test_a_position_waits_for_the_color():
    clause = {**LEFT, "color": "red"}
    things = [thing("cat"), thing("dog", -9)]
    assert judged(things, [CAT, clause], colors={-9: "red"}) == [1, 1, 1, 1]
    found = judged(things, [CAT, clause], colors={-9: "blue"})
    assert found == pytest.approx([0, 0, 2 / 4, (1 + 1 + 0) / 3])  # count, count, no color, no position looked at


def box(x, y, width=2.0, height=2.0):
    return torch.tensor([x - width / 2, y - height / 2, x + width / 2, y + height / 2])


@pytest.mark.parametrize(
    ("a", "b", "seen"),
    [
        (box(-9, 0), box(0, 0), {"left of"}),
        (box(9, 0), box(0, 0), {"right of"}),
        (box(0, -9), box(0, 0), {"above"}),  # y counts downwards
        (box(0, 9), box(0, 0), {"below"}),
        (box(-9, 9), box(0, 0), {"left of", "below"}),
        (box(0, 0), box(0, 0), set()),
        (box(0.1, 0), box(0, 0), set()),  # less than a tenth of both sizes together
        (box(0.4, 0), box(0, 0), set()),
        (box(0.79, 0), box(0, 0), set()),  # (0.79 − 0.4) / 0.79 < 1/2
        (box(0.81, 0), box(0, 0), {"right of"}),
        (box(4.2, 0, width=20), box(0, 0), set()),  # wide objects ask for more
        (box(4.5, 0, width=20), box(0, 0), {"right of"}),
        (box(9, 4.8), box(0, 0), {"right of"}),  # 4.4 / 10.2 is below 1/2
    ],
)
def test_relations(a, b, seen):
    assert relations(a, b) == seen


def test_sixteen_objects_of_a_class_at_most():
    things = [thing("dog", score=0.5 + i / 100) for i in range(20)]
    assert judged(things, [{"class": "dog", "count": 16}])[0] == 1
    assert judged(things, [{"class": "dog", "count": 17}])[0] == 0
    assert judged(things, [DOG])[3] == 1 - 15


def test_the_metric_is_the_score_and_info_tells_what_was_found():
    record = {"tag": "position", "include": [CAT, {**LEFT, "color": "red"}], "exclude": [{"class": "dog", "count": 2}]}
    things = [thing("cat"), thing("dog", 9), thing("dog", -9, score=0.5)]
    for metric in ("official", "strict", "soft", "flow_grpo"):
        output = score(GenEval(Table(things), Painted({9: "red", -9: "blue"}), metric), batch([record]))
        assert output.scores.item() == output.components[metric].item()
    assert output.info == ["cat: 1 of 1; dog: 2 of 1, 1 red, not left of 0; too many of what is excluded"]
    assert GenEval(Table(), metric="flow_grpo").spec.range == (-math.inf, 1) and GenEval(Table()).spec.range == (0, 1)


def test_each_object_is_classified_once():
    painted = Painted({0: "red", 1: "blue", 2: "red"})
    things = [thing("dog", 0, score=0.9), thing("dog", 2, score=0.8)]
    score(GenEval(Table(things), painted), batch([{"tag": "colors", "include": [{**RED_DOG, "count": 2}]}]))
    assert painted.asked == [("dog", 2)]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "expected GenEval's record"),
        ({"tag": "counting", "include": []}, "expected GenEval's record"),
        ({"tag": 3, "include": [DOG]}, "expected GenEval's record"),
        ({"tag": "t", "include": ["dog"]}, "expected a mapping of class, count"),
        ({"tag": "t", "include": [{"class": "dog"}]}, "expected a mapping of class, count"),
        ({"tag": "t", "include": [{**DOG, "colour": "red"}]}, "expected a mapping of class, count"),
        ({"tag": "t", "include": [{"class": "mouse", "count": 1}]}, "got the class 'mouse'"),
        ({"tag": "t", "include": [{"class": "dog", "count": 0}]}, "got the count 0 of 'dog'"),
        ({"tag": "t", "include": [{"class": "dog", "count": True}]}, "got the count True of 'dog'"),
        ({"tag": "t", "include": [{**DOG, "color": "grey"}]}, "got the color 'grey' of 'dog'"),
        ({"tag": "t", "include": [CAT, {**DOG, "position": ["near", 0]}]}, r"got the position \['near', 0\]"),
        ({"tag": "t", "include": [CAT, {**DOG, "position": ["above", 1]}]}, "expected the number of an earlier clause"),
        ({"tag": "t", "include": [DOG], "exclude": [RED_DOG]}, "expected a class and a count only"),
    ],
)
def test_records_that_are_none(metadata, message):
    with pytest.raises(ValueError, match=message):
        parse(metadata)
    output = score(GenEval(Table([thing("dog")], [])), batch([{"tag": "t", "include": [DOG]}, metadata]))
    assert output.valid[:, 0].tolist() == [True, False] and output.scores[0] == 1 and output.scores[1].isnan()
    assert output.info[1].startswith("got ")


def test_a_record_and_the_classes():
    include = [
        {"class": "computer mouse", "count": 2},
        {"class": "dog", "count": 1, "color": "red", "position": ("above", 0)},
    ]
    record = parse({"tag": "position", "include": include, "prompt": "p", "other": 1})
    assert record == Record("position", (Clause("computer mouse", 2), Clause("dog", 1, "red", "above", 0)))
    assert len(CLASSES) == len(set(CLASSES)) == 80 and CLASSES[0] == "person" and CLASSES[-1] == "toothbrush"
    assert {"tv remote", "computer keyboard", "hot dog", "baseball bat"} <= set(CLASSES)


def test_a_color_without_a_classifier_is_no_score():
    output = score(
        GenEval(Table([thing("dog")], [thing("dog")])),
        batch([{"tag": "t", "include": [DOG]}, {"tag": "t", "include": [RED_DOG]}]),
    )
    assert output.valid[:, 0].tolist() == [True, False] and "set `colors`" in output.info[1]


def test_batch_mates_do_not_matter():
    rows = ([thing("dog")], [], [thing("dog"), thing("cat")], [thing("cat")])
    given = batch([{"tag": "t", "include": [DOG, CAT]}] * 4)
    reward = GenEval(Table(*rows))
    whole = score(reward, given).scores
    assert whole[:, 0].tolist() == [0.5, 0, 1, 0.5]
    assert torch.equal(torch.cat([score(reward, part).scores for part in in_parts(given)]), whole)
    assert torch.equal(score(reward, given.select([3, 1, 0])).scores, whole[[3, 1, 0]])
    assert reward(given.select([])).scores.shape == (0,)


def test_a_detector_that_answers_in_another_form():
    class Short(Table):
        def detect(self, images, classes):
            return []

    with pytest.raises(RewardError, match="got 0 answers of the detector; expected 1"):
        score(GenEval(Short()), batch([{"tag": "t", "include": [DOG]}]))
    with pytest.raises(ValueError, match="expected x0, y0, x1, y1"):
        Detections(torch.tensor([[3.0, 0, 1, 1]]), torch.ones(1), torch.zeros(1))
    with pytest.raises(ValueError, match="got detections"):
        Detections(torch.zeros(2, 4), torch.ones(1), torch.zeros(2))
    with pytest.raises(ValueError, match="got metric='hard'"):
        GenEval(Table(), metric="hard")


def test_the_figure_of_the_benchmark_is_the_mean_of_task_means():
    found = overall([1, 0, 1, 1], ["counting", "counting", "colors", "counting"])
    assert found == pytest.approx({"counting": 2 / 3, "colors": 1, "overall": 5 / 6})
    with pytest.raises(ValueError, match="expected some of"):
        overall([1], ["count"])
