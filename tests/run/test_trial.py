"""A trial of each reward before a run: its form, its channels, that it scores at all, and that one sees what is waited for."""

import copy
import json
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

from flowalign import cli
from flowalign.config import TrainConfig, load_config
from flowalign.errors import ConfigError
from flowalign.models import Size
from flowalign.rollouts.guidance import Probing, RewardGuidance
from flowalign.run import trial as trial_module
from flowalign.run.folder import describe
from flowalign.run.preflight import Prompts
from flowalign.run.trial import PROMPTS, try_rewards
from flowalign.run.trial_result import records, table
from flowalign.trainers import BackPropagation
from rewards import (
    Channels,
    FunctionReward,
    ImageStatistics,
    JPEGCompressibility,
    Mix,
    RewardOutput,
    RewardSpec,
    WithTimeout,
)
from rewards.remote.description import fingerprint
from samplers import Chain
from tests.helpers.plain_rewards import Plain
from tests.helpers.policy_gradient import make
from tests.helpers.tiny_run import run_it

TINY = str(Path(__file__).parents[1] / "data" / "tiny.yaml")


@cache
def tiny() -> TrainConfig:
    return load_config(TINY)[0]


def tried(tmp_path: Path, loaded=None, announce=False, **settings):
    """Tries the configuration's rewards with others in their places; loaded: the policy."""
    config = replace(tiny(), run=replace(tiny().run, output=str(tmp_path)), **settings)
    return try_rewards(config, Prompts.of(config), "cpu", loaded, announce=announce)


def ok(batch) -> RewardOutput:
    return RewardOutput(torch.ones(len(batch)), torch.ones(len(batch)).bool())


def test_a_trial_has_the_form_that_the_run_gives(tmp_path: Path, tiny_pipeline: Path) -> None:
    """Images before the model is loaded; states, and what the policy decodes, after it. A quick call is timed once more."""
    image, state, video = (
        Plain(ok, spec)
        for spec in (RewardSpec(), RewardSpec(("latents",), "latent"), RewardSpec(("videos", "latents")))
    )
    settings = {"process_rewards": [state]}
    assert [trial.place for trial in tried(tmp_path, reward=image, **settings)] == [
        "reward", "evaluation.rewards", "evaluation.training_reward",
    ]  # fmt: skip
    assert [batch.images.shape for batch in image.seen] == [(3, 3, 24, 48)] * 4 and not state.seen  # evaluated, too
    assert image.seen[0].prompts == [Prompts.of(tiny()).train[0].prompt] * 3
    policy, _ = make(tiny_pipeline, Chain())
    [trial] = tried(tmp_path, policy, reward=image, **settings)
    assert len(image.seen) == 4 and state.seen[0].latents.shape == (3, *policy.latent_shape(Size(24, 48)))
    assert state.seen[0].sigma.tolist() == [1, 1, 1] and state.seen[0].images is None
    assert (trial.place, trial.name) == ("process_rewards", "plain")
    with pytest.raises(ConfigError, match="got a batch with images and latents; expected videos"):
        tried(tmp_path, policy, reward=video)


def test_the_samples_are_two_of_noise_and_an_empty_one_and_draw_from_no_global_state(
    tmp_path: Path, tiny_pipeline: Path
) -> None:
    policy, _ = make(tiny_pipeline, Chain())
    image, data = Plain(ok), Plain(ok, RewardSpec(("images", "latents")))
    before = torch.get_rng_state()
    tried(tmp_path, reward=image)
    tried(tmp_path, policy, reward=data)
    assert torch.equal(torch.get_rng_state(), before)
    first, second, black = image.seen[0].images
    assert float(first.min()) >= 0 and float(first.max()) <= 1 and float(first.std()) > 0.1
    assert float((first - second).abs().mean()) > 0.1 and not black.any()
    assert torch.equal(image.seen[0].images, image.seen[-1].images)
    one, other, zero = data.seen[0].latents
    assert float((one - other).abs().mean()) > 0.5 and not zero.any() and data.seen[0].sigma.tolist() == [0, 0, 0]
    assert data.seen[0].images.shape == (3, 3, 24, 48)


