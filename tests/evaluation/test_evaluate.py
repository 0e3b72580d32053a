"""Evaluation: closed-form images, keyed noise, and intervals that mean what they say."""

import sys
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flowalign.data import PromptRecord
from flowalign.evaluation.evaluate import evaluate
from flowalign.evaluation.paired_gain import paired_gain, paired_gains
from flowalign.evaluation.result_file import append_result
from flowalign.models.base import Sampling, Size
from flowalign.models.conditions import Conditions
from flowalign.report.grids import captions
from flowalign.report.summary import gains_table
from flowalign.storage.metrics_log import MetricsLog, read_rows
from rewards import GroupDiversity, RewardBatch, RewardError, RewardOutput, RewardSpec
from samplers import ODE, RectifiedFlow
from samplers.noise import normal
from tests.helpers.plain_rewards import Plain, brightness

SHAPE = (3, 2, 4)
PROMPTS = [PromptRecord(uid, f"prompt {uid}", {"target": uid / 10}) for uid in (5, 1, 8)]


@dataclass
class StraightPolicy:
    """v = drift(prompt)·guidance everywhere, so that Euler gives x0 = noise − drift·guidance exactly on any grid."""

    shift: float = 0.0
    evaluations: int = 0
    sampling: Sampling | None = None
    path: RectifiedFlow = field(default_factory=RectifiedFlow)

    def latent_shape(self, size):
        return (3, size.height // 8, size.width // 8)

    def rows_per_state(self, guidance_scale: float) -> int:
        return 1 if guidance_scale == 1 else 2

    def encode(self, records, *, negative=False, size=None):
        drift = [float(record.prompt.split()[1]) + self.shift for record in records]
        return Conditions({"drift": torch.tensor(drift)})

    def solver(self):
        return ODE().bind(self.path)

    def sigmas(self, num_inference_steps, latent_shape):
        return torch.linspace(1, 0, num_inference_steps + 1)

    def start(self, noise):
        return noise

    def velocity(self, x, sigma, conditions, *, guidance_scale=1.0):
        self.evaluations += len(x) * (2 if guidance_scale != 1 else 1)
        return (conditions.tensors["drift"] * guidance_scale).view(-1, 1, 1, 1).expand_as(x)

    def decode(self, latents, grad=False):
        return torch.sigmoid(latents)


@dataclass
class Brightness:
    """Mean of the pixels plus the prompt's own target; not valid for the prompts in `fails`."""

    name: str = "bright"
    spec = RewardSpec()
    fails: tuple = ()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        scores = batch.images.mean((1, 2, 3)) + torch.tensor([data["target"] for data in batch.metadata])
        valid = torch.tensor([prompt not in self.fails for prompt in batch.prompts])
        return RewardOutput(scores=scores, valid=valid)

    def load(self):
        pass

    def close(self):
        pass


def run(policy=None, rewards=None, **changes):
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "seed": 3, "batch_size": 2, "size": Size(16, 32)}
    return evaluate(policy or StraightPolicy(), PROMPTS, rewards or [Brightness()], **{**settings, **changes})


def expected_image(uid, sample, guidance=1.0):
    return torch.sigmoid(normal(SHAPE, 3, "start", "evaluate", uid, sample) - uid * guidance)


# ----------------------------------------------------------------------------------------- generation


def test_images_and_scores_have_their_closed_form_prompt_by_prompt():
    result = run(samples_per_prompt=2, guidance_scale=1.5)
    assert result.uids == [5, 1, 8, 5, 1, 8] and result.prompts[1] == "prompt 1"
    images = torch.stack([expected_image(u, s, 1.5) for s in (0, 1) for u in (5, 1, 8)])
    assert result.pixels.dtype == torch.uint8
    torch.testing.assert_close(result.images, images, rtol=0, atol=0.5001 / 255)
    scores = images.double().mean((1, 2, 3)) + torch.tensor(result.uids) / 10
    torch.testing.assert_close(result.scores["bright"], scores, rtol=0, atol=1e-6)
    assert result.evaluations_per_image == 4 * 2  # steps × guidance


def test_each_channel_is_a_reward_of_its_own():
    def light_and_red(batch):
        scores = torch.stack([batch.images.mean((1, 2, 3)), batch.images[:, 0].mean((1, 2))], 1)
        return RewardOutput(scores, torch.ones_like(scores, dtype=torch.bool))

    two = Plain(light_and_red, RewardSpec(channels=("light", "red")))
    result = run(rewards=[two, Brightness()])
    assert list(result.scores) == ["plain/light", "plain/red", "bright"]
    torch.testing.assert_close(result.scores["plain/red"], result.images[:, 0].double().mean((1, 2)), rtol=0, atol=2e-3)


