"""Rewards of several channels and process rewards, named in YAML: they reach the advantages, or are refused before loading."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from flowalign.build import policy_of, task_of
from flowalign.config import load_config
from flowalign.data import load_prompts
from flowalign.errors import ConfigError
from flowalign.loop import train
from flowalign.storage.metrics_log import read_rows

TINY = Path(__file__).parents[1] / "data" / "tiny.yaml"
MINE = """
import torch
def light_and_red(images, prompts):
    return torch.stack([images.mean((1, 2, 3)), images[:, 0].mean((1, 2))], 1)
def levels(prompts, latents, sigma):
    return latents.square().mean((1, 2, 3)) - sigma
"""


def part(class_path: str, /, **init: object) -> dict[str, object]:
    return {"class_path": class_path, "init_args": init}


NORMALIZED = part("flowalign.advantage.Normalized")
JPEG = part("rewards.JPEGCompressibility")


@pytest.fixture
def user(tmp_path: Path):
    """Makes a reward from a function of the user's file."""
    (tmp_path / "mine.py").write_text(MINE)

    def made(function: str, **init: object) -> dict[str, object]:
        return part("rewards.FunctionReward", path=f"{tmp_path}/mine.py:{function}", **init)

    return made


@pytest.fixture
def load(tmp_path: Path, tiny_pipeline: Path):
    def loaded(signal: dict | None = None, rollout: dict | None = None, **top: object):
        config = yaml.safe_load(TINY.read_text())
        config["run"] |= {"output": str(tmp_path / "runs"), "iterations": 1}
        config["policy"]["path"] = str(tiny_pipeline)
        config["trainer"]["init_args"]["signal"] |= signal or {}
        config["rollout"] |= rollout or {}
        rewards = top.pop("evaluated", None)
        if rewards is not None:
            config["evaluation"]["rewards"] = rewards
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config | top))
        return load_config(str(path), [])

    return loaded


def edges_of(config):
    """(batch, signal of its edges) of one rollout."""
    task = task_of(config, policy_of(config, "cpu"))
    config.trainer.prepare(task, None)
    batch = config.trainer.collect(load_prompts(config.prompts)[:2], 0)
    return batch, config.trainer.edge_signal(batch)


def test_channels_of_two_rewards_get_an_advantage_each(load, user) -> None:
    reward = part("rewards.Channels", rewards=[JPEG, user("light_and_red", channels=["light", "red"], name="mine")])
    names = ("jpeg_compressibility", "mine/light", "mine/red")
    weights = dict(zip(names, (1.0, 2.0, 0.0), strict=True))
    keep = part("flowalign.advantage.Mixed", advantage=NORMALIZED, how="keep", weights=weights)
    batch, signal = edges_of(load({"advantage": keep}, reward=reward)[0])
    assert batch.channels == names and signal.advantages.values.shape[1] == 3
    plain = part("flowalign.advantage.Mixed", advantage=NORMALIZED, how="keep")
    _, each = edges_of(load({"advantage": plain}, reward=reward)[0])
    torch.testing.assert_close(signal.advantages.values, each.advantages.values * torch.tensor([1.0, 2.0, 0.0]))
    assert float(each.advantages.values.abs().min()) > 0 and float(each.advantages.values.std(0).min()) > 0


@pytest.mark.parametrize("how", ["reward_sum", "advantage_sum", "gdpo"])
def test_a_users_function_of_two_channels_reaches_mixed_advantages(load, user, how: str) -> None:
    mixed = part("flowalign.advantage.Mixed", advantage=NORMALIZED, how=how)
    batch, signal = edges_of(load({"advantage": mixed}, reward=user("light_and_red", channels=["light", "red"]))[0])
    assert batch.channels == ("light", "red")
    assert signal.advantages.values.shape[1] == 1 and float(signal.advantages.values.abs().max()) > 0


