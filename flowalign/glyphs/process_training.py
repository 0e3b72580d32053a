"""Training of a process reward of words: states of the base model's own rollouts, labelled by what OCR reads at their end.

What differs between the worlds is a `World`: see `flowalign.glyphs.process_worlds`."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flowalign.glyphs.process_reward import LetterReader
from flowalign.glyphs.prompts import LETTERS
from flowalign.glyphs.schedule import set_rate
from rewards import OCR, RewardBatch, score
from samplers import Forest, Kernel, KeyedNoise, chain, plain_sigmas, rollout

Velocity = Callable[[Tensor, Tensor, Sequence[str]], Tensor]  # x [n, *], σ [n], prompts of the rows
BATCH = 64


class Asked(Protocol):
    """What N prompts ask for, as numbers: tensors of N rows."""

    @property
    def letters(self) -> Tensor:
        """[N, L] of the word."""

    @property
    def places(self) -> Tensor:
        """[N, P] the letter asked for at each place that a network reads."""

    @staticmethod
    def cat(parts: Sequence[Any]) -> Any:
        """All of them."""

    def at(self, rows: Tensor) -> Self: ...

    def asking(self, letters: Tensor) -> Self:
        """The same for other letters [N, L]."""


class Reader(Protocol):
    """A network that reads states x [N, *] at σ [N] at P places, with the scenes of its world."""

    __call__: Callable[..., Any]  # x, σ, scenes -> logits [N, P, letters + 1]

    def score_of(self, logits: Tensor, scenes: Any) -> Tensor:
        """[N] in [0, 1]."""

    def expected(self, x: Tensor, sigma: Tensor, scenes: Any) -> Tensor:
        """[N] `score_of` its own logits."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def eval(self) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...


@dataclass(frozen=True)
class Source:
    """A share of the rollouts: samples, their kernel, steps and the shift of their plain grid."""

    samples: int
    kernel: Kernel
    steps: int
    shift: float


@dataclass(frozen=True)
class World:
    """What the training needs to know of a world of words.

    policy, max_sequence_length: as `load_policy` takes them. shape: of a sample's latents. records, held_out_records: prompts of both sets. pictures: of
    decoded samples [n, …] those that OCR is asked to read, [n, K, 3, H, W] in [0, 1]; a sample's score is their mean. moved: how many
    latents a state may be shifted by along its last two axes. sources: the rollouts that are trained on; held_out: those that are measured."""

    policy: str
    max_sequence_length: int | None
    shape: tuple[int, ...]
    records: Callable[[], Sequence[Mapping[str, Any]]]
    held_out_records: Callable[[], Sequence[Mapping[str, Any]]]
    scenes: Callable[[Sequence[str]], Any]
    network: Callable[[], Reader]
    pictures: Callable[[Tensor], Tensor]
    drawn: Callable[[], Drawn]
    moved: int
    sources: Sequence[Source]
    held_out: Sequence[Source]


@dataclass(frozen=True, eq=False)
class States:
    """N states of rollouts: x [N, *] at σ [N], their scenes, the score [N] of the finished sample, the letters [N, P] that were
    read in it (-1 in a picture where not as many were as the word has), and the sample [N] that each is a state of."""

    x: Tensor
    sigma: Tensor
    scenes: Asked
    score: Tensor
    read: Tensor
    sample: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @staticmethod
    def cat(parts: Sequence[States]) -> States:
        """All of them; samples are numbered on."""
        first = [sum(int(part.sample.max()) + 1 for part in parts[:number]) for number in range(len(parts))]
        scenes = parts[0].scenes.cat([part.scenes for part in parts])
        x, sigma, of, read = (torch.cat([vars(p)[n] for p in parts]) for n in ("x", "sigma", "score", "read"))
        return States(x, sigma, scenes, of, read, torch.cat([p.sample + f for p, f in zip(parts, first, strict=True)]))


@dataclass(frozen=True, eq=False)
class Drawn:
    """Words as the renderer draws them: latents [N, *] without noise, and their scenes."""

    x0: Tensor
    scenes: Asked

    def loss(self, network: Reader, batch: int, generator: torch.Generator) -> Tensor:
        """Cross entropy of the drawn letters from `batch` of them, noised. A quarter of their letters is asked for as
        another one, so that what is asked for does not say what is there."""
        rows = torch.randint(len(self.x0), (batch,), generator=generator)
        scenes, sigma = self.scenes.at(rows), torch.rand(batch, generator=generator)
        other = torch.randint(len(LETTERS), scenes.letters.shape, generator=generator)
        wrong = torch.rand(scenes.letters.shape, generator=generator) < 0.25
        asked = scenes.asking(torch.where(wrong, other, scenes.letters))
        logits = network(_noised(self.x0[rows], sigma, generator), sigma, asked)
        return cross_entropy(logits.flatten(0, 1), scenes.places.flatten())


def roll_out(
    world: World, velocity: Velocity, decode: Callable[[Tensor], Tensor], judge: OCR, records: Sequence[Mapping[str, Any]],
    source: Source, seed: int,
) -> States:  # fmt: skip
    """All states of one rollout of each record, σ = 1 and 0 among them."""
    parts = [
        _part(world, velocity, decode, judge, records[i : i + BATCH], source, seed + i)
        for i in range(0, len(records), BATCH)
    ]
    return States.cat(parts)


