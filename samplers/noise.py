"""Noise as a function of a key: bit-identical whatever the batch, the micro-batch, the process count or the order.

A 128-bit hash of the key seeds its own counter-based generator (numpy Philox), and each key draws ONE fp32 tensor on
the CPU. torch's CPU generator would keep only the low 32 bits of a seed and change its values with the size drawn.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from operator import index

import numpy as np
import torch
from torch import Tensor

from samplers.trees import Tree


def generator(*key: int | str) -> np.random.Generator:
    """The generator of one key; parts are integers of any size and strings. Different keys: different generators.

    Each part is encoded with its type and length, so ("a", 1), ("a1",) and ("a", "1") are three keys.
    """
    if not key:
        raise ValueError("got an empty key; expected integers and strings, such as (seed, 'select', iteration)")
    digest = blake2b(b"".join(_encode(part) for part in key), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(shape: Sequence[int], *key: int | str) -> Tensor:
    """One fp32 CPU tensor of independent N(0, 1), a function of `key` and `shape` only."""
    return torch.from_numpy(generator(*key).standard_normal(tuple(shape), dtype=np.float32))


@dataclass(frozen=True)
class KeyedNoise:
    """The start, step and probing noise of one iteration's rollout.

    uids: prompt uid of each group of the tree, in group order. visits: for each group, how many earlier groups of this
    iteration have the same prompt, so that a prompt seen again gets new noise; by default it is counted within `uids`,
    which is enough unless one prompt's groups are spread over several rollouts of the same iteration. The key holds the
    visit, not the group's position: batching and order do not matter.
    branch_scale: s of BranchGRPO's noise (2509.06040; 4 is best of 1, 2, 4, 8), ξ = (ξ0 + s·η)/√(1+s²) with ξ0 common
    to the steps that leave one state: N(0, I) for each, covariance 1/(1+s²) between siblings. None: independent.
    """

    seed: int
    iteration: int
    uids: Sequence[int]
    shape: Sequence[int]
    visits: Sequence[int] | None = None
    branch_scale: float | None = None

    def __post_init__(self) -> None:
        if self.branch_scale is not None and not 0.0 < self.branch_scale < math.inf:
            raise ValueError(f"got branch_scale={self.branch_scale}; expected a finite number > 0, or None")
        if self.visits is None:
            return
        if len(self.visits) != len(self.uids):
            raise ValueError(f"got {len(self.visits)} visits for {len(self.uids)} uids; expected one per group")
        if len(set(zip(self.uids, self.visits, strict=True))) < len(self.uids):
            raise ValueError("got two groups of the same (uid, visit); expected different ones, or they share noise: count the "
                             "visits of each uid up")  # fmt: skip

    def start(self, tree: Tree, roots: Tensor | None = None) -> Tensor:
        """[R, *shape], one per root, or of `roots`; key (seed, "start", iteration, uid, visit, local)."""
        roots = torch.arange(tree.num_roots) if roots is None else roots
        return self._draw("start", tree, roots, tree.local[roots][:, None])

    def step(self, tree: Tree, nodes: Tensor) -> Tensor:
        """[n, *shape] for the steps arriving at `nodes`; key (seed, "step", iteration, uid, visit, local, grid step).

        With a branch_scale: streams "branch-common", with the parent's `local`, and "branch-own", with the node's.
        """
        if bool((tree.parent[nodes] < 0).any()):
            raise ValueError("got a root; expected nodes that a step arrives at: use start(tree) for the roots")
        parents, position = tree.distinct_parents(nodes)
        own_key = torch.stack([tree.local[nodes], tree.index[parents][position]], 1)
        if self.branch_scale is None:
            return self._draw("step", tree, nodes, own_key)
        common_key = torch.stack([tree.local[parents], tree.index[parents]], 1)
        common = self._draw("branch-common", tree, parents, common_key)
        own = self.branch_scale * self._draw("branch-own", tree, nodes, own_key)
        return (common[position] + own) / math.sqrt(1.0 + self.branch_scale**2)

    def probes(self, tree: Tree, nodes: Tensor, count: int) -> Tensor:
        """[count, n, *shape] for the states `nodes`: SPSA's directions; key (seed, "spsa", iteration, uid, visit, local,
        number)."""
        numbers = torch.arange(count)
        return torch.stack(
            [
                self._draw("spsa", tree, nodes, torch.stack([tree.local[nodes], m.expand(len(nodes))], 1))
                for m in numbers
            ]
        )

    def _draw(self, stream: str, tree: Tree, nodes: Tensor, keys: Tensor) -> Tensor:
        """[n, *shape] for `nodes` [n]; keys [n, k]: the last parts of each node's key."""
        if tree.num_groups != len(self.uids):
            raise ValueError(f"got {len(self.uids)} uids for {tree.num_groups} groups; expected one uid per group")
        number = self.visits if self.visits is not None else visits(self.uids)
        out = torch.empty((len(nodes), *self.shape), dtype=torch.float32)
        for row, (group, key) in enumerate(zip(tree.group[nodes].tolist(), keys.tolist(), strict=True)):
            out[row] = normal(self.shape, self.seed, stream, self.iteration, self.uids[group], number[group], *key)
        return out


def visits(uids: Sequence[int]) -> list[int]:
    """How many earlier entries of the list equal each uid."""
    seen: Counter[int] = Counter()
    counts = []
    for uid in uids:
        counts.append(seen[uid])
        seen[uid] += 1
    return counts


def _encode(part: int | str) -> bytes:
    """Type, length, content: no two sequences of parts share an encoding."""
    if isinstance(part, bool):
        raise TypeError(f"got key part {part!r}; expected an integer or a string: write 0 or 1 for a flag")
    if isinstance(part, str):
        kind, body = b"s", part.encode()
    else:
        number = index(part)
        kind, body = b"i", number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return kind + len(body).to_bytes(8, "little") + body
