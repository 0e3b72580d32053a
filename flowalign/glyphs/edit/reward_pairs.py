"""Pairs of edits of Glyphs pictures whose order is known: what a reward of edits is trained and measured on.

A source picture, an instruction that changes its ink or its paper ("write it in blue", "put it on a pink background"), and two
results. How far each follows the instruction, and how clean it is, is known from how it was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from flowalign.glyphs.edit.prompts import Axis, Edit
from flowalign.glyphs.prompts import INKS, PAPERS, Scene
from flowalign.glyphs.renderer import JITTER, WIDTH, render

# result -> (how far it follows the instruction, how clean it is); as asked is (1, 1)
LEVELS = {
    "perfect": (1.0, 1.0),  # as asked
    "not_done": (0.0, 1.0),  # the source as it was
    "wrong": (0.0, 1.0),  # another color than the one asked for
    "half": (0.5, 1.0),  # done in the left or in the right half
    "overdone": (0.5, 1.0),  # the other color was changed too
    "noisy": (1.0, 0.0),
    "blurred": (1.0, 0.0),
}
# kind -> (better, worse); of the last, which is better depends on what is asked
KINDS = {
    "not_done": ("perfect", "not_done"),
    "wrong": ("perfect", "wrong"),
    "half": ("perfect", "half"),
    "overdone": ("perfect", "overdone"),
    "noisy": ("perfect", "noisy"),
    "blurred": ("perfect", "blurred"),
    "half_or_nothing": ("half", "not_done"),
    "noisy_or_not_done": ("noisy", "not_done"),
}


@dataclass(frozen=True, eq=False)
class EditPairs:
    """N pairs. sources, first, second [N, 3, 24, 48] in [0, 1]; kinds: keys of KINDS.

    order [N, 2]: of instruction following and of quality, 1 where the first is better, 0 where the second is, 1/2 where
    both are equal."""

    edits: list[Edit]
    kinds: list[str]
    sources: Tensor
    first: Tensor
    second: Tensor
    order: Tensor

    def __len__(self) -> int:
        return len(self.edits)

    @property
    def prompts(self) -> list[str]:
        return [edit.instruction for edit in self.edits]

    @property
    def overall(self) -> Tensor:
        """[N]: the order of the mean of both, as `order`."""
        return 0.5 + 0.5 * (self.order - 0.5).sum(1).sign()


def draw_pairs(
    count: int, words: Sequence[str], generator: torch.Generator, *, unseen: bool, kinds: Sequence[str] = tuple(KINDS)
) -> EditPairs:
    """`count` pairs of `words`, the kinds in turn, of combinations of colors with that `unseen`; which of the two results comes
    first is left to chance."""
    pool = [edit for edit in all_edits() if is_unseen(edit) == unseen]
    edits = [
        Edit(edit.source._replace(word=words[word]), edit.axis, edit.target)
        for edit, word in zip(
            (pool[i] for i in _random(len(pool), count, generator)), _random(len(words), count, generator), strict=True
        )
    ]
    offsets = torch.randint(-JITTER, JITTER + 1, (count, 2), generator=generator)
    chosen = [kinds[i % len(kinds)] for i in range(count)]
    better, worse = (
        drawn_results(edits, [KINDS[kind][place] for kind in chosen], offsets, generator) for place in (0, 1)
    )
    levels = torch.tensor([[LEVELS[name] for name in KINDS[kind]] for kind in chosen])  # [N, result, 2]
    order = 0.5 + 0.5 * (levels[:, 0] - levels[:, 1]).sign()
    swapped = torch.rand(count, generator=generator) < 0.5
    rows = swapped[:, None, None, None]
    return EditPairs(
        edits, chosen, _render([edit.source for edit in edits], offsets), torch.where(rows, worse, better),
        torch.where(rows, better, worse), torch.where(swapped[:, None], 1 - order, order),
    )  # fmt: skip


def all_edits(word: str = "KITE") -> list[Edit]:
    """The 96 changes of one color of the 16 scenes of a word."""
    scenes = [Scene(word, ink, paper) for ink in INKS for paper in PAPERS]
    colors: dict[Axis, Sequence[str]] = {"ink": list(INKS), "paper": list(PAPERS)}
    return [
        Edit(scene, axis, target)
        for scene in scenes
        for axis, names in colors.items()
        for target in names
        if target not in scene
    ]


def is_unseen(edit: Edit) -> bool:
    """A quarter of all combinations of colors: any change of color is trained, but not beside each of the others."""
    inks, papers = list(INKS), list(PAPERS)
    names = inks if edit.axis == "ink" else papers
    return (inks.index(edit.source.ink) + papers.index(edit.source.paper) + names.index(edit.target)) % 4 == 0


def drawn_results(edits: Sequence[Edit], results: Sequence[str], offsets: Tensor, generator: torch.Generator) -> Tensor:
    """[N, 3, 24, 48]: of each edit the result of that name (a key of LEVELS); offsets [N, 2] as the renderer's."""
    scenes = [_scene(edit, result, generator) for edit, result in zip(edits, results, strict=True)]
    drawn, sources = _render(scenes, offsets), _render([edit.source for edit in edits], offsets)
    for row, result in enumerate(results):
        if result == "half":
            kept = slice(0, WIDTH // 2) if _random(2, 1, generator)[0] else slice(WIDTH // 2, WIDTH)
            drawn[row, :, :, kept] = sources[row, :, :, kept]
        elif result == "noisy":
            strength = 0.1 + 0.15 * torch.rand((), generator=generator)
            drawn[row] = (drawn[row] + strength * torch.randn(drawn[row].shape, generator=generator)).clamp(0, 1)
        elif result == "blurred":
            drawn[row] = avg_pool2d(pad(drawn[row][None], (1, 1, 1, 1), mode="replicate"), 3, stride=1)[0]
    return drawn


def _scene(edit: Edit, result: str, generator: torch.Generator) -> Scene:
    """What is drawn before it is halved or spoilt."""
    if result == "not_done":
        return edit.source
    palettes = {"ink": list(INKS), "paper": list(PAPERS)}
    if result == "wrong":
        others = [name for name in palettes[edit.axis] if name not in (edit.target, *edit.source)]
        return edit.to(others[_random(len(others), 1, generator)[0]])
    if result == "overdone":
        other = "paper" if edit.axis == "ink" else "ink"
        names = [name for name in palettes[other] if name not in edit.source]
        return edit.result._replace(**{other: names[_random(len(names), 1, generator)[0]]})
    return edit.result


def _render(scenes: Sequence[Scene], offsets: Tensor) -> Tensor:
    words, inks, papers = zip(*scenes, strict=True)
    return render(words, inks, papers, offsets)


def _random(below: int, count: int, generator: torch.Generator) -> list[int]:
    numbers: list[int] = torch.randint(below, (count,), generator=generator).tolist()
    return numbers
