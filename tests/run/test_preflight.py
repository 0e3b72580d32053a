"""What is said and tried before a run: the forecast, and a trial of each reward."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowalign.config import load_config
from flowalign.errors import ConfigError
from flowalign.models import Size
from flowalign.run.preflight import Prompts, forecast, try_rewards
from rewards import RewardOutput, RewardSpec
from samplers import Chain
from tests.helpers.plain_rewards import Plain
from tests.helpers.policy_gradient import make

TINY = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
PROBED = [
    "rollout.plan.class_path=samplers.Probed",
    "rollout.plan.init_args.plan=samplers.Chain",
    "trainer.signal.credit=flowalign.credit.Gain",
    "trainer.signal.advantage.within=prompt_step",
    "rollout.num_inference_steps=4",
]


def text(tmp_path: Path, *overrides: str) -> str:
    return forecast(load_config(TINY, [f"run.output={tmp_path}", *overrides])[0])


def test_probes_are_counted_apart(tmp_path: Path) -> None:
    """Two prompts, three samples each, with three probes; 4 + 3 + 2 + 1 velocities a sample, three of them trained."""
    printed = text(tmp_path, *PROBED)
    assert "3 iterations × 2 prompts × 3 images = 18 images" in printed and "per iteration: 6 images" in printed
    assert "rollout 10.00, update at most 3.00" in printed and "without gradient at most 3.00" in printed
    assert "probes: 3.00 per image" in printed
    assert "probes" not in text(tmp_path)


def test_guidance_that_differs_is_said(tmp_path: Path) -> None:
    printed = text(tmp_path, "rollout.guidance_scale=4.5", "rollout.allow_cfg_update=true")
    assert "rollout.guidance_scale=4.5, evaluation.guidance_scale=1;" in printed
    both = ("rollout.guidance_scale=4.5", "rollout.allow_cfg_update=true", "evaluation.guidance_scale=4.5")
    assert "guidance" not in text(tmp_path, *both) and "guidance" not in text(tmp_path)


# ---------------------------------------------------------------------------------------------- trial of the rewards


def tried(tmp_path: Path, policy=None, **settings):
    """Tries the configuration's rewards with others in their places; returns the configuration."""
    config = replace(load_config(TINY, [f"run.output={tmp_path}"])[0], **settings)
    try_rewards(config, Prompts.of(config), "cpu", policy)
    return config


def test_a_trial_has_the_form_that_the_run_gives(tmp_path: Path, tiny_pipeline: Path) -> None:
    """Images before the model is loaded; states, and what the policy decodes, after it."""
    ok = lambda batch: RewardOutput(torch.ones(len(batch)), torch.ones(len(batch)).bool())  # noqa: E731
    image, state, video = (
        Plain(ok, spec)
        for spec in (RewardSpec(), RewardSpec(("latents",), "latent"), RewardSpec(("videos", "latents")))
    )
    settings = {"process_rewards": [state]}
    config = tried(tmp_path, reward=image, **settings)
    assert [batch.images.shape for batch in image.seen] == [(2, 3, 24, 48)] * 2 and not state.seen  # evaluated, too
    assert image.seen[0].prompts == [record.prompt for record in Prompts.of(config).train[:2]]
    policy, _ = make(tiny_pipeline, Chain())
    tried(tmp_path, policy, reward=image, **settings)
    assert len(image.seen) == 2 and state.seen[0].latents.shape == (2, *policy.latent_shape(Size(24, 48)))
    assert state.seen[0].sigma.tolist() == [1, 1] and state.seen[0].images is None
    with pytest.raises(ConfigError, match="got a batch with images and latents; expected videos"):
        tried(tmp_path, policy, reward=video)


def test_a_policy_of_videos_is_tried_with_videos(tmp_path: Path) -> None:
    seen = Plain(lambda batch: RewardOutput(torch.ones(2), torch.ones(2).bool()), RewardSpec(("videos",)))
    config = replace(load_config(TINY, [f"run.output={tmp_path}"])[0], reward=seen)
    video = replace(
        config, policy=replace(config.policy, frames=5, fps=8.0), evaluation=replace(config.evaluation, rewards=[seen])
    )
    try_rewards(video, Prompts.of(video))
    assert seen.seen[0].videos.shape == (2, 5, 3, 24, 48) and seen.seen[0].fps == 8
    with pytest.raises(ConfigError, match="got a batch with images; expected videos"):
        try_rewards(config, Prompts.of(config))


def test_a_trial_finds_channels_that_the_spec_does_not_name(tmp_path: Path) -> None:
    two = Plain(lambda batch: RewardOutput(torch.ones(len(batch), 2), torch.ones(len(batch), 2).bool()))
    with pytest.raises(ConfigError, match=r"tried on two black images, .*scores has shape \[2, 2\]"):
        tried(tmp_path, reward=two)
