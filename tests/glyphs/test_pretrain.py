"""Pre-training: every part learns, a resumed run is the run that was never stopped, the VAE is near-lossless."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowalign.glyphs.parts import build_pipeline
from flowalign.glyphs.pretrain import TRAINED, encode_text, pretrain
from flowalign.glyphs.training import Pretraining

TINY = Pretraining(batch_size=2, vae_batch_size=2, vae_steps=2, steps=2, warmup=1, checkpoint_every=1, statistics=8)


def silent(stage: str, step: int, loss: float) -> None:
    """No progress bar."""


def weights(pipeline) -> dict[str, torch.Tensor]:
    parts = {name: pipeline.components[name] for name in (*TRAINED, "vae")}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}


def test_resume_is_bit_identical_and_every_part_moves(tmp_path: Path) -> None:
    straight = weights(pretrain(TINY, tmp_path / "straight", silent))
    pretrain(replace(TINY, steps=1), tmp_path / "stopped", silent)
    resumed = weights(pretrain(TINY, tmp_path / "stopped", silent))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    torch.manual_seed(TINY.seed)
    untrained = weights(build_pipeline())
    assert {name.split(".")[0] for name in straight if not torch.equal(straight[name], untrained[name])} == {
        *TRAINED,
        "vae",
    }


def test_vae_resumes_bit_identically(tmp_path: Path) -> None:
    no_flow = replace(TINY, steps=0, schedule_steps=1)
    straight = weights(pretrain(no_flow, tmp_path / "straight", silent))

    def stop(stage: str, step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(no_flow, tmp_path / "stopped", stop)
    resumed = weights(pretrain(no_flow, tmp_path / "stopped", silent))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path: Path) -> None:
    pretrain(TINY, tmp_path, silent)
    with pytest.raises(ValueError, match="2 steps"):
        pretrain(replace(TINY, steps=1), tmp_path, silent)


def test_untrained_vae_is_near_the_identity() -> None:
    torch.manual_seed(0)
    vae = build_pipeline().vae
    pictures = torch.rand(4, 3, 24, 48) * 2 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    assert (decoded - pictures).abs().mean() < 0.1


def test_text_features_are_those_of_the_diffusers_pipeline() -> None:
    pipeline = build_pipeline()
    prompts = ['the word "KITE" in red on a white background', ""]
    with torch.no_grad():
        tokens, pooled = encode_text(pipeline, prompts)
        expected, _, expected_pooled, _ = pipeline.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=0
        )
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    torch.testing.assert_close(pooled, expected_pooled, rtol=0, atol=0)
