"""Memory per phase, what does not fit and which switch mends it, on Stable Diffusion 3.5 Medium without weights."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flowalign import cli
from flowalign.config import TrainConfig, load_config
from flowalign.errors import ConfigError
from flowalign.forecast.footprint import FP32, Footprint
from flowalign.forecast.memory import (
    GENERATIONS,
    GIB,
    STEPPED,
    Memory,
    check,
    device_memory,
    fitting,
    state_memory,
    text,
)
from flowalign.loop import train
from flowalign.rollouts.rolling import outline
from flowalign.testing.shapes import shapes_folder

CONFIGS = Path(__file__).parents[2] / "configs"
LAYERS = [str(CONFIGS / name) for name in ("methods/flow_grpo.yaml", "models/sd35_medium.yaml", "rewards/jpeg.yaml")]
TINY = str(Path(__file__).parents[1] / "data" / "tiny.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes_folder("sd35_medium", tmp_path_factory.mktemp("sd35_medium"))


def config_of(folder: Path, *hardware: str) -> TrainConfig:
    layers = [*LAYERS, *(str(CONFIGS / "hardware" / f"{name}.yaml") for name in hardware)]
    return load_config(layers, [f"policy.path={folder}"])[0]


@pytest.fixture(scope="module")
def full_size(folder: Path) -> Memory:
    """Of the model's layer without hardware."""
    config = config_of(folder)
    return Memory(config, Footprint(config))


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Memory:
    """With two layers in place of 24, which is measured in a second."""
    config = config_of(shapes_folder("sd35_medium", tmp_path_factory.mktemp("shallow"), depth=2))
    return Memory(config, Footprint(config))


def with_policy(memory: Memory, **changes: Any) -> Memory:
    return memory.changed(replace(memory.config, policy=replace(memory.config.policy, **changes)))


@pytest.mark.slow
def test_the_figures_are_those_of_the_trial(full_size: Memory) -> None:
    """Weights with LoRA 4.7, text encoders 10.4, 23.9 GiB for 64 decoded images."""
    always, own = full_size.always, full_size.footprint
    assert own.numbers == 18_776_064
    assert (always["weights"] + always["LoRA"]) / GIB == pytest.approx(4.7, rel=0.02)
    assert always["text encoders"] / GIB == pytest.approx(10.4, rel=0.02)
    assert 64 * own.decode / GIB == pytest.approx(23.9, rel=0.05)


def test_a_forecast_is_its_parts(medium: Memory) -> None:
    """A number of LoRA is 16 bytes with gradient and moments; 8 guided states; 48 prompts × 24 samples in flight; conditions [333, 4096]
    and [2048], twice."""
    always, phases = medium.always, {phase.name: phase for phase in medium.phases}
    own, rollout = medium.footprint, medium.config.rollout
    assert own.row == 2 * 2 * (333 * 4096 + 2048) and own.latent == 4 * 16 * 64 * 64
    assert always["LoRA"] + always["optimizer"] == 16 * own.numbers
    assert phases["update"].needed == 8 * own.trained_state(4.5, False) + 48 * own.row
    latents = (GENERATIONS * 48 * 24 + STEPPED * 16) * own.latent
    assert phases["rollout"].needed == 16 * own.state(4.5) + latents + 48 * own.row
    assert phases["decode"].needed == 4 * own.decode + 2 * 16 * own.pixels + 48 * own.row
    assert medium.host == 48 * len(outline(rollout).states) * own.latent
    assert medium.peaks["encode"] == sum(always.values()) + own.encode
    assert own.trained_state(4.5, False) == pytest.approx(2 * own.trained_state(1.0, False), rel=0.01)  # two rows
    assert own.trained_state(4.5, True) < 0.8 * own.trained_state(4.5, False)


def test_what_follows_from_sharded_weights_is_sharded_and_adapters_are_not(medium: Memory) -> None:
    """Full weights, their copies, gradients, moments and average by FSDP2 over eight devices."""
    config = replace(medium.config, run=replace(medium.config.run, ema_decay=0.9))
    policy = replace(config.policy, trainable="full", reference_copy=True)
    full = Memory(replace(config, policy=policy), Footprint(replace(config, policy=policy)))
    for memory, held in ((full, 8), (medium.changed(config), 1)):
        sharded = replace(memory, devices=8, sharding="networks").always
        for name in ("optimizer", "EMA", "LoRA" if held == 1 else "copies"):
            assert sharded[name] == memory.always[name] / held > 0
        assert sharded["weights"] == memory.always["weights"] / 8


