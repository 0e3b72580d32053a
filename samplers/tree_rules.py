"""What makes columns of node numbers a tree; says what is wrong before anything is computed on it."""

from collections.abc import Mapping

import torch
from torch import Tensor

COLUMNS = ("parent", "root", "group", "local", "index", "level", "source")


def generation_of(parent: Tensor) -> Tensor:
    """[N] how many steps each node is away from its root."""
    depth, ahead = torch.zeros_like(parent), parent.clone()
    while bool((ahead >= 0).any()):
        depth += ahead >= 0
        ahead = torch.where(ahead >= 0, parent[ahead], -1)
    return depth


def check_columns(columns: Mapping[str, Tensor], num_steps: int) -> None:
    """ValueError naming the column or the rule that is broken."""
    parent, root, group, local, index, level, source = (columns[name] for name in COLUMNS)
    n = len(parent)
    for name, column in columns.items():
        kind = torch.float64 if name == "level" else torch.int64
        if column.shape != (n,) or column.dtype != kind:
            raise ValueError(f"Tree.{name} is {column.dtype}{list(column.shape)}; expected {kind}[{n}]: one per node")
    if n == 0 or num_steps < 1:
        raise ValueError(f"got a tree of {n} nodes and {num_steps} steps; expected at least one of each")
    inner = (parent >= 0).nonzero().flatten()
    roots = n - len(inner)
    up = parent[inner]
    rules = {
        "the roots come first and are numbered by row": bool((root[:roots] == torch.arange(roots)).all())
        and bool((inner >= roots).all())
        and bool((parent >= -1).all()),
        "a parent stands before its children": bool((up < inner).all()),
        "a child has its parent's root, group and source": all(
            bool((column[inner] == column[up]).all()) for column in (root, group, source)
        ),
        "a step goes to a later grid index, within 0..num_steps": bool((index[inner] > index[up]).all())
        and bool((index >= 0).all())
        and bool((index <= num_steps).all()),
        "a level is finite, not negative, and 0 at a root": bool((level >= 0).all())
        and bool(level.isfinite().all())
        and not bool(level[:roots].any()),
        "a source is a place in SOURCES, or after it": bool((source >= 0).all()),
        "groups are numbered from 0 without a gap": bool((group >= 0).all())
        and len(group.unique()) == int(group.max()) + 1,
        "`local` is unique inside a group": len(torch.stack([group, local]).unique(dim=1)[0]) == n,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"not a tree: it breaks the rule '{rule}'; build trees with Tree.from_parents or a plan")
    if bool((generation_of(parent).diff() < 0).any()):
        raise ValueError("nodes are not sorted by generation; build trees with Tree.from_parents, join with Tree.cat")
