"""Make the shipped CLIP of Glyphs, `CLIPScore("glyphs")`, from nothing.

`python scripts/train_glyphs_clip.py --output rewards/image/glyphs_clip`

Lets the base model draw, and OCR read, 2048 pictures of training prompts; trains on them and on drawn ones; exports
an open_clip folder in fp16; measures it on held-out words and writes its README.md. About 20 minutes of one idle
core. Stop it at any time; the same command goes on from the last checkpoint.
"""

import argparse
import os
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from tqdm import tqdm

from flowalign.glyphs import GUIDANCE_SCALE, LOAD_ARGS, PIPELINE, STEPS, held_out_prompts, train_prompts
from flowalign.glyphs.clip_checkpoint import PIXELS, clip_card, configuration, export, untrained
from flowalign.glyphs.clip_figures import clip_figures
from flowalign.glyphs.clip_training import ClipRecipe, Samples, is_held_out, scenes_of, train_clip
from flowalign.glyphs.judge import read_words, sample_pictures
from flowalign.glyphs.parts import TOKENS, build_tokenizer
from flowalign.glyphs.prompts import LETTERS, WORD_LENGTH
from flowalign.glyphs.renderer import indexed
from rewards import OCR, RewardBatch, close, score
from rewards.image.clip import load_clip

SAMPLED = ((1, 1.0), (2, 2.0))  # seed and guidance scale: each draws every training prompt once
TRUSTED = 0.9  # geometric mean probability of a letter
MEASURED, MEASURED_SEED = 128, 0  # the base model's samples of held-out prompts


def main() -> None:
    """Sample, train, export, measure what was exported, write the card."""
    recipe = ClipRecipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the network")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/train_glyphs_clip"), help="resumed if present")
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--seed", type=int, default=recipe.seed)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    recipe = replace(recipe, steps=arguments.steps, seed=arguments.seed)
    arguments.checkpoints.mkdir(parents=True, exist_ok=True)
    samples = collect(arguments.checkpoints / "samples.pt")
    tokenizer = build_tokenizer()
    config = configuration(tokenizer)
    network = untrained(config, recipe.seed)

    def tokens(prompts: list[str]) -> Tensor:
        return tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids

    with tqdm(total=recipe.steps) as bar:

        def progress(step: int, loss: float, found: float) -> None:
            bar.update(step - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", found=f"{found:.2f}")

        train_clip(network, tokens, PIXELS, samples, recipe, arguments.checkpoints / "clip.pt", progress)
    export(network, config, tokenizer, arguments.output)
    found = clip_figures(load_clip(str(arguments.output), None, torch.float32), base_samples())
    print(found)
    parameters = sum(value.numel() for value in network.parameters())
    card = clip_card(found, asdict(recipe), parameters, float(samples.trusted.float().mean()), MEASURED)
    (arguments.output / "README.md").write_text(card, encoding="utf-8")


def collect(file: Path) -> Samples:
    """The base model's samples of all training prompts with what OCR reads in them; kept in `file`."""
    if not file.exists():
        prompts = [record["prompt"] for record in train_prompts()]
        pictures = torch.cat([sample_pictures(base(), prompts, STEPS, scale, seed=seed) for seed, scale in SAMPLED])
        asked = scenes_of(prompts * len(SAMPLED))
        words = read_words(pictures)
        four = torch.tensor([len(word) == WORD_LENGTH and {*word} <= {*LETTERS} for word in words])
        targets = [word if is_four else "AAAA" for word, is_four in zip(words, four.tolist(), strict=True)]
        read = asked.clone()
        read[:, :WORD_LENGTH] = indexed(targets)
        judge = OCR(metric="soft", fold={"0": "O"})
        batch = RewardBatch(prompts=targets, images=pictures, metadata=[{"target": word} for word in targets])
        confident = score(judge, batch).scores[:, 0] > TRUSTED
        close(judge)
        trusted = four & confident & ~is_held_out(read)
        torch.save({"pictures": pictures, "asked": asked, "read": read, "trusted": trusted}, file.with_suffix(".tmp"))
        os.replace(file.with_suffix(".tmp"), file)
    return Samples(**torch.load(file, weights_only=True))


def base_samples() -> Tensor:
    """The base model's pictures of the first held-out prompts."""
    prompts = [record["prompt"] for record in held_out_prompts()[:MEASURED]]
    return sample_pictures(base(), prompts, STEPS, GUIDANCE_SCALE, seed=MEASURED_SEED)


@cache
def base() -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE, **LOAD_ARGS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


if __name__ == "__main__":
    main()