def test_a_policy_of_videos_is_tried_with_videos(tmp_path: Path) -> None:
    seen = Plain(ok, RewardSpec(("videos",)))
    evaluation = replace(tiny().evaluation, rewards=[seen])
    policy = replace(tiny().policy, frames=5, fps=8.0)
    tried(tmp_path, reward=seen, evaluation=evaluation, policy=policy)
    assert seen.seen[0].videos.shape == (3, 5, 3, 24, 48) and seen.seen[0].fps == 8
    noise = seen.seen[0].videos[0]
    assert float((noise[1:] - noise[:-1]).abs().mean()) > 0.01  # it moves
    with pytest.raises(ConfigError, match="got a batch with images; expected videos"):
        tried(tmp_path, reward=seen)


def test_a_trial_finds_channels_that_the_spec_does_not_name(tmp_path: Path) -> None:
    two = Plain(lambda batch: RewardOutput(torch.ones(len(batch), 2), torch.ones(len(batch), 2).bool()))
    with pytest.raises(ConfigError, match=r"tried on noise and on an empty sample, .*scores has shape \[3, 2\]"):
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
    assert (
        "got reward 'ocr', which scores neither noise nor an empty sample, with none of 3 prompts" in said
        and "no target: metadata['target']" in said
    )
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
    some, none = nan_where(lambda prompt: prompt.startswith("plain") and int(prompt[6:]) < 60), nan_where(bool)
    tried(tmp_path, prompts=prompts, reward=some)
    assert 1 < len(some.seen) < PROMPTS
    with pytest.raises(
        ConfigError, match=r"'plain', which scores neither .* with none of 16 prompts such as 'plain 0': no word"
    ):
        tried(tmp_path, prompts=prompts, reward=none)
    assert len({prompt for batch in none.seen for prompt in batch.prompts}) == PROMPTS


