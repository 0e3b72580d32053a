"""Which process trains which states of a rollout, and what is sent so that each has what it needs there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowalign.distributed.deal import Deal
from flowalign.trainers.update_engine import UpdateEngine
from samplers import Forest


@dataclass(frozen=True, eq=False)
class Dealt:
    """forest: with all that this process needs of it. deals: of each update, of its states. nodes: the states that each process
    needs, of all updates. mine: those that this one trains, ascending."""

    forest: Forest
    deals: Sequence[Deal]
    nodes: Sequence[Tensor]
    mine: Tensor

    @staticmethod
    def of(engine: UpdateEngine, forest: Forest, nodes: Sequence[Tensor], edges: Tensor) -> Dealt:
        """Of updates on the states `nodes` of each, all different. edges: the steps whose arrivals are read where the state that they
        leave is trained. Collective."""
        tree = forest.tree
        deals = [engine.deal(tree.group[each]) for each in nodes]
        wanted = [
            torch.cat([each[deal.padded[rank]] for each, deal in zip(nodes, deals, strict=True)]).unique()
            for rank in range(engine.task.processes.count)
        ]
        arrived = [edges[torch.isin(tree.parent[edges], each)] for each in wanted]
        mine = torch.cat([each[deal.mine] for each, deal in zip(nodes, deals, strict=True)]).sort().values
        return Dealt(engine.bring_states(forest, wanted, arrived), deals, wanted, mine)
