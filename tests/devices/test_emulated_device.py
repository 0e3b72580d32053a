"""No step of a rollout makes a GPU wait, an update makes it wait once, and no tensors of two devices meet: on an emulated one."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowalign.build import task_of
from flowalign.config import load_config
from flowalign.distributed.stepper import Summed
from flowalign.models import LoRA, Policy, load_policy
from flowalign.run.checkpoints import Progress
from flowalign.run.iteration_log import IterationLog
from flowalign.run.run import Run
from rewards import RewardBatch, RewardOutput, RewardSpec
from samplers import (
    DDIM,
    Branch,
    Chain,
    Deterministic,
    DPMSolver2M,
    FlowSDE,
    Kernel,
    KeyedNoise,
    Plan,
    Tree,
    UniPC,
    VariancePreserving,
    diffusers_sigmas,
    fetch,
    generator,
    rollout,
    send,
)
from tests.helpers.emulated_device import DEVICE, EmulatedDevice, Event
from tests.helpers.method_layers import ON_GLYPHS, glyphs_layers

# ------------------------------------------------------------------------------------------ the emulator


def counted(device: EmulatedDevice) -> list[tuple[str, bool]]:
    return [(event.kind, event.waits) for event in device.events]


READS = {
    "float": lambda x: float(x.sum()),
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "a mask": lambda x: x[x > 0],
    "a mask that is set": lambda x: x.__setitem__(x > 0, torch.zeros(2, device=DEVICE)),
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "isfinite": lambda x: math.isfinite(x.sum()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_waits_is_counted_with_its_line(read: Any) -> None:
    with EmulatedDevice() as device:
        x = torch.ones(2, device=DEVICE)
        read(x)
        (x * 2 + x.square()).sum()
    assert [kind for kind, waits in counted(device) if waits] == ["wait"]
    assert device.events[0].site.startswith("tests/devices/test_emulated_device.py:")


def test_copies_are_counted_and_only_those_out_of_pinned_memory_are_not_waited_for() -> None:
    with EmulatedDevice() as device:
        host, pinned = torch.ones(3), torch.empty(3, pin_memory=True)
        with device.phase("there"):
            host.to(DEVICE), host.to(DEVICE, non_blocking=True), torch.tensor([1.0], device=DEVICE)
            there = pinned.copy_(host).to(DEVICE, non_blocking=True)
            there[torch.tensor([0, 2])]
        with device.phase("back"):
            there.cpu(), pinned.copy_(there, non_blocking=True), there.tolist()
    assert counted(device) == [("to device", True)] * 3 + [("to device", False), ("to device", True)] + [
        ("to host", True), ("to host", False), ("to host", True),
    ]  # fmt: skip
    assert [event.nbytes for event in device.seen("there")] == [12, 12, 4, 12, 16]


def test_tensors_of_two_devices_do_not_meet() -> None:
    with EmulatedDevice():
        x, host = torch.ones(2, 2, device=DEVICE), torch.ones(2, 2)
        for meet in (
            lambda: x + host, lambda: x @ host, lambda: torch.cat([x, host]), lambda: host[x.long()],
            lambda: x.__setitem__(torch.tensor([0], device=DEVICE), host[:1]),
        ):  # fmt: skip
            with pytest.raises(RuntimeError, match=r"same device"):
                meet()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert (x + torch.tensor(2.0)).tolist() == [[3.0, 3.0]] * 2  # a number of the host may


def test_bytes_are_counted_while_they_live() -> None:
    with EmulatedDevice() as device:
        x = torch.zeros(10, device=DEVICE)
        row = x[2:4]
        y = x + 1
        assert device.live == 80 and device.peak == 80
        del x, y
        assert device.live == 40, "a view keeps its storage"
        del row
        assert device.live == 0 and device.peak == 80


def test_a_weight_whose_data_is_set_has_it() -> None:
    """As the adapter of a role is filled."""
    with EmulatedDevice():
        weight = torch.nn.Parameter(torch.zeros(2, device=DEVICE))
        weight.data = torch.ones(2, device=DEVICE)
        weight.data.mul_(3)
        assert (2 * weight).tolist() == [6.0, 6.0] and weight.is_leaf and weight.requires_grad


def test_gradients_are_those_of_the_cpu() -> None:
    weight, x = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6.0).view(2, 3)

    def gradient(device: torch.device | str) -> torch.Tensor:
        own = weight.to(device).requires_grad_()
        again = torch.utils.checkpoint.checkpoint(lambda rows: (rows @ own).tanh(), x.to(device), use_reentrant=False)
        again.square().mean().backward()
        assert own.grad is not None
        return own.grad.cpu()

    with EmulatedDevice():
        assert torch.equal(gradient(DEVICE), gradient("cpu"))


# ------------------------------------------------------------------------------------------ what the engine sends and reads


def test_many_tensors_are_one_copy_and_come_back_as_they_were() -> None:
    tensors = [torch.arange(3), torch.tensor(True), torch.rand(2, 3), torch.rand(1).double(), torch.empty(0, 2)]
    with EmulatedDevice() as device:
        sent = send(DEVICE, *tensors)
        assert counted(device) == [("to device", False)]
        back = fetch(sent)
        assert counted(device) == [("to device", False), ("to host", True)]
    for before, after in zip(tensors, back, strict=True):
        assert torch.equal(before, after) and before.dtype == after.dtype


PLANS = {"chain": Chain(), "branch": Branch(2), "ode": Deterministic()}


def grown(plan: Plan, samples: int) -> Tree:
    return plan.tree(6, samples, 0, generator(0, "select"))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("keep_velocities", [False, True])
def test_a_rollout_is_that_of_the_cpu_bit_for_bit(plan: Plan, keep_velocities: bool) -> None:
    """There its generations are stepped in parts."""
    tree, noise = grown(plan, 6), KeyedNoise(0, 0, [0], (2, 3))

    def rolled(device: torch.device | str) -> Any:
        return rollout(
            lambda x, sigma, root: (x * sigma[:, None, None]).sin(), noise.start(tree).to(device), diffusers_sigmas(6),
            tree, FlowSDE(), noise.step, micro_batch=2, keep_velocities=keep_velocities,
        )  # fmt: skip

    with EmulatedDevice():
        there, here = rolled(DEVICE), rolled("cpu")
    assert torch.equal(there.states, here.states) and there.evaluations == here.evaluations
    assert torch.equal(there.log_prob.nan_to_num(), here.log_prob.nan_to_num())
    for role, velocities in here.velocities.items():
        assert torch.equal(velocities.values, there.velocities[role].values)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_a_rollout_holds_two_generations_of_states_and_a_part(plan: Plan) -> None:
    tree, noise = grown(plan, 16), KeyedNoise(0, 0, [0], (4, 16, 16))
    with EmulatedDevice() as device:
        rollout(
            lambda x, sigma, root: -0.3 * x, send(DEVICE, noise.start(tree))[0], diffusers_sigmas(6), tree, FlowSDE(),
            noise.step, micro_batch=1,
        )  # fmt: skip
    generation = max(map(len, tree.generations)) * 4 * 4 * 16 * 16
    assert device.peak <= 3 * generation
    assert device.live == 0


@pytest.mark.parametrize("kernel", [UniPC(), DPMSolver2M()], ids=str)
def test_a_multistep_solver_needs_no_read_and_gathers_its_history_part_by_part(kernel: Kernel) -> None:
    tree, noise = grown(Deterministic(), 6), KeyedNoise(0, 0, [0], (2, 3))

    def rolled(device: torch.device | str) -> Any:
        start, grid = send(device, noise.start(tree))[0], diffusers_sigmas(6)
        return rollout(
            lambda x, sigma, root: (x * sigma[:, None, None]).sin(),
            start,
            grid,
            tree,
            kernel,
            noise.step,
            micro_batch=4,
        )

    with EmulatedDevice() as device:
        there = rolled(DEVICE)
        assert [event.kind for event in device.events if event.waits] == ["to host"]  # at the end
        assert torch.equal(there.states, rolled("cpu").states)


def test_levels_of_an_epsilon_model_need_no_read() -> None:
    """Stable Diffusion 1.5: its path looks its levels up."""
    path = VariancePreserving(torch.linspace(0.99, 0.05, 10).double())
    tree, noise = grown(Chain(), 4), KeyedNoise(0, 0, [0], (2, 3))
    sigmas = torch.tensor([10.0, 8.0, 6.0, 5.0, 3.0, 2.0, 1.0]).div(10)
    with EmulatedDevice() as device:
        rollout(
            lambda x, sigma, root: path.velocity_from_noise(x, x.sin(), sigma), send(DEVICE, noise.start(tree))[0],
            sigmas, tree, DDIM().bind(path), noise.step,
        )  # fmt: skip
    assert [event.site for event in device.events if event.waits and event.kind != "to host"] == []


# ------------------------------------------------------------------------------------------ methods


@dataclass(frozen=True)
class Shine:
    """Mean pixel, with a gradient."""

    name: str = "shine"
    spec = RewardSpec(differentiable=True)

    def load(self) -> None: ...

    def close(self) -> None: ...

    def __call__(self, batch: RewardBatch) -> RewardOutput:
        assert batch.images is not None
        scores = batch.images.mean((1, 2, 3))
        return RewardOutput(scores, torch.ones(len(scores), dtype=torch.bool))


@dataclass(frozen=True)
class Limits:
    """What an iteration may do. Of a rollout: how often the host waits in it, the last read included, and copies to the device per
    generation, those of condition rows not counted, which are one for each set of rows. Of an update: how often the host waits, and
    copies per micro-batch: one of what it reads, one for each transition that it replays."""

    rollout_waits: int = 1
    copies: int = 2
    update_waits: int = 1
    micro_batch_copies: int = 3


STEPS = "rollout.num_inference_steps=4"
GUIDED = ("rollout.guidance_scale=2", "rollout.allow_cfg_update=true")
ONE_UPDATE = "trainer.updates_per_rollout=1"
FOUR = Limits(micro_batch_copies=4)  # a later update replays the rescored transition too, or sends adjoints
CASES: dict[str, tuple[tuple[str, ...], Limits]] = {
    "flow_grpo": ((STEPS,), FOUR),
    "flow_grpo guided": ((STEPS, *GUIDED), FOUR),
    "flow_grpo_fast": ((), FOUR),  # windows
    "flow_cps": ((STEPS,), FOUR),
    "grpo_guard": ((STEPS,), Limits()),
    "flow_dppo": ((STEPS,), Limits()),
    "dance_grpo": ((STEPS,), Limits()),
    "mixgrpo": (("rollout.num_inference_steps=6", ONE_UPDATE), Limits()),
    "tempflow_grpo": ((STEPS, "rollout.plan.init_args.branches=2"), FOUR),  # trunks with branches
    "branchgrpo": (
        ("rollout.group_size=4", "rollout.num_inference_steps=4", "rollout.plan.init_args.splits=[0,2]", ONE_UPDATE),
        Limits(),
    ),
    "densegrpo": ((STEPS, "trainer.calibration=null"), FOUR),  # probes
    "nft": ((), Limits()),
    "nft guided": (("rollout.guidance_scale=2",), Limits()),
    "awm": (("rollout.num_inference_steps=8",), Limits()),
    "ram": ((STEPS,), Limits()),
    "elbo_pg": ((), Limits()),
    "dgpo": (("rollout.num_inference_steps=8",), Limits()),
    "crd": ((), Limits()),
    "prdp": ((STEPS,), FOUR),
    "flow_opd": ((STEPS,), Limits()),
    "dance_opd": ((), Limits()),
    "tdm_r1": ((), Limits()),
    # the solver needs the path's levels and its own ratio in each generation
    "mixgrpo_flash": ((ONE_UPDATE,), Limits(copies=5)),
    # previews are scored on the way, and what is continued is then sent anew
    "preview_select": (
        ("rollout.plan.init_args.counts={2: 2}", "rollout.group_size=4"),
        Limits(rollout_waits=20, copies=5, micro_batch_copies=4),
    ),
    # each guided step asks a reward
    "euphonium": ((), Limits(rollout_waits=180, copies=10)),
    # the update samples, with a step's coefficients and condition rows each, and asks the reward, whose scores are checked
    "draft_k": ((STEPS,), Limits(rollout_waits=0, update_waits=8, micro_batch_copies=10)),
}


@pytest.fixture(scope="module")
def policy(tiny_pipeline: Path) -> Iterator[Policy]:
    """One policy on the device for all methods, with a LoRA that is not 0."""
    lora = LoRA(rank=2, alpha=4, targets=("attn.to_q", "attn.to_v", "ff.net.2"))
    with EmulatedDevice():
        loaded = load_policy(str(tiny_pipeline), lora=lora, device=DEVICE)
        for name, parameter in loaded.trainable_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return loaded


@dataclass(frozen=True, eq=False)
class Seen:
    """The events of an iteration in its rollout, and in each of its updates with its number of micro-batches; how many generations
    were stepped, and how many updates there were."""

    rollout: list[Event]
    updates: list[tuple[list[Event], int]]
    generations: int
    device: EmulatedDevice


ROLES: dict[str, Any] = {}  # those that the one policy has


def iterated(policy: Policy, method: str, overrides: tuple[str, ...], tiny_pipeline: Path) -> Seen:
    """An iteration as the main loop has it, by the run's own verbs."""
    reward = f"reward={Shine.__module__}.Shine"
    small = ("rollout.groups=2", "rollout.group_size=2", f"policy.path={tiny_pipeline}", reward)
    config, _ = load_config(glyphs_layers(method), [*ON_GLYPHS.get(method, ()), *small, *overrides])
    with EmulatedDevice() as device:
        policy.add_roles({name: role for name, role in config.roles.items() if name not in ROLES})
        ROLES.update(config.roles)
        task = task_of(config, policy)
        config.trainer.prepare(task, None)
        run: Any = SimpleNamespace(
            task=task, ema=None, progress=Progress(), losses=[], log=IterationLog(config, None, None, False, Progress()),
            steppers={each: Summed(each, task.processes) for each in config.trainer.optimizers.values()},
        )  # fmt: skip
        with device.phase("collect"):
            batch = config.trainer.collect(list(task.prompts)[:2], 0)
        updates = []
        for number, update in enumerate(config.trainer.updates(batch)):
            with device.phase(f"update {number}"):
                for micro_batch in update.micro_batches:
                    Run.backward(run, micro_batch(), update)
                Run.step(run, update)
            updates.append((device.seen(f"update {number}"), len(update.micro_batches)))
    rolled = [event for event in device.seen("collect") if event.inside("samplers/rollout.py")]
    tree = batch.tree if hasattr(batch, "tree") else (getattr(batch, "rollout", batch)).forest.tree
    return Seen(rolled, updates, len(tree.generations) - 1, device)


@pytest.mark.parametrize("case", CASES)
def test_an_iteration_waits_for_the_device_once_in_its_rollout_and_once_in_each_update(
    case: str, policy: Policy, tiny_pipeline: Path
) -> None:
    overrides, limits = CASES[case]
    seen = iterated(policy, case.split()[0], overrides, tiny_pipeline)
    told = seen.device.table(seen.rollout)
    assert sum(event.waits for event in seen.rollout) <= limits.rollout_waits, told
    copies = [event for event in seen.rollout if event.kind == "to device"]
    conditions = [event for event in copies if any(line.endswith(" _sent") for line in event.stack)]
    assert len(copies) - len(conditions) <= limits.copies * seen.generations, told
    assert len(conditions) <= seen.generations, told
    assert seen.updates and any(count for _, count in seen.updates)
    for events, count in seen.updates:
        told = seen.device.table(events)
        assert sum(event.waits for event in events) <= limits.update_waits, told
        assert sum(event.kind == "to device" for event in events) <= limits.micro_batch_copies * count, told
