"""Any reward of finished samples as a reward of the states on the way to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rewards.base import Reward, RewardBatch, RewardOutput, RewardSpec, spec_of


@dataclass(frozen=True, eq=False)
class OnCompletion:
    """`reward` of what deterministic steps make of a state x_σ of the rollout: a process reward (TP-GRPO, 2602.06422, takes all
    steps that are left; Euphonium, 2602.04928, and ReFL, 2304.05977, one).

    steps: 1 is the x0-prediction (x − σ·v of a rectified flow), which costs no network evaluation beyond the rollout's own; S cost
    S − 1 more of each state; None takes all that are left. All go to where the grid ends: of a Stable Diffusion whose last level is
    timestep 0, one step leaves √(1−ᾱ₀) = 0.03 of the predicted noise in, as it is in the finished samples. max_sigma: states
    noisier than this are not scored: their predictions are blurred, and foreign to most rewards (0.6 is a common limit of
    rectified flows; of Stable Diffusion σ counts timesteps, and 0.6 is nine tenths noise). prefix: before the names of the
    channels, so that they differ from those of the same reward of finished samples. Compare scores of one grid step only.
    ValueError for a reward of states, or one that compares groups."""

    reward: Reward
    steps: int | None = 1
    max_sigma: float = 0.6
    prefix: str = "x0_"

    def __post_init__(self) -> None:
        if spec_of(self.reward).scope != "terminal":
            raise ValueError(
                f"got reward {self.reward.name!r} of scope {spec_of(self.reward).scope!r}; expected 'terminal'"
            )
        self.spec  # noqa: B018 checks the options

    @property
    def name(self) -> str:
        return f"{self.prefix}{self.reward.name}"

    @property
    def spec(self) -> RewardSpec:
        """The reward's, of states."""
        spec = spec_of(self.reward)
        channels = tuple(f"{self.prefix}{channel}" for channel in spec.channels)
        return replace(
            spec, scope="completion", completion_steps=self.steps, max_sigma=self.max_sigma, channels=channels
        )

    def load(self) -> None:
        self.reward.load()

    def close(self) -> None:
        self.reward.close()

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        return self.reward(batch)
