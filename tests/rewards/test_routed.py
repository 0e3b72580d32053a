"""One reward for each kind of sample: who gets which, what is said of errors, and the spec of all together."""

import pytest
import torch

from rewards import (
    Channels,
    ColorAccuracy,
    ColorCloseness,
    FunctionReward,
    JPEGCompressibility,
    RewardBatch,
    RewardError,
    RewardOutput,
    RewardSpec,
    Routed,
    SourceConsistency,
    score,
)


class Seen:
    """Scores `base` plus the brightness of each sample, and keeps the prompts that it was given."""

    def __init__(self, base=0.0, name="seen", **spec):
        self.base, self.name, self.spec, self.prompts, self.life = base, name, RewardSpec(**spec), [], []

    def __call__(self, batch):
        self.prompts.append(batch.prompts)
        scores = self.base + batch.images.mean((1, 2, 3))
        uncertainty = torch.full_like(scores, 0.5) if self.base else None
        info = [f"of {self.base:g}"] * len(batch)
        return RewardOutput(
            scores, scores < 100, {"base": scores.detach() * 0 + self.base}, info, uncertainty=uncertainty
        )

    def load(self):
        self.life.append("load")

    def close(self):
        self.life.append("close")


def batch_of(*kinds):
    images = torch.arange(len(kinds)).float()[:, None, None, None].expand(-1, 3, 2, 2) / 10
    metadata = [{} if kind is None else {"task": kind} for kind in kinds]
    return RewardBatch(prompts=[f"p{i}" for i in range(len(kinds))], images=images.clone(), metadata=metadata)


def test_each_reward_gets_its_own_samples_and_each_sample_its_own_score():
    ten, hundred = Seen(10.0), Seen(99.85)
    output = score(Routed("task", {"a": ten, "b": hundred}), batch_of("b", "a", "b", "a"))
    assert ten.prompts == [["p1", "p3"]] and hundred.prompts == [["p0", "p2"]]
    assert output.scores[[1, 3], 0].tolist() == pytest.approx([10.1, 10.3])
    assert output.valid[:, 0].tolist() == [True, True, False, True]  # 100.05 is none
    assert output.info == ["of 99.85", "of 10", "of 99.85", "of 10"]
    assert torch.equal(output.components["a/base"].isnan(), torch.tensor([True, False, True, False]))
    assert output.components["b/base"][0].item() == pytest.approx(99.85)


def test_a_value_without_a_reward_is_an_error_or_goes_to_the_default():
    one, rest = Seen(10.0), Seen()
    with pytest.raises(
        RewardError, match=r"metadata\['task'\]='c', for which there is no reward; expected one of \['a'\]"
    ):
        score(Routed("task", {"a": one}), batch_of("a", "c"))
    with pytest.raises(RewardError, match=r"metadata\['task'\]=None"):
        score(Routed("task", {"a": one}), batch_of(None))
    output = score(Routed("task", {"a": one}, default=rest), batch_of("c", "a", None, ["a"], "default"))
    assert output.scores[:, 0].tolist() == pytest.approx([0, 10.1, 0.2, 0.3, 0.4]) and rest.prompts == [
        ["p0", "p2", "p3", "p4"]
    ]
    assert output.uncertainty[:, 0].isnan().tolist() == [True, False, True, True, True]


def test_parts_are_loaded_and_closed_once():
    one, two = Seen(1.0), Seen(2.0)
    routed = Routed("task", {"a": one, "b": one}, default=two)
    routed.load()
    routed.close()
    assert one.life == two.life == ["load", "close"]


def test_its_spec_is_that_of_all_parts():
    small = Seen(inputs=("images",), range=(-2, 0), differentiable=True, memory="S", licence="A", elsewhere=True)
    large = Seen(inputs=("latents",), range=(-1, 4), differentiable=True, memory="L", licence="B", groupwise=True)
    spec = Routed("task", {"a": small}, default=large).spec
    assert spec.inputs == ("images", "latents") and spec.range == (-2, 4) and spec.memory == "L"
    assert (
        spec.differentiable and spec.groupwise and not spec.elsewhere and spec.licence == "A; B" and not spec.channels
    )
    assert Routed("task", {"a": small, "b": Seen()}).spec.range is None
    assert not Routed("task", {"a": small, "b": ColorAccuracy()}).spec.differentiable
    with pytest.raises(ValueError, match="expected at least one"):
        Routed("task", {})
    with pytest.raises(ValueError, match="expected one score per part"):
        Routed("task", {"a": Channels([JPEGCompressibility(), ColorCloseness()])})


def test_gradients_reach_each_sample_from_its_own_reward():
    double = FunctionReward("flowalign.diagnostics.measure:brightness", differentiable=True)
    images = batch_of("a", "b").images.requires_grad_()
    batch = RewardBatch(
        prompts=["p", "q"],
        images=images,
        metadata=[{"task": "a"}, {"task": "b"}],
        conditions=[[], [torch.ones(3, 2, 2)]],
    )
    output = score(Routed("task", {"a": double, "b": SourceConsistency()}), batch, grad=True)
    (gradient,) = torch.autograd.grad(output.scores.sum(), images)
    assert gradient[0].sum().item() == pytest.approx(1) and torch.allclose(gradient[1], torch.full((3, 2, 2), 1 / 12))
