"""What a rollout is asked to do, and what a trainer is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from flowalign.data import PromptRecord
from flowalign.distributed.processes import Processes
from flowalign.models.base import Policy, Size
from flowalign.rollouts.guidance import RewardGuidance
from rewards import Reward
from samplers import Kernel, Plan, Schedule, unscored


@dataclass(frozen=True)
class Rollout:
    """One iteration's rollout: `groups` prompts, `group_size` images each, whatever the number of processes.

    guidance_scale: 1 is no guidance (one evaluation per state; above 1 two). detach_uncond: the update sends no gradient
    through the unconditional half (flow_grpo's released code), so the gradient is guidance_scale · ∂v_c; the rollout then
    calls the network as the update does. schedule: the noise levels; None: the family's own grid. allow_cfg_update: a guided
    update inside a window of few steps is refused without it, since peers report collapse. draw: whether a random plan draws once per group or once per iteration (never
    inside a group). branch_scale: correlated noise of siblings (BranchGRPO's s, 4 there), see KeyedNoise; None makes it
    independent. micro_batch: states per network call. fixed_rows: exactly so many in every call of a run, of its updates and
    evaluations too; the last one of several is padded. Equal calls round alike: a bf16 update then finds the very log-probs of
    its rollout, and compiled blocks see one shape. chunk: groups that a process rolls out, decodes and scores at once, so that its
    device holds no more states than theirs; None: all. Noise is keyed, so results differ by the rounding of other batches only.
    overlap: whether a thread decodes and scores a chunk while the next one is rolled out, with the same results, where it may
    (see `may_overlap`); None: not on a CPU, whose cores the rollout has already. Takes the memory of both.

    sources, hint_key: for a plan with samples that are not the policy's own (samplers.Sourced). sources: "teacher" (or
    "hinted") -> the role that rolls these samples out; hinted ones are the policy's without it. hint_key: key of the
    prompts' metadata under which the hinted samples' prompt stands; the reward and the update see the prompt itself.
    reward_guidance: steps are drawn from a mean that a reward's gradient moves (Euphonium); None: from the kernel's own.
    preview_reward: by which a plan that selects (samplers.Selected) ranks its previews, PARM's potential, say; None: the
    run's reward. refill: how often a group that lacks the score of a sample is rolled out again in an iteration, with other
    noise; a sample that lacks it then, or with 0, leaves its group's statistics and the update.

    buckets: sizes [height, width], or [height, width, frames], of which each prompt is trained in one (flowalign.buckets.bucketed), an
    iteration in one; the policy's height, width and frames, which evaluations have, are among them. Without, all are of that size."""

    plan: Plan
    kernel: Kernel
    groups: int = 48
    group_size: int = 24
    num_inference_steps: int = 10
    schedule: Schedule | None = None
    guidance_scale: float = 1.0
    draw: Literal["group", "iteration"] = "group"
    branch_scale: float | None = None
    micro_batch: int = 64
    chunk: int | None = None
    overlap: bool | None = None
    allow_cfg_update: bool = False
    detach_uncond: bool = False
    sources: dict[str, str] = field(default_factory=dict)
    hint_key: str | None = None
    reward_guidance: RewardGuidance | None = None
    preview_reward: Reward | None = None
    refill: int = 0
    fixed_rows: bool = False
    buckets: list[list[int]] = field(default_factory=list)

    def sizes(self, usual: Size) -> list[Size]:
        """Of the buckets, `usual` alone without any; frames that a bucket does not say are those of `usual`. ValueError for a bucket that
        is none, or comes twice, and unless `usual` is among them."""
        if not self.buckets:
            return [usual]
        for bucket in self.buckets:
            if len(bucket) not in (2, 3) or min(bucket) < 1:
                raise ValueError(
                    f"got {bucket} in rollout.buckets; expected [height, width] or [height, width, frames], each from 1"
                )
        found = [Size(height, width, *(frames or [usual.frames])) for height, width, *frames in self.buckets]
        if len(set(found)) < len(found) or usual not in found:
            raise ValueError(
                f"got rollout.buckets={self.buckets}; expected different sizes, the policy's [{usual.height}, {usual.width}, "
                f"{usual.frames}] among them, which is that of evaluations: change them, or policy.height, width and frames"
            )
        return found

    @property
    def rows(self) -> int | None:
        """States of every network call; None: as many as there are."""
        return self.micro_batch if self.fixed_rows else None

    @property
    def asks_on_its_way(self) -> bool:
        """Whether it needs scores before its samples are finished."""
        return self.reward_guidance is not None or self.plan.select(unscored) is not None


def may_overlap(settings: Rollout, reward: Reward, process_rewards: Sequence[Reward]) -> bool:
    """Whether a thread may decode and score some groups while others are rolled out, which must not decode or ask rewards itself. A
    reward that is elsewhere is asked beside the rollout anyway, and decoding alone would share a GPU that it keeps busy."""
    return settings.overlap is not False and not (reward.spec.elsewhere or process_rewards or settings.asks_on_its_way)


@dataclass
class Counts:
    """What was decoded and scored so far by this process: decodes, images or videos, in decode_seconds; reward_calls, rows
    given to a reward."""

    decodes: int = 0
    reward_calls: int = 0
    decode_seconds: float = 0.0

    def since(self, before: Counts) -> Counts:
        """What came after `before`, an earlier copy."""
        return Counts(**{name: value - vars(before)[name] for name, value in vars(self).items()})


@dataclass(frozen=True, eq=False)
class Task:
    """What a trainer is given: the loaded policy, the reward, and the rollout with its kernel bound to the policy's path.

    size: of what the policy makes where a prompt has none of its own. process_rewards: score states of the rollout, into Forest.scores. fps: frames per second of a policy that makes videos.
    prompts: the whole training set, for what a trainer does before its first iteration (calibration, cold start); empty:
    it does nothing. counts: of decodes and reward calls, beside `policy.evaluations`."""

    policy: Policy
    reward: Reward
    rollout: Rollout
    seed: int
    size: Size
    processes: Processes = field(default_factory=Processes)
    process_rewards: Sequence[Reward] = ()
    fps: float | None = None
    prompts: Sequence[PromptRecord] = ()
    counts: Counts = field(default_factory=Counts)

    def size_of(self, prompts: Sequence[PromptRecord]) -> Size:
        """Of what is generated from these prompts of an iteration; ValueError for prompts of several buckets."""
        found = {record.size or self.size for record in prompts}
        if len(found) != 1:
            raise ValueError(f"got {len(prompts)} prompts of {len(found)} sizes; expected those of one bucket")
        return found.pop()
