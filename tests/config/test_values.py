"""I9: a configuration that cannot work is a named error before any model is loaded."""

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowalign import cli, models
from flowalign.config import load_config
from flowalign.config.layers import merge, split_arguments
from flowalign.errors import ConfigError
from flowalign.run.preflight import forecast

CONFIG = str(Path(__file__).parents[1] / "data" / "tiny.yaml")

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
    (["policy.quantization=nf4"], r"got policy.quantization=nf4; expected Literal['8bit', '4bit'] or null"),
    (["rollout.chunk=many"], "got rollout.chunk=many; expected int or null"),
    (["policy.options.guidence=3"], "expected none, since its model has no options"),
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
    (["trainer.regularizers.kl.beta=-1"], "beta"),
    (["trainer.signal.advantage.clip=-1"], "clip"),
    (["trainer.signal.advantage.delta=-1"], "delta"),
    (["trainer.regularizers.kl.form=exakt"], "form"),
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
    (["policy.trainable=full", "trainer.regularizers.kl.beta=0.01"], "reference_copy"),
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
    with pytest.raises(
        ConfigError, match=r"unknown key 'rollout\.grup_size': did you mean 'rollout\.group_size'.*c\.yaml, line 6\)$"
    ):
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
    monkeypatch.setattr("flowalign.config.checks.find_spec", lambda name: None if name == "wandb" else name)
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
    assert "rollout 5.21, update at most 1.04 forward and backward, without gradient at most 1.04" in said
    assert f"at most {3 * 2 * (125 + 25):,} forwards, {3 * 2 * 25:,} with backward" in said
    config, _ = load_config(CONFIG, [f"policy.path={tiny_pipeline}", "trainer.regularizers.kl.beta=0"])
    assert "without gradient" not in forecast(config)


# ------------------------------------------------------------------------------------------ layers


def merged(*texts: str) -> Any:
    nodes = [yaml.compose(text, yaml.SafeLoader) for text in texts]
    return yaml.safe_load(yaml.serialize(reduce(merge, nodes)))


@pytest.mark.parametrize(
    ("former", "later", "expected"),
    [
        ("a: {b: 1, c: {d: 2}}", "a: {c: {e: 3}}", {"a": {"b": 1, "c": {"d": 2, "e": 3}}}),
        ("a: [1, 2]", "a: [3]", {"a": [3]}),
        ("a: {b: 1}", "a: null", {"a": None}),
        ("a: {b: 1}", "a: text", {"a": "text"}),
        ("x: 1e-4", "y: '1e-4'", {"x": "1e-4", "y": "1e-4"}),  # YAML's own reading; jsonargparse takes x for a number
        # parts: the same class keeps its arguments, another class none of them
        ("p: {class_path: A, init_args: {u: 1, v: 2}}", "p: {class_path: A, init_args: {v: 3}}",
         {"p": {"class_path": "A", "init_args": {"u": 1, "v": 3}}}),
        ("p: {class_path: A, init_args: {u: 1}}", "p: {class_path: B, init_args: {v: 3}}",
         {"p": {"class_path": "B", "init_args": {"v": 3}}}),
        ("p: {class_path: A, init_args: {u: 1}}", "p: {class_path: B}", {"p": {"class_path": "B"}}),
        # a plain string is a part as well
        ("p: {class_path: A, init_args: {u: 1}}", "p: A", {"p": {"class_path": "A", "init_args": {"u": 1}}}),
        ("p: {class_path: A, init_args: {u: 1}}", "p: B", {"p": {"class_path": "B"}}),
        ("p: A", "p: {class_path: A, init_args: {u: 1}}", {"p": {"class_path": "A", "init_args": {"u": 1}}}),
        ("p: A", "p: {class_path: B, init_args: {u: 1}}", {"p": {"class_path": "B", "init_args": {"u": 1}}}),
        ("p: A", "p: B", {"p": "B"}),
        # init_args alone go to the class that the other file names
        ("p: A", "p: {init_args: {u: 1}}", {"p": {"class_path": "A", "init_args": {"u": 1}}}),
        ("p: {init_args: {u: 1}}", "p: A", {"p": {"class_path": "A", "init_args": {"u": 1}}}),
        # parts inside parts
        ("p: {class_path: A, init_args: {q: {class_path: C, init_args: {w: 1}}}}", "p: {init_args: {q: D}}",
         {"p": {"class_path": "A", "init_args": {"q": {"class_path": "D"}}}}),
        # anchors of one file do not reach the other
        ("a: &x {b: 1}\nc: *x", "a: {b: 2}", {"a": {"b": 2}, "c": {"b": 1}}),
    ],
)  # fmt: skip
def test_later_files_go_over_earlier_ones(former: str, later: str, expected: Any) -> None:
    assert merged(former, later) == expected


def test_layers_load_as_the_one_file_that_they_make(tmp_path: Path, tiny_pipeline: Path) -> None:
    """Three layers and an override; what is saved of the run gives the same configuration by itself."""
    (tmp_path / "wide.yaml").write_text("rollout: {group_size: 5, plan: {init_args: {high: 1}}}\n")
    (tmp_path / "dance.yaml").write_text("rollout: {groups: 4, kernel: samplers.DanceSDE}\nrun: {seed: 7}\n")
    paths = [CONFIG, str(tmp_path / "wide.yaml"), str(tmp_path / "dance.yaml")]
    config, plain = load_config(paths, [f"policy.path={tiny_pipeline}", "run.seed=8"])
    rollout = plain["rollout"]
    assert (rollout["group_size"], rollout["groups"], config.run.seed, config.run.name) == (5, 4, 8, "tiny")
    assert rollout["plan"]["init_args"] | {"position": None, "shared_start": None} == {
        "size": 1, "low": 0, "high": 1, "position": None, "shared_start": None,
    }  # fmt: skip
    assert rollout["kernel"]["class_path"] == "samplers.DanceSDE"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    assert load_config(str(tmp_path / "config.yaml"))[1] == plain


