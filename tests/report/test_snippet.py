"""The snippet of a finished run's report makes the tuned model's image where flowalign cannot be imported."""

import html
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.data import as_records, load_prompts
from flowalign.evaluation.result_file import load_result
from flowalign.models import LoRA, load_policy
from flowalign.models.load_call import load_call
from flowalign.models.sampling import sample
from flowalign.run.load import load_run
from samplers import normal
from tests.helpers.tiny_run import run_it


def snippet_of(folder: Path) -> str:
    (text,) = re.findall(r"<pre>(import torch.*?)</pre>", (folder / "report.html").read_text(), re.S)
    return html.unescape(text)


@pytest.mark.parametrize("trained", [[], ["policy.trainable=full", "trainer.regularizers={}"]], ids=["lora", "full"])
def test_the_snippet_of_a_finished_run_is_the_tuned_model(
    trained: list[str], tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """alpha ≠ rank, an average, relative paths: and the same pipe makes the images of the tuned evaluation."""
    monkeypatch.chdir(tiny_pipeline.parent)
    run_it(
        Path(tiny_pipeline.name),
        tmp_path / "runs",
        "run.iterations=1",
        "run.ema_decay=0.5",
        "trainer.optimizer.lr=0.01",
        *trained,
    )
    folder = tmp_path / "runs" / "tiny"
    snippet = snippet_of(folder)
    tuned = load_result(folder / "evaluation" / "tuned.safetensors")
    records = load_prompts("flowalign.glyphs:held_out_prompts")[: len(tuned.prompts)]
    torch.save(
        torch.stack([normal((3, 24, 48), tuned.seed, "start", "evaluate", r.uid, 0) for r in records]),
        tmp_path / "n.pt",
    )
    script = f"""
import sys
sys.modules.update(flowalign=None, rewards=None, samplers=None)  # importing one is an ImportError
{snippet}
call = dict(prompt={tuned.prompts!r}, latents=torch.load({str(tmp_path / "n.pt")!r}).to(pipe.device), height=24, width=48,
            num_inference_steps=2, guidance_scale=1.0, max_sequence_length=0, output_type="pt")
torch.save(pipe(**call).images.float().cpu(), {str(tmp_path / "images.pt")!r})
"""
    (tmp_path / "elsewhere").mkdir()
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        check=True,
        cwd=tmp_path / "elsewhere",
        env={"HF_HUB_OFFLINE": "1"},
    )
    images, base = torch.load(tmp_path / "images.pt"), load_result(folder / "evaluation" / "base.safetensors")
    assert float((images - base.images).abs().max()) > 0.01  # what was trained does something
    torch.testing.assert_close(images, tuned.images, rtol=0, atol=0.502 / 255)  # kept as bytes
    policy = load_run(folder)
    noise = torch.randn(1, 3, 24, 48, generator=torch.Generator().manual_seed(0))
    expected = policy.decode(sample(policy, policy.encode(as_records(["your prompt"])), noise, 2, 1.0))[0]
    made = np.asarray(Image.open(tmp_path / "elsewhere" / "image.png")).transpose(2, 0, 1)
    assert np.abs(made - expected.mul(255).numpy()).max() < 0.51


def test_a_pipeline_is_loaded_from_anywhere_with_its_dtypes(
    tiny_pipeline: Path, tiny_sd15_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_pipeline.parent)
    arguments = [repr(str(tiny_pipeline)), "text_encoder_3=None", "tokenizer_3=None", "dtype=torch.float32"]
    expected = "DiffusionPipeline.from_pretrained(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"
    assert (
        load_call(tiny_pipeline.name, None, "fp32", None)
        == load_call(str(tiny_pipeline), None, "fp32", None)
        == expected
    )
    several = load_call(str(tiny_sd15_pipeline), None, "bf16", "fp32")
    assert (
        several.endswith("    dtype={'default': torch.bfloat16, 'vae': torch.float32},\n)")
        and "text_encoder_3" not in several
    )
    monkeypatch.setattr(
        "diffusers.DiffusionPipeline.load_config", lambda name: {"_class_name": "StableDiffusionPipeline"}
    )
    assert load_call("some/model", None, "bf16", None).startswith(
        "DiffusionPipeline.from_pretrained(\n    'some/model',"
    )


def test_equal_tensors_give_equal_lora_files(tiny_pipeline: Path, tmp_path: Path) -> None:
    policy = load_policy(str(tiny_pipeline), lora=LoRA(rank=2, alpha=3))
    seen = set()
    for number in range(6):  # safetensors orders two keys of metadata by chance
        policy.save_lora(tmp_path / str(number))
        files = sorted(path for path in (tmp_path / str(number)).iterdir() if path.name != "README.md")
        assert len(files) == 3
        seen.add(tuple((path.name, path.read_bytes()) for path in files))
    assert len(seen) == 1
    data = (tmp_path / "0" / "pytorch_lora_weights.safetensors").read_bytes()
    text = data[8 : 8 + int.from_bytes(data[:8], "little")].decode()
    listed = re.search(r"target_modules\\?\":\s*(?:\\n)?\s*\[(.*?)\]", text).group(1)
    modules = re.findall(r"[\w.]*attn[\w.]*", listed)
    assert len(modules) > 8 and modules == sorted(modules)  # a set has another order in each process
