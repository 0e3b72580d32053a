"""Every key is checked by its full dotted name: spelling, null, numbers, and what an override replaces."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flowalign.config import load_config
from flowalign.errors import ConfigError

CONFIG = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
PART = "class_path, './file.py:Class' or 'package.module.Class', and init_args"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        # nested spelling: the list, and the nearest name
        ("trainer.init_args.signal.advantge=flowalign.advantage.Normalized",
         r"'trainer\.signal\.advantge': did you mean 'trainer\.signal\.advantage'\? Allowed here: advantage, credit, select"),
        ("reward.init_args.metrik=soft", r"'reward\.metrik': Allowed here: divide_by, name, quality"),
        ("trainer.optimizer={lr: 1, wight_decay: 3}", r"'trainer\.optimizer\.wight_decay': did you mean 'trainer\.optimizer\.weight_decay'"),
        ("reward={class_path: rewards.Mix, init_args: {rewards: [], weigths: []}}", r"'reward\.weigths': did you mean 'reward\.weights'"),
        ("policy.lora={rnk: 3}", r"'policy\.lora\.rnk': did you mean 'policy\.lora\.rank'"),
        ("rollout.kernel={class_path: samplers.FlowSDE, noise_level: 1}", r"'rollout\.kernel\.noise_level': .*under init_args"),
        ("reward.dict_kwargs.x=3", r"'reward\.dict_kwargs'"),
        ("config=/etc/passwd", "unknown key 'config'"),
        ("reward={class_path: rewards.FunctionReward}", "reward.path is missing; expected str or"),
        ("rollout.kernel=FlowSED", r"rollout\.kernel: got path 'FlowSED'.*did you mean 'samplers\.FlowSDE'\?"),
        ("rollout.kernel=samplers.FlowSED", r"did you mean 'FlowSDE'"),
        ("rollout.kernel=no_such_module.Mine", r"no module 'no_such_module'.*write './file\.py:Mine'"),
        # null where there is no "none"
        ("reward=null", f"got reward=null; expected a Reward: {PART}"),
        ("trainer.signal.credit=null", r"got trainer\.signal\.credit=null; expected a Credit.*for its default"),
        ("trainer.regularizers=null", r"got trainer\.regularizers=null; expected a mapping"),
        ("trainer.optimizer=null", r"got trainer\.optimizer=null; expected a mapping with some of betas"),
        ("evaluation.rewards=[null]", r"got evaluation\.rewards\[0\]=null; expected a Reward"),
        ("run=null", r"got run=null; expected a mapping with some of"),
        ("policy.path=null", r"got policy\.path=null; expected str"),
        ("rollout.plan.size=", r"got rollout\.plan\.size=null; expected int"),
        # numbers
        ("trainer.optimizer.max_grad_norm=.nan", r"got trainer\.optimizer\.max_grad_norm=\.nan; expected a finite number"),
        ("trainer.optimizer.max_grad_norm=.inf", r"trainer\.optimizer\.max_grad_norm"),
        ("trainer.optimizer.weight_decay=nan", r"trainer\.optimizer\.weight_decay=nan"),
        ("trainer.optimizer.eps=inf", r"trainer\.optimizer\.eps=inf"),
        ("trainer.optimizer.betas=[0.9, .nan]", r"trainer\.optimizer\.betas\[1\]=\.nan"),
        ("trainer.objective.clip_range=.nan", r"trainer\.objective\.clip_range"),
        ("trainer.regularizers.kl.beta=1e999", r"trainer\.regularizers\.kl\.beta=1e999"),
        ("policy.lora.alpha=.inf", r"policy\.lora\.alpha"),
        ("reward.divide_by=-.inf", r"reward\.divide_by"),
        ("run.ema_decay=.nan", r"run\.ema_decay"),
        ("evaluation.guidance_scale=.inf", r"evaluation\.guidance_scale"),
        ("evaluation.rewards=[{class_path: rewards.JPEGCompressibility, init_args: {divide_by: .nan}}]",
         r"evaluation\.rewards\[0\]\.divide_by"),
        ("reward={class_path: rewards.Mix, init_args: {rewards: [rewards.JPEGCompressibility], weights: [.nan]}}",
         r"reward\.weights\[0\]"),
        ("run.iterations=" + "9" * 5000, "run.iterations=9{40}; expected a whole number below"),
        # forms
        ("reward=[]", "got reward, a list; expected a Reward"),
        ("reward={}", "got reward without a class_path; expected a Reward"),
        ("reward={class_path: [a]}", "got reward with a class_path of several values"),
        ("reward=rewards.Reward", "which is a contract; expected a class that satisfies it"),
        ("reward=builtins.int", "expected a Reward: .*it has no method `load"),
        ("rollout.groups.x=3", r"'x' would be a key in '2'; expected a mapping there"),
        ("run={1: a}", r"unknown key 'run\.1'"),
        ("reward={class_path: rewards.OCR, init_args: {fold: {0: O}}}", r"got reward\.fold with the key 0, a number"),
        ("reward={class_path: os.system, init_args: {command: x}}", r"'reward\.command'.*\(arguments of os\.system\)"),
        ("run.iterations=1:30", r"got run\.iterations=1:30, which YAML reads as a number to the base 60"),
        ("policy=glyphs", "got policy='glyphs'; expected a mapping with some of"),
        ("evaluation.rewards.0=rewards.OCR", "'0' is a key in a list; expected the list as a whole"),
        ("policy.lora={rank: 8", "override 'policy.lora={rank: 8' is not valid YAML"),
        ("rollout..groups=3", "expected key=value"),
        ("rollout.group_size=many", "got rollout.group_size=many; expected int"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_it_is_said_by_its_dotted_name(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(CONFIG, [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "rollout.group_size=1000000000",
            r"rollout\.groups × rollout\.group_size: 2,000,000,000 latents \[3, 24, 48\]",
        ),
        ("rollout.groups=1000000000", r"rollout\.groups × rollout\.group_size: 3,000,000,000 latents"),
        ("policy.height=999999984", r"policy\.height × policy\.width × policy\.frames: one sample"),
        ("evaluation.samples_per_prompt=1000000000", r"evaluation\.samples_per_prompt: a list of 4,000,000,000 images"),
        ("policy.lora.rank=1000000000", r"policy\.lora\.rank: a LoRA of 5,760,000,000,000 numbers"),
    ],
)
def test_a_size_that_cannot_fit_is_refused_with_both_figures(override: str, said: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{said}.* need at least [\d,.]+ GiB of memory; this machine has [\d,.]+ GiB"
    ):
        load_config(CONFIG, [override])


def test_what_is_held_at_once_counts_not_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is no larger than what there is to put into it."""
    load_config(CONFIG, ["evaluation.batch_size=1000000000", "rollout.micro_batch=1000000000"])
    monkeypatch.setattr("flowalign.config.sizes.machine_memory", lambda: 4 * 3 * 24 * 48 * 4 - 1)
    with pytest.raises(ConfigError, match=r"evaluation\.batch_size"):
        load_config(CONFIG, ["rollout.micro_batch=1", "rollout.groups=1", "rollout.group_size=2", "policy.lora.rank=1",
                             "policy.lora.targets=[transformer_blocks.0.attn.to_q]"])  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.num_inference_steps=1000000000"],
        ["evaluation.num_inference_steps=1000000000"],
        ["rollout.num_inference_steps=9000", "rollout.group_size=1000", "rollout.plan=samplers.Chain"],
        [
            "rollout.num_inference_steps=9000",
            "rollout.group_size=10",
            "rollout.plan={class_path: samplers.Branch, init_args: {branches: 10}}",
        ],
    ],
)
def test_a_tree_that_cannot_be_built_is_refused(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"expected at most (10,000|2,000,000)"):
        load_config(CONFIG, overrides)