def test_each_channel_has_to_score(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'channels', which scores neither noise nor an empty sample in plain, with"):
        tried(tmp_path, reward=Channels([JPEGCompressibility(), nan_where(bool)]))


def test_a_reward_of_finished_pictures_only_says_so(tmp_path: Path) -> None:
    """One that needs a face, say, has no score for black images."""
    reward = nan_where(bool)
    reward.spec = RewardSpec(scores_black=False)
    tried(tmp_path, reward=reward)
    tried(tmp_path, reward=Mix([reward, JPEGCompressibility()], [1.0, 1.0]))
    assert len(reward.seen) == 8  # each twice, on training and on held-out prompts


def test_what_fails_and_is_masked_is_told(tmp_path: Path) -> None:
    def boom(batch) -> RewardOutput:
        raise OSError("no connection")

    with pytest.raises(ConfigError, match=r"scores neither .*no connection"):
        tried(tmp_path, reward=WithTimeout(Plain(boom), on_error="mask", batch_size=4))


# ---------------------------------------------------------------------------------------------- what a trial says


def first_pixel(batch) -> RewardOutput:
    """A score that differs between all samples; black has none."""
    scores = batch.images.mean((1, 2, 3))
    return RewardOutput(scores.where(scores > 0, torch.nan), scores > 0)


def test_a_sample_without_a_score_is_shown_as_none(tmp_path: Path) -> None:
    trial = tried(tmp_path, reward=Plain(first_pixel))[0]
    noise, other, black = (row[0] for row in trial.scores)
    assert 0.4 < noise < 0.6 and 0.4 < other < 0.6 and noise != other and black != black
    assert not trial.is_flat and trial.record()["scores"]["plain"] == [
        float(f"{noise:.3g}"),
        float(f"{other:.3g}"),
        None,
    ]
    assert table([trial]).splitlines()[1].split()[4] == "–"


def test_a_constant_reward_is_told_and_no_error(tmp_path: Path) -> None:
    trial = tried(tmp_path, reward=Plain(ok))[0]
    assert trial.is_flat and "note: reward 'plain' scores all three alike" in table([trial])
    assert "note" not in table(tried(tmp_path, reward=JPEGCompressibility())[:1])


def test_the_table_has_a_line_per_reward(tmp_path: Path) -> None:
    rewards = [
        ImageStatistics(("brightness", "contrast")),
        FunctionReward(lambda images, prompts: [1.0, 2.0, 3.0], "one"),
    ]
    evaluation = replace(tiny().evaluation, rewards=rewards)
    trials = tried(tmp_path, reward=JPEGCompressibility(), evaluation=evaluation)
    head, *lines = table(trials).splitlines()
    assert " ".join(head.split()) == "rewards tried noise noise zero ms/sample load s memory fingerprint"
    assert [line.split()[0] for line in lines] == [
        "reward", "evaluation.rewards", "evaluation.rewards", "evaluation.training_reward",
    ]  # fmt: skip
    assert lines[0].split()[-1] == fingerprint(JPEGCompressibility()) and lines[0].split()[-2] == "cpu"
    assert "image/brightness (+1)" in lines[1] and lines[1][head.index("zero") :].startswith("0 ")
    assert lines[2].split()[1:5] == ["one", "1", "2", "3"] and lines[2].endswith("-")  # a function has no fingerprint
    kept = json.loads(json.dumps(records(trials)))
    assert list(kept["evaluation.rewards"]) == ["image", "one"]
    assert list(kept["evaluation.rewards"]["image"]["scores"]) == ["brightness", "contrast"]


def test_the_first_call_of_a_slow_reward_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = Plain(ok)
    monkeypatch.setattr(trial_module, "QUICK", 0.0)
    tried(tmp_path, reward=reward)
    assert len(reward.seen) == 2  # once as the reward, once on held-out prompts


# ---------------------------------------------------------------------------------------------- gradients


def guided(tmp_path: Path, function, **guidance):
    reward = FunctionReward(function, "guide", differentiable=True)
    rollout = tiny().rollout
    return tried(tmp_path, rollout=replace(rollout, reward_guidance=RewardGuidance(reward=reward, **guidance)))


def test_a_reward_that_guides_by_a_gradient_needs_one(tmp_path: Path) -> None:
    def bright(images, prompts):
        return images.mean((1, 2, 3))

    def rounded(images, prompts):
        return (images * 0).mean((1, 2, 3)) + images.round().mean((1, 2, 3))

    def edge(images, prompts):
        return (images - images).mean((1, 2, 3)).sqrt()

    assert guided(tmp_path, bright)[1].place == "rollout.reward_guidance.reward"
    with pytest.raises(
        ConfigError, match=r"got rollout\.reward_guidance\.reward 'guide'.* gradient that is 0 on noise; .*spsa="
    ):
        guided(tmp_path, rounded)
    with pytest.raises(ConfigError, match="gradient that is not finite"):
        guided(tmp_path, edge)
    guided(tmp_path, rounded, spsa=Probing())  # from its scores alone


def test_a_reward_that_is_back_propagated_needs_a_graph(tmp_path: Path) -> None:
    def cut(images, prompts):
        return images.detach().mean((1, 2, 3))

    reward = FunctionReward(cut, "cut", differentiable=True)
    tried(tmp_path, reward=reward)  # a policy gradient asks for scores alone
    with pytest.raises(ConfigError, match=r"reward: tried on noise .*'cut': got scores without a graph"):
        tried(tmp_path, reward=reward, trainer=BackPropagation())


def test_a_gradient_on_the_black_image_alone_is_none(tmp_path: Path) -> None:
    def dark(images, prompts):
        return (0.01 - images.mean((1, 2, 3))).relu()

    with pytest.raises(ConfigError, match="0 on noise"):
        guided(tmp_path, dark)


def test_a_process_reward_that_guides_is_tried_at_latents(tmp_path: Path, tiny_pipeline: Path) -> None:
    policy, _ = make(tiny_pipeline, Chain())
    rollout = replace(tiny().rollout, reward_guidance=RewardGuidance())

    def state(scale):
        return FunctionReward(
            lambda prompts, latents: scale * latents.flatten(1).sum(1), "state", inputs=("latents",), scope="latent",
            differentiable=True,
        )  # fmt: skip

    [trial] = tried(tmp_path, policy, rollout=rollout, process_rewards=[state(1.0)])
    assert trial.scores[2] == [0.0] and trial.scores[0] != trial.scores[1]
    with pytest.raises(ConfigError, match=r"got process_rewards 'state', by whose gradient .* 0 on noise"):
        tried(tmp_path, policy, rollout=rollout, process_rewards=[state(0.0)])


# ---------------------------------------------------------------------------------------------- what a run keeps


def test_a_run_prints_the_trials_and_keeps_them(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def shine(images, prompts): return images.mean((1, 2, 3))")
    arguments = ["reward=rewards.FunctionReward", f"reward.path={tmp_path}/mine.py:shine", "run.iterations=1"]
    run_it(tiny_pipeline, tmp_path, *arguments)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("rewards tried ") for line in lines) == 1
    run = tmp_path / "tiny"
    kept = json.loads((run / "provenance.json").read_text())["rewards"]["reward"]["shine"]
    assert len(kept["fingerprint"]) == 16 and kept["scores"]["shine"][2] == 0 and kept["memory"] == "cpu"
    assert {"load_seconds", "ms_per_sample"} <= kept.keys()


def test_a_resumed_run_notes_a_reward_that_scores_otherwise_but_not_that_it_took_longer(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plain = finished_run / "provenance.json", yaml.safe_load((finished_run / "config.yaml").read_text())
    begun = json.loads(file.read_text())["rewards"]
    slower, other = copy.deepcopy(begun), copy.deepcopy(begun)
    slower["reward"]["jpeg_compressibility"]["ms_per_sample"] = 1e6
    other["reward"]["jpeg_compressibility"] |= {"fingerprint": "0", "ms_per_sample": 3.0}
    describe(finished_run, plain, None, slower)
    assert "begun with other" not in capsys.readouterr().out and "later" not in json.loads(file.read_text())
    for seconds in (1.0, 2.0):
        other["reward"]["jpeg_compressibility"]["load_seconds"] = seconds
        describe(finished_run, plain, None, other)
        assert "begun with other rewards.reward.jpeg_compressibility.fingerprint: it" in capsys.readouterr().out
    now = json.loads(file.read_text())
    assert now["rewards"] == begun and [each["rewards"]["reward"] for each in now["later"]] == [
        other["reward"] | {"jpeg_compressibility": other["reward"]["jpeg_compressibility"] | {"load_seconds": 1.0}}
    ]


def test_a_run_from_before_trials_were_kept_goes_on_without_a_word(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plain = finished_run / "provenance.json", yaml.safe_load((finished_run / "config.yaml").read_text())
    content = json.loads(file.read_text())
    rewards = content.pop("rewards")
    file.write_text(json.dumps(content))
    describe(finished_run, plain, None, rewards)
    assert "begun with other" not in capsys.readouterr().out and "later" not in json.loads(file.read_text())


# ---------------------------------------------------------------------------------------------- rewards that take long


PLACES = ("reward", "evaluation.training_reward (false leaves it out)")


@pytest.mark.parametrize(
    ("announce", "lines"), [(True, [f"trying {place} 'plain' …" for place in PLACES]), (False, [])]
)
def test_one_sees_what_is_waited_for(tmp_path: Path, capsys, monkeypatch, announce: bool, lines: list[str]) -> None:
    def slow(batch) -> RewardOutput:
        time.sleep(0.2)
        return ok(batch)

    monkeypatch.setattr(trial_module, "PATIENCE", 0.05)
    tried(tmp_path, announce=announce, reward=Plain(slow))
    assert capsys.readouterr().out.splitlines() == lines
