"""What is said before a run: the forecast."""

import re
from pathlib import Path

import torch

from flowalign.config import load_config
from flowalign.rollouts.rolling import grow, leaves_per_group
from flowalign.run.preflight import forecast

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


def test_previews_are_stated(tmp_path: Path) -> None:
    """Of eight starts four stay, by previews of two steps out of four: 8·2 + 4·3 rows of each prompt for four images."""
    plan = ["rollout.plan.class_path=samplers.Selected", "rollout.plan.init_args.plan=samplers.Chain"]
    selected = [*plan, "rollout.plan.init_args.counts={0: 4}", "rollout.plan.init_args.preview_steps=2"]
    printed = text(tmp_path, *selected, "rollout.group_size=8", "rollout.num_inference_steps=4")
    assert "3 iterations × 2 prompts × 4 images = 24 images" in printed and "rollout 7.00" in printed
    assert "previews: 2.00 per image, decoded and scored to select, then discarded" in printed
    assert "previews" not in text(tmp_path)


def test_refills_are_in_the_most_expensive_case(tmp_path: Path) -> None:
    """3 iterations × 2 prompts × 7 velocities, once more for each refill; nothing else becomes more."""
    plain, refilled = text(tmp_path), text(tmp_path, "rollout.refill=2")
    (least,), (most,) = (re.findall(r"whole run: at most ([\d,]+) forwards", each) for each in (plain, refilled))
    assert int(most) - int(least) == 2 * (3 * 2 * 7)
    assert "refill: the whole run counts 2 further rollouts of each group" in refilled and "refill" not in plain


def test_completions_are_counted_once_for_rewards_of_as_many_steps(tmp_path: Path) -> None:
    """Two rewards of two steps: one more forward for each state with at least two steps left, and both score every state."""
    wrapped = (
        "{class_path: rewards.OnCompletion, init_args: {reward: rewards.JPEGCompressibility, steps: 2, prefix: %s}}"
    )
    read = [
        "trainer.signal.credit={class_path: flowalign.credit.Process, init_args: {score: a_jpeg_compressibility}}",
        "trainer.step_weight={class_path: flowalign.objectives.Agreement, init_args: {score: b_jpeg_compressibility}}",
    ]
    plain = text(tmp_path)
    completed = text(tmp_path, f"process_rewards=[{wrapped % 'a_'}, {wrapped % 'b_'}]", *read)
    (least,), (most,) = (re.findall(r"whole run: at most ([\d,]+) forwards", each) for each in (plain, completed))
    settings = load_config(TINY, [])[0].rollout
    tree = grow(settings, 0, 0, [0])
    ends = torch.cat([tree.edges, tree.parents_of_edges]).unique()
    assert int(most) - int(least) == 3 * 2 * int((tree.index[ends] <= tree.num_steps - 2).sum()) > 0
    samples, _ = leaves_per_group(settings)
    assert f"completions: at most {2 * len(ends) / samples:.2f} per image" in completed and "completions" not in plain


def test_guidance_that_differs_is_said(tmp_path: Path) -> None:
    printed = text(tmp_path, "rollout.guidance_scale=4.5", "rollout.allow_cfg_update=true")
    assert "rollout.guidance_scale=4.5, evaluation.guidance_scale=1;" in printed
    both = ("rollout.guidance_scale=4.5", "rollout.allow_cfg_update=true", "evaluation.guidance_scale=4.5")
    assert "guidance" not in text(tmp_path, *both) and "guidance" not in text(tmp_path)


def test_a_trainer_may_roll_out_less_than_the_plan(tmp_path: Path) -> None:
    """It rolls nothing out, and trains one state of each of two prompts."""
    printed = text(tmp_path, "trainer={class_path: tests.helpers.treeless_trainer.Treeless}")
    assert (
        "rollout 0.00, update at most 0.33" in printed and "whole run: at most 0 forwards, 6 with backward" in printed
    )
