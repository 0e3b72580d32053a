"""Selectors: which edges are trained, decided after the advantages. A new one is one file with a `choose`."""

from flowalign.selectors.base import START, Selector
from flowalign.selectors.edges import All, AllEdges, NonZeroAdvantage, PositiveNegativeBalance
from flowalign.selectors.prune import DepthWindow, ExtremeB, ParentTop1
from flowalign.selectors.samples import BestOfN, Fraction

__all__ = [
    "START", "Selector",
    "All", "AllEdges", "NonZeroAdvantage", "PositiveNegativeBalance",
    "BestOfN", "Fraction", "DepthWindow", "ExtremeB", "ParentTop1",
]  # fmt: skip
