"""Measure noise optimization on Glyphs: docs/results/glyphs_noise.json and .md.

`python scripts/noise_table.py --output docs/results/glyphs_noise`

32 held-out prompts, the one-step and the four-step generator. Each method raises the score of the shipped CLIP; OCR and colors
are held out. Then searches raise the OCR score itself, which has no gradient, and CLIP is held out. Last, memory and seconds of
an iteration with and without checkpointing, at the size of the shipped network and at a larger one.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import flowalign as fa
from flowalign.data import load_prompts
from flowalign.evaluation.paired_gain import paired_gain
from flowalign.glyphs.prompts import INKS, PAPERS
from flowalign.noise_optimization.objective import Method
from flowalign.storage.files import write_atomic
from rewards import OCR, Augmented, CLIPScore, ColorAccuracy, Reward

PROMPTS = 32
COST_PROMPTS = 128  # at once, so that an iteration needs more than loading did
FOLD = {"0": "O"}


def clip() -> Reward:
    return CLIPScore("glyphs")


def augmented() -> Reward:
    """In three views: what only the pixels of one of them explain counts less."""
    return Augmented(clip(), views=3)


def soft() -> Reward:
    return OCR(metric="soft", fold=FOLD, name="ocr_soft")


def others() -> list[Reward]:
    return [OCR(metric="exact", fold=FOLD, name="ocr_exact"), ColorAccuracy({**INKS, **PAPERS}, metric="both")]


@dataclass(frozen=True)
class Arm:
    """One line of the table. trained, held_out: rewards, made anew for each."""

    label: str
    path: str
    method: Method
    steps: int
    trained: Callable[[], Reward]
    held_out: Callable[[], list[Reward]]


def arms() -> list[Arm]:
    by_clip = (clip, lambda: [soft(), *others()])
    by_ocr = (soft, lambda: [clip(), *others()])
    one, four = "glyphs-1step", "glyphs-4step"
    searches = [
        ("zero-order, 50 samples", fa.ZeroOrder(neighbors=5), 10),
        ("SPSA, 153 samples", fa.SPSA(directions=4), 17),
    ]
    return [
        Arm("ReNO, 20 iterations", one, fa.Gradient(), 20, *by_clip),
        Arm("best of 20 (equal forwards)", one, fa.BestOfN(), 20, *by_clip),
        Arm("best of 60 (a backward counted as two)", one, fa.BestOfN(), 60, *by_clip),
        Arm("ReNO, 50 iterations", one, fa.Gradient(), 50, *by_clip),
        Arm("ReNO, 50 iterations, three views of each image", one, fa.Gradient(), 50, augmented, by_clip[1]),
        Arm("best of 50 (equal forwards)", one, fa.BestOfN(), 50, *by_clip),
        Arm("best of 150 (a backward counted as two)", one, fa.BestOfN(), 150, *by_clip),
        *(Arm(label, one, method, steps, *by_clip) for label, method, steps in searches),
        Arm("ReNO, 20 iterations", four, fa.Gradient(), 20, *by_clip),
        Arm("best of 20 (equal forwards)", four, fa.BestOfN(), 20, *by_clip),
        Arm("ReNO, 50 iterations", four, fa.Gradient(), 50, *by_clip),
        Arm("best of 50 (equal forwards)", four, fa.BestOfN(), 50, *by_clip),
        Arm("preview-select, 204 forwards", four, fa.PreviewSelect(candidates=12, keep=2), 10, *by_clip),
        Arm("path search", four, fa.PathSearch(), 4, *by_clip),
        Arm("best of 50", one, fa.BestOfN(), 50, *by_ocr),
        *(Arm(label, one, method, steps, *by_ocr) for label, method, steps in searches),
    ]


def main() -> None:
    """All arms, then the costs, then the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="path of the .json and .md without its ending")
    parser.add_argument("--cost", choices=["plain", "checkpoint"], help="measures one cost in a process of its own")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.cost:
        print(json.dumps(cost(arguments.cost == "checkpoint")))
        return
    path = arguments.output.with_suffix(".json")
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"arms": {}}
    for arm in arms():
        key = f"{arm.path}, {arm.trained().name}: {arm.label}"
        if key not in found["arms"]:
            found["arms"][key] = measure(arm)
            write_atomic(path, json.dumps(found, indent=1).encode())
            print(key, json.dumps(found["arms"][key]["gain"]), flush=True)
    if "cost" not in found:
        command = [sys.executable, __file__, "--output", str(arguments.output), "--cost"]
        found["cost"] = {
            kind: json.loads(subprocess.run([*command, kind], check=True, capture_output=True, text=True).stdout)
            for kind in ("plain", "checkpoint")
        }
        write_atomic(path, json.dumps(found, indent=1).encode())
    write_atomic(arguments.output.with_suffix(".md"), table(found).encode())


