"""A LoRA from a folder: a start of the policy or of a role, with its own alpha; and a policy from a live pipeline."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from flowalign.config import load_config
from flowalign.data import as_records
from flowalign.errors import ConfigError
from flowalign.models import LoRA, Policy, Role, load_policy
from flowalign.models.checks import check_lora_folders
from flowalign.models.lora_file import NAME, read_lora

TARGETS = ("attn.to_q", "ff.net.2")
LORA = LoRA(rank=4, alpha=10, targets=TARGETS)


def shaken(policy: Policy, seed: int = 0) -> Policy:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in policy.trainable_parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return policy


@torch.no_grad()
def velocity(policy: Policy, role: str = "policy") -> torch.Tensor:
    x = torch.randn(2, 3, 24, 48, generator=torch.Generator().manual_seed(1))
    with policy.role(role):
        return policy.velocity(x, torch.tensor([0.9, 0.4]), policy.encode(as_records(["KITE", "MOON"])))


@pytest.fixture(scope="module")
def teacher(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A saved LoRA with alpha ≠ rank, and the velocity of the policy that saved it."""
    policy, folder = shaken(load_policy(str(tiny_pipeline), lora=LORA)), tmp_path_factory.mktemp("teacher")
    policy.save_lora(folder)
    return folder, velocity(policy)


def test_a_policy_starts_from_a_folder(tiny_pipeline: Path, teacher: tuple[Path, torch.Tensor]) -> None:
    folder, expected = teacher
    base = velocity(load_policy(str(tiny_pipeline), trainable="none"))
    starts: tuple[Any, ...] = (str(folder), LoRA(rank=4, alpha=10, targets=TARGETS, init=str(folder)))
    for lora in starts:
        policy = load_policy(str(tiny_pipeline), lora=lora)
        assert torch.equal(velocity(policy), expected) and torch.equal(velocity(policy, "reference"), base)
        assert all(p.requires_grad and p.dtype == torch.float32 for _, p in policy.trainable_parameters())


def test_a_role_starts_from_a_folder_of_another_rank_and_other_layers(
    tiny_pipeline: Path, teacher: tuple[Path, torch.Tensor]
) -> None:
    folder, expected = teacher
    policy = shaken(load_policy(str(tiny_pipeline), lora=LoRA(rank=2, alpha=2, targets=("attn.to_v",))), seed=3)
    own, flags = velocity(policy), [p.requires_grad for p in policy.modules()["transformer"].parameters()]
    policy.add_roles({"teacher": Role(init=str(folder)), "fake": Role("trained", init=str(folder))})
    torch.testing.assert_close(velocity(policy, "teacher"), expected, rtol=0, atol=1e-6)
    assert torch.equal(velocity(policy, "fake"), velocity(policy, "teacher"))
    assert torch.equal(velocity(policy), own)
    names = {name for name, _ in policy.parameters_of("teacher")} | {name for name, _ in policy.parameters_of("fake")}
    kept = [p.requires_grad for name, p in policy.modules()["transformer"].named_parameters() if name not in names]
    assert sum(kept) == sum(flags) and {p.requires_grad for _, p in policy.parameters_of("fake")} == {True}
    assert {p.requires_grad for _, p in policy.parameters_of("teacher")} == {False}


def test_a_role_starts_from_the_reference(tiny_pipeline: Path, teacher: tuple[Path, torch.Tensor]) -> None:
    for settings in ({"lora": str(teacher[0])}, {"trainable": "full", "reference_copy": True}):
        policy = load_policy(str(tiny_pipeline), **settings)  # type: ignore[arg-type]
        shaken(policy) if "lora" in settings else None
        policy.add_roles({"start": Role("ema", init="reference", decay=0.5)})
        base = velocity(policy, "reference")
        assert torch.equal(velocity(policy, "start"), base)
        if "lora" in settings:
            policy.follow(1)
            assert not torch.equal(velocity(policy, "start"), base)


