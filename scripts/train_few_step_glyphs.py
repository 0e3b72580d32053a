"""Make the shipped few-step Glyphs generators from the base.

`python scripts/train_few_step_glyphs.py --output flowalign/glyphs`

Draws pairs (start noise, sample) of the base's guided ODE, trains a copy of its transformer on them for each number of
steps, and writes the pipelines `pipeline_4step` and `pipeline_1step` with a card of what they can do beside the base. Only the
transformer is trained; the encoders and the VAE are the base's files. Stop it at any time; the same command goes on.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

import flowalign as fa
from flowalign.data import PromptRecord, load_prompts
from flowalign.glyphs import FEW_STEP, FEW_STEP_SCHEDULE, PIPELINE
from flowalign.glyphs.few_step_card import few_step_card
from flowalign.glyphs.few_step_training import FewStepRecipe, Student, make_pairs, train_few_step
from flowalign.glyphs.progress import progress_bars
from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.models import Policy
from flowalign.models.sampling import sample
from flowalign.storage.files import write_atomic
from rewards import OCR, CLIPScore, ColorAccuracy
from samplers import Schedule

TEACHER_STEPS, TEACHER_GUIDANCE = 6, 3.0  # where the base writes best


def main() -> None:
    """Pairs, then for each number of steps a generator, its folder and its card."""
    recipe = FewStepRecipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipelines' folders")
    parser.add_argument("--checkpoints", type=Path, default=Path("runs/few_step_glyphs"), help="resumed if present")
    parser.add_argument("--steps", type=int, nargs="*", default=list(FEW_STEP), help="of the generators")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    base = fa.load_policy("glyphs", trainable="none")

    def teacher(noise: Tensor, prompts: Sequence[str]) -> Tensor:
        return sample(base, base.encode(_records(prompts), negative=True), noise, TEACHER_STEPS, TEACHER_GUIDANCE)

    totals = {"pairs": recipe.pairs // recipe.shard, **{f"{steps} steps": recipe.steps for steps in arguments.steps}}
    show = progress_bars(totals)
    pairs = make_pairs(teacher, base.latent_shape(fa.Size(24, 48)), recipe, arguments.checkpoints, show)
    figures = {f"base, {steps} steps": measure(base, steps) for steps in (*arguments.steps, TEACHER_STEPS)}
    figures[f"base, {TEACHER_STEPS} steps, guidance {TEACHER_GUIDANCE:g}"] = measure(
        base, TEACHER_STEPS, TEACHER_GUIDANCE
    )
    for steps in arguments.steps:
        policy = fa.load_policy("glyphs", trainable="full")
        network = policy.modules()["transformer"]
        train_few_step(network, _velocity(policy), pairs, steps, recipe, arguments.checkpoints, show)
        folder = arguments.output / f"pipeline_{steps}step"
        export(network, folder)
        made = fa.load_policy(str(folder), trainable="none")
        own = {f"this one, {steps} step{'s' * (steps > 1)}": measure(made, steps, schedule=FEW_STEP_SCHEDULE)}
        card = few_step_card(
            steps,
            {**asdict(recipe), "teacher_steps": TEACHER_STEPS, "teacher_guidance": TEACHER_GUIDANCE},
            {**own, **figures},
        )
        write_atomic(folder / "README.md", card.encode())


def measure(
    policy: Policy, steps: int, guidance_scale: float = 1.0, schedule: Schedule | None = None
) -> dict[str, float]:
    """Means over all held-out prompts, by reward."""
    rewards = [
        OCR(metric="exact", fold={"0": "O"}, name="ocr_exact"),
        ColorAccuracy({**INKS, **PAPERS}, metric="both"),
        CLIPScore("glyphs"),
    ]
    prompts = load_prompts("flowalign.glyphs:held_out_prompts")
    result = fa.evaluate(
        policy, prompts, rewards, num_inference_steps=steps, guidance_scale=guidance_scale, size=fa.Size(24, 48),
        schedule=schedule, batch_size=64,
    )  # fmt: skip
    means = {name: float(scores.mean()) for name, scores in result.scores.items()}
    print(f"{steps} steps, guidance {guidance_scale:g}: {means}", flush=True)
    return means


def export(network: SD3Transformer2DModel, folder: Path) -> None:
    """The base's folder with another transformer, in fp16, and a scheduler that takes `sigmas` as they are."""
    shutil.copytree(PIPELINE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("transformer", "README.md"))
    network.to(dtype=torch.float16).save_pretrained(folder / "transformer")
    shutil.copy(
        PIPELINE / "transformer" / "config.json", folder / "transformer"
    )  # the one written names this machine's folder
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "shift": 1.0}, indent=2, sort_keys=True) + "\n")


def _velocity(policy: Policy) -> Student:
    def velocity(x: Tensor, sigma: Tensor, prompts: Sequence[str]) -> Tensor:
        return policy.velocity(x, sigma, policy.encode(_records(prompts)))

    return velocity


def _records(prompts: Sequence[str]) -> list[PromptRecord]:
    return [PromptRecord(uid, prompt) for uid, prompt in enumerate(prompts)]


if __name__ == "__main__":
    main()