def test_a_reward_of_latents_and_of_videos_is_evaluated():
    motion = Plain(
        lambda b: RewardOutput(b.videos.diff(dim=1).mean((1, 2, 3, 4)) * b.fps + b.sigma, torch.ones(len(b)).bool()),
        RewardSpec(("videos", "latents")),
    )
    policy = StraightPolicy()
    still = policy.decode
    policy.decode = lambda latents: torch.stack([still(latents), still(latents) + 0.5], 1)
    result = run(policy, [motion], fps=4.0)
    torch.testing.assert_close(result.scores["plain"], torch.full((3,), 2.0).double(), rtol=0, atol=1e-5)
    assert result.images.shape == (3, 2, *SHAPE) and result.fps == 4.0
    still_images = run(StraightPolicy()).pixels
    assert torch.equal(result.first_frames, still_images) and not torch.equal(result.pixels[:, 1], still_images)
    with pytest.raises(ValueError, match="without frames per second"):
        run(policy, [motion])


def test_batch_size_and_prompt_order_do_not_matter():
    seen = []
    whole, parts = run(batch_size=8), run(batch_size=1, progress=seen.append)
    assert seen == [1, 1, 1]
    torch.testing.assert_close(whole.images, parts.images, rtol=0, atol=1.001 / 255)
    torch.testing.assert_close(whole.scores["bright"], parts.scores["bright"], rtol=0, atol=1e-6)
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "seed": 3, "batch_size": 2, "size": Size(16, 32)}
    turned = evaluate(StraightPolicy(), PROMPTS[::-1], [Brightness()], **settings)
    torch.testing.assert_close(turned.images, whole.images.flip(0), rtol=0, atol=1.001 / 255)


def test_another_seed_and_another_sample_are_another_noise():
    first = run(samples_per_prompt=2)
    assert not torch.equal(first.images[0], first.images[3])
    assert not torch.equal(first.images[0], run(seed=4).images[0])


def test_tuned_and_base_start_from_the_same_noise():
    base, tuned = run(), run(StraightPolicy(shift=-1.0))
    expected = (base.images.clamp(0.05, 0.95).logit() + 1).sigmoid()
    seen = (base.images > 0.05) & (base.images < 0.95)
    torch.testing.assert_close(tuned.images[seen], expected[seen], rtol=0, atol=2 / 255)


@pytest.mark.parametrize(
    ("prompts", "rewards", "batch_size", "message"),
    [
        ([], [Brightness()], 1, "0 prompts"),
        (PROMPTS, [], 1, "0 rewards"),
        (PROMPTS, [Brightness()], 0, "batch_size=0"),
        (PROMPTS, [Brightness(), Brightness()], 1, "expected different names"),
        ([PROMPTS[0], PROMPTS[0]], [Brightness()], 1, "two prompts with one uid"),
    ],
)
def test_impossible_requests_are_refused(prompts, rewards, batch_size, message):
    with pytest.raises(ValueError, match=message):
        evaluate(
            StraightPolicy(), prompts, rewards, num_inference_steps=1, guidance_scale=1.0, seed=0,
            batch_size=batch_size, size=Size(16, 32),
        )  # fmt: skip


def whiteness(images, prompts):
    return images.mean((1, 2, 3))


@dataclass
class Defaults(StraightPolicy):
    sampling: Sampling | None = field(default_factory=lambda: Sampling(4, 1.5, Size(16, 32)))


def test_texts_functions_and_paths_of_functions_with_the_policys_own_settings():
    def redness(images, prompts):
        return images[:, 0].mean((1, 2))

    result = evaluate(Defaults(), ["prompt 5", "prompt 1"], [redness, "tests.evaluation.test_evaluate:whiteness"])
    assert result.uids == [0, 1] and list(result.scores) == ["redness", "whiteness"]
    images = torch.stack([expected_image_of(0, uid, drift * 1.5) for uid, drift in enumerate((5, 1))])
    torch.testing.assert_close(result.scores["redness"], images[:, 0].double().mean((1, 2)), rtol=0, atol=1e-6)
    assert (result.num_inference_steps, result.guidance_scale, result.seed) == (4, 1.5, 0)
    other = evaluate(Defaults(), "prompt 5", [redness], guidance_scale=1.0)
    assert other.guidance_scale == 1.0 and other.num_inference_steps == 4 and len(other.uids) == 1


def expected_image_of(seed, uid, drift):
    return torch.sigmoid(normal(SHAPE, seed, "start", "evaluate", uid, 0) - drift)