def plain(*overrides: str) -> dict[str, Any]:
    return load_config(CONFIG, overrides)[1]


def test_null_turns_a_part_of_a_name_off(tmp_path: Path) -> None:
    assert plain("trainer.regularizers.kl=null")["trainer"]["init_args"]["regularizers"] == {}
    (tmp_path / "no_kl.yaml").write_text("trainer: {init_args: {regularizers: {kl: null}}}\n")
    config, saved = load_config([CONFIG, str(tmp_path / "no_kl.yaml")])
    assert config.trainer.regularizers == {} == saved["trainer"]["init_args"]["regularizers"]


@pytest.mark.parametrize("run", ["fast", "null", "[a]", "3"])
def test_a_section_that_is_none_is_not_taken_for_an_empty_one(run: str, tmp_path: Path) -> None:
    (tmp_path / "layer.yaml").write_text(f"run: {run}\n")
    with pytest.raises(ConfigError, match=r"got run.*; expected a mapping with some of"):
        load_config([CONFIG, str(tmp_path / "layer.yaml")])


def test_a_mapping_replaces_and_dotted_keys_merge() -> None:
    """In the order of the command line; of the file's targets nothing is kept without a word."""
    default = plain("policy.lora={}")["policy"]["lora"]
    assert default["targets"] is None
    assert plain("policy.lora={rank: 8, alpha: 16}")["policy"]["lora"] == {**default, "rank": 8, "alpha": 16.0}
    merged = plain("policy.lora.rank=8")["policy"]["lora"]
    assert merged["targets"] == ["attn.to_q", "attn.to_v", "ff.net.2"] and merged["rank"] == 8
    assert plain("policy.lora.rank=8", "policy.lora={alpha: 16}")["policy"]["lora"] == {**default, "alpha": 16.0}
    assert plain("policy.lora={alpha: 16}", "policy.lora.rank=8")["policy"]["lora"]["rank"] == 8


