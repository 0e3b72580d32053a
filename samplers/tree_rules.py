"""The rules that columns of node numbers must keep to be a tree, checked before anything is computed on them."""

from collections.abc import Mapping

import torch
from torch import Tensor

COLUMNS = ("parent", "root", "group", "local", "index", "level", "source", "probe")


def generation_of(parent: Tensor) -> Tensor:
    """[N] how many steps each node is away from its root."""
    depth, ancestor = torch.zeros_like(parent), parent.clone()
    while bool((ancestor >= 0).any()):
        depth += ancestor >= 0
        ancestor = torch.where(ancestor >= 0, parent[ancestor], -1)
    return depth


def check_columns(columns: Mapping[str, Tensor], num_steps: int) -> None:
    """ValueError naming the column or the rule that is broken."""
    parent, root, group, local, index, level, source, probe = (columns[name] for name in COLUMNS)
    n = len(parent)
    for name, column in columns.items():
        dtype = {"level": torch.float64, "probe": torch.bool}.get(name, torch.int64)
        if column.shape != (n,) or column.dtype != dtype:
            raise ValueError(f"got Tree.{name} {column.dtype}{list(column.shape)}; expected {dtype}[{n}], one per node")
    if n == 0 or num_steps < 1:
        raise ValueError(f"got a tree of {n} nodes and {num_steps} steps; expected at least one of each")
    inner = (parent >= 0).nonzero().flatten()
    roots = n - len(inner)
    parents = parent[inner]
    rules = {
        "the roots come first and are numbered by row": bool((root[:roots] == torch.arange(roots)).all())
        and bool((inner >= roots).all())
        and bool((parent >= -1).all()),
        "a parent stands before its children": bool((parents < inner).all()),
        "a child has its parent's root, group and source": all(
            bool((column[inner] == column[parents]).all()) for column in (root, group, source)
        ),
        "what follows a probe's state is of the probe, and deterministic": not bool(
            (probe[parents] & ~probe[inner]).any() or (probe & (level > 0)).any()
        ),
        "a step goes to a later grid index, within 0..num_steps": bool((index[inner] > index[parents]).all())
        and bool((index >= 0).all())
        and bool((index <= num_steps).all()),
        "a level is finite, not negative, and 0 at a root": bool((level >= 0).all())
        and bool(level.isfinite().all())
        and not bool(level[:roots].any()),
        "a source is an index in SOURCES, or after it": bool((source >= 0).all()),
        "groups are numbered from 0 without a gap": bool((group >= 0).all())
        and len(group.unique()) == int(group.max()) + 1,
        "`local` is unique inside a group": len(torch.stack([group, local]).unique(dim=1)[0]) == n,
    }
    for rule, holds in rules.items():
        if not holds:
            raise ValueError(f"got no tree; expected that {rule}: build trees with Tree.from_parents or a plan")
    if bool((generation_of(parent).diff() < 0).any()):
        raise ValueError("got nodes that are not sorted by generation; expected parents' generations first: build trees with "
                         "Tree.from_parents, join them with Tree.cat")  # fmt: skip
