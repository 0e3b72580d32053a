"""DDPO's running statistics: a sample against the last rewards of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowalign.advantage.base import FLAT, Advantages, SignalContext
from flowalign.credit import EdgeValues
from flowalign.credit.base import lines
from samplers import Forest

APART = 1e-9  # values of one sample's steps further apart than this are not one reward


@dataclass(frozen=True)
class PromptTracker:
    """(reward − mean) / (std + delta) over the last `size` rewards of the sample's prompt, clamped to ±clip (DDPO,
    2305.13301; the figures are ddpo-pytorch's).

    The rewards of this iteration enter first, first in first out; while a prompt has fewer than `min_count` entries, mean
    and std are those of the whole batch instead. Population std; where it is below 1e-6 the advantage is 0. An entry is one
    sample, however many of its steps are trained, and all of them get its advantage; invalid samples are no entries.
    A prompt is its uid, so two rows of equal text are two prompts (ddpo-pytorch goes by the text), and which process holds
    it does not matter.
    Not kept by a group of `size` samples or more: this iteration's alone then fill the entries, nothing is remembered.
    Cost: `size` numbers per prompt and channel in the checkpoint.
    ValueError for a credit whose values differ between the steps of one sample (gains, trees)."""

    size: int = 16
    min_count: int = 16
    delta: float = 1e-6
    clip: float = 5.0

    def __post_init__(self) -> None:
        if not 2 <= self.min_count <= self.size:
            raise ValueError(f"got size={self.size}, min_count={self.min_count}; expected 2 <= min_count <= size")
        if self.delta < 0 or self.clip <= 0:
            raise ValueError(f"got delta={self.delta}, clip={self.clip}; expected >= 0 and > 0")

    def compare(self, forest: Forest, credit: EdgeValues, context: SignalContext) -> Advantages:
        tree = forest.tree
        # a step of each sample [S], and the sample of each step [E]
        of_sample, sample = lines(tree).last.unique(return_inverse=True)
        group = tree.group[tree.edges[of_sample]].tolist()
        prompts = [str(context.uids[number] if context.uids else number) for number in group]
        columns, flat = [], []
        for channel, values, valid in zip(credit.channels, credit.values.T, credit.valid.T, strict=True):
            rewards, known = _per_sample(values, valid, sample, len(of_sample))
            mean, std = self._statistics(rewards, known, prompts, context.memory.setdefault(channel, {}))
            advantage = ((rewards - mean) / (std + self.delta)).clamp(-self.clip, self.clip)
            columns.append(torch.where(valid & (std > FLAT)[sample], advantage[sample], 0.0))
            spread = {prompt: float(scale) for prompt, scale in zip(prompts, std, strict=True)}
            flat.append(sum(scale <= FLAT for scale in spread.values()) / max(len(spread), 1))
        return Advantages(torch.stack(columns, 1).float(), credit.valid, sum(flat) / len(flat))

    def _statistics(
        self, rewards: Tensor, known: Tensor, prompts: list[str], entries: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Mean and std [S] that each sample is compared with. entries: rewards by prompt, updated."""
        for prompt, reward, scored in zip(prompts, rewards.tolist(), known.tolist(), strict=True):
            if scored:
                entries[prompt] = [*entries.get(prompt, []), reward][-self.size :]
        batch = rewards[known] if bool(known.any()) else rewards.new_zeros(1)
        found = {}
        for prompt in dict.fromkeys(prompts):
            own = entries.get(prompt, [])
            compared = torch.tensor(own, dtype=torch.float64) if len(own) >= self.min_count else batch
            found[prompt] = torch.stack([compared.mean(), compared.std(correction=0)])
        mean, std = torch.stack([found[prompt] for prompt in prompts], 1)
        return mean, std


def _per_sample(values: Tensor, valid: Tensor, sample: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The one value of each sample [S] and whether it has one, from those of its steps [E]."""
    high, low = torch.full((2, count), torch.inf, dtype=torch.float64)
    high = (-high).scatter_reduce(0, sample, torch.where(valid, values, -torch.inf), "amax")
    low = low.scatter_reduce(0, sample, torch.where(valid, values, torch.inf), "amin")
    known = high >= low
    if bool((high - low)[known].gt(APART * high[known].abs().clamp(min=1)).any()):
        raise ValueError(
            "got a credit whose values differ between the steps of one sample, for PromptTracker, which keeps one reward of "
            "each; expected Broadcast over a plan of chains: take Normalized(within=prompt_step) with such a credit"
        )
    return torch.where(known, high, 0.0), known
