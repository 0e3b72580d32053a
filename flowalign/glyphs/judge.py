"""Figures of a Glyphs pipeline for its model card and its tests: shares of words, letters and colors that are right.

Apart from rewards.OCR and rewards.ColorAccuracy on purpose: the quality of the base is measured without the rewards that
train on it, with shares of letters in their place, which no reward has, and the base's own making imports no reward. Only
RapidOCR's recognizer is used: a picture enlarged twice (nearest) has exactly the 48 rows that the recognizer needs. All of
500 ground-truth renders were read exactly, "0" counting as "O".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from rapidocr import RapidOCR
from torch import Tensor

from flowalign.glyphs import CALL_ARGS
from flowalign.glyphs.prompts import INKS, PAPERS, GlyphsPrompt
from flowalign.glyphs.renderer import palette


@dataclass(frozen=True)
class Figures:
    """Shares in [0, 1]: words read exactly, letters right in their place, ink and paper both right."""

    exact: float
    letters: float
    colors: float


def sample_pictures(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[str],
    steps: int,
    guidance_scale: float,
    *,
    seed: int = 0,
    batch_size: int = 128,
) -> Tensor:
    """Pictures [N, 3, 24, 48] in [0, 1], one per prompt; the noise depends on the seed and the place alone."""
    return in_batches(pipeline, {"prompt": prompts}, steps, guidance_scale, CALL_ARGS, seed, batch_size)


def in_batches(
    pipeline: DiffusionPipeline, inputs: Mapping[str, Sequence[object]], steps: int, guidance_scale: float,
    call_args: Mapping[str, object], seed: int, batch_size: int,
) -> Tensor:  # fmt: skip
    """The pictures or videos in [0, 1] of `inputs`, arguments of the pipeline's call with a value for each; call_args: the others. The
    noise depends on the seed and the place alone."""
    generator = torch.Generator().manual_seed(seed)
    call = {**call_args, "num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
    made = []
    for start in range(0, len(inputs["prompt"]), batch_size):
        batch = {name: list(values[start : start + batch_size]) for name, values in inputs.items()}
        made.append(pipeline(**batch, **call, generator=generator, return_dict=False)[0].float())
    return torch.cat(made)


def judge(pictures: Tensor, records: Sequence[GlyphsPrompt]) -> Figures:
    """Compares pictures [N, 3, 24, 48] in [0, 1] with what their prompts ask for."""
    words = read_words(pictures)
    targets = [record["target"] for record in records]
    letters = [
        sum(a == b for a, b in zip(word, target, strict=False)) / len(target)
        for word, target in zip(words, targets, strict=True)
    ]
    colors = [
        found == (record["ink"], record["paper"]) for found, record in zip(name_colors(pictures), records, strict=True)
    ]
    exact = [word == target for word, target in zip(words, targets, strict=True)]
    return Figures(float(np.mean(exact)), float(np.mean(letters)), float(np.mean(colors)))


def read_words(pictures: Tensor) -> list[str]:
    """The words read in pictures [N, 3, H, W] in [0, 1], with "0" taken for "O"; "" where nothing is read."""
    rgb = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    bgr = [np.ascontiguousarray(image[..., ::-1].repeat(2, 0).repeat(2, 1)) for image in rgb]
    texts = _engine().recognize_txt(bgr).txts
    assert texts is not None  # recognize_txt raises instead
    return [text.replace("0", "O") for text in texts]


def name_colors(pictures: Tensor) -> list[tuple[str, str]]:
    """The named ink and paper nearest to each picture's own, among all eight colors.

    Paper is the median of the three top and bottom rows, which no letter reaches; ink is the mean of the tenth of the
    pixels furthest from it.
    """
    paper = torch.cat([pictures[:, :, :3], pictures[:, :, -3:]], dim=2).flatten(2).median(dim=-1).values
    return nearest_names(pictures, paper, 10)


def nearest_names(pictures: Tensor, paper: Tensor, one_of: int) -> list[tuple[str, str]]:
    """The names nearest to the ink of each picture [N, 3, H, W] and to its paper [N, 3], among all eight colors. Ink is the mean of the
    pixels furthest from the paper, one of so many."""
    pixels = pictures.flatten(2)
    distance = (pixels - paper[:, :, None]).square().sum(1)
    furthest = distance.topk(distance.shape[-1] // one_of).indices
    ink = pixels.gather(2, furthest[:, None, :].expand(-1, 3, -1)).mean(-1)
    names = [*INKS, *PAPERS]
    nearest = [torch.cdist(color, palette(INKS, PAPERS)).argmin(1).tolist() for color in (ink, paper)]
    return [(names[i], names[p]) for i, p in zip(*nearest, strict=True)]


@cache
def _engine() -> RapidOCR:
    return RapidOCR(
        params={
            "Global.use_det": False,
            "Global.use_cls": False,
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Rec.rec_img_shape": [3, 48, 96],  # the default width, 320, triples the time
        }
    )
