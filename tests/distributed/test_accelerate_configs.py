"""The launch configurations, through accelerate's own loader, launcher and plugin: a typo in a key fails."""

from dataclasses import replace
from pathlib import Path

import pytest
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from flowalign.config import PolicySettings, load_config
from flowalign.errors import ConfigError
from flowalign.run import launch
from flowalign.run.launch import (
    Launch,
    check_deepspeed,
    check_devices,
    check_environment,
    check_launch,
    check_processes,
)
from flowalign.run.run import open_run
from samplers import FlowSDE, Guided, RewardGradient

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
TINY = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
FACTS = {
    "multi_gpu": {"distributed_type": DistributedType.MULTI_GPU, "num_machines": 1, "gpu_ids": "all"},
    "multi_node": {
        "distributed_type": DistributedType.MULTI_GPU, "num_machines": 8, "num_processes": 64, "main_process_port": 29500,
        "rdzv_backend": "static", "gpu_ids": "all",
    },
    "single_gpu": {"distributed_type": DistributedType.NO, "num_machines": 1, "num_processes": 1},
    "fsdp2_multi_node": {
        "distributed_type": DistributedType.FSDP, "num_machines": 8, "num_processes": 64, "main_process_port": 29500,
        "rdzv_backend": "static",
    },
    "fsdp2": {"distributed_type": DistributedType.FSDP, "num_machines": 1},
    "deepspeed_zero2": {"distributed_type": DistributedType.DEEPSPEED, "num_machines": 1},
}  # fmt: skip


def environment(name: str) -> dict[str, str]:
    """What `accelerate launch --config_file` gives to every process."""
    arguments = ["--config_file", str(FOLDER / f"{name}.yaml"), "--main_process_ip", "10.0.0.1", "train.py"]
    checked, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    if not checked.use_deepspeed:
        return prepare_multi_gpu_env(checked)
    checked.deepspeed_fields_from_accelerate_config = ""
    return prepare_deepspeed_cmd_env(checked)[1]


def deepspeed(monkeypatch: pytest.MonkeyPatch, mixed_precision: str = "no", **changes: str) -> dict:
    """What accelerate makes of deepspeed_zero2.yaml, with some of its environment changed."""
    for key, value in (environment("deepspeed_zero2") | changes).items():
        if key.startswith("ACCELERATE_"):
            monkeypatch.setenv(key, value)
    made = DeepSpeedPlugin()
    made.set_mixed_precision(mixed_precision)
    return made.deepspeed_config


def plugin(monkeypatch: pytest.MonkeyPatch, **changes: str) -> FullyShardedDataParallelPlugin:
    """What accelerate makes of fsdp2.yaml, with some of its environment changed."""
    for key, value in (environment("fsdp2") | changes).items():
        if key.startswith("FSDP_"):
            monkeypatch.setenv(key, value)
    return FullyShardedDataParallelPlugin()


def test_every_file_is_tested() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == FACTS.keys()


@pytest.mark.parametrize("name", FACTS)
def test_accelerate_reads_the_file_as_intended(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert {key: vars(config)[key] for key in FACTS[name]} == FACTS[name]
    assert config.mixed_precision == "no"  # not YAML's false
    known = vars(launch_command_parser().parse_args(["train.py"]))
    assert (
        config.fsdp_config.keys() | config.deepspeed_config.keys() <= known.keys()
    )  # the launcher itself takes any key here
    given = environment(name)
    assert given["ACCELERATE_MIXED_PRECISION"] == "no"
    assert (given.get("ACCELERATE_USE_FSDP") == "true") == name.startswith("fsdp2")
    assert (given.get("ACCELERATE_USE_DEEPSPEED") == "true") == (name == "deepspeed_zero2")
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True)
    monkeypatch.setattr(launch, "compare_versions", lambda *asked: False)
    check_environment(given)
    check_launch(config.distributed_type, config.mixed_precision, None, PolicySettings())


def test_the_fsdp2_file_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plugin(monkeypatch)
    assert made.fsdp_version == 2
    assert made.reshard_after_forward is True
    check_launch(DistributedType.FSDP, "no", made, PolicySettings())
    check_launch(DistributedType.FSDP, "no", made, replace(PolicySettings(), trainable="full"))
    with pytest.raises(ConfigError, match=r"policy\.quantization=4bit with FSDP2"):
        check_launch(DistributedType.FSDP, "no", made, PolicySettings(quantization="4bit"))