def test_a_run_with_channels_a_process_reward_and_an_evaluation_of_two(load, user) -> None:
    """End to end: the process reward is credited by its gain, in a set of its own; each channel is reported."""
    signal = {
        "credit": part("flowalign.credit.Joined", parts={
            "outcome": part("flowalign.credit.Broadcast"), "state": part("flowalign.credit.Process", score="levels"),
        }),
        "advantage": part("flowalign.advantage.PerChannel", parts={
            "outcome": NORMALIZED, "state": part("flowalign.advantage.Normalized", within="prompt_step"),
        }),
    }  # fmt: skip
    two = user("light_and_red", channels=["light", "red"], name="mine")
    process = [user("levels", inputs=["latents"], scope="latent")]
    config, plain = load(signal, reward=two, process_rewards=process, evaluated=[two, JPEG])
    batch, found = edges_of(config)
    assert found.credit.channels == ("outcome/light", "outcome/red", "state/levels")
    arrived = batch.forest.at(batch.forest.tree.edges).square().mean((1, 2, 3)) - batch.forest.sigma(
        batch.forest.tree.edges
    )
    torch.testing.assert_close(found.credit.values[:, 2], arrived.double(), rtol=1e-5, atol=1e-6)
    assert float(found.advantages.values[:, 2].abs().max()) > 0
    train(config, plain)
    folder = Path(config.run.output) / config.run.name
    (row,) = read_rows(folder / "metrics.jsonl")
    assert row["reward/mean"] == pytest.approx((row["reward/light_mean"] + row["reward/red_mean"]) / 2)
    assert row["process/levels_mean"] == row["process/levels_mean"] and row["time/process"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["reward"] == "mine/light"
    assert set(summary["rewards"]["gain"]) == {"mine/light", "mine/red", "jpeg_compressibility"}
    again, _ = load_config(str(folder / "config.yaml"), [])
    assert again.process_rewards[0].spec == config.process_rewards[0].spec


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (lambda user: {"reward": part("rewards.Mix", rewards=[JPEG, user("light_and_red")], weights=[1.0, 1.0]),
                       "signal": {"advantage": part("flowalign.advantage.Mixed", advantage=NORMALIZED, how="gdpo")}},
         r"got one channel, \['mix'\]"),
        (lambda user: {"reward": part("rewards.Mix", rewards=[JPEG, user("light_and_red", channels=["a", "b"])],
                                      weights=[1.0, 1.0])},
         r"one score per part: take rewards\.Channels"),
        (lambda user: {"reward": user("levels", inputs=["latents"], scope="latent")},
         "whose scope is 'latent'; expected 'terminal': name it under process_rewards"),
        (lambda user: {"evaluated": [user("levels", inputs=["latents"], scope="latent")]},
         "got evaluation.rewards with 'levels'"),
        (lambda user: {"process_rewards": [user("levels", inputs=["latents"])]},
         "got process_rewards with 'levels', whose scope is 'terminal'"),
        (lambda user: {"process_rewards": [user("levels", inputs=["latents"], scope="latent")]},
         "reads: add flowalign.credit.Process"),
        (lambda user: {"process_rewards": [user("levels", inputs=["latents"], scope="latent", name="jpeg_compressibility")]},
         "expected different names"),
        (lambda user: {"reward": user("light_and_red", channels=["a", "b"]),
                       "rollout": {"plan": part("samplers.Selected", plan=part("samplers.Chain"), counts={"1": 2})},
                       "signal": {"advantage": part("flowalign.advantage.Mixed", advantage=NORMALIZED)}},
         "one score to rank states by"),
        (lambda user: {"evaluated": [user("light_and_red", channels=["a", "b"], name="x"),
                                     user("light_and_red", channels=["b", "a"], name="x")]},
         "each with its own `name`"),
        (lambda user: {"reward": user("light_and_red", inputs=["pixels"])}, "pixels"),
        (lambda user: {"evaluated": [part("rewards.GroupDiversity")]},
         r"got evaluation\.samples_per_prompt=1 with 'group', which compares the samples of one prompt"),
        (lambda user: {"reward": part("rewards.GroupDiversity"),
                       "rollout": {"plan": part("samplers.Probed", plan=part("samplers.Chain"))}},
         "got a rollout.plan with probes and reward 'group'"),
        (lambda user: {"rollout": {"preview_reward": JPEG}}, "with a rollout.plan that selects nothing"),
        (lambda user: {"rollout": {"preview_reward": user("levels", inputs=["latents"], scope="latent")}},
         r"got rollout\.preview_reward with 'levels'"),
        (lambda user: {"rollout": {"refill": -1}}, r"got rollout\.refill=-1"),
        (lambda user: {"rollout": {"plan": part("samplers.Selected", plan=part("samplers.Chain"), counts={"1": 2}),
                                   "refill": 1}},
         r"got rollout\.refill=1; expected at least 0, and 0 with a plan that selects"),
        (lambda user: {"rollout": {"overlap": True}}, r"got rollout\.overlap=true with rollout\.chunk=null .* all rolled out at once"),
        (lambda user: {"rollout": {"chunk": 2, "groups": 2, "overlap": True}},
         r"got rollout\.overlap=true with rollout\.chunk=2 and rollout\.groups=2, all rolled out at once"),
        (lambda user: {"rollout": {"plan": part("samplers.Selected", plan=part("samplers.Chain"), counts={"1": 2}),
                                   "chunk": 1, "overlap": True}}, r"got rollout\.overlap=true; expected .* no plan that selects"),
    ],
    ids=["mix and gdpo", "mix of channels", "latent reward", "latent evaluation", "terminal process", "unread process",
         "one name", "selection", "evaluation names", "unknown input", "group of one", "group with probes",
         "preview reward without previews", "latent preview reward", "refill below 0", "refill of a selection",
         "overlap without chunks", "overlap of one chunk", "overlap of a selection"],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_loading(load, user, changes, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(**changes(user))
