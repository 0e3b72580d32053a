"""Make the shipped process reward of Glyphs from nothing.

`python scripts/train_process_reward.py --output flowalign/glyphs/process_reward.safetensors`

Rolls the base model out, lets OCR read what comes of it, trains the network on all states on the way, and prints how far
it agrees with the outcome on held-out words. Two and a half minutes of one core, and one more for the last part.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from flowalign.data import as_records
from flowalign.glyphs import PIPELINE, held_out_prompts, train_prompts
from flowalign.glyphs.pretrain import sample_batch, scaled_latents
from flowalign.glyphs.process_reward import Scenes
from flowalign.glyphs.process_training import SOURCES, Drawn, Source, States, agreement, roll_out, train
from flowalign.models import load_policy
from rewards import OCR, close
from samplers import ODE, DanceSDE

DRAWN = 4096
HELD_OUT = (Source(256, ODE(), 6, 3.0), Source(256, DanceSDE(0.25), 10, 5.0))


def main() -> None:
    """Roll out, train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="safetensors file of the weights")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    policy, judge = load_policy("glyphs", trainable="none"), OCR(metric="soft", fold={"0": "O"})

    def velocity(x: Tensor, sigma: Tensor, prompts: Sequence[str]) -> Tensor:
        return policy.velocity(x, sigma, policy.encode(as_records(prompts)))

    began = time.process_time()
    records, first, parts = train_prompts(), 0, []
    for number, source in enumerate(SOURCES):
        chosen = [records[(first + i) % len(records)] for i in range(source.samples)]
        first += source.samples
        parts.append(roll_out(velocity, policy.decode, judge, chosen, source, 1000 * number))
    states = States.cat(parts)
    rolled = time.process_time()
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    words = sample_batch(DRAWN, torch.Generator().manual_seed(0))
    latents = torch.cat([scaled_latents(vae, pictures) for pictures in words.pictures.split(256)])
    network = train(states, Drawn(latents, Scenes.of(words.prompts)), epochs=arguments.epochs)
    print(
        f"{len(states):,} states in {rolled - began:.0f} s, trained in {time.process_time() - rolled:.0f} s of one core"
    )
    save_file({name: value.half() for name, value in network.state_dict().items()}, arguments.output)
    for number, source in enumerate(HELD_OUT):
        held_out = held_out_prompts()[: source.samples]
        found = agreement(network, roll_out(velocity, policy.decode, judge, held_out, source, 10**6 + 1000 * number))
        print(f"held out, {source.kernel}, {source.steps} steps:")
        for sigma, (correlation, error) in found.items():
            print(f"  σ {sigma:.3f}: correlation with the outcome {correlation:.2f}, error {error:.2f}")
    close(judge)


if __name__ == "__main__":
    main()