@pytest.mark.parametrize("name", ["CPU_RAM_EFFICIENT_LOADING", "OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING"])
def test_fsdp_settings_that_would_be_ignored_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made = plugin(monkeypatch, **{f"FSDP_{name}": "true"})
    with pytest.raises(ConfigError, match=f"fsdp_{name.lower()}=true; expected false"):
        check_launch(DistributedType.FSDP, "no", made, PolicySettings())


def test_other_ways_to_launch_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = plugin(
        monkeypatch, FSDP_VERSION="1", FSDP_RESHARD_AFTER_FORWARD="FULL_SHARD", FSDP_SYNC_MODULE_STATES="false"
    )
    with pytest.raises(ConfigError, match="fsdp_version=1; expected 2"):
        check_launch(DistributedType.FSDP, "no", first, PolicySettings())
    with pytest.raises(ConfigError, match="distributed_type=MEGATRON_LM; expected one of NO,"):
        check_launch(DistributedType.MEGATRON_LM, "no", None, PolicySettings())
    with pytest.raises(ConfigError, match=r"mixed_precision=fp16; expected 'no': policy\.dtype"):
        check_launch(DistributedType.MULTI_GPU, "fp16", None, PolicySettings())


def test_the_deepspeed_file_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    made = deepspeed(monkeypatch)
    assert made["zero_optimization"]["stage"] == 2
    check_deepspeed(made)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("DEEPSPEED_ZERO_STAGE", "1", r"zero_optimization\.stage=1; expected 2"),
        ("DEEPSPEED_ZERO_STAGE", "3", r"zero_optimization\.stage=3; expected 2"),
        ("DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu", r"offload_optimizer\.device=cpu; expected none"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", r"offload_param\.device=nvme; expected none"),
        ("GRADIENT_ACCUMULATION_STEPS", "4", "gradient_accumulation_steps=4; expected 1"),
        ("GRADIENT_CLIPPING", "1.0", "gradient_clipping=1.0; expected auto"),
    ],
)
def test_deepspeed_settings_that_would_be_ignored_are_refused(
    monkeypatch: pytest.MonkeyPatch, key: str, value: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_deepspeed(deepspeed(monkeypatch, **{f"ACCELERATE_{key}": value}))


def test_deepspeed_precision_and_files_that_would_be_ignored_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"bf16\.enabled=True; expected False"):
        check_deepspeed(deepspeed(monkeypatch, mixed_precision="bf16"))
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}')
    with pytest.raises(ConfigError, match=r"zero_optimization\.round_robin_gradients=True; expected None"):
        check_deepspeed(deepspeed(monkeypatch, ACCELERATE_DEEPSPEED_CONFIG_FILE=str(own)))


@pytest.mark.parametrize("installed", [False, True])
def test_a_missing_or_old_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, installed: bool) -> None:
    config, plain = load_config(TINY, ["policy.path=glyphs", f"run.output={tmp_path}"])
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: installed)
    monkeypatch.setattr(launch, "compare_versions", lambda *asked: True)  # too old
    with pytest.raises(ConfigError, match=r"deepspeed >= 0\.19\.8 is not installed: pip install .*multi_gpu\.yaml"):
        open_run(config, plain).__enter__()


def test_a_rollout_that_processes_cannot_share_is_refused() -> None:
    rollout = load_config(TINY, [])[0].rollout
    check_processes(rollout.groups, rollout)
    with pytest.raises(ConfigError, match=r"3 processes for rollout\.groups=2"):
        check_processes(3, rollout)
    guided = replace(rollout, kernel=Guided(FlowSDE(), RewardGradient(None)))
    check_processes(1, guided)
    with pytest.raises(ConfigError, match=r"kernel=Guided.*launch one process"):
        check_processes(2, guided)


def test_a_launch_says_what_it_shares_out(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    assert Launch(accelerator, None, deepspeed=False).sharding == "none"
    assert Launch(accelerator, None, deepspeed=True).sharding == "optimizer"
    assert Launch(accelerator, plugin(monkeypatch), deepspeed=False).sharding == "networks"


def test_more_processes_than_devices_are_refused() -> None:
    """accelerate would run each of them alone, in the same folder."""
    asked = {"LOCAL_WORLD_SIZE": "4"}
    for devices in (0, 2):
        with pytest.raises(
            ConfigError, match=rf"got 4 processes on this machine, which has {devices} GPUs; expected one each"
        ):
            check_devices(asked, devices)
    check_devices(asked, 4)
    check_devices({}, 0)
    check_devices({**asked, "ACCELERATE_USE_CPU": "true"}, 0)
