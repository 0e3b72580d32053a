"""Make the shipped inverse dynamics models of Glyphs-Video from nothing.

`python scripts/train_inverse_dynamics.py --output flowalign/glyphs/video`

Trains both, each on its own clips, and prints how many actions of held-out words each recovers, in clean clips and in those of
either training. A few minutes of one core.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from flowalign.glyphs.progress import progress_bars
from flowalign.glyphs.video.dynamics_training import LAWS, accuracy, held_out_words, sample_walks, train
from flowalign.glyphs.video.inverse_dynamics import NETWORKS, Weights, read_weights, weights_file

CLIPS = 512


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the two safetensors files")
    parser.add_argument("--only", choices=list(NETWORKS), default=None, help="train this one; measure both")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    show = progress_bars({weights: law.steps for weights, law in LAWS.items()})
    chosen: list[Weights] = list(NETWORKS) if given.only is None else [given.only]
    for weights in chosen:
        began = time.process_time()

        def progress(step: int, loss: float, stage: str = weights) -> None:
            show(stage, step, loss)

        network = train(weights, progress)
        path = given.output / weights_file(weights).name
        save_file({name: value.half() for name, value in network.state_dict().items()}, path)
        print(f"{weights}: {path.stat().st_size:,} bytes, {time.process_time() - began:.0f} s of one core")
    words = held_out_words()
    kinds = {"clean": sample_walks(CLIPS, words, 0.25, torch.Generator().manual_seed(0), changing=0.0)}
    for law_of, law in LAWS.items():
        kinds[f"clips of {law_of}"] = law.draw(CLIPS, words, torch.Generator().manual_seed(1))
    for weights in NETWORKS:
        network = read_weights(weights, given.output / weights_file(weights).name)
        found = ", ".join(f"{kind} {accuracy(network, walks):.4f}" for kind, walks in kinds.items())
        print(f"{weights} recovers of the actions of held-out words: {found}")


if __name__ == "__main__":
    main()