@pytest.mark.parametrize("trainable", ["lora", "full"])
def test_zero2_shares_out_what_its_optimizer_holds_and_nothing_else(medium: Memory, trainable: str) -> None:
    """Of a number an eighth of 16 bytes, gradient, two moments and a copy of the weight, in place of 12."""
    config = replace(medium.config, policy=replace(medium.config.policy, trainable=trainable))
    plain = Memory(config, Footprint(config), devices=8)
    shared, numbers = replace(plain, sharding="optimizer").always, plain.footprint.numbers
    assert plain.always["optimizer"] == 12 * numbers and shared["optimizer"] == 2 * numbers
    assert {**shared, "optimizer": 0} == {**plain.always, "optimizer": 0}


def test_no_more_states_are_counted_than_there_are(medium: Memory) -> None:
    """Two prompts with two samples, on batches for many."""
    config = medium.config
    few = medium.changed(
        replace(
            config, rollout=replace(config.rollout, groups=2, group_size=2, num_inference_steps=2, micro_batch=64),
            evaluation=replace(config.evaluation, count=3, samples_per_prompt=1, batch_size=64),
        )
    )  # fmt: skip
    own, phases = few.footprint, {phase.name: phase for phase in few.phases}
    update = few.config.trainer.forecast(few.config.rollout)
    assert update.trained == 4 and update.updates == 2
    assert phases["update"].needed == 2 * own.trained_state(4.5, False) + 2 * own.row
    assert phases["decode"].needed == 4 * own.decode + 2 * 4 * own.pixels + 2 * own.row
    assert phases["evaluation"].figure.startswith("3 states")


def test_settings_move_what_they_say(medium: Memory) -> None:
    always, peaks = medium.always, medium.peaks
    offloaded = with_policy(medium, offload=["encoders"])
    assert offloaded.peaks["encode"] == peaks["encode"]  # they are on the device while they work
    assert peaks["update"] - offloaded.peaks["update"] == always["text encoders"] == offloaded.host - medium.host
    eight, four = (with_policy(medium, quantization=kind).always["weights"] for kind in ("8bit", "4bit"))
    linear = 2 * (always["weights"] - eight)  # bytes that were two a number become one
    assert 0.3 * always["weights"] < linear < always["weights"]  # the rest are norms and the table of positions
    assert always["weights"] - four == pytest.approx(linear * (1 - (0.5 + 4 / 64) / 2))
    config = medium.config
    serial = medium.changed(replace(config, rollout=replace(config.rollout, chunk=12, overlap=False)))
    assert peaks["rollout"] - serial.peaks["rollout"] == GENERATIONS * 36 * 24 * medium.footprint.latent
    beside = medium.changed(replace(config, rollout=replace(config.rollout, chunk=12)))
    decode = next(phase for phase in medium.phases if phase.name == "decode").needed - medium.conditions
    assert beside.peaks["rollout"] - serial.peaks["rollout"] == decode > 0  # both at once
    alone = beside.changed(replace(beside.config, process_rewards=[beside.config.reward]))
    for other in (alone, replace(beside, devices=4)):  # which asks on its way; and of one chunk on each device
        assert not other.overlaps
    eighth = replace(medium, devices=8)
    assert eighth.groups == 6 and eighth.host == medium.host / 8
    assert replace(medium, devices=8, sharding="networks").always["weights"] == always["weights"] / 8
    averaged = medium.changed(replace(config, run=replace(config.run, ema_decay=0.9)))
    assert averaged.always["EMA"] == FP32 * medium.footprint.numbers


def test_the_refusal_names_phase_figures_and_the_first_switch_that_is_enough(medium: Memory) -> None:
    medium = medium.changed(replace(medium.config, trainer=replace(medium.config.trainer, micro_batch=32)))
    peaks, most = medium.peaks, max(medium.peaks.values())
    assert most == peaks["update"]
    check(medium, most)
    room = with_policy(medium, gradient_checkpointing=True).peaks["update"]
    others = max(peak for name, peak in peaks.items() if name != "update")
    assert others < most - 2**20  # so that checkpointing alone is enough, and comes before smaller batches
    with pytest.raises(
        ConfigError, match=r"whose update needs at least [\d.]+ GiB \(32 states × \d+ MiB; .* of the device"
    ) as error:
        check(medium, max(room, others))
    assert str(error.value).endswith("set policy.gradient_checkpointing=true")


def test_several_switches_where_none_alone_is_enough(medium: Memory) -> None:
    """Without any one of them it does not fit, and accuracy is not given up; with less than what is always there nothing helps."""
    config = replace(medium.config, trainer=replace(medium.config.trainer, micro_batch=256))
    medium = medium.changed(replace(config, rollout=replace(config.rollout, micro_batch=256)))
    room = medium.peaks["encode"]
    several, fits = fitting(medium, room)
    assert len(several) > 1 and not fits.beyond(room) and not any("quantization" in each for each in several)
    for switch in several:
        section, key = switch.partition("=")[0].split(".")
        before = vars(vars(medium.config)[section])[key]
        part = replace(vars(fits.config)[section], **{key: before})
        assert fits.changed(replace(fits.config, **{section: part})).beyond(room), switch
    with pytest.raises(ConfigError, match="none of decode_batch"):
        check(medium, GIB)


