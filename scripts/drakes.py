"""Reward back-propagation in a discrete diffusion model (DRAKES, arXiv 2410.13643), on sequences of a few tokens.

`python scripts/drakes.py --output runs/drakes.json`

Trains a small denoiser on random sequences in which neighbors tend to repeat, then raises how often a motif stands in its
samples, held to the first model by the KL of the path. Prints reward and KL, and the highest value of the objective that any
model could reach; a minute on a CPU.
"""

import argparse
import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

from flowalign.distributed.processes import Processes
from flowalign.distributed.stepper import Summed
from flowalign.storage.files import write_atomic
from flowalign.toy_sequences import Drakes, MotifCount, SmallDenoiser
from samplers import generator

LENGTH, TOKENS = 8, 4


def pretrained(updates: int = 400, count: int = 256, stay: float = 0.5, seed: int = 0) -> SmallDenoiser:
    """A denoiser of sequences whose neighbors are equal with probability `stay`, else drawn anew: masked cross-entropy, by the
    weight 1/m of the evidence bound."""
    torch.manual_seed(seed)
    denoiser = SmallDenoiser(LENGTH, TOKENS)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=3e-3)
    for number in tqdm(range(updates), desc="pre-training", disable=None):
        rng = generator(seed, "data", number)
        fresh = torch.from_numpy(rng.integers(0, TOKENS, (count, LENGTH)))
        again = torch.from_numpy(rng.random((count, LENGTH))) < stay
        data = fresh.clone()
        for place in range(1, LENGTH):
            data[:, place] = torch.where(again[:, place], data[:, place - 1], fresh[:, place])
        level = torch.from_numpy(rng.random((count, 1))).clamp(min=0.1).float()
        hidden = torch.from_numpy(rng.random((count, LENGTH))) < level
        states = one_hot(torch.where(hidden, TOKENS, data), TOKENS + 1).float()
        right = denoiser(states).gather(-1, data[..., None])[..., 0]
        optimizer.zero_grad()
        (-(right * hidden / level).sum(1).mean()).backward()
        optimizer.step()
    return denoiser


def main(arguments: Sequence[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON of every iteration")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--alpha", type=float, default=0.5, help="weight of the KL to the first model")
    parser.add_argument("--relaxed", type=int, default=8, help="last steps, of 8, that carry a gradient")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    if given.iterations < 1 or not 0 < given.alpha < math.inf or not 1 <= given.relaxed <= Drakes.steps:
        parser.error(
            f"got --iterations {given.iterations} --alpha {given.alpha} --relaxed {given.relaxed}; expected at least one iteration, a "
            f"finite alpha above 0, and 1 to {Drakes.steps} relaxed steps"
        )
    denoiser = pretrained(seed=given.seed)
    before = copy.deepcopy(denoiser).requires_grad_(False)
    trainer = Drakes(
        denoiser, before, MotifCount((0, 1)), LENGTH, TOKENS, alpha=given.alpha, relaxed=given.relaxed, seed=given.seed
    )
    rows: list[dict[str, float]] = []
    steppers: dict[torch.optim.Optimizer, Summed] = {}
    for iteration in (bar := tqdm(range(given.iterations), desc="drakes", unit="it", disable=None)):
        for update in trainer.updates(iteration):  # the main loop's verbs, without a run
            stepper = steppers.setdefault(update.optimizer, Summed(update.optimizer, Processes()))
            for micro_batch in update.micro_batches:
                stepper.backward(micro_batch())
            norm = stepper.step(update.max_grad_norm)
            update.optimizer.zero_grad(set_to_none=True)
            rows.append({**update.after(), "optim/grad_norm": norm})
        bar.set_postfix_str(f"reward {rows[-1]['reward/mean']:.2f}, KL {rows[-1]['kl/path']:.2f}")
    reward, kl = (sum(row[name] for row in rows[-10:]) / len(rows[-10:]) for name in ("reward/mean", "kl/path"))
    print(f"motifs per sequence {rows[0]['reward/mean']:.2f} → {reward:.2f}, path KL {kl:.2f}")
    print(f"reward − {given.alpha:g}·KL = {reward - given.alpha * kl:.2f} of at most {trainer.highest():.2f}")
    if given.output is not None:
        write_atomic(given.output, json.dumps(rows).encode())
    return rows


if __name__ == "__main__":
    main()
