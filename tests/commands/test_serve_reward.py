"""`flowalign serve-reward`: what is served is what the files say, and what cannot be is said in a sentence."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from flowalign import cli
from flowalign.config import load_reward
from rewards import OCR, Http, InWorker, JPEGCompressibility
from rewards.remote.description import fingerprint
from rewards.remote.server import Listener


@pytest.fixture
def listeners(monkeypatch: pytest.MonkeyPatch) -> list[Listener]:
    """Those that the command would serve; closed at once."""
    made: list[Listener] = []

    def serve(listener: Listener, ready: Callable[[str], object]) -> None:
        made.append(listener)
        listener.server_close()

    monkeypatch.setattr("flowalign.commands.serve_reward.serve", serve)
    return made


def test_a_layer_with_other_keys_and_overrides(listeners: list[Listener]) -> None:
    assert cli.serve_reward(["configs/rewards/ocr_glyphs.yaml", "reward.metric=soft", "--port", "0"]) == 0
    reward = listeners[0].service.reward
    assert isinstance(reward, OCR) and reward.metric == "soft" and reward.fold == {"0": "O"}


def test_a_class_a_function_and_a_token(listeners: list[Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "x" * 20)
    assert (
        cli.serve_reward(["--token-env", "SECRET", "--port", "0", "rewards.JPEGCompressibility", "reward.quality=80"])
        == 0
    )
    assert repr(listeners[0].service.reward) == repr(JPEGCompressibility(80)) and listeners[0].token == "x" * 20
    assert cli.serve_reward(["tests.helpers.plain_rewards:brightness", "--port", "0"]) == 0
    assert listeners[1].service.reward.name == "brightness" and listeners[1].token is None


def test_the_files_of_the_page_serve_both_sides(listeners: list[Listener], tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "places.md").read_text()
    one_word, worker, server = re.findall(r"```yaml\n(.*?)```", page, re.S)
    (tmp_path / "worker.yaml").write_text(re.sub(r"\n +python: .*", "", worker))
    (tmp_path / "server.yaml").write_text(server)
    (tmp_path / "one_word.yaml").write_text(one_word.split(" #")[0])
    ours = load_reward([str(tmp_path / "server.yaml")])
    assert isinstance(load_reward([str(tmp_path / "one_word.yaml")]), InWorker)
    assert isinstance(load_reward([str(tmp_path / "worker.yaml")]), InWorker) and isinstance(ours, Http)
    assert cli.serve_reward([str(tmp_path / "server.yaml"), "--port", "0"]) == 0
    assert isinstance(listeners[0].service.reward, OCR) and listeners[0].service.fingerprint == ours.fingerprint
    assert cli.serve_reward([str(tmp_path / "worker.yaml"), "--port", "0"]) == 0
    assert listeners[1].service.fingerprint == fingerprint(OCR()) == ours.fingerprint


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "0"], "got no reward"),
        (["rewards.OCRR"], "rewards.OCRR"),
        (["rewards.OCR", "reward.metrc=edit"], "unknown key 'reward.metrc'"),
        (["rewards.OCR", "reward.metric=edt"], "edt"),
        (["rewards.OCR", "run.seed=1"], "unknown key 'run'"),
        (["configs/models/glyphs.yaml"], "reward is missing"),
        (["missing.yaml"], "does not exist"),
        (["rewards.OCR", "--prot", "1"], "got --prot"),
        (["rewards.OCR", "--port", "x"], "invalid int value"),
        (["rewards.OCR", "--port", "99999"], "port must be"),
        (["rewards.OCR", "--host", "0.0.0.0"], "without a token"),
        (
            ["rewards.FunctionReward", "reward.path=tests.helpers.absent:it", "--port", "0"],
            "failed to load: ValueError: got",
        ),
        (["rewards.OCR", "--token-env", "NOT_SET_HERE"], "got a token of 0 characters"),
    ],
)
def test_what_cannot_be_served_is_a_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.serve_reward(arguments) == 2
    printed = capsys.readouterr().err.strip()
    assert said in printed and len(printed.splitlines()) == 1
