"""Methods that are the same method under another name have the same gradient, bit for bit."""

from pathlib import Path

import pytest
import torch

from flowalign.advantage import Normalized
from flowalign.credit import BranchLocal, Broadcast, SubtreeFusion
from samplers import Branch, Chain, FlowSDE, SplitTree, Window
from tests.helpers.policy_gradient import PROMPTS, gradients, make, run_updates

FLOW_GRPO = (Chain(), Broadcast(), Normalized())
ALL_BUT_LAST = (Window(size=3, low=0, high=3, shared_start=False), Broadcast(), Normalized())
FAST = (Window(size=1, low=1, high=2), Broadcast(), Normalized())
TEMP_FLOW = (Branch(branches=4, count=1, candidates=(1,)), BranchLocal(), Normalized(within="seed_step"))
BRANCH_GRPO = (
    SplitTree((1,), 4, window=1, low=1, high=2), SubtreeFusion(), Normalized(within="tree_depth"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(FLOW_GRPO, ALL_BUT_LAST), (FAST, TEMP_FLOW), (FAST, BRANCH_GRPO)],
    ids=["a window of all steps but the last", "one branching step of one seed", "a tree that splits once"],
)
def test_two_names_of_one_method(tiny_pipeline: Path, ours, theirs) -> None:
    found = []
    for plan, credit, advantage in (ours, theirs):
        policy, trainer = make(tiny_pipeline, plan, FlowSDE(), group_size=4, credit=credit, advantage=advantage)
        batch = trainer.collect(PROMPTS, 0)
        run_updates(trainer, batch)
        found.append((policy.evaluations, batch.scores, gradients(policy)))
    (rows, scores, one), (their_rows, their_scores, other) = found
    assert rows == their_rows and torch.equal(scores, their_scores) and one
    assert all(torch.equal(one[name], other[name]) for name in one)
