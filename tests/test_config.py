"""I9: a configuration that cannot work is a named error before any model is loaded."""

from pathlib import Path

import pytest

from flowalign import models
from flowalign.config import load_config
from flowalign.errors import ConfigError
from flowalign.run.preflight import forecast

CONFIG = str(Path(__file__).parent / "data" / "tiny.yaml")

# (overrides, what the message must name)
BAD = [
    # unknown keys
    (["rollout.group_sise=4"], "group_size"),
    (["rolout.group_size=4"], "rollout"),
    (["run.itertions=3"], "iterations"),
    (["policy.guidance_scle=2"], "guidance_scle"),
    (["trainer.clip=1"], "clip"),
    (["run.iter=3"], "run.iter"),  # no abbreviations
    (["rollout.group_s=4"], "'rollout.group_s'"),
    # types
    (["rollout.group_size=many"], "group_size"),
    (["run.seed=x"], "seed"),
    (["trainer.optimizer.lr=fast"], "lr"),
    (["evaluation.count=none"], "count"),
    (["policy.lora.rank=1.5"], "rank"),
    # groups
    (["rollout.group_size=1"], "group_size=1"),
    (["rollout.group_size=0"], "group_size=0"),
    (["rollout.groups=0"], "groups=0"),
    (["rollout.groups=3", "trainer.updates_per_rollout=2"], "updates_per_rollout"),
    # plans
    (["rollout.plan.size=5"], "size"),
    (["rollout.plan.low=3"], "low"),
    (["rollout.plan.size=0"], "size"),
    (["rollout.num_inference_steps=0"], "num_inference_steps"),
    (["rollout.plan=samplers.Windows"], "Windows"),
    (["rollout.plan.position=samplers.Fixed", "rollout.plan.position.at=9"], "at=9"),
    # kernels
    (["rollout.kernel=samplers.ODE"], "noise"),
    (["rollout.kernel=samplers.FlowSDE", "rollout.kernel.noise_level=0"], "noise"),
    (["rollout.kernel=samplers.FlowSDE", "rollout.kernel.noise_level=-1"], "noise_level"),
    (["rollout.kernel=samplers.FlowSDE", "rollout.kernel.reduce=median"], "reduce"),
    # guidance
    (["rollout.guidance_scale=4.5"], "guidance_scale"),
    (["rollout.guidance_scale=0", "rollout.allow_cfg_update=true"], "rollout.guidance_scale=0"),
    (["evaluation.guidance_scale=0"], "evaluation.guidance_scale=0"),  # v_u alone; diffusers' 0 is no guidance
    # LoRA
    (["policy.lora.dropout=0.1"], "dropout"),
    (["policy.lora.rank=0"], "rank"),
    (["policy.lora.alpha=-1"], "alpha"),
    (["policy.lora.targets=[attn.to_qq]"], "attn.to_q"),
    (["policy.lora.targets=[]"], "targets"),
    # optimizer and objective
    (["trainer.optimizer.lr=0"], "lr"),
    (["trainer.optimizer.max_grad_norm=0"], "max_grad_norm"),
    (["trainer.optimizer.betas=[1.5,0.9]"], "betas"),
    (["trainer.optimizer.weight_decay=-1"], "weight_decay"),
    (["trainer.optimizer.eps=-1"], "eps"),
    (["trainer.micro_batch=0"], "micro_batch"),
    (["trainer.objective.clip_range=0"], "clip_range"),
    (["trainer.kl.beta=-1"], "beta"),
    (["trainer.signal.advantage.clip=-1"], "clip"),
    (["trainer.signal.advantage.delta=-1"], "delta"),
    (["trainer.kl.form=exakt"], "form"),
    # rewards
    (["reward=rewards.JPEGG"], "JPEG"),
    (["reward=rewards.OCR", "reward.metric=fuzzy"], "metric"),
    (["evaluation.rewards=[]"], "rewards"),
    (["evaluation.rewards=[rewards.JPEGCompressibility,rewards.JPEGCompressibility]"], "own `name`"),
    (["evaluation.seed=-1"], "evaluation.seed"),
    # data
    (["prompts=nowhere.txt"], "nowhere.txt"),
    (["prompts=flowalign.glyphs:no_such"], "no_such"),
    (["prompts=words"], "words"),
    (["evaluation.count=100000"], "count"),
    (["evaluation.count=0"], "count"),
    # models
    (["policy.path=./nowhere"], "nowhere"),
    (["policy.trainable=half"], "trainable"),
    (["policy.dtype=fp8"], "dtype"),
    (["policy.trainable=full", "policy.dtype=bf16"], "bf16"),
    (["policy.trainable=full", "trainer.kl.beta=0.01"], "reference_copy"),
    (["policy.height=25"], "25×48"),
    (["policy.width=-48"], "multiples of"),
    (["policy.max_sequence_length=-3"], "max_sequence_length"),
    # runs
    (["run.iterations=0"], "iterations"),
    (["run.checkpoint_every=0"], "checkpoint_every"),
    (["run.seed=-1"], "run.seed"),
    (["run.seed=99999999999999999999999"], "run.seed"),
    (["run.ema_decay=1.5"], "ema_decay"),
    (["run.name=a/b"], "name"),
    # overrides
    (["rollout.group_size"], "key=value"),
    (["--rollout.group_size=4"], "key=value"),
]


