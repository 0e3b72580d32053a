"""InverseDynamics in a linear world: its accuracy is a known function of what the generator gets wrong."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from rewards import InverseDynamics, Reward, RewardBatch, RewardError, score
from tests.helpers.inverse_dynamics import CentroidShift, dots
from tests.helpers.reward_parts import in_parts

REACH = 4
MODEL = CentroidShift(REACH)


def filmed(actions: Tensor, errors: Tensor | float = 0.0, fps: float = 4.0) -> RewardBatch:
    """x_{t+1} = x_t + a_t + error of actions [n, S] in pixels, as videos with their actions as classes."""
    start = torch.full((len(actions), 1), 64.0, dtype=torch.float64)
    videos = dots(torch.cat([start, start + (actions + errors).double().cumsum(1)], 1))
    metadata = [{"actions": row} for row in (actions + REACH).tolist()]
    return RewardBatch(prompts=["move"] * len(actions), videos=videos, fps=fps, metadata=metadata)


def drawn(count: int, steps: int, seed: int) -> Tensor:
    return torch.randint(-2, 3, (count, steps), generator=torch.Generator().manual_seed(seed))


def cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


@pytest.mark.parametrize(("bias", "noise"), [(0.0, 0.3), (0.25, 0.3), (0.5, 0.2), (-0.4, 0.6)])
def test_accuracy_is_the_probability_that_the_error_rounds_to_zero(bias: float, noise: float) -> None:
    """â = round(a + e), e ~ N(bias, noise²): P(â = a) = Φ((½ - bias)/noise) - Φ((-½ - bias)/noise)."""
    actions = drawn(64, 24, seed=0)
    errors = bias + noise * torch.randn(actions.shape, generator=torch.Generator().manual_seed(1))
    output = score(InverseDynamics(MODEL), filmed(actions, errors))
    expected = cdf((0.5 - bias) / noise) - cdf((-0.5 - bias) / noise)
    assert float(output.scores.mean()) == pytest.approx(
        expected, abs=4 * math.sqrt(expected * (1 - expected) / actions.numel())
    )
    shares = ((errors.round() == 0).float().mean(1), output.components["accuracy/action"])
    torch.testing.assert_close(output.scores[:, 0], shares[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(output.scores[:, 0], shares[1])


def test_balanced_is_the_mean_of_the_recalls() -> None:
    """Nine steps of standing still, of which all are right, and three to the right, of which one is."""
    actions, errors = torch.zeros(1, 12), torch.zeros(1, 12)
    actions[0, 9:], errors[0, 10:] = 2, 1
    batch = filmed(actions.long(), errors)
    plain, balanced = (score(InverseDynamics(MODEL, balanced=on), batch) for on in (False, True))
    assert plain.scores.item() == pytest.approx(10 / 12)
    assert balanced.scores.item() == pytest.approx((1 + 1 / 3) / 2)
    assert balanced.components["accuracy/action"].item() == pytest.approx(10 / 12)


def test_soft_is_the_probability_of_the_action_and_its_gradient_removes_a_bias() -> None:
    actions = drawn(2, 6, seed=2)
    soft = InverseDynamics(MODEL, soft=True)
    assert soft.spec.differentiable and not InverseDynamics(MODEL).spec.differentiable
    output = score(soft, filmed(actions))
    exact = output.scores[:, 0]
    assert output.components["accuracy/action"].tolist() == [1, 1] and float(exact.max()) < 0.9
    classes = torch.arange(-REACH, REACH + 1)
    expected = (-(actions[..., None] - classes).square().float()).softmax(2).gather(2, (actions + REACH)[..., None])
    torch.testing.assert_close(exact, expected.mean((1, 2)), rtol=1e-5, atol=1e-6)
    for bias in (0.3, -0.3):
        leaf = torch.tensor(bias, dtype=torch.float64, requires_grad=True)
        batch = filmed(actions, leaf.expand(actions.shape))
        (slope,) = torch.autograd.grad(score(soft, batch, grad=True).scores.sum(), leaf)
        ahead, behind = (float(score(soft, filmed(actions, bias + h)).scores.sum()) for h in (1e-2, -1e-2))
        assert float(slope) * bias < 0
        assert float(slope) == pytest.approx((ahead - behind) / 2e-2, rel=1e-2)


def test_it_sees_the_frames_of_the_models_own_rate() -> None:
    """Every second frame of a film of 8 fps is the film of 4 fps."""
    actions = drawn(3, 8, seed=3)
    batch, fine = filmed(actions), filmed(actions.repeat_interleave(2, 1), -0.5 * actions.repeat_interleave(2, 1))
    asked = RewardBatch(prompts=batch.prompts, videos=fine.videos, fps=8.0, metadata=batch.metadata)
    reward = InverseDynamics(MODEL, fps=4.0)
    assert score(reward, asked).scores.tolist() == [[1.0]] * 3
    plain = score(InverseDynamics(MODEL), asked, max_fail_rate=1)
    assert plain.info[0].startswith(
        "got 8 actions for 17 frames, as the model sees the video; expected 16, one between"
    )
    for fps in (6.0, 2.0):
        with pytest.raises(RewardError, match=f"got videos of {fps:g} fps; expected 4, those of the inverse dynamics"):
            score(reward, RewardBatch(prompts=["p"], videos=fine.videos[:1], fps=fps))


def test_frames_are_resized_to_what_the_model_was_trained_on() -> None:
    """At half the width, a shift of two pixels is one."""
    actions = 2 * drawn(2, 6, seed=4).clamp(-1, 1)
    batch = filmed(actions)
    halved = [{"actions": row} for row in (actions // 2 + REACH).tolist()]
    asked = RewardBatch(prompts=batch.prompts, videos=batch.videos, fps=4.0, metadata=halved)
    assert score(InverseDynamics(MODEL, size=(1, 64)), asked).scores.tolist() == [[1.0]] * 2
    assert float(score(InverseDynamics(MODEL), asked).scores.max()) < 1


BAD: list[tuple[Any, str]] = [
    (None, "metadata['actions'] is None; expected a list of 3 actions"),
    ([4, 4], "got 2 actions for 4 frames"),
    ([4, 9, 4], "got the class 9 of 'action'; expected less than 9, the classes of the model"),
    ([4, -1, 4], "got action 1 as -1; expected the number of a class"),
    ([4, 4, 0.5], "got action 2 as 0.5; expected the number of a class"),
    ([4, "left", 4], "got action 1 as 'left'; expected the number of a class, or one of []"),
    ([[4, 4], [4, 4], [4, 4]], "got action 0 as [4, 4]; expected one class for each of ['action']"),
    ("444", "metadata['actions'] is '444'; expected a list"),
]


def test_a_sample_with_other_actions_has_no_score_and_harms_no_other() -> None:
    batch = filmed(torch.zeros(len(BAD) + 1, 3).long())
    for number, (actions, _) in enumerate(BAD):
        batch.metadata[number]["actions"] = actions
    output = score(InverseDynamics(MODEL, batch_size=2), batch, max_fail_rate=1)
    assert output.valid[:, 0].tolist() == [False] * len(BAD) + [True] and output.scores[-1].item() == 1
    for text, (_, reason) in zip(output.info, BAD, strict=False):
        assert reason in text, text
    assert bool(output.components["accuracy/action"][:-1].isnan().all())


def test_a_video_of_one_frame_has_no_actions() -> None:
    batch = RewardBatch(prompts=["p"], videos=dots(torch.full((1, 1), 9.0)), fps=4.0, metadata=[{"actions": []}])
    output = score(InverseDynamics(MODEL), batch, max_fail_rate=1)
    assert not bool(output.valid) and "got 0 actions for 1 frames" in output.info[0]


def test_batch_mates_do_not_matter() -> None:
    actions = drawn(5, 7, seed=5)
    batch = filmed(actions, 0.6 * torch.randn(actions.shape, generator=torch.Generator().manual_seed(6)))
    options: dict[str, Any]
    for options in ({}, {"balanced": True}, {"soft": True}):
        reward = InverseDynamics(MODEL, batch_size=2, **options)
        alone = torch.cat([score(reward, part).scores for part in in_parts(batch)])
        torch.testing.assert_close(alone, score(reward, batch).scores)


@dataclass(frozen=True)
class Two:
    """Says the shift, and a second axis of two classes whose answer is always the first."""

    finite: bool = True

    def load(self) -> None: ...

    def close(self) -> None: ...

    def logits(self, videos: Tensor) -> list[Tensor]:
        (shift,) = MODEL.logits(videos)
        said = torch.tensor([0.0, -1.0]).repeat(*shift.shape[:2], 1)
        said[:, 0, 0] /= float(self.finite)  # 0 / 0
        return [shift, said]


def test_several_axes_by_name() -> None:
    batch = filmed(torch.tensor([[0, 1, -1, 0]]))
    keys = ["none", "jump", "none", "none"]
    batch.metadata[0]["actions"] = [list(pair) for pair in zip([4, 5, 3, 3], keys, strict=True)]
    output = score(InverseDynamics(Two(), axes={"camera": [], "keys": ["none", "jump"]}), batch)
    assert output.components["accuracy/camera"].item() == output.components["accuracy/keys"].item() == 0.75
    assert output.scores.item() == 0.75
    infinite = score(
        InverseDynamics(Two(finite=False), axes={"camera": [], "keys": []}), batch_of_numbers(), max_fail_rate=1
    )
    assert infinite.info == ["the model's logits of 'keys' are not finite"] and not bool(infinite.valid)


def batch_of_numbers() -> RewardBatch:
    batch = filmed(torch.tensor([[0, 1]]))
    batch.metadata[0]["actions"] = [[4, 0], [5, 1]]
    return batch


def test_what_cannot_be_is_refused() -> None:
    for axes in ({"camera": []}, {"camera": [], "keys": ["none"]}):
        batch = batch_of_numbers()
        batch.metadata[0]["actions"] = [0, 0] if len(axes) == 1 else [[4, 0], [5, 0]]
        with pytest.raises(RewardError, match=r"got logits of shapes .* from Two; expected \(1, 2\) and the number"):
            score(InverseDynamics(Two(), axes=axes), batch)
    for settings in ({"fps": 0.0}, {"size": (0, 4)}, {"batch_size": 0}, {"axes": {}}, {"axes": {"a": ["x", "x"]}}):
        with pytest.raises(ValueError, match="expected"):
            InverseDynamics(MODEL, **settings)


def test_yaml_builds_it_with_a_model_by_import_path() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    text = {"model": {"class_path": "tests.helpers.inverse_dynamics.CentroidShift", "init_args": {"reach": 2}}}
    made = parser.instantiate(parser.parse_object({"reward": {
        "class_path": "rewards.InverseDynamics", "init_args": {**text, "size": [64, 64], "axes": {"keys": ["no", "yes"]}}
    }})).reward  # fmt: skip
    assert repr(made) == repr(InverseDynamics(CentroidShift(2), size=(64, 64), axes={"keys": ["no", "yes"]}))
