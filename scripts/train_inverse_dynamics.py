"""Make the shipped inverse dynamics models of Glyphs-Video from nothing.

`python scripts/train_inverse_dynamics.py --output flowalign/glyphs/video --card docs/results/glyphs_inverse_dynamics.md`

Trains both, each on its own clips, and writes how many actions of held-out words each recovers, in clean clips and in those of
either training. Ten minutes of one core.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from flowalign.glyphs.progress import progress_bars
from flowalign.glyphs.video import PIPELINE
from flowalign.glyphs.video.dynamics_training import (
    LAWS,
    accuracy,
    held_out_walks,
    held_out_words,
    reconstructed,
    sample_walks,
    train,
)
from flowalign.glyphs.video.inverse_dynamics import NETWORKS, read_weights, weights_file

CLIPS = 512
CARD = """\
# glyphs_inverse_dynamics

The two inverse dynamics models of Glyphs-Video (`flowalign.glyphs.video.inverse_dynamics.GlyphsInverseDynamics`): which way the word moves
between each frame and the next. `reward` is trained on (RLIR, 2509.23958: `configs/rewards/actions_glyphs_video.yaml`), `held_out`
measures what comes of it.

    python scripts/train_inverse_dynamics.py --output flowalign/glyphs/video --card docs/results/glyphs_inverse_dynamics.md

| weights | network | numbers | bytes | clips trained on | an action is the one before | degradations, each of half of the clips |
|---|---|---:|---:|---:|---:|---|
{models}

Both see words that are not held out, on random walks, in 30 % of the clips with letters that are replaced, 30 % with a word that becomes another
one, 30 % with ink that fades, and 10 % that halt now and then, where every direction is to be as probable. Half of the clips come out of the
pipeline's VAE, with noise of up to 0.7 deviations in their latents, as a generated clip's may be.

Share of the actions recovered, of {clips} clips of held-out words (chance is 0.25; one seed): of random walks, and of what the held-out prompts ask
for; clean, from the VAE with such noise, and degraded. The VAE takes two frames together and has only seen clips as prompts ask for them, so
it cannot tell all of a walk that turns between them.

| weights | {kinds} |
|---|{rules}
{figures}
"""


def main() -> None:
    """Train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the two safetensors files")
    parser.add_argument("--card", type=Path, required=True, help="file of the accuracies")
    parser.add_argument(
        "--vae", type=Path, default=PIPELINE / "vae", help="folder of the VAE whose clips are to be read"
    )
    parser.add_argument("--only", choices=[*NETWORKS, "none"], help="train this one; both are measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    vae = AutoencoderKLWan.from_pretrained(given.vae)
    show = progress_bars({weights: law.steps for weights, law in LAWS.items()})
    for weights in NETWORKS:
        if given.only not in (None, weights):
            continue
        began = time.process_time()
        network = train(weights, vae, partial(show, weights))
        state = {name: value.half() for name, value in network.state_dict().items()}
        save_file(state, given.output / weights_file(weights).name)
        print(f"{weights}: {time.process_time() - began:.0f} s of one core")
    given.card.write_text(measured(given.output, vae))


def measured(folder: Path, vae: AutoencoderKLWan) -> str:
    """The card of the two files in a folder."""
    words = held_out_words()
    models: list[str] = []
    figures: list[str] = []
    generator = torch.Generator().manual_seed(0)
    walks, asked = sample_walks(CLIPS, words, 0.25, generator, changing=0.0), held_out_walks(CLIPS)
    kinds = {
        "walks": walks,
        "walks from the VAE": reconstructed(walks, vae, generator),
        "prompts": asked,
        "prompts from the VAE": reconstructed(asked, vae, generator),
    }
    for weights, law in LAWS.items():
        kinds[f"degraded as {weights} was trained on"] = law.degrade(law.walk(CLIPS, words, generator), generator)
    for weights, law in LAWS.items():
        path = folder / weights_file(weights).name
        network = read_weights(weights, path)
        count = sum(parameter.numel() for parameter in network.parameters())
        names = ", ".join(degradation.__name__ for degradation in law.degradations)
        own = (count, path.stat().st_size, law.batch * law.steps)
        numbers = " | ".join(f"{number:,}" for number in own)
        models.append(
            f"| {weights} | {type(network).__name__} | {numbers} | {law.stay + (1 - law.stay) / 4:.2f} | {names} |"
        )
        figures.append(
            f"| {weights} | " + " | ".join(f"{accuracy(network, walks):.4f}" for walks in kinds.values()) + " |"
        )
    return CARD.format(
        models="\n".join(models),
        clips=CLIPS,
        kinds=" | ".join(kinds),
        rules="---:|" * len(kinds),
        figures="\n".join(figures),
    )


if __name__ == "__main__":
    main()
