"""Pre-training of the worlds: every part learns, a resumed run is the run that was never stopped, and a folder with its card comes of it."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flowalign.glyphs import pretrain as images
from flowalign.glyphs.edit import pretrain as edits
from flowalign.glyphs.parts import build_pipeline
from flowalign.glyphs.pretrain import encode_text, pretrain
from flowalign.glyphs.training import Pretraining
from flowalign.glyphs.video import pretrain as clips

SCRIPTS = Path(__file__).parents[2] / "scripts"
TINY = Pretraining(batch_size=2, vae_batch_size=1, vae_steps=2, steps=2, warmup=1, checkpoint_every=1, statistics=2)
worlds = pytest.mark.parametrize("world", [images, edits, clips], ids=["images", "edits", "clips"])


def silent(stage: str, step: int, loss: float) -> None:
    """No progress bar."""


def weights(pipeline) -> dict[str, torch.Tensor]:
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{part}.{name}": value for part, module in parts.items() for name, value in module.named_parameters()}


@worlds
def test_resume_is_bit_identical_and_every_part_moves(world, tmp_path: Path) -> None:
    straight = weights(world.pretrain(TINY, tmp_path / "straight", silent))
    world.pretrain(replace(TINY, steps=1), tmp_path / "stopped", silent)
    resumed = weights(world.pretrain(TINY, tmp_path / "stopped", silent))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    torch.manual_seed(TINY.seed)
    untrained = weights(world.build_pipeline())
    moved = {name.split(".")[0] for name in straight if not torch.equal(straight[name], untrained[name])}
    assert moved == {*world.TRAINED, "vae"}


@pytest.mark.parametrize(
    ("world", "script", "row"),
    [
        (images, "pretrain_glyphs", "| 1 | 1 | "),
        (edits, "pretrain_glyphs_edit", "| 1 | ink | "),
        (clips, "pretrain_glyphs_video", "| 1 | 1 | "),
    ],
    ids=["images", "edits", "clips"],
)
def test_the_scripts_write_a_folder_and_the_card_of_what_it_can_do(
    world, script: str, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, measured = runpy.run_path(str(SCRIPTS / f"{script}.py"))["main"], 3
    for name, value in {"GRID": [(1, 1.0)], "STEPS": (1,), "MEASURED": measured}.items():
        monkeypatch.setitem(main.__globals__, name, value)
    monkeypatch.setattr(world, "RECIPE", replace(TINY, vae_steps=1))
    folder, threads = tmp_path / "made", torch.get_num_threads()
    options = [f"--output={folder}", f"--checkpoints={tmp_path / 'kept'}", "--steps=1", f"--threads={threads}"]
    monkeypatch.setattr("sys.argv", [script, *options])
    main()
    card = (folder / "README.md").read_text(encoding="utf-8")
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(row)]
    assert len(shown) == 1 and shown[0] in card.splitlines()
    assert f"On the first {measured} held-out" in card and '"steps": 1,' in card and "the 512 held-out" in card.lower()
    for name in (*world.TRAINED, "vae"):
        assert f"- `{name}`: " in card
        assert list((folder / name).glob("*.safetensors"))


def test_vae_resumes_bit_identically(tmp_path: Path) -> None:
    no_flow = replace(TINY, steps=0, schedule_steps=1)
    straight = weights(pretrain(no_flow, tmp_path / "straight", silent))

    def stop(stage: str, step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(no_flow, tmp_path / "stopped", stop)
    resumed = weights(pretrain(no_flow, tmp_path / "stopped", silent))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path: Path) -> None:
    pretrain(TINY, tmp_path, silent)
    with pytest.raises(ValueError, match="2 steps"):
        pretrain(replace(TINY, steps=1), tmp_path, silent)


def test_untrained_vae_is_near_the_identity() -> None:
    torch.manual_seed(0)
    vae = build_pipeline().vae
    pictures = torch.rand(4, 3, 24, 48) * 2 - 1
    with torch.no_grad():
        decoded = vae.decode(vae.encode(pictures).latent_dist.mode()).sample
    assert (decoded - pictures).abs().mean() < 0.1


def test_text_features_are_those_of_the_diffusers_pipeline() -> None:
    pipeline = build_pipeline()
    prompts = ['the word "KITE" in red on a white background', ""]
    with torch.no_grad():
        tokens, pooled = encode_text(pipeline, prompts)
        expected, _, expected_pooled, _ = pipeline.encode_prompt(
            prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=0
        )
    torch.testing.assert_close(tokens, expected, rtol=0, atol=0)
    torch.testing.assert_close(pooled, expected_pooled, rtol=0, atol=0)