def test_what_neither_the_call_nor_the_policy_says_is_named():
    with pytest.raises(ValueError, match="got no guidance_scale, size for a policy whose pipeline has no defaults"):
        evaluate(StraightPolicy(), ["prompt 1"], [Brightness()], num_inference_steps=2)
    with pytest.raises(TypeError, match="expected a list of them"):
        evaluate(Defaults(), ["prompt 1"], lambda images, prompts: prompts)
    with pytest.raises(TypeError, match="got 3 as a prompt; expected a text"):
        evaluate(Defaults(), ["prompt 1", 3], [Brightness()])
    with pytest.raises(ValueError, match="got num_inference_steps=0"):
        evaluate(Defaults(), ["prompt 1"], [Brightness()], num_inference_steps=0)


def test_a_result_as_a_table(monkeypatch):
    result = run(samples_per_prompt=2, rewards=[Brightness(fails=("prompt 1",))])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        result.to_pandas()
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=dict))  # flowalign installs none
    table = result.to_pandas()
    assert list(table) == ["uid", "prompt", "sample", "bright"]
    assert table["uid"] == [5, 1, 8, 5, 1, 8] and table["sample"] == [0, 0, 0, 1, 1, 1]
    assert np.isnan(table["bright"]).tolist() == [False, True, False] * 2


def test_every_image_is_kept_and_together_they_are_bounded(monkeypatch):
    monkeypatch.setattr("flowalign.evaluation.evaluate.IMAGE_BYTES", 3 * 3 * 1 * 2)
    small = run()
    assert small.pixels.shape == (3, 3, 1, 2)
    whole = torch.stack([expected_image(uid, 0) for uid in (5, 1, 8)])
    expected = whole.unflatten(-1, (2, 2)).mean((2, 4))[:, :, None]
    torch.testing.assert_close(small.images, expected, rtol=0, atol=0.501 / 255)


# ------------------------------------------------------------------------------------------- the gain


def scores(seed, count, mean=0.0, std=1.0):
    return torch.from_numpy(np.random.Generator(np.random.Philox(seed)).normal(mean, std, count))


def test_the_interval_is_the_normal_one_for_many_pairs():
    n = 400
    base = scores(1, n, std=10.0)  # a large spread between prompts, which pairing must cancel
    tuned = base + scores(2, n, mean=0.3, std=0.5)
    difference = tuned - base
    error = float(difference.std(correction=0)) / n**0.5
    gain = paired_gain(base, tuned)
    assert gain.mean == pytest.approx(float(difference.mean()), abs=1e-12)
    assert gain.tuned - gain.base == gain.mean and gain.pairs == n
    low, high = gain.interval
    assert low == pytest.approx(gain.mean - 1.96 * error, abs=0.08 * error)
    assert high == pytest.approx(gain.mean + 1.96 * error, abs=0.08 * error)


def test_the_interval_covers_the_true_gain_about_95_times_in_100():
    hits = 0
    for seed in range(200):
        gain = paired_gain(torch.zeros(40), scores(1000 + seed, 40, mean=0.5), seed=seed, resamples=1000)
        hits += gain.interval[0] <= 0.5 <= gain.interval[1]
    assert 180 <= hits <= 197  # binomial(200, 0.94) ± 3 standard deviations


def test_copies_of_a_prompt_do_not_narrow_the_interval():
    base, tuned = scores(3, 30), scores(4, 30, mean=0.2)
    once = paired_gain(base, tuned, range(30))
    copied = paired_gain(base.repeat(5), tuned.repeat(5), list(range(30)) * 5)
    assert copied.interval == pytest.approx(once.interval, abs=1e-12)
    naive = paired_gain(base.repeat(5), tuned.repeat(5))
    assert naive.interval[1] - naive.interval[0] < 0.6 * (once.interval[1] - once.interval[0])


def test_clusters_of_several_seeds_give_the_cluster_robust_normal_interval():
    prompts, seeds = 200, 4
    prompt_effect = scores(5, prompts, mean=0.4, std=1.0)
    tuned = prompt_effect.repeat(seeds) + scores(6, prompts * seeds, std=0.5)
    gain = paired_gain(torch.zeros_like(tuned), tuned, list(range(prompts)) * seeds)
    means = tuned.reshape(seeds, prompts).mean(0)
    error = float(means.std(correction=0)) / prompts**0.5
    assert gain.interval == pytest.approx((gain.mean - 1.96 * error, gain.mean + 1.96 * error), abs=0.1 * error)


def test_swapping_the_two_turns_the_gain_round_and_the_draws_are_keyed():
    base, tuned = scores(7, 25), scores(8, 25, mean=1.0)
    there, back = paired_gain(base, tuned), paired_gain(tuned, base)
    assert back.mean == pytest.approx(-there.mean)
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]), abs=1e-12)
    assert paired_gain(base, tuned) == there
    assert paired_gain(base, tuned, seed=1).interval != there.interval


