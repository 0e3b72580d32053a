"""The renderer draws what it is told, and RapidOCR reads it back."""

import pytest
import torch

from flowalign.glyphs.judge import judge
from flowalign.glyphs.prompts import INKS, PAPERS, held_out_prompts
from flowalign.glyphs.renderer import HEIGHT, WIDTH, letter_masks, render


def test_ground_truth_is_read_exactly_in_every_color_and_offset() -> None:
    records = held_out_prompts()[:32]
    offsets = torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)).repeat(4, 1)[:32]
    pictures = render(
        [record["target"] for record in records],
        [record["ink"] for record in records],
        [record["paper"] for record in records],
        offsets,
    )
    assert pictures.shape == (32, 3, HEIGHT, WIDTH)
    figures = judge(pictures, records)
    assert (figures.exact, figures.letters, figures.colors) == (1.0, 1.0, 1.0)


def test_judge_sees_a_wrong_letter_and_a_wrong_color() -> None:
    record = held_out_prompts()[0]
    word = ("A" if record["target"][0] != "A" else "B") + record["target"][1:]
    other_paper = next(paper for paper in PAPERS if paper != record["paper"])
    figures = judge(render([word], [record["ink"]], [other_paper]), [record])
    assert (figures.exact, figures.letters, figures.colors) == (0.0, 0.75, 0.0)


def test_an_offset_moves_the_picture_down_and_right() -> None:
    still = render(["KITE"], ["red"], ["white"])
    moved = render(["KITE"], ["red"], ["white"], torch.tensor([[1, -1]]))
    torch.testing.assert_close(moved[:, :, 1:, :-1], still[:, :, :-1, 1:], rtol=0, atol=0)
    assert not torch.equal(moved, still)


def test_pixels_blend_from_paper_to_ink() -> None:
    picture = render(["IIII"], ["blue"], ["yellow"])[0]
    corner = torch.tensor(PAPERS["yellow"]) / 255
    torch.testing.assert_close(picture[:, 0, 0], corner)
    distance = (picture - (torch.tensor(INKS["blue"]) / 255)[:, None, None]).abs().amax(0)
    assert distance.min() < 1e-6  # a fully covered pixel has the ink's own color


def test_no_letter_reaches_the_rows_that_show_the_paper() -> None:
    rows = letter_masks().amax(dim=(0, 2)) > 0
    assert not rows[:4].any()  # 3 rows and a jitter of 1
    assert not rows[-4:].any()
    assert (letter_masks().flatten(1).sum(1) > 20).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["kite"], ["red"], ["white"]), "capital letters"),
        ((["KITES"], ["red"], ["white"]), "4 capital letters"),
        ((["KITE"], ["mauve"], ["white"]), "unknown color 'mauve'"),
        ((["KITE"], ["red"], ["white"], torch.tensor([[2, 0]])), "got offsets up to 2"),
    ],
)
def test_errors_say_what_came(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(*arguments)
