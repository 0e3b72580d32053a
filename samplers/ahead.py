"""Noise drawn ahead: a thread draws that of the next steps while the network is at work on these."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from samplers.rollout import Noise
from samplers.trees import Tree


@contextmanager
def drawn_ahead(noise: Noise, tree: Tree, device: torch.device) -> Iterator[Noise]:
    """`noise` of the steps of `tree` for states on `device`: the same values, one generation drawn ahead inside the context.

    noise(tree, nodes) -> [n, *]: a function of each node alone, such as KeyedNoise.step, so that draws may come early. What
    is drawn for a CUDA device lies in pinned memory. On the CPU, where the thread would take from the network, it is `noise`."""
    if device.type == "cpu":
        yield noise
        return
    with ThreadPoolExecutor(1, "noise") as thread:
        try:
            yield _Ahead(noise, tree, thread, pinned=device.type == "cuda")
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


class _Ahead:
    """One generation of stochastic steps is with the thread, or done, whenever the engine is at work on the one before."""

    def __init__(self, noise: Noise, tree: Tree, thread: ThreadPoolExecutor, pinned: bool) -> None:
        self._noise, self._tree, self._thread, self._pinned = noise, tree, thread, pinned
        stochastic = (nodes[tree.level[nodes] > 0] for nodes in tree.generations[1:])
        self._waiting = [nodes for nodes in stochastic if len(nodes)]
        self._begun: list[tuple[Tensor, Future[Tensor]]] = []
        self._begin()

    def __call__(self, tree: Tree, nodes: Tensor) -> Tensor:
        while True:  # a generation of which a selection has left nothing is never asked for
            planned, drawn = self._begun.pop()
            self._begin()
            if int(planned[-1]) >= int(nodes[0]):
                break
        values = drawn.result()
        return values if len(nodes) == len(planned) else values[torch.searchsorted(planned, nodes)]

    def _begin(self) -> None:
        if self._waiting:
            nodes = self._waiting.pop(0)
            self._begun.append((nodes, self._thread.submit(self._draw, nodes)))

    def _draw(self, nodes: Tensor) -> Tensor:
        values = self._noise(self._tree, nodes)
        return values.pin_memory() if self._pinned else values
