"""How a rollout is scored: part by part, in channels, as videos, without decoding, and at its noisy states."""

import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowalign.credit import Process
from flowalign.rollouts.collect import collect
from rewards import RewardBatch, RewardError, RewardOutput, RewardSpec
from samplers import Chain, Probed, Selected, Window
from tests.helpers.plain_rewards import Plain, brightness
from tests.helpers.policy_gradient import PROMPTS, make

TWO = RewardSpec(channels=("light", "red"))


def light_and_red(batch: RewardBatch) -> RewardOutput:
    scores = torch.stack([batch.images.mean((1, 2, 3)), batch.images[:, 0].mean((1, 2))], 1)
    valid = torch.ones_like(scores, dtype=torch.bool)
    valid[:, 1] = scores[:, 1] > scores[:, 1].min() if len(scores) > 3 else True
    return RewardOutput(scores, valid, uncertainty=scores.abs())


def scored(pipeline: Path, plan, reward, micro_batch: int = 64, **task):
    policy, trainer = make(pipeline, plan, reward=reward)
    changed = replace(trainer.task, rollout=replace(trainer.task.rollout, micro_batch=micro_batch), **task)
    return policy, changed


def test_parts_are_decoded_scored_and_freed_one_after_the_other(tiny_pipeline: Path, monkeypatch) -> None:
    events: list[tuple[str, int]] = []
    alive: list[weakref.ref] = []
    samples: list[tuple[list[int], list[int]]] = []

    def seen(batch: RewardBatch) -> RewardOutput:
        events.append(("scored", len(batch)))
        alive.append(weakref.ref(batch.images))
        samples.append((batch.sample_ids, batch.group_ids))
        task.reward.seen.clear()
        return brightness(batch)

    policy, task = scored(tiny_pipeline, Chain(), Plain(seen), micro_batch=4)
    decode = policy.decode

    def counted(latents, grad=False):
        assert not any(image() is not None for image in alive)
        events.append(("decoded", len(latents)))
        return decode(latents, grad)

    monkeypatch.setattr(policy, "decode", counted)
    batch = collect(task, PROMPTS, 0)
    assert events == [("decoded", 4), ("scored", 4), ("decoded", 2), ("scored", 2)]
    assert samples == [([0, 1, 2, 3], [0, 0, 0, 1]), ([4, 5], [1, 1])]
    images = decode(batch.forest.at(batch.forest.tree.leaves))
    torch.testing.assert_close(batch.scores[:, 0], images.mean((1, 2, 3)))


@pytest.mark.parametrize(("failing", "error"), [(3, False), (4, True)])
def test_how_many_may_fail_is_judged_over_all_parts(tiny_pipeline: Path, failing: int, error: bool) -> None:
    """Three of six is half, though the first part of two has no score at all."""

    def holes(batch: RewardBatch) -> RewardOutput:
        return RewardOutput(torch.ones(len(batch)), torch.tensor([i >= failing for i in batch.sample_ids]))

    _, task = scored(tiny_pipeline, Chain(), Plain(holes), micro_batch=2)
    if error:
        with pytest.raises(RewardError, match="4 of 6 samples have no score"):
            collect(task, PROMPTS, 0)
        return
    assert collect(task, PROMPTS, 0).valid[:, 0].tolist() == [False] * 3 + [True] * 3


def test_channels_reach_the_batch_and_its_metrics(tiny_pipeline: Path) -> None:
    _, task = scored(tiny_pipeline, Chain(), Plain(light_and_red, TWO))
    batch = collect(task, PROMPTS, 0)
    assert batch.channels == ("light", "red") and batch.scores.shape == batch.valid.shape == (6, 2)
    assert batch.valid.sum(0).tolist() == [6, 5] and batch.metrics["reward/invalid"] == 1
    means = [float(batch.scores[:, column].nanmean()) for column in (0, 1)]
    assert [batch.metrics[f"reward/{name}_mean"] for name in ("light", "red")] == pytest.approx(means)
    assert batch.metrics["reward/mean"] == pytest.approx(sum(means) / 2)
    torch.testing.assert_close(batch.uncertainty, batch.scores, equal_nan=True)
    assert "reward/plain_mean" not in batch.metrics


def test_a_reward_without_uncertainty_has_none(tiny_pipeline: Path) -> None:
    _, task = scored(tiny_pipeline, Chain(), Plain(brightness))
    assert collect(task, PROMPTS, 0).uncertainty is None


def test_nothing_is_decoded_for_a_reward_of_latents(tiny_pipeline: Path, monkeypatch) -> None:
    reward = Plain(
        lambda b: RewardOutput(b.latents.mean((1, 2, 3)) + b.sigma, torch.ones(len(b)).bool()), RewardSpec(("latents",))
    )
    policy, task = scored(tiny_pipeline, Chain(), reward)

    def never(latents, grad=False):
        raise AssertionError("decoded")

    monkeypatch.setattr(policy, "decode", never)
    batch = collect(task, PROMPTS, 0)
    leaves = batch.forest.at(batch.forest.tree.leaves)
    torch.testing.assert_close(batch.scores[:, 0], leaves.mean((1, 2, 3)))  # σ of a leaf is 0


