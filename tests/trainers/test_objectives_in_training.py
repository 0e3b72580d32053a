"""Objectives inside the trainer: what each evaluates, that it moves the adapter, that parts switched off change nothing."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowalign.advantage import Mixed, Normalized
from flowalign.distributed import processes as distributed
from flowalign.distributed.processes import Processes
from flowalign.objectives import ClippedRatio, DynamicClip, Guard, KLMask, KLPenalty, LayerTuning
from flowalign.selectors import All, Fraction, NonZeroAdvantage
from samplers import Chain, Fixed, Window
from tests.helpers.policy_gradient import PROMPTS, gradients, make, run_updates

SHARED = Window(size=2, low=0, high=3, position=Fixed(0))


def trained(pipeline: Path, plan=SHARED, **parts):
    """(gradients, metrics of the rollout, metrics of the update, trained rows) of one update."""
    policy, trainer = make(pipeline, plan, **parts)
    batch = trainer.collect(PROMPTS, 0)
    before = policy.evaluations
    (update,) = trainer.updates(batch)
    for micro_batch in update.micro_batches:
        micro_batch().backward()
    return gradients(policy), batch.metrics, update.after(), policy.evaluations - before


def size(found: dict[str, torch.Tensor]) -> float:
    return float(torch.stack([g.square().sum() for g in found.values()]).sum().sqrt())


@pytest.mark.parametrize("objective", [Guard(1e-3), KLMask()], ids=["guard", "mask"])
def test_old_means_cost_no_forward(tiny_pipeline: Path, objective) -> None:
    found, rollout, update, rows = trained(tiny_pipeline, objective=objective)
    states = 2 * (1 + 3)  # two prompts: the shared start, then three states
    assert rows == states and "cost/frozen_per_image" not in rollout
    assert size(found) > 0 and update["ratio/clip_fraction"] == 0 and update["ratio/drift_max"] < 1e-6


def test_mask_and_clip_start_with_the_same_gradient(tiny_pipeline: Path) -> None:
    mask, clip = (trained(tiny_pipeline, objective=o)[0] for o in (KLMask(), ClippedRatio(1e-2)))
    for name, gradient in clip.items():
        torch.testing.assert_close(mask[name], gradient, rtol=1e-4, atol=1e-6)


def test_wide_dynamic_bounds_change_nothing_at_ratio_one(tiny_pipeline: Path) -> None:
    plain, dynamic = (trained(tiny_pipeline, dynamic_clip=c)[0] for c in (None, DynamicClip(1e-3, 1e-2)))
    assert all(torch.equal(plain[name], dynamic[name]) for name in plain)


def test_layer_tuning_adds_its_gradient(tiny_pipeline: Path) -> None:
    plan = Window(size=3, low=0, high=3, position=Fixed(0))
    plain, *_ = trained(tiny_pipeline, plan)
    tuned, _, metrics, rows = trained(tiny_pipeline, plan, supervision={"sft": LayerTuning(scale=5.0)})
    off, *_ = trained(tiny_pipeline, plan, supervision={"sft": LayerTuning(scale=0.0)})
    assert rows == 2 * (1 + 3 + 3) and metrics["loss/sft"] > 0
    assert size({name: tuned[name] - plain[name] for name in plain}) > 1e-3 * size(plain)
    assert all(torch.equal(plain[name], off[name]) for name in plain)


def test_layer_tuning_is_a_mean_over_the_states_of_its_own_update(tiny_pipeline: Path) -> None:
    plan, loss = Window(size=3, low=0, high=3, position=Fixed(0)), {}
    for parts in (1, 2):
        _, trainer = make(tiny_pipeline, plan, supervision={"sft": LayerTuning(scale=5.0)}, updates_per_rollout=parts)
        batch, loss[parts] = trainer.collect(PROMPTS, 0), []
        for update in trainer.updates(batch):
            for micro_batch in update.micro_batches:
                micro_batch().backward()
            loss[parts].append(update.after()["loss/sft"])
    assert sum(loss[2]) / 2 == pytest.approx(loss[1][0], rel=1e-4)  # equally many states in both groups


def test_the_loss_does_not_depend_on_the_micro_batch(tiny_pipeline: Path) -> None:
    parts = {
        "objective": Guard(1e-3),
        "supervision": {"sft": LayerTuning(scale=1.0)},
        "regularizers": {"kl": KLPenalty(0.1)},
    }
    together, *_ = trained(tiny_pipeline, **parts)
    single, *_ = trained(tiny_pipeline, micro_batch=1, **parts)
    scale = max(float(g.abs().max()) for g in together.values())
    for name, gradient in together.items():
        torch.testing.assert_close(single[name], gradient, rtol=1e-3, atol=1e-4 * scale)


def test_a_share_of_the_steps_is_another_one_in_the_next_iteration(tiny_pipeline: Path) -> None:
    _, trainer = make(tiny_pipeline, Chain(), select=All([NonZeroAdvantage(), Fraction(0.7)]))
    batch = trainer.collect(PROMPTS, 0)
    assert batch.uids == (0, 1)
    run_updates(trainer, batch)
    assert batch.metrics["group/trained_edges"] == 6 * 2  # int(0.7 · 3) of each sample's three steps


def test_equal_channels_with_half_the_weight_are_one(tiny_pipeline: Path) -> None:
    policy, trainer = make(tiny_pipeline, SHARED)
    batch = trainer.collect(PROMPTS, 0)
    run_updates(trainer, batch)
    one = gradients(policy)
    trainer.signal = replace(trainer.signal, advantage=Mixed(Normalized(), "keep", {"a": 0.5, "b": 0.5}))
    twice = replace(batch, scores=batch.scores.repeat(1, 2), valid=batch.valid.repeat(1, 2), channels=("a", "b"))
    run_updates(trainer, twice)
    both = gradients(policy)
    for name, gradient in one.items():
        torch.testing.assert_close(both[name], gradient, rtol=1e-4, atol=1e-7)


def test_dynamic_bounds_of_a_process_that_only_pads(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two states for three processes: the last one has no edge, so no bound to judge its replay by, and is sent
    a state with its children."""
    sent: list[int] = []
    monkeypatch.setattr(distributed, "all_to_all", lambda into, *_: sent.append(len(into.zero_())))
    plan = Window(size=1, low=0, high=3, position=Fixed(0))
    _, trainer = make(tiny_pipeline, plan, dynamic_clip=DynamicClip(1e-3, 1e-2))
    batch = trainer.collect(PROMPTS, 0)
    trainer.task = replace(trainer.task, processes=Processes(2, 3))
    (update,) = trainer.updates(batch)
    assert sent[-1] == 4
    assert [float(micro_batch().detach()) for micro_batch in update.micro_batches] == [0.0]


