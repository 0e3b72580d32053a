"""A rollout's tree as a picture: where samples part, which steps are stochastic, what each leaf scored."""

from __future__ import annotations

import io

import matplotlib
import torch
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from flowalign.picture_style import INK, RULE, SOFT, STYLE
from samplers import Forest, Tree

GRAY = "#9aa5b1"
LABELLED = 300  # leaves; with more, the picture grows no further and shows no rewards


def plot_tree(
    forest: Forest, scores: Tensor, valid: Tensor | None = None, *, group: int = 0, edge_values: Tensor | None = None
) -> bytes:
    """PNG of one group's tree: time from left (noise) to right (data), a leaf's reward at its end.

    scores, valid: [L] in the order of tree.leaves. edge_values [E] (credit or advantage, in the order of tree.edges)
    color the stochastic steps; without them they are drawn in the mean reward of the leaves below. Deterministic steps
    are thin and gray, stochastic ones without a value thick and gray; an invalid leaf is a cross. ValueError for a group that
    the tree lacks."""
    tree = forest.tree
    if not 0 <= group < tree.num_groups:
        raise ValueError(f"got group={group}; expected 0..{tree.num_groups - 1}")
    ok = torch.ones(len(scores), dtype=torch.bool) if valid is None else valid
    height = node_heights(tree, group)
    own = (tree.group == group) & (tree.parent >= 0)
    color = _edge_colors(forest, scores, ok, edge_values)
    with matplotlib.rc_context(STYLE):
        rows = int((tree.group[tree.leaves] == group).sum())
        figure = Figure(figsize=(10, 0.9 + 0.2 * min(max(rows, 4), LABELLED)), layout="constrained")
        axis = figure.subplots()
        for stochastic in (False, True):
            nodes = (own & ((tree.level > 0) == stochastic)).nonzero().flatten()
            lines = LineCollection(
                [_step_line(tree, height, node) for node in nodes.tolist()],
                linewidths=1.8 if stochastic else 0.8, colors=None if stochastic else GRAY, zorder=1 + stochastic,
            )  # fmt: skip
            if stochastic:
                lines.set_array(color[nodes].numpy())
                lines.set_cmap(colormaps["viridis"].with_extremes(bad=RULE))
                lines.set_norm(_norm(color[own & (tree.level > 0)]))
            axis.add_collection(lines)
        if bool((own & (tree.level > 0)).any()):
            bar = figure.colorbar(lines, ax=axis, pad=0.08, fraction=0.03)
            bar.set_label("mean reward below" if edge_values is None else "value of the step", color=SOFT)
            bar.outline.set_visible(False)  # type: ignore[operator]
        _leaves(axis, tree, height, scores, ok, group, labelled=rows <= LABELLED)
        axis.set_xlabel("denoising step")
        axis.set_yticks([])
        axis.set_xticks(range(0, tree.num_steps + 1, max(1, tree.num_steps // 10)))
        axis.spines[["left"]].set_visible(False)
        axis.set_xlim(-0.3, tree.num_steps + 1.0)
        axis.margins(y=0.05)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        return buffer.getvalue()


def _leaves(
    axis: matplotlib.axes.Axes, tree: Tree, height: Tensor, scores: Tensor, ok: Tensor, group: int, *, labelled: bool
) -> None:
    """The end of each branch, with its reward if it is `labelled`."""
    for leaf, score, known in zip(tree.leaves.tolist(), scores.tolist(), ok.tolist(), strict=True):
        if int(tree.group[leaf]) != group:
            continue
        spot = (tree.num_steps, float(height[leaf]))
        axis.plot(*spot, marker="o" if known else "x", color=INK, markersize=3.5, zorder=3)
        if not labelled:
            continue
        text = f"{score:.3g}" if known else "invalid"
        axis.annotate(text, spot, xytext=(6, 0), textcoords="offset points", va="center", fontsize=7.5, color=INK)


def _step_line(tree: Tree, height: Tensor, node: int) -> list[tuple[float, float]]:
    """The points of the line of the step that ends at `node`: first to the node's height, then level."""
    parent = int(tree.parent[node])
    left, right = float(tree.index[parent]), float(tree.index[node])
    return [(left, float(height[parent])), (left + 0.35, float(height[node])), (right, float(height[node]))]


def node_heights(tree: Tree, group: int) -> Tensor:
    """[N] the height at which each node of the group is drawn (0 on top, then −1, …; 0 for other groups): leaves from top to
    bottom in depth-first order, a parent in the middle of its children."""
    children: dict[int, list[int]] = {}
    mine = (tree.group == group).nonzero().flatten().tolist()
    for node in mine:
        children.setdefault(int(tree.parent[node]), []).append(node)
    height, line = torch.zeros(len(tree)), 0
    stack = [root for root in children[-1][::-1] if root in children]  # a selection may have dropped the others
    while stack:
        node = stack.pop()
        if node in children:
            stack += children[node][::-1]
        else:
            height[node], line = -line, line + 1
    for node in reversed(mine):  # children come after their parents
        if node in children:
            height[node] = height[children[node]].mean()
    return height


def _edge_colors(forest: Forest, scores: Tensor, ok: Tensor, edge_values: Tensor | None) -> Tensor:
    """[N] what each stochastic step is colored by."""
    tree = forest.tree
    color = torch.zeros(len(tree), dtype=torch.float64)
    if edge_values is not None:
        if edge_values.shape != tree.edges.shape:
            raise ValueError(
                f"got edge_values {list(edge_values.shape)}; expected one per edge, {list(tree.edges.shape)}"
            )
        color[tree.edges] = edge_values.double()
        return color
    edge, leaf = tree.leaf_of_edge
    total, count = (torch.zeros(len(tree.edges), dtype=torch.float64) for _ in range(2))
    total.index_add_(0, edge, torch.where(ok, scores.double(), 0.0)[leaf])
    count.index_add_(0, edge, ok[leaf].double())
    color[tree.edges] = total / count  # nan, drawn gray, where no leaf below is valid
    return color


def _norm(values: Tensor) -> Normalize:
    values = values[values.isfinite()]
    if not len(values):
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    return Normalize(low, high if high > low else low + 1)
