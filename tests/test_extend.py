"""docs/extend.md: every file in it is complete, and every configuration in it trains."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowalign.config import load_config
from flowalign.loop import train
from flowalign.report.panels import health_panels, reward_panels
from flowalign.run.run import Run
from flowalign.storage import checkpoint
from flowalign.storage.metrics_log import read_rows, without_time
from rewards import RewardBatch, score

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "tests" / "data" / "tiny.yaml")
FILES = dict(
    re.findall(r"```(?:python|yaml)\n# (\w+\.(?:py|yaml))\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.S)
)
CONFIGURATIONS = [name for name in FILES if name.endswith(".yaml")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of the page."""
    folder = tmp_path_factory.mktemp("extend")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def importable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(folder)


def run(folder: Path, pipeline: Path, name: str, output: Path, *overrides: str) -> Path:
    config, plain = load_config(
        [TINY, str(folder / name)],
        [f"policy.path={pipeline}", f"run.output={output}", "run.name=run", "run.iterations=2", *overrides],
    )
    train(config, plain)
    return output / "run"


def rows(run: Path) -> list[dict]:
    return [without_time(row) for row in read_rows(run / "metrics.jsonl")]


def weights(run: Path) -> dict[str, torch.Tensor]:
    tensors, _ = checkpoint.load(checkpoint.latest(run))
    return {f"{section}/{key}": value for section, part in tensors.items() for key, value in part.items()}


def test_the_page_is_complete() -> None:
    assert len(CONFIGURATIONS) == 7 and len(FILES) == 15


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_trains(folder: Path, tiny_pipeline: Path, tmp_path: Path, name: str) -> None:
    done = run(folder, tiny_pipeline, name, tmp_path)
    assert len(rows(done)) == 2 and all(row["optim/grad_norm"] > 0 for row in rows(done)[:1])
    shown = {
        "my_function.yaml": "reward/contrast_mean",
        "my_process_reward.yaml": "process/calm_mean",
        "my_trainer.yaml": "loss/regression",
    }
    if name in shown:
        assert shown[name] in rows(done)[0]
        panels = [*reward_panels(rows(done)), *health_panels(rows(done))]
        assert shown[name] in [panel.key for panel in panels] and "data-points" in (done / "report.html").read_text()


def test_a_video_reward_scores_motion(folder: Path) -> None:
    from my_video_reward import Motion

    still = torch.full((1, 4, 3, 8, 8), 0.5)
    fading = torch.linspace(0, 0.75, 4)[None, :, None, None, None].expand(1, 4, 3, 8, 8)
    output = score(Motion(), RewardBatch(prompts=["a", "b"], videos=torch.cat([still, fading]), fps=8.0))
    torch.testing.assert_close(output.scores, torch.tensor([[0.0], [2.0]]))


VIDEO_FAMILY = """
from dataclasses import replace
import torch
from flowalign.models.families import sd3

class Panning:
    def __init__(self, model): self.model = model
    def __getattr__(self, name): return getattr(self.model, name)
    def decode(self, latents):
        image = self.model.decode(latents)
        return torch.stack([image.roll(shift, -1) for shift in range(4)], 1)

FAMILY = replace(
    sd3.FAMILY, model=lambda *arguments: Panning(sd3.FAMILY.model(*arguments)),
    latent_shape=lambda size, *others: sd3.FAMILY.latent_shape(replace(size, frames=1), *others),
)
"""


def test_a_video_reward_trains_a_policy_of_videos(folder: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    """From YAML to the advantages; the frames are those of a pan over the image."""
    (folder / "panning.py").write_text(VIDEO_FAMILY)
    (folder / "panning.yaml").write_text(
        "policy: {family: panning.FAMILY, frames: 4, fps: 8.0}\nreward: my_video_reward.Motion\n"
        "evaluation: {rewards: [my_video_reward.Motion]}\n"
    )
    done = rows(run(folder, tiny_pipeline, "panning.yaml", tmp_path))
    assert done[0]["reward/motion_mean"] > 0 and done[0]["reward/motion_std"] > 0
    assert done[0]["group/trained_edges"] == 6 and done[0]["optim/grad_norm"] > 0


def test_a_mean_is_remembered_over_a_resume(folder: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    whole = run(folder, tiny_pipeline, "my_advantage.yaml", tmp_path / "whole", "run.iterations=3")
    run(folder, tiny_pipeline, "my_advantage.yaml", tmp_path / "parts", "run.iterations=1")
    parts = run(folder, tiny_pipeline, "my_advantage.yaml", tmp_path / "parts", "run.iterations=3")
    states = [checkpoint.load(checkpoint.latest(one))[1]["trainer"] for one in (whole, parts)]
    assert states[0]["memory"] and states[0] == states[1]


def test_the_trainer_is_short_and_the_loop_does_not_know_it() -> None:
    code = FILES["my_trainer.py"].partition("@dataclass\nclass RewardWeighted")[2]
    assert len([line for line in code.splitlines() if line.strip()]) <= 60


def test_the_trainer_resumes_after_a_kill(
    folder: Path, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(folder, tiny_pipeline, "my_trainer.yaml", tmp_path / "whole", "run.iterations=3")
    original, calls = Run.step, []

    def dies(self: Run, update) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("killed")
        original(self, update)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", dies)
        with pytest.raises(KeyError):
            run(folder, tiny_pipeline, "my_trainer.yaml", tmp_path / "killed", "run.iterations=3")
    killed = run(folder, tiny_pipeline, "my_trainer.yaml", tmp_path / "killed", "run.iterations=3")
    one, other = weights(whole), weights(killed)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert rows(whole) == rows(killed)


def test_the_trainer_in_two_processes_as_launched(folder: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    """The same first gradient as in one process, through the script. (`accelerate launch` on CPUs starts one process.)"""
    one = run(folder, tiny_pipeline, "my_trainer.yaml", tmp_path / "one", "rollout.groups=3")
    overrides = [f"policy.path={tiny_pipeline}", f"run.output={tmp_path / 'two'}", "run.name=run", "run.iterations=2"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(ROOT / "scripts/train.py"), TINY, str(folder / "my_trainer.yaml"), "rollout.groups=3", *overrides],
        env={"PYTHONPATH": f"{ROOT}:{folder}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
             "ACCELERATE_USE_CPU": "true"},
        timeout=300, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    two = tmp_path / "two" / "run"
    for a, b in zip(rows(one), rows(two), strict=True):
        assert a["loss/regression"] == pytest.approx(b["loss/regression"], rel=1e-5)
        assert a["optim/grad_norm"] == pytest.approx(b["optim/grad_norm"], rel=1e-4)
        assert a["cost/update_per_image"] == pytest.approx(b["cost/update_per_image"], rel=0.5)  # padding