def test_switches_are_tried_from_the_cheapest_and_changed_as_little_as_needed(medium: Memory) -> None:
    large = medium.changed(replace(medium.config, rollout=replace(medium.config.rollout, micro_batch=128)))
    large = with_policy(large, gradient_checkpointing=True, decode_batch=128)
    decode = large.peaks["decode"]
    room = decode - GIB
    assert fitting(large, room)[0] == ["policy.decode_batch=64"]
    assert with_policy(large, decode_batch=64).beyond(room) == 0
    assert fitting(large, decode - 30 * GIB)[0] == ["policy.decode_batch=32"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["24gb", "40gb", "80gb", "8x80gb"])
def test_hardware_layers_fit_and_the_page_says_how(name: str, folder: Path, full_size: Memory) -> None:
    config = config_of(folder, name)
    memory = replace(full_size, config=config, devices=config.run.device_count or 1)
    room = device_memory(config, torch.device("cpu"))
    assert room is not None and room == (config.run.device_memory or 0) * GIB
    check(memory, room)
    page = (CONFIGS.parent / "docs" / "gpu.md").read_text()
    (row,) = re.findall(rf"512×512 \| `configs/hardware/{name}.yaml` \| (.*) \|", page)
    found = [*memory.peaks.values(), memory.host]
    assert [float(cell) for cell in row.split(" | ")] == pytest.approx([size / GIB for size in found], abs=0.06)
    assert max(found) > 0.5 * room  # and the device is not wasted
    assert f"memory of one device of {config.run.device_memory:.1f} GiB" in text(memory, room)


# ------------------------------------------------------------------------------------------ in a run


def test_what_cannot_fit_is_refused_before_loading(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowalign.run.run.policy_of", lambda *_: pytest.fail("a model is loaded"))
    config = load_config(TINY, [f"policy.path={tiny_pipeline}", f"run.output={tmp_path}", "run.device_memory=0.4"])
    with pytest.raises(ConfigError, match=r"expected at most the 410 MiB of the device"):
        train(*config)


def test_a_cpu_measures_and_refuses_nothing(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = load_config(TINY, [f"policy.path={tiny_pipeline}"])
    assert device_memory(config, torch.device("cpu")) is None


def test_a_network_that_asks_for_numbers_is_not_refused(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, _ = load_config(TINY, [f"policy.path={tiny_pipeline}"])
    monkeypatch.setattr(Footprint, "state", lambda self, scale: int(torch.empty(1, device="meta").item()))
    said: list[str] = []
    state_memory(config, 1.0, said.append)
    assert len(said) == 1 and said[0].startswith("memory: not known, since the network cannot run on shapes alone")


@pytest.mark.parametrize("trainer", ["lora", "full", "draft"])
def test_the_measured_policy_is_the_one_that_is_loaded(trainer: str, tiny_pipeline: Path) -> None:
    """As many trained numbers and bytes of weights as the loaded policy has."""
    from flowalign.build import policy_of

    overrides = {
        "lora": [], "full": ["policy.trainable=full", "policy.reference_copy=true"],
        "draft": ["policy.lora.rank=2", "policy.dtype=bf16"],
    }[trainer]  # fmt: skip
    config, _ = load_config(TINY, [f"policy.path={tiny_pipeline}", *overrides])
    own, policy = Footprint(config), policy_of(config, "cpu")
    trained = [p for _, p in policy.trainable_parameters()]
    assert own.numbers == sum(p.numel() for p in trained)
    networks = policy.modules().values()
    weights = sum(t.nbytes for net in networks for t in (*net.parameters(), *net.buffers()))
    adapters = 4 * own.numbers if trainer != "full" else 0
    assert own.weights(config.policy) + adapters == weights
    memory = Memory(config, own)
    assert memory.always.get("copies", 0) == (weights if trainer == "full" else 0)


def test_the_command(tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.forecast([TINY, f"policy.path={tiny_pipeline}"]) == 0
    printed = capsys.readouterr().out
    assert "network evaluations per image" in printed and "memory of one device, at least: weights" in printed
    assert cli.forecast([TINY, f"policy.path={tiny_pipeline}", "run.device_memory=0.1"]) == 2
    told = capsys.readouterr()
    assert (
        "memory of one device of 102 MiB" in told.out and "configuration error: got a configuration whose" in told.err
    )