def measure(arm: Arm) -> dict[str, Any]:
    """The gains of an arm over the start, on the same prompts and noise."""
    policy, prompts = (
        fa.load_policy(arm.path, trainable="none"),
        load_prompts("flowalign.glyphs:held_out_prompts")[:PROMPTS],
    )
    trained = arm.trained()
    result = fa.optimize_noise(
        policy, prompts, trained, steps=arm.steps, method=arm.method, held_out=arm.held_out(), batch_size=16
    )  # fmt: skip
    pairs = {trained.name: (result.first_total, result.total), **result.held_out}
    gains = {name: paired_gain(first.double(), best.double()) for name, (first, best) in pairs.items()}
    return {
        "evaluations_per_prompt": result.evaluations / PROMPTS,
        "samples_per_prompt": result.decoded / PROMPTS,
        "seconds_per_prompt": result.seconds / PROMPTS,
        "encoded": policy.encoded,
        "norm": [float(noise.flatten(1).norm(dim=1).mean()) for noise in (result.start, result.noise)],
        "gain": {
            name: {
                "first": gain.base,
                "best": gain.tuned,
                "gain": gain.mean,
                "ci95": gain.interval,
                "wins": gain.wins,
                "losses": gain.losses,
            }
            for name, gain in gains.items()
        },
    }


def cost(checkpoint: bool) -> dict[str, Any]:
    """Seconds of an iteration of COST_PROMPTS prompts at once, and by how much its process grew."""
    policy, prompts = (
        fa.load_policy("glyphs-4step", trainable="none"),
        load_prompts("flowalign.glyphs:held_out_prompts")[:COST_PROMPTS],
    )
    reward, iterations = clip(), 3
    fa.optimize_noise(policy, prompts[:1], reward, steps=1, checkpoint=checkpoint, progress=False)  # loads everything
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = fa.optimize_noise(
        policy, prompts, reward, steps=iterations, checkpoint=checkpoint, batch_size=COST_PROMPTS, progress=False
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds_per_iteration": result.seconds / iterations, "mib": grown / 1024, "total": result.total.tolist()}


def table(found: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Noise optimization on Glyphs",
        "",
        f"`python scripts/noise_table.py`: {PROMPTS} held-out prompts, one sample each, the weights as shipped. Gains are of the best",
        "image over the first, which all methods share, with a 95 % paired bootstrap interval over prompts. Forwards are network rows per",
        "prompt; ReNO's backward comes on top. Seconds per prompt: one core, batches of 16 prompts, other work beside it.",
        f"Texts encoded by the policy, counted: {', '.join(str(n) for n in sorted({row['encoded'] for row in found['arms'].values()}))} in each arm.",
    ]
    for heading, path, trained in (
        ("One-step generator, CLIPScore optimized", "glyphs-1step", "clip_score"),
        ("Four-step generator, CLIPScore optimized", "glyphs-4step", "clip_score"),
        ("One-step generator, soft OCR optimized (no gradient)", "glyphs-1step", "ocr_soft"),
    ):
        rows = {
            key.split(": ", 1)[1]: row for key, row in found["arms"].items() if key.startswith(f"{path}, {trained}: ")
        }
        names = list(next(iter(rows.values()))["gain"])
        first = next(iter(rows.values()))["gain"]
        lines += [
            "",
            f"## {heading}",
            "",
            "First image: " + ", ".join(f"{name} {first[name]['first']:.3f}" for name in names) + ".",
            "",
        ]
        lines += [
            "| method | forwards | " + " | ".join(names) + " | ‖noise‖ | s |",
            "|---|---:|" + "---:|" * (len(names) + 2),
        ]
        lines += [
            f"| {label} | {row['evaluations_per_prompt']:.0f} | " + " | ".join(_gain(row["gain"][name]) for name in names)
            + f" | {row['norm'][0]:.1f} → {row['norm'][1]:.1f} | {row['seconds_per_prompt']:.1f} |"
            for label, row in rows.items()
        ]  # fmt: skip
    plain, lean = found["cost"]["plain"], found["cost"]["checkpoint"]
    lines += [
        "", "## Checkpointing", "",
        f"The four-step generator, {COST_PROMPTS} prompts at once, each in a process of its own: an iteration of {plain['seconds_per_iteration']:.1f} s "
        f"becomes one of {lean['seconds_per_iteration']:.1f} s, and the process grows by {lean['mib']:.0f} MiB in place of {plain['mib']:.0f}. "
        f"The totals {'are equal' if plain['total'] == lean['total'] else 'differ'}, bit for bit.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _gain(gain: dict[str, Any]) -> str:
    low, high = gain["ci95"]
    return f"{gain['gain']:+.3f} [{low:+.3f}, {high:+.3f}]"


if __name__ == "__main__":
    main()
