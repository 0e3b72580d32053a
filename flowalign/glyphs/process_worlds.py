"""The worlds that have a process reward: what its training rolls out, draws and measures in each."""

from __future__ import annotations

from typing import Final

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor

from flowalign.glyphs import PIPELINE, held_out_prompts, pretrain, train_prompts, video
from flowalign.glyphs.process_reward import LetterReader, Scenes
from flowalign.glyphs.process_training import Drawn, Source, World
from flowalign.glyphs.video import pretrain as video_pretrain
from flowalign.glyphs.video.process_reward import JUDGED, ClipReader, ClipScenes
from samplers import ODE, DanceSDE, FlowSDE

DRAWN: Final = {"glyphs": 4096, "glyphs_video": 2048}  # words as the renderer draws them


def drawn_pictures() -> Drawn:
    """Of Glyphs, through its pipeline's VAE."""
    vae = AutoencoderKL.from_pretrained(PIPELINE, subfolder="vae")
    words = pretrain.sample_batch(DRAWN["glyphs"], torch.Generator().manual_seed(0))
    latents = torch.cat([pretrain.scaled_latents(vae, pictures) for pictures in words.pictures.split(256)])
    return Drawn(latents, Scenes.of(words.prompts))


def drawn_clips() -> Drawn:
    """Of Glyphs-Video, through its pipeline's VAE."""
    vae = AutoencoderKLWan.from_pretrained(video.PIPELINE, subfolder="vae")
    words = video_pretrain.sample_batch(DRAWN["glyphs_video"], torch.Generator().manual_seed(0))
    latents = torch.cat([video_pretrain.scaled_latents(vae, clips) for clips in words.clips.split(64)])
    return Drawn(latents, ClipScenes.of(words.prompts))


def clip_reader() -> ClipReader:
    """Untrained, but its pixels: those of the principal components that the VAE's latents were drawn towards."""
    network = ClipReader()
    mean, basis = video_pretrain.components()
    assert network.pixels.bias is not None
    with torch.no_grad():
        network.pixels.weight.copy_(torch.linalg.pinv(basis)[..., None, None, None])
        network.pixels.bias.copy_(mean)
    return network


def judged_frames(clips: Tensor) -> Tensor:
    """[N, 3, 3, H, W] of clips [N, F, 3, H, W]: the frames that the outcome reward reads."""
    return clips[:, list(JUDGED)]


WORLDS: Final = {
    "glyphs": World(
        policy="glyphs",
        max_sequence_length=None,
        shape=(3, 24, 48),
        records=train_prompts,
        held_out_records=held_out_prompts,
        scenes=Scenes.of,
        network=LetterReader,
        pictures=lambda images: images[:, None],
        drawn=drawn_pictures,
        moved=1,
        # the ODE of an evaluation, Euphonium's SDE, Flow-GRPO's
        sources=(Source(1024, ODE(), 6, 3.0), Source(512, DanceSDE(0.25), 10, 5.0), Source(384, FlowSDE(0.7), 10, 3.0)),
        held_out=(Source(256, ODE(), 6, 3.0), Source(256, DanceSDE(0.25), 10, 5.0)),
    ),
    "glyphs_video": World(
        policy="glyphs-video",
        max_sequence_length=video.CALL_ARGS["max_sequence_length"],
        shape=(20, 5, 8, 16),
        records=video.train_prompts,
        held_out_records=video.held_out_prompts,
        scenes=ClipScenes.of,
        network=clip_reader,
        pictures=judged_frames,
        drawn=drawn_clips,
        moved=0,
        sources=(Source(512, ODE(), 8, 3.0), Source(512, DanceSDE(0.25), 8, 3.0)),
        held_out=(Source(192, ODE(), 8, 3.0), Source(192, DanceSDE(0.25), 8, 3.0)),
    ),
}
