"""`place`: where a reward lives is one word of YAML."""

from pathlib import Path

import pytest

from flowalign.config import load_config
from flowalign.config.load import load_reward
from flowalign.errors import ConfigError
from rewards import JPEGCompressibility, Mix, Offloaded
from rewards.remote.description import fingerprint

JPEG = "rewards.JPEGCompressibility"


def read(folder: Path, text: str, *overrides: str):
    (folder / "reward.yaml").write_text(text)
    return load_reward([str(folder / "reward.yaml"), *overrides])


@pytest.mark.parametrize(
    ("place", "made"),
    [("process", "JPEGCompressibility"), ("null", "JPEGCompressibility"), ("worker", "InWorker"), ("http", "Http")],
)
def test_one_word(tmp_path: Path, place: str, made: str) -> None:
    reward = read(tmp_path, f"reward: {{class_path: {JPEG}, place: {place}}}")
    assert type(reward).__name__ == made and reward.name == JPEGCompressibility().name
    assert reward.spec.elsewhere == (made in ("InWorker", "Http"))
    assert fingerprint(reward) == fingerprint(JPEGCompressibility())
    assert type(load_reward([JPEG, f"reward.place={place}"])).__name__ == made


def test_a_word_with_arguments_and_over_another_file(tmp_path: Path) -> None:
    text = f"reward: {{class_path: {JPEG}, place: {{worker: {{timeout: 7, batch_size: 3}}}}}}"
    reward = read(tmp_path, text)
    assert (reward.timeout, reward.batch_size) == (7, 3) and repr(reward.reward) == repr(JPEGCompressibility())
    assert read(tmp_path, text, "reward.place.worker.timeout=9").timeout == 9
    assert repr(read(tmp_path, text, "reward.place=process")) == repr(JPEGCompressibility())
    (tmp_path / "own.yaml").write_text(f"reward: {JPEG}")
    assert read(tmp_path, text, "reward.place.http.budget=200").budget == 200  # nothing of the worker's goes along
    assert load_reward([JPEG, "reward.place=worker", "reward.place.worker.timeout=9"]).timeout == 9
    assert load_reward([JPEG, "reward.place=http", "reward.place.worker.timeout=9"]).timeout == 9
    (tmp_path / "place.yaml").write_text("reward: {place: {http: {url: 'http://10.0.0.1:80'}}}")
    assert load_reward([str(tmp_path / "own.yaml"), str(tmp_path / "place.yaml")]).url == "http://10.0.0.1:80"
    (tmp_path / "worker.yaml").write_text("reward: {place: {worker: {timeout: 5}}}")
    layers = [str(tmp_path / f"{name}.yaml") for name in ("own", "worker", "place")]
    assert load_reward(layers).url == "http://10.0.0.1:80"
    (tmp_path / "place.yaml").write_text("reward: {place: {worker: {batch_size: 2}}}")
    merged = load_reward(layers)
    assert (merged.timeout, merged.batch_size) == (5, 2)


def test_a_part_of_a_mix_lives_elsewhere_by_itself(tmp_path: Path) -> None:
    clip = "{class_path: rewards.CLIPScore, place: offload}"
    mix = read(
        tmp_path,
        f"""
reward:
  class_path: rewards.Mix
  init_args: {{rewards: [{{class_path: {JPEG}, place: worker}}, {clip}], weights: [1, 1]}}
""",
    )
    assert isinstance(mix, Mix) and [type(part).__name__ for part in mix.rewards] == ["InWorker", "Offloaded"]
    assert not mix.spec.elsewhere and isinstance(mix.rewards[1], Offloaded)


def test_what_is_saved_gives_the_same_reward(tmp_path: Path) -> None:
    config, plain = load_config("configs/glyphs_trees.yaml", ["reward.place=worker"])
    assert plain["reward"]["class_path"].endswith("InWorker") and "place" not in plain["reward"]
    assert type(config.reward).__name__ == "InWorker"


@pytest.mark.parametrize(
    ("place", "named"),
    [
        ("wroker", "got reward.place='wroker'; expected one of process, offload, worker, http"),
        ("[worker]", "got reward.place='several words'"),
        ("{worker: {}, http: {}}", "got reward.place='several words'"),
        ("{worker: 3}", "got reward.place.worker='3'; expected a mapping of arguments"),
        ("{worker: [3]}", "expected a mapping of arguments"),
        (
            "{worker: {reward: rewards.OCR}}",
            "got reward.place.worker.reward; expected the reward under reward.class_path",
        ),
        ("{process: {timeout: 3}}", "got reward.place.process with arguments; expected none"),
        ("{worker: {timeuot: 3}}", "timeuot"),
        ("offload", "it has no method `offload(self) -> None`"),
    ],
)
def test_what_is_no_place_is_told(tmp_path: Path, place: str, named: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, f"reward: {{class_path: {JPEG}, place: {place}}}")
    assert named in str(raised.value)


def test_what_is_wrong_in_the_reward_is_told_under_its_own_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'reward\.qualty'"):
        read(tmp_path, f"reward: {{class_path: {JPEG}, init_args: {{qualty: 3}}, place: worker}}")


def test_only_rewards_have_a_place() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'rollout\.plan\.place'"):
        load_config("configs/glyphs_trees.yaml", ["rollout.plan={class_path: samplers.Chain, place: worker}"])