def test_there_are_forty_of_them() -> None:
    assert len(BAD) >= 40


@pytest.mark.parametrize(("overrides", "named"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_configuration_is_named(
    overrides: list[str], named: str, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models.load.DiffusionPipeline, "from_pretrained", loaded)
    path = [] if any(o.startswith("policy.path") for o in overrides) else [f"policy.path={tiny_pipeline}"]
    with pytest.raises(ConfigError, match=None) as caught:
        load_config(CONFIG, [*path, *overrides])
    assert named in str(caught.value)


def test_unknown_keys_in_the_file_suggest_the_right_one(tmp_path: Path) -> None:
    text = Path(CONFIG).read_text().replace("group_size", "grup_size")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match="'group_size'"):
        load_config(str(tmp_path / "c.yaml"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected sections"),
        (b"run: [", "not valid YAML"),
        ("run: {name: é}".encode("latin-1"), "UTF-8"),
        (b"run: {name: a}\nrollout: {groups: 2}\nrollout: {group_size: 4}\n", "line 3: 'rollout' is given twice"),
        (b"run:\n  name: a\n  seed: 1\n  seed: 2\n", "line 4: 'seed' is given twice"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"c\.yaml.*{said}"):
        load_config(str(tmp_path / "c.yaml"))


def test_a_tracker_that_is_not_installed_is_named(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would train without it."""
    monkeypatch.setattr("flowalign.config.find_spec", lambda name: None if name == "wandb" else name)
    with pytest.raises(ConfigError, match="'wandb', which is not installed"):
        load_config(CONFIG, [f"policy.path={tiny_pipeline}", "run.trackers=[tensorboard,wandb]"])


def test_overrides_win_and_the_forecast_counts_what_they_say(tiny_pipeline: Path) -> None:
    config, plain = load_config(
        CONFIG,
        [f"policy.path={tiny_pipeline}", "rollout.group_size=24", "rollout.num_inference_steps=10",
         "rollout.plan.size=2", "rollout.plan.low=4", "rollout.plan.high=6"],
    )  # fmt: skip
    assert plain["rollout"]["group_size"] == 24
    said = forecast(config)  # (4 + 1 + 24·5)/24 and (1 + 24)/24
    assert "rollout 5.21, update at most 1.04 forward and backward, reference at most 1.04" in said
    assert f"at most {3 * 2 * (125 + 25):,} forwards, {3 * 2 * 25:,} with backward" in said
    config, _ = load_config(CONFIG, [f"policy.path={tiny_pipeline}", "trainer.kl.beta=0"])
    assert "reference" not in forecast(config)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_builds(path: Path, tiny_pipeline: Path, tiny_sd15_pipeline: Path) -> None:
    tiny = tiny_sd15_pipeline if path.stem.startswith("sd15") else tiny_pipeline
    config, _ = load_config(str(path), [f"policy.path={tiny}"])
    assert config.run.iterations > 0