def test_invalid_pairs_are_dropped_on_both_sides_and_counted():
    base, tuned = torch.tensor([1.0, torch.nan, 3.0, 4.0]), torch.tensor([2.0, 100.0, torch.nan, 6.0])
    gain = paired_gain(base, tuned)
    assert (gain.base, gain.tuned, gain.mean, gain.pairs, gain.dropped) == (2.5, 4.0, 1.5, 2, 2)
    with pytest.raises(ValueError, match="none of 1 pairs"):
        paired_gain(base[1:2], tuned[1:2])


def test_one_prompt_has_a_gain_but_no_interval():
    gain = paired_gain(torch.zeros(3), torch.ones(3), [4, 4, 4])
    assert gain.mean == 1.0 and gain.interval is None


def test_scores_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        paired_gain(torch.zeros(3), torch.zeros(2))
    with pytest.raises(ValueError, match="2 cluster labels for 3"):
        paired_gain(torch.zeros(3), torch.zeros(3), [1, 2])
    with pytest.raises(ValueError, match="differ in seed"):
        paired_gains(run(), run(seed=4))
    with pytest.raises(ValueError, match="differ in rewards"):
        paired_gains(run(), run(rewards=[Brightness("other")]))


# -------------------------------------------------------------------------------------------- records


def test_an_invalid_reward_is_nan_then_dropped_then_named_in_the_caption():
    base = run(rewards=[Brightness(fails=("prompt 1",))])
    tuned = run(StraightPolicy(shift=-1.0), [Brightness()])
    assert base.scores["bright"].isnan().tolist() == [False, True, False]
    gains = paired_gains(base, tuned)
    assert gains["bright"].dropped == 1 and gains["bright"].pairs == 2 and gains["bright"].mean > 0
    text = captions(base, tuned, range(3))
    assert len(text) == 3 and text[1].startswith("prompt 1\nbright not valid → ")
    record = gains_table(gains)
    assert record["tuned"]["bright"] - record["base"]["bright"] == record["gain"]["bright"]
    assert record["gain_ci95"]["bright"] == list(gains["bright"].interval)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_reward_that_fails_on_most_images_is_an_error_whatever_the_batch(batch_size):
    one = run(rewards=[Brightness(fails=("prompt 1",))], batch_size=batch_size)
    assert int(one.scores["bright"].isnan().sum()) == 1
    with pytest.raises(RewardError, match="'bright' could not score 2 of 3 images"):
        run(rewards=[Brightness(fails=("prompt 1", "prompt 5"))], batch_size=batch_size)


def test_results_are_appended_with_every_score(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    result = run(rewards=[Brightness(fails=("prompt 8",))])
    append_result(path, 0, "base", result)
    append_result(path, 7, "tuned", replace(result, seed=9))
    rows = read_rows(path)
    assert [(row["step"], row["label"], row["seed"]) for row in rows] == [(0, "base", 3), (7, "tuned", 9)]
    assert rows[0]["uids"] == [5, 1, 8] and rows[0]["scores"]["bright"][2] is None
    assert rows[0]["scores"]["bright"][:2] == result.scores["bright"][:2].tolist()
    MetricsLog(path).cut_back(3)
    assert [row["label"] for row in read_rows(path)] == ["base"]


def test_a_groupwise_reward_gets_all_samples_of_a_prompt_and_the_order_stays():
    """In batches of whole prompts, though five images would fit; images and other scores are those of any evaluation."""
    seen: list[list[int]] = []

    def watched(batch):
        seen.append(batch.group_ids)
        return GroupDiversity()(batch)

    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "size": Size(16, 32), "samples_per_prompt": 2}
    light, group = Plain(brightness), Plain(watched, GroupDiversity().spec)
    group.name = "group"
    alone = evaluate(StraightPolicy(), PROMPTS, [light], batch_size=5, **settings)
    both = evaluate(StraightPolicy(), PROMPTS, [light, group], batch_size=5, **settings)
    assert seen == [[5, 5, 1, 1], [8, 8]] and alone.uids == both.uids == [5, 1, 8, 5, 1, 8]
    torch.testing.assert_close(both.scores["plain"], alone.scores["plain"])
    assert torch.equal(both.pixels, alone.pixels)
    distance = both.scores["group/distance"]
    assert torch.equal(distance[:3], distance[3:]) and bool((distance > 0).all())
    with pytest.raises(RewardError, match="group/distance' could not score 3 of 3"):
        evaluate(StraightPolicy(), PROMPTS, [group], batch_size=5, **{**settings, "samples_per_prompt": 1})
