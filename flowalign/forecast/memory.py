"""Memory of one device, phase by phase, before a model is loaded; and the switch that makes a configuration fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from flowalign.config import TrainConfig
from flowalign.distributed.stepper import Sharding
from flowalign.errors import ConfigError
from flowalign.forecast.footprint import FP32, Footprint
from flowalign.forecast.recorded import RecordedFootprint
from flowalign.models.pipeline_policy import DECODE_BATCH
from flowalign.rollouts.rolling import outline
from flowalign.rollouts.task import may_overlap
from rewards import Reward

GIB = 2**30
CONTEXT = GIB // 2  # of CUDA and its libraries, which no tensor shows
# fp32 latents of a rollout on a device: of each state of two generations, and of each that is stepped at once
GENERATIONS, STEPPED = 2, 6
OPTIMIZED = 3 * FP32  # a gradient and AdamW's two moments
ZERO2 = OPTIMIZED + FP32  # DeepSpeed steps a copy of its part of the weights
REWARDS = {"cpu": 0, "S": 0, "M": 2, "L": 8, "XL": 20}  # RewardSpec.memory -> the least GiB of its class


@dataclass(frozen=True)
class Phase:
    """What a phase of an iteration holds at its peak beside what is always there: bytes, and what they are."""

    name: str
    needed: float
    figure: str


@dataclass(frozen=True, eq=False)
class Memory:
    """Of one of `devices` devices, in bytes, for a configuration. A lower bound: the activations of rewards, fragmentation and the
    buckets of several processes come on top."""

    config: TrainConfig
    footprint: Footprint | RecordedFootprint
    devices: int = 1
    sharding: Sharding = "none"

    @cached_property
    def always(self) -> dict[str, float]:
        """What is on the device in every phase, from the first update on."""
        config, own, settings = self.config, self.footprint, self.config.policy
        roles = config.roles.values()
        trained = 1 + sum(role.update == "trained" for role in roles)
        copies = len(roles) + (0 if own.has_lora else settings.reference_copy)
        weights, parts = own.weights(settings), self.devices if self.sharding == "networks" else 1
        held = 1 if own.has_lora else parts  # adapters stay whole
        stepped = ZERO2 / self.devices if self.sharding == "optimizer" else OPTIMIZED / held
        return {
            "weights": weights / parts,
            "LoRA" if own.has_lora else "copies": own.copy * (copies + own.has_lora) / held,
            "optimizer": stepped * own.numbers * trained,
            "EMA": 0 if config.run.ema_decay is None else FP32 * own.numbers / held,
            "text encoders": 0 if "encoders" in settings.offload else own.encoders,
            "VAE": 0 if "vae" in settings.offload else own.vae,
            "rewards": GIB * sum(REWARDS[reward.spec.memory] for reward in _rewards(config)),
            "CUDA": CONTEXT,
        }

    @cached_property
    def phases(self) -> list[Phase]:
        """In their order: encode, rollout, decode, update, evaluation."""
        rollout, settings, own = self.config.rollout, self.config.policy, self.footprint
        evaluation = self.config.evaluation
        together = settings.decode_batch or DECODE_BATCH
        batch = min(evaluation.batch_size, evaluation.count * evaluation.samples_per_prompt)
        rows, scale = min(rollout.micro_batch, self.widest), evaluation.guidance_scale
        decoded, shown = min(together, rows), min(together, batch)
        vae = own.vae if "vae" in settings.offload else 0
        away = own.encoders if "encoders" in settings.offload else 0
        state, measured = own.state(rollout.guidance_scale), own.state(scale)
        in_flight = (GENERATIONS * self.widest + STEPPED * rows) * own.latent
        decoding = vae + decoded * own.decode + 2 * rows * own.pixels
        return [
            Phase("encode", away + own.encode, "one prompt"),
            Phase("rollout", rows * state + in_flight + self.conditions + decoding * self.overlaps,
                  f"{rows} states × {_size(state)}, latents {_size(in_flight)}"
                  + f", beside them decode {_size(decoding)}" * self.overlaps),
            Phase("decode", decoding + self.conditions,
                  f"{decoded} images × {_size(own.decode)}"),
            self._update(vae),
            Phase("evaluation", max(batch * measured + (GENERATIONS + STEPPED) * batch * own.latent,
                                    vae + shown * own.decode + 2 * batch * own.pixels),
                  f"{batch} states × {_size(measured)}, then {shown} images"),
        ]  # fmt: skip

    def _update(self, vae: int) -> Phase:
        config, own = self.config, self.footprint
        update = config.trainer.forecast(config.rollout)
        if update.micro_batch is None:
            return Phase("update", self.conditions, "activations not known")
        scale = config.rollout.guidance_scale if update.guidance_scale is None else update.guidance_scale
        checkpointing = config.policy.gradient_checkpointing
        state = own.trained_state(scale, checkpointing)
        rows = min(update.micro_batch * update.held, -(-update.trained // (update.updates * self.devices)))
        figure = f"{rows} states × {_size(state)}" + (", checkpointed" if checkpointing else "")
        needed = rows * state + self.conditions
        if update.decoded:
            images = update.micro_batch * update.decoded
            needed += vae + images * own.decode_with_gradient
            figure += f", {images} images × {_size(own.decode_with_gradient)}"
        return Phase("update", needed, figure)

    @property
    def groups(self) -> int:
        """That one device rolls out in an iteration."""
        return -(-self.config.rollout.groups // self.devices)

    @cached_property
    def widest(self) -> int:
        """States of the widest generation that one device has in flight."""
        rollout = self.config.rollout
        generation = max(len(nodes) for nodes in outline(rollout).tree.generations)
        return min(self.groups, rollout.chunk or self.groups) * generation

    @property
    def overlaps(self) -> bool:
        """Whether a chunk is decoded while the next one is rolled out."""
        config, chunk = self.config, self.config.rollout.chunk
        return (
            chunk is not None
            and chunk < self.groups
            and may_overlap(config.rollout, config.reward, config.process_rewards)
        )

    @property
    def conditions(self) -> float:
        return self.groups * self.footprint.row

    @property
    def host(self) -> float:
        """In main memory: the states of an iteration that its update reads, and what is offloaded."""
        own, offload = self.footprint, self.config.policy.offload
        states = self.groups * len(outline(self.config.rollout).states) * own.latent
        return states + own.encoders * ("encoders" in offload) + own.vae * ("vae" in offload)

    @property
    def peaks(self) -> dict[str, float]:
        """Phase -> bytes in all."""
        return {phase.name: sum(self.always.values()) + phase.needed for phase in self.phases}

    def beyond(self, room: float) -> float:
        """Bytes that are lacking, over all phases."""
        return sum(max(0.0, peak - room) for peak in self.peaks.values())

    def changed(self, config: TrainConfig) -> Memory:
        """The same policy under other settings."""
        return replace(self, config=config)


def state_memory(
    config: TrainConfig, room: float | None, say: Callable[[str], None], devices: int = 1, sharding: Sharding = "none"
) -> None:
    """Says what each phase needs of one device; ConfigError if that cannot fit into its `room` bytes (None: not known). A network that
    cannot be measured without numbers is said, and never refused."""
    try:
        memory = Memory(config, Footprint(config), config.run.device_count or devices, sharding)
        lines = text(memory, room)
    except Exception as error:  # of a family's own code, which may ask for numbers
        say(f"memory: not known, since the network cannot run on shapes alone ({type(error).__name__}: {error})")
        return
    say(lines)
    if room is not None:
        check(memory, room)


def text(memory: Memory, room: float | None) -> str:
    """The lines of the forecast. room: bytes of the device, None if it is not known."""
    parts = ", ".join(f"{name} {_size(size)}" for name, size in memory.always.items() if size)
    phases = "; ".join(f"{each.name} {_size(memory.peaks[each.name])} ({each.figure})" for each in memory.phases)
    beside = "" if room is None else f" of {_size(room)}"
    return (
        f"memory of one device{beside}, at least: {parts}\n"
        f"at the peak of a phase: {phases}; main memory {_size(memory.host)}"
    )


def check(memory: Memory, room: float) -> None:
    """ConfigError if a phase cannot fit into `room` bytes, with the first switch, or the fewest, that would make it fit."""
    if not memory.beyond(room):
        return
    phase, (found, _) = max(memory.phases, key=lambda phase: phase.needed), fitting(memory, room)
    always = sum(memory.always.values())
    advice = f"set {' '.join(found)}" if found else (
        "none of decode_batch, offload, gradient_checkpointing, smaller batches, chunk and quantization is enough: take a larger device or "
        "a smaller size, set policy.vae_tiling=true where a decode is too large (its pixels differ), or shard the network (configs/accelerate/fsdp2.yaml)"
    )  # fmt: skip
    raise ConfigError(
        f"got a configuration whose {phase.name} needs at least {_size(always + phase.needed)} ({phase.figure}; {_size(always)} are always there); "
        f"expected at most the {_size(room)} of the device: {advice}"
    )


def fitting(memory: Memory, room: float) -> tuple[list[str], Memory]:
    """The overrides with which it fits, and the memory with them: the first switch that is enough alone, the cheapest first and each as little
    as needed; else several, of which the costliest is taken as little as the cheaper ones allow. Accuracy is given up only where all others
    are not enough. None, and the memory as it was, if all together are not enough."""
    return _fewest(memory, room, EXACT) or _fewest(memory, room, (*EXACT, _quantization)) or ([], memory)


def _fewest(memory: Memory, room: float, switches: Sequence[Switch]) -> tuple[list[str], Memory] | None:
    for switch in switches:
        for override, config in switch(memory.config):
            if not memory.changed(config).beyond(room):
                return [override], memory.changed(config)
    steps = [len(list(switch(memory.config))) for switch in switches]
    taken = list(steps)
    if _with_all(memory, switches, taken)[1].beyond(room):
        return None
    for place in reversed(range(len(switches))):
        for number in range(steps[place] + 1):
            taken[place] = number
            if not _with_all(memory, switches, taken)[1].beyond(room):
                break
    return _with_all(memory, switches, taken)


def _with_all(memory: Memory, switches: Sequence[Switch], taken: Sequence[int]) -> tuple[list[str], Memory]:
    """With each switch as many steps far as `taken` says; 0: not at all."""
    chosen = list[str]()
    for switch, number in zip(switches, taken, strict=True):
        if number:
            override, config = list(switch(memory.config))[number - 1]
            chosen, memory = [*chosen, override], memory.changed(config)
    return chosen, memory


# ------------------------------------------------------------------------------------------ switches

Changes = Iterator[tuple[str, TrainConfig]]
Switch = Callable[[TrainConfig], Changes]


def _decode_batch(config: TrainConfig) -> Changes:
    """Costs nothing but launches of kernels."""
    return _halved(config, "policy", "decode_batch", config.policy.decode_batch or DECODE_BATCH)


def _offload(config: TrainConfig) -> Changes:
    """Costs a copy per iteration and new prompt."""
    if "encoders" not in config.policy.offload:
        parts = [*config.policy.offload, "encoders"]
        yield f"policy.offload=[{','.join(parts)}]", _with(config, "policy", "offload", parts)


def _checkpointing(config: TrainConfig) -> Changes:
    """Costs one more forward per trained state."""
    if not config.policy.gradient_checkpointing:
        yield "policy.gradient_checkpointing=true", _with(config, "policy", "gradient_checkpointing", True)


def _trained_at_once(config: TrainConfig) -> Changes:
    """Costs speed below some tens of thousands of tokens; so do the next two. A trainer need not have it; under fixed_rows the rollout's
    calls have as many states."""
    size = config.trainer.forecast(config.rollout).micro_batch
    for override, smaller in () if size is None else _halved(config, "trainer", "micro_batch", size):
        if config.rollout.fixed_rows:
            rows = smaller.trainer.forecast(smaller.rollout).micro_batch
            yield f"{override} rollout.micro_batch={rows}", _with(smaller, "rollout", "micro_batch", rows)
        else:
            yield override, smaller


def _rolled_at_once(config: TrainConfig) -> Changes:
    if config.rollout.fixed_rows and config.trainer.forecast(config.rollout).micro_batch is not None:
        return iter(())  # as the update's
    return _halved(config, "rollout", "micro_batch", config.rollout.micro_batch)


def _evaluated_at_once(config: TrainConfig) -> Changes:
    return _halved(config, "evaluation", "batch_size", config.evaluation.batch_size)


def _chunk(config: TrainConfig) -> Changes:
    """Costs smaller last calls of each generation, and that nothing overlaps, which takes the memory of both."""
    serial = _with(config, "rollout", "overlap", False)
    if config.rollout.chunk is not None and config.rollout.overlap is not False:
        yield "rollout.overlap=false", serial
    for override, smaller in _halved(serial, "rollout", "chunk", config.rollout.chunk or config.rollout.groups):
        yield f"{override} rollout.overlap=false", smaller


def _quantization(config: TrainConfig) -> Changes:
    """Costs accuracy and speed."""
    if config.policy.trainable == "lora" and config.policy.quantization is None:
        for kind in ("8bit", "4bit"):
            yield f"policy.quantization={kind}", _with(config, "policy", "quantization", kind)


# from the cheapest, as in docs/gpu.md; results are the same but for rounding
EXACT: tuple[Switch, ...] = (
    _decode_batch, _offload, _checkpointing, _trained_at_once, _rolled_at_once, _evaluated_at_once, _chunk,
)  # fmt: skip


def _halved(config: TrainConfig, part: str, key: str, size: int) -> Changes:
    """Smaller ones, down to 1."""
    for number in range(1, size.bit_length()):
        yield f"{part}.{key}={size >> number}", _with(config, part, key, size >> number)


def _with(config: TrainConfig, part: str, key: str, value: object) -> TrainConfig:
    return replace(config, **{part: replace(vars(config)[part], **{key: value})})


def _rewards(config: TrainConfig) -> list[Reward]:
    """That this process loads."""
    return [each for each in (*config.rollout_rewards, *config.evaluation.rewards) if not each.spec.elsewhere]


def _size(size: float) -> str:
    if size < GIB:
        return f"{size / 2**20:,.0f} MiB"
    return f"{size / GIB:,.{2 if size < 10 * GIB else 1}f} GiB"


# ------------------------------------------------------------------------------------------ of a device


def device_memory(config: TrainConfig, device: torch.device) -> float | None:
    """Bytes of the device that the forecast is for: run.device_memory, or that of the GPU; None on a CPU."""
    if config.run.device_memory is not None:
        return config.run.device_memory * GIB
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
