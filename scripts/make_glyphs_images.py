"""Make images for the methods that train on files, on Glyphs: `python scripts/make_glyphs_images.py --output runs/glyphs_images`

Writes OUTPUT/pairs.jsonl, of each training prompt the best and the worst of a few samples of the base model as OCR reads them
(offline Diffusion-DPO), and OUTPUT/rendered.jsonl, each prompt as the renderer draws it (supervised fine-tuning). About two
minutes of one core.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import save_image
from tqdm import tqdm

from flowalign.glyphs import parse_prompt, train_prompts
from flowalign.glyphs.renderer import JITTER, render
from flowalign.models import load_policy
from rewards import OCR, RewardBatch, close

GAP = 0.1  # of OCR's soft reward: below it two images are no pair


def main(arguments: Sequence[str] | None = None) -> None:
    """Sample, judge, render, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=4, help="of each prompt, of which a pair is chosen")
    given = parser.parse_args(arguments)
    if given.samples < 2:
        parser.error(f"got --samples {given.samples}; expected at least 2, of which the best and the worst are a pair")
    torch.set_num_threads(1)
    (given.output / "images").mkdir(parents=True, exist_ok=True)
    _write(given.output / "pairs.jsonl", _pairs(given.output, given.samples))
    _write(given.output / "rendered.jsonl", _rendered(given.output))


def _pairs(folder: Path, samples: int) -> list[dict[str, str]]:
    """A row of each prompt whose best and worst sample are far enough apart; other samples are not kept."""
    policy, judge = load_policy("glyphs", trainable="none"), OCR(metric="soft", fold={"0": "O"})
    judge.load()
    rows = []
    for number, record in enumerate(tqdm(train_prompts(), "pairs", mininterval=5)):
        images = policy.generate([record["prompt"]] * samples, seed=number)
        batch = RewardBatch(prompts=list(images.prompts), metadata=[dict(record)] * samples, images=images.pixels)
        scores = judge(batch).scores
        best, worst = int(scores.argmax()), int(scores.argmin())
        if scores[best] - scores[worst] >= GAP:
            files = {
                kind: _save(images.pixels[row], folder, f"{number}-{kind}")
                for kind, row in (("chosen", best), ("rejected", worst))
            }
            rows.append({"prompt": record["prompt"], **files})
    close(judge)
    return rows


def _rendered(folder: Path) -> list[dict[str, str]]:
    """A row of each prompt."""
    prompts = [record["prompt"] for record in train_prompts()]
    words, inks, papers = zip(*map(parse_prompt, prompts), strict=True)
    offsets = torch.randint(-JITTER, JITTER + 1, (len(prompts), 2), generator=torch.Generator().manual_seed(0))
    pictures = render(words, inks, papers, offsets)
    return [
        {"prompt": prompt, "image": _save(picture, folder, f"{number}-rendered")}
        for number, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True))
    ]


def _save(picture: Tensor, folder: Path, name: str) -> str:
    """The path from `folder` of a picture [3, H, W]."""
    save_image(picture, folder / "images" / f"{name}.png")
    return f"images/{name}.png"


def _write(file: Path, rows: Sequence[dict[str, str]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    print(f"{len(rows)} rows: {file}")


if __name__ == "__main__":
    main()