def test_where_no_advantage_is_left_there_is_no_step(tiny_pipeline: Path) -> None:
    """One group scores alike: with NonZeroAdvantage and an update per group, only the other one is a step."""
    _, trainer = make(tiny_pipeline, SHARED, select=NonZeroAdvantage(), updates_per_rollout=2)
    batch = trainer.collect(PROMPTS, 0)
    batch.scores[:3] = 0.5
    assert batch.forest.tree.group[batch.forest.tree.leaves].tolist() == [0, 0, 0, 1, 1, 1]
    silent, loud = trainer.updates(batch)
    assert not silent.micro_batches and "ratio/clip_fraction" not in silent.after()
    assert len(loud.micro_batches) == 1


@pytest.mark.parametrize("anchor", ["detach", "rescore", "stored"])
def test_what_the_first_ratio_is_taken_against(tiny_pipeline: Path, anchor: str) -> None:
    """Weights that moved after the rollout stand for rounding: against its own log-prob a step has ratio 1 all the same."""
    for objective in (ClippedRatio(1e-5), Guard(1e-5), KLMask(1e-9)):
        policy, trainer = make(tiny_pipeline, SHARED, objective=objective, anchor=anchor)
        batch = trainer.collect(PROMPTS, 0)
        with torch.no_grad():
            for _, parameter in policy.trainable_parameters():
                parameter.mul_(1.1)
        (update,) = trainer.updates(batch)
        for micro_batch in update.micro_batches:
            micro_batch().backward()
        metrics = update.after()
        assert metrics["ratio/drift_max"] > 1e-5
        if anchor == "stored":
            assert metrics["ratio/clip_fraction"] > 0 and metrics["ratio/approx_kl"] > 0
        else:
            assert metrics["ratio/clip_fraction"] == metrics["ratio/approx_kl"] == 0


def test_a_later_update_is_rescored_by_its_own_path(tiny_pipeline: Path) -> None:
    """The second update of a rollout, weights unchanged by the first: ratio 1 although the rollout's log-probs have drifted,
    at one more row for each of its states."""
    found = {}
    for anchor in ("detach", "rescore"):
        policy, trainer = make(tiny_pipeline, SHARED, objective=Guard(1e-5), anchor=anchor, updates_per_rollout=2)
        batch = trainer.collect(PROMPTS, 0)
        with torch.no_grad():
            for _, parameter in policy.trainable_parameters():
                parameter.mul_(1.1)
        before = policy.evaluations
        for update in trainer.updates(batch):
            for micro_batch in update.micro_batches:
                micro_batch()
            metrics = update.after()
        found[anchor] = policy.evaluations - before, metrics["ratio/approx_kl"]
    (plain, drifted), (rescored, exact) = found["detach"], found["rescore"]
    assert rescored - plain == 1 + 3  # the second prompt's states
    assert exact == 0 < drifted
