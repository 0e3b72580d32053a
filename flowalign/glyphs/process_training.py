"""Training of the Glyphs process reward: states of the base model's own rollouts, labelled by what OCR reads at their end."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flowalign.glyphs.process_reward import LetterReader, Scenes
from flowalign.glyphs.prompts import LETTERS, WORD_LENGTH, GlyphsPrompt
from flowalign.glyphs.schedule import set_rate
from rewards import OCR, RewardBatch, score
from samplers import ODE, DanceSDE, FlowSDE, Forest, Kernel, KeyedNoise, chain, plain_sigmas, rollout

Velocity = Callable[[Tensor, Tensor, Sequence[str]], Tensor]  # x [n, *], σ [n], prompts of the rows
SHAPE, BATCH = (3, 24, 48), 64


@dataclass(frozen=True)
class Source:
    """A share of the rollouts: samples, their kernel, steps and the shift of their plain grid."""

    samples: int
    kernel: Kernel
    steps: int
    shift: float


SOURCES = (
    Source(1024, ODE(), 6, 3.0),
    Source(512, DanceSDE(0.25), 10, 5.0),
    Source(384, FlowSDE(0.7), 10, 3.0),
)  # the ODE of an evaluation, Euphonium's SDE, Flow-GRPO's


@dataclass(frozen=True, eq=False)
class States:
    """N states of rollouts: x [N, 3, 24, 48] at σ [N], their scenes, the score [N] of the finished picture, the letters
    [N, 4] that were read in it (-1 where not exactly four were), and the sample [N] that each is a state of."""

    x: Tensor
    sigma: Tensor
    scenes: Scenes
    score: Tensor
    read: Tensor
    sample: Tensor

    def __len__(self) -> int:
        return len(self.x)

    @staticmethod
    def cat(parts: Sequence[States]) -> States:
        """All of them; samples are numbered on."""
        first = [sum(int(part.sample.max()) + 1 for part in parts[:number]) for number in range(len(parts))]
        scenes = Scenes(*(torch.cat([vars(p.scenes)[n] for p in parts]) for n in ("letters", "ink", "paper")))
        x, sigma, of, read = (torch.cat([vars(p)[n] for p in parts]) for n in ("x", "sigma", "score", "read"))
        return States(x, sigma, scenes, of, read, torch.cat([p.sample + f for p, f in zip(parts, first, strict=True)]))


@dataclass(frozen=True, eq=False)
class Drawn:
    """Words as the renderer draws them: latents [N, 3, 24, 48] without noise, and their scenes."""

    x0: Tensor
    scenes: Scenes

    def loss(self, network: LetterReader, batch: int, generator: torch.Generator) -> Tensor:
        """Cross entropy of the drawn letters from `batch` of them, noised. A quarter of their letters is asked for as
        another one, so that what is asked for does not say what is there."""
        rows = torch.randint(len(self.x0), (batch,), generator=generator)
        scenes, sigma = self.scenes.at(rows), torch.rand(batch, generator=generator)
        other = torch.randint(len(LETTERS), scenes.letters.shape, generator=generator)
        wrong = torch.rand(scenes.letters.shape, generator=generator) < 0.25
        asked = Scenes(torch.where(wrong, other, scenes.letters), scenes.ink, scenes.paper)
        logits = network(_noised(self.x0[rows], sigma, generator), sigma, asked)
        return cross_entropy(logits.flatten(0, 1), scenes.letters.flatten())


def roll_out(
    velocity: Velocity, decode: Callable[[Tensor], Tensor], judge: OCR, records: Sequence[GlyphsPrompt], source: Source,
    seed: int,
) -> States:  # fmt: skip
    """All states of one rollout of each record, σ = 1 and 0 among them."""
    parts = [
        _part(velocity, decode, judge, records[i : i + BATCH], source, seed + i) for i in range(0, len(records), BATCH)
    ]
    return States.cat(parts)


def _part(
    velocity: Velocity, decode: Callable[[Tensor], Tensor], judge: OCR, records: Sequence[GlyphsPrompt], source: Source,
    seed: int,
) -> States:  # fmt: skip
    prompts, tree = [record["prompt"] for record in records], chain(source.steps, len(records), shared_start=False)
    noise = KeyedNoise(seed, 0, [0], SHAPE)
    forest: Forest = rollout(
        lambda x, sigma, root: velocity(x, sigma, [prompts[row] for row in root.tolist()]), noise.start(tree),
        plain_sigmas(source.steps, source.shift), tree, source.kernel, noise.step, keep="all",
    )  # fmt: skip
    images = decode(forest.at(tree.leaves))
    metadata = [{"target": record["target"]} for record in records]
    output = score(judge, RewardBatch(prompts=prompts, images=images, metadata=metadata))
    row_of_root = torch.empty(len(records), dtype=torch.int64)
    row_of_root[tree.root[tree.leaves]] = torch.arange(len(records))
    nodes, rows = torch.arange(len(tree)), row_of_root[tree.root]
    letters = torch.tensor([_letters(text) for text in output.info])
    sample = torch.arange(len(records))[rows]
    return States(
        forest.at(nodes), forest.sigma(nodes), Scenes.of([prompts[root] for root in tree.root.tolist()]),
        output.scores[rows, 0], letters[rows], sample,
    )  # fmt: skip


def _letters(info: str) -> list[int]:
    """Of `read 'KITE'`, four numbers; -1 each if it is not four capitals."""
    text = str(literal_eval(info.removeprefix("read "))).replace("0", "O").upper()
    if len(text) != WORD_LENGTH or not set(text) <= set(LETTERS):
        return [-1] * WORD_LENGTH
    return [LETTERS.index(letter) for letter in text]


def train(
    states: States, drawn: Drawn, *, epochs: int = 5, batch: int = 96, rate: float = 2e-3, renoised: float = 0.5,
    seed: int = 0,
) -> LetterReader:  # fmt: skip
    """The network that predicts the score by least squares, so its expectation given the state, and by cross entropy the
    letters that were read, which say more than one number.

    renoised: this share of a batch are finished latents, noised again to σ < 0.7: near the data they are as good as states
    on the way, and never the same twice. drawn: as many words again: what letters look like, of which the pictures that
    OCR has read are too few. All are moved by up to one pixel."""
    torch.manual_seed(seed)
    network, generator = LetterReader(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.05)
    finished, steps = (states.sigma == 0).nonzero().flatten(), epochs * (len(states) // batch)
    for step, rows in enumerate(_batches(len(states), batch, epochs, generator)):
        set_rate(optimizer, rate, step, steps, warmup=50)
        again = finished[torch.randint(len(finished), (int(renoised * batch),), generator=generator)]
        rows = torch.cat([again, rows[len(again) :]])
        sigma = torch.zeros(batch)
        sigma[len(again) // 4 : len(again)] = 0.7 * torch.rand(len(again) - len(again) // 4, generator=generator)
        x, sigma = _noised(states.x[rows], sigma, generator), torch.where(sigma > 0, sigma, states.sigma[rows])
        moved = torch.randint(-1, 2, (2,), generator=generator).tolist()
        scenes = states.scenes.at(rows)
        logits = network(x.roll(moved, (2, 3)), sigma, scenes)
        squared = (network.score_of(logits, scenes) - states.score[rows]).square().mean()
        entropy = cross_entropy(logits.flatten(0, 1), states.read[rows].flatten(), ignore_index=-1)
        optimizer.zero_grad()
        (4 * squared + entropy + 0.5 * drawn.loss(network, batch, generator)).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def _noised(x0: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """x0 [n, *] at σ [n]; σ = 0 leaves it as it is."""
    sigma = sigma[:, None, None, None]
    return (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=generator)


def _batches(count: int, batch: int, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[: count // batch * batch].split(batch)


def agreement(network: LetterReader, states: States) -> dict[float, tuple[float, float]]:
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