def test_a_part_that_is_replaced_leaves_no_argument() -> None:
    window = plain("rollout.plan={init_args: {size: 2}}")["rollout"]["plan"]  # the class stays
    assert window["class_path"] == "samplers.Window" and (window["init_args"]["size"], window["init_args"]["low"]) == (
        2,
        0,
    )
    noisy = ["rollout.kernel={class_path: samplers.FlowSDE, init_args: {noise_level: 0.3}}"]
    assert plain(*noisy, "rollout.kernel=samplers.FlowSDE")["rollout"]["kernel"]["init_args"]["noise_level"] == 0.3
    other, fresh = plain(*noisy, "rollout.kernel=samplers.DanceSDE"), plain("rollout.kernel=samplers.DanceSDE")
    assert other["rollout"]["kernel"] == fresh["rollout"]["kernel"]
    trimmed = plain("trainer.signal.advantage={class_path: flowalign.advantage.Normalized, init_args: {trim: 0.1}}")
    assert trimmed["trainer"]["init_args"]["signal"]["advantage"]["init_args"]["trim"] == 0.1


def test_text_is_taken_as_it_is_typed(tmp_path: Path) -> None:
    saved = plain("policy.negative_prompt=bad: ugly, [x", "run.name=2024", "policy.lora.targets=null")
    assert saved["policy"]["negative_prompt"] == "bad: ugly, [x"
    for typed, taken in (('""', ""), ("''", ""), ("'a b'", "a b"), ("'a' or 'b'", "'a' or 'b'"), ('"', '"')):
        assert plain(f"policy.negative_prompt={typed}")["policy"]["negative_prompt"] == taken
    assert (saved["run"]["name"], saved["policy"]["lora"]["targets"]) == ("2024", None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert load_config(str(tmp_path / "config.yaml"))[1] == saved


def test_an_infinite_default_of_a_part_stays_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from dataclasses import dataclass\nfrom math import inf\nfrom rewards import RewardSpec\n"
        "@dataclass(frozen=True)\nclass Bounded:\n    highest: float = inf\n    name: str = 'mine'\n    spec = RewardSpec()\n"
        "    def load(self): ...\n    def close(self): ...\n    def __call__(self, batch): ...\n"
    )
    saved = plain("reward=./mine.py:Bounded")
    assert saved["reward"]["init_args"]["highest"] == float("inf")
    Path("config.yaml").write_text(yaml.safe_dump(saved))
    assert load_config("config.yaml")[1] == saved
    with pytest.raises(ConfigError, match=r"reward\.highest=-\.inf"):
        plain("reward=./mine.py:Bounded", "reward.highest=-.inf")