def test_alpha_of_a_file_without_metadata(
    tiny_pipeline: Path, teacher: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    """Without metadata alpha is the rank; kohya's entries say it module by module."""
    folder, expected = teacher
    tensors = load_file(folder / NAME)
    save_file(tensors, tmp_path / NAME)
    assert set(read_lora(tmp_path, "transformer").alphas.values()) == {4.0}
    modules = read_lora(folder, "transformer").modules
    save_file({**tensors, **{f"transformer.{m}.alpha": torch.tensor(10.0) for m in modules}}, tmp_path / NAME)
    policy = load_policy(str(tiny_pipeline), lora=str(tmp_path))
    assert torch.equal(velocity(policy), expected)
    mixed = {f"transformer.{m}.alpha": torch.tensor(10.0 if m == modules[0] else 4.0) for m in modules}
    save_file({**tensors, **mixed}, tmp_path / NAME)
    policy = load_policy(str(tiny_pipeline), lora=LoRA(rank=2, alpha=2))
    policy.add_roles({"teacher": Role(init=str(tmp_path))})
    layers = dict(policy.modules()["transformer"].named_modules())
    scaling = {module: layers[module].scaling["teacher"] for module in modules}
    assert scaling == {module: 2.5 if module == modules[0] else 1.0 for module in modules}


def test_folders_that_do_not_fit_are_refused_before_loading(
    tiny_pipeline: Path, tiny_sd15_pipeline: Path, teacher: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, _ = teacher
    path, other = str(tiny_pipeline), LoRA(rank=4, alpha=8, targets=TARGETS)
    start, follows = replace(other, init=str(folder)), Role("ema", init=str(folder))
    for lora, roles, message in (
        (start, {}, r"rank \[4\], alpha \[10.0\].*set policy.lora.rank"),
        (replace(LORA, targets=("attn.to_q",), init=str(folder)), {}, r"differ in transformer_blocks\.0\.ff\.net\.2"),
        (replace(start, init=str(tmp_path)), {}, "holds no pytorch_lora_weights"),
        (other, {"a": follows}, "for the role a, which follows policy"),
        (other, {"a": Role(init=str(folder)), "b": Role(update="ema", of="a")}, "for the role a, which b follows"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            check_lora_folders(path, lora, roles)
    check_lora_folders(path, replace(LORA, init=str(folder)), {"a": follows, "b": Role(init=str(folder))})
    config = str(Path(__file__).parents[1] / "data" / "tiny.yaml")
    with pytest.raises(ConfigError, match=r"policy\.lora"):
        load_config(config, [f"policy.path={path}", f"policy.lora.init={folder}"])
    full = ["policy.trainable=full", "policy.reference_copy=true", f"policy.roles={{a: {{init: {folder}}}}}"]
    with pytest.raises(ConfigError, match=r"the role a.*only with policy\.trainable=lora.*model_index"):
        load_config(config, [f"policy.path={path}", *full])
    with pytest.raises(ValueError, match="without adapters for the unet"):
        load_policy(str(tiny_sd15_pipeline), lora=str(folder))
    tensors = load_file(folder / NAME)
    save_file({name.replace("attn.to_q", "attn.to_x"): value for name, value in tensors.items()}, tmp_path / NAME)
    with pytest.raises(ValueError, match="no linear layers of the transformer"):
        load_policy(str(tiny_pipeline), lora=str(tmp_path))


# ------------------------------------------------------------------------------------------ a live pipeline


@pytest.fixture
def pipeline(tiny_pipeline: Path) -> Any:
    found = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, text_encoder_3=None, tokenizer_3=None)
    found.set_progress_bar_config(disable=True)
    return found


def test_a_live_pipeline_is_the_policy_of_its_folder(pipeline: Any, tiny_pipeline: Path) -> None:
    live, read = load_policy(pipeline, lora=LORA), load_policy(str(tiny_pipeline), lora=LORA)
    assert torch.equal(velocity(live), velocity(read))
    for (name, mine), (other, theirs) in zip(live.trainable_parameters(), read.trainable_parameters(), strict=True):
        assert name == other and torch.equal(mine, theirs)
    pipeline.scheduler.register_to_config(shift=1.0)
    assert torch.equal(live.sigmas(4, (3, 24, 48)), read.sigmas(4, (3, 24, 48)))  # its own scheduler
    assert live.modules()["transformer"] is pipeline.transformer  # shared: the pipeline samples with what is trained


def test_a_loaded_lora_is_part_of_the_base(
    pipeline: Any, tiny_pipeline: Path, teacher: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, expected = teacher
    pipeline.load_lora_weights(str(folder), adapter_name="style")
    policy = load_policy(pipeline, lora=LoRA(rank=2, alpha=2))
    torch.testing.assert_close(velocity(policy), expected, rtol=0, atol=1e-6)  # ours does nothing yet
    assert all("style" not in name for name, _ in policy.trainable_parameters())
    policy.add_roles({"old": Role()})
    before = velocity(policy, "reference")
    torch.testing.assert_close(before, expected, rtol=0, atol=1e-6)
    shaken(policy, seed=4)
    assert not torch.allclose(velocity(policy), before, atol=1e-3)
    assert torch.equal(velocity(policy, "reference"), before)
    torch.testing.assert_close(velocity(policy, "old"), before, rtol=0, atol=1e-6)
    policy.save_lora(tmp_path)
    fresh = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, text_encoder_3=None, tokenizer_3=None)
    fresh.load_lora_weights(str(folder), adapter_name="style")
    again = load_policy(fresh, lora=str(tmp_path))
    torch.testing.assert_close(velocity(again), velocity(policy), rtol=0, atol=1e-6)


def test_live_pipelines_that_cannot_be_a_policy(pipeline: Any, teacher: tuple[Path, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"got dtype, device with a live pipeline.*pipe\.to"):
        load_policy(pipeline, dtype="bf16", device="cpu")
    with pytest.raises(ValueError, match="a live pipeline, a int; expected one of"):
        load_policy(3)  # type: ignore[arg-type]
    pipeline.load_lora_weights(str(teacher[0]), adapter_name="default")
    with pytest.raises(ValueError, match="an adapter named 'default'"):
        load_policy(pipeline)
    with pytest.raises(ValueError, match="unload or fuse"):
        load_policy(pipeline, trainable="full")
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(str(teacher[0]), adapter_name="style")
    pipeline.fuse_lora()
    with pytest.raises(ValueError, match="unfuse_lora"):
        load_policy(pipeline)
    assert pipeline.get_active_adapters() == ["style"]


def changed(change: Any) -> Any:
    """A fault: the file's tensors changed by `change(tensors, name of the first lora_A)`."""

    def plant(file: Path) -> None:
        tensors = load_file(file)
        change(tensors, min(name for name in tensors if "lora_A" in name))
        save_file(tensors, file)

    return plant


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda file: file.write_bytes(b""), r"of 0 bytes, which is damaged .*; expected a whole safetensors file"),
        (lambda file: file.write_bytes(file.read_bytes()[:500]), r"of 500 bytes, which is damaged"),
        (lambda file: file.write_text("version https://git-lfs"), r"which is damaged"),
        (lambda file: save_file(load_file(file), file, {"lora_adapter_metadata": "{"}), r"which is damaged"),
        (
            changed(lambda tensors, name: tensors.pop(name)),
            r"lora_A of rank None and lora_B of rank 4 at .*; expected both",
        ),
        (
            changed(lambda tensors, name: tensors.update({name: torch.zeros(3, 32)})),
            r"lora_A of rank 3 and lora_B of rank 4",
        ),
        (changed(lambda tensors, name: tensors[name].fill_(torch.nan)), r"NaN or infinite; expected finite weights"),
    ],
    ids=["empty", "cut", "pointer", "metadata", "a half missing", "two ranks", "nan"],
)
def test_a_damaged_lora_is_named(plant: Any, message: str, teacher, tiny_pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher[0], tmp_path / "lora")
    plant(tmp_path / "lora" / NAME)
    with pytest.raises(ValueError, match=rf"got .*{tmp_path}/lora/{NAME} .*{message}"):
        load_policy(str(tiny_pipeline), lora=str(tmp_path / "lora"))