def _part(
    world: World, velocity: Velocity, decode: Callable[[Tensor], Tensor], judge: OCR, records: Sequence[Mapping[str, Any]],
    source: Source, seed: int,
) -> States:  # fmt: skip
    prompts, tree = [record["prompt"] for record in records], chain(source.steps, len(records), shared_start=False)
    noise = KeyedNoise(seed, 0, [0], world.shape)
    forest: Forest = rollout(
        lambda x, sigma, root: velocity(x, sigma, [prompts[row] for row in root.tolist()]), noise.start(tree),
        plain_sigmas(source.steps, source.shift), tree, source.kernel, noise.step, keep="all",
    )  # fmt: skip
    scores, letters = read(judge, world.pictures(decode(forest.at(tree.leaves))), [r["target"] for r in records])
    row_of_root = torch.empty(len(records), dtype=torch.int64)
    row_of_root[tree.root[tree.leaves]] = torch.arange(len(records))
    nodes, rows = torch.arange(len(tree)), row_of_root[tree.root]
    sample = torch.arange(len(records))[rows]
    return States(
        forest.at(nodes), forest.sigma(nodes), world.scenes([prompts[root] for root in tree.root.tolist()]),
        scores[rows], letters[rows], sample,
    )  # fmt: skip


def read(judge: OCR, pictures: Tensor, words: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The scores [n], means over the K pictures [n, K, 3, H, W] of each word, and the letters [n, K · L] that were read in them."""
    count, each = pictures.shape[:2]
    targets = [word for word in words for _ in range(each)]
    batch = RewardBatch(
        prompts=targets, images=pictures.flatten(0, 1), metadata=[{"target": target} for target in targets]
    )
    output = score(judge, batch)
    letters = [_letters(text, len(target)) for text, target in zip(output.info, targets, strict=True)]
    return output.scores.view(count, each).mean(1), torch.tensor(letters).view(count, -1)


def _letters(info: str, length: int) -> list[int]:
    """Of `read 'KITE'`, a number for each letter; -1 each if it is not `length` capitals."""
    text = str(literal_eval(info.removeprefix("read "))).replace("0", "O").upper()
    if len(text) != length or not set(text) <= set(LETTERS):
        return [-1] * length
    return [LETTERS.index(letter) for letter in text]


def train(
    states: States, drawn: Drawn, build: Callable[[], Reader] = LetterReader, *, moved: int = 1, epochs: int = 5, batch: int = 96,
    rate: float = 2e-3, renoised: float = 0.5, seed: int = 0,
) -> Reader:  # fmt: skip
    """The network that predicts the score by least squares, so its expectation given the state, and by cross entropy the
    letters that were read, which say more than one number.

    renoised: this share of a batch are finished latents, noised again to σ < 0.7: near the data they are as good as states
    on the way, and never the same twice. drawn: as many words again: what letters look like, of which the pictures that
    OCR has read are too few. build: makes the network. moved: see World."""
    torch.manual_seed(seed)
    network, generator = build(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    finished, steps = (states.sigma == 0).nonzero().flatten(), epochs * (len(states) // batch)
    for step, rows in enumerate(_batches(len(states), batch, epochs, generator)):
        set_rate(optimizer, rate, step, steps, warmup=50)
        again = finished[torch.randint(len(finished), (int(renoised * batch),), generator=generator)]
        rows = torch.cat([again, rows[len(again) :]])
        sigma = torch.zeros(batch)
        sigma[len(again) // 4 : len(again)] = 0.7 * torch.rand(len(again) - len(again) // 4, generator=generator)
        x, sigma = _noised(states.x[rows], sigma, generator), torch.where(sigma > 0, sigma, states.sigma[rows])
        shift = torch.randint(-moved, moved + 1, (2,), generator=generator).tolist()
        scenes = states.scenes.at(rows)
        logits = network(x.roll(shift, (-2, -1)), sigma, scenes)
        squared = (network.score_of(logits, scenes) - states.score[rows]).square().mean()
        entropy = cross_entropy(logits.flatten(0, 1), states.read[rows].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        (4 * squared + entropy + 0.5 * drawn.loss(network, batch, generator)).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def _noised(x0: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """x0 [n, *] at σ [n]; σ = 0 leaves it as it is."""
    sigma = sigma.reshape(-1, *[1] * (x0.ndim - 1))
    return (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=generator)


def _batches(count: int, batch: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch * batch].split(batch)


def agreement(network: Reader, states: States) -> dict[float, tuple[float, float]]:
    """By σ, from noise to data: the correlation of predicted and final scores over all samples, and the root mean square
    error. nan where one of them is the same for all."""
    predicted = torch.cat([
        network.expected(states.x[rows], states.sigma[rows], states.scenes.at(rows))
        for rows in torch.arange(len(states)).split(256)
    ])  # fmt: skip
    found = {}
    for sigma in states.sigma.unique().flip(0).tolist():
        here = states.sigma == sigma
        pair = torch.stack([predicted[here], states.score[here]])
        error = float((pair[0] - pair[1]).square().mean().sqrt())
        found[sigma] = (float(torch.corrcoef(pair)[0, 1]), error)
    return found
