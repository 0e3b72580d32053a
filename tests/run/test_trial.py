"""A trial of each reward before a run: its form, its channels, that it scores at all, and that one sees what is waited for."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowalign import cli
from flowalign.config import load_config
from flowalign.errors import ConfigError
from flowalign.models import Size
from flowalign.run import trial
from flowalign.run.preflight import Prompts
from flowalign.run.trial import PAIRS, try_rewards
from rewards import Channels, JPEGCompressibility, Mix, RewardOutput, RewardSpec, WithTimeout
from samplers import Chain
from tests.helpers.plain_rewards import Plain
from tests.helpers.policy_gradient import make

TINY = str(Path(__file__).parents[1] / "data" / "tiny.yaml")


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
    try_rewards(video, Prompts.of(video), "cpu")
    assert seen.seen[0].videos.shape == (2, 5, 3, 24, 48) and seen.seen[0].fps == 8
    with pytest.raises(ConfigError, match="got a batch with images; expected videos"):
        try_rewards(config, Prompts.of(config), "cpu")


def test_a_trial_finds_channels_that_the_spec_does_not_name(tmp_path: Path) -> None:
    two = Plain(lambda batch: RewardOutput(torch.ones(len(batch), 2), torch.ones(len(batch), 2).bool()))
    with pytest.raises(ConfigError, match=r"tried on two black images, .*scores has shape \[2, 2\]"):
        tried(tmp_path, reward=two)


# ---------------------------------------------------------------------------------------------- rewards that score nothing


def mine(tmp_path: Path, *lines: str) -> str:
    """A prompt file with these prompts."""
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(lines))
    return str(file)


def test_prompts_that_a_reward_cannot_score_are_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own prompts with the OCR reward, which finds its target in Glyphs' metadata."""
    monkeypatch.delattr("flowalign.run.run.policy_of")
    prompts = mine(tmp_path, "a red fox", "a blue car", "a green tree")
    overrides = [f"prompts={prompts}", "reward=rewards.OCR", f"run.output={tmp_path}"]
    assert cli.train([TINY, *overrides]) == 2
    said = capsys.readouterr().err
    assert "got reward 'ocr', which scores none of 4 black images" in said and "no target: metadata['target']" in said
    assert "a red fox" in said and "Traceback" not in said


def nan_where(bad) -> Plain:
    """A reward without a score for the prompts that `bad` says."""

    def answer(batch) -> RewardOutput:
        scores = torch.tensor([torch.nan if bad(prompt) else 1.0 for prompt in batch.prompts])
        return RewardOutput(scores, scores.isfinite(), info=["no word"] * len(batch))

    return Plain(answer)


def test_prompts_without_a_score_at_the_head_of_the_set_do_not_refuse_it(tmp_path: Path) -> None:
    """The first prompts have none; one further on does."""
    prompts = mine(tmp_path, *[f"plain {n}" for n in range(99)], "the word")
    config = replace(load_config(TINY, [f"run.output={tmp_path}"])[0], prompts=prompts)
    some, none = nan_where(lambda prompt: prompt.startswith("plain") and int(prompt[6:]) < 60), nan_where(bool)
    try_rewards(replace(config, reward=some), Prompts.of(config), "cpu")
    assert 1 < len(some.seen) < PAIRS
    with pytest.raises(ConfigError, match=r"'plain', which scores none of 16 black images.*'plain 0': no word"):
        try_rewards(replace(config, reward=none), Prompts.of(config), "cpu")
    assert len({prompt for batch in none.seen for prompt in batch.prompts}) == 2 * PAIRS


def test_each_channel_has_to_score(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'channels', which scores none of .* black images in plain, of"):
        tried(tmp_path, reward=Channels([JPEGCompressibility(), nan_where(bool)]))


def test_a_reward_of_finished_pictures_only_says_so(tmp_path: Path) -> None:
    """One that needs a face, say, has no score for black images."""
    reward = nan_where(bool)
    reward.spec = RewardSpec(scores_black=False)
    tried(tmp_path, reward=reward)
    tried(tmp_path, reward=Mix([reward, JPEGCompressibility()], [1.0, 1.0]))
    assert len(reward.seen) == 4  # each on training and held-out prompts


def test_what_fails_and_is_masked_is_told(tmp_path: Path) -> None:
    def boom(batch) -> RewardOutput:
        raise OSError("no connection")

    with pytest.raises(ConfigError, match=r"scores none of 16 black images.*no connection"):
        tried(tmp_path, reward=WithTimeout(Plain(boom), on_error="mask", batch_size=4))


# ---------------------------------------------------------------------------------------------- rewards that take long


PLACES = ("reward", "evaluation.training_reward (false leaves it out)")


@pytest.mark.parametrize(
    ("announce", "lines"), [(True, [f"trying {place} 'plain' …" for place in PLACES]), (False, [])]
)
def test_one_sees_what_is_waited_for(tmp_path: Path, capsys, monkeypatch, announce: bool, lines: list[str]) -> None:
    def slow(batch) -> RewardOutput:
        time.sleep(0.2)
        return RewardOutput(torch.ones(len(batch)), torch.ones(len(batch)).bool())

    monkeypatch.setattr(trial, "PATIENCE", 0.05)
    config = replace(load_config(TINY, [f"run.output={tmp_path}"])[0], reward=Plain(slow))
    try_rewards(config, Prompts.of(config), "cpu", announce=announce)
    assert capsys.readouterr().out.splitlines() == lines
