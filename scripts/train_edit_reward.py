"""Train a small EditReward on Glyphs edits, write it in the layout of the published checkpoint, and measure it as loaded.

`python scripts/train_edit_reward.py --output rewards/qwen/glyphs_edit`

Makes a Qwen2.5-VL of 64 channels with its tokenizer and templates, lets it learn to describe edits, then to rank pairs of them by
EditReward's loss. The written folder is loaded by rewards.EditReward and scores pairs of words that were not trained on,
in combinations of colors that were trained on, and in others. Six minutes of one core. `rewards.EditReward(model="glyphs")` is the one that
comes with the package.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from flowalign.glyphs import held_out_prompts, train_prompts
from flowalign.glyphs.edit.reward_checkpoint import load_folder, network_of, write_base, write_trained, write_untrained
from flowalign.glyphs.edit.reward_pairs import KINDS, draw_pairs
from flowalign.glyphs.edit.reward_training import Judged, judged, train

COLUMNS = ("overall", "instruction following", "quality")


def main() -> None:
    """Train, write, load, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the checkpoint, its base and its templates"
    )
    parser.add_argument("--steps", type=int, default=900, help="updates on pairs")
    parser.add_argument("--base-steps", type=int, default=250, help="updates on descriptions, before")
    parser.add_argument("--pairs", type=int, default=1024, help="pairs to measure of seen colors, and of unseen ones")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    write_base(arguments.output)
    write_untrained(arguments.output, arguments.seed)
    network = network_of(load_folder(arguments.output))
    words = [record["target"] for record in train_prompts()]
    train(network, words, steps=arguments.steps, base_steps=arguments.base_steps, seed=arguments.seed, report=show)
    write_trained(network, arguments.output, torch.float16)
    size = sum(parameter.numel() for parameter in network.network.parameters())
    print(f"{size:,} weights, trained in {time.process_time() - began:.0f} s of one core")
    reward, words = load_folder(arguments.output), [record["target"] for record in held_out_prompts()]
    for number, unseen in enumerate((False, True)):
        generator = torch.Generator().manual_seed(1000 * arguments.seed + 1 + number)
        found = judged(reward, draw_pairs(arguments.pairs, words, generator, unseen=unseen))
        print(f"\nheld-out words, {'unseen' if unseen else 'seen'} combinations of colors:\n")
        print(table(found))


def show(stage: str, step: int, loss: float) -> None:
    if step % 50 == 0:
        print(f"{stage}, update {step}: loss {loss:.3f}", flush=True)


def table(found: Judged) -> str:
    """Pair accuracy with its 95 % interval, a row per kind and a column per head."""
    rows = [f"| kind | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}"]
    for kind in (*KINDS, None):
        cells = (interval(*found.accuracy(column, kind)) for column in range(len(COLUMNS)))
        rows.append(f"| {kind or 'all'} | {' | '.join(cells)} |")
    rows.append(f"\nexpected calibration error of the win probability, overall: {found.calibration():.3f}")
    return "\n".join(rows)


def interval(right: int, count: int) -> str:
    """right / count and Wilson's 95 % interval; a dash where no pair has an order."""
    if count == 0:
        return "–"
    share, z = right / count, 1.96
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return f"{share:.3f} [{center - half:.3f}, {center + half:.3f}]"


if __name__ == "__main__":
    main()