def test_videos_come_with_their_frames_per_second(tiny_pipeline: Path, monkeypatch) -> None:
    reward = Plain(
        lambda b: RewardOutput(b.videos.diff(dim=1).mean((1, 2, 3, 4)) * b.fps, torch.ones(len(b)).bool()),
        RewardSpec(("videos",)),
    )
    policy, task = scored(tiny_pipeline, Chain(), reward, fps=8.0, micro_batch=4)
    decode = policy.decode
    monkeypatch.setattr(
        policy, "decode", lambda latents, grad=False: torch.stack([decode(latents), decode(latents) + 0.25], 1)
    )
    batch = collect(task, PROMPTS, 0)
    torch.testing.assert_close(batch.scores, torch.full((6, 1), 2.0))
    with pytest.raises(ValueError, match=r"policy\.fps"):
        collect(replace(task, fps=None), PROMPTS, 0)
    with pytest.raises(RewardError, match="got a batch with videos; expected images"):
        collect(replace(task, reward=Plain(brightness)), PROMPTS, 0)


def test_a_reward_sees_the_source_images_of_its_prompts(tiny_pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    """Of the second prompt two files, the second with an alpha channel, which is dropped; the first prompt has none."""
    Image.new("RGB", (5, 4), (255, 0, 51)).save(tmp_path / "a.png")
    Image.new("RGBA", (2, 3), (0, 102, 0, 7)).save(tmp_path / "b.png")
    edit = replace(PROMPTS[1], images=(tmp_path / "a.png", tmp_path / "b.png"))
    reward = Plain(brightness)
    policy, task = scored(tiny_pipeline, Chain(), reward)
    with pytest.raises(ValueError, match="2 source images for a StableDiffusion3Pipeline; expected 0"):
        collect(task, [PROMPTS[0], edit], 0)
    encode = policy.encode  # stands for a model that reads them
    monkeypatch.setattr(
        policy, "encode", lambda records, **how: encode([replace(each, images=()) for each in records], **how)
    )
    collect(task, [PROMPTS[0], edit], 0)
    (batch,) = reward.seen
    assert [len(images) for images in batch.conditions] == [0] * 3 + [2] * 3
    first, second = batch.conditions[4]
    torch.testing.assert_close(first, torch.tensor([1.0, 0.0, 0.2])[:, None, None].expand(3, 4, 5))
    torch.testing.assert_close(second, torch.tensor([0.0, 0.4, 0.0])[:, None, None].expand(3, 3, 2))
    collect(task, PROMPTS, 0)
    assert reward.seen[1].conditions is None


@dataclass(frozen=True)
class Norm:
    """RMS of a state minus its σ, and how many letters its prompt has."""

    name: str = "norm"
    spec = RewardSpec(("latents",), "latent", channels=("rms", "letters"))

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        letters = torch.tensor([float(len(prompt)) for prompt in batch.prompts])
        rms = batch.latents.square().mean((1, 2, 3)).sqrt() - batch.sigma
        return RewardOutput(torch.stack([rms, letters], 1), torch.ones(len(batch), 2, dtype=torch.bool))


@pytest.mark.parametrize("plan", [Window(size=2, low=0, high=3), Probed(Chain()), Selected(Chain(), {2: 2})], ids=str)
def test_a_process_reward_scores_both_ends_of_every_stochastic_step(tiny_pipeline: Path, plan) -> None:
    _, task = scored(tiny_pipeline, plan, Plain(brightness), process_rewards=[Norm()], micro_batch=4)
    batch = collect(task, PROMPTS, 0)
    forest = batch.forest
    tree, rms = forest.tree, forest.scores["rms"]
    nodes = torch.cat([tree.edges, tree.parents_of_edges]).unique()
    assert rms.isfinite().nonzero().flatten().tolist() == nodes.tolist()
    expected = forest.at(nodes).square().mean((1, 2, 3)).sqrt() - forest.sigma(nodes)
    torch.testing.assert_close(rms[nodes], expected, rtol=1e-5, atol=1e-6)
    letters = torch.tensor([float(len(record.prompt)) for record in PROMPTS])
    assert torch.equal(forest.scores["letters"][nodes], letters[tree.group[nodes]])
    gains = Process("rms", "gain").assign(forest, batch.scores, batch.valid, batch.channels)
    torch.testing.assert_close(gains.values[:, 0], (rms[tree.edges] - rms[tree.parent[tree.edges]]).double())
    assert bool(gains.valid.all())
    assert batch.metrics["process/rms_mean"] == pytest.approx(float(expected.mean()), rel=1e-5)
