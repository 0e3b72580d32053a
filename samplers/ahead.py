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

    noise(tree, nodes) -> [n, *]: a function of each node alone, such as KeyedNoise.step, so that draws may come early. On the
    CPU, where the thread would take from the network, it is `noise`."""
    if device.type == "cpu":
        yield noise
        return
    with ThreadPoolExecutor(1, "noise") as thread:
        try:
            yield _Ahead(noise, tree, thread)
        finally:
            thread.shutdown(wait=False, cancel_futures=True)


class _Ahead:
    """One generation of stochastic steps is with the thread, or done, whenever the engine is at work on the one before."""

    def __init__(self, noise: Noise, tree: Tree, thread: ThreadPoolExecutor) -> None:
        self._noise, self._tree, self._thread = noise, tree, thread
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
            self._begun.append((nodes, self._thread.submit(self._noise, self._tree, nodes)))
