"""From the scores of leaves to the trained edges: credit, advantage and selection as one value."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from flowalign.advantage import Advantage, Advantages, SignalContext
from flowalign.credit import Broadcast, Credit, EdgeValues
from flowalign.selectors import AllEdges, Selector
from samplers import SOURCES, Forest


@dataclass(frozen=True, eq=False)
class EdgeSignal:
    """Credit and advantages of the edges of a forest, rows in the order of `forest.tree.edges`; chosen [E] bool: the edges
    that are trained."""

    credit: EdgeValues
    advantages: Advantages
    chosen: Tensor


@dataclass(frozen=True)
class Signal:
    """credit: from scores of leaves to values of edges. advantage: from those values to advantages. select: which edges are
    trained."""

    advantage: Advantage
    credit: Credit = field(default_factory=Broadcast)
    select: Selector = field(default_factory=AllEdges)

    def edges(
        self,
        forest: Forest,
        scores: Tensor,
        valid: Tensor,
        channels: tuple[str, ...],
        context: SignalContext,
    ) -> EdgeSignal:
        """scores, valid [L, C]: a row per leaf, a column per name of `channels`. An edge without any valid advantage is
        never chosen, whatever the selector returns; nor is one that the policy did not draw itself (a hinted or a
        teacher's sample): its ratio would not be 1 at unchanged weights. The scores of such samples do enter the advantages
        of the others."""
        credit = self.credit.assign(forest, scores, valid, channels)
        advantages = self.advantage.compare(forest, credit, context)
        own = forest.tree.source[forest.tree.edges] == SOURCES.index("student")
        # before the selection, so that a selector that keeps n of them keeps n of ours
        mine = replace(advantages, valid=advantages.valid & own[:, None])
        chosen = self.select.choose(forest, mine, context) & mine.valid.any(1)
        return EdgeSignal(credit, advantages, chosen)
