"""Make the shipped process reward of a Glyphs world from nothing.

`python scripts/train_process_reward.py --output flowalign/glyphs/process_reward.safetensors`
`python scripts/train_process_reward.py --world glyphs_video --output flowalign/glyphs/video/process_reward.safetensors
    --card docs/results/glyphs_video_process.md`

Rolls the base model out, lets OCR read what comes of it, trains the network on all states on the way, and prints how far
it agrees with the outcome on held-out words. Two and a half minutes of one core for Glyphs, and one more for the last part.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flowalign.data import as_records
from flowalign.glyphs.process_training import States, agreement, roll_out, train
from flowalign.glyphs.process_worlds import WORLDS
from flowalign.models import load_policy
from rewards import OCR, close

CARD = """\
# {world}_process

The process reward of {world}: the expected OCR score (metric soft) of what a noisy state becomes, for reward guidance and for credit
(Euphonium, 2602.04928).

    {command}

{numbers:,} numbers, {bytes:,} bytes. Trained on {states:,} states of {samples:,} rollouts of the base model ({rolled:.0f} s) in {trained:.0f} s
of one core, one seed.

Held out words, by the noise level σ of the state: correlation of the prediction with the outcome, and root mean square error.

{figures}
"""


def main() -> None:
    """Roll out, train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=list(WORLDS), default="glyphs")
    parser.add_argument("--output", type=Path, required=True, help="safetensors file of the weights")
    parser.add_argument("--card", type=Path, help="file of the agreement")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = WORLDS[arguments.world]
    policy = load_policy(world.policy, trainable="none", max_sequence_length=world.max_sequence_length)
    judge = OCR(metric="soft", fold={"0": "O"})

    def velocity(x: Tensor, sigma: Tensor, prompts: Sequence[str]) -> Tensor:
        return policy.velocity(x, sigma, policy.encode(as_records(prompts)))

    began = time.process_time()
    records, first, parts = world.records(), 0, []
    for number, source in enumerate(world.sources):
        chosen = [records[(first + i) % len(records)] for i in range(source.samples)]
        first += source.samples
        parts.append(roll_out(world, velocity, policy.decode, judge, chosen, source, 1000 * number))
    states = States.cat(parts)
    rolled = time.process_time()
    network = train(states, world.drawn(), world.network, moved=world.moved, epochs=arguments.epochs)
    trained = time.process_time()
    print(f"{len(states):,} states in {rolled - began:.0f} s, trained in {trained - rolled:.0f} s of one core")
    weights = {name: value.half() for name, value in network.state_dict().items()}
    save_file(weights, arguments.output)
    figures = []
    for number, source in enumerate(world.held_out):
        held_out = world.held_out_records()[: source.samples]
        seed = 10**6 + 1000 * number
        found = agreement(network, roll_out(world, velocity, policy.decode, judge, held_out, source, seed))
        figures.append(table(f"{source.kernel}, {source.steps} steps, {len(held_out)} samples", found))
        print(figures[-1])
    close(judge)
    if arguments.card is not None:
        command = f"python scripts/train_process_reward.py --world {arguments.world} --output {arguments.output} --card {arguments.card}"
        text = CARD.format(
            world=arguments.world,
            command=command,
            numbers=sum(value.numel() for value in weights.values()),
            bytes=arguments.output.stat().st_size,
            states=len(states),
            samples=sum(source.samples for source in world.sources),
            rolled=rolled - began,
            trained=trained - rolled,
            figures="\n\n".join(figures),
        )
        arguments.card.write_text(text, encoding="utf-8")


def table(title: str, found: dict[float, tuple[float, float]]) -> str:
    """Markdown: correlation and error by σ."""
    rows = [f"| {sigma:.3f} | {correlation:.2f} | {error:.2f} |" for sigma, (correlation, error) in found.items()]
    return "\n".join([f"{title}:", "", "| σ | correlation | error |", "|---:|---:|---:|", *rows])


if __name__ == "__main__":
    main()
