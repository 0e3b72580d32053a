"""Pairs of Glyphs edits: what is drawn, which is better, and what is held out."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from flowalign.glyphs.edit.prompts import Edit
from flowalign.glyphs.edit.reward_pairs import KINDS, LEVELS, EditPairs, all_edits, draw_pairs, drawn_results, is_unseen
from flowalign.glyphs.prompts import INKS, PAPERS, Scene
from flowalign.glyphs.renderer import render

INK, PAPER = Edit(Scene("KITE", "red", "white"), "ink", "blue"), Edit(Scene("KITE", "red", "white"), "paper", "pink")


def drawn(word: str, ink: str, paper: str) -> Tensor:
    return render([word], [ink], [paper])[0]


def result(edit: Edit, name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return drawn_results([edit], [name], torch.zeros(1, 2, dtype=torch.long), generator)[0]


def test_instructions() -> None:
    assert INK.instruction == "write it in blue" and PAPER.instruction == "put it on a pink background"


@pytest.mark.parametrize("edit", [INK, PAPER])
def test_a_result_is_as_its_name_says(edit: Edit) -> None:
    asked, source = drawn(*edit.to(edit.target)), drawn(*edit.source)
    assert torch.equal(result(edit, "perfect"), asked) and torch.equal(result(edit, "not_done"), source)
    others = [drawn("KITE", ink, "white") for ink in ("green", "black")]
    if edit.axis == "paper":
        others = [drawn("KITE", "red", paper) for paper in ("yellow", "cyan")]
    too_much = [drawn("KITE", "blue", paper) for paper in PAPERS if paper != "white"]
    if edit.axis == "paper":
        too_much = [drawn("KITE", ink, "pink") for ink in INKS if ink != "red"]
    for name, allowed in (("wrong", others), ("overdone", too_much)):
        seen = [
            next(number for number, picture in enumerate(allowed) if torch.equal(result(edit, name, seed), picture))
            for seed in range(24)
        ]
        assert set(seen) == set(range(len(allowed)))  # each of them comes
    halves = [(result(edit, "half", seed)[..., :24], result(edit, "half", seed)[..., 24:]) for seed in range(12)]
    done = [(torch.equal(left, asked[..., :24]), torch.equal(right, asked[..., 24:])) for left, right in halves]
    assert set(done) == {(True, False), (False, True)}
    kept = [(torch.equal(left, source[..., :24]), torch.equal(right, source[..., 24:])) for left, right in halves]
    assert [(not left, not right) for left, right in kept] == done


def test_noise_and_blur_keep_the_colors() -> None:
    asked = drawn(*INK.to("blue"))
    for name, low, high in (("noisy", 0.05, 0.25), ("blurred", 0.02, 0.25)):
        changed = result(INK, name)
        assert low < float((changed - asked).square().mean().sqrt()) < high
        assert float(changed.min()) >= 0 and float(changed.max()) <= 1
        # at 0 and 1 half of the noise is cut off: at most 0.25 / √(2π)
        torch.testing.assert_close(changed.mean((1, 2)), asked.mean((1, 2)), atol=0.1, rtol=0)
    blurred = result(INK, "blurred")
    assert float((blurred[:, 5, 7] - asked[:, 4:7, 6:9].mean((1, 2))).abs().max()) < 1e-6


def test_which_is_better_is_known_by_what_was_drawn() -> None:
    """Each result keeps its levels whichever place it is put in."""
    pairs = draw_pairs(64, ["KITE", "WORD"], torch.Generator().manual_seed(0), unseen=False)
    assert pairs.kinds == list(KINDS) * 8 and len(pairs) == 64
    sides = set()
    for row, kind in enumerate(pairs.kinds):
        better, worse = (LEVELS[name] for name in KINDS[kind])
        order = [0.5 + 0.5 * ((a > b) - (a < b)) for a, b in zip(better, worse, strict=True)]
        swapped = pairs.order[row].tolist() != order
        assert pairs.order[row].tolist() in (order, [1 - each for each in order])
        sides.add((kind, swapped))
        if kind == "not_done":  # the one that is the source is the worse one
            assert torch.equal((pairs.first, pairs.second)[1 - swapped][row], pairs.sources[row])
        expected = 0.5 if kind == "noisy_or_not_done" else float(not swapped)
        assert pairs.overall[row] == expected
    assert len(sides) == 2 * len(KINDS)


def test_pairs_are_the_same_with_the_same_seed_only() -> None:
    def at(seed: int) -> EditPairs:
        return draw_pairs(16, ["KITE"], torch.Generator().manual_seed(seed), unseen=True)

    assert torch.equal(at(1).first, at(1).first) and at(1).edits == at(1).edits
    assert all(not torch.equal(a.first, b.first) for a, b in pairwise((at(1), at(2), at(3))))


def test_a_quarter_of_the_combinations_is_held_out_and_no_change_of_color_is_new() -> None:
    edits = all_edits()
    assert len(edits) == len(set(edits)) == 96 and sum(map(is_unseen, edits)) == 24
    changes = {(edit.axis, vars(edit)["source"]._asdict()[edit.axis], edit.target) for edit in edits}
    seen = {(e.axis, e.source._asdict()[e.axis], e.target) for e in edits if not is_unseen(e)}
    assert seen == changes and len(changes) == 24
    for unseen in (False, True):
        pairs = draw_pairs(200, ["KITE"], torch.Generator().manual_seed(3), unseen=unseen)
        assert {is_unseen(edit) for edit in pairs.edits} == {unseen}
        assert all(edit.target not in edit.source for edit in pairs.edits)
