"""EditScore's protocol from end to end on Glyphs pairs whose edits can be checked exactly.

No vision-language model: the judge's answers are exact comparisons with renders, so this says that questions, images and
answers reach their places, and nothing of how well any judge judges."""

import re

import numpy as np
import pytest
import torch

from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.glyphs.renderer import render
from rewards import RewardBatch, score
from rewards.judges import EditScore
from tests.helpers.judge_server import Asked, JudgeServer

SOURCE = ("KITE", "red", "white")


def drawn(word: str, ink: str, paper: str) -> torch.Tensor:
    return render([word], [ink], [paper])[0]


def pixels(image: torch.Tensor) -> np.ndarray:
    return (image * 255).round().byte().permute(1, 2, 0).numpy()


def exact(asked: Asked) -> str:
    """Success: share of the pixels that the instruction changes which are as it asks. Preservation: share of the others that
    are as before. Quality: whether the picture has the colors of one ink and one paper, without noise."""
    if len(asked.images) == 1:
        (image,) = asked.images
        clean = [25 if any(near(image, drawn("KITE", ink, paper)) for ink in INKS for paper in PAPERS) else 5]
        return f'{{"reasoning": "exact check", "score": [{clean[0]}, {clean[0]}]}}'
    (found,) = re.findall(r"write it in (\w+)\n", asked.turns[0])
    source, result = asked.images
    wanted = pixels(drawn(SOURCE[0], found, SOURCE[2]))
    to_change = (wanted != source).any(-1)
    done = (result == wanted).all(-1)
    return f'{{"score": [{25 * done[to_change].mean()}, {25 * done[~to_change].mean()}], "reasoning": "exact check",}}'


def near(image: np.ndarray, render: torch.Tensor) -> bool:
    return bool((image == pixels(render)).all())


@pytest.fixture(scope="module")
def judge():
    with JudgeServer(exact) as server:
        yield server


def test_perfect_failed_needless_and_dirty_edits_are_told_apart(judge: JudgeServer) -> None:
    source, perfect = drawn(*SOURCE), drawn("KITE", "blue", "white")
    needless = drawn("KITE", "blue", "pink")
    dirty = perfect.clone()
    dirty[:, :4, :4] = 0.5
    results = torch.stack([perfect, source, needless, dirty])
    batch = RewardBatch(prompts=["write it in blue"] * 4, images=results, conditions=[[source]] * 4)
    output = score(EditScore(judge.endpoint(), passes=2), batch)
    overall, follows, keeps = (
        output.scores[:, 0],
        output.components["prompt_following"],
        output.components["consistency"],
    )
    assert overall[0] == 1 and bool(output.valid.all())
    assert follows[:2].tolist() == [10, 0] and keeps[:2].tolist() == [10, 10] and overall[1] == 0  # nothing was done
    assert keeps[2] == 0 and overall[2] == 0  # the paper was changed too
    touched = 16 / float((pixels(perfect) == pixels(source)).all(-1).sum())
    assert keeps[3].item() == pytest.approx(10 * (1 - touched)) and output.components["perceptual_quality"][3] == 2
    assert overall[3].item() == pytest.approx(((1 - touched) * 0.2) ** 0.5)
    assert torch.equal(output.uncertainty, torch.zeros(4, 1))  # exact answers do not depend on the seed


def test_a_half_done_edit_lies_between(judge: JudgeServer) -> None:
    source, perfect = drawn(*SOURCE), drawn("KITE", "green", "white")
    half = torch.cat([perfect[:, :, :24], source[:, :, 24:]], -1)
    batch = RewardBatch(
        prompts=["write it in green"] * 3, images=torch.stack([source, half, perfect]), conditions=[[source]] * 3
    )
    none, some, all_of_it = score(EditScore(judge.endpoint(), output="parts"), batch).scores[:, 0].tolist()
    assert (none, all_of_it) == (0, 1) and 0.3 < some < 0.7