def test_a_run_without_a_name_gets_those_of_its_files(tmp_path: Path, tiny_pipeline: Path) -> None:
    (tmp_path / "unnamed.yaml").write_text(Path(CONFIG).read_text().replace("name: tiny, ", ""))
    (tmp_path / "seeded.yaml").write_text("run: {seed: 1}\n")
    paths = [str(tmp_path / "unnamed.yaml"), str(tmp_path / "seeded.yaml")]
    assert load_config(paths, [f"policy.path={tiny_pipeline}"])[0].run.name == "unnamed-seeded"
    assert load_config(paths, [f"policy.path={tiny_pipeline}", "run.name=mine"])[0].run.name == "mine"


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        ("rollout: {grup_size: 4}", r"unknown key 'rollout.grup_size': did you mean 'rollout.group_size'.* \(rollout.grup_size: .*layer\.yaml, line 1\)"),
        ("run: {seed: 1}\nrun: {seed: 2}", r"layer\.yaml, line 2: 'run' is given twice"),
        ("- a", r"layer\.yaml: expected sections .* got a list"),
        # what only all files together show: the file and line of each key that the message names
        ("rollout:\n  group_size: 0", r"group_size=0.*\(rollout\.group_size: .*layer\.yaml, line 2\)"),
        ("rollout: {groups: 3}\ntrainer: {init_args: {updates_per_rollout: 2}}",
         r"rollout\.groups: .*layer\.yaml, line 1; trainer\.updates_per_rollout: .*layer\.yaml, line 2\)"),
        ("\nrollout: {plan: {init_args: {hihg: 1}}}", r"unknown key 'rollout.plan.hihg': did you mean 'rollout.plan.high'.* \(rollout\.plan\.hihg: .*layer\.yaml, line 2\)"),
        ("policy: {trainable: full}", r"policy\.trainable: .*layer\.yaml, line 1; trainer\.regularizers: .*tiny\.yaml"),
    ],
)  # fmt: skip
def test_an_error_names_the_layer(layer: str, named: str, tmp_path: Path, tiny_pipeline: Path) -> None:
    (tmp_path / "layer.yaml").write_text(layer)
    with pytest.raises(ConfigError, match=named):
        load_config([CONFIG, str(tmp_path / "layer.yaml")], [f"policy.path={tiny_pipeline}"])


def test_an_error_does_not_blame_a_file_for_an_override(tiny_pipeline: Path) -> None:
    with pytest.raises(ConfigError, match="group_size=0") as caught:
        load_config(CONFIG, [f"policy.path={tiny_pipeline}", "rollout.group_size=0"])
    assert "tiny.yaml" not in str(caught.value)
    with pytest.raises(ConfigError, match="updates_per_rollout") as caught:
        load_config(CONFIG, [f"policy.path={tiny_pipeline}", "trainer.updates_per_rollout=3"])
    assert "(rollout.groups: " in str(caught.value) and "trainer.updates_per_rollout:" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "files", "overrides"),
    [
        ("a.yaml b.yaml run.name=x prompts=c.txt", "a.yaml b.yaml", "run.name=x prompts=c.txt"),
        ("runs/lr=1/config.yaml run.name=x", "runs/lr=1/config.yaml", "run.name=x"),
        ("./a=b.yaml", "./a=b.yaml", ""),
        ("a.yaml run.name=x b.yaml", "a.yaml", "run.name=x b.yaml"),
        ("a.yaml --run.name=x", "a.yaml", "--run.name=x"),
        ("run.name=x", "", "run.name=x"),
    ],
)
def test_files_come_before_overrides(arguments: str, files: str, overrides: str) -> None:
    assert split_arguments(arguments.split()) == (files.split(), overrides.split())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([CONFIG, "run.name=x", CONFIG], "files come before overrides"),
        ([CONFIG, "nowhere.yaml"], "'nowhere.yaml' does not exist"),
        ([CONFIG, "rollout.group_size"], "key=value"),
        (["run.name=x"], "no configuration file"),
    ],
)
def test_what_cannot_be_read_is_named_on_the_command_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.train(arguments) == 2
    assert named in capsys.readouterr().err
    assert cli.doctor(arguments) == 1
    assert named in capsys.readouterr().out
    assert cli.benchmark(arguments) == 2
    assert named in capsys.readouterr().err


def test_the_command_line_takes_several_files(
    tmp_path: Path, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    monkeypatch.setattr("flowalign.loop.train", lambda config, plain: trained.append(config))
    (tmp_path / "layer.yaml").write_text("rollout: {group_size: 5}\n")
    assert cli.train([CONFIG, str(tmp_path / "layer.yaml"), f"policy.path={tiny_pipeline}", "run.seed=8"]) == 0
    assert (trained[0].rollout.group_size, trained[0].run.seed) == (5, 8)
