"""The reward layers of Glyphs-Edit, on edits of which is known how good they are."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from flowalign.config import load_judges, load_reward
from flowalign.glyphs.edit.prompts import held_out_prompts
from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.glyphs.renderer import JITTER, render
from rewards import RapidReader, RewardBatch, RewardOutput, score
from rewards.ocr import ocr

FOLDER = Path(__file__).parents[2] / "configs" / "rewards"
RECORDS = held_out_prompts()[:6]  # each axis twice
OTHER = {"ink": {name: names[i - 1] for names in [[*INKS]] for i, name in enumerate(names)},
         "paper": {name: names[i - 1] for names in [[*PAPERS]] for i, name in enumerate(names)}}  # fmt: skip


def right(record) -> Tensor:
    """[3, 24, 48]: the result as asked, of the shift at which it keeps what it should."""
    source, keep = to_tensor(record["image"]), torch.tensor([[int(char) for char in row] for row in record["keep"]])
    shifts = torch.cartesian_prod(torch.arange(-JITTER, JITTER + 1), torch.arange(-JITTER, JITTER + 1))
    results = render(*([record[key]] * len(shifts) for key in ("target", "ink", "paper")), shifts)
    return results[((results - source).abs().amax(1) * keep).sum((1, 2)).argmin()]


def recolored(image: Tensor, record, axis: str) -> Tensor:
    """`image`, as asked, on another paper, or in another ink."""
    rgb = {key: torch.tensor(record[f"{key}_rgb"])[:, None, None] / 255 for key in ("ink", "paper")}
    strength = (image - rgb["paper"]) / (rgb["ink"] - rgb["paper"] + 1e-6)
    mask = strength[(rgb["ink"] - rgb["paper"]).abs().flatten().argmax()]
    rgb[axis] = torch.tensor({**INKS, **PAPERS}[OTHER[axis][record[axis]]])[:, None, None] / 255
    return rgb["paper"] * (1 - mask) + rgb["ink"] * mask


def batch_of(images: list[Tensor], records=RECORDS) -> RewardBatch:
    return RewardBatch(
        prompts=[record["prompt"] for record in records],
        images=torch.stack(images),
        conditions=[[to_tensor(record["image"])] for record in records],
        metadata=[
            {key: value for key, value in record.items() if key not in ("prompt", "image")} for record in records
        ],
    )


@pytest.fixture(scope="module", autouse=True)
def reader():
    """One for all OCR rewards, in this process: workers of each would take seconds to start."""
    shared = RapidReader(workers=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocr, "RapidReader", lambda: shared)
        yield shared


@pytest.fixture(scope="module")
def judges(reader):
    return load_judges(str(FOLDER / "edit_glyphs.yaml"))[0]


def scored(judges, images: list[Tensor]) -> dict[str, Tensor]:
    batch = batch_of(images)
    return {judge.name: score(judge, batch).scores[:, 0] for judge in judges}


def test_the_right_result_has_all_scores(judges) -> None:
    found = scored(judges, [right(record) for record in RECORDS])
    assert set(found) == {"instruction_exact", "consistency", "instruction", "ocr_exact", "color_both"}
    for scores in found.values():
        torch.testing.assert_close(scores, torch.ones(6), rtol=0, atol=3e-3)  # a kept pixel may differ by a level


def test_the_source_keeps_all_and_follows_nothing(judges) -> None:
    found = scored(judges, [to_tensor(record["image"]) for record in RECORDS])
    axes = [record["axis"] for record in RECORDS]
    assert found["consistency"].tolist() == [1] * 6 and found["instruction_exact"].tolist() == [0] * 6
    assert found["ocr_exact"].tolist() == [float(axis != "word") for axis in axes]
    assert found["color_both"].tolist() == [float(axis == "word") for axis in axes]
    # as it is trained: how surely the new word is read, and how near the old color is
    assert found["instruction"].max() < 0.85
    assert [float(found["instruction"][row]) for row, axis in enumerate(axes) if axis == "word"] == pytest.approx(
        [0, 0], abs=1e-5
    )


@pytest.mark.parametrize("axis", ["ink", "paper"])
def test_a_right_edit_with_another_color_changed_loses_consistency_alone(judges, axis) -> None:
    images = [recolored(right(record), record, axis) for record in RECORDS]
    found = scored(judges, images)
    for row, record in enumerate(RECORDS):
        if record["axis"] == axis:
            assert found["instruction_exact"][row] == 0 and found["consistency"][row] > 0.98
        else:
            assert found["instruction_exact"][row] == 1
            assert found["consistency"][row] < 0.97 and found["color_both"][row] == 0


def test_the_layers_train_on_both_or_on_the_instruction_alone() -> None:
    both, alone = (load_reward([str(FOLDER / f"{name}.yaml")]) for name in ("edit_glyphs", "edit_glyphs_instruction"))
    assert repr(both.rewards[0]) == repr(alone)
    evaluations = [repr(load_judges(str(layer))[0]) for layer in sorted(FOLDER.glob("edit_*glyphs*.yaml"))]
    assert len(evaluations) > 2 and len(set(evaluations)) == 1  # whatever is trained on
    output: RewardOutput = score(both, batch_of([right(record) for record in RECORDS]))
    assert output.scores[:, 0].tolist() == pytest.approx([sum(both.weights)] * 6, abs=0.02)
